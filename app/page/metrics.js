// Prometheus text as this page reads it: samples, sums, and percentiles of histograms.

const SAMPLE = /^(\w+)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const ESCAPED = { n: "\n", "\\": "\\", '"': '"' };

/** Every sample of a text: [{name, labels, value}]. */
export function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(LABEL)) labels[name] = value.replace(/\\(.)/g, (_, one) => ESCAPED[one] ?? one);
    samples.push({ name: found[1], labels, value: Number(found[3].replace("Inf", "Infinity")) });
  }
  return samples;
}

/** The samples of a name. */
export const of = (samples, name) => samples.filter((sample) => sample.name === name);

export const sum = (samples, name) => of(samples, name).reduce((total, { value }) => total + value, 0);

/** The sum by the value of a label. */
export function sumBy(samples, name, label) {
  const sums = new Map();
  for (const { labels, value } of of(samples, name)) sums.set(labels[label], (sums.get(labels[label]) ?? 0) + value);
  return sums;
}

/** Cumulative counts of a histogram by upper bound, over all labels but `op`: Map of op to Map of bound to count. */
export function buckets(samples, name) {
  const found = new Map();
  for (const { labels, value } of of(samples, `${name}_bucket`)) {
    if (!found.has(labels.op)) found.set(labels.op, new Map());
    const bound = labels.le === "+Inf" ? Infinity : Number(labels.le), counts = found.get(labels.op);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return found;
}

/** What came between two readings; the later one where there is no earlier one. */
export function since(later, earlier) {
  return new Map([...later].map(([bound, count]) => [bound, count - (earlier?.get(bound) ?? 0)]));
}

/** The share-quantile of cumulative counts, straight within a bucket; null where nothing was counted. */
export function quantile(counts, share) {
  const rows = [...counts].sort(([a], [b]) => a - b);
  const total = rows.at(-1)?.[1] ?? 0;
  if (total <= 0) return null;
  let below = 0, least = 0;
  for (const [bound, count] of rows) {
    if (count >= share * total) {
      if (bound === Infinity) return least;
      return least + ((bound - least) * (share * total - below)) / (count - below || 1);
    }
    [below, least] = [count, bound];
  }
  return least;
}
