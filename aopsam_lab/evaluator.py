"""How good masks are: IoU and recall against ground truth, and intervals of means over images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from scipy.stats import bootstrap

CONFIDENCE_LEVEL = 0.95
RESAMPLES = 9999
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's
MAX_MASKS = (100, 1000)
COVERED_IOU = 0.75


class ImageScore(NamedTuple):
    """The score of one image with T ground-truth masks."""

    miou: float  # mean IoU of each with the prediction matched to it, 0 for none; NaN for T = 0
    miou_best: float  # mean IoU of each with the best of all predictions; NaN for T = 0
    matches: np.ndarray  # (T,) int, the prediction matched to each, -1 for none


def iou_matrix(ground_truth: Sequence[dict], predictions: Sequence[dict]) -> np.ndarray:
    """The (T, P) IoU of T ground-truth masks with P predictions, all COCO RLE of one image.

    A mask without a pixel has IoU 0 with everything. Masks of several sizes raise ValueError.
    """
    sizes = {tuple(rle["size"]) for rle in (*ground_truth, *predictions)}
    if len(sizes) > 1:
        raise ValueError(f"Masks of one image must share one (height, width), not {sorted(sizes)}.")
    if not ground_truth or not predictions:
        return np.zeros((len(ground_truth), len(predictions)))
    crowd = [0] * len(ground_truth)
    return np.asarray(coco_mask.iou(list(predictions), list(ground_truth), crowd), dtype=float).T


def greedy_matching(iou: np.ndarray) -> np.ndarray:
    """Match predictions to ground truth by the paper's greedy IoU algorithm.

    Of all overlapping pairs the one with the highest IoU (T, P) is taken, then the next of which
    both are free; of equal ones that with the lower ground-truth, then prediction index.

    Returns:
        (T,) int, the prediction matched to each ground-truth mask, -1 for none.
    """
    matches = np.full(iou.shape[0], -1)
    rows, columns = np.nonzero(iou > 0)
    taken = np.zeros(iou.shape[1], dtype=bool)
    for k in np.lexsort((columns, rows, -iou[rows, columns])):
        row, column = rows[k], columns[k]
        if matches[row] < 0 and not taken[column]:
            matches[row] = column
            taken[column] = True
    return matches


def evaluate(ground_truth: Sequence[dict], predictions: Sequence[dict]) -> ImageScore:
    """Score the COCO RLE `predictions` of one image against its COCO RLE ground truth."""
    return score_matrix(iou_matrix(ground_truth, predictions))


def score_matrix(iou: np.ndarray) -> ImageScore:
    """The score of one image from its (T, P) IoU."""
    matches = greedy_matching(iou)
    matched = matches >= 0
    ious = np.zeros(len(iou))
    ious[matched] = iou[matched, matches[matched]]
    best = iou.max(axis=1, initial=0)
    miou, miou_best = (float(x.mean()) if len(x) else float("nan") for x in (ious, best))
    return ImageScore(miou, miou_best, matches)


def recall_matches(iou: np.ndarray, max_masks: Sequence[int] = MAX_MASKS) -> np.ndarray:
    """How many ground-truth masks of an image are matched, as pycocotools' COCOeval counts them.

    Prediction by prediction, best first, the free ground-truth mask with the highest IoU is taken
    where that reaches the threshold; of equals the last.

    Args:
        iou: (T, P), predictions by score, highest first.
        max_masks: how many of the first predictions count (COCO's maxDets).

    Returns:
        (len(max_masks), 10) int, one column for each of IOU_THRESHOLDS.
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


def average_recall(matches: Sequence[int], n_ground_truth: int) -> float:
    """Average recall from the counts of IOU_THRESHOLDS; COCO sums counts and masks over images."""
    return sum(matches) / (len(IOU_THRESHOLDS) * n_ground_truth) if n_ground_truth else float("nan")


def covered(iou: np.ndarray) -> int:
    """How many of F masks some prediction finds with COVERED_IOU or more, from (F, P) IoU."""
    return int((iou >= COVERED_IOU).any(axis=1).sum())


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of per-image values and its 95% bootstrap interval over images: (mean, low, high).

    SciPy's bias-corrected and accelerated bootstrap; where that is not defined, the percentile
    interval. One value has no interval (NaN), equal values have one of width 0.
    """
    numbers = np.asarray(values, float)
    mean = float(numbers.mean()) if len(numbers) else float("nan")
    if len(numbers) < 2:
        return mean, float("nan"), float("nan")
    if np.ptp(numbers) == 0:
        return mean, mean, mean
    options = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE_LEVEL}
    for method in ("BCa", "percentile"):
        rng = np.random.default_rng(seed)
        found = bootstrap((numbers,), np.mean, method=method, rng=rng, **options)
        low, high = map(float, found.confidence_interval)
        if np.isfinite([low, high]).all():
            break
    return mean, low, high


def paired_difference(
    values: Sequence[float], reference: Sequence[float], seed: int = 0
) -> tuple[float, float, float]:
    """`mean_interval` of `values` minus `reference`, image by image."""
    if len(values) != len(reference):
        sizes = f"{len(values)} values, {len(reference)} others"
        raise ValueError(f"A paired difference needs the same images: {sizes}.")
    return mean_interval(np.asarray(values, float) - np.asarray(reference, float), seed)
