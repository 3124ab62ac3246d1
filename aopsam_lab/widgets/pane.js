// One result as packing.py sends it: its masks, maps and prompts, in a round, in words and drawn.

export const LAYERS = {
  image: "Image", pcm: "PCM", smoothed: "Smoothed PCM", pem: "PEM", masks: "Masks",
  ground_truth: "Ground truth", prompts: "Prompts",
};
const KEPT = 0, ELIMINATED = 1, WAITING = 6, BY_HAND = 7; // indices into packing.py's STYLES

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

export class Pane {
  /** sources: what layers are drawn from, image and ground truth at first. */
  constructor(result, size, look, sources) {
    const { prompts, references } = result; // references: prompt, threshold, round
    Object.assign(this, { result, size, look, sources, prompts, references, round: null });
    this.masks = unpackMasks(result.masks);
    this.auto = prompts.filter(({ status }) => status !== BY_HAND).length; // those by hand follow
    this.maps = {};
    for (const name in result.maps) this.maps[name] = unpackMaps(result.maps[name]);
    this.pems = this.maps.pem;
  }
  setRound(round) {
    if (round === this.round) return;
    this.round = round;
    const isShown = ({ owner }) => !(this.prompts[owner]?.decided >= round);
    this.labels = topMask(this.masks, this.size, isShown);
    delete this.sources.masks;
  }
  /** The prompts of a status, in this round. */
  having(status) {
    return this.prompts.filter((p) => (p.decided < this.round ? p.status : WAITING) === status);
  }
  /** The reference that a prompt's mask became, or -1. */
  reference(prompt) { return this.references.findIndex((r) => r.prompt === prompt); }
  /** The prompts that a prompt eliminated, or the one that eliminated it. */
  related(index) {
    const own = this.reference(index), { by } = this.prompts[index];
    if (own >= 0) return this.prompts.filter((prompt) => prompt.by === own);
    return by < 0 ? [] : [this.prompts[this.references[by].prompt]];
  }
  /** What became of a prompt, and why: a title, and facts. */
  story(index) {
    const { x, y, confidence, round, by, pem, status } = this.prompts[index];
    const own = this.references[this.reference(index)], other = this.references[by];
    const facts = [`at ${x.toFixed(1)}, ${y.toFixed(1)}`];
    if (confidence !== null) facts[0] += `, confidence ${confidence.toFixed(2)}`;
    if (round >= 0) facts[0] += `, round ${round + 1}`;
    if (other) {
      facts.push(`The mask of prompt ${other.prompt} explains it: ` +
        `PEM ${pem.toFixed(3)}, more than ${other.threshold.toFixed(3)}.`);
    }
    if (own) {
      facts.push(`Its mask eliminated ${this.related(index).length} prompts, ` +
        `where its PEM exceeds ${own.threshold.toFixed(3)}.`);
    }
    return [`Prompt ${index}: ${this.look.styles[status][2]}`, ...facts];
  }
  /** Show the PEM of a prompt's mask, or of what eliminated it; else the maximum so far. */
  choosePem(prompt) {
    if (!this.pems) return;
    const { w, h, values } = this.pems, shown = new Uint16Array(w * h);
    const own = this.reference(prompt), one = own < 0 ? this.prompts[prompt]?.by ?? -1 : own;
    this.references.forEach(({ round }, r) => {
      if (one < 0 ? round >= this.round : r !== one) return;
      for (let i = 0; i < w * h; i++) shown[i] = Math.max(shown[i], values[r * w * h + i]);
    });
    this.maps.pem = { w, h, values: shown, of: this.references[one]?.prompt };
    delete this.sources.pem;
  }
  /** A map's value at a point within the image, whose longest side is the map's. */
  value(name, { x, y }) {
    const { w, h, values } = this.maps[name], { side } = this.size;
    return values[Math.floor((y / side) * h) * w + Math.floor((x / side) * w)] / 65535;
  }
  /** The index of the mask on top at a point within the image, or -1. */
  maskAt({ x, y }) { return this.labels[Math.floor(x) * this.size.height + Math.floor(y)] - 1; }
  /** What a layer is drawn from, made when first needed; nothing where there is no such layer. */
  source(name) {
    const { sources, maps, look } = this;
    if (name in maps) sources[name] ??= drawMap(maps[name], look.colours[name]);
    if (name === "masks") sources[name] ??= drawLabels(this.labels, this.size, this.masks, 0.55);
    return sources[name];
  }
}

