// A latent as pictures: each channel in grey, and the first three principal components in false colour.

import { numberText } from "./dom.js";
import { channelOf } from "./latents.js";

const ROUNDS = 40; // of the power iteration
const POSITIONS = 4096; // that the covariance is taken over

/** [least, greatest] of finite numbers. */
export function range(values) {
  let least = Infinity, greatest = -Infinity;
  for (const value of values) {
    if (value < least) least = value;
    if (value > greatest) greatest = value;
  }
  return [least, greatest];
}

export function rangeText(values) {
  const [least, greatest] = range(values);
  return `${numberText(least)} … ${numberText(greatest)}`;
}

/** Draws (h x w) numbers: black is the least of them, white the greatest. */
export function drawChannel(canvas, latent, index) {
  const values = channelOf(latent, index);
  const [least, greatest] = range(values), scale = 255 / (greatest - least || 1);
  draw(canvas, latent, (at, pixels) => pixels.fill((values[at] - least) * scale, at * 4, at * 4 + 3));
}

/** Draws the first three principal components as red, green and blue, two and a half deviations each way. */
export function drawComponents(canvas, latent) {
  const { means, axes } = principal(latent);
  const size = latent.height * latent.width;
  draw(canvas, latent, (at, pixels) => {
    axes.forEach(({ axis, deviation }, colour) => {
      let sum = 0;
      for (let c = 0; c < axis.length; c++) sum += axis[c] * (latent.values[c * size + at] - means[c]);
      pixels[at * 4 + colour] = 127.5 + (127.5 * sum) / (2.5 * deviation || 1);
    });
  });
}

function draw(canvas, { width, height }, paint) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  for (let at = 0; at < width * height; at++) {
    paint(at, image.data);
    image.data[at * 4 + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** The means of the channels, and up to three axes (unit vectors) with the deviation along each. */
export function principal(latent) {
  const { channels, values } = latent, size = latent.height * latent.width;
  const step = Math.ceil(size / POSITIONS), count = Math.ceil(size / step);
  const means = Array.from({ length: channels }, (_, c) => channelOf(latent, c).reduce((sum, value) => sum + value, 0) / size);
  const covariance = Array.from({ length: channels }, () => new Float64Array(channels));
  for (let a = 0; a < channels; a++) {
    for (let b = a; b < channels; b++) {
      let sum = 0;
      for (let at = 0; at < size; at += step) sum += (values[a * size + at] - means[a]) * (values[b * size + at] - means[b]);
      covariance[a][b] = covariance[b][a] = sum / count;
    }
  }
  const axes = [];
  for (let number = 0; number < Math.min(3, channels); number++) axes.push(strongest(covariance));
  return { means, axes };
}

/** The eigenvector of the largest eigenvalue, which is then taken out of the matrix. */
function strongest(matrix) {
  let axis = Float64Array.from(matrix, (_, index) => 1 + index / matrix.length), variance = 0;
  for (let round = 0; round < ROUNDS; round++) {
    const next = Float64Array.from(matrix, (row) => row.reduce((sum, value, index) => sum + value * axis[index], 0));
    variance = Math.hypot(...next);
    if (!variance) break;
    axis = next.map((value) => value / variance);
  }
  const length = Math.hypot(...axis);
  axis = axis.map((value) => value / length);
  const largest = axis.reduce((best, value) => (Math.abs(value) > Math.abs(best) ? value : best), 0);
  if (largest < 0) axis = axis.map((value) => -value); // either sign is right; the same picture gets the same one
  matrix.forEach((row, a) => row.forEach((_, b) => (row[b] -= variance * axis[a] * axis[b])));
  return { axis, deviation: Math.sqrt(variance) };
}
