"""The figures of the paper's three tables, and what stands beside ours.

They are in the CSV files of the folder `paper/`, whose README says how they were read and where the
poster is wrong or silent. All tables made here are in the paper's units: mIoU and the eliminated
share in percent, times in seconds, memory in GB of 10^9 bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from aopsam_lab.evaluator import mean_interval
from aopsam_lab.study import tables

FOLDER = Path(__file__).with_name("paper")
CITATION = (
    "Chen, Son, Hua, Kim: AoP-SAM: Automation of Prompts for Efficient Segmentation. AAAI 2025, "
    "39(2), 2284-2292, arXiv:2505.11980"
)
GB_PER_MIB = 2**20 / 1e9
# The paper's column -> our column, and how many of the paper's units one of ours is.
COLUMNS = {
    "miou": ("miou", 100),
    "inf_lat_s": ("inf_lat_s", 1),
    "mask_lat_s": ("mask_lat_s", 1),
    "peak_mem_gb": ("peak_mem_mb", GB_PER_MIB),
    "elim_ratio_percent": ("elim_ratio", 100),
    "n_masks": ("n_masks", 1),
}
COMPARED = ("miou", "inf_lat_s", "peak_mem_gb", "n_masks")  # in the main table and the ablation
PARTS = ("paper", "ours", "difference")
STEPS = {  # what a part of AoP-SAM changes: the method without it, the method with it
    "adaptive sampling": ("aop_no_as_af", "aop_no_af"),
    "adaptive filtering": ("aop_no_af", "aop"),
}
STEP_COLUMNS = (
    "step", "source", "dataset", "n_images", "miou", "miou_lo", "miou_hi",
    "n_masks", "n_masks_lo", "n_masks_hi", "peak_mem_gb",
)  # fmt: skip
# Columns of the sweeps whose sign is compared. Inf_Lat is not: the paper's moves by 6 ms at most.
SIGNS_OF = ("miou", "n_masks", "elim_ratio_percent", "mask_lat_s", "peak_mem_gb")
SIGN_COLUMNS = (
    "parameter", "column", "first", "last", "paper_change", "n_images",
    "change", "change_lo", "change_hi", "verdict",
)  # fmt: skip
AGREES, DISAGREES, NOT_CLEAR = "agrees", "disagrees", "not clear"
NOT_MEASURED, OTHER_VALUES = "not measured", "other values"


def main_comparison() -> pd.DataFrame:
    """The paper's main table, 45 rows: dataset, sam, method and the columns COMPARED."""
    return pd.read_csv(FOLDER / "main_comparison.csv")


def ablation() -> pd.DataFrame:
    """The paper's ablation, 9 rows, with the columns of its main table."""
    return pd.read_csv(FOLDER / "ablation.csv")


def parameter_sweeps() -> pd.DataFrame:
    """The paper's sweeps, 16 rows: panel, parameter, value, and COLUMNS, NaN where it has none."""
    return pd.read_csv(FOLDER / "parameter_sweeps.csv")


def paper_dataset(dataset: str) -> str | None:
    """The paper's data set that one of ours can stand beside.

    Args:
        dataset: the name of a data set; COCO's and LVIS's end in the split, as "coco-val2017".

    Returns:
        "COCO" for COCO and for `photos`, which are photographs of COCO; "LVIS"; "SA-1B"; else None.
    """
    kind = dataset.split("-")[0]
    return {"photos": "COCO", "coco": "COCO", "lvis": "LVIS", "sa1b": "SA-1B"}.get(kind)


def side_by_side(summary: pd.DataFrame, sam: str, dataset: str) -> pd.DataFrame:
    """The paper's main table for one SAM and data set: its cell, ours, and ours minus its.

    Args:
        summary: as `tables.summary_table` gives it.
        sam: the SAM's name.
        dataset: the data set's name.

    Returns:
        A row a method of the paper: method, and of each column C of COMPARED C_paper, C_ours and
        C_difference, NaN where the paper has no such cell or the method was not run. No row where
        the paper does not have this SAM or data set.
    """
    published = main_comparison()
    own = (published["sam"] == sam) & (published["dataset"] == paper_dataset(dataset))
    return _beside(published[own], summary)[["method", *_compared(PARTS)]]


