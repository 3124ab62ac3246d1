"""What the paper printed beside what we measured, as HTML for the reports and their notebooks."""

from __future__ import annotations

import html
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from aopsam_lab.study import paper, tables
from aopsam_lab.study.output import html_table

SAM_TITLES = {
    "mobile_sam": "MobileSAM",
    "vit_b": "ViT-B",
    "vit_l": "ViT-L",
    "vit_h": "ViT-H",
}
# The paper's column -> its name with its unit, the unit of its change, digits of both.
NAMES = {
    "miou": ("mIoU %", "points", 1, 1),
    "inf_lat_s": ("Inf_Lat s", "s", 3, 3),
    "mask_lat_s": ("Mask_Lat s", "s", 3, 3),
    "peak_mem_gb": ("Peak_Mem GB", "GB", 2, 3),
    "elim_ratio_percent": ("Ratio_elim %", "points", 1, 1),
    "n_masks": ("#P", "masks", 1, 1),
}
OTHER_STUDY = (
    "The pictures and the machines differ, and so do the Prompt Predictor and the detector: a "
    "difference is one between two studies, not between two methods."
)
UNITS = (
    "All figures are in the paper's units; our Peak_Mem is converted from MiB to GB (10^9 bytes). "
    "On a CPU it is the memory beyond the loaded models, on a GPU the whole allocation. –: a cell "
    "that the paper leaves empty, or that we did not measure."
)
NO_SAM = (
    "The poster's ablation names no SAM; its rows are close to those of ViT-H in the main table."
)
OTHER_SAM = "As the SAMs differ, compare the steps rather than the rows."
STEPS_NOTE = (
    "A step is the method with the part minus the method without it; brackets: the 95% paired "
    "bootstrap interval over images. Peak_Mem is measured once a method, and has none."
)
SIGNS_NOTE = (
    "The change from the parameter's first value to its last, in the paper's units, ours with its "
    "95% paired bootstrap interval over images. agrees, disagrees: whether ours has the paper's "
    "sign; not clear: our interval contains 0. Mask_Lat is measured on the timed images alone, and "
    "its interval is over those. Peak_Mem is measured once a setting: it has no interval, and its "
    "sign alone decides. The poster has Peak_Mem along confidence and spacing only (along "
    "smoothing it repeats the elimination ratios by mistake), and names neither the data set nor "
    "the SAM of its sweeps."
)


def main_comparison(summary: pd.DataFrame, provenance: dict[str, Any]) -> str:
    """The paper's main table beside ours, or the sentence that says why there is none.

    Args:
        summary: as `tables.summary_table` gives it.
        provenance: of the same study.

    Returns:
        HTML.
    """
    sam, dataset = provenance["parameters"]["sam"], provenance["dataset"]["name"]
    matched = paper.paper_dataset(dataset)
    if matched is None:
        return _sentence(
            f"The paper has no data set that “{dataset}” could stand beside, so none of its "
            "figures is shown."
        )
    compared = paper.side_by_side(summary, sam, dataset)
    if compared.empty:
        return _sentence(f"The paper has no figures of the SAM “{sam}”, so none is shown.")
    shown = pd.DataFrame(
        {("", "Method"): compared["method"].map(tables.title), **_cells(compared, paper.PARTS)}
    )
    about = f"The paper's rows are {matched}'s with {SAM_TITLES[sam]}, ours are of “{dataset}”."
    text = _sentence(f"{about} {OTHER_STUDY} {UNITS}")
    return _results(shown, tables.title(tables.REFERENCE), 1) + text


def ablation(summary: pd.DataFrame, per_image: pd.DataFrame, provenance: dict[str, Any]) -> str:
    """The paper's ablation with ours beside the data set that matches, and the steps of both.

    Args:
        summary: as `tables.summary_table` gives it.
        per_image: as `tables.per_image_table` gives it.
        provenance: of the same study.

    Returns:
        HTML.
    """
    sam, dataset = provenance["parameters"]["sam"], provenance["dataset"]["name"]
    matched = paper.paper_dataset(dataset)
    compared = paper.ablation_beside(summary, dataset)
    shown = pd.DataFrame(
        {
            ("", "Data set"): compared["dataset"],
            ("", "Method"): compared["method"].map(tables.title),
            **_cells(compared, paper.PARTS if matched else paper.PARTS[:1]),
        }
    )
    about = f"{NO_SAM} Ours are of “{dataset}” with {SAM_TITLES.get(sam, sam)}"
    if matched is None:
        about += ", which no data set of the paper matches."
    else:
        other = "" if sam == "vit_h" else f" {OTHER_SAM}"
        about += f", beside the paper's {matched}.{other} {OTHER_STUDY} {UNITS}"
    steps = steps_for_people(paper.step_table(per_image, summary, dataset))
    tables_and_texts = (
        (_results(shown, matched, 2), about),
        (_results(steps, None, 2), STEPS_NOTE),
    )
    return "".join(table + _sentence(text) for table, text in tables_and_texts)


