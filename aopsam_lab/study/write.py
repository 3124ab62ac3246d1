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
    """Write a study, a report's `name`, to its folder; the paths of the files by their names.

    Of the methods `shown`, where they were run, the masks are drawn.
    """
    methods = result.summary["method"].tolist()
    shown = [method for method in shown if method in methods] or methods[:2]
    contents = {
        f"{name}.csv": result.summary,
        f"{name}_differences.csv": result.differences,
        "per_image.csv": result.per_image,
        f"{name}.png": figures.tradeoff_figure(result.summary),
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


def save_sweeps(result: SweepResult) -> dict[str, Path]:
    """Write what sweeps found to the study's folder; the paths of the files by their names."""
    contents = {
        "parameter_sweeps.csv": result.table,
        "trends.csv": result.trends,
        "paper_signs.csv": result.signs,
        "budgets.csv": result.budgets,
        "per_image.csv": result.study.per_image,
        "parameter_sweeps.png": figures.sweep_figure(result.table),
        "joint.png": figures.joint_figure(result.table),
        "provenance.json": result.study.provenance,
    }
    return write_all(result.study.out, contents)


def write_all(
    folder: str | Path, contents: dict[str, pd.DataFrame | Figure | dict[str, Any]]
) -> dict[str, Path]:
    """Write tables, figures and dictionaries to a folder; the paths by the files' names."""
    paths = {}
    for file, content in contents.items():
        if isinstance(content, pd.DataFrame):  # six significant digits, NaN as an empty field
            data = content.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        elif isinstance(content, Figure):
            data = figures.png(content)
        else:
            data = json.dumps(content, indent=2) + "\n"
        paths[file] = write_atomically(Path(folder) / file, data)
    return paths
