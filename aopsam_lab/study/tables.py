"""Rows of single images -> the tables of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from aopsam_lab.evaluator import (
    MAX_MASKS,
    aggregate,
    average_recall,
    mean_interval,
    paired_difference,
)

REFERENCE = "aop"
BOOTSTRAP_SEED = 0
DIFFERENCE_HEADING = "Δ to AoP-SAM"

PER_IMAGE_COLUMNS = (
    "image", "method", "miou", "miou_best", "n_truth", "n_masks", "n_sampled", "n_decoded", "n_eliminated",
    "elim_ratio", "encode_s", "inf_lat_s", "mask_lat_s", "total_s", "ar_100", "ar_1000",
)  # fmt: skip
SUMMARY_COLUMNS = (
    "method", "n_images", "miou", "miou_lo", "miou_hi", "miou_best", "inf_lat_s", "mask_lat_s", "encode_s", "total_s",
    "peak_mem_mb", "n_masks", "n_decoded", "elim_ratio", "ar_100", "ar_1000",
)  # fmt: skip
DIFFERENCE_COLUMNS = (
    "method", "reference", "n_images", "miou_diff", "miou_diff_lo", "miou_diff_hi", "n_decoded_ratio",
    "mask_lat_ratio", "inf_lat_ratio", "total_ratio",
)  # fmt: skip
# Columns that are there where the masks that a SAM found are; of an image the first only.
COVERAGE_COLUMNS = ("coverage", "coverage_lo", "coverage_hi")
COVERAGE = COVERAGE_COLUMNS[0]

TITLES = {
    "amg_s": "AMG-S",
    "amg_d": "AMG-D",
    "oas_box": "OAS Box",
    "oas_point": "OAS Central Point",
    "aop_no_as_af": "AoP-SAM without AS, AF",
    "aop_no_af": "AoP-SAM without AF",
    "aop": "AoP-SAM",
    "aop_gated": "AoP-SAM gated (ours)",
    "aop_raw": "AoP-SAM, literal",
}


def title(method: str) -> str:
    """A method's name for people; a label that is not in the registry is its own."""
    return TITLES.get(method, method)


