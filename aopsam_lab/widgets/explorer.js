// The page: shows the model's traits, and sets them. explorer.py joins its modules, this one last.

import { LAYERS, tag } from "./pane.js";
import { makeControls, makeSide } from "./side.js";
import { Stage } from "./stage.js";

const KERNEL_LOST = "The kernel was restarted or stopped. To compute anew, run the cell again.";
const NO_OBJECT = "A background point belongs to an object: " +
  "click the object first, then shift-click what is not it.";
const CHOSEN = 4; // as in session.py
const SIGN_MS = 300;

function listenToPointer(stage, act) {
  const { canvas } = stage;
  let from = null;
  canvas.onpointerdown = (e) => {
    const isPan = e.button > 0 || e.altKey || e.pointerType === "touch";
    from = { x: e.clientX, y: e.clientY, view: stage.view, at: stage.imagePoint(e), isPan };
    canvas.setPointerCapture(e.pointerId);
    canvas.focus();
  };
  canvas.onpointermove = (e) => {
    const dx = e.clientX - from?.x, dy = e.clientY - from?.y, at = stage.imagePoint(e);
    if (from) from.isDragged ||= Math.hypot(dx, dy) > 4;
    if (from?.isDragged && from.isPan) {
      stage.move({ ...from.view, x: from.view.x + dx, y: from.view.y + dy });
    } else if (from?.isDragged) {
      stage.band = stage.boxOf(from.at, at);
    }
    act.point(at, e);
  };
  canvas.onpointerleave = () => act.point(null);
  canvas.onpointerup = (e) => {
    const { band } = stage, isClick = from && !from.isDragged && e.button !== 1;
    stage.band = from = null;
    if (band) act.put([[band.x0, band.y0, 2], [band.x1, band.y1, 3]]);
    else if (isClick) act.click(stage.imagePoint(e), e);
  };
  canvas.oncontextmenu = (e) => { // a right click is a background point
    e.preventDefault();
    e.stopPropagation();
  };
  canvas.addEventListener("wheel", (e) => {
    e.preventDefault();
    stage.zoom(Math.exp(-0.0015 * e.deltaY), stage.imagePoint(e));
    act.point(stage.imagePoint(e), e);
  }, { passive: false });
}

const isShortcut = (e) => e.ctrlKey || e.metaKey || e.altKey;

function listenToKeys(stage, act) {
  const move = (dx, dy, e) => {
    const { size, here } = stage, far = (e.shiftKey ? 40 : 4) / stage.view.k;
    const within = (value, most) => Math.max(0, Math.min(most - 0.5, value));
    const x = within(here.x + dx * far, size.width), y = within(here.y + dy * far, size.height);
    act.point({ x, y }, e, true);
  };
  const does = {
    ArrowLeft: (e) => move(-1, 0, e), ArrowRight: (e) => move(1, 0, e),
    ArrowUp: (e) => move(0, -1, e), ArrowDown: (e) => move(0, 1, e),
    Enter: (e) => act.click(stage.here, e), Escape: act.leave, n: act.leave, N: act.leave,
    Backspace: act.undo, Delete: act.remove, ".": () => act.step(1), ",": () => act.step(-1),
    "+": () => stage.zoom(1.25), "=": () => stage.zoom(1.25), "-": () => stage.zoom(0.8),
    0: () => stage.fit(), "[": () => act.turn(-1), "]": () => act.turn(1),
  };
  Object.keys(LAYERS).forEach((name, i) => {
    does[i + 1] = () => i in stage.candidates ? act.choose(i) : act.toggle(name);
  });
  stage.canvas.onkeydown = (e) => {
    if (isShortcut(e) || !(e.key in does)) return;
    e.preventDefault();
    does[e.key](e);
  };
}

