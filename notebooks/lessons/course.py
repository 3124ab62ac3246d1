"""What several lessons need: a method with a progress bar, the mask of one click, sliders."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
from ipywidgets import FloatSlider, Image, VBox
from matplotlib.figure import Figure
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from tqdm.auto import tqdm

import aopsam_lab as aop
from aopsam_lab.pipeline.decode import decode_and_filter


def run(sam: Sam, encoded, method, predictor=None, params: aop.AsfParams | None = None):
    """`aop.run_method` with a progress bar.

    Args:
        sam: the SAM.
        encoded: what `aop.encode` gives.
        method: one of `aop.METHODS`.
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


def mask_of_prompt(sam: Sam, image: np.ndarray, point: np.ndarray) -> np.ndarray:
    """The mask with the highest predicted IoU of the three that a click gives.

    Args:
        sam: the SAM.
        image: H x W x 3 uint8, RGB.
        point: (x, y) in pixels of the image.

    Returns:
        H x W bool.
    """
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    masks, scores, _ = predictor.predict(point[None], np.array([1]), multimask_output=True)
    return masks[scores.argmax()]


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
