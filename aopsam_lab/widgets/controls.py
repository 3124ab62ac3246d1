"""The explorer's ipywidgets: choices, the four sliders, the film of rounds. What they do is the explorer's business."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as ui

from aopsam_lab.pipeline.methods import METHODS

NOTHING, PINNED = (
    "nothing",
    "this setting, pinned",
)  # what may stand beside the picture, apart from a method
KNOBS = {  # parameter: least, most, step, what it says
    "smoothing": (0.0, 8.0, 0.1, "sigma of the Gaussian over the PCM, in cells of a 256-wide map"),
    "confidence": (0.0, 0.95, 0.01, "a peak counts above this"),
    "spacing": (1.0, 32.0, 1.0, "reach of a peak's window, in cells of a 256-wide map"),
    "elimination": (
        0.5,
        2.0,
        0.01,
        "a waiting prompt is dropped above this many times a PEM's mean; higher drops fewer",
    ),
}


class Controls:
    """picker, method, compare: Dropdowns; upload: FileUpload; knobs: a slider a parameter; film and play: of the rounds.

    names: of the pictures to choose from. canvas: its `round`, the film and play follow each other in the page.
    """

    def __init__(self, names: Sequence[str], canvas: ui.DOMWidget):
        narrow, label = {"description_width": "initial"}, {"description_width": "82px"}
        self.picker = ui.Dropdown(options=numbered(names), description="Picture", style=narrow)
        self.upload = ui.FileUpload(
            accept="image/*",
            multiple=False,
            description="Your own",
            tooltip="a picture of your own",
        )
        self.method = ui.Dropdown(options=list(METHODS), description="Method", style=narrow)
        self.compare = ui.Dropdown(
            options=[NOTHING, PINNED, *METHODS], description="Beside", style=narrow
        )
        for control in (self.picker, self.method, self.compare):
            control.add_class("aop-choice")
        for control, width in (
            (self.picker, "230px"),
            (self.method, "190px"),
            (self.compare, "220px"),
            (self.upload, "120px"),
        ):
            control.layout.width = width
        self.knobs = {
            name: ui.FloatSlider(
                value=low, min=low, max=high, step=step, description=name, tooltip=text, style=label,
                readout_format=".2f" if step < 0.1 else ".1f", layout=ui.Layout(width="330px"),
            )
            for name, (low, high, step, text) in KNOBS.items()
        }  # fmt: skip
        self.play = ui.Play(
            min=0, max=0, interval=700, show_repeat=False, tooltip="the rounds as a film"
        )
        self.film = ui.IntSlider(
            min=0, max=0, description="Rounds", style=label, layout=ui.Layout(width="330px")
        )
        ui.jslink(
            (canvas, "round"), (self.film, "value")
        )  # a new page takes the first one's value for both
        ui.jslink((self.film, "value"), (self.play, "value"))

    def rows(self, canvas: ui.DOMWidget) -> list[ui.Widget]:
        """Everything from top to bottom, the canvas last."""
        wrap = ui.Layout(flex_flow="row wrap", align_items="center")
        film = ui.HBox([self.film, self.play], layout=ui.Layout(align_items="center"))
        return [
            ui.HBox([self.picker, self.upload, self.method, self.compare], layout=wrap),
            ui.HBox([*self.knobs.values(), film], layout=wrap),
            canvas,
        ]


def numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Options of the picker: (name, place in the list)."""
    return [(name, i) for i, name in enumerate(names)]
