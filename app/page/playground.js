// The first view: a file is chosen, goes through one or several VAEs, and each answers in a card.

import { listModels } from "./api.js";
import { announce, at, complain, countText, make } from "./dom.js";
import { readLatents } from "./latents.js";
import { pictureSource } from "./pictures.js";
import { card } from "./result.js";

const NARROW = "(max-width: 54rem)"; // as in page.css: the answers are below the settings
const MANY = 8; // models from which on there is a field to find them

let rows = [], source = null, running = null, cards = [];

/** The names of the models that are ticked. */
export const chosen = () => [...at("choices").querySelectorAll("input:checked")].map((box) => box.value);

/** Lists the models and ticks these, or the first one; says which of them are not there. */
export async function showModels(names) {
  at("choices").replaceChildren(make("li", { className: "soft" }, "Loading…"));
  try {
    rows = await listModels();
  } catch (error) {
    at("choices").replaceChildren(make("li", { className: "soft" }, "The models could not be listed."));
    throw error;
  }
  const usable = rows.filter((row) => !row.error);
  const wanted = names.length ? names : usable.slice(0, 1).map((row) => row.name);
  at("choices").replaceChildren(...rows.map((row) => choice(row, wanted)));
  if (!rows.length) at("choices").append(make("li", { className: "soft" }, "There is no VAE yet: put one into the models folder."));
  at("filter-line").hidden = rows.length < MANY;
  const missing = names.filter((name) => !usable.some((row) => row.name === name));
  if (missing.length) announce(`The link names what is not here: ${missing.join(", ")}`);
}

function choice(row, wanted) {
  const box = make("input", { type: "checkbox", value: row.name, checked: wanted.includes(row.name) && !row.error, disabled: !!row.error });
  const about = row.error ?? `${row.family}, ${countText(row.parameters)} parameters`;
  return make("li", {}, make("label", {}, box, make("span", {}, row.name, make("small", {}, about))));
}

/** Takes a file: a picture, or latents. */
export async function take(file) {
  complain(null);
  source?.dispose?.();
  source = null;
  const name = (file.name ?? "pasted").replace(/\.[^.]*$/, "") || "pasted";
  at("source-picture").hidden = at("item-line").hidden = true;
  if (file.type.startsWith("image/") || /\.(png|jpe?g|webp|avif)$/i.test(file.name ?? "")) await takePicture(file, name);
  else await takeLatents(file, name);
  await run();
}

async function takePicture(file, name) {
  try {
    source = await pictureSource(file, name);
    at("source-picture").src = source.url;
    at("source-picture").hidden = false;
    describe(`${file.name ?? "Pasted picture"}, ${source.about}`);
  } catch {
    source = { kind: "latent", file, name, latent: null }; // the service says what is wrong with it
    describe(`${file.name}: this browser cannot show it`);
  }
}

async function takeLatents(file, name) {
  const batch = readLatents(await file.arrayBuffer());
  source = { kind: "latent", file, name, latent: null };
  if (!batch) return describe(`${file.name}: sent as it is`);
  const pick = () => {
    const index = Math.min(batch.count - 1, Math.max(0, Math.floor(Number(at("item").value))));
    source.latent = batch.item(index);
    const { channels, height, width, dtype, metadata } = source.latent;
    const says = metadata.convention ? `, and says it is ${metadata.convention}` : ", convention as set below";
    describe(`${file.name}: ${channels} × ${height} × ${width} ${dtype}${says}`);
  };
  at("item").value = 0;
  at("item").max = batch.count - 1;
  at("item").onchange = pick;
  at("item-line").hidden = batch.count === 1;
  pick();
}

function describe(text) {
  at("source-text").textContent = text;
}

/** Sends what was taken through each model that is ticked. */
export async function run() {
  running?.abort();
  if (!source) return announce("Choose a picture or a latent first.");
  const names = chosen();
  if (!names.length) return announce("Choose a VAE first.");
  const own = (running = new AbortController()), settings = Object.fromEntries(new FormData(at("settings")));
  cards.forEach((each) => each.dispose());
  cards = names.map((name) => card(rows.find((row) => row.name === name)));
  at("cards").replaceChildren(...cards.map((each) => each.element));
  at("nothing").hidden = true;
  at("toolbar").hidden = source.kind !== "picture";
  at("stop").hidden = false;
  if (matchMedia(NARROW).matches) at("cards").scrollIntoView();
  const given = source;
  for (const each of cards) {
    // One after the other: the service loads each model once, however few the device holds.
    try {
      own.signal.throwIfAborted();
      await each.run(given, settings, own.signal);
    } catch (error) {
      each.fail(error);
    }
  }
  if (running === own) at("stop").hidden = true;
}

function slide() {
  at("cards").style.setProperty("--split", `${at("split").value}%`);
  at("cards").style.setProperty("--gain", at("gain").value);
  at("gain-value").textContent = at("gain").value;
}

/** Connects the view; `changed` is called when a setting or a choice has changed. */
export function startPlayground(changed) {
  const drop = at("drop"), safely = (file) => file && take(file).catch(complain);
  at("settings").onsubmit = (event) => {
    event.preventDefault();
    run().catch(complain);
  };
  document.addEventListener("input", ({ target }) => {
    if (target.form !== at("settings")) return;
    slide();
    changed();
  });
  at("stop").onclick = () => running?.abort();
  at("filter").oninput = () => {
    const part = at("filter").value.toLowerCase();
    for (const item of at("choices").children) item.hidden = !item.textContent.toLowerCase().includes(part);
  };
  at("file").onchange = () => {
    safely(at("file").files[0]);
    at("file").value = ""; // the same file again is a change too
  };
  document.addEventListener("paste", ({ clipboardData }) => safely(clipboardData.files[0]));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    safely(event.dataTransfer.files[0]);
  });
  if (matchMedia(NARROW).matches) at("more").open = false;
  slide();
}

/** Brings the sliders' effect in line with their values. */
export const applySettings = slide;
