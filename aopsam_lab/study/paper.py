"""The figures of the paper's three tables, and what stands beside ours.

They are in the CSV files of the folder `paper/`, whose README says how they were read and where the
poster is wrong or silent. All tables made here are in the paper's units: mIoU and the eliminated
share in percent, times in seconds, memory in GB of 10^9 bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from aopsam_lab.study import tables
from aopsam_lab.study.tables import NAN, number, signed, title, with_interval

FOLDER = Path(__file__).with_name("paper")
CITATION = (
    "Chen, Son, Hua, Kim: AoP-SAM: Automation of Prompts for Efficient Segmentation. AAAI 2025, "
    "39(2), 2284-2292, arXiv:2505.11980"
)
GB_PER_MIB = 2**20 / 1e9


class Quantity(NamedTuple):
    """A column of the paper.

    Args:
        ours: our column; factor: how many of the paper's units one of ours is.
        heading: its name with its unit; unit: of a change of it.
        digits, change_digits: of a value and of a change.
    """

    ours: str
    factor: float
    heading: str
    unit: str
    digits: int
    change_digits: int


COLUMNS = {
    "miou": Quantity("miou", 100, "mIoU %", "points", 1, 1),
    "inf_lat_s": Quantity("inf_lat_s", 1, "Inf_Lat s", "s", 3, 3),
    "mask_lat_s": Quantity("mask_lat_s", 1, "Mask_Lat s", "s", 3, 3),
    "peak_mem_gb": Quantity("peak_mem_mb", GB_PER_MIB, "Peak_Mem GB", "GB", 2, 3),
    "elim_ratio_percent": Quantity("elim_ratio", 100, "Ratio_elim %", "points", 1, 1),
    "n_masks": Quantity("n_masks", 1, "#P", "masks", 1, 1),
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


def published(name: str) -> pd.DataFrame:
    """A table of the paper: "main_comparison", "ablation" or "parameter_sweeps"."""
    return pd.read_csv(FOLDER / f"{name}.csv")


def paper_dataset(dataset: str) -> str | None:
    """The paper's data set that one of ours can stand beside.

    Args:
        dataset: the name of a data set; COCO's and LVIS's end in the split, as "coco-val2017".

    Returns:
        "COCO" for COCO and for `photos`, which are photographs of COCO; "LVIS"; "SA-1B"; else None.
    """
    kind = dataset.split("-")[0]
    return {"photos": "COCO", "coco": "COCO", "lvis": "LVIS", "sa1b": "SA-1B"}.get(kind)


def main_beside(summary: pd.DataFrame, sam: str, dataset: str) -> pd.DataFrame:
    """The paper's main table for one SAM and data set: its cell, ours, and ours minus its.

    Args:
        summary: as `tables.summary_table` returns it.
        sam, dataset: the names of both.

    Returns:
        A row a method of the paper: dataset, method, and of each column C of COMPARED C_paper,
        C_ours and C_difference, NaN where the paper has no such cell or the method was not run. No
        row where the paper does not have this SAM or data set.
    """
    theirs = published("main_comparison")
    own = (theirs["sam"] == sam) & (theirs["dataset"] == paper_dataset(dataset))
    return _beside(theirs[own], summary, dataset)


def ablation_beside(summary: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """The paper's ablation, and ours in the rows of the data set that it can stand beside.

    Returns:
        Nine rows with the columns of `main_beside`.
    """
    return _beside(published("ablation"), summary, dataset)


def step_table(per_image: pd.DataFrame, summary: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """What each part of AoP-SAM changes, in the paper's ablation and in ours.

    Args:
        per_image, summary: as `tables` makes them.
        dataset: the name of our data set.

    Returns:
        A row a step of STEPS and source, with the columns STEP_COLUMNS. source is "paper" or
        "ours"; ours follows the paper's data set that it can stand beside, else the last. miou
        (points), n_masks and peak_mem_gb are the method with the part minus the method without it;
        _lo and _hi are the ends of the 95% paired bootstrap interval over our n_images images. No
        row of ours where one of the two methods was not run.
    """
    theirs = published("ablation").set_index(["dataset", "method"])
    names, rows = list(theirs.index.unique("dataset")), []
    after = paper_dataset(dataset) or names[-1]
    values = per_image.set_index(["method", "image"])[["miou", "n_masks"]].astype(float)
    peaks = GB_PER_MIB * summary.set_index("method")["peak_mem_mb"]
    for step, (without, with_part) in STEPS.items():
        for name in names:
            change = theirs.loc[(name, with_part)] - theirs.loc[(name, without)].drop("sam")
            rows.append({"step": step, "source": "paper", "dataset": name, **change})
            if name == after and {without, with_part} <= set(summary["method"]):
                change = (values.loc[with_part] - values.loc[without]).dropna()
                row = {"step": step, "source": "ours", "dataset": dataset, "n_images": len(change)}
                row |= tables.interval_columns("miou", 100 * change["miou"])
                row |= tables.interval_columns("n_masks", change["n_masks"])
                rows.append(row | {"peak_mem_gb": peaks[with_part] - peaks[without]})
    return pd.DataFrame(rows, columns=list(STEP_COLUMNS))


def sweep_curve(parameter: str, low: float, high: float) -> pd.DataFrame:
    """The paper's sweep of a parameter at values from low to high: value, miou (%), n_masks."""
    theirs = published("parameter_sweeps")
    own = (theirs["parameter"] == parameter) & theirs["value"].between(low, high)
    return theirs.loc[own, ["value", "miou", "n_masks"]].reset_index(drop=True)


