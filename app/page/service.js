// The second view: the service as it is now, read every two seconds from /metrics and /models while it is looked at.

import { call, key, listModels, modelPath } from "./api.js";
import { announce, at, bar, bytesText, complain, countText, make, numberText, secondsText, table } from "./dom.js";
import { buckets, of, parse, quantile, since, sum, sumBy } from "./metrics.js";
import { deleteButton, showStoring, startStoring } from "./storing.js";

const EVERY = 2000; // milliseconds
const KEPT = 31; // readings: a minute of them
const LISTED = 10; // readings after which the models are listed anew, whatever the metrics say of them
const SHARES = [0.5, 0.95, 0.99];

let refused, timer = null, watched = false, failing = false, readings = [], shownRows = new Map();
let known = null, age = 0; // what the metrics said of models when they were listed, and how many readings ago

/** Begins or ends the reading. */
export function watch(on) {
  watched = on;
  relist();
}

function relist() {
  known = null;
  schedule(0);
}

function schedule(wait) {
  clearTimeout(timer);
  if (watched && !document.hidden) timer = setTimeout(read, wait);
}

async function read() {
  try {
    const samples = parse(await (await call("metrics")).text());
    readings = [...readings, { time: performance.now(), samples }].slice(-KEPT);
    const said = JSON.stringify(samples.filter(({ name }) => name.startsWith("vae_model")));
    const rows = said !== known || ++age >= LISTED ? await listModels() : null;
    if (rows) [known, age] = [said, 0];
    if (failing) complain(null);
    failing = false;
    if (!watched) return;
    showState();
    if (rows) showModels(rows);
    schedule(EVERY);
  } catch (error) {
    failing = true;
    refused(error);
    const again = !error.status || error.status >= 500 || error.status === 429;
    if (again) schedule(2 * EVERY); // a key that is missing comes by hand
  }
}

function showState() {
  const { samples } = readings.at(-1);
  tiles(samples);
  memory(samples);
  queue(samples);
  latency(samples);
  modes(samples);
}

function rate(name) {
  const last = readings.at(-1), first = readings.at(Math.max(0, readings.length - 6));
  if (last === first) return null;
  return Math.max(0, (sum(last.samples, name) - sum(first.samples, name)) / ((last.time - first.time) / 1000));
}

function tiles(samples) {
  const shown = (value, text) => (value === null ? "…" : text(value));
  const made = [
    ["Requests a second", shown(rate("vae_requests_total"), numberText)],
    ["Megapixels a second", shown(rate("vae_pixels_total"), (value) => numberText(value / 1e6))],
    ["In flight", sum(samples, "vae_requests_in_flight")],
    ["Waiting", sum(samples, "vae_queue_depth")],
    ["Oldest waiting", secondsText(sum(samples, "vae_queue_oldest_age_seconds"))],
    ["Refused so far", sum(samples, "vae_rejected_total")],
    ["Device", sum(samples, "vae_draining") ? "ending" : of(samples, "vae_worker_up").every(({ value }) => value) ? "up" : "lost"],
  ];
  const lines = { 0: "vae_requests_total", 1: "vae_pixels_total" };
  at("tiles").replaceChildren(...made.map(([name, value], index) => {
    const tile = make("div", { className: "tile" }, make("b", {}, String(value)), make("span", {}, name));
    if (lines[index]) tile.append(sparkline(lines[index]));
    return tile;
  }));
}

function sparkline(name) {
  const canvas = make("canvas", { width: 120, height: 24, "aria-hidden": "true" }), context = canvas.getContext("2d");
  const steps = readings.slice(1).map((reading, index) => Math.max(0, sum(reading.samples, name) - sum(readings[index].samples, name)));
  const most = Math.max(...steps, 1e-9);
  context.fillStyle = getComputedStyle(document.body).getPropertyValue("--accent");
  steps.forEach((step, index) => context.fillRect(index * 4, 23 - (23 * step) / most, 3, (23 * step) / most + 1));
  return canvas;
}

function memory(samples) {
  const bars = of(samples, "vae_device_memory_bytes").filter(({ labels }) => labels.kind === "total").map(({ labels: { device }, value: total }) => {
    const here = (name) => of(samples, name).filter(({ labels }) => labels.device === device);
    const parts = here("vae_model_resident_bytes").map(({ labels, value }, index) => ({
      ...{ name: `${labels.model} ${labels.dtype}`, value, text: bytesText(value), kind: `kind-${index % 8}` },
    }));
    const free = here("vae_device_memory_bytes").find(({ labels }) => labels.kind === "free")?.value ?? 0;
    const other = Math.max(0, total - free - parts.reduce((all, { value }) => all + value, 0));
    if (other) parts.push({ name: "other", value: other, text: bytesText(other), kind: "kind-other" });
    const models = bar(`${device}: by model`, parts.length ? parts : [{ name: "no model is resident", value: 0, text: "" }]);
    const whole = [{ name: "in use", value: total - free, text: bytesText(total - free), kind: "kind-0" }, { name: "free", value: free, text: bytesText(free), kind: "kind-free" }];
    return [bar(`${device}: ${bytesText(total)}`, whole, total), models];
  });
  at("memory").replaceChildren(...bars.flat());
}

function queue(samples) {
  const rows = of(samples, "vae_queue_depth").filter(({ value }) => value).map(({ labels, value }) => [labels.model, labels.op, String(value)]);
  at("queue").replaceChildren(table("Jobs that wait", ["Model", "Do", "Jobs"], rows, "Nothing waits."));
}

