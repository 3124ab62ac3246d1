// Above and beside the stage: settings, layers, the statuses' legend, the selected prompt, buttons.

import { tag } from "./masks.js";
import { COLOURS_OF, LAYERS, WAITING, drawGlyph, lookOf } from "./pane.js";
import { CANDIDATES } from "./stage.js";

const HELP = "Wheel zooms, dragging pans. Click a prompt to open it, an empty place to ask SAM " +
  "there; Shift-click says: not this.";
const KEYS = {
  arrows: "move the cross (Shift: faster)", Enter: "click there (Shift: background)",
  "n, p": "next, previous prompt", Esc: "let go of the prompt", u: "undo a click",
  "+, −, 0": "zoom in, out, fit", "1 … 7": "a layer on, off", "[ , ]": "round back, on",
};
const ROUND_MS = 700; // how long a round is shown

const text = (name, textContent) => tag(name, { textContent });
const button = (textContent, title, onclick) =>
  tag("button", { type: "button", textContent, title, onclick });
const labelled = (name, ...controls) => tag("label", {}, text("span", name), ...controls);
const slider = (name, limits, oninput) => {
  const range = tag("input", { type: "range", ...limits, ariaLabel: name });
  range.oninput = () => oninput(+range.value);
  return range;
};

/** Choices, sliders and rounds. */
export class Controls {
  constructor(model, act) {
    const { methods, beside, sliders } = model.get("look");
    Object.assign(this, { model, methods, sliders, ranges: {}, numbers: {} });
    this.image = this.choice("Image", [], (select) => act.set("source", +select.value));
    const choose = (name) => ({ value }) => act.set(name, value);
    this.method = this.choice("Method", Object.keys(methods), choose("method"));
    this.beside = this.choice("Beside", beside, choose("compare"));
    const file = tag("input", { type: "file", accept: "image/*", hidden: true });
    file.onchange = () => {
      act.upload(file.files[0]);
      file.value = "";
    };
    const parameters = Object.keys(sliders).map((name) => this.parameter(name, act));
    this.rounds = slider("Rounds", { min: 0 }, (value) => act.set("round", value));
    this.count = tag("output");
    this.play = button("▶", "play the rounds", () => this.playRounds(act));
    this.box = tag("div", { className: "aop-controls" },
      tag("div", {}, labelled("Image", this.image), file,
        button("Your own", "an image of your own", () => file.click()),
        labelled("Method", this.method), labelled("Beside", this.beside)),
      tag("div", {}, ...parameters, labelled("Rounds", this.rounds, this.count), this.play));
  }
  choice(ariaLabel, options, onchange) {
    const select = tag("select", { ariaLabel });
    select.append(...options.map((option) => new Option(option)));
    select.onchange = () => onchange(select);
    return select;
  }
  parameter(name, act) {
    const [min, max, step, title] = this.sliders[name];
    const set = (value) =>
      act.set("params", { ...this.model.get("params"), [name]: +value.toFixed(6) });
    const range = slider(name, { min, max, step }, set);
    const number = tag("input", { type: "number", min, max, step });
    number.onchange = () => set(Math.max(range.min, Math.min(range.max, number.value)));
    this.ranges[name] = range;
    this.numbers[name] = number;
    return Object.assign(labelled(name, range, number), { title });
  }
  playRounds(act) {
    const isAtEnd = () => +this.rounds.value >= +this.rounds.max;
    clearInterval(this.timer);
    this.timer = this.timer ? 0 : setInterval(() => {
      if (isAtEnd() || !this.play.isConnected) this.playRounds(act);
      else act.turn(1);
    }, ROUND_MS);
    this.play.textContent = this.timer ? "⏸" : "▶";
    if (this.timer && isAtEnd()) act.set("round", 0);
  }
  update() {
    const get = (name) => this.model.get(name), names = get("names"), params = get("params");
    if (this.image.length !== names.length) {
      this.image.replaceChildren(...names.map((name, i) => new Option(name, i)));
    }
    this.image.value = get("source");
    this.method.value = get("method");
    this.beside.value = get("compare");
    for (const name in this.sliders) {
      const [min, max, step] = this.sliders[name], value = params[name];
      const range = this.ranges[name], number = this.numbers[name];
      range.min = Math.min(min, value); // Python may go beyond what a slider needs
      range.max = Math.max(max, value);
      range.value = value;
      const isTyping = number === document.activeElement;
      if (!isTyping) number.value = value.toFixed(step < 0.1 ? 2 : 1);
      range.disabled = number.disabled = !this.methods[get("method")].includes(name);
    }
    this.rounds.max = get("left").rounds ?? 0;
    this.rounds.value = this.count.value = get("round");
  }
}

