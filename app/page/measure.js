// A worker that says how far two pictures are apart: PSNR and SSIM, as POST /compare measures them.

const WINDOW = 7, AREA = WINDOW ** 2;
const C1 = (0.01 * 255) ** 2, C2 = (0.03 * 255) ** 2;

/** In dB over 8-bit RGB; Infinity for equal pictures. Both are RGBA. */
function psnr(a, b) {
  let sum = 0;
  for (let at = 0; at < a.length; at++) if (at % 4 !== 3) sum += (a[at] - b[at]) ** 2;
  return 10 * Math.log10(255 ** 2 / (sum / (a.length * 0.75)));
}

/** The mean over windows of 7 x 7 pixels and three channels; null where a side is shorter than a window. */
function ssim(a, b, width, height) {
  if (width < WINDOW || height < WINDOW) return null;
  let total = 0;
  for (let colour = 0; colour < 3; colour++) total += channelSsim(a, b, width, height, colour);
  return total / (3 * (width - WINDOW + 1) * (height - WINDOW + 1));
}

function channelSsim(a, b, width, height, colour) {
  // Sums over the last seven rows of each column: of x, y, x², y², xy. Whole numbers, so nothing is lost on the way.
  const columns = Array.from({ length: 5 }, () => new Float64Array(width));
  const add = (row, sign) => {
    for (let x = 0; x < width; x++) {
      const p = a[(row * width + x) * 4 + colour], q = b[(row * width + x) * 4 + colour];
      columns[0][x] += sign * p;
      columns[1][x] += sign * q;
      columns[2][x] += sign * p * p;
      columns[3][x] += sign * q * q;
      columns[4][x] += sign * p * q;
    }
  };
  let total = 0;
  for (let row = 0; row < height; row++) {
    add(row, 1);
    if (row >= WINDOW) add(row - WINDOW, -1);
    if (row < WINDOW - 1) continue;
    const sums = [0, 0, 0, 0, 0];
    for (let x = 0; x < width; x++) {
      for (let k = 0; k < 5; k++) sums[k] += columns[k][x] - (x >= WINDOW ? columns[k][x - WINDOW] : 0);
      if (x >= WINDOW - 1) total += ofWindow(sums);
    }
  }
  return total;
}

function ofWindow([x, y, xx, yy, xy]) {
  const mx = x / AREA, my = y / AREA, sample = AREA / (AREA - 1);
  const vx = sample * (xx / AREA - mx * mx), vy = sample * (yy / AREA - my * my), vxy = sample * (xy / AREA - mx * my);
  return ((2 * mx * my + C1) * (2 * vxy + C2)) / ((mx * mx + my * my + C1) * (vx + vy + C2));
}

self.onmessage = ({ data: { id, original, picture, width, height } }) => {
  self.postMessage({ id, psnr: psnr(original, picture), ssim: ssim(original, picture, width, height) });
};
