// What is seen: layers in one or two panes under one view.
//
// Opacity, zoom and hover only draw anew and ask nothing of the kernel. Frames: image (pixels of
// the image) and screen (CSS pixels of a pane); view = {k, x, y}: screen = k * image + (x, y).

import {
  LAYERS, Pane, drawBox, drawGlyphs, drawLabels, drawMask, drawPrompts, drawRelated, fitting, tag,
  topMask, unpackMasks,
} from "./pane.js";

const WHITE = [255, 255, 255], BLUE = [70, 150, 255];
const HINT_REACH = 12; // how far a preview holds from its point, CSS pixels
const GAP = 8; // between two panes, CSS pixels
const HINT = "Image. Arrows move the cross, Enter clicks, , and . step through the prompts.";

export class Stage {
  panes = [];
  candidates = []; // masks of the selected prompt
  only = -1; // which of them alone
  isWaiting = false; // for the kernel, and for long
  picked = ""; // counts of the mask that was clicked to be named, deleted or exported
  hint = null; // what a click at a point would give: {x, y, drawn}
  band = null; // the box that is being drawn: {x0, y0, x1, y1}
  image = null;
  view = { k: 1, x: 0, y: 0 };
  cross = null; // the point under the pointer, image frame
  isByKey = false; // whether keys moved the cross
  frame = 0;

  /** get: the value of a trait. */
  constructor(get) {
    Object.assign(this, { get, look: get("look") });
    this.canvas = tag("canvas", {
      className: "aop-canvas", tabIndex: 0, role: "application", ariaLabel: HINT,
    });
    this.badges = tag("div", { className: "aop-badges" });
    this.busy = tag("div", { className: "aop-busy" });
    this.box = tag("div", { className: "aop-stage" }, this.badges, this.canvas, this.busy);
  }

  /** Empty the stage, and show a packed image once it is read. */
  async open(packed) {
    const { data, width = 1, height = 1 } = packed;
    const side = Math.max(width, height), edge = Math.max(1, Math.round(side / 700)); // of outlines
    const size = { width, height, side, edge };
    Object.assign(this, { packed, size, image: null, isFitted: true });
    if (!data) return;
    const image = await createImageBitmap(new Blob([data]));
    if (this.packed !== packed) return; // another one came in the meantime
    this.image = image;
    this.groundTruth = unpackMasks(packed.ground_truth);
    this.truthLabels = topMask(this.groundTruth, size);
  }
  update() {
    const { get, image, panes } = this, prompt = get("selected"), busy = get("busy");
    const results = [get("left"), get("right")].filter((result) => image && result.prompts);
    const sign = busy || (this.isWaiting ? "waiting for the kernel …" : "");
    Object.assign(this.busy, { textContent: sign, hidden: !sign });
    this.box.classList.toggle("aop-growing", Boolean(get("left").growing));
    this.panes = results.map((result) => panes.find((pane) => pane.result === result) ??
      new Pane(result, this.size, this.look, { image }));
    if (this.panes.length !== panes.length) this.layout();
    this.badges.replaceChildren(...results.map(({ title, badge, setting }) =>
      tag("div", { className: "aop-badge", title: setting },
        tag("b", { textContent: title }), ` ${badge}`)));
    this.setColours(get("matched"));
    const isLast = get("round") >= (results[0]?.rounds ?? 0);
    this.panes.forEach((pane, i) => {
      pane.setRound(isLast ? pane.result.rounds : get("round"));
      pane.choosePem(i === 0 ? prompt : -1);
    });
    const detail = image && get("detail").prompt === prompt ? get("detail") : null;
    if (detail !== this.detail) {
      const picked = detail?.masks.counts.indexOf(this.picked) ?? -1;
      Object.assign(this, { detail, only: picked < 0 ? detail?.only ?? -1 : picked });
      this.candidates = unpackMasks(detail?.masks ?? {}).map((mask, i) =>
        ({ ...mask, line: detail.lines[i], drawn: this.alone(mask, 0.25) }));
    }
    this.invalidate();
  }
  /** The index of the selected mask on the left, or -1. */
  get chosen() {
    const { counts = [], owners = [] } = this.get("left").masks ?? {};
    const prompt = this.get("selected"), picked = counts.indexOf(this.picked);
    return picked >= 0 && owners[picked] === prompt ? picked : owners.indexOf(prompt);
  }
  /** Preview packed masks at a point. */
  setHint([x, y], masks) {
    const [mask] = unpackMasks(masks);
    this.hint = mask && { x, y, drawn: this.alone({ ...mask, colour: BLUE }, 0.5) };
    this.invalidate();
  }
  /** The colours of the ground truth and of the second pane, which are those of matching masks. */
  setColours(matched) {
    const { groundTruth, image, panes: [first, second] } = this;
    if (!image || !first || (first.matched === matched && second?.matched === matched)) return;
    const paint = (masks, colours) => masks.forEach((mask, i) => {
      mask.colour = colours?.[i] ?? mask.colour;
    });
    paint(groundTruth, matched.ground_truth);
    const drawn = groundTruth.length &&
      drawLabels(this.truthLabels, this.size, groundTruth, 0.12);
    for (const pane of this.panes) Object.assign(pane, { matched }).sources.ground_truth = drawn;
    if (second) {
      paint(second.masks, matched.right);
      delete second.sources.masks;
    }
  }
  /** One mask alone, as fine as the screen shows it. */
  alone(mask, opacity) {
    const step = Math.max(1, Math.floor(1 / (this.view.k * this.scale)));
    return drawMask(mask, this.size, opacity, step);
  }

