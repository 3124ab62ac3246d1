"""What each method finds at looser thresholds than SAM's own, and methods at equal masks kept.

The prompts are the same at every pair of thresholds: those that the method decodes at SAM's own. So
prompts that adaptive filtering eliminated stay eliminated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from aopsam_lab.evaluator import CONFIDENCE_LEVEL, RESAMPLES
from aopsam_lab.study import tables
from aopsam_lab.study.score import PAIR
from aopsam_lab.study.settings import REFERENCE
from aopsam_lab.study.tables import COVERAGE_COLUMNS, DIFFERENCE, NAN

CURVE_COLUMNS = ("image", "method", *PAIR, "own", "n_truth", "n_masks", "miou", "ar_1000")
RECALL = ("ar_1000", "ar_1000_lo", "ar_1000_hi")
SUMMARY_COLUMNS = (
    "method", *PAIR, "own", "n_images", "n_masks", "miou", "miou_lo", "miou_hi", *DIFFERENCE,
    *RECALL,
)  # fmt: skip
EQUAL_COLUMNS = (
    "method", "reference", *PAIR, "n_images", "n_masks", "miou", "reference_miou", *DIFFERENCE,
)  # fmt: skip


def curve_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row an image, method and pair of thresholds, from rows of `score_together`.

    Returns:
        CURVE_COLUMNS, and coverage where found masks are at hand. own: whether the pair is SAM's.
    """
    table = pd.DataFrame(
        {"image": row["image"], "method": row["method"], **point}
        for row in rows
        for point in row["curve"]
    )
    covered = ["coverage"] if "coverage" in table else []
    table = table.reindex(columns=[*CURVE_COLUMNS, *covered])
    return table.astype(dict.fromkeys(["miou", "ar_1000", *covered], float))


def summary_of_curves(curves: pd.DataFrame, reference: str = REFERENCE) -> pd.DataFrame:
    """One row a method and pair of thresholds, over all its images.

    Returns:
        SUMMARY_COLUMNS, and COVERAGE_COLUMNS where at hand. n_masks: mean masks kept an image.
        miou_diff: minus the reference's at the same thresholds. ar_1000: over all ground-truth
        masks, as COCO defines it.
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
        if len(scored):
            masks, draws = scored["n_truth"].to_numpy(), _draws(len(scored))
            matched = masks * scored["ar_1000"].to_numpy()
            row |= _interval(RECALL, matched[draws].sum(axis=1) / masks[draws].sum(axis=1))
        if "coverage" in own:
            row |= tables.interval_columns("coverage", own["coverage"].dropna())
        rows.append(row)
    covered = COVERAGE_COLUMNS if "coverage" in curves else ()
    return pd.DataFrame(rows, columns=[*SUMMARY_COLUMNS, *covered])


def equal_masks(
    curves: pd.DataFrame, method: str = REFERENCE, reference: str = "amg_d"
) -> pd.DataFrame:
    """Two methods at equal masks kept: the paper's #P, its own measure of cost.

    The curve is mean mIoU against mean masks kept, a straight line between two pairs of thresholds.
    It is read where it keeps as many masks as the reference does at each of its pairs; places
    beyond either end are left out. For the interval images are drawn anew and both curves read
    again; where a draw ends a little before the place, its last line goes on.

    Returns:
        EQUAL_COLUMNS, one row for each of the reference's pairs that can be read.
    """
    pairs = list(map(tuple, curves[list(PAIR)].drop_duplicates().to_numpy()))
    scored = curves[(curves["n_truth"] > 0) & curves["method"].isin([method, reference])]
    if scored["method"].nunique() < 2:
        return pd.DataFrame(columns=list(EQUAL_COLUMNS))
    wide = scored.pivot(index="image", columns=["method", *PAIR], values=["n_masks", "miou"])
    draws = _draws(len(wide))
    masks, miou, base_masks, base = (  # (draws, pairs), means over images
        wide[value][name].reindex(columns=pairs).to_numpy(dtype=float)[draws].mean(axis=1)
        for name in (method, reference)
        for value in ("n_masks", "miou")
    )
    rows = []
    for j, pair in enumerate(pairs):
        at, reached = base_masks[0, j], base[0, j]
        if masks[0].min() <= at <= masks[0].max():
            row = {"method": method, "reference": reference, **dict(zip(PAIR, pair, strict=True))}
            row |= {"n_images": len(wide), "n_masks": at, "reference_miou": reached}
            read = np.array(list(map(_read, masks, miou, base_masks[:, j])))
            row |= _interval(DIFFERENCE, read - base[:, j])
            rows.append(row | {"miou": reached + row["miou_diff"]})
    return pd.DataFrame(rows, columns=list(EQUAL_COLUMNS))


def _read(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """The height at `at` of the straight lines through places, the outer lines prolonged."""
    x, first = np.unique(x, return_index=True)
    y = y[first]
    if len(x) == 1:
        return y[0]
    i = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    return y[i] + (at - x[i]) * (y[i + 1] - y[i]) / (x[i + 1] - x[i])


def _draws(n: int) -> np.ndarray:
    """(k, n) indices of images: all n, then, of two or more, n drawn for an interval."""
    rng = np.random.default_rng(tables.BOOTSTRAP_SEED)
    return np.vstack([np.arange(n), rng.integers(0, n, (RESAMPLES if n > 1 else 0, n))])


def _interval(names: Sequence[str], drawn: np.ndarray) -> dict[str, float]:
    """By three names, the first of values and the 95% interval of the others."""
    outside = 50 * (1 - CONFIDENCE_LEVEL)
    ends = np.percentile(drawn[1:], [outside, 100 - outside]) if len(drawn) > 1 else (NAN, NAN)
    return dict(zip(names, (drawn[0], *ends), strict=True))
