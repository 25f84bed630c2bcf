// The settings in the address: a link restores the view, the choice of models and what differs from the defaults.

import { at } from "./dom.js";

const fields = () => [...document.querySelectorAll("[name]")].filter((field) => field.form === at("settings") && field.type !== "checkbox");
const initial = (field) => (field.tagName === "SELECT" ? field.options[0].value : field.defaultValue);

/** What the address asks for: {view, models}; the settings are put into their fields. */
export function readLink() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const field of fields()) {
    const value = given.get(field.name) ?? initial(field);
    const known = field.tagName !== "SELECT" || [...field.options].some((option) => option.value === value);
    if (known) field.value = value;
  }
  return { view: given.get("view") === "service" ? "service" : "playground", models: given.getAll("model") };
}

/** Writes the settings into the address, without a step in the history. */
export function writeLink(view, models) {
  const said = new URLSearchParams(models.map((name) => ["model", name]));
  if (view === "service") said.set("view", view);
  for (const field of fields()) if (field.value !== initial(field)) said.set(field.name, field.value);
  history.replaceState(null, "", said.size ? `#${said}` : location.pathname + location.search);
}
