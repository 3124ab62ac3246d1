// Above and beside the stage: settings, layers, the statuses' legend, the selected prompt, buttons.

import { LAYERS, drawGlyphs, tag } from "./pane.js";

const HELP = "Wheel zooms, dragging pans. Click a prompt that is shown to open it, any other " +
  "place to ask SAM there; Shift-click says: not this.";
const KEYS = {
  arrows: "move the cross (Shift: faster)", Enter: "click there (Shift: background)",
  "n, p": "next, previous prompt", Esc: "let go of the prompt", u: "undo a click",
  "+, −, 0": "zoom in, out, fit", "1 … 8": "a layer on, off", "[ , ]": "round back, on",
};
const HINTS = { // what the layers show
  image: "the picture", pcm: "Prompt Confidence Map: how likely a click there finds a mask",
  smoothed: "the PCM, blurred by smoothing: its peaks become prompts",
  pem: "Prompt Elimination Map: how like the masks found so far a place is; high: dropped",
  masks: "what was found and kept", ground_truth: "the objects that people outlined",
  prompts: "all prompts but those dropped", eliminated: "prompts that are never decoded",
};
const PRESETS = { // tooltip, opacities of the layers that are on, whether before the first round
  "Where to click": ["the PCM, its peaks ringed", { image: 0.6, pcm: 0.6, prompts: 1 }, true],
  "What was found": ["the masks alone", { image: 1, masks: 0.8 }, false],
  "Why it was dropped": ["the PEM and what it dropped: click a cross to see which mask did it",
    { image: 0.6, pem: 0.6, eliminated: 1 }, false],
};
const ROUND_MS = 700; // how long a round is shown

const text = (name, textContent) => tag(name, { textContent });
const button = (textContent, title, onclick) =>
  tag("button", { type: "button", textContent, title, onclick });
const labelled = (name, ...controls) => tag("label", {}, text("span", name), ...controls);
const slider = (ariaLabel, limits, set) =>
  tag("input", { type: "range", ...limits, ariaLabel, oninput: (e) => set(+e.target.value) });

/** Choices, sliders and rounds. The functions that update them join `updates`. */
export function makeControls(get, act, updates) {
  const { methods, titles, beside, sliders, params } = get("look");
  const choice = (title, trait, names) => {
    const isIndex = trait === "source", select = tag("select", { ariaLabel: title });
    select.onchange = () => act.set(trait, isIndex ? +select.value : select.value);
    updates.push(() => {
      const options = names().map((name, i) =>
        new Option(isIndex ? name : titles[name] ?? name, isIndex ? i : name));
      if (select.length !== options.length) select.replaceChildren(...options);
      select.value = get(trait);
    });
    return labelled(title, select);
  };
  const parameter = (name) => {
    const [min, max, step, unit, title] = sliders[name], size = tag("small");
    const set = (value) => act.set("params", { ...get("params"), [name]: +value.toFixed(6) });
    const range = slider(name, { min, max, step }, set);
    const ariaLabel = `${name} as a number`;
    const number = tag("input", { type: "number", min, max, step, ariaLabel });
    number.onchange = () => set(Math.max(range.min, Math.min(range.max, number.value)));
    updates.push(() => {
      const value = get("params")[name], disabled = !methods[get("method")].includes(name);
      // a value set in Python may lie beyond
      Object.assign(range, { min: Math.min(min, value), max: Math.max(max, value), disabled });
      range.value = value;
      number.disabled = disabled;
      const isTyping = number === document.activeElement;
      if (!isTyping) number.value = value.toFixed(step < 0.1 ? 2 : 1);
      const { width: w = 0, height: h = 0 } = get("image"), pixels = (value * Math.max(w, h)) / 256;
      size.textContent = unit === "px" ? `= ${pixels.toFixed(pixels < 10 ? 1 : 0)} px` : unit;
    });
    return Object.assign(labelled(name, range, number, size), { title });
  };
  const file = tag("input", { type: "file", accept: "image/*", hidden: true });
  file.onchange = () => {
    act.upload(file.files[0]);
    file.value = "";
  };
  const rounds = slider("Rounds", { min: 0 }, (value) => act.set("round", value));
  rounds.title = "as it was after so many rounds of decoding";
  const count = tag("output"), play = button("▶", "play the rounds", () => playRounds());
  let timer = 0;
  function playRounds() {
    const isAtEnd = () => +rounds.value >= +rounds.max;
    clearInterval(timer);
    timer = timer ? 0 : setInterval(() => {
      if (isAtEnd() || !play.isConnected) playRounds();
      else act.turn(1);
    }, ROUND_MS);
    play.textContent = timer ? "⏸" : "▶";
    if (timer && isAtEnd()) act.set("round", 0);
  }
  updates.push(() => {
    rounds.max = get("left").rounds ?? 0;
    rounds.value = count.value = get("round");
  });
  const presets = Object.entries(PRESETS).map(([name, [title, shown, isBefore]]) => {
    const one = button(name, title, () => act.show(shown, isBefore));
    const isAsSet = (key) => (get("layers")[key] ?? 0) === (shown[key] ?? 0);
    updates.push(() => {
      one.ariaPressed = isBefore === !get("round") && Object.keys(LAYERS).every(isAsSet);
    });
    return one;
  });
  return tag("div", { className: "aop-controls" },
    tag("div", {},
      choice("Image", "source", () => get("names")), file,
      button("Upload", "open an image of your own", () => file.click()),
      choice("Method", "method", () => Object.keys(methods)),
      choice("Compare with", "compare", () => beside)),
    tag("div", { className: "aop-sliders" }, ...Object.keys(sliders).map(parameter)),
    tag("div", {}, tag("div", { className: "aop-presets", role: "group" }, ...presets),
      play, labelled("Rounds", rounds, count),
      button("Reset", "sliders and layers back to their defaults", () =>
        act.show(PRESETS["What was found"][1], false, params))));
}

