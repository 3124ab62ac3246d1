"""Rows of single images -> the tables of a report, and their numbers as text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from aopsam_lab.evaluator import CONFIDENCE_LEVEL, RESAMPLES, mean_interval
from aopsam_lab.pipeline.methods import TITLES
from aopsam_lab.study.score import PAIR, TIMES
from aopsam_lab.study.settings import REFERENCE

BOOTSTRAP_SEED = 0
NAN = float("nan")


def interval_names(name: str) -> tuple[str, str, str]:
    """The columns of a mean and of the ends of its 95% interval."""
    return name, f"{name}_lo", f"{name}_hi"


MIOU, DIFFERENCE, RECALL = map(interval_names, ("miou", "miou_diff", "ar_1000"))
# where the masks that a SAM found are at hand; an image has only the first
COVERAGE_COLUMNS = interval_names("coverage")
PER_IMAGE_COLUMNS = (
    "image", "method", "miou", "miou_best", "n_truth", "n_masks", "n_sampled", "n_decoded",
    "n_eliminated", "elim_ratio", "encode_s", "inf_lat_s", "mask_lat_s", "total_s", "ar_100",
    "ar_1000", "processor",
)  # fmt: skip
SUMMARY_COLUMNS = (
    "method", "n_images", *MIOU, "miou_best", "inf_lat_s", "mask_lat_s", "encode_s", "total_s",
    "peak_mem_mb", "n_masks", "n_decoded", "elim_ratio", "ar_100", "ar_1000",
)  # fmt: skip
RATIOS = {
    f"{column.removesuffix('_s')}_ratio": column
    for column in ("n_decoded", "mask_lat_s", "inf_lat_s", "total_s")
}
DIFFERENCE_COLUMNS = ("method", "reference", "n_images", *DIFFERENCE, *RATIOS)
CURVE_COLUMNS = ("image", "method", *PAIR, "own", "n_truth", "n_masks", "miou", "ar_1000")
CURVE_MEANS = ("method", *PAIR, "own", "n_images", "n_masks", *MIOU, *DIFFERENCE, *RECALL)
EQUAL_COLUMNS = (
    "method", "reference", *PAIR, "n_images", "n_masks", "miou", "reference_miou", *DIFFERENCE,
)  # fmt: skip


def title(method: str) -> str:
    """A method's name for people."""
    return TITLES.get(method, method)


def share(part: float, whole: float) -> float:
    """A part of a whole, NaN of nothing."""
    return part / whole if whole else NAN


def interval_columns(name: str, values: pd.Series) -> dict[str, float]:
    """The `interval_names` of images' values; those that are not known do not count."""
    interval = mean_interval(values.dropna(), BOOTSTRAP_SEED)
    return dict(zip(interval_names(name), interval, strict=True))


