// The explorer in the page. pane.js, which Python puts before this file, unpacks and draws one result; packing.py says what
// arrives, explorer.py what is sent back.
//
// Data flows one way: traits -> panes (unpacked once) -> layers (a canvas each, drawn when the view or their data change)
// -> the stage, put together anew in every frame. Opacity, zoom and hover touch only the last two and ask nothing of the kernel.
// Frames: image (pixels of the picture) and screen (CSS pixels of a pane); view = {k, x, y}: screen = k * image + (x, y).

const CANDIDATES = [[0, 158, 115], [230, 159, 0], [86, 180, 233]]; // a clicked prompt's three masks
const KERNEL_LOST = "The kernel was restarted or stopped, so nothing can be computed here. Run the cell again.";
const GAP = 8; // between two panes, CSS pixels
const HELP = "Wheel zooms, dragging pans. Click a prompt to open it, an empty place to ask SAM there; Shift-click says: not this.";
const KEYS = [
  ["arrows", "move the cross (Shift: faster)"], ["Enter", "click there (Shift: background)"],
  ["n, p", "next, previous prompt"], ["Esc", "let go of the prompt"], ["u", "undo a click"],
  ["+, −, 0", "zoom in, out, fit"], ["1 … 7", "a layer on, off"], ["[ , ]", "round back, on"],
];

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

/** What is told beside it: the layers with their opacity, the fates' legend, the selected prompt, the buttons. */
class Side {
  constructor(stage, actions) {
    this.stage = stage;
    this.layers = {};
    this.last = {}; // opacity of layers that are off, for when they come back
    this.fates = tag("div", { className: "aop-fates" });
    this.detail = tag("div", { className: "aop-detail" });
    const buttons = actions.map(([textContent, title, onclick]) => tag("button", { type: "button", textContent, title, onclick }));
    const keys = KEYS.flatMap(([key, text]) => [tag("dt", { textContent: key }), tag("dd", { textContent: text })]);
    this.box = tag("div", { className: "aop-side" },
      tag("div", {}, ...Object.keys(LAYERS).map((name) => this.layerRow(name))), this.fates, this.detail,
      tag("div", { className: "aop-actions" }, ...buttons),
      tag("details", { className: "aop-keys" }, tag("summary", { textContent: "Mouse and keys" }), tag("div", { textContent: HELP }), tag("dl", {}, ...keys)));
  }
  layerRow(name) {
    const slider = tag("input", { type: "range", min: 0, max: 100, oninput: () => this.setOpacity(name, slider.value / 100) });
    slider.setAttribute("aria-label", `opacity of ${LAYERS[name]}`);
    const check = tag("input", { type: "checkbox", onchange: () => this.toggle(name) });
    const text = tag("span", { textContent: LAYERS[name] }), bar = tag("span", { className: "aop-bar" });
    const legend = name in TABLE_OF ? tag("span", { className: "aop-legend" }, "0", bar, "1") : "";
    if (name in TABLE_OF) {
      const table = this.stage.tables[TABLE_OF[name]], stops = [0, 51, 102, 153, 204, 255].map((i) => `rgb(${table.subarray(3 * i, 3 * i + 3)})`);
      bar.style.background = `linear-gradient(90deg, ${stops.join()})`;
    }
    const row = tag("div", { className: "aop-layer" }, tag("label", {}, check, text), slider, legend);
    this.layers[name] = { slider, check, text, row };
    return row;
  }
  setOpacity(name, value) {
    const { slider, check } = this.layers[name];
    this.stage.opacity[name] = value;
    slider.value = Math.round(100 * value);
    check.checked = value > 0;
    this.stage.invalidate();
  }
  toggle(name) {
    const value = this.stage.opacity[name];
    if (value) this.last[name] = value;
    this.setOpacity(name, value ? 0 : this.last[name] ?? 0.8);
  }
  /** Legend and layers as they are now. */
  update() {
    const [p] = this.stage.panes, counts = new Map();
    for (let i = 0; i < (p?.n ?? 0); i++) counts.set(p.fate(i, p.shownRound), (counts.get(p.fate(i, p.shownRound)) ?? 0) + 1);
    const entries = [...this.stage.look.fates.map((fate, i) => [i, fate]), [WAITING, WAITING_LOOK]].filter(([i]) => counts.has(i));
    this.fates.replaceChildren(...entries.map(([fate, [marker, colour, text]]) => {
      const icon = makeCanvas(32, 32), path = new Path2D();
      addGlyph(path, marker, 16, 16, fate === WAITING ? 7 : 10);
      strokeGlyphs(icon.getContext("2d"), path, marker, colour, 10, fate === WAITING);
      return tag("div", { className: "aop-fate" }, icon, tag("span", { textContent: text }), tag("b", { textContent: counts.get(fate) }));
    }));
    for (const name in LAYERS) this.layers[name].row.classList.toggle("aop-absent", !this.stage.panes.some((q) => this.stage.has(q, name)));
    const of = p?.pemShown?.of ?? -1;
    this.layers.pem.text.textContent = of < 0 ? LAYERS.pem : `PEM of ${of}`;
  }
  /** What became of a prompt, and why; lines: one a mask that it gives, as far as they are known. */
  describe(prompt, lines) {
    const [p] = this.stage.panes;
    if (!p?.knows(prompt)) return this.detail.replaceChildren();
    const [title, ...facts] = p.story(prompt, this.stage.look.fates);
    const masks = lines.map((textContent, i) => {
      const line = tag("button", { type: "button", textContent, title: "show only this one of its masks", onclick: () => this.only(i) });
      line.style.setProperty("--swatch", `rgb(${CANDIDATES[i]})`);
      return line;
    });
    this.detail.replaceChildren(tag("h4", { textContent: title }), ...facts.map((textContent) => tag("div", { textContent })), ...masks);
  }
  only(i) {
    this.stage.only = this.stage.only === i ? -1 : i;
    this.detail.querySelectorAll("button").forEach((line, j) => line.classList.toggle("aop-only", j === this.stage.only));
    this.stage.invalidate();
  }
}

