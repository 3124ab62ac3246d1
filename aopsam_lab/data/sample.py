"""The one record every data set yields."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """A picture with its class-agnostic truth.

    id:      unique within its data set.
    image:   H x W x 3 uint8, RGB.
    masks:   N x H x W bool; masks may overlap (an object and its parts).
    points:  N x 2 float32, one prompt point (x, y) per mask in the image frame (pixel centres at +0.5), or None where the
             data set has none.
    """

    id: str
    image: np.ndarray
    masks: np.ndarray
    points: np.ndarray | None = None
