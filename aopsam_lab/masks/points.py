"""Prompt points of masks."""

from __future__ import annotations

import cv2
import numpy as np


def pole(mask: np.ndarray) -> tuple[float, float, float]:
    """The pole of inaccessibility: the point of a mask that lies farthest from everything outside it.

    mask: H x W bool. What lies beyond the picture's edge counts as outside.

    Returns: x, y in the image frame (pixel centres at +0.5), and the distance in pixels from that pixel's centre to the
    nearest centre outside. Of several such pixels the first in reading order.
    Raises: ValueError for an empty mask.
    Source: the Euclidean distance transform's maximum.
    """
    mask = np.ascontiguousarray(mask, dtype=np.uint8)
    if mask.ndim != 2 or not mask.any():
        raise ValueError("pole() needs a two-dimensional mask with at least one pixel set")
    padded = np.pad(mask, 1)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return float(x) + 0.5, float(y) + 0.5, float(distance[y, x])
