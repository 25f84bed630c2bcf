// Fills the lists of models from the service that a node names: when it is made or loaded, when its url changes, and at R.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const OURS = new Set(["LatentdVAELoader", "LatentdVAEDecode", "LatentdVAEEncode"]);
const alive = new Set();

const widget = (node, name) => node.widgets?.find((w) => w.name === name);

async function fill(node) {
  const url = widget(node, "url").value;
  const model = widget(node, "model");
  const answer = await api.fetchApi(`/latentd/models?url=${encodeURIComponent(url)}`);
  const body = await answer.json();
  if (url !== widget(node, "url").value) return; // it was changed meanwhile, and asked again
  const first = model.options.values[0]; // that of the node's own definition: no model in particular
  model.options.values = [first, ...(body.models ?? [])];
  if (body.error) {
    app.extensionManager.toast.add({ severity: "warn", summary: "latentd", detail: body.error, life: 8000 });
  }
}

app.registerExtension({
  name: "latentd.models",
  nodeCreated(node) {
    if (!OURS.has(node.comfyClass)) return;
    alive.add(node);
    const removed = node.onRemoved;
    node.onRemoved = function (...args) {
      alive.delete(node);
      return removed?.apply(this, args);
    };
    const url = widget(node, "url");
    const changed = url.callback;
    url.callback = function (...args) {
      const result = changed?.apply(this, args);
      fill(node);
      return result;
    };
    queueMicrotask(() => fill(node)); // once a loaded workflow's values are in their widgets
  },
  refreshComboInNodes() {
    return Promise.all([...alive].map(fill));
  },
});
