"""The ablation and the sweeps: which settings share what, and what their tables say."""

import conftest
import numpy as np
import pandas as pd
import pytest
from conftest import parameters, part, row
from hypothesis import given
from hypothesis import strategies as st

from aopsam_lab.asf import AsfParams
from aopsam_lab.data import open_dataset
from aopsam_lab.pipeline import decode_cache
from aopsam_lab.study import figures, score, sweeps, tables
from aopsam_lab.study.figures import joint_figure, sweep_figure
from aopsam_lab.study.runner import MAIN_COMPARISON
from aopsam_lab.study.score import TIMES
from aopsam_lab.study.settings import Setting, StudyConfig
from aopsam_lab.study.sweeps import ABLATION, SWEEPS, SWEPT, run_sweeps

FEW = {"confidence": 0.0, "spacing": 60.0}
SMALL = {"spacing": (40.0, 60.0), "elimination": (1.0, 1.3)}
QUICK = {**conftest.QUICK, "values": SMALL, "budgets": (3,), "timed_images": 1}


@pytest.fixture
def sweep(weights, folder, tmp_path):
    def run(**changes):
        own = {"dataset": folder, "n_images": 2, "out": tmp_path / "out", **QUICK, **weights}
        return run_sweeps(**{**own, **changes})

    return run


# --- running ---


def test_shared_scores_are_those_of_each_setting_alone(sweep, weights, folder):
    shared = sweep().study.per_image.set_index(["method", "image"])
    images, models = open_dataset(folder, 2), StudyConfig(**weights).files(["aop"]).load()
    counts = ["n_truth", "n_masks", "n_sampled", "n_decoded", "n_eliminated"]
    changes = {"default": {}, "spacing 40": {"spacing": 40.0}, "elimination 1": {"elimination": 1}}
    for name, change in changes.items():
        setting = Setting(name, "aop", AsfParams(**{**FEW, **change}))
        for i in range(2):
            sample, row = images[i], shared.loc[(name, images.ids[i])]
            alone = score.score(models, sample, setting)
            assert [alone[count] for count in counts] == row[counts].tolist()
            assert alone["miou"] == pytest.approx(row["miou"], abs=1e-3)


def test_times_come_only_from_runs_without_sharing(sweep, monkeypatch):
    real, runs = score.run_method, []

    def recording(sam, encoded, method, **arguments):
        runs.append((type(arguments.get("decode")).__name__, type(arguments["predictor"]).__name__))
        return real(sam, encoded, method, **arguments)

    monkeypatch.setattr(score, "run_method", recording)
    result = sweep()
    own = result.study.per_image
    unlimited = ~own["method"].str.contains("at most")
    first = own["image"] == own["image"].iloc[0]
    assert own.loc[unlimited & first, list(TIMES)].notna().all(axis=None)
    assert own.loc[~(unlimited & first), list(TIMES)].isna().all(axis=None)
    alone = [run for run in runs if run == ("NoneType", "PromptPredictor")]
    assert len(alone) == 3  # three different settings
    assert all(run == ("LooseRun", "PcmCache") for run in runs if run not in alone)
    assert "on the first 1 of these images" in part("what_was_run", result.study.provenance)


def test_equal_settings_are_run_once_points_decoded_once_and_budgets_held(sweep, monkeypatch):
    real, decoded = decode_cache.decode_and_filter, []

    def counting(sam, encoded, prompts, index, spec):
        decoded.extend((encoded, *point) for point in prompts.points[index].tolist())
        return real(sam, encoded, prompts, index, spec)

    monkeypatch.setattr(decode_cache, "decode_and_filter", counting)
    result = sweep(budgets=(1, 4), timed_images=0)
    assert len(set((id(encoded), *point) for encoded, *point in decoded)) == len(decoded) > 4
    own = result.study.per_image
    # labels; of five settings three differ, each held to two budgets
    assert own["method"].nunique() == 5 + 6 and result.study.n_scored == 2 * (3 + 6)
    rows = own.set_index(["method", "image"])[["miou", "n_masks", "n_decoded"]]
    for equal in ("spacing 60", "elimination 1.3"):
        pd.testing.assert_frame_equal(rows.loc["default"], rows.loc[equal])
    limited = own[own["method"].str.contains("at most")]
    most = limited["method"].str.extract(r"at most (\d+)")[0].astype(int)
    assert (limited["n_decoded"] <= most).all() and limited["n_decoded"].gt(0).all()
    assert result.budgets["budget"].tolist() == [1, 4]
    assert (result.budgets["n_decoded_max"] <= result.budgets["budget"]).all()


