"""Prompt points of masks."""

import cv2
import numpy as np


def deepest_point(mask: np.ndarray) -> tuple[float, float, float]:
    """The pixel of a mask (H, W) farthest from all outside it and beyond the edge: x, y, distance.

    The point is its centre, image frame; the distance is in pixels, to the nearest centre outside.
    """
    mask = np.ascontiguousarray(mask, dtype=np.uint8)
    if mask.ndim != 2 or not mask.any():
        raise ValueError("deepest_point needs a two-dimensional mask with at least one pixel set")
    padded = np.pad(mask, 1)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return float(x) + 0.5, float(y) + 0.5, float(distance[y, x])
