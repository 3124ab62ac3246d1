// Beside the explorer's picture: layers, legend, the selected prompt, buttons. It follows stage.js in the same module.

const HELP = "Wheel zooms, dragging pans. Click a prompt to open it, an empty place to ask SAM there; Shift-click says: not this.";
const KEYS = [
  ["arrows", "move the cross (Shift: faster)"], ["Enter", "click there (Shift: background)"],
  ["n, p", "next, previous prompt"], ["Esc", "let go of the prompt"], ["u", "undo a click"],
  ["+, −, 0", "zoom in, out, fit"], ["1 … 7", "a layer on, off"], ["[ , ]", "round back, on"],
];

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
