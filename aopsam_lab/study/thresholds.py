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

from aopsam_lab.evaluator import CONFIDENCE_LEVEL, RESAMPLES, average_recall, mean_interval
from aopsam_lab.sam.zoo import SamSpec
from aopsam_lab.study import tables

Pair = tuple[float, float]  # predicted IoU, stability score
THRESHOLDS: tuple[Pair, ...] = (
    (0.88, 0.95), (0.82, 0.92), (0.75, 0.88), (0.65, 0.80), (0.50, 0.70),
)  # fmt: skip
COMPARED = (tables.REFERENCE, "amg_d")  # at equal masks kept

PAIR = ["pred_iou_thresh", "stability_score_thresh"]
CURVE_COLUMNS = ("image", "method", *PAIR, "own", "n_truth", "n_masks", "miou", "ar_1000")
SUMMARY_COLUMNS = (
    "method", *PAIR, "own", "n_images", "n_masks", "miou", "miou_lo", "miou_hi",
    "miou_diff", "miou_diff_lo", "miou_diff_hi", "ar_1000", "ar_1000_lo", "ar_1000_hi",
)  # fmt: skip
EQUAL_COLUMNS = (
    "method", "reference", *PAIR, "n_images", "n_masks", "miou", "reference_miou",
    "miou_diff", "miou_diff_lo", "miou_diff_hi",
)  # fmt: skip


def pairs_with_own(thresholds: Sequence[Pair], spec: SamSpec) -> list[Pair]:
    """The pairs and SAM's own, each once, strictest first."""
    pairs = {(float(iou), float(stability)) for iou, stability in thresholds}
    return sorted({own_pair(spec), *pairs}, reverse=True)


def own_pair(spec: SamSpec) -> Pair:
    """The thresholds that a SAM's masks are filtered with."""
    return spec.pred_iou_thresh, spec.stability_score_thresh


