// The explorer's picture: layers in one or two panes under one view. It follows pane.js in the same module.
//
// Panes (unpacked once) -> layers (a canvas each, drawn when the view or their data change) -> the stage, put together anew in
// every frame. Opacity, zoom and hover touch only the last two and ask nothing of the kernel.
// Frames: image (pixels of the picture) and screen (CSS pixels of a pane); view = {k, x, y}: screen = k * image + (x, y).

const CANDIDATES = [[0, 158, 115], [230, 159, 0], [86, 180, 233]]; // a clicked prompt's three masks
const GAP = 8; // between two panes, CSS pixels

/** What is seen: one or two panes on a canvas, under one view. */
class Stage {
  constructor(look) {
    this.look = look;
    this.tables = Object.fromEntries(Object.entries(look.tables).map(([name, view]) => [name, typed(Uint8Array, view)]));
    Object.assign(this, { opacity: {}, panes: [], hand: [], selected: -1, cross: null, byKey: false, waiting: null, frame: 0 });
    this.setPicture(null, { width: 1, height: 1 }, null);
    this.canvas = tag("canvas", { className: "aop-canvas", tabIndex: 0 });
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-label", "Picture. Arrows move the cross, Enter clicks, n and p step through the prompts.");
    this.badges = ["aop-badge", "aop-badge aop-right"].map((className) => tag("div", { className, hidden: true }));
    this.empty = tag("div", { className: "aop-empty", textContent: "No picture is open." });
    this.busy = tag("div", { className: "aop-busy", hidden: true });
    this.box = tag("div", { className: "aop-stage" }, this.canvas, ...this.badges, this.busy, this.empty);
  }

  // --- what there is to show

  setPicture(image, size, truth) {
    Object.assign(this, { image, size, truth, fitted: true, view: { k: 1, x: 0, y: 0 }, highlight: {}, candidates: null, only: -1 });
  }
  setResults(results) {
    const known = new Map(this.panes.map((p) => [p.result, p]));
    this.panes = results.map((result) => known.get(result) ?? new Pane(result, this.size));
    this.panes.forEach((p) => { p.drawn = {}; });
    this.highlight = {};
    this.badges.forEach((badge, i) => {
      const result = results[i];
      badge.hidden = !result;
      badge.replaceChildren(tag("b", { textContent: result?.title ?? "" }), ` ${result?.badge ?? ""}`);
      badge.title = result?.setting ?? "";
    });
    this.empty.hidden = this.image !== null;
    this.layout();
  }
  setRound(k) {
    const whole = k >= (this.panes[0]?.rounds ?? 0);
    this.panes.forEach((p) => p.setRound(whole ? p.rounds : Math.min(k, p.rounds)));
  }
  /** masks: those the selected prompt gives, or null while they are not known. */
  select(prompt, masks) {
    this.selected = prompt;
    this.panes.forEach((p, i) => p.choosePem(i === 0 ? prompt : -1));
    this.candidates = masks && masks.runs.map((runs, i) => this.outline(runs, CANDIDATES[i], 0.25));
    this.only = -1;
    this.invalidate();
  }
  has(p, name) {
    return name === "truth" ? this.truth !== null : name in TABLE_OF ? name in p.maps : name !== "image" || this.image !== null;
  }

  // --- layers

