"""The ablation, and the sweeps of AoP-SAM's four knobs: which settings are run, and what their rows say."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from aopsam_lab.asf import AsfParams
from aopsam_lab.evaluator import mean_interval
from aopsam_lab.study import tables
from aopsam_lab.study.paper import sign_table
from aopsam_lab.study.runner import TIMED_IMAGES, StudyResult, run_settings
from aopsam_lab.study.settings import Setting, Weights, check_methods

ABLATION = ("aop_no_as_af", "aop_no_af", "aop", "aop_gated")
GRIDS = {  # the paper's
    "smoothing": (1.0, 2.0, 3.0, 4.0),
    "confidence": (0.1, 0.2, 0.3, 0.4),
    "spacing": (4.0, 5.0, 6.0, 7.0),
    "elimination": (1.25, 1.3, 1.35, 1.4),
}
METHOD = "aop"
DEFAULT = "default"  # the label of the setting that a sweep departs from
BUDGETS = (25, 50, 100)

DIFFERENCE = ("miou_diff", "miou_diff_lo", "miou_diff_hi")
SWEEP_COLUMNS = ("knob", "value", "is_default", *tables.SUMMARY_COLUMNS[1:], *DIFFERENCE)
TREND_COLUMNS = (
    "knob", "column", "first", "last", "n_images", "change", "change_lo", "change_hi", "trend",
)  # fmt: skip
BUDGET_COLUMNS = (
    "budget",
    *GRIDS,
    "miou",
    "miou_lo",
    "miou_hi",
    *DIFFERENCE,
    "n_decoded",
    "n_decoded_max",
)
TREND_OF = ("miou", "n_masks", "n_decoded", "inf_lat_s", "mask_lat_s", "elim_ratio")
RISES, FALLS, UNDECIDED = "rises", "falls", "undecided"


def run_ablation(
    sam: str = "mobile_sam",
    methods: Sequence[str] = ABLATION,
    dataset: str | os.PathLike = "photos",
    n_images: int | None = 28,
    timed_images: int = TIMED_IMAGES,
    seed: int = 0,
    device: str = "auto",
    smoothing: float = 2.0,
    confidence: float = 0.2,
    spacing: float = 6.0,
    elimination: float = 1.3,
    out: str | os.PathLike = "reports/ablation",
    checkpoint: str | os.PathLike | None = None,
    predictor: str | os.PathLike | None = None,
    detector: str | os.PathLike | None = None,
    memory: bool = True,
    progress: bool = True,
) -> StudyResult:
    """AoP-SAM without its parts, each method on each image, with what they share computed once.

    timed_images: on how many of the first images each method is also run alone, which is where times come from. The
    other arguments and what is raised: as run_study.
    """
    methods = [methods] if isinstance(methods, str) else list(methods)
    check_methods(methods)
    params = AsfParams(smoothing, confidence, spacing, elimination)
    settings = [Setting(method, method, params) for method in methods]
    weights = Weights.of(sam, checkpoint, predictor, detector, device)
    return run_settings(
        settings,
        weights,
        dataset,
        n_images,
        seed,
        out,
        timed_images=timed_images,
        memory=memory,
        progress=progress,
    )


@dataclass(frozen=True)
class SweepResult:
    """What the sweeps found. `table`, `trends` and `budgets` have the columns SWEEP_, TREND_ and BUDGET_COLUMNS.

    signs: whether the trends have the paper's sign, as `paper.sign_table` gives it.
    study: the rows below all of it; its methods are labels of settings, and its reference is the default setting.
    """

    study: StudyResult
    grids: dict[str, tuple[float, ...]]
    table: pd.DataFrame
    trends: pd.DataFrame
    signs: pd.DataFrame
    budgets: pd.DataFrame

    def save(self, name: str = "parameter_sweeps") -> dict[str, Path]:
        """Write tables, figures and provenance to the study's folder; their paths by name."""
        from aopsam_lab.study.output import save_sweeps

        return save_sweeps(self, name)


