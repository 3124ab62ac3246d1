// What is seen: layers in one or two panes under one view.
//
// Opacity, zoom and hover only draw anew and ask nothing of the kernel. Frames: image (pixels of
// the image) and screen (CSS pixels of a pane); view = {k, x, y}: screen = k * image + (x, y).

import { drawMask, drawMasks, fitting, tag, topMask, unpackMasks } from "./masks.js";
import {
  COLOURS_OF, LAYERS, Pane, drawClicks, drawCross, drawPrompts, drawRelated, drawRings,
} from "./pane.js";

export const CANDIDATES = [[0, 158, 115], [230, 159, 0], [86, 180, 233]]; // a prompt's masks
const GAP = 8; // between two panes, CSS pixels
const HINT = "Image. Arrows move the cross, Enter clicks, n and p step through the prompts.";

export class Stage {
  panes = [];
  clicks = []; // by hand
  waiting = []; // prompts of a setting on its way
  opacity = {};
  selected = -1;
  detail = null;
  candidates = []; // masks of the selected prompt
  only = -1; // which of them alone
  image = null;
  view = { k: 1, x: 0, y: 0 };
  cross = null; // the point under the pointer, image frame
  isByKey = false; // whether keys moved the cross
  frame = 0;

  constructor(look) {
    this.look = look;
    this.canvas = tag("canvas", {
      className: "aop-canvas", tabIndex: 0, role: "application", ariaLabel: HINT,
    });
    this.badges = [0, 1].map(() => tag("div", { className: "aop-badge", hidden: true }));
    this.empty = tag("div", { className: "aop-empty", textContent: "No image is open." });
    this.busy = tag("div", { className: "aop-busy", hidden: true });
    this.box = tag("div", { className: "aop-stage" },
      this.canvas, ...this.badges, this.busy, this.empty);
  }

  // --- what there is to show

  /** Empty the stage, and show a packed image once it is read. */
  async open(packed) {
    const { data, mime, width = 1, height = 1 } = packed, size = { width, height };
    Object.assign(this, { packed, size, image: null, groundTruth: null, isFitted: true });
    if (!data) return;
    const image = await createImageBitmap(new Blob([data], { type: mime }));
    if (this.packed !== packed) return; // another one came in the meantime
    this.image = image;
    const masks = unpackMasks(packed.ground_truth).map((m) => ({ ...m, colour: [255, 255, 255] }));
    if (masks.length) this.groundTruth = drawMasks(masks, size, topMask(masks, size), 0.12);
  }
  setResults(results) {
    this.empty.hidden = this.image !== null;
    this.invalidate();
    const known = new Map(this.panes.map((pane) => [pane.result, pane]));
    if (results.length === known.size && results.every((r) => known.has(r))) return;
    this.panes = results.map((r) => known.get(r) ?? new Pane(r, this.size, this.look));
    this.badges.forEach((badge, i) => {
      const { title = "", badge: words = "", setting = "" } = results[i] ?? {};
      badge.hidden = !results[i];
      badge.replaceChildren(tag("b", { textContent: title }), ` ${words}`);
      badge.title = setting;
    });
    this.layout();
  }
  setRound(round) {
    const isLast = round >= (this.panes[0]?.rounds ?? 0);
    this.panes.forEach((pane) => pane.setRound(isLast ? pane.rounds : round));
  }
  /** Select a prompt; detail: its masks, or those of another one. */
  select(prompt, detail) {
    this.panes.forEach((pane, i) => pane.choosePem(i === 0 ? prompt : -1));
    if (prompt === this.selected && detail === this.detail) return;
    Object.assign(this, { selected: prompt, detail, only: -1 });
    const masks = detail.prompt === prompt ? unpackMasks(detail.masks) : [];
    this.candidates = masks.map((mask, i) =>
      ({ line: detail.lines[i], ...this.alone(mask, CANDIDATES[i], 0.25) }));
  }
  showOnly(i) {
    this.only = this.only === i ? -1 : i;
    this.invalidate();
  }
  /** One mask alone, as fine as the screen shows it. */
  alone(mask, colour, opacity) {
    const step = Math.max(1, Math.floor(1 / (this.view.k * this.scale)));
    return drawMask(mask, this.size, colour, opacity, step);
  }
  has(pane, name) {
    if (name === "ground_truth") return this.groundTruth !== null;
    return name in COLOURS_OF ? name in pane.maps : this.image !== null;
  }

  // --- drawing