def described(pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """The pairs for a report's provenance; nothing where there are none."""
    return {"thresholds": [f"{iou:g} / {stability:g}" for iou, stability in pairs]} if pairs else {}


def loosest(pairs: Sequence[Pair]) -> Pair:
    """The thresholds that no pair is below."""
    return min(iou for iou, _ in pairs), min(stability for _, stability in pairs)


def curve_table(rows: Sequence[Mapping[str, Any]], own: Pair) -> pd.DataFrame:
    """One row an image, method and pair of thresholds, from the rows that the runner stored.

    Args:
        rows: a mapping each, `image` and `method` and, where the row has a curve, `curve`: a list
            of the values of `scores.mask_scores`, each with its `thresholds`.
        own: SAM's own pair, whose rows are marked.

    Returns:
        CURVE_COLUMNS, and coverage where found masks are at hand. miou, ar_1000: NaN without ground
        truth.
    """
    found = []
    for row in rows:
        for point in row.get("curve") or ():
            pair = tuple(point["thresholds"])
            values = {key: row[key] for key in ("image", "method")}
            values |= dict(zip(PAIR, pair)) | {"own": pair == own}
            values |= {key: point[key] for key in ("n_truth", "n_masks", "miou")}
            values["ar_1000"] = average_recall(point["matched_1000"], point["n_truth"])
            if "n_found" in point:
                values["coverage"] = tables.share(point["n_covered"], point["n_found"])
            found.append(values)
    covered = ["coverage"] if any("coverage" in row for row in found) else []
    table = pd.DataFrame(found, columns=[*CURVE_COLUMNS, *covered])
    return table.astype(dict.fromkeys(["miou", "ar_1000", *covered], float))


def summary_of_curves(curves: pd.DataFrame, reference: str = tables.REFERENCE) -> pd.DataFrame:
    """One row a method and pair of thresholds, over all its images.

    Returns:
        SUMMARY_COLUMNS. n_masks: mean masks kept an image. miou and its 95% bootstrap interval over
        images; miou_diff: minus the reference's at the same thresholds, with its paired interval.
        ar_1000: over all ground-truth masks, as COCO defines it. coverage, where at hand: mean over
            images.
    """
    parts = dict(list(curves.groupby(["method", *PAIR], sort=False)))
    rows = []
    for key, own in parts.items():
        scored = own[own["n_truth"] > 0]
        values = scored["miou"].to_numpy()
        row = dict(zip(("method", *PAIR), key))
        row |= {"own": own["own"].iloc[0], "n_images": len(scored)}
        row["n_masks"] = own["n_masks"].mean()
        _put(row, "miou", mean_interval(values, tables.BOOTSTRAP_SEED))
        base = parts.get((reference, *key[1:]))
        if base is not None and base is not own:
            base = base.set_index("image")["miou"].loc[scored["image"]].to_numpy()
            _put(row, "miou_diff", mean_interval(values - base, tables.BOOTSTRAP_SEED))
        _put(row, "ar_1000", _pooled(scored["ar_1000"].to_numpy(), scored["n_truth"].to_numpy()))
        if "coverage" in own:
            _put(row, "coverage", mean_interval(own["coverage"].dropna(), tables.BOOTSTRAP_SEED))
        rows.append(row)
    columns = [*SUMMARY_COLUMNS, *(tables.COVERAGE_COLUMNS if "coverage" in curves else ())]
    return pd.DataFrame(rows, columns=columns)


def equal_masks(
    curves: pd.DataFrame, method: str = COMPARED[0], reference: str = COMPARED[1]
) -> pd.DataFrame:
    """Two methods at equal masks kept: the paper's #P, its own measure of cost.

    The curve is the mean one: mean mIoU against mean masks kept, over the images that have ground
    truth, a straight line between two pairs of thresholds. It is read where it keeps as many masks
    as the reference does at each of its pairs; places beyond either end of the curve are left out.
    For the paired interval images are drawn anew, both curves are made of them and read again;
    where a draw ends a little before the place, its last line goes on.

    Returns:
        EQUAL_COLUMNS, one row for each of the reference's pairs (whose thresholds stand in it) that
        can be read.
        miou_diff: method minus reference, with its 95% interval. Empty where either method was not
            run.
    """
    pairs = list(map(tuple, curves[PAIR].drop_duplicates().to_numpy()))
    scored = curves[curves["n_truth"] > 0]
    sides = []
    for name in (method, reference):
        own = scored[scored["method"] == name]
        if own.empty:
            return pd.DataFrame(columns=list(EQUAL_COLUMNS))
        sides += [_wide(own, value, pairs) for value in ("n_masks", "miou")]
    images = sides[0].index.intersection(sides[2].index)
    masks, miou, base_masks, base = (side.loc[images].to_numpy(dtype=float) for side in sides)
    rows = []
    for j, pair in enumerate(pairs):
        at = base_masks[:, j].mean()
        curve = masks.mean(axis=0)
        if not curve.min() <= at <= curve.max():
            continue

        def difference(draw: np.ndarray) -> float:
            curve = masks[draw].mean(axis=0), miou[draw].mean(axis=0)
            return _read(*curve, base_masks[draw, j].mean()) - base[draw, j].mean()

        every = np.arange(len(images))
        row = {"method": method, "reference": reference, **dict(zip(PAIR, pair))}
        row |= {"n_images": len(images), "n_masks": at, "reference_miou": base[:, j].mean()}
        row["miou"] = row["reference_miou"] + difference(every)
        low, high = _drawn_interval(difference, len(images))
        _put(row, "miou_diff", (difference(every), low, high))
        rows.append(row)
    return pd.DataFrame(rows, columns=list(EQUAL_COLUMNS))


def equal_sentences(equal: pd.DataFrame) -> list[str]:
    """What `equal_masks` says, one sentence a row."""
    sentences = []
    for row in equal.itertuples():
        pair = f"{row.pred_iou_thresh:g} and {row.stability_score_thresh:g}"
        change = tables.change_with_range(row.miou_diff, row.miou_diff_lo, row.miou_diff_hi)
        sentences.append(
            f"With {row.n_masks:.0f} masks kept an image, as many as {tables.title(row.reference)} "
            f"keeps at the thresholds {pair}, {tables.title(row.method)} has {100 * row.miou:.1f}% "
            f"mIoU against {100 * row.reference_miou:.1f}%: a difference of {change} points."
        )
    return sentences


def _wide(own: pd.DataFrame, value: str, pairs: Sequence[Pair]) -> pd.DataFrame:
    """One row an image, one column a pair of thresholds."""
    return own.pivot(index="image", columns=PAIR, values=value).reindex(columns=pairs)


def _put(row: dict[str, Any], name: str, interval: tuple[float, float, float]) -> None:
    row |= dict(zip((name, f"{name}_lo", f"{name}_hi"), interval))


def _read(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """The height at `at` of the straight lines through (k,) places, the outer ones prolonged."""
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    different = np.flatnonzero(np.diff(x, prepend=-np.inf) > 0)
    x, y = x[different], y[different]
    if len(x) == 1:
        return float(y[0])
    i = int(np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2))
    return float(y[i] + (at - x[i]) * (y[i + 1] - y[i]) / (x[i + 1] - x[i]))


def _drawn_interval(statistic: Callable[[np.ndarray], float], n: int) -> tuple[float, float]:
    """Ends of the 95% percentile interval of `statistic` over draws of n images; NaN for one."""
    return _ends([statistic(draw) for draw in _draws(n)]) if n > 1 else (float("nan"),) * 2


def _draws(n: int) -> np.ndarray:
    """(RESAMPLES, n) indices of n of n images, the same every time."""
    return np.random.default_rng(tables.BOOTSTRAP_SEED).integers(0, n, (RESAMPLES, n))


def _ends(values: Sequence[float]) -> tuple[float, float]:
    outside = 50 * (1 - CONFIDENCE_LEVEL)
    low, high = np.percentile(values, [outside, 100 - outside])
    return float(low), float(high)


def _pooled(shares: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """The weighted mean of images' shares and the ends of its interval."""
    if not len(shares):
        return (float("nan"),) * 3
    mean = float(np.average(shares, weights=weights))
    if len(shares) == 1:
        return mean, float("nan"), float("nan")
    draws = _draws(len(shares))
    return mean, *_ends((shares * weights)[draws].sum(axis=1) / weights[draws].sum(axis=1))
