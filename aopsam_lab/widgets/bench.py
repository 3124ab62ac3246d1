"""How fast the page is: `python -m aopsam_lab.widgets.bench`, with Playwright and Chromium installed.

A grid of 1,024 prompts with 300 masks on a picture of 1500 x 2250 (made up, so that no model is needed), in the real front end
and the real messages; only Jupyter's transport between them is left out. Frames are counted by requestAnimationFrame.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import pandas as pd
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from aopsam_lab.asf import AsfParams
from aopsam_lab.data.scenes import scene
from aopsam_lab.pipeline import loaded_model, loaded_sam
from aopsam_lab.rle import encode_rle
from aopsam_lab.segmentation import PROMPT_COLUMNS, Segmentation
from aopsam_lab.widgets import packing
from aopsam_lab.widgets.explorer import explore_segmentation
from aopsam_lab.widgets.session import Session
from aopsam_lab.widgets.sources import Picture

HEIGHT, WIDTH, SIDE, MASKS = 1500, 2250, 32, 300

# A model for canvas.js as anywidget gives it: what Python sent, and a note of everything that is asked of the kernel.
PAGE = """async ([source, css, state, buffers]) => {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  for (const [path, text] of buffers) {
    const parent = path.slice(0, -1).reduce((value, key) => value[key], state);
    parent[path.at(-1)] = new DataView(bytes(text).buffer);
  }
  document.head.append(Object.assign(document.createElement("style"), { textContent: css }));
  const module = await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
  const handlers = {};
  window.asked = 0;
  window.model = {
    get: (name) => state[name],
    set: (name, value) => { state[name] = value; handlers[`change:${name}`]?.(); },
    on: (name, handler) => { handlers[name] = handler; },
    off: () => {}, send: () => { window.asked++; }, save_changes: () => { window.asked++; },
  };
  const left = state.left;
  state.left = {};
  module.default.render({ model: window.model, el: document.body });
  while (document.querySelector(".aop-empty:not([hidden])")) await new Promise(requestAnimationFrame);
  const start = performance.now();
  window.model.set("left", left);
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.now() - start;
}"""

# Do one thing a frame for two seconds -> frames a second, and the longest frame in milliseconds.
FRAMES = """async (what) => {
  const canvas = document.querySelector(".aop-canvas"), box = canvas.getBoundingClientRect();
  const slider = document.querySelector('[aria-label="opacity of Masks"]');
  const at = (t) => ({ clientX: box.left + box.width * (0.5 + 0.4 * Math.cos(5 * t)), clientY: box.top + box.height * (0.5 + 0.4 * Math.sin(7 * t)), pointerId: 1, bubbles: true });
  const act = {
    hover: (t) => canvas.dispatchEvent(new PointerEvent("pointermove", at(t))),
    opacity: (t) => { slider.value = 50 + 49 * Math.sin(5 * t); slider.dispatchEvent(new Event("input")); },
    zoom: (t) => canvas.dispatchEvent(new WheelEvent("wheel", { ...at(t), deltaY: 60 * Math.sin(9 * t), cancelable: true })),
  }[what];
  const begin = performance.now();
  let frames = 0, longest = 0, last = begin;
  while (performance.now() - begin < 2000) {
    act((performance.now() - begin) / 1000);
    await new Promise(requestAnimationFrame);
    longest = Math.max(longest, performance.now() - last);
    last = performance.now();
    frames++;
  }
  return [frames / ((last - begin) / 1000), longest];
}"""


def heavy_segmentation() -> Segmentation:
    """A 32 x 32 grid of prompts of which 300 have a mask: blobs of many sizes with ragged borders, one over the other."""
    rng = np.random.default_rng(0)
    ragged = gaussian_filter(rng.standard_normal((HEIGHT, WIDTH)).astype(np.float32), 3)
    ragged *= 0.15 / ragged.std()
    centres = np.array([((i + 0.5) * WIDTH / SIDE, (j + 0.5) * HEIGHT / SIDE) for j in range(SIDE) for i in range(SIDE)])
    owners = rng.choice(len(centres), MASKS, replace=False)
    masks = []
    for (x, y), radius in zip(centres[owners], np.geomspace(12, 700, MASKS)):
        within = tuple(slice(max(0, int(c - 2 * radius)), int(c + 2 * radius)) for c in (y, x))
        ys, xs = np.ogrid[within[0].start : min(within[0].stop, HEIGHT), within[1].start : min(within[1].stop, WIDTH)]
        mask = np.zeros((1, HEIGHT, WIDTH), bool)
        mask[0][within] = np.hypot((xs - x) / radius, (ys - y) / (0.7 * radius)) + ragged[within] < 1
        masks += encode_rle(mask)
    table = pd.DataFrame(np.nan, range(len(centres)), PROMPT_COLUMNS)
    table[["x", "y"]], table["confidence"], table["round"], table["by"] = centres, 1.0, 0, -1
    table["status"] = np.where(np.isin(np.arange(len(centres)), owners), "kept", "low_iou")
    smooth = rng.integers(0, 256, (HEIGHT // 6, WIDTH // 6, 3), np.uint8)
    grain = rng.integers(0, 24, (HEIGHT, WIDTH, 3), np.uint8)  # a photograph's own, so that JPEG has work
    image = cv2.resize(smooth, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) // 2 + grain
    boxes = np.zeros((MASKS, 4), np.float32)
    scores = np.linspace(0.99, 0.9, MASKS, dtype=np.float32)
    return Segmentation(
        image, masks, scores, scores, boxes, owners, table, pcm=rng.random((256, 256), np.float32), method="amg_d",
        n_decoded=len(table), n_sampled=len(table), input_size=(683, 1024), model_size=1024,
    )  # fmt: skip


def page_figures(seg: Segmentation, chromium: str) -> dict[str, float | int]:
    """Bytes sent, the first paint, and frames a second of what a hand does most."""
    from base64 import b64encode

    from ipywidgets.widgets.widget import _remove_buffers
    from playwright.sync_api import sync_playwright

    canvas = explore_segmentation(seg).canvas
    state, paths, buffers = _remove_buffers(canvas.get_state())
    source, css = state.pop("_esm"), state.pop("_css")
    state = {name: value for name, value in state.items() if not name.startswith("_") and name != "layout"}
    sent = sum(len(buffer) for buffer in buffers) + len(json.dumps(state))
    packed = [[path, b64encode(buffer).decode()] for path, buffer in zip(paths, buffers)]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto("about:blank")
        figures = {"sent_mb": sent / 1e6, "first_paint_s": page.evaluate(PAGE, [source, css, state, packed]) / 1000}
        for what in ("hover", "opacity", "zoom"):
            frames, longest = page.evaluate(FRAMES, what)
            figures |= {f"{what}_fps": frames, f"{what}_longest_ms": longest}
        figures["asked_of_kernel"] = page.evaluate("window.asked")
        browser.close()
    return figures


def kernel_figures() -> dict[str, float]:
    """Milliseconds of the kernel for a moved sampling slider: the best and the median of ten, PCM of 256 x 256 cells.

    The tiny SAM's encoding is stretched to the 64 x 64 cells that the large models have: sampling then costs what it costs there.
    """
    sam = loaded_sam("tiny", "cpu")
    session = Session(Picture(scene(10_000, 512).image), sam, lambda kind: loaded_model(kind, sam))
    own = session.encoded
    wider = partial(F.interpolate, scale_factor=64 / own.embedding.shape[-1])
    image, embedding, position = map(wider, (own.model_image, own.embedding, own.image_pe))
    session.encoded = replace(own, model_image=image, embedding=embedding, image_pe=position, input_size=image.shape[-2:])
    session.sample("aop", AsfParams())  # draws the PCM
    taken = []
    for confidence in np.linspace(0.1, 0.4, 10):
        start = time.perf_counter()
        packing.pack_waiting(session.sample("aop", AsfParams(confidence=float(confidence))))
        taken.append(1000 * (time.perf_counter() - start))
    return {"sampling_best_ms": min(taken), "sampling_median_ms": float(np.median(taken))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m aopsam_lab.widgets.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="path of the browser")
    chromium = parser.parse_args().chromium
    if chromium is None:
        raise SystemExit("bench: there is no Chromium: apt-get install chromium, or pass --chromium")
    for name, value in (kernel_figures() | page_figures(heavy_segmentation(), chromium)).items():
        print(f"{name:20} {value:10.2f}")


if __name__ == "__main__":
    main()
