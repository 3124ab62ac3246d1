"""AoP-SAM against regular grids at equal numbers of prompts decoded.

    python -m aopsam_lab.study.prompts --dataset photos --out reports/prompts

Each grid is compared with `aop` where it may decode as many prompts, strongest first: with its
default sampling, and with one chosen for that number of prompts. Few prompts should lie apart, to
spread over the image; for many the map must have as many peaks.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure

from aopsam_lab.asf import AsfParams
from aopsam_lab.study import figures, tables
from aopsam_lab.study.report import write_all
from aopsam_lab.study.runner import run_settings
from aopsam_lab.study.settings import GRIDS, Setting, StudyConfig

DENSE, MOST = "amg_d", 32**2  # the dense grid and its number of prompts
SIDES = {grid.side**2: name for name, grid in GRIDS.items()} | {MOST: DENSE}
LIMITS = sorted([*SIDES, int(0.4 * MOST)])  # with 0.4 of them it should come near
# Chosen on held-out training photographs: `python -m aopsam_lab.training.trials prompts`.
APART = AsfParams(smoothing=0.5, confidence=0.01, spacing=3.0)
EVERY_PEAK = AsfParams(smoothing=0.25, confidence=0.005, spacing=2.0)
SAMPLINGS = {
    "aop": dict.fromkeys(LIMITS, AsfParams()),
    "aop, chosen": {limit: APART if limit < 200 else EVERY_PEAK for limit in LIMITS},
}
CONFIG = StudyConfig(
    n_images=None, timed_images=0, memory=False, thresholds=(), out="reports/prompts"
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


def figure(per_image: pd.DataFrame, measure: str = "miou") -> Figure:
    """The mean of a measure by prompts decoded: a line for the grids, one for each sampling."""
    means = per_image.groupby("method")[["n_decoded", measure]].mean()
    means = means.sort_values("n_decoded").reset_index()
    lines = dict.fromkeys(SIDES.values(), "regular grids") | {"aop, chosen": "AoP-SAM, chosen"}
    means["method"] = means["method"].str.replace(", at most .*", "", regex=True).replace(lines)
    return figures.curve_figure(means.assign(own=False), "n_decoded", "prompts decoded")


def compare(config: StudyConfig = CONFIG) -> pd.DataFrame:
    """Score all settings, write `prompts.csv`, `per_image.csv`, figures; return the comparison."""
    per_image = run_settings(config, settings(), reference="aop, at most 100").per_image
    table = comparison(per_image)
    contents = {"per_image.csv": per_image, "prompts.csv": table}
    for measure in ("miou", "coverage"):
        if measure in per_image and per_image[measure].notna().any():
            contents[f"{measure}_by_prompts.png"] = figure(per_image, measure)
    write_all(config.out, contents)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: fields of StudyConfig."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for name in ("dataset", "sam", "predictor", "out"):
        parser.add_argument(f"--{name}", default=getattr(CONFIG, name))
    parser.add_argument("--n-images", type=int, help="all if not given")
    table = compare(replace(CONFIG, **vars(parser.parse_args(argv))))
    print(table.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
