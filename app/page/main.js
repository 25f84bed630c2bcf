// The page: two views, the key, and the link.

import { key } from "./api.js";
import { announce, at, complain } from "./dom.js";
import { readLink, writeLink } from "./link.js";
import { applySettings, chosen, showModels, startPlayground } from "./playground.js";
import { startService, watch } from "./service.js";

const VIEWS = ["playground", "service"];
let view = "playground";

function show(name) {
  view = name;
  for (const each of VIEWS) {
    at(each).hidden = each !== name;
    at(`show-${each}`).toggleAttribute("aria-current", false);
  }
  at(`show-${name}`).setAttribute("aria-current", "page");
  watch(name === "service");
}

const keep = () => writeLink(view, chosen());

/** Asks for the key where the service wants one; says everything else. */
export function refused(error) {
  complain(error);
  if (error.status === 401 || (error.status === 403 && key.get())) askKey(error.message);
}

function askKey(why) {
  at("key-why").textContent = why ?? "An API key, or the admin key, which opens everything. It is kept for this tab only.";
  at("key").value = "";
  at("forget-key").hidden = !key.get();
  at("key-dialog").returnValue = ""; // Escape leaves the last one
  if (!at("key-dialog").open) at("key-dialog").showModal();
}

async function restore() {
  const asked = readLink();
  applySettings();
  show(asked.view);
  complain(null);
  await showModels(asked.models).catch(refused);
}

for (const each of VIEWS) {
  at(`show-${each}`).onclick = () => {
    announce("");
    show(each);
    keep();
  };
}
at("open-key").onclick = () => askKey();
at("key-dialog").onclose = ({ target }) => {
  if (!["use", "forget"].includes(target.returnValue)) return;
  key.set(target.returnValue === "use" ? at("key").value.trim() : "");
  at("key").value = "";
  restore();
};
at("copy-link").onclick = async () => {
  keep();
  try {
    await navigator.clipboard.writeText(location.href);
    announce("The link is in the clipboard.");
  } catch {
    announce("The link is in the address bar."); // no clipboard without https
  }
};
addEventListener("hashchange", restore);
startPlayground(keep);
startService(refused);
restore();
