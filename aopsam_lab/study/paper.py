"""The paper's own figures, kept in one file with their source and shown beside ours, never mixed with them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

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
# Slips in what the authors published, to be kept in mind wherever those columns are shown.
SLIPS = (
    "On the poster, the Peak_Mem column of sweep (a), smoothing, repeats the elimination ratios of sweep (d).",
    'On the poster, "6.6MB peak" in the text is 6.6 GB.',
)


def paper_figures() -> pd.DataFrame:
    """The paper's figures that are known here, one a row.

    Columns: table, row, device, metric, value, unit; checked ("paper": read in the paper itself; "second-hand": as
    another source quotes it); source.
    """
    return pd.read_csv(PAPER_FILE, keep_default_na=False)


def paper_trends() -> pd.DataFrame:
    """What is known here of the direction in which the paper's columns move along its knobs, one a row.

    Columns: knob; column (as in the sweeps' tables); trend, "rises" or "falls"; checked and source: as paper_figures.
    """
    return pd.read_csv(PAPER_FILE.with_name("paper_trends.csv"), keep_default_na=False)


def paper_curve(knob: str, metric: str) -> pd.DataFrame:
    """The paper's curve of a metric ("mIoU" or "#P") along a knob: columns knob_value and value, empty where not known.

    Its points are rows of the paper's figures named after knob and value, as "smoothing 2".
    """
    known = paper_figures()
    rows = known[(known["metric"] == metric) & known["row"].str.match(rf"{knob} [\d.]+$")]
    values = rows["row"].str.split().str[-1].astype(float)
    return pd.DataFrame({"knob_value": values, "value": rows["value"].astype(float)})
