// The explorer in the page: what the kernel sends goes to the stage (stage.js, of panes: pane.js) and to what is told beside it
// (side.js), what a hand does goes back. Python joins the four files, this one last; packing.py says what arrives, explorer.py
// what is sent back.

const KERNEL_LOST = "The kernel was restarted or stopped, so nothing can be computed here. Run the cell again.";

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