  /** The canvas that a layer is drawn from, made when first needed. */
  source(p, name) {
    if (name === "image" || name === "truth") return this[name];
    const { masks } = p;
    return (p.sources[name] ??= name === "masks"
      ? drawLabels(p.labels, this.size, (i) => masks.colours.subarray(3 * i, 3 * i + 3), masks.n, 0.55, edgeOf(this.size))
      : drawMap(p.valuesOf(name), p.maps[name].w, p.maps[name].h, this.tables[TABLE_OF[name]]));
  }
  paint(ctx, p, name, view, alpha = 1) {
    if (!alpha || !this.has(p, name)) return;
    ctx.save();
    ctx.globalAlpha = alpha;
    if (name === "prompts") {
      drawPrompts(ctx, p, view, this.look.fates);
      if (p === this.panes[0]) drawClicks(ctx, p, view, this.hand);
    } else {
      const [w, h] = name in TABLE_OF ? p.result.extent : [this.size.width, this.size.height];
      ctx.beginPath();
      ctx.rect(view.x, view.y, view.k * this.size.width, view.k * this.size.height); // maps reach over the padding
      ctx.clip();
      ctx.imageSmoothingEnabled = name in TABLE_OF || view.k * this.scale < 3;
      const source = this.source(p, name);
      ctx.drawImage(name in TABLE_OF ? source : fitting(source, view.k * this.scale), view.x, view.y, view.k * w, view.k * h);
    }
    ctx.restore();
  }
  /** A layer as it looks in this view, from the cache where nothing changed. */
  drawn(p, name) {
    const key = [this.view.k, this.view.x, this.view.y, this.width, this.height, this.scale].join();
    const known = p.drawn[name];
    if (known?.key === key) return known.canvas;
    const canvas = known?.canvas ?? makeCanvas(1, 1);
    Object.assign(canvas, { width: Math.round(this.width * this.scale), height: Math.round(this.height * this.scale) }); // clears it
    const ctx = canvas.getContext("2d");
    ctx.scale(this.scale, this.scale);
    this.paint(ctx, p, name, this.view);
    p.drawn[name] = { key, canvas };
    return canvas;
  }
  /** One mask alone, as fine as the screen shows it. */
  outline(runs, colour, fill) {
    return drawMask(runs, this.size, colour, fill, Math.max(1, Math.floor(1 / (this.view.k * this.scale))));
  }
  /** What is shown, as a canvas of the picture's own size. */
  overlay() {
    const step = this.size.width + GAP, canvas = makeCanvas(step * this.panes.length - GAP, this.size.height), ctx = canvas.getContext("2d");
    const view = { k: 1, x: 0, y: 0, glyph: Math.max(0.6, Math.max(this.size.width, this.size.height) / 700) };
    this.panes.forEach((p, i) => {
      ctx.setTransform(1, 0, 0, 1, i * step, 0);
      for (const name in LAYERS) this.paint(ctx, p, name, view, this.opacity[name]);
    });
    return canvas;
  }

  // --- frames

  invalidate() { this.frame ||= requestAnimationFrame(() => this.draw()); }
  draw() {
    this.frame = 0;
    const ctx = this.canvas.getContext("2d"), { scale, width, height } = this;
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.panes.forEach((p, i) => {
      const left = i * (width + GAP);
      ctx.setTransform(1, 0, 0, 1, Math.round(left * scale), 0);
      const show = (name) => {
        ctx.globalAlpha = this.opacity[name] * (name === "masks" && i === 0 && this.candidates ? 0.3 : 1); // a chosen prompt's stand out
        if (ctx.globalAlpha && this.has(p, name)) ctx.drawImage(this.drawn(p, name), 0, 0);
        ctx.globalAlpha = 1;
      };
      const within = (draw) => {
        ctx.save();
        ctx.setTransform(scale, 0, 0, scale, left * scale, 0);
        ctx.beginPath();
        ctx.rect(0, 0, width, height);
        ctx.clip();
        draw.call(this, ctx, p, i);
        ctx.restore();
      };
      Object.keys(LAYERS).filter((name) => name !== "prompts").forEach(show);
      within(this.drawMasks);
      show("prompts");
      within(this.drawMarks);
    });
  }
  /** Masks that come and go: those of the selected prompt, and the one under the pointer. */
  drawMasks(ctx, p, i) {
    const { view, cross } = this, first = i === 0;
    const place = ({ canvas, x, y, w, h }) => ctx.drawImage(canvas, view.x + view.k * x, view.y + view.k * y, view.k * w, view.k * h);
    if (first && this.candidates) this.candidates.forEach((mask, j) => (this.only < 0 || this.only === j) && place(mask));
    const mask = cross ? p.maskAt(cross.x, cross.y) : -1;
    if (mask >= 0) {
      const known = this.highlight[i];
      if (known?.mask !== mask || known.k !== view.k) this.highlight[i] = { mask, k: view.k, ...this.outline(p.masks.runs[mask], [255, 255, 255], 0.35) };
      place(this.highlight[i]);
    }
  }
  /** The selected prompt and its kin, the preview, the cross. */
  drawMarks(ctx, p, i) {
    const { view, cross } = this, first = i === 0;
    if (first && p.knows(this.selected)) drawKin(ctx, p, view, this.selected, this.look.fates[ELIMINATED][1]);
    if (first && this.waiting) drawRings(ctx, this.waiting, view);
    if (cross && (this.byKey || this.panes.length > 1)) drawCross(ctx, view.x + view.k * cross.x, view.y + view.k * cross.y);
  }