/** Layers with their opacity, the legend, the selected prompt, and buttons: as makeControls. */
export function makeSide(get, act, stage, updates) {
  const { look } = stage, legend = tag("div", { className: "aop-statuses" });
  const detail = tag("div", { className: "aop-detail" });
  const layer = (name) => {
    const set = (percent) => act.setOpacity(name, percent / 100);
    const range = slider(`opacity of ${LAYERS[name]}`, { min: 0, max: 100 }, set);
    const check = tag("input", { type: "checkbox", onchange: () => act.toggle(name) });
    const title = text("span", LAYERS[name]);
    const row = tag("div", { className: "aop-layer", title: HINTS[name] },
      tag("label", {}, check, title), range);
    if (name in look.colours) {
      const bar = tag("span", { className: "aop-bar" });
      const stops = look.colours[name].filter((_, i) => i % 51 === 0).map((c) => `rgb(${c})`);
      bar.style.background = `linear-gradient(90deg, ${stops})`;
      row.append(tag("span", { className: "aop-scale" }, "0", bar, "1"));
    }
    updates.push(() => {
      const opacity = get("layers")[name] ?? 0;
      range.value = Math.round(100 * opacity);
      check.checked = opacity > 0;
      const isThere = stage.panes.some((pane) => pane.source(name));
      row.classList.toggle("aop-absent", !isThere);
      const of = name === "pem" ? stage.panes[0]?.maps.pem?.of : undefined;
      title.textContent = of === undefined ? LAYERS[name] : `PEM of ${of}`;
    });
    return row;
  };
  const least = slider("least predicted IoU", { max: 1, step: 0.005 }, act.setLeast);
  const count = tag("output"), title = "hides masks whose predicted IoU is lower, here and in files";
  const quality = tag("div", { title, className: "aop-quality" },
    tag("label", { className: "aop-layer" }, text("span", "Quality"), least), count);
  updates.push(() => {
    const [pane] = stage.panes, scores = pane?.result.scores ?? [];
    least.min = Math.floor(200 * Math.min(1, ...scores)) / 200;
    least.value = get("least_iou");
    count.value = pane ? `${pane.shown} of ${scores.length} masks shown` : "";
  });
  /** What a status looks like, and how many prompts of a pane have it. */
  const entry = (pane, status) => {
    const [marker, colour, words] = look.styles[status], count = pane.having(status).length;
    const icon = tag("canvas", { width: 32, height: 32 }), view = { k: 1, x: 16, y: 16 };
    drawGlyphs(icon.getContext("2d"), view, marker, [{ x: 0, y: 0 }], colour, 10);
    const parts = [icon, text("span", words), text("b", count)];
    return count ? [tag("div", { className: "aop-status" }, ...parts)] : [];
  };
  const legendOf = (pane) =>
    [text("b", pane.result.title), ...look.styles.flatMap((_, status) => entry(pane, status))];
  /** A legend each; what became of the selected prompt, and a button for each of its masks. */
  function describe() {
    legend.replaceChildren(...stage.panes.flatMap(legendOf));
    const [pane] = stage.panes, selected = get("selected");
    const [title, ...facts] = selected in (pane?.prompts ?? []) ? pane.story(selected) : [];
    const masks = stage.candidates.map(({ line, colour }, i) => {
      const only = button(line, "show only this one of its masks", () => {
        stage.only = stage.only === i ? -1 : i;
        stage.invalidate();
        describe();
      });
      only.classList.toggle("aop-only", stage.only === i);
      only.style.setProperty("--swatch", `rgb(${colour})`);
      return only;
    });
    if (title && stage.detail?.fact) facts.push(stage.detail.fact);
    const words = title ? [text("b", title), ...facts.map((fact) => text("div", fact))] : [];
    detail.replaceChildren(...words, ...masks);
  }
  const keys = Object.entries(KEYS).map(([key, does]) => text("div", `${key}: ${does}`));
  updates.push(describe);
  return tag("div", { className: "aop-side" },
    tag("div", {}, ...Object.keys(LAYERS).map(layer)), quality, legend, detail,
    tag("div", { className: "aop-actions" },
      button("Undo", "take back the last click (u)", act.undo),
      button("Fit", "the whole image (0, or double click)", () => stage.fit()),
      button("COCO", "COCO JSON of the masks on the left", () => act.exported("coco")),
      button("Labels", "16-bit PNG: i + 1 where mask i lies", () => act.exported("labels")),
      button("Overlay", "PNG of what is shown", act.saveOverlay),
      button("Copy Python", "the call that makes this state again", act.copyCall)),
    tag("details", { className: "aop-keys" },
      text("summary", "Mouse and keys"), text("div", HELP), ...keys));
}
