"""AoP-SAM against regular grids at equal numbers of prompts decoded.

Each grid is compared with `aop` where it may decode as many prompts, strongest first: with its
default sampling, and with one chosen for that number of prompts. Few prompts should lie apart, to
spread over the image; for many the map must have as many peaks.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from aopsam_lab.asf import AsfParams
from aopsam_lab.study import figures, tables
from aopsam_lab.study.report import write_all
from aopsam_lab.study.runner import StudyResult, run_settings
from aopsam_lab.study.settings import GRIDS, Setting, StudyConfig

DENSE, MOST = "amg_d", 32**2  # the dense grid and its number of prompts
SIDES = {grid.side**2: name for name, grid in GRIDS.items()} | {MOST: DENSE}
LIMITS = sorted([*SIDES, int(0.4 * MOST)])  # with 0.4 of them it should come near
# Chosen on held-out training photographs: `python -m aopsam_lab.training.trials prompts`.
APART = AsfParams(smoothing=0.5, confidence=0.01, spacing=3.0)
EVERY_PEAK = AsfParams(smoothing=0.25, confidence=0.005, spacing=2.0)
RAW_MAP = AsfParams(smoothing=0.0, confidence=0.005, spacing=1.0, elimination=2.0)
CHOSEN = {limit: APART if limit < 200 else EVERY_PEAK for limit in LIMITS} | {MOST: RAW_MAP}
SAMPLINGS = {"aop": dict.fromkeys(LIMITS, AsfParams()), "aop, chosen": CHOSEN}
CONFIG = StudyConfig(
    n_images=None, timed_images=0, memory=False, thresholds=(), out="reports/equal_prompts"
)


def settings() -> list[Setting]:
    """Grids, and AoP-SAM at each of SAMPLINGS with as many prompts as these."""
    ours = [
        Setting(f"{name}, at most {limit}", "aop", params, limit)
        for name, samplings in SAMPLINGS.items()
        for limit, params in samplings.items()
    ]
    return [Setting(name, name, AsfParams()) for name in SIDES.values()] + ours


def comparison(per_image: pd.DataFrame) -> pd.DataFrame:
    """One row a sampling of AoP-SAM and number of prompts: its scores and the grid's.

    Of each measure its mean, the grid's, and their difference with its paired 95% interval.
    """
    by_label, rows = tables.by_method(per_image), []
    for sampling in SAMPLINGS:
        for limit in LIMITS:
            ours, name = by_label[f"{sampling}, at most {limit}"], SIDES.get(limit, DENSE)
            row = {"sampling": sampling, "limit": limit, "grid": name}
            row |= {"prompts": ours["n_decoded"].mean(), "masks": ours["n_masks"].mean()}
            for measure in [m for m in ("miou", "ar_100", "coverage") if m in per_image]:
                grid = by_label[name][measure]
                row |= {measure: ours[measure].mean(), f"{measure}_grid": grid.mean()}
                change = tables.interval_columns(measure, ours[measure] - grid)
                row |= {f"{measure}_diff": change.pop(measure), **change}
            rows.append(row)
    return pd.DataFrame(rows)


def figure(per_image: pd.DataFrame) -> Figure:
    """Means of measures by prompts decoded: a line for the grids, one for each sampling."""
    known = per_image.dropna(axis="columns", how="all")
    shown = [name for name in figures.CURVE_TITLES if name in known]
    means = per_image.groupby("method")[["n_decoded", *shown]].mean()
    means = means.sort_values("n_decoded").reset_index()
    lines = dict.fromkeys(SIDES.values(), "regular grids") | {"aop, chosen": "AoP-SAM, chosen"}
    means["method"] = means["method"].str.replace(", at most .*", "", regex=True).replace(lines)
    return figures.curve_figure(means.assign(own=False), "n_decoded", "prompts decoded")


def compare(**changes: Any) -> tuple[StudyResult, pd.DataFrame]:
    """Score all settings, with `changes` to CONFIG; what was found, and its comparison."""
    result = run_settings(replace(CONFIG, **changes), settings(), reference="aop, at most 100")
    return result, comparison(result.per_image)


def save(result: StudyResult, table: pd.DataFrame) -> dict[str, Path]:
    """Write a comparison to the study's folder."""
    contents = {
        "equal_prompts.csv": table,
        "per_image.csv": result.per_image,
        "equal_prompts.png": figure(result.per_image),
        "provenance.json": result.provenance,
    }
    return write_all(result.out, contents)
