// Latent files: .npy and safetensors (ComfyUI's .latent is one) into numbers and back, and what can be done to them.
//
// A latent is {channels, height, width, values (float32, C x h x w), metadata, dtype, bytes}. `bytes` are the numbers as
// the file has them, null once they have been changed.

const SIZES = { F16: 2, BF16: 2, F32: 4 };
const NUMPY = { "<f2": "F16", "<f4": "F32" };
const KEPT = /^(convention|family|image_\w+|model|sha256)$/; // of a file's metadata: what the service asks for, and whence it came
const NAMES = ["latents", "latent_tensor", "latent"];

/** Every latent of a file, as a batch: {count, item(index)}; null where this page cannot read the form. */
export function readLatents(buffer) {
  const bytes = new Uint8Array(buffer);
  const found = isNpy(bytes) ? readNpy(bytes) : readSafetensors(bytes);
  if (!found) return null;
  const shape = found.shape.length === 3 ? [1, ...found.shape] : found.shape;
  if (shape.length !== 4 || shape.some((side) => !Number.isInteger(side) || side < 1)) return null;
  const [count, channels, height, width] = shape;
  const each = channels * height * width * SIZES[found.dtype];
  if (found.data.length !== count * each) return null;
  return { count, item: (index) => latentOf(found, index, each, { channels, height, width }) };
}

function latentOf({ data, dtype, metadata }, index, each, shape) {
  const bytes = data.slice(index * each, (index + 1) * each);
  const own = { ...metadata };
  for (const [name, separator] of [["image_size", ", "], ["image_offset", "; "]]) {
    const several = own[name]?.split(separator); // of each latent of the batch, or of all
    if (several?.length > 1) own[name] = several[index];
  }
  return { ...shape, dtype, bytes, values: numbers(bytes, dtype), metadata: own };
}

function isNpy(bytes) {
  return bytes[0] === 0x93 && String.fromCharCode(...bytes.slice(1, 6)) === "NUMPY";
}

function readNpy(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  if (bytes.length < 12) return null;
  const [start, length] = bytes[6] === 1 ? [10, view.getUint16(8, true)] : [12, view.getUint32(8, true)];
  const header = new TextDecoder("latin1").decode(bytes.slice(start, start + length));
  const dtype = NUMPY[/'descr':\s*'([^']*)'/.exec(header)?.[1]];
  const shape = /'shape':\s*\(([^)]*)\)/.exec(header)?.[1];
  if (!dtype || shape === undefined || /'fortran_order':\s*True/.test(header)) return null;
  const sides = shape.split(",").filter((side) => side.trim()).map(Number);
  return { dtype, shape: sides, data: bytes.slice(start + length), metadata: {} };
}

function readSafetensors(bytes) {
  if (bytes.length < 10) return null;
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  if (length > bytes.length - 8 || bytes[8] !== 0x7b) return null;
  let header;
  try {
    header = Object(JSON.parse(new TextDecoder().decode(bytes.slice(8, 8 + length))));
  } catch {
    return null;
  }
  const { __metadata__: said = {}, ...tensors } = header;
  const names = Object.keys(tensors);
  const tensor = tensors[names.length === 1 ? names[0] : NAMES.find((name) => name in tensors)];
  if (!SIZES[tensor?.dtype] || !Array.isArray(tensor.shape) || !Array.isArray(tensor.data_offsets)) return null;
  const raw = "latent_format_version_0" in tensors ? { convention: "raw" } : {}; // as the service reads them
  const metadata = Object.fromEntries(
    Object.entries({ ...raw, ...said }).filter(([name, text]) => KEPT.test(name) && typeof text === "string"),
  );
  const [from, to] = tensor.data_offsets;
  return { dtype: tensor.dtype, shape: tensor.shape, data: bytes.slice(8 + length + from, 8 + length + to), metadata };
}

function numbers(bytes, dtype) {
  if (dtype === "F32") return new Float32Array(bytes.slice().buffer);
  const halves = new Uint16Array(bytes.slice().buffer);
  if (dtype === "F16") return Float32Array.from(halves, fromHalf);
  return new Float32Array(Uint32Array.from(halves, (half) => half << 16).buffer); // bfloat16: the upper half of a float32
}

function fromHalf(half) {
  const sign = half & 0x8000 ? -1 : 1, exponent = (half >> 10) & 31, fraction = half & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -24 * fraction;
}

function payload({ bytes, dtype, values }, allowed) {
  if (bytes && allowed.includes(dtype)) return { data: bytes, dtype };
  return { data: new Uint8Array(values.buffer, values.byteOffset, values.byteLength), dtype: "F32" };
}

/** The latent as a safetensors file, with what its own file said of it. */
export function toSafetensors(latent) {
  const { data, dtype } = payload(latent, Object.keys(SIZES));
  const tensor = { dtype, shape: [1, latent.channels, latent.height, latent.width], data_offsets: [0, data.length] };
  const text = new TextEncoder().encode(JSON.stringify({ __metadata__: latent.metadata, latents: tensor }));
  const padded = Math.ceil(text.length / 8) * 8;
  const file = new Uint8Array(8 + padded + data.length).fill(0x20);
  new DataView(file.buffer).setBigUint64(0, BigInt(padded), true);
  file.set(text, 8);
  file.set(data, 8 + padded);
  return file;
}

/** The latent as an .npy file; bfloat16, which it does not know, as float32. */
export function toNpy(latent) {
  const { data, dtype } = payload(latent, ["F16", "F32"]);
  const shape = `(1, ${latent.channels}, ${latent.height}, ${latent.width})`;
  const dictionary = `{'descr': '${dtype === "F16" ? "<f2" : "<f4"}', 'fortran_order': False, 'shape': ${shape}, }`;
  const length = Math.ceil((10 + dictionary.length + 1) / 64) * 64 - 10;
  const file = new Uint8Array(10 + length + data.length);
  file.set([0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, length & 255, length >> 8]);
  file.set(new TextEncoder().encode(dictionary.padEnd(length - 1) + "\n"), 10);
  file.set(data, 10 + length);
  return file;
}

/** The latent with a channel, or with null all of them, multiplied inside {x, y, width, height}. */
export function multiplied(latent, channel, region, factor) {
  const values = latent.values.slice(), { height, width } = latent;
  const channels = channel === null ? Array.from({ length: latent.channels }, (_, index) => index) : [channel];
  for (const index of channels) {
    for (let y = region.y; y < region.y + region.height; y++) {
      const start = (index * height + y) * width;
      for (let x = region.x; x < region.x + region.width; x++) values[start + x] *= factor;
    }
  }
  return { ...latent, values, bytes: null };
}

/** A channel's numbers. */
export function channelOf(latent, index) {
  const size = latent.height * latent.width;
  return latent.values.subarray(index * size, (index + 1) * size);
}