def test_what_is_scored_is_not_scored_again(sweep):
    first, second = sweep(), sweep()
    assert second.study.n_scored == 0 and second.study.n_reused == first.study.n_scored > 0
    pd.testing.assert_frame_equal(first.table, second.table)
    assert sweep(values={**SMALL, "smoothing": (1.0,)}, budgets=()).study.n_scored == 2
    assert sweep(values={}, budgets=()).table.empty


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"values": {"size": (1,)}}, "no parameter 'size'"), ({"budgets": (0,)}, "budget")],
)
def test_bad_arguments_are_refused_by_name(sweep, changes, message):
    with pytest.raises(ValueError, match=message):
        sweep(**changes)


# --- tables ---


def rows_along(parameter: str, values: dict[float, list[float]]) -> pd.DataFrame:
    """per_image rows: at each value of the parameter the mIoU of each image."""
    return tables.per_image_table(
        row(f"i{i}", sweeps.label(parameter, value), miou, n_masks=10 * value)
        for value, mious in values.items()
        for i, miou in enumerate(mious)
    )


def test_trends_worked_by_hand_and_said_in_a_sentence():
    # 0.1 less a unit on every image
    falling = {1.0: [0.9, 0.5, 0.6], 2.0: [0.8, 0.4, 0.5], 4.0: [0.6, 0.2, 0.3]}
    trends = sweeps.trend_table(rows_along("smoothing", falling), {"smoothing": (1.0, 2.0, 4.0)})
    trends = trends.set_index("column")
    changes = trends.loc["miou", ["change", "change_lo", "change_hi"]].tolist()
    assert changes == pytest.approx([-0.3] * 3)
    assert trends["trend"].to_dict() == {
        "miou": "falls", "n_masks": "rises", "n_decoded": "undecided", "inf_lat_s": "undecided",
        "mask_lat_s": "undecided", "elim_ratio": "undecided",
    }  # fmt: skip
    assert trends.loc["n_masks", "change"] == pytest.approx(30)
    assert trends.loc["mask_lat_s", "n_images"] == 0
    mixed = {1.0: [0.9, 0.5, 0.6, 0.2], 2.0: [0.8, 0.6, 0.7, 0.1]}
    trends = sweeps.trend_table(rows_along("smoothing", mixed), {"smoothing": (1.0, 2.0)})
    assert trends["trend"].iloc[0] == "undecided"
    own = rows_along("elimination", {1.25: [0.5, 0.6], 1.3: [0.9, 0.9], 1.4: [0.4, 0.5]})
    own["elim_ratio"] = own["method"].map({"elimination 1.25": 0.2, "elimination 1.4": 0.1})
    sentence = part("trends", sweeps.trend_table(own, {"elimination": (1.25, 1.3, 1.4)}))
    assert "<li>Elimination from 1.25 to 1.4: mIoU falls (-10.0 points [-10.0, " in sentence
    assert "the eliminated share falls (-10.0 points [-10.0, -10.0])" in sentence


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_pareto_front_is_what_nothing_beats(points):
    cost, gain = np.array(points, dtype=float).T
    front = sweeps.pareto_front(cost, gain)
    assert front.any()
    for i, (c, g) in enumerate(points):
        beaten = any(other[0] <= c and other[1] >= g and other != (c, g) for other in points)
        assert front[i] == (not beaten)


