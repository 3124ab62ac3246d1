"""What several lessons need: a photograph, methods with a progress bar, masks drawn, sliders."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import torch
from ipywidgets import FloatSlider, Image, VBox
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from tqdm.auto import tqdm

import aopsam_lab as aop
from aopsam_lab.data.images import read_image
from aopsam_lab.data.sample import Sample
from aopsam_lab.pipeline.decode import decode_and_filter
from aopsam_lab.pipeline.types import Encoded, Prompts, Proposal

LONGEST = 1024  # pixels: SAM sees no more, and the masks of a phone's photograph would fill memory


def open_photo(photo: str | os.PathLike | None = None, number: int = 0) -> Sample:
    """Open the photograph of a lesson.

    Args:
        photo: the path of the student's own, which is made smaller where its longer side exceeds
            LONGEST pixels; None: one of those in the box.
        number: which of those in the box.

    Returns:
        The photograph; of a student's own no masks are known.
    """
    if photo is None:
        return aop.open_dataset("photos")[number]
    image = read_image(photo)
    scale = LONGEST / max(image.shape[:2])
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return Sample(Path(photo).name, image, [])


def run(sam: Sam, encoded: Encoded, method, predictor=None, params: aop.AsfParams | None = None):
    """`aop.run_method` with a progress bar.

    Args:
        sam: the SAM.
        encoded: what `aop.encode` gives.
        method: one of `aop.METHODS`, or `Points`.
        predictor: the Prompt Predictor, where the method needs one.
        params: of adaptive sampling and filtering; None: the paper's.

    Returns:
        The `Segmentation`.
    """
    with tqdm(desc=method.name, unit="prompt") as bar:

        def decode(sam, encoded, prompts, index, spec):
            bar.total = len(prompts)
            found = decode_and_filter(sam, encoded, prompts, index, spec)
            bar.update(len(index))
            return found

        return aop.run_method(
            sam, encoded, method, predictor, params=params or aop.AsfParams(), decode=decode
        )


@dataclass(frozen=True)
class Points:
    """A method whose prompts are the given points.

    Args:
        name: what figures call it.
        points: n x 2, (x, y) in pixels of the image.
    """

    name: str
    points: np.ndarray
    needs: str = ""
    uses: tuple[str, ...] = ()

    def start(self, encoded: Encoded, models, params) -> Proposal:
        """See `aopsam_lab.pipeline.methods.Method`."""
        points = torch.as_tensor(np.asarray(self.points), dtype=torch.float32)
        return Proposal(Prompts(points, torch.ones(len(points))))


def mask_of_prompt(sam: Sam, encoded: Encoded, point: np.ndarray) -> np.ndarray:
    """The mask with the highest predicted IoU of the three that a click gives.

    Args:
        sam: the SAM.
        encoded: what `aop.encode` gives.
        point: (x, y) in pixels of the image.

    Returns:
        H x W bool.
    """
    predictor = SamPredictor(sam)
    # what `set_image` would compute anew
    predictor.features, predictor.is_image_set = encoded.embedding, True
    predictor.original_size, predictor.input_size = encoded.image.shape[:2], encoded.input_size
    masks, scores, _ = predictor.predict(point[None], np.array([1]), multimask_output=True)
    return masks[scores.argmax()]


def show_photo(ax: Axes, image: np.ndarray, title: str = "", mask: np.ndarray | None = None):
    """Draw a photograph, H x W x 3 uint8, without ticks; all but the mask, H x W bool, is faded."""
    height, width = image.shape[:2]
    shown = image if mask is None else np.where(mask[..., None], image, 180 + image // 4)
    ax.imshow(shown, extent=(0, width, height, 0))
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.set_title(title)
    ax.axis("off")


def slide(draw: Callable[..., Figure], **ranges: tuple[float, float, float, float]) -> VBox:
    """Sliders above a figure that is drawn anew when one of them moves.

    Args:
        draw: takes the sliders' values by name, and returns the figure.
        ranges: of each slider its value, minimum, maximum and step.

    Returns:
        The widget.
    """
    shown = Image(format="png")
    sliders = {
        name: FloatSlider(value, min=low, max=high, step=step, description=name)
        for name, (value, low, high, step) in ranges.items()
    }

    def redraw(_=None) -> None:
        file = BytesIO()
        draw(**{name: slider.value for name, slider in sliders.items()}).savefig(file, dpi=90)
        shown.value = file.getvalue()

    for slider in sliders.values():
        slider.continuous_update = False
        slider.observe(redraw, "value")
    redraw()
    return VBox([*sliders.values(), shown])
