// The latent of a card: its channels as pictures, and a grid to paint on.

import { at, make } from "./dom.js";
import { channelOf, multiplied } from "./latents.js";
import { drawChannel, drawComponents, rangeText } from "./views.js";

const ALL = null; // instead of a channel's number

/** A panel for a latent; `decode(latent)` is called with each changed one. Returns {element, show(latent)}. */
export function latentPanel(title, decode) {
  let latent, channel = ALL, past = [], region, from = null;

  const canvas = make("canvas", { role: "img" });
  const mark = make("div", { className: "mark", hidden: true });
  const board = make("div", { className: "board" }, canvas, mark);
  const grid = make("div", { className: "channels", role: "group", "aria-label": "Channels to look at and to paint on" });
  const field = (name, value) => [name, make("input", { type: "number", name, min: 0, value, required: true })];
  const fields = ["x", "y", "width", "height"].map((name) => field(name, 0));
  const factor = make("input", { type: "number", name: "factor", step: "any", value: "1.5", required: true });
  const undo = make("button", { type: "button", disabled: true, onclick: () => back(past.length - 1) }, "Undo");
  const reset = make("button", { type: "button", disabled: true, onclick: () => back(0) }, "Start over");
  const what = make("p", { className: "soft" });
  const form = make(
    "form", { className: "paint" }, what,
    make("div", { className: "row" }, ...fields.map((parts) => make("label", {}, ...parts)), button("Whole grid", whole)),
    make("div", { className: "row" }, button("Zero it", () => change(0)), make("label", {}, "Factor", factor),
      button("Multiply", () => change(Number(factor.value))), undo, reset),
  );
  const element = make(
    "details", { className: "latent", open: true }, make("summary", {}, title), grid,
    make("div", { className: "painting" }, board, form),
  );

  function button(text, onclick) {
    return make("button", { type: "button", onclick }, text);
  }

  function show(next) {
    const fresh = !latent || latent.width !== next.width || latent.height !== next.height;
    latent = next;
    const names = [ALL, ...Array.from({ length: next.channels }, (_, index) => index)];
    grid.replaceChildren(...names.map(choice));
    if (fresh) whole();
    look();
  }

  function choice(index) {
    const small = make("canvas", { "aria-hidden": "true" });
    index === ALL ? drawComponents(small, latent) : drawChannel(small, latent, index);
    const name = index === ALL ? "All" : `Channel ${index}`;
    const about = index === ALL ? "first 3 components" : rangeText(channelOf(latent, index));
    const pick = make("button", { type: "button", "aria-pressed": String(index === channel) },
      small, make("b", {}, name), make("span", {}, about));
    pick.onclick = () => {
      channel = index;
      [...grid.children].forEach((each) => each.setAttribute("aria-pressed", String(each === pick)));
      look();
    };
    return pick;
  }

  function look() {
    const name = channel === ALL ? "all channels" : `channel ${channel}`;
    channel === ALL ? drawComponents(canvas, latent) : drawChannel(canvas, latent, channel);
    canvas.setAttribute("aria-label", `${name} of the latent, ${latent.width} by ${latent.height}`);
    what.textContent = `Painting on ${name}. Drag over the picture, or give the region in positions of the ${latent.width} × ${latent.height} grid.`;
  }

  function whole() {
    place({ x: 0, y: 0, width: latent.width, height: latent.height });
  }

  function place(next) {
    region = next;
    fields.forEach(([name, input]) => {
      input.max = name === "x" || name === "width" ? latent.width : latent.height;
      input.value = region[name];
    });
    outline();
  }

  function outline() {
    const share = (value, side) => `${(100 * value) / side}%`;
    mark.hidden = region.width === latent.width && region.height === latent.height;
    Object.assign(mark.style, {
      left: share(region.x, latent.width), width: share(region.width, latent.width),
      top: share(region.y, latent.height), height: share(region.height, latent.height),
    });
  }

  form.oninput = () => {
    const given = Object.fromEntries(fields.map(([name, input]) => [name, Math.max(0, Math.floor(Number(input.value)))]));
    const x = Math.min(given.x, latent.width), y = Math.min(given.y, latent.height);
    region = { x, y, width: Math.min(given.width, latent.width - x), height: Math.min(given.height, latent.height - y) };
    outline();
  };
  form.onsubmit = (event) => event.preventDefault();

  function position({ clientX, clientY }) {
    const box = canvas.getBoundingClientRect();
    const along = (value, start, length, side) => Math.min(side - 1, Math.max(0, Math.floor(((value - start) / length) * side)));
    return [along(clientX, box.left, box.width, latent.width), along(clientY, box.top, box.height, latent.height)];
  }

  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    from = position(event);
    canvas.onpointermove(event);
  };
  canvas.onpointermove = (event) => {
    if (!from) return;
    const to = position(event);
    const x = Math.min(from[0], to[0]), y = Math.min(from[1], to[1]);
    place({ x, y, width: Math.abs(from[0] - to[0]) + 1, height: Math.abs(from[1] - to[1]) + 1 });
  };
  canvas.onpointerup = canvas.onpointercancel = () => (from = null);

  function change(by) {
    if (!Number.isFinite(by) || !region.width || !region.height) {
      at("status").textContent = "The region is empty, or the factor is not a number.";
      return;
    }
    past.push(latent);
    settle(multiplied(latent, channel, region, by));
  }

  function back(to) {
    const before = past[to];
    past = past.slice(0, to);
    settle(before);
  }

  function settle(next) {
    undo.disabled = reset.disabled = !past.length;
    show(next);
    decode(next);
  }

  return { element, show };
}
