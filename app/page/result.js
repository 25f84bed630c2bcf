// One VAE's answer: pictures under a slider, the difference, numbers, times, downloads, and the latent.

import { call, told } from "./api.js";
import { announce, bar, make, numberText, problemBox } from "./dom.js";
import { latentPanel } from "./edit.js";
import { readLatents, toNpy, toSafetensors } from "./latents.js";
import { measured, pixelsOf } from "./pictures.js";

const STAGES = ["read", "queue", "load", "compute", "write"];
const SLOW = 300; // milliseconds of a decode beyond which a preview of the next one is worth its trouble
let made = 0;

/** A card for a model: {element, run(source, settings, signal), fail(error), dispose()}. */
export function card(row) {
  const id = `card-${++made}`, urls = {};
  const facts = make("dl", { className: "facts" }), notes = make("div"), pictures = make("div", { className: "pictures" });
  const times = make("div", { className: "times" }), saves = make("p", { className: "row" });
  const state = make("p", { className: "soft state" }, "Waiting");
  const panel = latentPanel("The latent", (latent) => again(latent));
  const element = make(
    "article", { className: "card", "aria-labelledby": id, "aria-busy": "true" },
    make("h2", { id }, row.name, " ", make("span", { className: "soft" }, row.family ?? "")),
    state, notes, facts, pictures, times, saves,
  );
  const said = {}; // what /encode and /decode said
  let source, settings, latent = null, painting = null, turn = 0;

  function address(name, blob) {
    if (urls[name]) URL.revokeObjectURL(urls[name]);
    return (urls[name] = URL.createObjectURL(blob));
  }

  function busy(text) {
    element.setAttribute("aria-busy", text ? "true" : "false");
    state.textContent = text;
    if (text) announce(`${row.name}: ${text}`);
  }

  function fail(error) {
    busy("");
    const stopped = error.name === "AbortError";
    notes.replaceChildren(stopped ? make("p", { className: "soft" }, "Stopped.") : problemBox(error));
    announce(`${row.name}: ${stopped ? "stopped" : error.message}`);
  }

  async function run(given, chosen, signal) {
    [source, settings] = [given, chosen];
    const own = ++turn;
    if (source.kind === "picture") {
      busy("Encoding…");
      const { latents, fit, posterior, precision, tiling } = settings;
      const seed = posterior === "sample" ? settings.seed : "";
      const answer = await call("encode", {
        method: "POST", body: source.file, signal, headers: { Accept: "application/x-safetensors" },
        query: { model: row.name, latents, fit, posterior, seed, precision, tiling },
      });
      latent = readLatents(await answer.arrayBuffer()).item(0);
      said.encode = told(answer);
    } else {
      latent = source.latent;
    }
    await decode(latent, own, signal);
  }

  async function decode(next, own, signal) {
    busy("Decoding…");
    const { precision, tiling } = settings;
    const convention = next?.metadata.convention; // the file's word; the switch is for those that say nothing
    const answer = await call("decode", {
      method: "POST", signal, body: next ? toSafetensors(next) : source.file, headers: { Accept: "image/png" },
      query: { model: row.name, precision, tiling, latents: convention ? "" : settings.latents },
    });
    const picture = await answer.blob(), pixels = source.kind === "picture" ? await pixelsOf(picture) : null;
    if (own !== turn) return;
    said.decode = told(answer);
    await show(next, picture, pixels, own);
    if (own === turn) busy("");
  }

  /** Decodes a latent that was painted on; of several in a row the last one counts. */
  async function again(next) {
    const own = ++turn;
    painting?.abort();
    painting = new AbortController();
    const { signal } = painting;
    if (slow()) sketch(next, own, signal);
    try {
      await decode(next, own, signal);
    } catch (error) {
      if (own === turn) fail(error);
    }
  }

  const slow = () => sum(said.decode) > SLOW;

  /** Shows a preview of a latent that was painted on until its decode is there; one that is refused is not missed. */
  async function sketch(next, own, signal) {
    try {
      const { convention } = next.metadata;
      const answer = await call("decode", {
        method: "POST", signal, body: toSafetensors(next), headers: { Accept: "image/webp" },
        query: { model: row.name, preview: "linear", latents: convention ? "" : settings.latents },
      });
      const picture = await answer.blob();
      if (own !== turn || element.getAttribute("aria-busy") !== "true") return;
      const source = address("sketch", picture);
      pictures.querySelectorAll("img.decoded").forEach((image) => Object.assign(image, { src: source, alt: `Preview of what ${row.name} makes of it` }));
      state.textContent = "Decoding… this is a preview";
    } catch {} // the decode tells
  }

  async function show(next, picture, pixels, own) {
    const numbers = [];
    let original = null;
    if (pixels) {
      original = await source.part(said.decode);
      const found = await measured(original.pixels, pixels);
      if (own !== turn) return;
      numbers.push(["PSNR", found.psnr === Infinity ? "identical" : `${found.psnr.toFixed(2)} dB`]);
      numbers.push(["SSIM", found.ssim === null ? "too small" : found.ssim.toFixed(4)]);
    }
    pictures.replaceChildren(...stages(original, address("png", picture)));
    showFacts(numbers, next);
    showSaves(next);
    if (next && !panel.element.isConnected) element.append(panel.element);
    if (next) panel.show(next);
    announce(`${row.name}: done. ${numbers.map((pair) => pair.join(" ")).join(", ")}`);
  }

  function stages(original, reconstruction) {
    const decoded = () => make("img", { className: "decoded", src: reconstruction, alt: `What ${row.name} makes of it` });
    if (!original) return [figure("Decoded", make("div", { className: "stage" }, decoded()))];
    const first = (className) => make("img", { src: original.url, alt: "The original", className });
    const both = make("div", { className: "stage split" }, decoded(), first("original"), make("span", { className: "divider" }));
    both.onpointerdown = both.onpointermove = ({ type, buttons, clientX }) => {
      if (type === "pointermove" && !buttons) return;
      const box = both.getBoundingClientRect(), slider = document.getElementById("split");
      slider.value = Math.round((100 * (clientX - box.left)) / box.width);
      slider.dispatchEvent(new Event("input", { bubbles: true }));
    };
    const apart = make("div", { className: "stage difference" }, decoded(), first("original"));
    return [figure("Original | reconstruction", both), figure("Difference, amplified", apart)];
  }

  function figure(caption, content) {
    return make("figure", {}, content, make("figcaption", {}, caption));
  }

  function showFacts(numbers, next) {
    const { encode, decode: back } = said;
    const plan = (one) => (one.reason ? `${one.plan}, because: ${one.reason}` : one.plan);
    const pairs = [...numbers, ...(encode ? [["Encoded", plan(encode)]] : []), ["Decoded", plan(back)], ["Picture", back.size]];
    if (next) pairs.push(["Latent", `${next.channels} × ${next.height} × ${next.width}, ${back.latents}${next.bytes ? "" : ", painted on"}`]);
    facts.replaceChildren(...pairs.map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text ?? "–"))));
    const warnings = [encode?.warning, back.warning].filter(Boolean);
    notes.replaceChildren(...warnings.map((text) => make("p", { className: "warning" }, text)));
    const whole = Math.max(...[encode, back].filter(Boolean).map(sum));
    times.replaceChildren(...(encode ? [timeBar("Encode", encode, whole)] : []), timeBar("Decode", back, whole));
  }

  function sum(one) {
    return one.timings.reduce((total, { value }) => total + value, 0);
  }

  function timeBar(title, one, whole) {
    const parts = one.timings.map(({ name, value }) => ({
      ...{ name, value, text: `${numberText(value)} ms`, kind: `kind-${Math.max(0, STAGES.indexOf(name))}` },
    }));
    return bar(`${title} ${numberText(sum(one))} ms`, parts, whole);
  }

  function showSaves(next) {
    const stem = `${source.name}.${row.name.replaceAll("/", "-")}`;
    const save = (text, extension, href) => make("a", { href, download: `${stem}.${extension}`, className: "button" }, text);
    const links = [save("PNG", "png", urls.png)];
    if (next) links.push(save(".npy", "npy", address("npy", new Blob([toNpy(next)]))));
    if (next) links.push(save("Safetensors", "safetensors", address("safetensors", new Blob([toSafetensors(next)]))));
    saves.replaceChildren(make("span", {}, "Save"), ...links);
  }

  function dispose() {
    turn++;
    painting?.abort();
    Object.values(urls).forEach((each) => URL.revokeObjectURL(each));
  }

  return { element, run, fail, dispose };
}
