"""The one record that every data set yields."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from aopsam_lab.masks.rle import decode_rle


@dataclass(eq=False)
class Sample:
    """An image with its ground truth, whatever the class.

    Args:
        id: unique within its data set.
        image: (H, W, 3) uint8, RGB.
        rles: N COCO RLE; masks may overlap.
        points: (N, 2) float32, a prompt point (x, y) of each mask, image frame, or None.
        clicks: for each mask the points [x, y] that are known to give it, image frame, or None.
    """

    id: str
    image: np.ndarray
    rles: list[dict]
    points: np.ndarray | None = None
    clicks: list[list[list[float]]] | None = None

    @cached_property
    def masks(self) -> np.ndarray:
        """(N, H, W) bool; 700 MB for 200 masks of SA-1B."""
        return decode_rle(self.rles, self.image.shape[:2])
