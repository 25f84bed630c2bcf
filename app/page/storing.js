// With the admin key: models come into the service's folder, and leave it.

import { call, key, modelPath, upload } from "./api.js";
import { announce, at, bytesText, complain, make } from "./dom.js";

const SUFFIX = /\.(safetensors|sft|pt|pth|ckpt|bin)$/i;

let refused, changed, exists, sending = null, doomed = null;

/** Shows what the admin has, or hides it. */
export function showStoring(admin) {
  at("upload-form").hidden = !admin;
}

/** A button that asks before it deletes a model. */
export function deleteButton(name) {
  const button = make("button", { type: "button", "aria-label": `delete ${name}` }, "delete");
  button.onclick = () => {
    doomed = name;
    at("delete-title").textContent = `Delete ${name}?`;
    at("delete-dialog").returnValue = ""; // Escape leaves the last one
    at("delete-dialog").showModal();
  };
  return button;
}

async function remove(name) {
  announce(`${name}: being deleted`);
  try {
    await call(modelPath(name), { method: "DELETE" });
    complain(null);
    announce(`${name}: deleted`);
    at("models-table").focus(); // its row, which had the focus, goes
  } catch (error) {
    refused(error);
  }
  changed();
}

async function send() {
  const file = at("upload-file").files[0], name = at("upload-name").value.trim(), replace = at("upload-replace").checked;
  if (!file || !name) return announce("Choose a file and give it a name first.");
  if (exists(name) && !replace) return announce(`There is a model ${name}. Tick “Replace” to put this file in its place.`);
  const own = (sending = new AbortController());
  at("upload-progress").hidden = false;
  at("upload-send").disabled = true;
  progress(0, file.size);
  announce(`${name}: uploading`);
  try {
    await upload(modelPath(name), { body: file, query: replace ? { replace } : {}, signal: own.signal, progress });
    complain(null);
    announce(`${name}: uploaded`);
    at("upload-form").reset();
  } catch (error) {
    if (error.name === "AbortError") announce(`${name}: the upload was cancelled`);
    else refused(error);
  }
  at("upload-progress").hidden = true;
  at("upload-send").disabled = false;
  changed();
}

function progress(sent, all) {
  const whole = sent >= all;
  at("upload-bar").max = Math.max(1, all);
  at("upload-bar").value = sent;
  at("upload-text").textContent = whole ? "All of it is there; the service checks it…" : `${bytesText(sent)} of ${bytesText(all)}`;
}

/** Connects it: who is told of refusals, who of changes, and who knows whether there is a model of a name. */
export function startStoring(refusal, change, known) {
  [refused, changed, exists] = [refusal, change, known];
  at("upload-file").onchange = () => (at("upload-name").value = at("upload-file").files[0]?.name.replace(SUFFIX, "") ?? "");
  at("upload-form").onsubmit = (event) => {
    event.preventDefault();
    if (key.get()) send();
  };
  at("upload-cancel").onclick = () => sending?.abort();
  at("delete-dialog").onclose = ({ target }) => target.returnValue === "delete" && remove(doomed);
}