/** What pointer, keys and buttons do, and the messages about it. */
function actions(model, stage, message, readout) {
  const last = {}, get = (name) => model.get(name); // last: opacity of layers that are off
  let isLost = false, asked = null, wanted = null; // clicks to preview: one question at a time
  const say = (words) => { message.textContent = words; };
  const isReady = () => stage.panes.length > 0 && !get("left").growing;
  let nAsked = 0, nHeard = 0;
  /** A question that the kernel has not heard after SIGN_MS is signed as waiting. */
  function ask(question) {
    if (isLost) return say(KERNEL_LOST);
    question();
    model.send({ ping: ++nAsked });
    setTimeout(() => stage.wait(nHeard < nAsked), SIGN_MS);
  }
  model.on("comm_live_update", () => { // ipywidgets' own event: the kernel is gone
    isLost = true;
    say(KERNEL_LOST);
  });
  const act = {
    say,
    set(name, value) {
      model.set(name, value);
      ask(() => model.save_changes());
    },
    point(at, e, isByKey = false) {
      readout.textContent = stage.point(at, isByKey);
      act.preview(at && act.joined([[at.x, at.y, e.shiftKey ? 0 : 1]]));
    },
    /** Ask for the mask that the clicks would give; a question that waits is replaced. */
    preview(clicks) {
      const [x, y] = clicks?.at(-1) ?? [], isInside = !stage.band && stage.isInside({ x, y });
      const isFree = isInside && (act.object() >= 0 || stage.promptNear({ x, y }) < 0);
      wanted = isFree ? clicks : null;
      if (asked || !wanted || isLost || get("busy") || !isReady()) return;
      [asked, wanted] = [wanted, null];
      model.send({ hover: asked });
    },
    previewed(clicks, masks) {
      asked = null;
      stage.setHint(clicks.at(-1), masks);
      act.preview(wanted);
    },
    /** The index of the object being made, or -1. */
    object() {
      const i = get("selected") - stage.panes[0]?.auto;
      return i in get("manual") ? i : -1;
    },
    /** The clicks of the object being made, and more; a box or a choice replaces the last one. */
    joined(clicks) {
      const most = clicks[0]?.[2] === 2 ? 2 : CHOSEN, own = get("manual")[act.object()] ?? [];
      return [...own.filter(([, , label]) => label < most), ...clicks];
    },
    put(clicks) {
      const manual = [...get("manual")], at = act.object(), i = at < 0 ? manual.length : at;
      if (!isReady()) return;
      manual[i] = act.joined(clicks);
      stage.hint = null;
      model.set("selected", stage.panes[0].auto + i);
      act.set("manual", manual);
    },
    click(at, { shiftKey, button, ctrlKey, metaKey }) {
      const [pane] = stage.panes, isNew = act.object() < 0;
      if (!isReady() || !stage.isInside(at)) return;
      const prompt = isNew ? stage.promptNear(at) : -1, isBackground = shiftKey || button === 2;
      if (ctrlKey || metaKey) act.pick(pane.maskAt(at));
      else if (isBackground && isNew) say(NO_OBJECT);
      else if (prompt >= 0) act.set("selected", prompt);
      else act.put([[at.x, at.y, isBackground ? 0 : 1]]);
    },
    pick(i) {
      const { counts, owners } = get("left").masks;
      Object.assign(stage, { picked: counts[i], detail: undefined });
      act.set("selected", owners[i] ?? -1);
      act.refresh();
    },
    leave() { act.set("selected", -1); },
    choose(i) {
      const isOption = !get("detail").lines[i].startsWith("as clicked");
      if (act.object() >= 0) return act.put(isOption ? [[i, 0, CHOSEN]] : []);
      stage.only = stage.only === i ? -1 : i;
      act.refresh();
    },
    undo() {
      const manual = [...get("manual")], at = act.object(), i = at < 0 ? manual.length - 1 : at;
      const left = manual[i]?.slice(0, manual[i].at(-1)[2] === 3 ? -2 : -1) ?? [];
      const isObject = left.some(([, , label]) => label % CHOSEN);
      manual.splice(i, 1, ...(isObject ? [left] : []));
      act.set("manual", manual);
    },
    remove() {
      const at = act.object(), counts = get("left").masks?.counts[stage.chosen];
      const manual = get("manual").filter((_, i) => i !== at);
      if (counts && at < 0) model.set("deleted", [...get("deleted"), counts]);
      model.set("manual", manual);
      act.leave();
    },
    label(name) {
      const counts = get("left").masks.counts[stage.chosen];
      act.set("labels", { ...get("labels"), [counts]: name.trim() });
    },
    step(by) {
      const n = stage.panes[0]?.prompts.length, from = get("selected");
      if (n) act.set("selected", ((from < 0 && by < 0 ? 0 : from) + by + n) % n);
    },
    turn(by) {
      act.set("round", Math.max(0, Math.min(get("left").rounds ?? 0, get("round") + by)));
    },
    /** The kernel learns an opacity with the next change of something else. */
    setOpacity(name, value) { model.set("layers", { ...get("layers"), [name]: value }); },
    toggle(name) {
      const value = get("layers")[name];
      if (value) last[name] = value;
      act.setOpacity(name, value ? 0 : last[name] ?? 0.8);
    },
    exported(what, mask = "") { ask(() => model.send({ what, mask })); },
    heard(ping) {
      nHeard = ping;
      stage.wait(nHeard < nAsked && stage.isWaiting);
    },
    /** Open files of a person's own; the first of them is shown. */
    async upload(files) {
      for (const [i, file] of [...files].entries()) {
        const data = await file.arrayBuffer();
        ask(() => model.send({ name: file.name, is_first: i === 0 }, undefined, [data]));
      }
    },
    save(blob, download) {
      const href = URL.createObjectURL(blob);
      tag("a", { href, download }).click();
      setTimeout(() => URL.revokeObjectURL(href), 10000);
      say(`Saved ${download}.`);
    },
    saveOverlay() { stage.overlay().toBlob((blob) => act.save(blob, "overlay.png")); },
    copyCall() {
      const call = get("call"); // without a clipboard the text can be marked
      navigator.clipboard.writeText(call).then(() => say(`Copied: ${call}`), () => say(call));
    },
  };
  return act;
}