def test_the_best_setting_of_a_budget_by_hand():
    # the default is spacing 6
    settings = sweeps.sweep_settings({"spacing": (5.0, 6.0)}, AsfParams(), [50])[3:]
    assert [s.label for s in settings] == ["default, at most 50", "spacing 5, at most 50"]
    rows = [
        row(f"i{i}", setting.label, miou, n_decoded=40 + i)
        for setting, mious in zip(settings, ([0.5, 0.3, None], [0.6, 0.4, None]), strict=True)
        for i, miou in enumerate(mious)
    ]
    (best,) = sweeps.budget_table(tables.per_image_table(rows), settings).to_dict("records")
    columns = ("budget", "spacing", "n_decoded", "n_decoded_max")
    assert [best[column] for column in columns] == [50, 5.0, 41, 42]
    assert (best["miou"], best["miou_diff"]) == pytest.approx((0.5, 0.1))
    shown = part("budgets", pd.DataFrame([best]))
    params = "smoothing=2, confidence=0.2, spacing=5, elimination=1.3"
    assert f"<td>aop.segment(image, max_prompts=50, params=aop.AsfParams({params}))</td>" in shown
    assert "<td>+10.0 [+10.0, +10.0]</td>" in shown


# --- figures and reports ---


def made_up_table() -> pd.DataFrame:
    rows = []
    for name, values in SWEPT.items():
        for i, value in enumerate(values):
            default = getattr(AsfParams(), name) == value
            score = 0.2 if default else 0.1 * (i + 1) + 0.01 * len(rows)
            row = dict.fromkeys(sweeps.SWEEP_COLUMNS, score)
            rows.append({**row, "parameter": name, "value": value, "is_default": default})
    return pd.DataFrame(rows)


def dashed(figure):
    return [line for axes in figure.axes for line in axes.lines if line.get_linestyle() == "--"]


def test_sweep_figures_show_each_parameter_and_the_papers_curves():
    table = made_up_table()
    figure = sweep_figure(table)
    titles = [axes.get_title(loc="left") for axes in figure.axes[:4]]
    assert titles == [f"({letter}) {name}" for letter, name in zip("abcd", SWEPT, strict=True)]
    for made in (figure, joint_figure(table), joint_figure(table.assign(total_s=np.nan))):
        assert figures.png(made).startswith(b"\x89PNG")
    # the default's settings are one mark, the others are named by their values
    axes = joint_figure(table).axes[0]
    assert len(axes.texts) == 12 and axes.texts[0].get_text() == "1"
    # the paper's curves: mIoU's four panels, then #P's, where it has these values
    curves = [line.get_ydata().tolist() for line in dashed(figure)]
    assert len(curves) == 8 and curves[0] == [72.4, 70.4, 67.3, 63.4]
    assert curves[4] == [114.4, 107.8, 100.3, 91.2] and len(figure.legends[0].get_texts()) == 2
    other = table.query("parameter == 'spacing'").assign(value=[40.0, 50.0, 60.0, 70.0])
    figure = sweep_figure(other)
    assert dashed(figure) == [] and len(figure.legends[0].get_texts()) == 1


@pytest.mark.parametrize(
    ("name", "config"),
    [("main_comparison", MAIN_COMPARISON), ("ablation", ABLATION), ("parameter_sweeps", SWEEPS)],
)
def test_the_parameters_of_the_notebooks_are_the_defaults(name, config):
    values = parameters(name)
    asked = "sam checkpoint predictor dataset n_images timed_images seed device out"
    assert {*asked.split(), "smoothing", "confidence", "spacing", "elimination"} <= values.keys()
    for key in vars(config).keys() & values.keys():
        default = getattr(config, key)
        assert values[key] == (list(default) if isinstance(default, tuple) else default), key
    if name == "parameter_sweeps":
        assert {name: tuple(values[f"{name}s"]) for name in SWEPT} == SWEPT
        assert tuple(values["budgets"]) == sweeps.BUDGETS
