"""What runs in ComfyUI's window, in node with stand-ins for the two modules of its frontend."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "clients" / "comfyui" / "web" / "latentd.js"
APP = """export const toasts = []; export let extension;
export const app = { registerExtension: (e) => { extension = e; },
                     extensionManager: { toast: { add: (t) => toasts.push(t.detail) } } };"""
API = """export const api = { asked: [], async fetchApi(path) {
  this.asked.push(path);
  return { json: async () => path.includes("nobody") ? { error: "cannot be reached" } : { models: ["a", "b"] } };
} };"""
RUN = """import "./extensions/latentd/latentd.js";
import { extension, toasts } from "./scripts/app.js";
import { api } from "./scripts/api.js";
const turn = () => new Promise((done) => setTimeout(done, 0));
const first = "(first)";
const model = { name: "model", value: "saved", options: { values: [first] } };
const url = { name: "url", value: "", called: [], callback(value) { this.called.push(value); } };
const node = { comfyClass: "LatentdVAEDecode", widgets: [model, url] };
const seen = {};
extension.nodeCreated({ comfyClass: "VAEDecode" });
extension.nodeCreated(node);
url.value = "http://w"; // as a workflow that is loaded sets it
await turn(); seen.loaded = [...model.options.values];
url.value = "http://nobody"; url.callback(url.value);
await turn(); seen.wrong = [...model.options.values];
url.value = ""; model.options.values = [first]; // as ComfyUI does before it calls this
await extension.refreshComboInNodes({}); seen.refreshed = [...model.options.values];
node.onRemoved(); await extension.refreshComboInNodes({});
console.log(JSON.stringify({ ...seen, value: model.value, toasts, asked: api.asked, called: url.called }));"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_the_list_of_models_is_filled_and_refreshed(tmp_path):
    places = {"scripts/app.js": APP, "scripts/api.js": API, "run.js": RUN, "package.json": '{"type": "module"}'}
    places["extensions/latentd/latentd.js"] = SCRIPT.read_text()
    for name, text in places.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(["node", "run.js"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "loaded": ["(first)", "a", "b"],
        "wrong": ["(first)"],
        "refreshed": ["(first)", "a", "b"],
        "value": "saved",
        "toasts": ["cannot be reached"],
        "asked": [f"/latentd/models?url={url}" for url in ("http%3A%2F%2Fw", "http%3A%2F%2Fnobody", "")],
        "called": ["http://nobody"],
    }