  // --- the view

  layout() {
    const n = Math.max(1, this.panes.length), { width, height } = this.size;
    this.scale = window.devicePixelRatio || 1;
    this.width = Math.max(80, (this.box.clientWidth - (n - 1) * GAP) / n);
    this.height = Math.round(Math.max(220, Math.min(0.62 * window.innerHeight, 680, (this.width * height) / width)));
    this.canvas.width = Math.round((n * this.width + (n - 1) * GAP) * this.scale);
    this.canvas.height = Math.round(this.height * this.scale);
    this.canvas.style.height = `${this.height}px`;
    this.badges[1].style.left = `${this.width + GAP}px`;
    this.badges.forEach((badge) => { badge.style.maxWidth = `${this.width}px`; });
    if (this.fitted) this.fit();
    this.invalidate();
  }
  fit() {
    const { width, height } = this.size, k = Math.min(this.width / width, this.height / height);
    this.view = { k, x: (this.width - k * width) / 2, y: (this.height - k * height) / 2 };
    this.fitted = true;
    this.invalidate();
  }
  move(view) {
    this.view = view;
    this.fitted = false;
    this.invalidate();
  }
  zoom(factor, at) {
    const k = Math.max(0.02, Math.min(60, this.view.k * factor)), f = k / this.view.k;
    this.move({ k, x: at.x - f * (at.x - this.view.x), y: at.y - f * (at.y - this.view.y) });
  }
  /** A mouse event -> the point on the screen, relative to the pane it is in. */
  screenPoint(event) {
    const bounds = this.canvas.getBoundingClientRect(), x = event.clientX - bounds.left, step = this.width + GAP;
    return { x: this.panes.length > 1 && x >= step ? x - step : x, y: event.clientY - bounds.top };
  }
  imagePoint(event) {
    const s = this.screenPoint(event);
    return { x: (s.x - this.view.x) / this.view.k, y: (s.y - this.view.y) / this.view.k };
  }
  /** Where the cross stands, or the middle of the picture. */
  get here() { return this.cross ?? { x: this.size.width / 2, y: this.size.height / 2 }; }
  inside(at) { return at.x >= 0 && at.y >= 0 && at.x < this.size.width && at.y < this.size.height; }
  /** Put the cross at a point of the image (null: nowhere); what lies there, in words. */
  point(at, byKey) {
    this.cross = at && this.inside(at) ? at : null;
    this.byKey = byKey;
    this.invalidate();
    const p = this.panes[0];
    if (!this.cross || !p) return "";
    const maps = Object.keys(TABLE_OF).map((name) => [LAYERS[name], p.value(name, at.x, at.y)]).filter(([, value]) => value !== null);
    const masks = this.panes.map((q) => [q, q.maskAt(at.x, at.y)]).filter(([, mask]) => mask >= 0);
    return [
      `x ${at.x.toFixed(1)}, y ${at.y.toFixed(1)}`, ...maps.map(([name, value]) => `${name} ${value.toFixed(2)}`),
      ...masks.map(([q, mask]) => `${this.panes.length > 1 ? `${q.result.title}'s ` : ""}mask ${mask}: IoU ${q.result.scores[mask].toFixed(2)}, ${q.masks.areas[mask]} px`),
    ].join(" · ");
  }
  promptNear(at) { return this.opacity.prompts && this.panes.length ? this.panes[0].nearest(at, 9 / this.view.k) : -1; }
}