  paint(ctx, pane, name, view, opacity) {
    if (!opacity || !this.has(pane, name)) return;
    ctx.save();
    ctx.globalAlpha = opacity;
    const isMap = name in COLOURS_OF, k = view.k * this.scale;
    if (name === "prompts") {
      drawPrompts(ctx, pane, view);
      if (pane === this.panes[0]) drawClicks(ctx, pane, view, this.clicks);
    } else {
      const { width, height } = this.size, [w, h] = isMap ? pane.result.extent : [width, height];
      ctx.beginPath();
      ctx.rect(view.x, view.y, view.k * width, view.k * height); // maps reach over the padding
      ctx.clip();
      ctx.imageSmoothingEnabled = isMap || k < 3;
      const known = { image: this.image, ground_truth: this.groundTruth };
      const source = known[name] ?? pane.source(name);
      const fine = isMap ? source : fitting(source, k);
      ctx.drawImage(fine, view.x, view.y, view.k * w, view.k * h);
    }
    ctx.restore();
  }
  invalidate() { this.frame ||= requestAnimationFrame(() => this.draw()); }
  draw() {
    this.frame = 0;
    const ctx = this.canvas.getContext("2d"), { scale, view } = this;
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.panes.forEach((pane, i) => {
      ctx.save();
      ctx.setTransform(scale, 0, 0, scale, i * (this.width + GAP) * scale, 0);
      ctx.beginPath();
      ctx.rect(0, 0, this.width, this.height);
      ctx.clip();
      const isFaint = i === 0 && this.candidates.length > 0; // so that a prompt's masks stand out
      for (const name in LAYERS) {
        if (name === "prompts") this.drawSingleMasks(ctx, pane);
        const opacity = this.opacity[name] * (name === "masks" && isFaint ? 0.3 : 1);
        this.paint(ctx, pane, name, view, opacity);
      }
      this.drawMarks(ctx, pane);
      ctx.restore();
    });
  }
  /** The masks of the selected prompt, and the one under the pointer. */
  drawSingleMasks(ctx, pane) {
    const { view, cross } = this;
    const place = ({ canvas, left, step }) => {
      const k = view.k * step;
      ctx.drawImage(canvas, view.x + view.k * left, view.y, k * canvas.width, k * canvas.height);
    };
    if (pane === this.panes[0]) {
      this.candidates.filter((_, i) => this.only < 0 || this.only === i).forEach(place);
    }
    const mask = cross ? pane.masks[pane.maskAt(cross)] : undefined;
    if (pane.hovered?.mask !== mask || pane.hovered?.k !== view.k) {
      pane.hovered = { mask, k: view.k, drawn: mask && this.alone(mask, [255, 255, 255], 0.35) };
    }
    if (mask) place(pane.hovered.drawn);
  }
  /** The selected prompt and what it is related to, the preview, the cross. */
  drawMarks(ctx, pane) {
    if (pane === this.panes[0]) {
      if (this.selected in pane.prompts) drawRelated(ctx, pane, this.view, this.selected);
      drawRings(ctx, this.waiting, this.view);
    }
    const isSeen = this.isByKey || this.panes.length > 1;
    if (this.cross && isSeen) drawCross(ctx, this.view, this.cross);
  }
  /** What is shown, as a canvas of the image's own size. */
  overlay() {
    const { width, height } = this.size, step = width + GAP;
    const canvas = tag("canvas", { width: step * this.panes.length - GAP, height });
    const view = { k: 1, x: 0, y: 0, glyph: Math.max(0.6, Math.max(width, height) / 700) };
    const ctx = canvas.getContext("2d");
    this.panes.forEach((pane, i) => {
      ctx.setTransform(1, 0, 0, 1, i * step, 0);
      for (const name in LAYERS) this.paint(ctx, pane, name, view, this.opacity[name]);
    });
    return canvas;
  }

  // --- the view

  layout() {
    const n = Math.max(1, this.panes.length), ratio = this.size.height / this.size.width;
    const most = Math.min(0.62 * window.innerHeight, 680);
    this.scale = window.devicePixelRatio || 1;
    this.width = Math.max(80, (this.box.clientWidth - (n - 1) * GAP) / n);
    this.height = Math.round(Math.max(220, Math.min(most, this.width * ratio)));
    this.canvas.width = Math.round((n * (this.width + GAP) - GAP) * this.scale);
    this.canvas.height = Math.round(this.height * this.scale);
    this.canvas.style.height = `${this.height}px`;
    this.badges[1].style.left = `${this.width + GAP}px`;
    this.badges.forEach((badge) => { badge.style.maxWidth = `${this.width}px`; });
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
  zoom(factor, at) {
    const { x, y, k } = this.view, fine = Math.max(0.02, Math.min(60, k * factor)), f = fine / k;
    this.move({ k: fine, x: at.x - f * (at.x - x), y: at.y - f * (at.y - y) });
  }
  /** A mouse event -> the point on the screen, relative to the pane it is in. */
  screenPoint(event) {
    const bounds = this.canvas.getBoundingClientRect(), x = event.clientX - bounds.left;
    const isRight = this.panes.length > 1 && x >= this.width + GAP;
    return { x: isRight ? x - this.width - GAP : x, y: event.clientY - bounds.top };
  }
  imagePoint(event) {
    const { x, y } = this.screenPoint(event), { view } = this;
    return { x: (x - view.x) / view.k, y: (y - view.y) / view.k };
  }
  /** Where the cross is, or the middle of the image. */
  get here() { return this.cross ?? { x: this.size.width / 2, y: this.size.height / 2 }; }
  isInside({ x, y }) { return x >= 0 && y >= 0 && x < this.size.width && y < this.size.height; }
  /** Put the cross at a point of the image (null: nowhere); what lies there, in words. */
  point(at, isByKey) {
    this.cross = at && this.isInside(at) ? at : null;
    this.isByKey = isByKey;
    this.invalidate();
    const [first] = this.panes;
    if (!this.cross || !first) return "";
    const words = [`x ${at.x.toFixed(1)}, y ${at.y.toFixed(1)}`];
    for (const name in first.maps) {
      words.push(`${LAYERS[name]} ${first.value(name, at).toFixed(2)}`);
    }
    for (const pane of this.panes) {
      const i = pane.maskAt(at), whose = this.panes.length > 1 ? `${pane.result.title}'s ` : "";
      if (i < 0) continue;
      const score = pane.result.scores[i].toFixed(2);
      words.push(`${whose}mask ${i}: IoU ${score}, ${pane.masks[i].area} px`);
    }
    return words.join(" · ");
  }
  promptNear(at) {
    if (!this.opacity.prompts || !this.panes.length) return -1;
    return this.panes[0].nearest(at, 9 / this.view.k);
  }
}