def by_method(per_image: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each method, by image."""
    return dict(list(per_image.set_index("image").groupby("method", sort=False)))


def as_table(rows: Sequence[Mapping] | pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """These columns, and those of COVERAGE_COLUMNS that are there; NaN for what is not known."""
    table = pd.DataFrame(rows)
    table = table.reindex(columns=[*columns, *(name for name in COVERAGE_COLUMNS if name in table)])
    unknown = table.columns[table.isna().all()]
    return table.astype(dict.fromkeys(unknown, float if len(table) else object))


def per_image_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """PER_IMAGE_COLUMNS, and coverage where any row of `score` has it; one row an image, method."""
    table = as_table(rows, PER_IMAGE_COLUMNS)
    table["elim_ratio"] = table["n_eliminated"] / table["n_sampled"].replace(0, NAN)
    return table


def comparable(per_image: pd.DataFrame) -> pd.DataFrame:
    """The rows, without their times where these are of more than one kind of processor."""
    mixed = per_image["processor"].nunique() > 1
    return per_image.assign(**dict.fromkeys(TIMES, NAN)) if mixed else per_image


def summary_table(per_image: pd.DataFrame, peak_mem_mb: Mapping[str, float]) -> pd.DataFrame:
    """SUMMARY_COLUMNS, and COVERAGE_COLUMNS where found masks are at hand; one row a method.

    miou rests on the n_images with ground truth. elim_ratio: all eliminated / all sampled prompts.
    ar_100, ar_1000: over all ground-truth masks, as COCO defines them. Peaks: by method, in MiB.
    """
    rows = []
    for method, own in comparable(per_image).groupby("method", sort=False):
        row = {**_means(own), "method": method, "peak_mem_mb": peak_mem_mb.get(method, NAN)}
        row["elim_ratio"] = share(own["n_eliminated"].sum(), own["n_sampled"].sum())
        for name in ("ar_100", "ar_1000"):
            matched = (own[name] * own["n_truth"]).sum(min_count=1)
            row[name] = share(matched, own["n_truth"].sum())
        rows.append(row)
    return as_table(rows, SUMMARY_COLUMNS)


def difference_table(per_image: pd.DataFrame, reference: str = REFERENCE) -> pd.DataFrame:
    """DIFFERENCE_COLUMNS; one row a method, none where the reference was not run.

    miou_diff: the method minus the reference, on the same images; ratios: of their means.
    """
    methods, rows = by_method(comparable(per_image)), []
    base = methods.pop(reference, None)
    for method, own in methods.items() if base is not None else ():
        change = own["miou"] - base["miou"]
        row = {"method": method, "reference": reference, "n_images": change.count()}
        row |= interval_columns("miou_diff", change)
        for name, column in RATIOS.items():
            row[name] = share(own[column].mean(), base[column].mean())
        rows.append(row)
    return as_table(rows, DIFFERENCE_COLUMNS)


# --- looser thresholds than SAM's own: the prompts stay those that the method decodes at SAM's ---


def curve_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """CURVE_COLUMNS, and coverage; one row an image, method and pair; own: whether it is SAM's."""
    points = [{**row, **point} for row in rows for point in row["curve"]]
    return as_table(points, CURVE_COLUMNS)


def curve_summary(curves: pd.DataFrame) -> pd.DataFrame:
    """CURVE_MEANS, and COVERAGE_COLUMNS; as `summary_table`, at each pair."""
    parts = dict(list(curves.set_index("image").groupby(["method", *PAIR], sort=False)))
    rows = []
    for key, own in parts.items():
        row = _means(own) | dict(zip(("method", *PAIR), key, strict=True))
        row |= {"own": own["own"].iloc[0], "ar_1000": NAN}
        base = parts.get((REFERENCE, *key[1:]))
        if base is not None and base is not own:
            row |= interval_columns("miou_diff", own["miou"] - base["miou"])
        scored = own[own["n_truth"] > 0]
        if len(scored):
            masks, draws = scored["n_truth"].to_numpy(), _draws(len(scored))
            matched = masks * scored["ar_1000"].to_numpy()
            row |= _interval(RECALL, matched[draws].sum(axis=1) / masks[draws].sum(axis=1))
        rows.append(row)
    return as_table(rows, CURVE_MEANS)


def equal_masks(curves: pd.DataFrame) -> pd.DataFrame:
    """EQUAL_COLUMNS: AoP-SAM and the dense grid at equal masks kept, #P, the paper's cost.

    The curve, mean mIoU against mean masks kept in straight lines, is read where it keeps as many
    masks as the grid does at each of its pairs, if it does. For the interval images are drawn anew
    and both curves read again; where a draw ends before the place, its last line goes on.
    """
    both = {"method": REFERENCE, "reference": "amg_d"}
    pairs = list(map(tuple, curves[list(PAIR)].drop_duplicates().to_numpy()))
    scored = curves[(curves["n_truth"] > 0) & curves["method"].isin(both.values())]
    if scored["method"].nunique() < 2:
        return as_table([], EQUAL_COLUMNS)
    wide = scored.pivot(index="image", columns=["method", *PAIR], values=["n_masks", "miou"])
    draws = _draws(len(wide))
    masks, miou, base_masks, base = (  # (draws, pairs), means over images
        wide[value][name].reindex(columns=pairs).to_numpy(dtype=float)[draws].mean(axis=1)
        for name in both.values()
        for value in ("n_masks", "miou")
    )
    rows = []
    for j, pair in enumerate(pairs):
        at, reached = base_masks[0, j], base[0, j]
        if masks[0].min() <= at <= masks[0].max():
            row = {**both, **dict(zip(PAIR, pair, strict=True)), "n_images": len(wide)}
            row |= {"n_masks": at, "reference_miou": reached}
            read = np.array(list(map(_read, masks, miou, base_masks[:, j])))
            row |= _interval(DIFFERENCE, read - base[:, j])
            rows.append(row | {"miou": reached + row["miou_diff"]})
    return as_table(rows, EQUAL_COLUMNS)


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
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    return np.vstack([np.arange(n), rng.integers(0, n, (RESAMPLES if n > 1 else 0, n))])


def _interval(names: Sequence[str], drawn: np.ndarray) -> dict[str, float]:
    """By three names, the first of values and the 95% interval of the others."""
    outside = 50 * (1 - CONFIDENCE_LEVEL)
    ends = np.percentile(drawn[1:], [outside, 100 - outside]) if len(drawn) > 1 else (NAN, NAN)
    return dict(zip(names, (drawn[0], *ends), strict=True))


def _means(own: pd.DataFrame) -> dict[str, Any]:
    """Of a method's images the means, n_images, and the intervals that all summaries have."""
    row = own.mean(numeric_only=True).to_dict() | interval_columns("miou", own["miou"])
    if "coverage" in own:
        row |= interval_columns("coverage", own["coverage"])
    return row | {"n_images": own["miou"].count()}


# --- for people ---


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
    text = f"{value:+z,.{digits}f}" if np.isfinite(value) else "–"
    return text if text.strip("+0.") else text[1:]


def with_interval(*values: float, digits: int = 1, show: Callable = signed) -> str:
    """A value with its interval, the latter left out where it is not known."""
    text, *ends = (show(value, digits) for value in values)
    return f"{text} [{', '.join(ends)}]" if ends and "–" not in ends else text


def percent(*shares: float) -> str:
    """A share in percent, with its interval where the ends are given."""
    return with_interval(*(100 * x for x in shares), show=number)


def points(*shares: float) -> str:
    """A difference of shares in points, with its interval where the ends are given."""
    return with_interval(*(100 * x for x in shares))


def milliseconds(seconds: float) -> str:
    """Milliseconds to three digits; 0 below a microsecond."""
    ms = 1000 * seconds
    if ms < 0.001:
        return "0"
    return number(ms, 0 if ms >= 100 else 1 if ms >= 10 else 2)


SHOWN: dict[str, tuple] = {  # heading for people: how it is shown, of which columns
    "mIoU %": (percent, *MIOU),
    "Δ to AoP-SAM": (points, *DIFFERENCE),
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
