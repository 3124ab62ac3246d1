"""The one record every data set yields."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from aopsam_lab.masks.rle import decode_rle, encode_rle


class Sample:
    """A picture with its class-agnostic truth, as booleans, as RLE, or both: the other form is made when asked for.

    A photograph of SA-1B with 200 masks takes 700 MB as booleans, so what needs one mask at a time should read `rles`.

    id:      unique within its data set.
    image:   H x W x 3 uint8, RGB.
    masks:   N x H x W bool; masks may overlap (an object and its parts).
    points:  N x 2 float32, one prompt point (x, y) per mask in the image frame (pixel centres at +0.5), or None where
             the data set has none.
    clicks:  for each mask the clicks [x, y] that are known to give it, image frame, or None where the data set has none.
    rles:    N COCO RLE of the same masks, see `aopsam_lab.masks.rle`.

    Raises ValueError where neither masks nor rles are given.
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
        return decode_rle(self.rles, self.image.shape[:2])

    @cached_property
    def rles(self) -> list[dict]:
        return encode_rle(self.masks)
