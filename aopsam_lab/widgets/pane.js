// One result of the explorer, unpacked and drawn; stage.js, which follows this file in the same module, shows it.

const LAYERS = { image: "Image", pcm: "PCM", smoothed: "Smoothed PCM", pem: "PEM", masks: "Masks", truth: "Ground truth", prompts: "Prompts" };
const TABLE_OF = { pcm: "magma", smoothed: "magma", pem: "viridis" };
const [X, Y, ROUND, FATE, BY, GONE, X0] = [0, 1, 3, 4, 5, 7, 8]; // columns of a prompt's row
const COLUMNS = 12, KEPT = 0, ELIMINATED = 1, WAITING = -1;
const WAITING_LOOK = ["o", "#dddddd", "waiting"];

// --- unpacking ------------------------------------------------------------------------------------------------------------

const typed = (Type, view) => new Type(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));

/** COCO's compressed counts (five bits a character, differences to the last but one) -> run lengths, background first. */
function runLengths(data, from, to) {
  const runs = [];
  for (let at = from; at < to; ) {
    let value = 0, shift = 0, char;
    do {
      char = data[at++] - 48;
      value |= (char & 31) << shift;
      shift += 5;
    } while (char & 32);
    if (char & 16 && shift < 32) value |= -1 << shift;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

/** Masks -> {runs, areas, order (largest first, of equals the later), colours, owners}. */
function unpackMasks(pack) {
  const n = pack?.n ?? 0;
  if (!n) return { n: 0, runs: [], areas: [], order: [], owners: [] };
  const data = typed(Uint8Array, pack.counts), ends = typed(Uint32Array, pack.ends);
  const runs = Array.from(ends, (end, i) => runLengths(data, i ? ends[i - 1] : 0, end));
  const areas = runs.map((r) => r.reduce((sum, length, i) => sum + (i % 2 ? length : 0), 0));
  const order = [...areas.keys()].sort((a, b) => areas[b] - areas[a] || b - a);
  return { n, runs, areas, order, colours: typed(Uint8Array, pack.colours), owners: typed(Int32Array, pack.owners) };
}

/** Which mask lies on top, i + 1 or 0, column by column as the runs go: smaller ones over larger, so also which is smallest. */
function topMask(masks, shown, size) {
  const labels = new Int32Array(size.width * size.height);
  for (const i of masks.order) if (shown(i)) fillRuns(labels, masks.runs[i], i + 1);
  return labels;
}

function fillRuns(labels, runs, value) {
  for (let i = 1, at = runs[0]; i < runs.length; at += runs[i] + runs[i + 1], i += 2) labels.fill(value, at, at + runs[i]);
}

/** The pixels that runs cover at most: {x0, y0, x1, y1}, ends excluded. */
function boundsOf(runs, height) {
  const box = { x0: Infinity, y0: height, x1: 0, y1: 0 };
  for (let i = 1, at = runs[0]; i < runs.length; at += runs[i] + runs[i + 1], i += 2) {
    const end = at + runs[i] - 1, first = Math.floor(at / height), last = Math.floor(end / height);
    box.x0 = Math.min(box.x0, first);
    box.x1 = last + 1;
    box.y0 = Math.min(box.y0, last > first ? 0 : at % height);
    box.y1 = Math.max(box.y1, last > first ? height : (end % height) + 1);
  }
  return box;
}

/** One mask alone, every `step`-th pixel of its box: {canvas, x, y, w, h}, the last four in the image frame. */
function drawMask(runs, size, colour, fill, step) {
  const { x0, y0, x1, y1 } = boundsOf(runs, size.height);
  const left = Math.floor(x0 / step), top = Math.floor(y0 / step), width = Math.ceil(x1 / step) - left, height = Math.ceil(y1 / step) - top;
  if (!(width > 0 && height > 0)) return { canvas: makeCanvas(1, 1), x: 0, y: 0, w: 1, h: 1 };
  const labels = new Int32Array(width * height);
  for (let i = 1, at = runs[0]; i < runs.length; at += runs[i] + runs[i + 1], i += 2) {
    for (let from = at, end = at + runs[i]; from < end; ) { // a run may go on in the next column
      const x = Math.floor(from / size.height), begin = x * size.height, to = Math.min(end, begin + size.height);
      const row = (y) => (x / step - left) * height + Math.ceil(y / step) - top;
      if (x % step === 0) labels.fill(1, row(from - begin), row(to - begin));
      from = to;
    }
  }
  const canvas = drawLabels(labels, { width, height }, () => colour, 1, fill, Math.max(1, Math.round(edgeOf(size) / step)));
  return { canvas, x: left * step, y: top * step, w: width * step, h: height * step };
}

const makeCanvas = (width, height) => Object.assign(document.createElement("canvas"), { width, height });
const rgba = (r, g, b, a) => ((a << 24) | (b << 16) | (g << 8) | r) >>> 0;

/** How wide outlines are drawn, in pixels of the image. */
const edgeOf = (size) => Math.max(1, Math.round(Math.max(size.width, size.height) / 700));

/** Labels -> a canvas: inside in its colour with opacity `fill`, and an outline `d` wide. */
function drawLabels(labels, { width, height }, colourOf, count, fill, d) {
  const inside = new Uint32Array(count + 1), edge = new Uint32Array(count + 1);
  for (let i = 0; i < count; i++) {
    inside[i + 1] = rgba(...colourOf(i), Math.round(255 * fill));
    edge[i + 1] = rgba(...colourOf(i), 255);
  }
  const far = d * height;
  const pixels = new ImageData(width, height), out = new Uint32Array(pixels.data.buffer);
  for (let x = 0, at = 0; x < width; x++) {
    for (let y = 0; y < height; y++, at++) {
      const label = labels[at];
      if (!label) continue;
      const inner = x >= d && x < width - d && y >= d && y < height - d && labels[at - d] === label && labels[at + d] === label
        && labels[at - far] === label && labels[at + far] === label;
      out[y * width + x] = inner ? inside[label] : edge[label];
    }
  }
  const canvas = makeCanvas(width, height);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

/** A canvas, its half, its quarter, ...: drawn small from the one that fits, it is quick and does not flicker. */
const halves = new WeakMap();
function fitting(source, k) {
  if (!halves.has(source)) halves.set(source, [source]);
  const levels = halves.get(source), wanted = Math.min(4, Math.max(0, Math.floor(Math.log2(1 / k))));
  while (levels.length <= wanted) {
    const last = levels.at(-1), half = makeCanvas(Math.max(1, last.width >> 1), Math.max(1, last.height >> 1));
    half.getContext("2d").drawImage(last, 0, 0, half.width, half.height);
    levels.push(half);
  }
  return levels[wanted];
}

function drawMap(values, w, h, table) {
  const pixels = new ImageData(w, h), out = new Uint32Array(pixels.data.buffer);
  for (let i = 0; i < out.length; i++) {
    const c = 3 * (values[i] >> 8);
    out[i] = rgba(table[c], table[c + 1], table[c + 2], 255);
  }
  const canvas = makeCanvas(w, h);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

// --- one result, unpacked -------------------------------------------------------------------------------------------------

/** One side: its data, what is shown of it in round k, and a cache of drawn layers. */
class Pane {
  constructor(result, size) {
    Object.assign(this, { result, size, masks: unpackMasks(result.masks), maps: {}, sources: {}, drawn: {}, shownRound: null });
    const { n, rows, references, rounds } = result.prompts;
    this.rows = typed(Float32Array, rows);
    this.references = typed(Float32Array, references); // prompt, threshold, round
    this.n = n;
    this.rounds = rounds;
    for (const name of ["pcm", "smoothed", "pem"]) {
      if (result[name]) this.maps[name] = { ...result[name], values: typed(Uint16Array, result[name].data) };
    }
  }
  at(prompt, column) { return this.rows[prompt * COLUMNS + column]; }
  knows(prompt) { return prompt >= 0 && prompt < this.n; }
  byHand(prompt) { return this.at(prompt, ROUND) < 0 && this.at(prompt, FATE) === KEPT; }
  /** What is known of a prompt once k rounds are through: its fate, or WAITING. */
  fate(prompt, k) {
    const fate = this.at(prompt, FATE), decided = fate === ELIMINATED ? this.at(prompt, GONE) : this.at(prompt, ROUND);
    const neverReached = fate !== ELIMINATED && decided < 0;
    return this.byHand(prompt) || (neverReached ? k >= this.rounds : decided < k) ? fate : WAITING;
  }
  /** The reference that a prompt's mask became, or -1. */
  reference(prompt) {
    for (let r = 0; 3 * r < this.references.length; r++) if (this.references[3 * r] === prompt) return r;
    return -1;
  }
  /** Prompts that a prompt eliminated, or the one that eliminated it. */
  kin(prompt) {
    const own = this.reference(prompt), by = this.at(prompt, BY);
    if (own < 0) return by < 0 ? [] : [this.references[3 * by]];
    return [...Array(this.n).keys()].filter((p) => this.at(p, BY) === own);
  }
  nearest(at, reach) {
    let best = -1, least = reach ** 2;
    for (let i = 0; i < this.n; i++) {
      const d = (this.at(i, X) - at.x) ** 2 + (this.at(i, Y) - at.y) ** 2;
      if (d < least) [best, least] = [i, d];
    }
    return best;
  }
  /** A prompt's title and facts, in words. */
  story(prompt, fates) {
    const [x, y, confidence, round, fate, by, pem] = this.rows.subarray(prompt * COLUMNS, (prompt + 1) * COLUMNS);
    const own = this.reference(prompt), threshold = (r) => this.references[3 * r + 1].toFixed(3);
    const facts = [`at ${x.toFixed(1)}, ${y.toFixed(1)}`];
    if (!Number.isNaN(confidence)) facts[0] += `, confidence ${confidence.toFixed(2)}`;
    if (round >= 0) facts[0] += `, round ${round + 1}`;
    if (by >= 0) facts.push(`The mask of prompt ${this.references[3 * by]} explains it: PEM ${pem.toFixed(3)}, more than ${threshold(by)}.`);
    if (own >= 0) facts.push(`Its mask eliminated ${this.kin(prompt).length} prompts, where its PEM exceeds ${threshold(own)}.`);
    return [`Prompt ${prompt}: ${this.byHand(prompt) ? "by hand" : fates[fate][2]}`, ...facts];
  }
  setRound(k) {
    if (k === this.shownRound) return;
    this.shownRound = k;
    this.labels = topMask(this.masks, (i) => this.at(this.masks.owners[i], ROUND) < k, this.size);
    delete this.sources.masks;
    this.drawn = {};
  }
  /** Show the PEM that matters for a prompt, of its own mask or of the one that eliminated it; else the maximum so far. */
  choosePem(prompt) {
    const map = this.maps.pem;
    if (!map) return;
    const own = this.knows(prompt) ? this.reference(prompt) : -1, one = own < 0 && this.knows(prompt) ? this.at(prompt, BY) : own;
    const cells = map.w * map.h, of = one < 0 ? -1 : this.references[3 * one];
    let values = map.values.subarray(one * cells, (one + 1) * cells);
    if (one < 0) {
      values = new Uint16Array(cells);
      for (let r = 0; r < map.n; r++) {
        if (this.references[3 * r + 2] >= this.shownRound) continue;
        for (let i = 0; i < cells; i++) values[i] = Math.max(values[i], map.values[r * cells + i]);
      }
    }
    this.pemShown = { values, of };
    delete this.sources.pem;
    delete this.drawn.pem;
  }
  valuesOf(name) { return name === "pem" ? this.pemShown?.values : this.maps[name]?.values; }
  /** A map's value at a point of the image, or null. */
  value(name, x, y) {
    const map = this.maps[name], values = this.valuesOf(name);
    if (!values) return null;
    const [ex, ey] = this.result.extent, column = Math.floor((x / ex) * map.w), row = Math.floor((y / ey) * map.h);
    return values[Math.min(map.h - 1, row) * map.w + Math.min(map.w - 1, column)] / 65535;
  }
  maskAt(x, y) {
    const { width, height } = this.size;
    return x < 0 || y < 0 || x >= width || y >= height ? -1 : this.labels[Math.floor(x) * height + Math.floor(y)] - 1;
  }
}

// --- glyphs: one path a fate, so that a thousand prompts are a handful of strokes ------------------------------------------------

function addGlyph(path, marker, x, y, r) {
  const shape = { v: [[-1, -0.8], [1, -0.8], [0, 1]], s: [[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]], D: [[0, -1.2], [1.1, 0], [0, 1.2], [-1.1, 0]] }[marker];
  if (shape) {
    shape.forEach(([dx, dy], i) => path[i ? "lineTo" : "moveTo"](x + r * dx, y + r * dy));
    path.closePath();
  } else if (marker === "x" || marker === "+") {
    const d = marker === "x" ? [[1, 1], [1, -1]] : [[1.2, 0], [0, 1.2]];
    for (const [dx, dy] of d) { path.moveTo(x - r * dx, y - r * dy); path.lineTo(x + r * dx, y + r * dy); }
  } else {
    path.moveTo(x + r, y);
    path.arc(x, y, r, 0, 7);
  }
}

function strokeGlyphs(ctx, path, marker, colour, r, hollow = false) {
  const open = hollow || marker === "x" || marker === "+";
  ctx.lineJoin = "round";
  ctx.lineWidth = open ? 0.75 * r : 0.55 * r;
  ctx.strokeStyle = "#000c";
  ctx.stroke(path);
  ctx.strokeStyle = ctx.fillStyle = colour;
  ctx.lineWidth = 0.36 * r;
  open ? ctx.stroke(path) : ctx.fill(path);
}

const tag = (name, props = {}, ...children) => {
  const element = Object.assign(document.createElement(name), props);
  element.append(...children);
  return element;
};

const glyphSize = (pane) => Math.max(2.6, Math.min(5.5, 90 / Math.sqrt(pane.n || 1)));
const placeOf = (pane, prompt, view) => [view.x + view.k * pane.at(prompt, X), view.y + view.k * pane.at(prompt, Y)];

/** All prompts by fate; of a kept box its frame, too. */
function drawPrompts(ctx, pane, view, fates) {
  const r = glyphSize(pane) * (view.glyph ?? 1), paths = new Map();
  ctx.strokeStyle = "#fff9";
  for (let i = 0; i < pane.n; i++) {
    if (pane.byHand(i)) continue;
    const fate = pane.fate(i, pane.shownRound), waits = fate === WAITING;
    if (!paths.has(fate)) paths.set(fate, new Path2D());
    addGlyph(paths.get(fate), waits ? WAITING_LOOK[0] : fates[fate][0], ...placeOf(pane, i, view), waits ? 0.7 * r : r);
    const [x0, y0, x1, y1] = pane.rows.subarray(i * COLUMNS + X0, i * COLUMNS + X0 + 4);
    if (fate === KEPT && !Number.isNaN(x0)) ctx.strokeRect(view.x + view.k * x0, view.y + view.k * y0, view.k * (x1 - x0), view.k * (y1 - y0));
  }
  for (const [fate, path] of [...paths].sort(([a], [b]) => (a === KEPT) - (b === KEPT))) { // kept ones on top
    const [marker, colour] = fate === WAITING ? WAITING_LOOK : fates[fate];
    strokeGlyphs(ctx, path, marker, colour, r, fate === WAITING);
  }
}

/** Points set by hand: plus for the object, minus for the background. */
function drawClicks(ctx, pane, view, objects) {
  const r = 1.6 * glyphSize(pane) * (view.glyph ?? 1);
  for (const [x, y, label] of objects.flat()) {
    const path = new Path2D(), cx = view.x + view.k * x, cy = view.y + view.k * y;
    path.moveTo(cx - r, cy);
    path.lineTo(cx + r, cy);
    if (label) { path.moveTo(cx, cy - r); path.lineTo(cx, cy + r); }
    strokeGlyphs(ctx, path, "+", label ? "#ffffff" : "#ff8080", r);
  }
}

/** A ring around a prompt, and lines to its kin. */
function drawKin(ctx, pane, view, prompt, colour) {
  const lines = new Path2D(), ring = new Path2D(), [x, y] = placeOf(pane, prompt, view);
  for (const other of pane.kin(prompt)) { lines.moveTo(x, y); lines.lineTo(...placeOf(pane, other, view)); }
  ring.arc(x, y, glyphSize(pane) + 5, 0, 7);
  for (const [path, inner] of [[lines, colour], [ring, "#ffffff"]]) {
    for (const [lineWidth, strokeStyle] of [[4, "#000a"], [1.9, inner]]) {
      Object.assign(ctx, { lineWidth, strokeStyle });
      ctx.stroke(path);
    }
  }
}

/** Where a setting on its way would prompt. points: x, y, x, y, ... */
function drawRings(ctx, points, view) {
  const path = new Path2D();
  for (let i = 0; i < points.length; i += 2) addGlyph(path, "o", view.x + view.k * points[i], view.y + view.k * points[i + 1], 5);
  strokeGlyphs(ctx, path, "o", "#ffffff", 5, true);
}

function drawCross(ctx, x, y) {
  const path = new Path2D();
  addGlyph(path, "+", x, y, 9);
  strokeGlyphs(ctx, path, "+", "#ffffff", 4);
}
