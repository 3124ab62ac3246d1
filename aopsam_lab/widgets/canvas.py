"""The picture in the page as a widget; its front end is the four scripts beside this file (start with canvas.js)."""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets

HERE = Path(__file__).parent
SCRIPTS = ("pane.js", "stage.js", "side.js", "canvas.js")  # one module, in this order
LAYERS = {  # and the opacity of each at first
    "image": 1.0, "pcm": 0.0, "smoothed": 0.0, "pem": 0.0, "masks": 0.8, "truth": 0.0, "prompts": 1.0,
}  # fmt: skip


class Canvas(anywidget.AnyWidget):
    """The picture in the page. Python sets what is shown; the page sets `selected` and `round`, and sends
    {"kind": "ask", x, y, label}, {"kind": "undo"} and {"kind": "export", "what": "coco" or "labels"}."""

    _esm = "\n".join((HERE / name).read_text("utf-8") for name in SCRIPTS)
    _css = (HERE / "canvas.css").read_text("utf-8")
    look = traitlets.Dict().tag(sync=True)  # colour tables and how each fate is drawn
    picture = traitlets.Dict().tag(sync=True)
    left = traitlets.Dict().tag(sync=True)
    right = traitlets.Dict().tag(sync=True)
    preview = traitlets.Dict().tag(sync=True)
    detail = traitlets.Dict().tag(sync=True)
    manual = traitlets.List().tag(sync=True)
    layers = traitlets.Dict().tag(sync=True)
    round = traitlets.Int(0).tag(sync=True)
    selected = traitlets.Int(-1).tag(sync=True)
    message = traitlets.Unicode().tag(sync=True)
    busy = traitlets.Unicode().tag(sync=True)
    call = traitlets.Unicode().tag(sync=True)
