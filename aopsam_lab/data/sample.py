"""The one record that every data set yields."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from aopsam_lab.masks.rle import decode_rle, encode_rle


class Sample:
    """An image with its ground truth, whatever the class.

    Masks are given as booleans, as RLE, or both; the other form is made when asked for. An image of
    SA-1B with 200 masks takes 700 MB as booleans: what needs one mask at a time reads `rles`.

    Args:
        id: unique within its data set.
        image: (H, W, 3) uint8, RGB.
        masks: (N, H, W) bool; masks may overlap.
        points: (N, 2) float32, a prompt point (x, y) of each mask, image frame, or None.
        rles: N COCO RLE of the same masks.
        clicks: for each mask the points [x, y] that are known to give it, image frame, or None.

    Raises:
        ValueError: neither masks nor rles are given.
    """

    def __init__(
        self,
        id: str,
        image: np.ndarray,
        masks: np.ndarray | None = None,
        points: np.ndarray | None = None,
        rles: list[dict] | None = None,
        clicks: list[list[list[float]]] | None = None,
    ) -> None:
        if masks is None and rles is None:
            raise ValueError("A Sample needs its masks, as booleans or as RLE.")
        self.id, self.image, self.points, self.clicks = id, image, points, clicks
        if masks is not None:
            self.masks = masks
        if rles is not None:
            self.rles = rles

    @cached_property
    def masks(self) -> np.ndarray:
        """(N, H, W) bool."""
        return decode_rle(self.rles, self.image.shape[:2])

    @cached_property
    def rles(self) -> list[dict]:
        """N COCO RLE."""
        return encode_rle(self.masks)
