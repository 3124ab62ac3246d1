// One result: what is known of it in a round, in words and as glyphs.

import { drawLabels, drawMap, topMask, unpackMaps, unpackMasks } from "./masks.js";

export const LAYERS = {
  image: "Image", pcm: "PCM", smoothed: "Smoothed PCM", pem: "PEM", masks: "Masks",
  ground_truth: "Ground truth", prompts: "Prompts",
};
const KEPT = 0, ELIMINATED = 1, WAITING = 6; // indices into packing.py's STYLES

export class Pane {
  /** sources: what layers are drawn from, image and ground truth at first. */
  constructor(result, size, look, sources) {
    const { prompts, references } = result; // references: prompt, threshold, round
    Object.assign(this, { result, size, look, sources, prompts, references, round: null });
    this.masks = unpackMasks(result.masks);
    this.maps = {};
    for (const name in result.maps) this.maps[name] = unpackMaps(result.maps[name]);
    this.pems = this.maps.pem;
  }
  setRound(round) {
    if (round === this.round) return;
    this.round = round;
    const isShown = (mask) => this.prompts[mask.owner].decided < round;
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
    const prompt = this.prompts[index], { x, y, confidence, round, by, pem } = prompt;
    const facts = [`at ${x.toFixed(1)}, ${y.toFixed(1)}`];
    const own = this.references[this.reference(index)];
    if (confidence !== null) facts[0] += `, confidence ${confidence.toFixed(2)}`;
    if (round >= 0) facts[0] += `, round ${round + 1}`;
    if (by >= 0) {
      const { prompt: other, threshold } = this.references[by];
      facts.push(`The mask of prompt ${other} explains it: ` +
        `PEM ${pem.toFixed(3)}, more than ${threshold.toFixed(3)}.`);
    }
    if (own) {
      facts.push(`Its mask eliminated ${this.related(index).length} prompts, ` +
        `where its PEM exceeds ${own.threshold.toFixed(3)}.`);
    }
    return [`Prompt ${index}: ${this.look.styles[prompt.status][2]}`, ...facts];
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

// --- glyphs: one path for all of a kind, so that a thousand prompts are a handful of strokes

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

/** All prompts by status, kept ones on top, and what is clicked by hand; of kept boxes frames. */
export function drawPrompts(ctx, pane, view, clicks) {
  const r = glyphSize(pane, view), points = clicks.flat().map(([x, y, label]) => ({ x, y, label }));
  for (const status of [...pane.look.styles.keys()].reverse()) {
    const [marker, colour] = pane.look.styles[status], own = pane.having(status);
    drawGlyphs(ctx, view, marker, own, colour, status === WAITING ? 0.7 * r : r);
    if (status !== KEPT) continue;
    Object.assign(ctx, { lineWidth: 1, strokeStyle: "#fff9" });
    for (const { x0, y0, x1, y1 } of own.filter((prompt) => prompt.x0 !== null)) {
      ctx.strokeRect(...onScreen(view, { x: x0, y: y0 }), view.k * (x1 - x0), view.k * (y1 - y0));
    }
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