  wait(isWaiting) {
    if (this.isWaiting !== isWaiting) Object.assign(this, { isWaiting }).update();
  }
  invalidate() { this.frame ||= requestAnimationFrame(() => this.draw(this)); }
  /** Draw the panes on a canvas, each of a width and height and under a view; scale: its pixels. */
  draw({ canvas, width, height, view, scale }) {
    this.frame = 0;
    const ctx = canvas.getContext("2d"), { cross, panes, get } = this, selected = get("selected");
    ctx.reset();
    panes.forEach((pane, i) => {
      ctx.save();
      ctx.setTransform(scale, 0, 0, scale, i * (width + GAP) * scale, 0);
      ctx.beginPath();
      ctx.rect(0, 0, width, height);
      ctx.clip();
      const isFaint = i === 0 && this.candidates.length > 0; // so that a prompt's masks stand out
      for (const name in LAYERS) {
        if (name === "prompts") this.drawSingleMasks(ctx, pane, view);
        const isDim = name === "masks" ? isFaint : name === "image" && pane.result.growing;
        const opacity = get("layers")[name] * (isDim ? 0.3 : 1);
        if (opacity) this.drawLayer(ctx, pane, name, view, scale, opacity);
      }
      if (i === 0 && selected in pane.prompts) drawRelated(ctx, pane, view, selected);
      drawGlyphs(ctx, view, "O", i === 0 ? get("preview") : [], "#ffffff", 5);
      const isSeen = cross && (this.isByKey || panes.length > 1);
      drawGlyphs(ctx, view, "+", isSeen ? [cross] : [], "#ffffff", 7);
      if (this.band && i === 0) drawBox(ctx, view, this.band, "#fff");
      ctx.restore();
    });
  }
  drawLayer(ctx, pane, name, view, scale, opacity) {
    const { width, height, side } = this.size, isMap = name in pane.maps, k = view.k * scale;
    const source = pane.source(name), isFirst = pane === this.panes[0];
    ctx.save();
    ctx.globalAlpha = opacity;
    if (name === "prompts") {
      drawPrompts(ctx, pane, view, isFirst ? this.get("manual") : []);
    } else if (source) {
      ctx.imageSmoothingEnabled = isMap || k < 3;
      const fine = isMap ? source : fitting(source, k);
      const [w, h] = isMap ? [width / side, height / side] : [1, 1]; // a map's rest is padding
      ctx.drawImage(fine, 0, 0, w * fine.width, h * fine.height,
        view.x, view.y, view.k * width, view.k * height);
    }
    ctx.restore();
  }
  /** The masks of the selected prompt, and the one under the pointer. */
  drawSingleMasks(ctx, pane, view) {
    const { cross, only } = this, isFirst = pane === this.panes[0];
    const shown = this.candidates.filter((_, i) => isFirst && (only < 0 || only === i));
    const mask = cross ? pane.masks[pane.maskAt(cross)] : undefined;
    if (pane.hovered?.mask !== mask || pane.hovered?.k !== view.k) {
      const drawn = mask && this.alone({ ...mask, colour: WHITE }, 0.35);
      pane.hovered = { mask, k: view.k, drawn };
    }
    const { hint } = this, isHere = isFirst && hint && cross &&
      Math.hypot(cross.x - hint.x, cross.y - hint.y) * view.k < HINT_REACH;
    if (isHere) shown.push(hint);
    else if (mask) shown.push(pane.hovered);
    for (const { drawn: { canvas, left, step } } of shown) {
      const k = view.k * step;
      ctx.drawImage(canvas, view.x + view.k * left, view.y, k * canvas.width, k * canvas.height);
    }
  }
  /** What is shown, as a canvas of the image's own size. */
  overlay() {
    const { width, height, side } = this.size, n = this.panes.length;
    const canvas = tag("canvas", { width: n * (width + GAP) - GAP, height });
    const view = { k: 1, x: 0, y: 0, glyph: Math.max(0.6, side / 700) };
    this.draw({ canvas, width, height, view, scale: 1 });
    return canvas;
  }

