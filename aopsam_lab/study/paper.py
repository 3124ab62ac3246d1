"""The paper's three tables (folder `paper/`, see its README) beside ours, all in its units.

mIoU and the eliminated share in percent, times in seconds, memory in GB of 10^9 bytes.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from aopsam_lab.study.tables import NAN, as_table, interval_columns, interval_names

FOLDER = Path(__file__).with_name("paper")
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
# Columns of the sweeps whose sign is compared. Inf_Lat is not: the paper's moves by 6 ms at most.
SIGNS_OF = ("miou", "n_masks", "elim_ratio_percent", "mask_lat_s", "peak_mem_gb")
CHANGE = interval_names("change")
SIGNS = ("parameter", "column", "first", "last", "paper_change", "n_images", *CHANGE, "verdict")


def published(name: str) -> pd.DataFrame:
    """A table of the paper: "main_comparison", "ablation" or "parameter_sweeps"."""
    return pd.read_csv(FOLDER / f"{name}.csv")


def paper_dataset(dataset: str) -> str | None:
    """The paper's data set that one of ours, named as "coco-val2017", can stand beside."""
    names = {"photos": "COCO", "coco": "COCO", "lvis": "LVIS", "sa1b": "SA-1B"}
    return names.get(dataset.split("-")[0])  # the photographs in the box are COCO's


def main_table(sam: str, dataset: str) -> pd.DataFrame:
    """The rows of the paper's main table for a SAM and a data set of ours; none for others."""
    theirs = published("main_comparison")
    return theirs[(theirs["sam"] == sam) & (theirs["dataset"] == paper_dataset(dataset))]


def beside(theirs: pd.DataFrame, summary: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """The paper's main table or ablation, ours in the rows of the data set that matches.

    Of each column C of COMPARED it has C_paper, C_ours and C_difference, NaN if not known.
    """
    compared = theirs[["dataset", "method"]].reset_index(drop=True)
    ours = summary.set_index("method").reindex(compared["method"])
    matches = compared["dataset"] == paper_dataset(dataset)
    for column in COMPARED:
        name, factor = COLUMNS[column]
        cells = theirs[column].to_numpy(dtype=float)
        own = np.where(matches, factor * ours[name].to_numpy(dtype=float), NAN)
        for part, values in zip(PARTS, (cells, own, own - cells), strict=True):
            compared[f"{column}_{part}"] = values
    return compared


def step_table(per_image: pd.DataFrame, summary: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """What each of STEPS changes: the method with the part minus the method without it.

    source is "paper" or "ours"; ours follows the paper's data set that it can stand beside, else
    the last, where both methods were run.
    """
    theirs = published("ablation").set_index(["dataset", "method"]).drop(columns="sam")
    names, rows = list(theirs.index.unique("dataset")), []
    after = paper_dataset(dataset) or names[-1]
    values = per_image.set_index(["method", "image"])[["miou", "n_masks"]].astype(float)
    peaks = GB_PER_MIB * summary.set_index("method")["peak_mem_mb"]
    for step, (without, with_part) in STEPS.items():
        for name in names:
            change = theirs.loc[(name, with_part)] - theirs.loc[(name, without)]
            rows.append({"step": step, "source": "paper", "dataset": name, **change})
            if name == after and {without, with_part} <= set(summary["method"]):
                change = (values.loc[with_part] - values.loc[without]).dropna()
                row = {"step": step, "source": "ours", "dataset": dataset, "n_images": len(change)}
                row |= interval_columns("miou", 100 * change["miou"])
                row |= interval_columns("n_masks", change["n_masks"])
                rows.append(row | {"peak_mem_gb": peaks[with_part] - peaks[without]})
    return pd.DataFrame(rows)


def sign_table(trends: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """SIGNS: does a column change along a parameter as the paper's, from first to last?

    `trends` and `table` are `sweeps.trend_table` and `sweeps.sweep_table`, which has the peaks.
    verdict: see `verdict`, or "other values" where our first or last is another.
    """
    ours, rows = trends.set_index(["parameter", "column"]), []
    for parameter, panel in published("parameter_sweeps").groupby("parameter", sort=False):
        if parameter not in ours.index.unique("parameter"):
            continue
        start, end = panel.iloc[0], panel.iloc[-1]
        for column in panel[list(SIGNS_OF)].dropna(axis="columns"):
            name, factor = COLUMNS[column]
            once = name == "peak_mem_mb"
            own = ours.loc[(parameter, "miou" if once else name)].copy()
            if once:
                peaks = table.loc[table["parameter"] == parameter, name].to_numpy()
                change, steps = peaks[-1] - peaks[0], np.diff(peaks)
                spread = max(0, *(-np.sign(change) * steps))  # the largest step against the change
                own[["n_images", *CHANGE]] = NAN, change, change - spread, change + spread
            own[list(CHANGE)] *= factor
            theirs = end[column] - start[column]
            said = verdict(theirs, *own[list(CHANGE)])
            same = (own["first"], own["last"]) == (start["value"], end["value"])
            row = {**own, "parameter": parameter, "column": column, "paper_change": theirs}
            rows.append(row | {"verdict": said if same else "other values"})
    return as_table(rows, SIGNS)


def verdict(paper_change: float, change: float, low: float, high: float) -> str:
    """Does our change have the sign of the paper's? Not clear if low to high holds 0 or is NaN."""
    if not np.isfinite(change):
        return "not measured"
    if not (low > 0 or high < 0) or paper_change == 0:
        return "not clear"
    return "agrees" if (change > 0) == (paper_change > 0) else "disagrees"
