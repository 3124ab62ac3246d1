"""What each method finds at looser thresholds than SAM's own, and methods at equal masks kept.

The prompts are the same at every pair of thresholds: those that the method decodes at SAM's own. So
a curve says what looser filtering gives afterwards; prompts that adaptive filtering eliminated stay
eliminated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from aopsam_lab.evaluator import CONFIDENCE_LEVEL, RESAMPLES
from aopsam_lab.recall import average_recall
from aopsam_lab.sam.zoo import SamSpec
from aopsam_lab.study import tables
from aopsam_lab.study.settings import REFERENCE, Pair
from aopsam_lab.study.tables import COVERAGE_COLUMNS, DIFFERENCE, NAN

PAIR = ["pred_iou_thresh", "stability_score_thresh"]
CURVE_COLUMNS = ("image", "method", *PAIR, "own", "n_truth", "n_masks", "miou", "ar_1000")
SUMMARY_COLUMNS = (
    "method", *PAIR, "own", "n_images", "n_masks", "miou", "miou_lo", "miou_hi", *DIFFERENCE,
    "ar_1000", "ar_1000_lo", "ar_1000_hi",
)  # fmt: skip
EQUAL_COLUMNS = (
    "method", "reference", *PAIR, "n_images", "n_masks", "miou", "reference_miou", *DIFFERENCE,
)  # fmt: skip


def own_pair(spec: SamSpec) -> Pair:
    """The thresholds that a SAM's masks are filtered with."""
    return spec.pred_iou_thresh, spec.stability_score_thresh


def with_own(pairs: Sequence[Pair], own: Pair) -> list[Pair]:
    """The pairs and SAM's own, each once, strictest first."""
    return sorted({own, *((float(iou), float(stable)) for iou, stable in pairs)}, reverse=True)


def curve_table(rows: Sequence[Mapping[str, Any]], own: Pair) -> pd.DataFrame:
    """One row an image, method and pair of thresholds.

    Args:
        rows: `image` and `method` each and, where there is one, `curve` as `score_together` makes
            it.
        own: SAM's own pair, whose rows are marked.

    Returns:
        CURVE_COLUMNS, and coverage where found masks are at hand. miou, ar_1000: NaN without ground
        truth.
    """
    found = []
    for row in rows:
        for point in row.get("curve") or ():
            pair = tuple(point["thresholds"])
            values = {"image": row["image"], "method": row["method"], **dict(zip(PAIR, pair))}
            values |= {key: point[key] for key in ("n_truth", "n_masks", "miou")}
            values |= {"own": pair == own}
            values["ar_1000"] = average_recall(point["matched_1000"], point["n_truth"])
            if "n_found" in point:
                values["coverage"] = tables.share(point["n_covered"], point["n_found"])
            found.append(values)
    covered = ["coverage"] if any("coverage" in row for row in found) else []
    table = pd.DataFrame(found, columns=[*CURVE_COLUMNS, *covered])
    return table.astype(dict.fromkeys(["miou", "ar_1000", *covered], float))


def summary_of_curves(curves: pd.DataFrame, reference: str = REFERENCE) -> pd.DataFrame:
    """One row a method and pair of thresholds, over all its images.

    Args:
        curves: as `curve_table` returns it.
        reference: the method that the others are compared with.

    Returns:
        SUMMARY_COLUMNS. n_masks: mean masks kept an image. miou_diff: minus the reference's at the
        same thresholds, with its paired interval. ar_1000: over all ground-truth masks, as COCO
        defines it. COVERAGE_COLUMNS where at hand.
    """
    parts = dict(list(curves.groupby(["method", *PAIR], sort=False)))
    rows = []
    for key, own in parts.items():
        scored = own[own["n_truth"] > 0].set_index("image")
        row = dict(zip(("method", *PAIR), key)) | {"own": own["own"].iloc[0]}
        row |= {"n_images": len(scored), "n_masks": own["n_masks"].mean()}
        row |= tables.interval_columns("miou", scored["miou"])
        base = parts.get((reference, *key[1:]))
        if base is not None and base is not own:
            change = scored["miou"] - base.set_index("image")["miou"].loc[scored.index]
            row |= tables.interval_columns("miou_diff", change)
        masks, recall = scored["n_truth"].to_numpy(), scored["ar_1000"].to_numpy()

        def pooled(draws: np.ndarray, masks: np.ndarray = masks, recall: np.ndarray = recall):
            return (recall * masks)[draws].sum(axis=1) / masks[draws].sum(axis=1)

        row |= dict(zip(SUMMARY_COLUMNS[-3:], _drawn_interval(pooled, len(scored))))
        if "coverage" in own:
            row |= tables.interval_columns("coverage", own["coverage"].dropna())
        rows.append(row)
    covered = COVERAGE_COLUMNS if "coverage" in curves else ()
    return pd.DataFrame(rows, columns=[*SUMMARY_COLUMNS, *covered])


