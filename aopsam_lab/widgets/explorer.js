// The page: shows the model's traits, and sets them. explorer.py joins its modules, this one last.

import { LAYERS, tag } from "./pane.js";
import { makeControls, makeSide } from "./side.js";
import { Stage } from "./stage.js";

const KERNEL_LOST = "The kernel was restarted or stopped. To compute anew, run the cell again.";
const NOT_ARRIVED = "has not arrived. Servers take 10 MB, those of make lab and make app 256 MB: " +
  "reduce it, or name its path in explore().";
const NO_OBJECT = "A background point belongs to an object: " +
  "click the object first, then shift-click what is not it.";

function listenToPointer(stage, act) {
  const { canvas } = stage;
  let from = null, isDragged = false, asking = 0;
  canvas.onpointerdown = (e) => {
    from = { x: e.clientX, y: e.clientY, view: stage.view };
    isDragged = false;
    canvas.setPointerCapture(e.pointerId);
    canvas.focus();
  };
  canvas.onpointermove = (e) => {
    const dx = e.clientX - from?.x, dy = e.clientY - from?.y;
    isDragged ||= e.buttons > 0 && Math.hypot(dx, dy) > 4;
    if (e.buttons && isDragged) {
      stage.move({ ...from.view, x: from.view.x + dx, y: from.view.y + dy });
    }
    act.point(stage.imagePoint(e));
  };
  canvas.onpointerleave = () => act.point(null);
  canvas.onclick = (e) => {
    clearTimeout(asking);
    if (isDragged) return;
    if (e.detail > 1) return stage.fit(); // so a single click waits for a second
    const at = stage.imagePoint(e), wait = !e.shiftKey && stage.promptNear(at) >= 0 ? 0 : 250;
    asking = setTimeout(() => act.click(at, e.shiftKey), wait);
  };
  canvas.addEventListener("wheel", (e) => {
    e.preventDefault();
    stage.zoom(Math.exp(-0.0015 * e.deltaY), stage.imagePoint(e));
    act.point(stage.imagePoint(e));
  }, { passive: false });
}

const isShortcut = (e) => e.ctrlKey || e.metaKey || e.altKey;

function listenToKeys(stage, act) {
  const move = (dx, dy, e) => {
    const { size, here } = stage, far = (e.shiftKey ? 40 : 4) / stage.view.k;
    const within = (value, most) => Math.max(0, Math.min(most - 0.5, value));
    const x = within(here.x + dx * far, size.width), y = within(here.y + dy * far, size.height);
    act.point({ x, y }, true);
  };
  const does = {
    ArrowLeft: (e) => move(-1, 0, e), ArrowRight: (e) => move(1, 0, e),
    ArrowUp: (e) => move(0, -1, e), ArrowDown: (e) => move(0, 1, e),
    Enter: (e) => act.click(stage.here, e.shiftKey), Escape: () => act.set("selected", -1),
    u: act.undo, n: () => act.step(1), p: () => act.step(-1),
    "+": () => stage.zoom(1.25), "=": () => stage.zoom(1.25), "-": () => stage.zoom(0.8),
    0: () => stage.fit(), "[": () => act.turn(-1), "]": () => act.turn(1),
  };
  Object.keys(LAYERS).forEach((name, i) => { does[i + 1] = () => act.toggle(name); });
  stage.canvas.onkeydown = (e) => {
    if (isShortcut(e) || !(e.key in does)) return;
    e.preventDefault();
    does[e.key](e);
  };
}

/** What pointer, keys and buttons do, and the messages about it. */
function actions(model, stage, message, readout) {
  const last = {}, get = (name) => model.get(name); // last: opacity of layers that are off
  let isLost = false;
  const say = (words) => { message.textContent = words; };
  const ask = (question) => isLost ? say(KERNEL_LOST) : question();
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
    point(at, isByKey = false) { readout.textContent = stage.point(at, isByKey); },
    click(at, isBackground) {
      if (!stage.panes.length || !stage.isInside(at)) return;
      const prompt = isBackground ? -1 : stage.promptNear(at);
      if (prompt >= 0) return act.set("selected", prompt);
      const manual = [...get("manual")], object = isBackground ? manual.pop() : [];
      if (!object) return say(NO_OBJECT);
      act.set("manual", [...manual, [...object, [at.x, at.y, isBackground ? 0 : 1]]]);
    },
    undo() {
      const manual = [...get("manual")], left = manual.pop()?.slice(0, -1) ?? [];
      act.set("manual", left.length ? [...manual, left] : manual);
    },
    step(by) {
      const n = stage.panes[0]?.prompts.length, from = get("selected");
      if (n) act.set("selected", ((from < 0 && by < 0 ? 0 : from) + by + n) % n);
    },
    turn(by) {
      act.set("round", Math.max(0, Math.min(get("left").rounds ?? 0, get("round") + by)));
    },
    /** Set all layers, show no round or all, and set the parameters. */
    show(layers, isBefore, params = get("params")) {
      model.set("layers", layers);
      model.set("params", params);
      act.turn(isBefore ? -Infinity : Infinity);
    },
    /** The kernel learns an opacity with the next change of something else. */
    setOpacity(name, value) { model.set("layers", { ...get("layers"), [name]: value }); },
    toggle(name) {
      const value = get("layers")[name];
      if (value) last[name] = value;
      act.setOpacity(name, value ? 0 : last[name] ?? 0.8);
    },
    view: Math.random(), // of one explorer in several views, which one asks for a file
    exported(what) {
      act.set("least_iou", get("least_iou"));
      ask(() => model.send({ what, view: act.view }));
    },
    /** The kernel learns it with the next export. */
    setLeast(value) { model.set("least_iou", value); },
    async upload(file) {
      const data = await file.arrayBuffer();
      const it = `${file.name} (${(file.size / 1e6).toFixed(1)} MB)`, sending = `Sending ${it} …`;
      ask(() => {
        model.send({ name: file.name }, undefined, [data]);
        say(sending);
        setTimeout(() => {
          if (message.textContent === sending) say(`${it} ${NOT_ARRIVED}`);
        }, 20000);
      });
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
    act.point(stage.cross, stage.isByKey); // what lies there now
  }
  root.onkeydown = (e) => isShortcut(e) || e.stopPropagation(); // JupyterLab sees no key
  el.append(root);
  listenToPointer(stage, act);
  listenToKeys(stage, act);
  model.on("change", update);
  for (const name of ["message", "left", "right"]) { // "Copied" is about what was there before
    model.on(`change:${name}`, () => act.say(get("message")));
  }
  model.on("msg:custom", ({ name, view }, [data]) => {
    if (view === act.view) act.save(new Blob([data]), name);
  });
  act.say(get("message"));
  update();
  let isNew = true;
  const observer = new ResizeObserver(() => {
    stage.layout();
    // after "Run all" JupyterLab stands above the output of the last cell
    const isLast = el.closest(".jp-NotebookPanel .jp-Cell")?.nextElementSibling === null;
    if (isNew && isLast) el.scrollIntoView();
    isNew = false;
  });
  observer.observe(stage.box);
  return () => observer.disconnect();
}

export default { render };