// --- glyphs: one path for all of a kind, so that a thousand prompts need few strokes

const TURNS = Array.from({ length: 24 }, (_, i) => (i * Math.PI) / 12);
const CIRCLE = TURNS.map((turn) => [Math.cos(turn), Math.sin(turn)]);
const SHAPES = { // lines, closed where they have more than two points
  o: [CIRCLE],
  O: [CIRCLE], // open, as are x + -
  v: [[[-1, -0.8], [1, -0.8], [0, 1]]],
  s: [[[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]]],
  D: [[[0, -1.2], [1.1, 0], [0, 1.2], [-1.1, 0]]],
  x: [[[-1, -1], [1, 1]], [[-1, 1], [1, -1]]],
  "+": [[[-1.2, 0], [1.2, 0]], [[0, -1.2], [0, 1.2]]],
  "-": [[[-1.2, 0], [1.2, 0]]],
};

const onScreen = (view, { x, y }) => [view.x + view.k * x, view.y + view.k * y];
const glyphSize = ({ prompts: { length } }, view) =>
  (view.glyph ?? 1) * Math.max(2.6, Math.min(5.5, 90 / Math.sqrt(length)));

function stroke(ctx, path, lineWidth, strokeStyle) {
  Object.assign(ctx, { lineWidth, strokeStyle, lineJoin: "round" });
  ctx.stroke(path);
}

/** The same glyph at several points of the image; r: its radius on the screen. */
export function drawGlyphs(ctx, view, marker, points, fillStyle, r) {
  const path = new Path2D(), isOpen = "Ox+-".includes(marker);
  for (const point of points) {
    const [x, y] = onScreen(view, point);
    for (const line of SHAPES[marker]) {
      line.forEach(([dx, dy], i) => path[i ? "lineTo" : "moveTo"](x + r * dx, y + r * dy));
      if (line.length > 2) path.closePath();
    }
  }
  stroke(ctx, path, (isOpen ? 0.75 : 0.55) * r, "#000c");
  if (isOpen) stroke(ctx, path, 0.36 * r, fillStyle);
  else Object.assign(ctx, { fillStyle }).fill(path);
}

export function drawBox(ctx, view, { x0, y0, x1, y1 }, strokeStyle) {
  Object.assign(ctx, { lineWidth: 1, strokeStyle });
  ctx.strokeRect(...onScreen(view, { x: x0, y: y0 }), view.k * (x1 - x0), view.k * (y1 - y0));
}

/** All prompts by status, kept ones on top; frames of kept boxes; clicks by hand. */
export function drawPrompts(ctx, pane, view, clicks) {
  const r = glyphSize(pane, view), points = clicks.flat().map(([x, y, label]) => ({ x, y, label }));
  for (const status of [...pane.look.styles.keys()].reverse()) {
    const [marker, colour] = pane.look.styles[status], own = pane.having(status);
    drawGlyphs(ctx, view, marker, own, colour, status === WAITING ? 0.7 * r : r);
    if (status !== KEPT && status !== BY_HAND) continue;
    for (const box of own.filter(({ x0 }) => x0 !== null)) drawBox(ctx, view, box, "#fff9");
  }
  const clicked = (label) => points.filter((point) => point.label === label);
  drawGlyphs(ctx, view, "-", clicked(0), "#ff8080", 1.3 * r);
  drawGlyphs(ctx, view, "+", clicked(1), "#ffffff", 1.3 * r);
}

/** A ring around a prompt, and lines to the prompts that it is related to. */
export function drawRelated(ctx, pane, view, index) {
  const prompt = pane.prompts[index], lines = new Path2D();
  for (const other of pane.related(index)) {
    lines.moveTo(...onScreen(view, prompt));
    lines.lineTo(...onScreen(view, other));
  }
  stroke(ctx, lines, 4, "#000a");
  stroke(ctx, lines, 1.9, pane.look.styles[ELIMINATED][1]);
  drawGlyphs(ctx, view, "O", [prompt], "#ffffff", glyphSize(pane, view) + 4);
}
