// Above and beside the stage: settings, layers, the statuses' legend, the selected prompt, buttons.

import { LAYERS, drawGlyphs, tag } from "./pane.js";

const HELP = "Hover shows what a click would give. Click a prompt to open it, an empty place to " +
  "make an object, again to add to it; a right or Shift click says: not this; a drag draws a " +
  "box. Ctrl click selects a mask. The wheel zooms; a right, middle or Alt drag pans.";
const KEYS = {
  arrows: "move the cross (Shift: faster)", Enter: "click there (Shift: background)",
  "N, Esc": "a new object", Backspace: "take the last point back", Delete: "delete the mask",
  "1 … 3": "part, whole, group", ". ,": "next, previous prompt", "+, −, 0": "zoom in, out, fit",
  "1 … 7": "a layer on, off, where no prompt is open", "[ , ]": "round back, on",
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
  const { methods, beside, sliders } = get("look");
  const choice = (title, trait, names) => {
    const select = tag("select", { ariaLabel: title });
    select.onchange = () => act.set(trait, select.value);
    updates.push(() => {
      const options = names().map((name) => new Option(name));
      if (select.length !== options.length) select.replaceChildren(...options);
      select.value = get(trait);
    });
    return labelled(title, select);
  };
  const parameter = (name) => {
    const [min, max, step, title] = sliders[name];
    const set = (value) => act.set("params", { ...get("params"), [name]: +value.toFixed(6) });
    const range = slider(name, { min, max, step }, set);
    const number = tag("input", { type: "number", min, max, step });
    number.onchange = () => set(Math.max(range.min, Math.min(range.max, number.value)));
    updates.push(() => {
      const value = get("params")[name], disabled = !methods[get("method")].includes(name);
      // a value set in Python may lie beyond
      Object.assign(range, { min: Math.min(min, value), max: Math.max(max, value), disabled });
      range.value = value;
      number.disabled = disabled;
      const isTyping = number === document.activeElement;
      if (!isTyping) number.value = value.toFixed(step < 0.1 ? 2 : 1);
    });
    return Object.assign(labelled(name, range, number), { title });
  };
  const file = tag("input", { type: "file", accept: "image/*", multiple: true, hidden: true });
  file.onchange = () => {
    act.upload([...file.files]);
    file.value = "";
  };
  const images = tag("select", { ariaLabel: "Image" });
  images.onchange = () => act.set("source", +images.value);
  const filter = tag("input", { type: "search", placeholder: "filter", ariaLabel: "a name" });
  /** Offer the images whose name holds what was typed, and the one that is shown. */
  const offer = filter.oninput = () => {
    const part = filter.value.toLowerCase(), own = get("source");
    const options = get("names").map((name, i) => new Option(name, i, false, i === own));
    const isOffered = ({ text, selected }) => selected || text.toLowerCase().includes(part);
    images.replaceChildren(...options.filter(isOffered));
  };
  updates.push(() => {
    if (+images.value !== get("source") || images.names !== get("names")) offer();
    images.names = get("names");
  });
  const turn = (by) => () => {
    const { length, selectedIndex } = images;
    act.set("source", +images.options[(selectedIndex + by + length) % length].value);
  };
  const rounds = slider("Rounds", { min: 0 }, (value) => act.set("round", value));
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
  return tag("div", { className: "aop-controls" },
    tag("div", {},
      labelled("Image", images), button("‹", "the image before", turn(-1)),
      button("›", "the next image", turn(1)), filter, file,
      button("Your own", "an image of your own", () => file.click()),
      choice("Method", "method", () => Object.keys(methods)),
      choice("Beside", "compare", () => beside)),
    tag("div", {}, ...Object.keys(sliders).map(parameter),
      labelled("Rounds", rounds, count), play));
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
    const row = tag("div", { className: "aop-layer" }, tag("label", {}, check, title), range);
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
      const isThere = name === "prompts" || stage.panes.some((pane) => pane.source(name));
      row.classList.toggle("aop-absent", !isThere);
      const of = name === "pem" ? stage.panes[0]?.maps.pem?.of : undefined;
      title.textContent = of === undefined ? LAYERS[name] : `PEM of ${of}`;
    });
    return row;
  };
  /** What a status looks like, and how many prompts have it. */
  const entry = (status) => {
    const [marker, colour, words] = look.styles[status];
    const count = stage.panes[0]?.having(status).length;
    const icon = tag("canvas", { width: 32, height: 32 }), view = { k: 1, x: 16, y: 16 };
    drawGlyphs(icon.getContext("2d"), view, marker, [{ x: 0, y: 0 }], colour, 10);
    const parts = [icon, text("span", words), text("b", count)];
    return count ? [tag("div", { className: "aop-status" }, ...parts)] : [];
  };
  /** The legend; what became of the selected prompt, and a button for each of its masks. */
  function describe() {
    legend.replaceChildren(...[...look.styles.keys()].flatMap(entry));
    const [pane] = stage.panes, selected = get("selected");
    const [title, ...facts] = selected in (pane?.prompts ?? []) ? pane.story(selected) : [];
    const masks = stage.candidates.map(({ line, colour }, i) => {
      const only = button(line, "only this one of its masks", () => act.choose(i));
      only.classList.toggle("aop-only", stage.only === i);
      only.style.setProperty("--swatch", `rgb(${colour})`);
      return only;
    });
    const words = title ? [text("b", title), ...facts.map((fact) => text("div", fact))] : [];
    detail.replaceChildren(...words, ...masks);
    const { counts } = get("left").masks ?? {}, nDeleted = get("deleted").length;
    own.hidden = stage.chosen < 0;
    if (name !== document.activeElement) name.value = get("labels")[counts?.[stage.chosen]] ?? "";
    Object.assign(restore, { textContent: `Restore ${nDeleted} deleted`, hidden: !nDeleted });
  }
  const name = tag("input", { placeholder: "name this mask", ariaLabel: "name of the mask" });
  name.onchange = () => act.label(name.value);
  const restore = button("", "show the deleted masks again", () => act.set("deleted", []));
  const own = tag("div", { className: "aop-actions" }, name,
    button("Delete", "delete this mask (Delete)", act.remove),
    button("Export", "COCO JSON of this mask alone", () =>
      act.exported("coco", get("left").masks.counts[stage.chosen])));
  const keys = Object.entries(KEYS).map(([key, does]) => text("div", `${key}: ${does}`));
  updates.push(describe);
  return tag("div", { className: "aop-side" },
    tag("div", {}, ...Object.keys(LAYERS).map(layer)), legend, detail, own,
    tag("div", { className: "aop-actions" },
      restore, button("Undo", "take back the last point (Backspace)", act.undo),
      button("Fit", "the whole image (0)", () => stage.fit()),
      button("COCO", "COCO JSON of the masks on the left", () => act.exported("coco")),
      button("Labels", "16-bit PNG: i + 1 where mask i lies", () => act.exported("labels")),
      button("Overlay", "PNG of what is shown", act.saveOverlay),
      button("Copy Python", "the call that makes this state again", act.copyCall)),
    tag("details", { className: "aop-keys" },
      text("summary", "Mouse and keys"), text("div", HELP), ...keys));
}
