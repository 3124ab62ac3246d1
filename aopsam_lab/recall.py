"""Recall of sets of masks: COCO's average recall of the best 100 and 1,000 masks, and coverage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's
MAX_MASKS = (100, 1000)
COVERED_IOU = 0.75


def recall_matches(iou: np.ndarray, max_masks: Sequence[int] = MAX_MASKS) -> np.ndarray:
    """How many ground-truth masks of an image are matched, as pycocotools' COCOeval counts them.

    Prediction by prediction, best first, the free ground-truth mask with the highest IoU is taken,
    where that reaches the threshold; of equals the last.

    Args:
        iou: T x P, of each ground-truth mask with each prediction, predictions by score, highest
            first.
        max_masks: how many of the first predictions count (COCO's maxDets).

    Returns:
        (len(max_masks), 10) int, one column for each of COCO's IoU thresholds 0.50, 0.55, ... 0.95.
    """
    counts = np.zeros((len(max_masks), len(IOU_THRESHOLDS)), dtype=int)
    candidates = np.flatnonzero((iou >= IOU_THRESHOLDS[0]).any(axis=0)) if iou.size else ()
    for j, threshold in enumerate(IOU_THRESHOLDS):
        free = np.ones(len(iou), dtype=bool)
        for p in candidates:
            own = np.where(free, iou[:, p], -1.0)
            best = len(own) - 1 - int(own[::-1].argmax())
            if own[best] >= threshold:
                free[best] = False
                counts[:, j] += [p < most for most in max_masks]
    return counts


def average_recall(matches: Sequence[int], n_truth: int) -> float:
    """COCO's average recall from the counts of the ten thresholds, NaN without ground truth.

    Counts and masks may be one image's or the sums over a data set's, which is how COCO defines it.
    """
    return sum(matches) / (len(IOU_THRESHOLDS) * n_truth) if n_truth else float("nan")


def covered(iou: np.ndarray) -> int:
    """How many of F masks some prediction finds, with an IoU of 0.75 or more; they may share it.

    Args:
        iou: F x P.
    """
    return int((iou >= COVERED_IOU).any(axis=1).sum()) if iou.size else 0