def per_image_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row an image and method, in the order given; miou and miou_best are NaN for an image without truth.

    elim_ratio is eliminated / sampled prompts, NaN where nothing was sampled. Times in seconds, NaN where none was
    taken. ar_100, ar_1000: COCO's average recall of the best 100 and 1,000 masks, NaN without
    ground truth. coverage: the share of the masks that a SAM found that the method finds; the
    column is there where any row has such masks.
    """
    table = pd.DataFrame(rows)
    found = "n_found" in table
    if found:
        table[COVERAGE] = [share(*counts) for counts in zip(table["n_covered"], table["n_found"])]
    for most in MAX_MASKS:
        matched = table.get(f"matched_{most}", [None] * len(table))
        table[f"ar_{most}"] = [
            average_recall(counts, n) if isinstance(counts, list) else float("nan")
            for counts, n in zip(matched, table.get("n_truth", []))
        ]
    table = table.reindex(columns=[*PER_IMAGE_COLUMNS, *([COVERAGE] if found else [])])
    numbers = [name for name in PER_IMAGE_COLUMNS if name.endswith("_s") or name.startswith("miou")]
    table[numbers] = table[numbers].astype(float)
    sampled = table["n_sampled"].astype(float)
    table["elim_ratio"] = table["n_eliminated"] / sampled.where(sampled > 0)
    return table


def share(part: float, whole: float) -> float:
    """A part of a whole, NaN of nothing."""
    return part / whole if whole else float("nan")


def summary_table(per_image: pd.DataFrame, peak_mem_mb: Mapping[str, float]) -> pd.DataFrame:
    """One row a method, over all its images.

    n_images: images with truth, on which miou (mean), miou_lo, miou_hi (95% bootstrap over images) and miou_best rest.
    Times, n_masks and n_decoded are means over all images (times over those that were timed), elim_ratio is all
    eliminated / all sampled prompts. ar_100, ar_1000 are over all ground-truth masks, as COCO
    defines them. coverage with coverage_lo and coverage_hi, its 95% interval: mean over images,
    where the per-image table has it.
    """
    rows = []
    for method, own in per_image.groupby("method", sort=False):
        total = aggregate(own["miou"], own["miou_best"], own["n_truth"])
        _, low, high = mean_interval(own.loc[own["n_truth"] > 0, "miou"], BOOTSTRAP_SEED)
        sampled = own["n_sampled"].sum()
        means = own[
            ["inf_lat_s", "mask_lat_s", "encode_s", "total_s", "n_masks", "n_decoded"]
        ].mean()
        rows.append(
            {
                "method": method,
                "n_images": total["n_images"],
                "miou": total["miou"],
                "miou_lo": low,
                "miou_hi": high,
                "miou_best": total["miou_best"],
                **means,
                "peak_mem_mb": peak_mem_mb.get(method, float("nan")),
                "elim_ratio": own["n_eliminated"].sum() / sampled if sampled else float("nan"),
                **{name: _over_truths(own[name], own["n_truth"]) for name in ("ar_100", "ar_1000")},
            }
        )
        if COVERAGE in own:
            interval = mean_interval(own[COVERAGE].dropna(), BOOTSTRAP_SEED)
            rows[-1] |= dict(zip(COVERAGE_COLUMNS, interval))
    columns = [*SUMMARY_COLUMNS, *(COVERAGE_COLUMNS if COVERAGE in per_image else ())]
    return pd.DataFrame(rows, columns=columns)


def _over_truths(values: pd.Series, n_truth: pd.Series) -> float:
    """The mean over ground-truth masks from the means of images."""
    known = values.notna()
    return share(float((values[known] * n_truth[known]).sum()), float(n_truth[known].sum()))


def difference_table(per_image: pd.DataFrame, reference: str = REFERENCE) -> pd.DataFrame:
    """One row a method other than the reference: method minus reference on the same images, with its paired interval.

    miou_diff, miou_diff_lo, miou_diff_hi: in mIoU, 95% bootstrap over images. The four ratios are the method's mean
    over the reference's. Empty where the reference was not run.
    """
    scored = per_image[per_image["n_truth"] > 0]
    rows = []
    if reference in set(per_image["method"]):
        base = scored[scored["method"] == reference].set_index("image")
        base_means = per_image[per_image["method"] == reference].mean(numeric_only=True)
        for method, own in scored.groupby("method", sort=False):
            if method == reference:
                continue
            values = own.set_index("image")["miou"]
            mean, low, high = paired_difference(
                values, base.loc[values.index, "miou"], BOOTSTRAP_SEED
            )
            means = per_image[per_image["method"] == method].mean(numeric_only=True)
            rows.append(
                {
                    "method": method,
                    "reference": reference,
                    "n_images": len(values),
                    "miou_diff": mean,
                    "miou_diff_lo": low,
                    "miou_diff_hi": high,
                    **{
                        name: means[column] / base_means[column]
                        if base_means[column]
                        else float("nan")
                        for name, column in (
                            ("n_decoded_ratio", "n_decoded"),
                            ("mask_lat_ratio", "mask_lat_s"),
                            ("inf_lat_ratio", "inf_lat_s"),
                            ("total_ratio", "total_s"),
                        )
                    },
                }
            )
    return pd.DataFrame(rows, columns=list(DIFFERENCE_COLUMNS))


def results_for_people(summary: pd.DataFrame, differences: pd.DataFrame) -> pd.DataFrame:
    """The summary with the differences beside it, as text: percent, milliseconds, units in the headings."""
    difference = differences.set_index("method")
    rows = []
    for row in summary.itertuples():
        rows.append(
            {
                "Method": title(row.method),
                "mIoU %": percent_with_range(row.miou, row.miou_lo, row.miou_hi),
                DIFFERENCE_HEADING: _difference(difference, row.method),
                "Best match %": _number(100 * row.miou_best, 1),
                "AR@100": _number(100 * row.ar_100, 1),
                "AR@1000": _number(100 * row.ar_1000, 1),
                **_coverage(row),
                "Prompts decoded": _number(row.n_decoded, 1),
                "Masks": _number(row.n_masks, 1),
                "Eliminated %": _number(100 * row.elim_ratio, 0),
                "Inf_Lat ms": milliseconds(row.inf_lat_s),
                "Mask_Lat ms": milliseconds(row.mask_lat_s),
                "Total ms": milliseconds(row.total_s),
                "Peak MiB": _number(row.peak_mem_mb, 0),
            }
        )
    return pd.DataFrame(rows)


def findings(summary: pd.DataFrame, differences: pd.DataFrame) -> list[str]:
    """What the numbers say about the reference against each other method, one sentence each."""
    sentences = []
    for row in differences.itertuples():
        low, high = -100 * row.miou_diff_hi, -100 * row.miou_diff_lo
        if not np.isfinite([low, high]).all():
            verdict = "one image gives no interval"
        elif low > 0:
            verdict = "the interval lies above zero, so it is better"
        elif high < 0:
            verdict = "the interval lies below zero, so it is worse"
        else:
            verdict = "the interval holds zero, so neither is shown to be better"
        sentences.append(
            f"Against {title(row.method)}, {title(row.reference)} has {_signed(-100 * row.miou_diff)} points of mIoU "
            f"{_range(low, high, sign=True)}: {verdict}. It decodes {_share(row.n_decoded_ratio)} of the "
            f"prompts and takes {_share(row.mask_lat_ratio)} of the mask time."
        )
    return sentences


def milliseconds(seconds: float) -> str:
    """Milliseconds to three digits; 0 below a microsecond."""
    ms = 1000 * seconds
    if not np.isfinite(ms):
        return "–"
    return (
        f"{ms:,.0f}"
        if ms >= 100
        else f"{ms:.1f}"
        if ms >= 10
        else f"{ms:.2f}"
        if ms >= 0.001
        else "0"
    )


def percent_with_range(value: float, low: float, high: float) -> str:
    """A share in percent with its interval, the latter left out where it is not known."""
    return f"{_number(100 * value, 1)} {_range(100 * low, 100 * high)}".strip()


def change_with_range(value: float, low: float, high: float) -> str:
    """A difference of shares in points with its interval, all with their signs."""
    return f"{_signed(100 * value)} {_range(100 * low, 100 * high, sign=True)}".strip()


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if np.isfinite(value) else "–"


def _range(low: float, high: float, sign: bool = False) -> str:
    if not np.isfinite([low, high]).all():
        return ""
    return f"[{_signed(low)}, {_signed(high)}]" if sign else f"[{low:.1f}, {high:.1f}]"


def _signed(value: float) -> str:
    """One digit after the point, with its sign; what rounds to zero has none."""
    return f"{value:+.1f}" if abs(value) >= 0.05 else "0.0"


def _difference(differences: pd.DataFrame, method: str) -> str:
    if method not in differences.index:
        return "–"
    row = differences.loc[method]
    return change_with_range(row.miou_diff, row.miou_diff_lo, row.miou_diff_hi)


def _coverage(row: Any) -> dict[str, str]:
    """The column of coverage, where the summary has it."""
    if not hasattr(row, COVERAGE):
        return {}
    return {"Coverage %": percent_with_range(row.coverage, row.coverage_lo, row.coverage_hi)}


def _share(ratio: float) -> str:
    """How much the reference needs of the other method's: the inverse of a stored ratio, in percent or times."""
    if not np.isfinite(ratio) or ratio == 0:
        return "an unknown share"
    share = 1 / ratio
    return f"{100 * share:.0f}%" if share < 2 else f"{share:.1f} times"