function download(blob, name) {
  const url = URL.createObjectURL(blob);
  tag("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** Mouse and touch on the stage. act: {point, click}. */
function listenToPointer(stage, act) {
  const { canvas } = stage;
  let drag = null, asking = 0;
  canvas.onpointerdown = (e) => {
    drag = { x: e.clientX, y: e.clientY, view: stage.view, moved: false };
    canvas.setPointerCapture(e.pointerId);
    canvas.focus();
  };
  canvas.onpointermove = (e) => {
    const dx = e.clientX - drag?.x, dy = e.clientY - drag?.y;
    if (drag) drag.moved ||= Math.hypot(dx, dy) > 4;
    if (drag?.moved) stage.move({ k: drag.view.k, x: drag.view.x + dx, y: drag.view.y + dy });
    act.point(stage.imagePoint(e));
  };
  canvas.onpointerup = (e) => {
    const at = stage.imagePoint(e), background = e.shiftKey, clicked = drag && !drag.moved && e.button === 0;
    drag = null;
    clearTimeout(asking); // time for a second click: two mean "fit", not a question
    if (clicked) asking = setTimeout(() => act.click(at, background), !background && stage.promptNear(at) >= 0 ? 0 : 250);
  };
  canvas.onpointerleave = () => act.point(null);
  canvas.ondblclick = () => { clearTimeout(asking); stage.fit(); };
  canvas.addEventListener("wheel", (e) => {
    e.preventDefault();
    stage.zoom(Math.exp(-0.0015 * e.deltaY), stage.screenPoint(e));
    act.point(stage.imagePoint(e));
  }, { passive: false });
}

/** Keys on the stage. act: {point, click, step, turn, release, undo, toggle}. */
function listenToKeys(stage, act) {
  stage.canvas.onkeydown = (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const { view, size, here } = stage, far = (e.shiftKey ? 40 : 4) / view.k;
    const within = (value, most) => Math.min(most - 0.5, Math.max(0, value));
    const move = (dx, dy) => act.point({ x: within(here.x + dx * far, size.width), y: within(here.y + dy * far, size.height) }, true);
    const zoom = (factor) => stage.zoom(factor, { x: view.x + view.k * here.x, y: view.y + view.k * here.y });
    const does = {
      ArrowLeft: () => move(-1, 0), ArrowRight: () => move(1, 0), ArrowUp: () => move(0, -1), ArrowDown: () => move(0, 1),
      Enter: () => act.click(here, e.shiftKey), Escape: act.release, u: act.undo, n: () => act.step(1), p: () => act.step(-1),
      "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: () => stage.fit(),
      "[": () => act.turn(-1), "]": () => act.turn(1),
      ...Object.fromEntries(Object.keys(LAYERS).map((name, i) => [i + 1, () => act.toggle(name)])),
    }[e.key];
    if (!does) return;
    e.preventDefault();
    e.stopPropagation();
    does();
  };
}

/** anywidget's entry: the model's traits to stage and side, what a hand does back to the model. */
function render({ model, el }) {
  const stage = new Stage(model.get("look"));
  let lost = false;
  const message = tag("span", { className: "aop-message" }), readout = tag("span", { className: "aop-readout" });
  const say = (text) => { message.textContent = text; };
  const send = (content) => (lost ? say(KERNEL_LOST) : model.send(content));
  const set = (name, value) => {
    model.set(name, value);
    lost ? say(KERNEL_LOST) : model.save_changes();
  };
  const copyCall = () => navigator.clipboard.writeText(model.get("call"))
    .then(() => say(`Copied: ${model.get("call")}`), () => say(model.get("call"))); // no clipboard: the text can be marked
  const saveOverlay = () => stage.overlay().toBlob((blob) => { download(blob, "overlay.png"); say("Saved overlay.png."); });
  const act = {
    point: (at, byKey = false) => { readout.textContent = stage.point(at, byKey); },
    click: (at, background) => {
      if (!stage.panes.length || !stage.inside(at)) return;
      const prompt = background ? -1 : stage.promptNear(at);
      prompt >= 0 ? act.select(prompt) : send({ kind: "ask", x: at.x, y: at.y, label: background ? 0 : 1 });
    },
    select: (prompt) => { set("selected", prompt); showSelected(); },
    release: () => act.select(-1),
    step: (by) => {
      const n = stage.panes[0]?.n;
      if (n) act.select(stage.selected < 0 ? (by > 0 ? 0 : n - 1) : (stage.selected + by + n) % n);
    },
    turn: (by) => set("round", Math.max(0, Math.min(stage.panes[0]?.rounds ?? 0, model.get("round") + by))),
    undo: () => send({ kind: "undo" }),
    toggle: (name) => side.toggle(name),
  };
  const side = new Side(stage, [
    ["Undo", "take back the last click (u)", act.undo], ["Fit", "the whole picture (0, or double click)", () => stage.fit()],
    ["COCO", "COCO JSON of the masks on the left", () => send({ kind: "export", what: "coco" })],
    ["Labels", "16-bit PNG: i + 1 where mask i lies", () => send({ kind: "export", what: "labels" })],
    ["Overlay", "PNG of what is shown", saveOverlay], ["Copy Python", "the call that makes this state again", copyCall],
  ]);

  async function showPicture() {
    const picture = model.get("picture");
    const image = picture.data ? await createImageBitmap(new Blob([picture.data], { type: picture.mime })) : null;
    if (model.get("picture") !== picture) return; // another one came in the meantime
    const size = image ? { width: picture.width, height: picture.height } : { width: 1, height: 1 }, masks = unpackMasks(picture.truth);
    const truth = masks.n ? drawLabels(topMask(masks, () => true, size), size, () => [255, 255, 255], masks.n, 0.12, edgeOf(size)) : null;
    stage.panes = [];
    stage.setPicture(image, size, truth);
    showResults();
  }
  function showResults() {
    say(model.get("message")); // "Copied" and the like were about what was there before
    stage.setResults(stage.image ? [model.get("left"), model.get("right")].filter((result) => result.prompts) : []);
    showRound();
  }
  function showRound() {
    stage.setRound(model.get("round"));
    showSelected();
  }
  function showSelected() {
    const prompt = model.get("selected"), detail = model.get("detail"), known = detail.prompt === prompt;
    stage.select(prompt, known ? unpackMasks(detail.masks) : null);
    side.describe(prompt, known ? detail.lines : []);
    side.update();
  }
  const listeners = {
    "change:picture": showPicture, "change:left": showResults, "change:right": showResults, "change:round": showRound,
    "change:selected": showSelected, "change:detail": showSelected, "change:message": () => say(model.get("message")),
    "change:manual": () => { stage.hand = model.get("manual"); stage.panes.forEach((p) => delete p.drawn.prompts); stage.invalidate(); },
    "change:preview": () => { const { rows } = model.get("preview"); stage.waiting = rows ? typed(Float32Array, rows) : null; stage.invalidate(); },
    "change:layers": () => Object.entries(model.get("layers")).forEach(([name, value]) => name in LAYERS && side.setOpacity(name, value)),
    "change:busy": () => { stage.busy.textContent = model.get("busy"); stage.busy.hidden = !model.get("busy"); },
    "msg:custom": ({ kind, name, mime }, [data]) => { if (kind === "file") { download(new Blob([data], { type: mime }), name); say(`Saved ${name}.`); } },
    comm_live_update: () => { lost = true; say(KERNEL_LOST); }, // ipywidgets' own: the other end is gone
  };
  message.setAttribute("role", "status");
  const root = tag("div", { className: "aop" },
    tag("div", { className: "aop-main" }, stage.box, side.box), tag("div", { className: "aop-line" }, message, readout));
  root.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's one-letter shortcuts stay out of here
  el.append(root);
  listenToPointer(stage, act);
  listenToKeys(stage, act);
  for (const name in listeners) model.on(name, listeners[name]);
  for (const name of ["layers", "busy", "message", "manual", "preview"]) listeners[`change:${name}`]();
  const observer = new ResizeObserver(() => stage.layout());
  observer.observe(stage.box);
  showPicture();
  return () => {
    observer.disconnect();
    for (const name in listeners) model.off(name, listeners[name]);
  };
}

export default { render };
