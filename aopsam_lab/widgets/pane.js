// One result: what is known of it in a round, in words and as glyphs.

import { drawMap, drawMasks, topMask, unpackMaps, unpackMasks, unpackTable } from "./masks.js";

export const LAYERS = {
  image: "Image", pcm: "PCM", smoothed: "Smoothed PCM", pem: "PEM", masks: "Masks",
  ground_truth: "Ground truth", prompts: "Prompts",
};
export const COLOURS_OF = { pcm: "pcm", smoothed: "pcm", pem: "pem" }; // layer: its colour table
const KEPT = 0, ELIMINATED = 1;
export const WAITING = -1;
const WAITING_LOOK = ["o", "#dddddd", "waiting"];
export const lookOf = (status, look) => look.statuses[status] ?? WAITING_LOOK;

export class Pane {
  constructor(result, size, look) {
    Object.assign(this, { result, size, look, sources: {}, round: null, rounds: result.rounds });
    this.masks = unpackMasks(result.masks);
    this.prompts = unpackTable(result.prompts);
    this.references = unpackTable(result.references); // prompt, threshold, round
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
  isByHand({ round, status }) { return round < 0 && status === KEPT; }
  status({ decided, status }) { return decided < this.round ? status : WAITING; }
  /** The reference that a prompt's mask became, or -1. */
  reference(prompt) { return this.references.findIndex((r) => r.prompt === prompt); }
  /** Indices of the prompts that a prompt eliminated, or of the one that eliminated it. */
  related(prompt) {
    const own = this.reference(prompt), { by } = this.prompts[prompt];
    if (own < 0) return by < 0 ? [] : [this.references[by].prompt];
    return [...this.prompts.keys()].filter((i) => this.prompts[i].by === own);
  }
  nearest(at, reach) {
    const far = this.prompts.map(({ x, y }) => Math.hypot(x - at.x, y - at.y));
    const least = Math.min(...far);
    return least < reach ? far.indexOf(least) : -1;
  }
  /** What became of a prompt, and why: a title, and facts. */
  story(index) {
    const prompt = this.prompts[index], { x, y, confidence, round, by, pem } = prompt;
    const facts = [`at ${x.toFixed(1)}, ${y.toFixed(1)}`], own = this.reference(index);
    if (!Number.isNaN(confidence)) facts[0] += `, confidence ${confidence.toFixed(2)}`;
    if (round >= 0) facts[0] += `, round ${round + 1}`;
    if (by >= 0) {
      const { prompt: other, threshold } = this.references[by];
      facts.push(`The mask of prompt ${other} explains it: ` +
        `PEM ${pem.toFixed(3)}, more than ${threshold.toFixed(3)}.`);
    }
    if (own >= 0) {
      facts.push(`Its mask eliminated ${this.related(index).length} prompts, ` +
        `where its PEM exceeds ${this.references[own].threshold.toFixed(3)}.`);
    }
    const status = this.isByHand(prompt) ? "by hand" : lookOf(prompt.status, this.look)[2];
    return [`Prompt ${index}: ${status}`, ...facts];
  }
  /** Show the PEM of a prompt's mask, or of what eliminated it; else the maximum so far. */
  choosePem(prompt) {
    if (!this.pems) return;
    const { w, h, values } = this.pems;
    let one = prompt in this.prompts ? this.reference(prompt) : -1;
    if (one < 0 && prompt in this.prompts) one = this.prompts[prompt].by;
    const shown = new Uint16Array(w * h);
    this.references.forEach(({ round }, r) => {
      if (one < 0 ? round >= this.round : r !== one) return;
      for (let i = 0; i < w * h; i++) shown[i] = Math.max(shown[i], values[r * w * h + i]);
    });
    this.maps.pem = { w, h, values: shown, of: one < 0 ? -1 : this.references[one].prompt };
    delete this.sources.pem;
  }
  /** A map's value at a point of the image. */
  value(name, { x, y }) {
    const { w, h, values } = this.maps[name], [width, height] = this.result.extent;
    const column = Math.min(w - 1, Math.floor((x / width) * w));
    return values[Math.min(h - 1, Math.floor((y / height) * h)) * w + column] / 65535;
  }
  /** The index of the mask on top at a point within the image, or -1. */
  maskAt({ x, y }) { return this.labels[Math.floor(x) * this.size.height + Math.floor(y)] - 1; }
  /** The canvas that masks or a map are drawn from, made when first needed. */
  source(name) {
    this.sources[name] ??= name === "masks"
      ? drawMasks(this.masks, this.size, this.labels, 0.55)
      : drawMap(this.maps[name], this.look[COLOURS_OF[name]]);
    return this.sources[name];
  }
}

// --- glyphs: one path a status, so that a thousand prompts are a handful of strokes

const SHAPES = { // lines, closed where they have more than two points
  v: [[[-1, -0.8], [1, -0.8], [0, 1]]],
  s: [[[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]]],
  D: [[[0, -1.2], [1.1, 0], [0, 1.2], [-1.1, 0]]],
  x: [[[-1, -1], [1, 1]], [[-1, 1], [1, -1]]],
  "+": [[[-1.2, 0], [1.2, 0]], [[0, -1.2], [0, 1.2]]],
  "-": [[[-1.2, 0], [1.2, 0]]],
};

function addGlyph(path, marker, [x, y], r) {
  for (const line of SHAPES[marker] ?? []) {
    line.forEach(([dx, dy], i) => path[i ? "lineTo" : "moveTo"](x + r * dx, y + r * dy));
    if (line.length > 2) path.closePath();
  }
  if (marker in SHAPES) return;
  path.moveTo(x + r, y);
  path.arc(x, y, r, 0, 7);
}

function strokeGlyphs(ctx, path, colour, r, isOpen) {
  ctx.lineJoin = "round";
  ctx.lineWidth = (isOpen ? 0.75 : 0.55) * r;
  ctx.strokeStyle = "#000c";
  ctx.stroke(path);
  ctx.strokeStyle = ctx.fillStyle = colour;
  ctx.lineWidth = 0.36 * r;
  ctx[isOpen ? "stroke" : "fill"](path);
}

export function drawGlyph(ctx, marker, at, colour, r) {
  const path = new Path2D();
  addGlyph(path, marker, at, r);
  strokeGlyphs(ctx, path, colour, r, isOpen(marker));
}

const isOpen = (marker) => "x+-".includes(marker);
const onScreen = (view, { x, y }) => [view.x + view.k * x, view.y + view.k * y];
const glyphSize = (pane, view) =>
  (view.glyph ?? 1) * Math.max(2.6, Math.min(5.5, 90 / Math.sqrt(pane.prompts.length || 1)));

/** All prompts by status; of a kept box its frame, too. */
export function drawPrompts(ctx, pane, view) {
  const r = glyphSize(pane, view), paths = new Map();
  ctx.strokeStyle = "#fff9";
  ctx.lineWidth = 1;
  for (const prompt of pane.prompts) {
    if (pane.isByHand(prompt)) continue;
    const status = pane.status(prompt), { x0, y0, x1, y1 } = prompt;
    if (!paths.has(status)) paths.set(status, new Path2D());
    const [marker] = lookOf(status, pane.look);
    addGlyph(paths.get(status), marker, onScreen(view, prompt), status === WAITING ? 0.7 * r : r);
    if (status !== KEPT || Number.isNaN(x0)) continue;
    const corner = onScreen(view, { x: x0, y: y0 });
    ctx.strokeRect(...corner, view.k * (x1 - x0), view.k * (y1 - y0));
  }
  for (const status of [...paths.keys()].sort((a, b) => (a === KEPT) - (b === KEPT))) {
    const [marker, colour] = lookOf(status, pane.look);
    strokeGlyphs(ctx, paths.get(status), colour, r, status === WAITING || isOpen(marker));
  }
}

/** Clicks by hand: plus for the object, minus for the background. */
export function drawClicks(ctx, pane, view, objects) {
  const r = 1.3 * glyphSize(pane, view);
  for (const [x, y, label] of objects.flat()) {
    const at = onScreen(view, { x, y });
    drawGlyph(ctx, label ? "+" : "-", at, label ? "#ffffff" : "#ff8080", r);
  }
}

/** A ring around a prompt, and lines to the prompts that it is related to. */
export function drawRelated(ctx, pane, view, index) {
  const at = onScreen(view, pane.prompts[index]), lines = new Path2D(), ring = new Path2D();
  for (const other of pane.related(index)) {
    lines.moveTo(...at);
    lines.lineTo(...onScreen(view, pane.prompts[other]));
  }
  ring.arc(...at, glyphSize(pane, view) + 5, 0, 7);
  for (const [path, inner] of [[lines, lookOf(ELIMINATED, pane.look)[1]], [ring, "#ffffff"]]) {
    for (const [lineWidth, strokeStyle] of [[4, "#000a"], [1.9, inner]]) {
      Object.assign(ctx, { lineWidth, strokeStyle });
      ctx.stroke(path);
    }
  }
}

/** Where a setting on its way would prompt. */
export function drawRings(ctx, prompts, view) {
  const path = new Path2D();
  for (const prompt of prompts) addGlyph(path, "o", onScreen(view, prompt), 5);
  strokeGlyphs(ctx, path, "#ffffff", 5, true);
}

export const drawCross = (ctx, view, at) => drawGlyph(ctx, "+", onScreen(view, at), "#ffffff", 7);
