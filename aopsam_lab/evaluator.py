"""How good a set of masks is: one-to-one IoU with the truth, and how sure a mean over images is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask
from scipy.stats import bootstrap

CONFIDENCE_LEVEL = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class ImageScore:
    """The score of one image with T true masks.

    miou:      mean over the truths of the IoU with the prediction matched to each, 0 where none is; NaN for T = 0.
    miou_best: mean over the truths of the best IoU of any prediction, which truths may share; NaN for T = 0.
    n_truth:   T.
    matches:   (T,) int, the prediction matched to each truth, -1 for none.
    ious:      (T,) float, the IoU of that match, 0 for none.
    """

    miou: float
    miou_best: float
    n_truth: int
    matches: np.ndarray
    ious: np.ndarray


def iou_matrix(truths: Sequence[dict], predictions: Sequence[dict]) -> np.ndarray:
    """T x P float64: IoU of every COCO RLE truth with every COCO RLE prediction.

    Masks without a pixel have IoU 0 with everything. Raises ValueError where the masks are not all of one size: they
    are then not of one image.
    """
    sizes = {tuple(rle["size"]) for rle in (*truths, *predictions)}
    if len(sizes) > 1:
        raise ValueError(
            f"Masks of one image must share one size (height, width); got {sorted(sizes)}."
        )
    if not truths or not predictions:
        return np.zeros((len(truths), len(predictions)))
    return np.asarray(
        coco_mask.iou(list(predictions), list(truths), [0] * len(truths)), dtype=float
    ).T


def greedy_matching(iou: np.ndarray) -> np.ndarray:
    """T x P IoU -> (T,) int: for each truth the prediction it gets, -1 for none.

    The paper's "greedy IoU algorithm", its details ours: of all pairs the one with the highest IoU is taken, then the
    next whose truth and prediction are both still free. Equal IoU: lower truth index first, then lower prediction
    index. Pairs that do not overlap are never matched.

    Where several pairs have exactly the same IoU, which is taken first can change what is left for the others, and
    with it the mean: only then does the order of the masks matter.
    """
    matches = np.full(iou.shape[0], -1)
    truths, predictions = np.nonzero(iou > 0)
    taken = np.zeros(iou.shape[1], dtype=bool)
    for k in np.lexsort((predictions, truths, -iou[truths, predictions])):
        truth, prediction = truths[k], predictions[k]
        if matches[truth] < 0 and not taken[prediction]:
            matches[truth] = prediction
            taken[prediction] = True
    return matches


def evaluate(truths: Sequence[dict], predictions: Sequence[dict]) -> ImageScore:
    """Score the COCO RLE `predictions` of one image against its COCO RLE `truths`; see ImageScore."""
    return score_matrix(iou_matrix(truths, predictions))


def score_matrix(iou: np.ndarray) -> ImageScore:
    """T x P IoU -> ImageScore."""
    n_truth, n_predictions = iou.shape
    matches = greedy_matching(iou)
    matched = matches >= 0
    ious = np.zeros(n_truth)
    ious[matched] = iou[matched, matches[matched]]
    best = iou.max(axis=1) if n_predictions else np.zeros(n_truth)
    return ImageScore(
        miou=float(ious.mean()) if n_truth else float("nan"),
        miou_best=float(best.mean()) if n_truth else float("nan"),
        n_truth=n_truth,
        matches=matches,
        ious=ious,
    )


def aggregate(
    miou: Sequence[float], miou_best: Sequence[float], n_truth: Sequence[int]
) -> dict[str, float]:
    """Scores of single images -> scores of the data set.

    Returns miou and miou_best (mean over images with truth, NaN where none has) and n_images (their number).
    """
    scored = np.asarray(n_truth, dtype=int) > 0
    means, bests = np.asarray(miou, dtype=float)[scored], np.asarray(miou_best, dtype=float)[scored]
    empty = not scored.any()
    return {
        "miou": float("nan") if empty else float(means.mean()),
        "miou_best": float("nan") if empty else float(bests.mean()),
        "n_images": int(scored.sum()),
    }


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of per-image values and the ends of its 95% bootstrap interval over images: (mean, low, high).

    SciPy's bias-corrected and accelerated bootstrap, 9,999 resamples, the same for the same values and seed. Give the
    differences of two methods on the same images and it is the paired interval of their difference. Where BCa is not
    defined the percentile interval stands in; one value has no interval (NaN), equal values have one of width 0.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        return float("nan"), float("nan"), float("nan")
    mean = float(values.mean())
    if len(values) == 1:
        return mean, float("nan"), float("nan")
    if np.ptp(values) == 0:
        return mean, mean, mean
    for method in ("BCa", "percentile"):
        result = bootstrap(
            (values,),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE_LEVEL,
            method=method,
            rng=np.random.default_rng(seed),
        )
        low, high = map(float, result.confidence_interval)
        if np.isfinite(low) and np.isfinite(high):
            break
    return mean, low, high


def paired_difference(
    values: Sequence[float], reference: Sequence[float], seed: int = 0
) -> tuple[float, float, float]:
    """`values` minus `reference`, image by image: (mean, low, high) of the paired 95% interval.

    Raises ValueError where the two are not of the same images.
    """
    values, reference = np.asarray(values, dtype=float), np.asarray(reference, dtype=float)
    if values.shape != reference.shape:
        raise ValueError(
            f"A paired difference needs the same images: {len(values)} values, {len(reference)} others."
        )
    return mean_interval(values - reference, seed)
