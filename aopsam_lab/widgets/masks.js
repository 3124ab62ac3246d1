// Masks and maps as packing.py sends them: unpacked, and drawn on canvases.

export function tag(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

const rgba = ([r, g, b], a) => ((a << 24) | (b << 16) | (g << 8) | r) >>> 0;

export const unpackMaps = ({ w, h, data: { buffer, byteOffset, byteLength } }) =>
  ({ w, h, values: new Uint16Array(buffer.slice(byteOffset, byteOffset + byteLength)) });

/** COCO's compressed counts -> run lengths down the columns, background first. */
function runLengths(counts) {
  const runs = [];
  for (let at = 0; at < counts.length; ) { // five bits a character, differences to the last but one
    let value = 0, shift = 0, bits;
    do {
      bits = counts.charCodeAt(at++) - 48;
      value |= (bits & 31) << shift;
      shift += 5;
    } while (bits & 32);
    if (bits & 16 && shift < 32) value |= -1 << shift;
    runs.push(runs.length > 2 ? value + runs.at(-2) : value);
  }
  return runs;
}

/** Packed masks -> a list of {runs, area, end (past the last pixel), colour, owner}. */
export function unpackMasks({ counts = [], colours, owners }) {
  const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
  return counts.map((text, i) => {
    const runs = runLengths(text), end = sum(runs.slice(0, runs.length - (runs.length % 2)));
    const area = sum(runs.filter((_, j) => j % 2));
    return { runs, area, end, colour: colours[i], owner: owners[i] };
  });
}

/** Which mask lies on top, i + 1 or 0, column by column. Smaller ones lie over larger ones.
 * A mask's `start` is the pixel where the labels begin. */
export function topMask(masks, size, isShown = () => true) {
  const labels = new Int32Array(size.width * size.height);
  const order = [...masks.keys()].sort((a, b) => masks[b].area - masks[a].area || b - a);
  for (const i of order.filter((one) => isShown(masks[one]))) {
    let at = -(masks[i].start ?? 0);
    masks[i].runs.forEach((length, j) => {
      if (j % 2) labels.fill(i + 1, at, at + length);
      at += length;
    });
  }
  return labels;
}

/** A canvas of the colours that `at(x, y)` gives, 0 for none. */
function drawPixels(width, height, at) {
  const pixels = new ImageData(width, height), out = new Uint32Array(pixels.data.buffer);
  for (let y = 0, i = 0; y < height; y++) for (let x = 0; x < width; x++) out[i++] = at(x, y);
  const canvas = tag("canvas", { width, height });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

/** Every `step`-th pixel of the labels of masks: outlined, and filled with an opacity. */
export function drawLabels(labels, { width, height, edge }, masks, opacity, step = 1) {
  const shades = (a) => Uint32Array.from([0, ...masks.map(({ colour }) => rgba(colour, a))]);
  const inside = shades(Math.round(255 * opacity)), line = shades(255);
  const d = Math.max(edge, step), far = d * height;
  return drawPixels(Math.ceil(width / step), Math.ceil(height / step), (i, j) => {
    const x = i * step, y = j * step, at = x * height + y, label = labels[at];
    const isInner = x >= d && x < width - d && y >= d && y < height - d &&
      labels[at - d] === label && labels[at + d] === label &&
      labels[at - far] === label && labels[at + far] === label;
    return (isInner ? inside : line)[label];
  });
}

/** One mask alone: {canvas, left, step}, the canvas beginning at the column `left`. */
export function drawMask(mask, size, opacity, step) {
  const left = Math.floor(mask.runs[0] / size.height);
  const part = { ...size, width: Math.ceil(mask.end / size.height) - left };
  const labels = topMask([{ ...mask, start: left * size.height }], part);
  return { canvas: drawLabels(labels, part, [mask], opacity, step), left, step };
}

export function drawMap({ w, h, values }, table) {
  const colours = Uint32Array.from(table, (colour) => rgba(colour, 255));
  return drawPixels(w, h, (x, y) => colours[values[y * w + x] >> 8]);
}

/** An image, its half, its quarter, ...: drawn small from one that fits, it does not flicker. */
const halves = new WeakMap();
export function fitting(source, k) {
  if (k > 0.5) return source;
  if (!halves.has(source)) {
    const width = Math.max(1, source.width >> 1), height = Math.max(1, source.height >> 1);
    const half = tag("canvas", { width, height });
    half.getContext("2d").drawImage(source, 0, 0, width, height);
    halves.set(source, half);
  }
  return fitting(halves.get(source), 2 * k);
}