def sign_table(trends: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Does a column change along a parameter as in the paper? The sign from first to last value.

    Args:
        trends: as `sweeps.trend_table` returns it.
        table: as `sweeps.sweep_table` returns it, for peak memory, which is measured once a
            setting.

    Returns:
        A row a swept parameter and column of SIGNS_OF that the paper has along it (twelve for its
        four parameters), with the columns SIGN_COLUMNS. column is the paper's, and changes are in
        its unit. change is ours over n_images images with the ends of its 95% paired bootstrap
        interval, which peak memory does not have (NaN). verdict is that of the function `verdict`,
        or OTHER_VALUES where our first and last value are not the paper's.
    """
    ours = trends.set_index(["parameter", "column"])
    rows = []
    for parameter, panel in published("parameter_sweeps").groupby("parameter", sort=False):
        if parameter not in ours.index.unique("parameter"):
            continue
        start, end = panel.iloc[0], panel.iloc[-1]
        for column in [name for name in SIGNS_OF if panel[name].notna().all()]:
            name, factor = COLUMNS[column][:2]
            once = name == "peak_mem_mb"
            own = ours.loc[(parameter, "miou" if once else name)]
            changes = own[["change", "change_lo", "change_hi"]].astype(float)
            if once:
                peaks = table.loc[table["parameter"] == parameter, name]
                changes = np.array([peaks.iloc[-1] - peaks.iloc[0], NAN, NAN])
            row = dict(zip(("change", "change_lo", "change_hi"), factor * changes))
            row |= {"parameter": parameter, "column": column, **own[["first", "last"]]}
            row["n_images"] = NAN if once else own["n_images"]
            row["paper_change"] = end[column] - start[column]
            said = verdict(row["paper_change"], *(factor * changes), once)
            same = (own["first"], own["last"]) == (start["value"], end["value"])
            rows.append({**row, "verdict": said if same else OTHER_VALUES})
    return pd.DataFrame(rows, columns=list(SIGN_COLUMNS))


def verdict(
    paper_change: float, change: float, low: float, high: float, measured_once: bool = False
) -> str:
    """Does our change have the sign of the paper's?

    Args:
        paper_change: the paper's change.
        change: ours; NaN where it was not measured.
        low, high: the ends of its interval; NaN where it has none.
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


def beside_for_people(compared: pd.DataFrame, parts: tuple[str, ...] = PARTS) -> pd.DataFrame:
    """`main_beside` or `ablation_beside` as text, headings of the quantities over their parts."""
    shown = {("", "Data set"): compared["dataset"], ("", "Method"): compared["method"].map(title)}
    for column in COMPARED:
        quantity = COLUMNS[column]
        for part in parts:
            text = signed if part == "difference" else number
            values = compared[f"{column}_{part}"]
            shown[quantity.heading, part] = [text(value, quantity.digits) for value in values]
    return pd.DataFrame(shown)


def steps_for_people(steps: pd.DataFrame) -> pd.DataFrame:
    """`step_table` as text."""
    rows = []
    for row in steps.to_dict("records"):
        who = "the paper" if row["source"] == "paper" else "ours"
        shown = {"Step": f"with {row['step']}", "Figures of": f"{who}, {row['dataset']}"}
        for column in ("miou", "n_masks", "peak_mem_gb"):
            heading = COLUMNS[column].heading.replace("%", "points")
            shown[heading] = _change(column, row, column)
        rows.append(shown)
    return pd.DataFrame(rows)


def signs_for_people(table: pd.DataFrame) -> pd.DataFrame:
    """`sign_table` as text."""
    return pd.DataFrame(
        {
            "Parameter": f"{row['parameter']} {row['first']:g} to {row['last']:g}",
            "Column": COLUMNS[row["column"]].heading.split()[0],
            "Sign": row["verdict"],
            "The paper": _change(row["column"], row, "paper_change"),
            "Ours": _change(row["column"], row, "change"),
            "Unit": COLUMNS[row["column"]].unit,
            "Images": number(row["n_images"], 0),
        }
        for row in table.to_dict("records")
    )


def signs_sentence(table: pd.DataFrame) -> str:
    """How many signs agree, in one sentence."""
    texts = {
        AGREES: "agree with ours",
        DISAGREES: "disagree",
        NOT_CLEAR: "not clear",
        NOT_MEASURED: "not measured",
        OTHER_VALUES: "of other values",
    }
    counts = {name: (table["verdict"] == name).sum() for name in texts}
    parts = [f"{n} {texts[name]}" for name, n in counts.items() if n or name == AGREES]
    return f"Of {len(table)} signs of the paper's sweeps: {', '.join(parts)}."


def _change(column: str, row: dict, name: str) -> str:
    """A change with its sign, and its interval where the row has one."""
    interval = (row.get(f"{name}_{end}", NAN) for end in ("lo", "hi"))
    return with_interval(row[name], *interval, COLUMNS[column].change_digits)


def _beside(theirs: pd.DataFrame, summary: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """Rows of a table of the paper, ours beside those of the data set that matches."""
    ours = summary.set_index("method").reindex(theirs["method"])
    compared = theirs[["dataset", "method"]].reset_index(drop=True)
    matches = compared["dataset"] == paper_dataset(dataset)
    for column in COMPARED:
        name, factor = COLUMNS[column][:2]
        compared[f"{column}_paper"] = theirs[column].to_numpy(dtype=float)
        own = pd.Series(factor * ours[name].to_numpy(dtype=float))
        compared[f"{column}_ours"] = own.where(matches)
        compared[f"{column}_difference"] = compared[f"{column}_ours"] - compared[f"{column}_paper"]
    return compared