def ablation_beside(summary: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """The paper's ablation, and ours in the rows of the data set that it can stand beside.

    Args:
        summary: as `tables.summary_table` gives it.
        dataset: the data set's name.

    Returns:
        Nine rows: dataset, method, and the columns of `side_by_side`; C_ours and C_difference are
        NaN in the rows of other data sets.
    """
    compared = _beside(ablation(), summary)
    compared.loc[compared["dataset"] != paper_dataset(dataset), _compared(PARTS[1:])] = np.nan
    return compared[["dataset", "method", *_compared(PARTS)]]


def step_table(per_image: pd.DataFrame, summary: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """What each part of AoP-SAM changes, in the paper's ablation and in ours.

    Args:
        per_image: as `tables.per_image_table` gives it.
        summary: as `tables.summary_table` gives it.
        dataset: the name of our data set.

    Returns:
        A row a step of STEPS and source, with the columns STEP_COLUMNS. source is "paper" or
        "ours"; ours follows the paper's data set that it can stand beside, else the last. miou
        (points), n_masks and peak_mem_gb are the method with the part minus the method without it;
        _lo and _hi are the ends of the 95% paired bootstrap interval over our n_images images. No
        row of ours where one of the two methods was not run.
    """
    published = ablation().set_index(["dataset", "method"])[["miou", "peak_mem_gb", "n_masks"]]
    beside, rows = paper_dataset(dataset), []
    for step, (without, with_part) in STEPS.items():
        own = _our_step(per_image, summary, without, with_part)
        ours = [{"step": step, "source": "ours", "dataset": dataset, **own}] if own else []
        for name in published.index.unique("dataset"):
            change = published.loc[(name, with_part)] - published.loc[(name, without)]
            rows.append({"step": step, "source": "paper", "dataset": name, **change})
            rows += ours if name == beside else []
        rows += ours if beside is None else []
    return pd.DataFrame(rows, columns=list(STEP_COLUMNS))


def sweep_curve(parameter: str, low: float, high: float) -> pd.DataFrame:
    """The paper's sweep of one parameter, as far as its values lie between two of ours.

    Args:
        parameter: the parameter's name.
        low: the lowest value that is wanted.
        high: the highest value that is wanted.

    Returns:
        A row a value: value, miou (percent), n_masks.
    """
    published = parameter_sweeps()
    own = (published["parameter"] == parameter) & published["value"].between(low, high)
    return published.loc[own, ["value", "miou", "n_masks"]].reset_index(drop=True)


def sign_table(trends: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Does a column change along a parameter as in the paper? The sign from first to last value.

    Args:
        trends: as `sweeps.trend_table` gives it.
        table: as `sweeps.sweep_table` gives it, for peak memory, which is measured once a setting.

    Returns:
        A row a swept parameter and column of SIGNS_OF that the paper has along it (twelve for its
        four parameters), with the columns SIGN_COLUMNS. column is the paper's, and changes are in
        its unit. change is ours over n_images images with the ends of its 95% paired bootstrap
        interval, which peak memory does not have (NaN). verdict is that of the function `verdict`,
        or OTHER_VALUES where our first and last value are not the paper's.
    """
    ours = trends.set_index(["knob", "column"])
    rows = []
    for parameter, panel in parameter_sweeps().groupby("parameter", sort=False):
        if parameter not in ours.index.unique("knob"):
            continue
        start, end = panel.iloc[0], panel.iloc[-1]
        for column in [name for name in SIGNS_OF if panel[name].notna().all()]:
            name, factor = COLUMNS[column]
            once = name == "peak_mem_mb"
            own = ours.loc[(parameter, "miou" if once else name)]
            if once:
                peaks = table.loc[table["knob"] == parameter, name]
                changes = [peaks.iloc[-1] - peaks.iloc[0], np.nan, np.nan]
            else:
                changes = own[["change", "change_lo", "change_hi"]]
            change, low, high = (factor * float(value) for value in changes)
            paper_change = end[column] - start[column]
            same = (own["first"], own["last"]) == (start["value"], end["value"])
            said = verdict(paper_change, change, low, high, once)
            rows.append(
                {
                    "parameter": parameter,
                    "column": column,
                    "first": own["first"],
                    "last": own["last"],
                    "paper_change": paper_change,
                    "n_images": np.nan if once else own["n_images"],
                    "change": change,
                    "change_lo": low,
                    "change_hi": high,
                    "verdict": said if same else OTHER_VALUES,
                }
            )
    return pd.DataFrame(rows, columns=list(SIGN_COLUMNS))


def verdict(
    paper_change: float, change: float, low: float, high: float, measured_once: bool = False
) -> str:
    """Does our change have the sign of the paper's?

    Args:
        paper_change: the paper's change.
        change: ours; NaN where it was not measured.
        low: the lower end of its interval; NaN where it has none.
        high: the upper end.
        measured_once: whether ours has no interval, so that its sign alone decides.

    Returns:
        AGREES or DISAGREES; NOT_CLEAR where our interval contains 0 or cannot be had, and where a
        change is 0; NOT_MEASURED.
    """
    if not np.isfinite(change):
        return NOT_MEASURED
    decided = measured_once or low > 0 or high < 0  # neither for NaN, the interval of one image
    if not decided or change == 0 or paper_change == 0:
        return NOT_CLEAR
    return AGREES if (change > 0) == (paper_change > 0) else DISAGREES


def _beside(published: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """Rows of a table of the paper, with C_paper, C_ours and C_difference of each C of COMPARED."""
    ours = summary.set_index("method").reindex(published["method"])
    compared = published.reset_index(drop=True)
    for column in COMPARED:
        name, factor = COLUMNS[column]
        compared[f"{column}_paper"] = compared[column].astype(float)
        compared[f"{column}_ours"] = factor * ours[name].to_numpy(dtype=float)
        compared[f"{column}_difference"] = compared[f"{column}_ours"] - compared[f"{column}_paper"]
    return compared


def _compared(parts: tuple[str, ...]) -> list[str]:
    return [f"{column}_{part}" for column in COMPARED for part in parts]


def _our_step(
    per_image: pd.DataFrame, summary: pd.DataFrame, without: str, with_part: str
) -> dict[str, float]:
    """Our values of a row of `step_table`; empty where one of the two methods was not run."""
    methods = set(per_image["method"])
    if not {without, with_part} <= methods:
        return {}
    own = per_image.set_index(["method", "image"])[["miou", "n_masks"]].astype(float)
    change = (own.loc[with_part] - own.loc[without]).dropna()
    found: dict[str, float] = {"n_images": len(change)}
    for column in change:
        values = mean_interval(COLUMNS[column][1] * change[column], tables.BOOTSTRAP_SEED)
        found |= dict(zip((column, f"{column}_lo", f"{column}_hi"), values))
    peaks = GB_PER_MIB * summary.set_index("method")["peak_mem_mb"]
    return {**found, "peak_mem_gb": peaks[with_part] - peaks[without]}
