"""Rows of single images -> the tables of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from aopsam_lab.evaluator import mean_interval
from aopsam_lab.study.settings import REFERENCE, TITLES

BOOTSTRAP_SEED = 0
DIFFERENCE_HEADING = "Δ to AoP-SAM"
NAN = float("nan")

PER_IMAGE_COLUMNS = (
    "image", "method", "miou", "miou_best", "n_truth", "n_masks", "n_sampled", "n_decoded",
    "n_eliminated", "elim_ratio", "encode_s", "inf_lat_s", "mask_lat_s", "total_s", "ar_100",
    "ar_1000",
)  # fmt: skip
SUMMARY_COLUMNS = (
    "method", "n_images", "miou", "miou_lo", "miou_hi", "miou_best", "inf_lat_s", "mask_lat_s",
    "encode_s", "total_s", "peak_mem_mb", "n_masks", "n_decoded", "elim_ratio", "ar_100", "ar_1000",
)  # fmt: skip
MEANS = ["inf_lat_s", "mask_lat_s", "encode_s", "total_s", "n_masks", "n_decoded"]
RATIOS = {
    "n_decoded_ratio": "n_decoded",
    "mask_lat_ratio": "mask_lat_s",
    "inf_lat_ratio": "inf_lat_s",
    "total_ratio": "total_s",
}
DIFFERENCE = ("miou_diff", "miou_diff_lo", "miou_diff_hi")
DIFFERENCE_COLUMNS = ("method", "reference", "n_images", *DIFFERENCE, *RATIOS)
# There where the masks that a SAM found are; of an image the first only.
COVERAGE_COLUMNS = ("coverage", "coverage_lo", "coverage_hi")


def title(method: str) -> str:
    """A method's name for people; a label that is no method is its own."""
    return TITLES.get(method, method)


def share(part: float, whole: float) -> float:
    """A part of a whole, NaN of nothing."""
    return part / whole if whole else NAN


