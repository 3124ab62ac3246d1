// The explorer in the page: shows the model's traits, and sets them. explorer.py joins these
// modules, this one last.

import { tag, unpackTable } from "./masks.js";
import { LAYERS } from "./pane.js";
import { Controls, Side } from "./side.js";
import { Stage } from "./stage.js";

const KERNEL_LOST =
  "The kernel was restarted or stopped, so nothing can be computed here. Run the cell again.";

function download(blob, name) {
  const url = URL.createObjectURL(blob);
  tag("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** Mouse and touch on the stage. */
function listenToPointer(stage, act) {
  const { canvas } = stage;
  let drag = null, asking = 0;
  canvas.onpointerdown = (e) => {
    drag = { x: e.clientX, y: e.clientY, view: stage.view, isMoved: false };
    canvas.setPointerCapture(e.pointerId);
    canvas.focus();
  };
  canvas.onpointermove = (e) => {
    const dx = e.clientX - drag?.x, dy = e.clientY - drag?.y;
    if (drag) drag.isMoved ||= Math.hypot(dx, dy) > 4;
    if (drag?.isMoved) stage.move({ ...drag.view, x: drag.view.x + dx, y: drag.view.y + dy });
    act.point(stage.imagePoint(e));
  };
  canvas.onpointerup = (e) => {
    const at = stage.imagePoint(e), isClick = drag && !drag.isMoved && e.button === 0;
    drag = null;
    clearTimeout(asking);
    if (!isClick) return;
    // time for a second click: two mean "fit", not a question
    const wait = !e.shiftKey && stage.promptNear(at) >= 0 ? 0 : 250;
    asking = setTimeout(() => act.click(at, e.shiftKey), wait);
  };
  canvas.onpointerleave = () => act.point(null);
  canvas.ondblclick = () => {
    clearTimeout(asking);
    stage.fit();
  };
  canvas.addEventListener("wheel", (e) => {
    e.preventDefault();
    stage.zoom(Math.exp(-0.0015 * e.deltaY), stage.screenPoint(e));
    act.point(stage.imagePoint(e));
  }, { passive: false });
}

/** Keys on the stage. */
function listenToKeys(stage, act) {
  const move = (dx, dy, e) => {
    const { size, here } = stage, far = (e.shiftKey ? 40 : 4) / stage.view.k;
    const x = Math.max(0, Math.min(size.width - 0.5, here.x + dx * far));
    act.point({ x, y: Math.max(0, Math.min(size.height - 0.5, here.y + dy * far)) }, true);
  };
  const zoom = (factor) => {
    const { view, here } = stage;
    stage.zoom(factor, { x: view.x + view.k * here.x, y: view.y + view.k * here.y });
  };
  const does = {
    ArrowLeft: (e) => move(-1, 0, e), ArrowRight: (e) => move(1, 0, e),
    ArrowUp: (e) => move(0, -1, e), ArrowDown: (e) => move(0, 1, e),
    Enter: (e) => act.click(stage.here, e.shiftKey), Escape: () => act.select(-1),
    u: act.undo, n: () => act.step(1), p: () => act.step(-1),
    "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: () => stage.fit(),
    "[": () => act.turn(-1), "]": () => act.turn(1),
  };
  Object.keys(LAYERS).forEach((name, i) => { does[i + 1] = () => act.toggle(name); });
  stage.canvas.onkeydown = (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || !(e.key in does)) return;
    e.preventDefault();
    does[e.key](e);
  };
}

/** What a hand can do; the kernel is asked by messages, the rest are traits. */
function actions(model, stage, page) {
  const last = {}; // opacity of layers that are off
  const send = (content, buffers) =>
    page.isLost() ? page.say(KERNEL_LOST) : model.send(content, undefined, buffers);
  const act = {
    set(name, value) {
      model.set(name, value);
      if (page.isLost()) page.say(KERNEL_LOST);
      else model.save_changes();
    },
    point(at, isByKey = false) { page.read(stage.point(at, isByKey)); },
    click(at, isBackground) {
      if (!stage.panes.length || !stage.isInside(at)) return;
      const prompt = isBackground ? -1 : stage.promptNear(at);
      if (prompt >= 0) act.select(prompt);
      else send({ kind: "ask", ...at, label: isBackground ? 0 : 1 });
    },
    select(prompt) { act.set("selected", prompt); },
    step(by) {
      const n = stage.panes[0]?.prompts.length, from = model.get("selected");
      if (n) act.select(((from < 0 && by < 0 ? 0 : from) + by + n) % n);
    },
    turn(by) {
      const most = stage.panes[0]?.rounds ?? 0;
      act.set("round", Math.max(0, Math.min(most, model.get("round") + by)));
    },
    /** The kernel learns an opacity with the next change of something else. */
    setOpacity(name, value) { model.set("layers", { ...model.get("layers"), [name]: value }); },
    toggle(name) {
      const value = model.get("layers")[name];
      if (value) last[name] = value;
      act.setOpacity(name, value ? 0 : last[name] ?? 0.8);
    },
    undo() { send({ kind: "undo" }); },
    exported(what) { send({ kind: "export", what }); },
    async upload(file) { send({ kind: "upload", name: file.name }, [await file.arrayBuffer()]); },
    saveOverlay() { stage.overlay().toBlob((blob) => page.save(blob, "overlay.png")); },
    copyCall() {
      const call = model.get("call"); // without a clipboard the text can be marked
      const copied = navigator.clipboard.writeText(call);
      copied.then(() => page.say(`Copied: ${call}`), () => page.say(call));
    },
  };
  return act;
}

/** anywidget's entry. */
function render({ model, el }) {
  const stage = new Stage(model.get("look"));
  const message = tag("span", { className: "aop-message", role: "status" });
  const readout = tag("span", { className: "aop-readout" });
  let isLost = false, shown = {};
  const page = {
    isLost: () => isLost,
    say: (text) => { message.textContent = text; },
    read: (text) => { readout.textContent = text; },
    save: (blob, name) => {
      download(blob, name);
      page.say(`Saved ${name}.`);
    },
  };
  const act = actions(model, stage, page);
  const controls = new Controls(model, act), side = new Side(stage, act);

  /** The page is what the traits say. */
  function update() {
    const get = (name) => model.get(name), preview = get("preview");
    if (get("image") !== shown.image) stage.open(get("image")).then(update);
    // "Copied" is about what was there before
    const said = [get("message"), get("left"), get("right")];
    if (said.some((value, i) => value !== shown.said?.[i])) page.say(get("message"));
    shown = { image: get("image"), said };
    stage.clicks = get("manual");
    stage.waiting = preview.rows ? unpackTable(preview) : [];
    stage.busy.textContent = get("busy");
    stage.busy.hidden = !get("busy");
    stage.opacity = get("layers");
    stage.setResults([get("left"), get("right")].filter((r) => stage.image && r.prompts));
    stage.setRound(get("round"));
    stage.select(get("selected"), stage.image ? get("detail") : {});
    controls.update();
    side.update();
  }
  const listeners = {
    change: update,
    "msg:custom": ({ name }, [data]) => page.save(new Blob([data]), name),
    comm_live_update: () => { // ipywidgets' own: the other end is gone
      isLost = true;
      page.say(KERNEL_LOST);
    },
  };
  const root = tag("div", { className: "aop" }, controls.box,
    tag("div", { className: "aop-main" }, stage.box, side.box),
    tag("div", { className: "aop-line" }, message, readout));
  root.onkeydown = (e) => { // JupyterLab's shortcuts of a single key stay out
    if (!e.ctrlKey && !e.metaKey && !e.altKey) e.stopPropagation();
  };
  el.append(root);
  listenToPointer(stage, act);
  listenToKeys(stage, act);
  for (const name in listeners) model.on(name, listeners[name]);
  update();
  const observer = new ResizeObserver(() => stage.layout());
  observer.observe(stage.box);
  return () => {
    observer.disconnect();
    for (const name in listeners) model.off(name, listeners[name]);
  };
}

export default { render };