/** anywidget's entry; it takes the listeners off itself. */
function render({ model, el }) {
  const message = tag("span", { className: "aop-message", role: "status" });
  const readout = tag("span", { className: "aop-readout" });
  const get = (name) => model.get(name), stage = new Stage(get);
  const act = actions(model, stage, message, readout), updates = [() => stage.update()];
  const root = tag("div", { className: "aop" }, makeControls(get, act, updates),
    tag("div", { className: "aop-main" }, stage.box, makeSide(get, act, stage, updates)),
    tag("div", { className: "aop-line" }, message, readout));

  /** Show what the traits hold now. */
  function update() {
    if (get("image") !== stage.packed) stage.open(get("image")).then(update);
    updates.forEach((part) => part());
  }
  root.onkeydown = (e) => isShortcut(e) || e.stopPropagation(); // JupyterLab sees no key
  root.ondragover = (e) => e.preventDefault();
  root.ondrop = root.onpaste = (e) => {
    const { files } = e.dataTransfer ?? e.clipboardData;
    if (!files.length) return;
    e.preventDefault();
    e.stopPropagation();
    act.upload([...files]);
  };
  el.append(root);
  listenToPointer(stage, act);
  listenToKeys(stage, act);
  model.on("change", update);
  for (const name of ["message", "left", "right"]) { // "Copied" is about what was there before
    model.on(`change:${name}`, () => act.say(get("message")));
  }
  model.on("msg:custom", ({ name, hover, masks, ping }, [data]) => {
    if (ping) act.heard(ping);
    else if (hover) act.previewed(hover, masks);
    else act.save(new Blob([data]), name);
  });
  act.refresh = update;
  act.say(get("message"));
  update();
  const observer = new ResizeObserver(() => stage.layout());
  observer.observe(stage.box);
  return () => observer.disconnect();
}

export default { render };