def interval_columns(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of images' values and its 95% interval: `name`, `name`_lo and `name`_hi."""
    interval = mean_interval(values, BOOTSTRAP_SEED)
    return dict(zip((name, f"{name}_lo", f"{name}_hi"), interval, strict=True))


def by_method(per_image: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each method, by image."""
    return dict(list(per_image.set_index("image").groupby("method", sort=False)))


def per_image_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row an image and method, from rows of `score` with `image` and `method`.

    Returns:
        PER_IMAGE_COLUMNS, and coverage where any row has it. elim_ratio: eliminated / sampled
        prompts, NaN where nothing was sampled. What a row does not have is NaN.
    """
    table = pd.DataFrame(rows)
    covered = ["coverage"] if "coverage" in table else []
    table = table.reindex(columns=[*PER_IMAGE_COLUMNS, *covered])
    sampled = table["n_sampled"].astype(float)
    table["elim_ratio"] = table["n_eliminated"] / sampled.where(sampled > 0)
    counts = ("image", "method", "n_truth", "n_masks", "n_sampled", "n_decoded", "n_eliminated")
    return table.astype({name: float for name in table if name not in counts})


def summary_table(per_image: pd.DataFrame, peak_mem_mb: Mapping[str, float]) -> pd.DataFrame:
    """One row a method, over all its images; peak_mem_mb: peak memory by method, in MiB.

    Returns:
        SUMMARY_COLUMNS. n_images: images with ground truth, on which miou, its 95% interval and
        miou_best rest. Times, n_masks, n_decoded: means over all images, times over those that were
        timed. elim_ratio: all eliminated / all sampled prompts. ar_100, ar_1000: over all
        ground-truth masks, as COCO defines them. COVERAGE_COLUMNS, where the masks are at hand.
    """
    rows = []
    for method, own in per_image.groupby("method", sort=False):
        scored = own[own["n_truth"] > 0]
        row = {"method": method, "n_images": len(scored), **own[MEANS].mean()}
        row |= interval_columns("miou", scored["miou"])
        row["miou_best"] = scored["miou_best"].mean()
        row["peak_mem_mb"] = peak_mem_mb.get(method, NAN)
        row["elim_ratio"] = share(own["n_eliminated"].sum(), own["n_sampled"].sum())
        for name in ("ar_100", "ar_1000"):
            matched = (scored[name] * scored["n_truth"]).sum(skipna=False)
            row[name] = share(matched, scored["n_truth"].sum())
        if "coverage" in own:
            row |= interval_columns("coverage", own["coverage"].dropna())
        rows.append(row)
    covered = COVERAGE_COLUMNS if "coverage" in per_image else ()
    return pd.DataFrame(rows, columns=[*SUMMARY_COLUMNS, *covered])


def difference_table(per_image: pd.DataFrame, reference: str = REFERENCE) -> pd.DataFrame:
    """One row a method other than the reference: the method minus the reference.

    Returns:
        DIFFERENCE_COLUMNS. miou_diff and its ends: on the same images, with the paired 95%
        bootstrap interval. The ratios: the method's mean over the reference's. Empty where the
        reference was not run.
    """
    methods, rows = by_method(per_image), []
    base = methods.pop(reference, None)
    for method, own in methods.items() if base is not None else ():
        scored = own["n_truth"] > 0
        row = {"method": method, "reference": reference, "n_images": scored.sum()}
        row |= interval_columns("miou_diff", (own["miou"] - base["miou"])[scored])
        for name, column in RATIOS.items():
            row[name] = share(own[column].mean(), base[column].mean())
        rows.append(row)
    return pd.DataFrame(rows, columns=list(DIFFERENCE_COLUMNS))


def results_for_people(summary: pd.DataFrame, differences: pd.DataFrame) -> pd.DataFrame:
    """The summary with the differences beside it, as text with units in the headings."""
    table = summary.merge(differences[["method", *DIFFERENCE]], how="left", on="method")
    shown = pd.DataFrame({"Method": table["method"].map(title)})
    for heading, (show, *columns) in SHOWN.items():
        if set(columns) <= set(table):
            shown[heading] = [show(*values) for values in table[columns].to_numpy()]
    return shown


def number(value: float, digits: int = 1) -> str:
    """A number as text, "–" where it is not known."""
    return f"{value:,.{digits}f}" if np.isfinite(value) else "–"


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign; what rounds to zero has none."""
    text = number(value, digits)
    if not text.strip("-0.,–"):
        return text.lstrip("-")
    return text if value < 0 else f"+{text}"


def with_interval(
    value: float,
    low: float = NAN,
    high: float = NAN,
    digits: int = 1,
    show: Callable[[float, int], str] = signed,
) -> str:
    """A value with its interval, the latter left out where it is not known."""
    text, *ends = (show(x, digits) for x in (value, low, high))
    return text if "–" in ends else f"{text} [{', '.join(ends)}]"


def percent(*shares: float) -> str:
    """A share in percent, with the ends of its interval where they are given."""
    return with_interval(*(100 * x for x in shares), show=number)


def points(*shares: float) -> str:
    """A difference of shares in points, with the ends of its interval where they are given."""
    return with_interval(*(100 * x for x in shares))


def milliseconds(seconds: float) -> str:
    """Milliseconds to three digits; 0 below a microsecond."""
    ms = 1000 * seconds
    if ms < 0.001:
        return "0"
    return number(ms, 0 if ms >= 100 else 1 if ms >= 10 else 2)


SHOWN: dict[str, tuple] = {  # heading for people: how it is shown, of which columns
    "mIoU %": (percent, "miou", "miou_lo", "miou_hi"),
    DIFFERENCE_HEADING: (points, *DIFFERENCE),
    "Best match %": (percent, "miou_best"),
    "AR@100": (percent, "ar_100"),
    "AR@1000": (percent, "ar_1000"),
    "Coverage %": (percent, *COVERAGE_COLUMNS),
    "Prompts decoded": (number, "n_decoded"),
    "Masks": (number, "n_masks"),
    "Eliminated %": (lambda ratio: number(100 * ratio, 0), "elim_ratio"),
    "Inf_Lat ms": (milliseconds, "inf_lat_s"),
    "Mask_Lat ms": (milliseconds, "mask_lat_s"),
    "Total ms": (milliseconds, "total_s"),
    "Peak MiB": (lambda peak: number(peak, 0), "peak_mem_mb"),
}
