// Pictures as this page holds them: the file that was chosen, its pixels, and how far another one is from it.

const worker = new Worker(new URL("measure.js", import.meta.url), { type: "module" });
const waiting = new Map();
let asked = 0;

worker.onmessage = ({ data }) => {
  waiting.get(data.id)(data);
  waiting.delete(data.id);
};

/** {psnr, ssim} of two ImageData of one size. */
export function measured(original, picture) {
  const { width, height } = picture, id = ++asked;
  if (original.width !== width || original.height !== height) {
    throw new Error(`The original has ${original.width} × ${original.height} pixels here, the answer ${width} × ${height}.`);
  }
  return new Promise((resolve) => {
    waiting.set(id, resolve);
    worker.postMessage({ id, original: original.data, picture: picture.data, width, height });
  });
}

/** The pixels of a picture file over white, as the service reads it. */
export async function pixelsOf(blob) {
  const bitmap = await createImageBitmap(blob);
  return canvasOf(bitmap, 0, 0, bitmap.width, bitmap.height).context.getImageData(0, 0, bitmap.width, bitmap.height);
}

/** A chosen picture: {kind, file, name, url, part(told), dispose()}. Raises where the browser cannot show it. */
export async function pictureSource(file, name) {
  const bitmap = await createImageBitmap(file);
  const url = URL.createObjectURL(file), urls = [url], parts = new Map();

  /** {url, pixels} of what an answer's picture is of: the whole, or with fit=crop the part that was kept. */
  async function part({ fit, size, offset }) {
    const id = fit === "crop" ? `${size} ${offset}` : "";
    if (!parts.has(id)) parts.set(id, await cut(id && [...offset.split(","), ...size.split("x")].map(Number)));
    return parts.get(id);
  }

  async function cut(box) {
    const [x, y, width, height] = box || [0, 0, bitmap.width, bitmap.height];
    const { canvas, context } = canvasOf(bitmap, x, y, width, height);
    const pixels = context.getImageData(0, 0, width, height);
    if (!box) return { url, pixels };
    const blob = await new Promise((resolve) => canvas.toBlob(resolve));
    urls.push(URL.createObjectURL(blob));
    return { url: urls.at(-1), pixels };
  }

  const about = `${bitmap.width} × ${bitmap.height}`;
  return { kind: "picture", file, name, url, about, part, dispose: () => urls.forEach((each) => URL.revokeObjectURL(each)) };
}

function canvasOf(bitmap, x, y, width, height) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, -x, -y);
  return { canvas, context };
}