def equal_masks(
    curves: pd.DataFrame, method: str = REFERENCE, reference: str = "amg_d"
) -> pd.DataFrame:
    """Two methods at equal masks kept: the paper's #P, its own measure of cost.

    The curve is the mean one: mean mIoU against mean masks kept, a straight line between two pairs
    of thresholds. It is read where it keeps as many masks as the reference does at each of its
    pairs; places beyond either end are left out. For the paired interval images are drawn anew and
    both curves read again; where a draw ends a little before the place, its last line goes on.

    Args:
        curves: as `curve_table` returns it; images with ground truth count.
        method, reference: the two methods.

    Returns:
        EQUAL_COLUMNS, one row for each of the reference's pairs that can be read. miou_diff: method
        minus reference, with its 95% interval. Empty where either method was not run.
    """
    pairs = list(map(tuple, curves[PAIR].drop_duplicates().to_numpy()))
    scored = curves[(curves["n_truth"] > 0) & curves["method"].isin([method, reference])]
    if scored["method"].nunique() < 2:
        return pd.DataFrame(columns=list(EQUAL_COLUMNS))
    wide = scored.pivot(index="image", columns=["method", *PAIR], values=["n_masks", "miou"])
    masks, base_masks, miou, base = (
        wide[value][name].reindex(columns=pairs).to_numpy(dtype=float)
        for value in ("n_masks", "miou")
        for name in (method, reference)
    )
    rows = []
    for j, pair in enumerate(pairs):
        at, kept = base_masks[:, j].mean(), masks.mean(axis=0)
        if not kept.min() <= at <= kept.max():
            continue

        def difference(draws: np.ndarray, j: int = j) -> np.ndarray:
            curves = masks[draws].mean(axis=1), miou[draws].mean(axis=1)
            read = list(map(_read, *curves, base_masks[draws, j].mean(axis=1)))
            return np.array(read) - base[draws, j].mean(axis=1)

        change, reached = _drawn_interval(difference, len(wide)), base[:, j].mean()
        row = {"method": method, "reference": reference, **dict(zip(PAIR, pair))}
        row |= {"n_images": len(wide), "n_masks": at, "reference_miou": reached}
        rows.append(row | {"miou": reached + change[0], **dict(zip(DIFFERENCE, change))})
    return pd.DataFrame(rows, columns=list(EQUAL_COLUMNS))


def _read(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """The height at `at` of the straight lines through places, the outer lines prolonged."""
    x, first = np.unique(x, return_index=True)
    y = y[first]
    if len(x) == 1:
        return y[0]
    i = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    return y[i] + (at - x[i]) * (y[i + 1] - y[i]) / (x[i + 1] - x[i])


def _drawn_interval(
    statistic: Callable[[np.ndarray], np.ndarray], n: int
) -> tuple[float, float, float]:
    """A statistic of n images and the ends of its 95% percentile interval.

    Args:
        statistic: (k, n) indices of images -> (k,), its value for each of k draws.
        n: the number of images.
    """
    if n == 0:
        return NAN, NAN, NAN
    (value,) = statistic(np.arange(n)[None])
    if n == 1:
        return value, NAN, NAN
    draws = np.random.default_rng(tables.BOOTSTRAP_SEED).integers(0, n, (RESAMPLES, n))
    outside = 50 * (1 - CONFIDENCE_LEVEL)
    low, high = np.percentile(statistic(draws), [outside, 100 - outside])
    return value, low, high