function latency(samples) {
  const name = "vae_request_duration_seconds", before = buckets(readings[0].samples, name);
  const rows = [...buckets(samples, name)].map(([op, counts]) => {
    const recent = since(counts, before.get(op)), any = quantile(recent, 0.5) !== null;
    const used = any ? recent : counts;
    return [op, any ? "last minute" : "since the start", ...SHARES.map((share) => secondsText(quantile(used, share) ?? 0))];
  });
  at("latency").replaceChildren(table("Latency", ["Do", "Over", "p50", "p95", "p99"], rows, "No request yet."));
}

function modes(samples) {
  const counts = [...sumBy(samples, "vae_mode_executions_total", "mode")].map(([mode, count]) => [mode, String(count)]);
  at("modes").replaceChildren(table("Forwards by mode", ["Mode", "Forwards"], counts, "Nothing has run yet."));
  const changes = of(samples, "vae_mode_fallbacks_total").filter(({ value }) => value)
    .map(({ labels, value }) => [`${labels.from} → ${labels.to}`, labels.reason, labels.device, String(value)]);
  for (const [name, text] of [["vae_model_evictions_total", "model evicted"], ["vae_batch_retries_total", "run again"]]) {
    for (const { labels, value } of of(samples, name)) if (value) changes.push([text, labels.reason, labels.device, String(value)]);
  }
  at("switches").replaceChildren(table("Changes of mode", ["Change", "Reason", "Device", "Times"], changes, "None: everything ran in its first mode."));
}

function showModels(rows) {
  const body = at("models"), names = new Set(rows.map((row) => row.name)), admin = key.get() !== "";
  at("admin-hint").textContent = admin ? "" : "With the admin key (Key…) models can be loaded, unloaded, pinned, tested again, uploaded and deleted.";
  at("actions-head").hidden = !admin;
  showStoring(admin);
  at("no-models").hidden = rows.length > 0;
  at("plan-title").hidden = at("plan-form").hidden = !rows.some((row) => !row.error);
  for (const [name, { line }] of shownRows) if (!names.has(name)) shownRows.delete(name) && line.remove();
  for (const row of rows) {
    const text = JSON.stringify([row, admin]), shown = shownRows.get(row.name);
    if (shown?.text === text) continue; // what has the focus stays as it is
    const focus = shown?.line.contains(document.activeElement) ? document.activeElement.textContent : null;
    const line = modelLine(row, admin);
    shown ? shown.line.replaceWith(line) : body.append(line);
    shownRows.set(row.name, { text, line });
    [...line.querySelectorAll("button")].find((button) => button.textContent === focus)?.focus();
  }
  const select = at("plan-model"), usable = rows.filter((row) => !row.error).map((row) => row.name);
  if ([...select.options].map((option) => option.value).join("\n") !== usable.join("\n")) {
    const before = select.value;
    select.replaceChildren(...usable.map((name) => make("option", {}, name)));
    if (usable.includes(before)) select.value = before;
  }
}

function modelLine(row, admin) {
  const head = make("th", { scope: "row" }, row.name);
  if (row.error) return make("tr", {}, head, make("td", { colSpan: admin ? 5 : 4, className: "wrong" }, row.error));
  const here = row.resident.map(({ device, dtype, bytes, in_use: uses, pinned }) => [`${device} ${dtype} ${bytesText(bytes)}`, pinned && "pinned", uses && `in use by ${uses}`].filter(Boolean).join(", "));
  const source = row.family_source === "default" ? "a guess" : row.family_source;
  const line = make(
    "tr", {}, head, make("td", {}, `${row.family} `, make("small", {}, `${source}; ${row.latent_channels} channels, 1/${row.spatial_factor}`)),
    make("td", {}, `${countText(row.parameters)} parameters`), make("td", {}, row.fp16 ?? "–"), make("td", {}, here.join("; ") || "–"),
  );
  if (admin) line.append(make("td", { className: "actions" }, ...["load", "unload", "pin", "unpin", "retest"].map((action) => actionButton(row.name, action)), deleteButton(row.name)));
  return line;
}

function actionButton(name, action) {
  const button = make("button", { type: "button", "aria-label": `${action} ${name}` }, action);
  button.onclick = async () => {
    button.setAttribute("aria-busy", "true");
    try {
      await call(modelPath(name, action), { method: "POST" });
      announce(`${name}: ${action} done`);
    } catch (error) {
      refused(error);
    }
    button.removeAttribute("aria-busy");
    relist();
  };
  return button;
}

async function plan(form) {
  const { model, ...query } = Object.fromEntries(new FormData(form));
  const found = await (await call(modelPath(model, "plan"), { query })).json();
  const text = found.plan ? `${found.plan} on ${found.device}, ${bytesText(found.forecast_bytes)} of working memory` : `does not fit ${found.device}`;
  const most = Math.max(...Object.values(found.plans), 1);
  const bars = Object.entries(found.plans).map(([name, value]) => bar("", [{ name, value, text: bytesText(value), kind: name === found.plan ? "kind-0" : "kind-other" }], most));
  const room = `Free: ${bytesText(found.free_bytes)}; with idle models evicted ${bytesText(found.available_bytes)}.`;
  return [make("p", {}, make("b", {}, text)), make("p", { className: "soft" }, room), ...bars];
}

/** Connects the view; `refusal(error)` is told what the service refuses. */
export function startService(refusal) {
  refused = refusal;
  startStoring(refusal, relist, (name) => shownRows.has(name));
  document.addEventListener("visibilitychange", () => schedule(0));
  at("plan-form").onsubmit = async (event) => {
    event.preventDefault();
    try {
      at("plan").replaceChildren(...(await plan(event.target)));
    } catch (error) {
      refused(error);
    }
  };
}
