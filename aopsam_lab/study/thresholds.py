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
from aopsam_lab.study import tables
from aopsam_lab.study.score import PAIR
from aopsam_lab.study.settings import REFERENCE
from aopsam_lab.study.tables import COVERAGE_COLUMNS, DIFFERENCE, NAN

CURVE_COLUMNS = ("image", "method", *PAIR, "own", "n_truth", "n_masks", "miou", "ar_1000")
SUMMARY_COLUMNS = (
    "method", *PAIR, "own", "n_images", "n_masks", "miou", "miou_lo", "miou_hi", *DIFFERENCE,
    "ar_1000", "ar_1000_lo", "ar_1000_hi",
)  # fmt: skip
EQUAL_COLUMNS = (
    "method", "reference", *PAIR, "n_images", "n_masks", "miou", "reference_miou", *DIFFERENCE,
)  # fmt: skip


def curve_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row an image, method and pair of thresholds, from rows of `score_together`.

    Returns:
        CURVE_COLUMNS, and coverage where found masks are at hand. own: whether the pair is SAM's.
    """
    about = ("image", "method")
    table = pd.DataFrame(
        {**{name: row[name] for name in about}, **point} for row in rows for point in row["curve"]
    )
    covered = ["coverage"] if "coverage" in table else []
    table = table.reindex(columns=[*CURVE_COLUMNS, *covered])
    return table.astype(dict.fromkeys(["miou", "ar_1000", *covered], float))


def summary_of_curves(curves: pd.DataFrame, reference: str = REFERENCE) -> pd.DataFrame:
    """One row a method and pair of thresholds, over all its images.

    Returns:
        SUMMARY_COLUMNS. n_masks: mean masks kept an image. miou_diff: minus the reference's at the
        same thresholds, with its paired interval. ar_1000: over all ground-truth masks, as COCO
        defines it. COVERAGE_COLUMNS where at hand.
    """
    parts = dict(list(curves.groupby(["method", *PAIR], sort=False)))
    rows = []
    for key, own in parts.items():
        scored = own[own["n_truth"] > 0].set_index("image")
        row = dict(zip(("method", *PAIR), key, strict=True)) | {"own": own["own"].iloc[0]}
        row |= {"n_images": len(scored), "n_masks": own["n_masks"].mean()}
        row |= tables.interval_columns("miou", scored["miou"])
        base = parts.get((reference, *key[1:]))
        if base is not None and base is not own:
            change = scored["miou"] - base.set_index("image")["miou"].loc[scored.index]
            row |= tables.interval_columns("miou_diff", change)
        masks, recall = scored["n_truth"].to_numpy(), scored["ar_1000"].to_numpy()

        def pooled(draws: np.ndarray, masks: np.ndarray = masks, recall: np.ndarray = recall):
            return (recall * masks)[draws].sum(axis=1) / masks[draws].sum(axis=1)

        row |= dict(zip(SUMMARY_COLUMNS[-3:], _drawn_interval(pooled, len(scored)), strict=True))
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
    pairs; places beyond either end are left out. For the interval images are drawn anew and both
    curves read again; where a draw ends a little before the place, its last line goes on.

    Returns:
        EQUAL_COLUMNS, one row for each of the reference's pairs that can be read.
    """
    pairs = list(map(tuple, curves[list(PAIR)].drop_duplicates().to_numpy()))
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
        row = {"method": method, "reference": reference, **dict(zip(PAIR, pair, strict=True))}
        row |= {"n_images": len(wide), "n_masks": at, "reference_miou": reached}
        rows.append(
            row | {"miou": reached + change[0], **dict(zip(DIFFERENCE, change, strict=True))}
        )
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
    """A statistic, (k, n) indices of images -> (k,), of n images and its 95% interval's ends."""
    if n == 0:
        return NAN, NAN, NAN
    (value,) = statistic(np.arange(n)[None])
    if n == 1:
        return value, NAN, NAN
    draws = np.random.default_rng(tables.BOOTSTRAP_SEED).integers(0, n, (RESAMPLES, n))
    outside = 50 * (1 - CONFIDENCE_LEVEL)
    low, high = np.percentile(statistic(draws), [outside, 100 - outside])
    return value, low, high