def run_sweeps(
    sam: str = "mobile_sam",
    dataset: str | os.PathLike = "photos",
    n_images: int | None = 28,
    grids: Mapping[str, Sequence[float]] = GRIDS,
    budgets: Sequence[int] = BUDGETS,
    timed_images: int = TIMED_IMAGES,
    seed: int = 0,
    device: str = "auto",
    smoothing: float = 2.0,
    confidence: float = 0.2,
    spacing: float = 6.0,
    elimination: float = 1.3,
    out: str | os.PathLike = "reports/parameter_sweeps",
    checkpoint: str | os.PathLike | None = None,
    predictor: str | os.PathLike | None = None,
    memory: bool = True,
    progress: bool = True,
) -> SweepResult:
    """AoP-SAM over one knob at a time, the other three at the values given.

    grids: the values of each knob, by its name. budgets: limits of decoded prompts for which the best setting is
    sought. timed_images: on how many of the first images each setting is also run alone, which is where times come
    from. The other arguments and what is raised: as run_study; ValueError for a knob that does not exist and a limit
    below 1.
    """
    unknown = [knob for knob in grids if knob not in GRIDS]
    if unknown:
        raise ValueError(f"There is no knob {unknown[0]!r}. Choose from {', '.join(GRIDS)}.")
    if any(budget < 1 for budget in budgets):
        raise ValueError(f"A budget is a number of prompts, 1 or more; got {min(budgets)}.")
    grids = {
        knob: tuple(sorted({float(value) for value in values})) for knob, values in grids.items()
    }
    params = AsfParams(smoothing, confidence, spacing, elimination)
    settings = sweep_settings(grids, params)
    within = limited_settings(settings, budgets)
    study = run_settings(
        [*settings, *within],
        Weights.of(sam, checkpoint, predictor, None, device),
        dataset,
        n_images,
        seed,
        out,
        reference=DEFAULT,
        timed_images=timed_images,
        memory=memory,
        progress=progress,
    )
    study.provenance["parameters"] |= {
        **{f"{knob}_grid": list(values) for knob, values in grids.items()},
        "budgets": list(budgets),
    }
    table = sweep_table(study.summary, study.differences, grids, params)
    trends = trend_table(study.per_image, grids)
    return SweepResult(
        study=study,
        grids=grids,
        table=table,
        trends=trends,
        signs=sign_table(trends, table),
        budgets=budget_table(study.per_image, within),
    )


def label(knob: str, value: float) -> str:
    return f"{knob} {value:g}"


def sweep_settings(grids: Mapping[str, Sequence[float]], params: AsfParams) -> list[Setting]:
    """The default, then every value of every knob. Equal settings are run once, whatever they are called."""
    swept = [
        Setting(label(knob, value), METHOD, replace(params, **{knob: value}))
        for knob, values in grids.items()
        for value in values
    ]
    return [Setting(DEFAULT, METHOD, params), *swept]


def limited_settings(settings: Sequence[Setting], budgets: Sequence[int]) -> list[Setting]:
    """Each different setting within each budget."""
    different: dict[AsfParams, Setting] = {}
    for setting in settings:
        different.setdefault(setting.params, setting)
    return [
        replace(s, label=f"{s.label}, at most {budget}", max_prompts=budget)
        for budget in budgets
        for s in different.values()
    ]


def sweep_table(
    summary: pd.DataFrame,
    differences: pd.DataFrame,
    grids: Mapping[str, Sequence[float]],
    params: AsfParams,
) -> pd.DataFrame:
    """A summary by label -> one row a knob and value, with its paired difference to the default setting ``params``."""
    summary, differences = summary.set_index("method"), differences.set_index("method")
    rows = []
    for knob, values in grids.items():
        for value in values:
            name = label(knob, value)
            difference = differences.loc[name, list(DIFFERENCE)]
            default = getattr(params, knob) == value
            rows.append(
                {
                    "knob": knob,
                    "value": value,
                    "is_default": default,
                    **summary.loc[name],
                    **difference,
                }
            )
    found = [name for name in tables.COVERAGE_COLUMNS if name in summary]
    return pd.DataFrame(rows, columns=[*SWEEP_COLUMNS, *found])