  layout() {
    const n = Math.max(1, this.panes.length), ratio = this.size.height / this.size.width;
    const most = Math.min(0.62 * window.innerHeight, 680);
    this.scale = window.devicePixelRatio || 1;
    this.width = Math.max(80, (this.box.clientWidth - (n - 1) * GAP) / n);
    this.height = Math.round(Math.max(220, Math.min(most, this.width * ratio)));
    this.canvas.width = Math.round((n * (this.width + GAP) - GAP) * this.scale);
    this.canvas.height = Math.round(this.height * this.scale);
    this.canvas.style.height = `${this.height}px`;
    if (this.isFitted) this.fit();
    this.invalidate();
  }
  fit() {
    const { width, height } = this.size, k = Math.min(this.width / width, this.height / height);
    this.move({ k, x: (this.width - k * width) / 2, y: (this.height - k * height) / 2 });
    this.isFitted = true;
  }
  move(view) {
    this.view = view;
    this.isFitted = false;
    this.invalidate();
  }
  /** Zoom about a point of the image. */
  zoom(factor, at = this.here) {
    const { x, y, k } = this.view, fine = Math.max(0.02, Math.min(60, k * factor));
    this.move({ k: fine, x: x + (k - fine) * at.x, y: y + (k - fine) * at.y });
  }
  /** A mouse event -> the point of the image that lies there, in either pane. */
  imagePoint({ clientX, clientY }) {
    const { left, top } = this.canvas.getBoundingClientRect(), { x, y, k } = this.view;
    const far = clientX - left, next = this.width + GAP;
    const across = this.panes.length > 1 && far >= next ? far - next : far;
    return { x: (across - x) / k, y: (clientY - top - y) / k };
  }
  /** Where the cross is, or the middle of the image. */
  get here() { return this.cross ?? { x: this.size.width / 2, y: this.size.height / 2 }; }
  /** The box between two points, within the image. */
  boxOf(a, b) {
    const ends = (name, most) => [a[name], b[name]].map((v) => Math.max(0, Math.min(most, v)));
    const xs = ends("x", this.size.width), ys = ends("y", this.size.height);
    return { x0: Math.min(...xs), y0: Math.min(...ys), x1: Math.max(...xs), y1: Math.max(...ys) };
  }
  isInside({ x, y }) { return x >= 0 && y >= 0 && x < this.size.width && y < this.size.height; }
  /** Put the cross at a point of the image (null: nowhere); what lies there, in words. */
  point(at, isByKey) {
    this.cross = at && this.isInside(at) ? at : null;
    this.isByKey = isByKey;
    this.invalidate();
    const { panes } = this;
    if (!this.cross || !panes.length) return "";
    const maps = Object.keys(panes[0].maps);
    const values = maps.map((name) => `${LAYERS[name]} ${panes[0].value(name, at).toFixed(2)}`);
    const masks = panes.filter((pane) => pane.maskAt(at) >= 0).map((pane) => {
      const i = pane.maskAt(at), whose = panes.length > 1 ? `${pane.result.title}'s ` : "";
      const score = pane.result.scores[i]?.toFixed(2) ?? "…";
      const label = this.get("labels")[pane.result.masks.counts[i]] ?? "";
      return `${whose}mask ${i} ${label}: IoU ${score}, ${pane.masks[i].area} px`;
    });
    return [`x ${at.x.toFixed(1)}, y ${at.y.toFixed(1)}`, ...values, ...masks].join(" · ");
  }
  /** The index of the prompt at a point of the image, or -1. */
  promptNear(at) {
    const prompts = this.get("layers").prompts ? this.panes[0]?.prompts ?? [] : [];
    const far = prompts.map(({ x, y }) => Math.hypot(x - at.x, y - at.y));
    const least = Math.min(...far);
    return least < 9 / this.view.k ? far.indexOf(least) : -1;
  }
}
