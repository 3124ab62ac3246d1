"""The ablation, and the sweeps of AoP-SAM's four parameters: what is run, and what its rows say."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from aopsam_lab.asf import AsfParams
from aopsam_lab.study import tables
from aopsam_lab.study.paper import CHANGE, sign_table
from aopsam_lab.study.runner import StudyResult, run_settings
from aopsam_lab.study.settings import Setting, StudyConfig
from aopsam_lab.study.tables import DIFFERENCE, SUMMARY_COLUMNS

SWEEPS = StudyConfig(methods=("aop",), n_images=28, thresholds=(), out="reports/parameter_sweeps")
PARTS = ("aop_no_as_af", "aop_no_af", "aop", "aop_gated")
ABLATION = replace(SWEEPS, methods=PARTS, out="reports/ablation")
SWEPT = {  # the paper's values
    "smoothing": (1.0, 2.0, 3.0, 4.0),
    "confidence": (0.1, 0.2, 0.3, 0.4),
    "spacing": (4.0, 5.0, 6.0, 7.0),
    "elimination": (1.25, 1.3, 1.35, 1.4),
}
Values = Mapping[str, Sequence[float]]  # what each parameter is set to, by its name
DEFAULT = "default"  # the label of the setting that a sweep departs from
BUDGETS = (25, 50, 100)
SWEEP_COLUMNS = ("parameter", "value", "is_default", *SUMMARY_COLUMNS[1:], *DIFFERENCE)
TREND_COLUMNS = ("parameter", "column", "first", "last", "n_images", *CHANGE, "trend")
BUDGET_COLUMNS = ("budget", *SWEPT, *tables.MIOU, *DIFFERENCE, "n_decoded", "n_decoded_max")
TREND_NAMES = {  # column: its name, what its numbers are multiplied by to be shown, their unit
    "miou": ("mIoU", 100, " points"),
    "n_masks": ("#P", 1, " masks"),
    "n_decoded": ("prompts decoded", 1, ""),
    "inf_lat_s": ("Inf_Lat", 1000, " ms"),
    "mask_lat_s": ("Mask_Lat", 1000, " ms"),
    "elim_ratio": ("the eliminated share", 100, " points"),
}


@dataclass(frozen=True)
class SweepResult:
    """What the sweeps found."""

    study: StudyResult  # its methods are labels of settings, its reference is the default setting
    table: pd.DataFrame  # see sweep_table
    trends: pd.DataFrame  # see trend_table
    signs: pd.DataFrame  # see sign_table
    budgets: pd.DataFrame  # see budget_table


def run_sweeps(
    config: StudyConfig = SWEEPS,
    values: Values = SWEPT,
    budgets: Sequence[int] = BUDGETS,
    **changes: Any,
) -> SweepResult:
    """Run AoP-SAM over one parameter at a time, the others as the configuration has them.

    Args:
        config: what is asked for.
        values: what each parameter is set to.
        budgets: limits of decoded prompts for which the best setting is sought.
        **changes: fields of StudyConfig that are to be others than in `config`.
    """
    unknown = [name for name in values if name not in SWEPT]
    if unknown:
        raise ValueError(f"There is no parameter {unknown[0]!r}. Choose from {', '.join(SWEPT)}.")
    if any(budget < 1 for budget in budgets):
        raise ValueError(f"A budget is a number of prompts, 1 or more; got {min(budgets)}.")
    config = replace(config, **changes)
    values = {name: tuple(sorted(set(map(float, own)))) for name, own in values.items()}
    settings = sweep_settings(values, config.params, budgets)
    study = run_settings(config, settings, reference=DEFAULT)
    tried = {f"{name}_grid": list(own) for name, own in values.items()}
    study.provenance["parameters"] |= tried | {"budgets": list(budgets)}
    table, trends = sweep_table(study, values, config.params), trend_table(study.per_image, values)
    best = budget_table(study.per_image, settings)
    return SweepResult(study, table, trends, sign_table(trends, table), best)


def label(parameter: str, value: float) -> str:
    """The label of a setting that differs from the default in one parameter."""
    return f"{parameter} {value:g}"


def sweep_settings(values: Values, params: AsfParams, budgets: Sequence[int] = ()) -> list[Setting]:
    """The default, then every value of every parameter; each different one within each budget."""
    settings = [Setting(DEFAULT, "aop", params)]
    for name, own in values.items():
        for value in own:
            changed = replace(params, **{name: value})
            settings.append(Setting(label(name, value), "aop", changed))
    different: dict[AsfParams, Setting] = {}
    for setting in settings:
        different.setdefault(setting.params, setting)
    return settings + [
        replace(s, label=f"{s.label}, at most {budget}", max_prompts=budget)
        for budget in budgets
        for s in different.values()
    ]


def sweep_table(study: StudyResult, values: Values, params: AsfParams) -> pd.DataFrame:
    """SWEEP_COLUMNS, and coverage; one row a parameter and value, compared with the default."""
    swept = [(name, value, label(name, value)) for name, own in values.items() for value in own]
    table = pd.DataFrame(swept, columns=["parameter", "value", "method"])
    table["is_default"] = [getattr(params, name) == value for name, value, _ in swept]
    change = study.differences[["method", *DIFFERENCE]]
    table = table.merge(study.summary, on="method").merge(change, on="method")
    return tables.as_table(table, SWEEP_COLUMNS)


def trend_table(per_image: pd.DataFrame, values: Values) -> pd.DataFrame:
    """TREND_COLUMNS: does a column rise or fall from first to last value, image by image?"""
    by_label, rows = tables.by_method(tables.comparable(per_image)), []
    for name, own in values.items():
        for column in TREND_NAMES if len(own) > 1 else ():
            first, last = (by_label[label(name, own[i])][column] for i in (0, -1))
            change = last - first
            row = {"parameter": name, "column": column, "first": own[0], "last": own[-1]}
            interval = tables.interval_columns("change", change)
            decided = interval["change_lo"] > 0 or interval["change_hi"] < 0
            direction = "rises" if interval["change"] > 0 else "falls"
            row |= {**interval, "trend": direction if decided else "undecided"}
            rows.append(row | {"n_images": change.count()})
    return tables.as_table(rows, TREND_COLUMNS)


def budget_table(per_image: pd.DataFrame, settings: Sequence[Setting]) -> pd.DataFrame:
    """BUDGET_COLUMNS: for each budget the setting with the highest mIoU within it.

    miou_diff: to the default within the same budget. n_decoded: mean over images.
    """
    by_label, rows = tables.by_method(per_image), []
    for budget in dict.fromkeys(s.max_prompts for s in settings if s.max_prompts):
        held = [setting for setting in settings if setting.max_prompts == budget]
        miou = {setting: by_label[setting.label]["miou"] for setting in held}
        # of equals the first, so the default before others
        best = max(held, key=lambda setting: miou[setting].mean())
        decoded = by_label[best.label]["n_decoded"]
        row = {"budget": budget, **dataclasses.asdict(best.params)}
        row |= tables.interval_columns("miou", miou[best])
        row |= tables.interval_columns("miou_diff", miou[best] - miou[held[0]])
        rows.append(row | {"n_decoded": decoded.mean(), "n_decoded_max": decoded.max()})
    return tables.as_table(rows, BUDGET_COLUMNS)


def pareto_front(cost: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """(n,) bool: no other point is as good in cost and gain and better in one of them."""
    no_worse = (cost[None] <= cost[:, None]) & (gain[None] >= gain[:, None])
    better = (cost[None] < cost[:, None]) | (gain[None] > gain[:, None])
    return (no_worse & better).sum(axis=1) == 0


def parameter_for_people(table: pd.DataFrame, parameter: str) -> pd.DataFrame:
    """The rows of one parameter as text, in the columns of the other reports."""
    own = table[table["parameter"] == parameter]
    own = own.assign(method=own["value"].map("{:g}".format))
    shown = tables.results_for_people(own.drop(columns=list(DIFFERENCE)), own)
    headings = {"Method": parameter.capitalize(), "Δ to AoP-SAM": "Δ to the default"}
    return shown.rename(columns=headings)