/** Layers with their opacity, the legend, the selected prompt, and buttons. */
export class Side {
  constructor(stage, act) {
    Object.assign(this, { stage, layers: {} });
    this.legend = tag("div", { className: "aop-statuses" });
    this.detail = tag("div", { className: "aop-detail" });
    const rows = Object.keys(LAYERS).map((name) => this.layer(name, act));
    const keys = Object.entries(KEYS).flatMap(([key, does]) => [text("dt", key), text("dd", does)]);
    this.box = tag("div", { className: "aop-side" },
      tag("div", {}, ...rows), this.legend, this.detail,
      tag("div", { className: "aop-actions" },
        button("Undo", "take back the last click (u)", act.undo),
        button("Fit", "the whole image (0, or double click)", () => stage.fit()),
        button("COCO", "COCO JSON of the masks on the left", () => act.exported("coco")),
        button("Labels", "16-bit PNG: i + 1 where mask i lies", () => act.exported("labels")),
        button("Overlay", "PNG of what is shown", act.saveOverlay),
        button("Copy Python", "the call that makes this state again", act.copyCall)),
      tag("details", { className: "aop-keys" },
        text("summary", "Mouse and keys"), text("div", HELP), tag("dl", {}, ...keys)));
  }
  layer(name, act) {
    const range = slider(`opacity of ${LAYERS[name]}`, { min: 0, max: 100 },
      (value) => act.setOpacity(name, value / 100));
    const check = tag("input", { type: "checkbox", onchange: () => act.toggle(name) });
    const title = text("span", LAYERS[name]);
    const row = tag("div", { className: "aop-layer" }, tag("label", {}, check, title), range);
    if (name in COLOURS_OF) {
      const table = this.stage.look[COLOURS_OF[name]], bar = tag("span", { className: "aop-bar" });
      const stops = [0, 51, 102, 153, 204, 255].map((i) => `rgb(${table[i]})`);
      bar.style.background = `linear-gradient(90deg, ${stops})`;
      row.append(tag("span", { className: "aop-scale" }, "0", bar, "1"));
    }
    this.layers[name] = { range, check, title, row };
    return row;
  }
  update() {
    const { panes, look, opacity } = this.stage, [pane] = panes;
    for (const name in LAYERS) {
      const { range, check, row } = this.layers[name];
      range.value = Math.round(100 * opacity[name]);
      check.checked = opacity[name] > 0;
      row.classList.toggle("aop-absent", !panes.some((one) => this.stage.has(one, name)));
    }
    const of = pane?.maps.pem?.of ?? -1;
    this.layers.pem.title.textContent = of < 0 ? LAYERS.pem : `PEM of ${of}`;
    const found = (pane?.prompts ?? []).map((prompt) => pane.status(prompt));
    const statuses = [...look.statuses.keys(), WAITING].filter((status) => found.includes(status));
    this.legend.replaceChildren(...statuses.map((status) => {
      const [marker, colour, words] = lookOf(status, look);
      const icon = tag("canvas", { width: 32, height: 32 });
      drawGlyph(icon.getContext("2d"), marker, [16, 16], colour, status === WAITING ? 7 : 10);
      const count = found.filter((one) => one === status).length;
      return tag("div", { className: "aop-status" }, icon, text("span", words), text("b", count));
    }));
    this.describe(pane);
  }
  /** What became of the selected prompt, and a button for each of its masks. */
  describe(pane) {
    const { stage } = this, isKnown = stage.selected in (pane?.prompts ?? []);
    const [title, ...facts] = isKnown ? pane.story(stage.selected) : [];
    const masks = stage.candidates.map(({ line }, i) => {
      const only = button(line, "show only this one of its masks", () => {
        stage.showOnly(i);
        this.describe(pane);
      });
      only.classList.toggle("aop-only", stage.only === i);
      only.style.setProperty("--swatch", `rgb(${CANDIDATES[i]})`);
      return only;
    });
    const words = isKnown ? [text("h4", title), ...facts.map((fact) => text("div", fact))] : [];
    this.detail.replaceChildren(...words, ...masks);
  }
}