def signs(table: pd.DataFrame) -> str:
    """The signs of the sweeps beside the paper's.

    Args:
        table: as `paper.sign_table` gives it.

    Returns:
        HTML.
    """
    first = f"<p>{html.escape(signs_sentence(table))}</p>\n"
    return first + _results(signs_for_people(table), None, 3) + _sentence(SIGNS_NOTE)


def steps_for_people(steps: pd.DataFrame) -> pd.DataFrame:
    """The rows of `paper.step_table` as text."""
    rows = []
    for row in steps.to_dict("records"):
        who = "the paper" if row["source"] == "paper" else "ours"
        shown = {"Step": f"with {row['step']}", "Figures of": f"{who}, {row['dataset']}"}
        for column in ("miou", "n_masks"):
            interval = row[f"{column}_lo"], row[f"{column}_hi"]
            heading = NAMES[column][0].replace("%", "points")
            shown[heading] = _change(column, row[column], *interval)
        shown[NAMES["peak_mem_gb"][0]] = _change("peak_mem_gb", row["peak_mem_gb"])
        rows.append(shown)
    return pd.DataFrame(rows)


def signs_for_people(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `paper.sign_table` as text."""
    rows = []
    for row in table.to_dict("records"):
        column = row["column"]
        rows.append(
            {
                "Parameter": f"{row['parameter']} {row['first']:g} to {row['last']:g}",
                "Column": NAMES[column][0].split()[0],
                "Sign": row["verdict"],
                "The paper": _change(column, row["paper_change"]),
                "Ours": _change(column, row["change"], row["change_lo"], row["change_hi"]),
                "Unit": NAMES[column][1],
                "Images": _plain(row["n_images"], 0),
            }
        )
    return pd.DataFrame(rows)


def signs_sentence(table: pd.DataFrame) -> str:
    """How many signs agree, in one sentence."""
    counts = Counter(table["verdict"])
    texts = {
        paper.AGREES: "agree with ours",
        paper.DISAGREES: "disagree",
        paper.NOT_CLEAR: "not clear",
        paper.NOT_MEASURED: "not measured",
        paper.OTHER_VALUES: "of other values",
    }
    parts = [
        f"{counts[name]} {text}"
        for name, text in texts.items()
        if counts[name] or name == paper.AGREES
    ]
    return f"Of {len(table)} signs of the paper's sweeps: {', '.join(parts)}."


def _cells(compared: pd.DataFrame, parts: tuple[str, ...]) -> dict[tuple[str, str], list[str]]:
    """A comparison as text, by its two headings: the quantity, and whose number it is."""
    shown = {}
    for column in paper.COMPARED:
        heading, _, digits, _ = NAMES[column]
        for part in parts:
            text = _signed if part == "difference" else _plain
            shown[heading, part] = [text(v, digits) for v in compared[f"{column}_{part}"]]
    return shown


def _change(column: str, change: float, low: float = np.nan, high: float = np.nan) -> str:
    """A change with its sign, and its interval where it has one."""
    change, low, high = (_signed(value, NAMES[column][3]) for value in (change, low, high))
    return change if "–" in (low, high) else f"{change} [{low}, {high}]"


def _plain(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if np.isfinite(value) else "–"


def _signed(value: float, digits: int) -> str:
    """With its sign; what rounds to zero has none."""
    if not np.isfinite(value):
        return "–"
    text = f"{value:+,.{digits}f}"
    return text if text.strip("+-0.,") else text[1:]


def _results(shown: pd.DataFrame, highlight: str | None, text_columns: int) -> str:
    return f'<div class="results">{html_table(shown, highlight, text_columns)}</div>'


def _sentence(text: str) -> str:
    return f'<p class="muted">{html.escape(text)}</p>\n'