def trend_table(per_image: pd.DataFrame, grids: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """Does a column rise or fall along a knob? One row a knob and column of TREND_OF.

    change is an image's value at the knob's last value minus that at its first, averaged over
    images, change_lo and change_hi its 95% paired bootstrap interval over images, so trend is
    decided only where that interval lies on one side of zero. An image counts where it has the
    column at both values (times: the timed images).
    """
    rows = []
    for knob, values in grids.items():
        if len(values) < 2:
            continue
        first, last = (
            per_image[per_image["method"] == label(knob, value)].set_index("image")
            for value in (values[0], values[-1])
        )
        for column in TREND_OF:
            changes = (last[column] - first[column]).astype(float).dropna()
            change, low, high = mean_interval(changes, tables.BOOTSTRAP_SEED)
            rows.append(
                {
                    "knob": knob,
                    "column": column,
                    "first": values[0],
                    "last": values[-1],
                    "n_images": len(changes),
                    "change": change,
                    "change_lo": low,
                    "change_hi": high,
                    "trend": RISES if low > 0 else FALLS if high < 0 else UNDECIDED,
                }
            )
    return pd.DataFrame(rows, columns=list(TREND_COLUMNS))


def budget_table(per_image: pd.DataFrame, settings: Sequence[Setting]) -> pd.DataFrame:
    """For each budget the setting with the highest mIoU among those that were held to it.

    miou_diff with its paired interval: to the default setting held to the same budget. n_decoded, n_decoded_max: mean
    and highest number of prompts decoded of an image.
    """
    by_method = dict(list(per_image.groupby("method", sort=False)))
    rows = []
    for budget in dict.fromkeys(setting.max_prompts for setting in settings):
        held = [setting for setting in settings if setting.max_prompts == budget]
        miou = {
            setting: by_method[setting.label].set_index("image")["miou"].dropna()
            for setting in held
        }
        best = max(
            held, key=lambda setting: miou[setting].mean()
        )  # of equals the first, so the default before others
        mean, low, high = mean_interval(miou[best], tables.BOOTSTRAP_SEED)
        difference = mean_interval(miou[best] - miou[held[0]], tables.BOOTSTRAP_SEED)
        decoded = by_method[best.label]["n_decoded"]
        rows.append(
            {
                "budget": budget,
                **dataclasses.asdict(best.params),
                "miou": mean,
                "miou_lo": low,
                "miou_hi": high,
                **dict(zip(DIFFERENCE, difference)),
                "n_decoded": decoded.mean(),
                "n_decoded_max": decoded.max(),
            }
        )
    return pd.DataFrame(rows, columns=list(BUDGET_COLUMNS))


def pareto_front(cost: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """(n,) bool: points that no other beats: that no other equals in cost and gain and betters in one of them."""
    cost, gain = np.asarray(cost, dtype=float), np.asarray(gain, dtype=float)
    no_worse = (cost[None] <= cost[:, None]) & (gain[None] >= gain[:, None])
    better = (cost[None] < cost[:, None]) | (gain[None] > gain[:, None])
    return ~(no_worse & better).any(1)


_NAMES = {  # column: what it is called, what its numbers are multiplied by to be shown, their unit
    "miou": ("mIoU", 100, " points"),
    "n_masks": ("#P", 1, " masks"),
    "n_decoded": ("prompts decoded", 1, ""),
    "inf_lat_s": ("Inf_Lat", 1000, " ms"),
    "mask_lat_s": ("Mask_Lat", 1000, " ms"),
    "elim_ratio": ("the eliminated share", 100, " points"),
}


def trend_sentences(trends: pd.DataFrame) -> list[str]:
    """What the numbers say of each knob, one sentence a knob."""
    sentences = []
    for knob, own in trends.groupby("knob", sort=False):
        parts = []
        for row in own.itertuples():
            name, scale, unit = _NAMES[row.column]
            change, low, high = scale * row.change, scale * row.change_lo, scale * row.change_hi
            if not np.isfinite([low, high]).all():
                continue  # fewer than two images: nothing can be said
            verb = "neither rises nor falls for certain" if row.trend == UNDECIDED else row.trend
            moved = f"{change:+.1f}{unit} [{low:+.1f}, {high:+.1f}]"
            parts.append(f"{name} {verb} ({moved})")
        first = own.iloc[0]
        span = f"{knob.capitalize()} from {first['first']:g} to {first['last']:g}"
        sentences.append(f"{span}: {'; '.join(parts) or 'too few images'}.")
    return sentences


def knob_for_people(table: pd.DataFrame, knob: str) -> pd.DataFrame:
    """The rows of one knob as text, in the columns of the other reports."""
    own = table[table["knob"] == knob]
    own = own.assign(method=[f"{value:g}" for value in own["value"]])
    shown = tables.results_for_people(own, own)
    return shown.rename(
        columns={"Method": knob.capitalize(), tables.DIFFERENCE_HEADING: "Δ to the default"}
    )


def budgets_for_people(budgets: pd.DataFrame) -> pd.DataFrame:
    """The best settings as text, with the call that uses each."""
    rows = []
    for row in budgets.to_dict("records"):
        knobs = ", ".join(f"{knob}={row[knob]:g}" for knob in GRIDS)
        rows.append(
            {
                "At most": f"{row['budget']} prompts",
                "Call": f"aop.segment(image, max_prompts={row['budget']}, params=aop.AsfParams({knobs}))",
                "mIoU %": tables.percent_with_range(row["miou"], row["miou_lo"], row["miou_hi"]),
                "Δ to the default": tables.change_with_range(*(row[name] for name in DIFFERENCE)),
                "Decoded, mean": f"{row['n_decoded']:.1f}",
                "Decoded, most": f"{row['n_decoded_max']:.0f}",
            }
        )
    return pd.DataFrame(rows)
