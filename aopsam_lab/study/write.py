"""What a study found, on disk: tables as CSV, figures as PNG, provenance as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from aopsam_lab.files import write_atomically
from aopsam_lab.study import figures, thresholds
from aopsam_lab.study.runner import StudyResult
from aopsam_lab.study.sweeps import SweepResult


def save_study(
    result: StudyResult, name: str = "main_comparison", shown: Sequence[str] = ("aop", "amg_d")
) -> dict[str, Path]:
    """Write a study's result to its folder.

    Args:
        result: as `run_study` returns it.
        name: of the report: `<name>.csv` is the summary, `<name>.png` the figure.
        shown: the methods whose masks are drawn, of those that were run.

    Returns:
        The paths of the files.
    """
    methods = result.summary["method"].tolist()
    shown = [method for method in shown if method in methods] or methods[:2]
    # a mean over fewer images than the others' would mislead beside them
    everywhere = result.summary[result.summary["n_images"] == result.summary["n_images"].max()]
    contents = {
        f"{name}.csv": result.summary,
        f"{name}_differences.csv": result.differences,
        "per_image.csv": result.per_image,
        f"{name}.png": figures.tradeoff_figure(everywhere),
        "examples.png": figures.examples_figure(result.examples, shown),
        "provenance.json": result.provenance,
    }
    if not result.curves.empty:
        summary = thresholds.summary_of_curves(result.curves)
        contents |= {
            "thresholds.csv": summary,
            "thresholds_per_image.csv": result.curves,
            "equal_masks.csv": thresholds.equal_masks(result.curves),
            "thresholds.png": figures.threshold_figure(summary),
        }
    return write_all(result.out, contents)


def save_sweeps(result: SweepResult, name: str = "parameter_sweeps") -> dict[str, Path]:
    """Write what sweeps found to the study's folder; the paths of the files."""
    contents = {
        f"{name}.csv": result.table,
        "trends.csv": result.trends,
        "paper_signs.csv": result.signs,
        "budgets.csv": result.budgets,
        "per_image.csv": result.study.per_image,
        f"{name}.png": figures.sweep_figure(result.table),
        "joint.png": figures.joint_figure(result.table),
        "provenance.json": result.study.provenance,
    }
    return write_all(result.study.out, contents)


def write_all(
    folder: str | Path, contents: dict[str, pd.DataFrame | Figure | dict[str, Any]]
) -> dict[str, Path]:
    """Write tables, figures and dictionaries to a folder; the paths by the files' names."""
    texts = {
        pd.DataFrame: to_csv,
        Figure: figures.png,
        dict: lambda facts: json.dumps(facts, indent=2) + "\n",
    }
    return {
        file: write_atomically(Path(folder) / file, texts[type(content)](content))
        for file, content in contents.items()
    }


def to_csv(table: pd.DataFrame) -> str:
    """CSV with six significant digits, NaN as an empty field."""
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
