// Pieces that every part of the page is made of. All text goes in as text, never as markup.

/** An element. Names with a hyphen, and `role`, are attributes; the others are properties. */
export function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

export const at = (id) => document.getElementById(id);

/** Says it to everybody, screen readers included. */
export function announce(text) {
  at("status").textContent = text;
}

/** Shows what went wrong, or with nothing clears it. */
export function complain(error) {
  at("problem").replaceChildren(...(error ? [problemBox(error)] : []));
}

/** An error as a box of text. */
export function problemBox(error) {
  const box = make("div", { className: "problem" }, make("p", {}, error.message));
  const facts = [error.status && `HTTP ${error.status}`, error.code, error.requestId && `request ${error.requestId}`];
  if (error.retryAfter) facts.push(`try again in ${error.retryAfter} s`);
  const line = facts.filter(Boolean).join(" · ");
  if (line) box.append(make("p", { className: "soft" }, line));
  return box;
}

export function bytesText(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) [bytes, unit] = [bytes / 1024, unit + 1];
  return `${unit && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
}

export function countText(count) {
  return count >= 1e6 ? `${(count / 1e6).toFixed(1)} M` : count >= 1e3 ? `${(count / 1e3).toFixed(1)} k` : String(count);
}

export function secondsText(seconds) {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

/** Three significant digits, with a true minus sign. */
export function numberText(value) {
  return String(Number(value.toPrecision(3))).replace("-", "−");
}

/** A bar of parts [{name, value, text}], with its legend and a title if there is one; `whole` is what its full width stands for. */
export function bar(title, parts, whole = parts.reduce((sum, part) => sum + part.value, 0)) {
  const line = make("div", { className: "bar", "aria-hidden": "true" });
  const legend = make("ul", { className: "legend", "aria-label": title || parts[0].name });
  parts.forEach((part, index) => {
    const kind = part.kind ?? `kind-${index % 8}`;
    const piece = make("span", { className: kind, title: `${part.name} ${part.text}` });
    piece.style.width = `${whole ? (100 * part.value) / whole : 0}%`;
    line.append(piece);
    legend.append(make("li", {}, make("span", { className: `swatch ${kind}`, "aria-hidden": "true" }), `${part.name} ${part.text}`));
  });
  return make("div", { className: "measure" }, ...(title ? [make("p", { className: "bar-title" }, title)] : []), line, legend);
}

/** A table of texts under these headings, or a line that says there is nothing. */
export function table(caption, headings, rows, none) {
  if (!rows.length) return make("p", { className: "soft" }, none);
  const head = make("tr", {}, ...headings.map((text) => make("th", { scope: "col" }, text)));
  const body = rows.map((row) => make("tr", {}, ...row.map((text) => make("td", {}, text))));
  return make("table", {}, make("caption", { className: "unseen" }, caption), make("thead", {}, head), make("tbody", {}, ...body));
}
