"""The paper's own figures, kept in one file with their source and shown beside ours, never mixed with them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from aopsam_lab.study.tables import TITLES

PAPER_FILE = Path(__file__).with_name("paper.csv")
CITATION = (
    "Chen, Son, Hua, Kim: AoP-SAM: Automation of Prompts for Efficient Segmentation. AAAI 2025, 39(2), 2284-2292, "
    "arXiv:2505.11980"
)
MISSING = (
    "The rows of the paper's main table (mIoU, Inf_Lat, Peak_Mem and #P on SA-1B, COCO and LVIS), of its ablation and "
    "of its four parameter sweeps are not here: its text was not at hand when this file was made, and no figure is "
    "entered that was not read somewhere."
)
# The rows of the paper's main table by our names, and its columns: ours, and what a unit is in that of ours.
ROWS = ("amg_s", "amg_d", "oas_box", "oas_point", "aop")
COLUMNS = {
    "mIoU": ("miou", 100, "%", {"%": 1}),
    "Inf_Lat": ("inf_lat_s", 1000, "ms", {"ms": 1, "s": 1000}),
    "Peak_Mem": ("peak_mem_mb", 1, "MiB", {"MiB": 1, "MB": 1, "GB": 1000}),
    "#P": ("n_masks", 1, "", {"masks": 1, "": 1}),
}
DATASETS = ("sa1b", "coco", "lvis")
# Slips in what the authors published, to be kept in mind wherever those columns are shown.
SLIPS = (
    "On the poster, the Peak_Mem column of sweep (a), smoothing, repeats the elimination ratios of sweep (d).",
    'On the poster, "6.6MB peak" in the text is 6.6 GB.',
)


def paper_figures() -> pd.DataFrame:
    """The paper's figures that are known here, one a row.

    Columns: table, row (a method's title, or a knob and its value), sam and dataset (as in `make study`; "" where they
    are not known or it is none of them), device, metric, value, unit; checked ("paper": read in the paper itself; "second-hand": as
    another source quotes it); source.
    """
    return pd.read_csv(PAPER_FILE, keep_default_na=False)


def paper_trends() -> pd.DataFrame:
    """What is known here of the direction in which the paper's columns move along its knobs, one a row.

    Columns: knob; column (as in the sweeps' tables); trend, "rises" or "falls"; checked and source: as paper_figures.
    """
    return pd.read_csv(PAPER_FILE.with_name("paper_trends.csv"), keep_default_na=False)


def side_by_side(summary: pd.DataFrame, sam: str, dataset: str) -> pd.DataFrame:
    """The paper's main table for one SAM and data set, row by row and column by column: its figure, ours, ours minus its.

    summary: as `tables.summary_table` gives it. dataset: a data set's name, of which COCO's and LVIS's end in the split.
    Columns: method (title), and for each column of the paper "NAME UNIT: paper", ": ours" and ": difference", NaN where
    a figure is not known or a method was not run. Empty for data sets that the paper does not have.
    """
    kind = dataset.split("-")[0]
    if kind not in DATASETS:
        return pd.DataFrame()
    known = paper_figures()
    known = known[(known["sam"] == sam) & (known["dataset"] == kind)]
    ours = summary.set_index("method")
    rows = []
    for method in ROWS:
        row: dict[str, object] = {"method": TITLES[method]}
        for name, (column, scale, unit, units) in COLUMNS.items():
            its = known[(known["row"] == TITLES[method]) & (known["metric"] == name)]
            theirs = float(its["value"].iloc[0]) * units[its["unit"].iloc[0]] if len(its) else float("nan")
            found = scale * float(ours.loc[method, column]) if method in ours.index else float("nan")
            heading = f"{name} {unit}".strip()
            row |= {f"{heading}: paper": theirs, f"{heading}: ours": found, f"{heading}: difference": found - theirs}
        rows.append(row)
    return pd.DataFrame(rows)


def paper_curve(knob: str, metric: str) -> pd.DataFrame:
    """The paper's curve of a metric ("mIoU" or "#P") along a knob: columns knob_value and value, empty where not known.

    Its points are rows of the paper's figures named after knob and value, as "smoothing 2".
    """
    known = paper_figures()
    rows = known[(known["metric"] == metric) & known["row"].str.match(rf"{knob} [\d.]+$")]
    values = rows["row"].str.split().str[-1].astype(float)
    return pd.DataFrame({"knob_value": values, "value": rows["value"].astype(float)})
