// The service as this page calls it: relative addresses, the key of this tab, problems as errors.

const KEY = "latentd-key";

/** What the service refused: its problem+json, or what came in place of one. */
export class Problem extends Error {
  constructor(detail, facts = {}) {
    super(detail);
    Object.assign(this, facts);
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

/** Sends a request and returns its answer. Raises Problem; and AbortError where `signal` ended it. */
export async function call(path, { method = "GET", query = {}, headers = {}, body, signal } = {}) {
  const given = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== "" && value != null));
  const secret = key.get();
  const all = secret ? { ...headers, Authorization: `Bearer ${secret}` } : headers;
  let answer;
  try {
    // Without credentials a browser does not ask for a password of its own where a key is missing.
    answer = await fetch(given.size ? `${path}?${given}` : path, {
      ...{ method, headers: all, body, signal, credentials: "omit", cache: "no-store" },
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The service does not answer.", { code: "unreachable" });
  }
  if (!answer.ok) throw await problemOf(answer);
  return answer;
}

/** Puts a file; `progress(sent, all)` is told how far it is, which fetch cannot say. Raises as `call`. */
export function upload(path, { query = {}, body, signal, progress }) {
  const request = new XMLHttpRequest(), given = new URLSearchParams(query);
  return new Promise((resolve, reject) => {
    request.open("PUT", given.size ? `${path}?${given}` : path);
    request.setRequestHeader("Authorization", `Bearer ${key.get()}`);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.responseType = "blob";
    request.upload.onprogress = ({ loaded, total }) => progress(loaded, total);
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    request.onerror = () => reject(new Problem("The connection broke before the file was there.", { code: "unreachable" }));
    request.onload = () => {
      const header = (name) => request.getResponseHeader(name) ?? "";
      const headers = Object.fromEntries(["content-type", "x-request-id", "retry-after"].map((name) => [name, header(name)]).filter(([, text]) => text));
      const answer = new Response(request.response, { status: request.status, statusText: request.statusText, headers });
      answer.ok ? resolve(answer) : problemOf(answer).then(reject);
    };
    signal.addEventListener("abort", () => request.abort());
    request.send(body);
  });
}

async function problemOf(answer) {
  const facts = {
    status: answer.status,
    requestId: answer.headers.get("x-request-id"),
    retryAfter: answer.headers.get("retry-after"),
  };
  const type = answer.headers.get("content-type") ?? "";
  if (!type.includes("json")) return new Problem(answer.statusText || `HTTP ${answer.status}`, facts);
  const said = await answer.json().catch(() => ({}));
  return new Problem(String(said.detail ?? said.title ?? answer.statusText), { ...facts, code: said.code });
}

/** The path of a model, whose name may have folders. */
export function modelPath(name, action = "") {
  return ["models", ...name.split("/"), ...(action ? [action] : [])].map(encodeURIComponent).join("/");
}

export async function listModels() {
  return (await (await call("models")).json()).models;
}

/** [{name, value}] in milliseconds. */
export function timings(answer) {
  return (answer.headers.get("server-timing") ?? "")
    .split(",")
    .map((part) => /^\s*(\w+);dur=([\d.]+)/.exec(part))
    .filter(Boolean)
    .map(([, name, value]) => ({ name, value: Number(value) }));
}

/** What the headers of an answer say of the work. */
export function told(answer) {
  const header = (name) => answer.headers.get(name);
  return {
    plan: header("x-plan"),
    reason: header("x-plan-reason"),
    warning: header("x-warning") && decodeURIComponent(header("x-warning")),
    size: header("x-image-size"),
    fit: header("x-image-fit"),
    offset: header("x-image-offset"),
    latents: header("x-latents"),
    timings: timings(answer),
  };
}
