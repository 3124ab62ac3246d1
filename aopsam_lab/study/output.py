"""A study's result on disk, and as HTML."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from aopsam_lab.files import write_atomically
from aopsam_lab.study import figures, thresholds
from aopsam_lab.study.threshold_figure import threshold_figure

if TYPE_CHECKING:
    from aopsam_lab.study.runner import StudyResult
    from aopsam_lab.study.sweeps import SweepResult

SHOWN_METHODS = ("aop", "amg_d")  # whose masks are drawn


def save_result(
    result: StudyResult, name: str, shown: Sequence[str] = SHOWN_METHODS
) -> dict[str, Path]:
    """Write a result to its folder; the paths by what they hold. shown: methods whose masks are drawn, if run.

    `<name>.csv` (summary), `<name>_differences.csv`, `per_image.csv`, `<name>.png` (the figure), `examples.png` and
    `provenance.json`; and where the result has curves, `thresholds.csv`,
    `thresholds_per_image.csv`, `equal_masks.csv` and `thresholds.png`.
    """
    shown = [method for method in shown if method in set(result.summary["method"])]
    shown = shown or result.summary["method"].tolist()[: len(SHOWN_METHODS)]
    # a mean over fewer images than the others' would mislead beside them
    everywhere = result.summary[result.summary["n_images"] == result.summary["n_images"].max()]
    contents = {
        "summary": (f"{name}.csv", to_csv(result.summary)),
        "differences": (f"{name}_differences.csv", to_csv(result.differences)),
        "per_image": ("per_image.csv", to_csv(result.per_image)),
        "figure": (f"{name}.png", figures.png(figures.tradeoff_figure(everywhere))),
        "examples": ("examples.png", figures.png(figures.examples_figure(result.examples, shown))),
        "provenance": ("provenance.json", json.dumps(result.provenance, indent=2) + "\n"),
        **_curve_files(result),
    }
    return {
        key: write_atomically(result.out / file, content)
        for key, (file, content) in contents.items()
    }


def _curve_files(result: StudyResult) -> dict[str, tuple[str, str | bytes]]:
    if result.curves.empty:
        return {}
    summary = thresholds.summary_of_curves(result.curves)
    return {
        "thresholds": ("thresholds.csv", to_csv(summary)),
        "curves": ("thresholds_per_image.csv", to_csv(result.curves)),
        "equal_masks": ("equal_masks.csv", to_csv(thresholds.equal_masks(result.curves))),
        "threshold_figure": ("thresholds.png", figures.png(threshold_figure(summary))),
    }


def save_sweeps(result: SweepResult, name: str) -> dict[str, Path]:
    """Write what sweeps found to their folder; the paths by what they hold.

    `<name>.csv` (one row a knob and value), `trends.csv`, `paper_signs.csv` (whether they have the
    paper's sign), `budgets.csv`, `per_image.csv`, `<name>.png` (the four parameters' panels),
    `joint.png` (mIoU against time) and `provenance.json`.
    """
    from aopsam_lab.study.sweep_figures import joint_figure, sweep_figure

    contents = {
        "table": (f"{name}.csv", to_csv(result.table)),
        "trends": ("trends.csv", to_csv(result.trends)),
        "signs": ("paper_signs.csv", to_csv(result.signs)),
        "budgets": ("budgets.csv", to_csv(result.budgets)),
        "per_image": ("per_image.csv", to_csv(result.study.per_image)),
        "figure": (f"{name}.png", figures.png(sweep_figure(result.table))),
        "joint": ("joint.png", figures.png(joint_figure(result.table))),
        "provenance": ("provenance.json", json.dumps(result.study.provenance, indent=2) + "\n"),
    }
    return {
        key: write_atomically(result.study.out / file, content)
        for key, (file, content) in contents.items()
    }


def to_csv(table: pd.DataFrame) -> str:
    """CSV with six significant digits, NaN as an empty field."""
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def html_table(table: pd.DataFrame, highlight: str | None = None, text_columns: int = 1) -> str:
    """A DataFrame of text as an HTML table; the first `text_columns` columns left-aligned, the others right.

    highlight: the row whose first field this is gets the class `own`. Columns of two levels get two
    rows of headings, the upper ones spanning the columns that have them in common.
    """
    align = ["left" if i < text_columns else "right" for i in range(table.shape[1])]
    names = [str(name) for name in table.columns.get_level_values(-1)]
    head = "".join(
        f'<th scope="col" class="{a}">{html.escape(name)}</th>' for a, name in zip(align, names)
    )
    if table.columns.nlevels == 2:
        upper = []
        for name, own in itertools.groupby(table.columns.get_level_values(0)):
            kind = 'th scope="colgroup" class="group"' if name else "td"
            upper.append(f'<{kind} colspan="{len(list(own))}">{html.escape(name)}</{kind[:2]}>')
        head = f"{''.join(upper)}</tr><tr>{head}"
    lines = [f"<table><thead><tr>{head}</tr></thead><tbody>"]
    for row in table.itertuples(index=False):
        own = ' class="own"' if highlight is not None and row[0] == highlight else ""
        cells = "".join(
            f'<td class="{a}">{html.escape(str(value))}</td>'
            for a, value in zip(align[1:], row[1:])
        )
        lines.append(
            f'<tr{own}><th scope="row" class="{align[0]}">{html.escape(str(row[0]))}</th>{cells}</tr>'
        )
    return "\n".join([*lines, "</tbody></table>"])


TABLE_STYLE = """
.results { overflow-x: auto; }
.results table { border-collapse: collapse; font-size: 0.85rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
.results th, .results td { padding: 0.42em 0.6em; border-bottom: 1px solid #e3e5e8; vertical-align: baseline; }
.results td { white-space: nowrap; }
.results thead th { border-bottom: 1.5px solid #1b1b1b; font-weight: 600; vertical-align: bottom; }
.results thead .group { text-align: center; border-bottom: 1px solid #1b1b1b; }
.results thead tr:not(:last-child) td { border-bottom: 0; }
.results tbody th { font-weight: 400; white-space: nowrap; }
.results .left { text-align: left !important; }
.results .right { text-align: right !important; }
.results tr.own th, .results tr.own td { background: #e8f5f0; font-weight: 600; }
"""


def styled_table(table: pd.DataFrame, highlight: str | None = None, text_columns: int = 1) -> str:
    """`html_table` with its style, for a notebook's output."""
    return f'<style>{TABLE_STYLE}</style><div class="results">{html_table(table, highlight, text_columns)}</div>'
