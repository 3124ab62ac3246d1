"""The study: what is kept, what is scored again, what survives a kill, what is written."""

import numpy as np
import pandas as pd
import pytest
from conftest import METHODS, QUICK, kill_after, part, row, stored
from small import write_weights

from aopsam_lab.data.sample import Sample
from aopsam_lab.study import figures, settings, tables
from aopsam_lab.study.runner import STORE_NAME
from aopsam_lab.study.settings import THRESHOLDS
from aopsam_lab.study.store import Store, make_key

MOBILE = {"sam": "mobile_sam", "checkpoint": None, "predictor": None}  # what other processes know
TIMES = ["encode_s", "inf_lat_s", "mask_lat_s", "total_s"]


# --- the store ---


def test_a_key_depends_on_every_input_and_not_on_their_order():
    inputs = {"method": "aop", "params": {"a": 1.0, "b": 2.0}}
    assert make_key(inputs) == make_key({"params": {"b": 2.0, "a": 1.0}, "method": "aop"})
    assert make_key(inputs) != make_key({**inputs, "params": {"a": 1.0, "b": 2.5}})


def test_rows_are_there_as_soon_as_they_are_added_and_never_change(tmp_path):
    inputs = {"method": "aop", "image": "x"}
    key, path = make_key(inputs), tmp_path / "deep" / "s.sqlite"
    with Store(path) as store:
        assert store.values(key) == {}
        store.add([(inputs, "x", "aop", {"miou": 0.5})])
        store.add([(inputs, "x", "aop", {"miou": 0.9})])
        with Store(path) as other:  # another process would see it now
            assert other.values(key) == {"miou": 0.5}
        with pytest.raises(TypeError):  # all or none
            store.add(({"image": y}, "y", "aop", {}) for y in ("y", object()))
        assert store.values(make_key({"image": "y"})) == {}


def test_a_file_that_is_no_store_is_refused(tmp_path):
    text = "not a database, but long enough to be looked at as one" * 20
    (tmp_path / "s.sqlite").write_text(text)
    with pytest.raises(ValueError, match="not a store"):
        Store(tmp_path / "s.sqlite")


# --- running ---


def test_a_study_scores_every_image_with_every_method(study):
    result = study(n_images=4, timed_images=2)
    assert (result.n_scored, result.n_reused) == (8, 0)
    assert list(result.per_image.columns) == list(tables.PER_IMAGE_COLUMNS)
    assert list(result.summary.columns) == list(tables.SUMMARY_COLUMNS)
    assert result.summary["method"].tolist() == METHODS
    assert result.differences["method"].tolist() == ["aop_no_af"]
    own = result.per_image
    assert (own["n_decoded"] > 0).all() and own[["ar_100", "ar_1000"]].notna().all(axis=None)
    timed, others = own[:4], own[4:]
    assert (timed[TIMES] >= 0).all(axis=None) and others[TIMES].isna().all(axis=None)
    assert np.allclose(timed["total_s"], timed[["encode_s", "inf_lat_s", "mask_lat_s"]].sum(axis=1))
    assert timed.groupby("image")["encode_s"].nunique().eq(1).all()  # one encoding for all methods
    assert len(result.examples) == 3
    masks = result.examples[0][1]["aop"]["masks"]
    assert len(masks) == own.query("method == 'aop'")["n_masks"].iloc[0]
    assert masks[0]["size"] == [48, 48]


@pytest.mark.parametrize(
    ("changes", "scored"),
    [
        ({}, 0),
        ({"elimination": 1.25}, 3),  # only aop reads it
        ({"smoothing": 1.0}, 6),
        ({"n_images": 5}, 4),  # two new images
        ({"methods": ["aop"]}, 0),
        ({"timed_images": 2}, 4),  # a shared row never stands for a timed one
        ({"methods": ["aop_no_as_af", "aop"]}, 3),
        ({"seed": 1, "n_images": 14}, 26),  # all 14; one that is there is still an example
    ],
)
def test_a_change_scores_again_only_what_depends_on_it(study, changes, scored):
    first, second = study(), study(**changes)
    assert second.n_scored == scored
    if not changes:
        assert second.n_reused == 6
        pd.testing.assert_frame_equal(first.per_image, second.per_image)


def test_other_weights_or_code_are_another_study(study, tmp_path, monkeypatch):
    study()
    other = write_weights(tmp_path, seed=1)
    assert study(predictor=other["predictor"]).n_scored == 6
    assert study(checkpoint=other["checkpoint"]).n_scored == 6
    monkeypatch.setattr(settings, "scoring_code", lambda: "changed")
    assert study().n_scored == 6


def test_images_without_ground_truth_are_run_but_not_scored(study):
    result = study(n_images=None, methods=["aop_no_as_af"], confidence=0.9)
    assert len(result.per_image) == 14 and result.summary["n_images"].tolist() == [13]
    assert result.per_image["miou"].isna().sum() == 1
    assert result.provenance["dataset"]["images_without_masks"] == 1
    assert result.summary["n_decoded"].tolist() == [0]
    assert np.isnan(result.summary["elim_ratio"].iloc[0])
    assert result.differences.empty


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["aop", "best"]}, "no method 'best'"),
        ({"methods": []}, "empty"),
        ({"methods": ["aop", "aop"]}, "twice"),
        ({"confidence": 2.0}, "confidence"),
        ({"sam": "huge"}, "huge"),
    ],
)
def test_bad_arguments_are_refused_by_name(study, changes, message):
    with pytest.raises(ValueError, match=message):
        study(**changes)


def test_a_killed_study_loses_at_most_the_image_in_hand(study, weights, folder, tmp_path):
    """The next process scores the rest, and nothing twice."""
    out = tmp_path / "killed"
    arguments = {"methods": METHODS, "dataset": str(folder), "n_images": 14, "out": str(out)}
    arguments |= {**QUICK, **weights}
    code = f"from aopsam_lab.study.runner import run_study; run_study(**{arguments!r})"
    before = kill_after(code, out / STORE_NAME, rows=5)
    assert 5 <= len(before) < 28 and len(before) % 2 == 0  # whole images

    result = study(n_images=14, out=out, thresholds=THRESHOLDS)
    assert (result.n_reused, result.n_scored) == (len(before), 28 - len(before))
    after = stored(out / STORE_NAME)
    # the old rows as they were, times of scoring included
    assert len(after) == 28 and before.items() <= after.items()

    whole = study(n_images=14, out=tmp_path / "whole", thresholds=THRESHOLDS)
    for name in ("per_image", "summary", "curves"):
        pd.testing.assert_frame_equal(getattr(result, name), getattr(whole, name))


def test_peak_memory_is_measured_once_in_a_process_of_its_own(study):
    asked = {"n_images": 1, "methods": ["aop_no_af"], "memory": True, **MOBILE}
    peak = study(**asked).summary["peak_mem_mb"].iloc[0]
    assert 50 < peak < 2000  # activations of the model, in MiB
    assert study(**asked).summary["peak_mem_mb"].iloc[0] == peak


# --- tables ---


def test_means_shares_and_differences_worked_by_hand():
    rows = [
        row("a", "amg_s", 0.5, n_decoded=30),
        row("a", "aop", 0.6, n_eliminated=5, n_decoded=5, mask_lat_s=0.3),
        row("b", "amg_s", 0.3, n_decoded=30),
        row("b", "aop", 0.4, n_eliminated=1, n_decoded=9, mask_lat_s=0.1),
        row("c", "amg_s", None, n_decoded=30),
        row("c", "aop", None, n_sampled=0, n_decoded=1, mask_lat_s=0.3),
    ]
    per_image = tables.per_image_table(rows)
    assert per_image["elim_ratio"].tolist()[1:4:2] == [0.5, 0.1]
    assert np.isnan(per_image["elim_ratio"].iloc[5])
    summary = tables.summary_table(per_image, {"aop": 7.0}).set_index("method")
    found = summary.loc["aop", ["n_images", "miou", "n_decoded"]].tolist()
    assert found == pytest.approx([2, 0.5, 5])
    assert summary.loc["aop", "elim_ratio"] == pytest.approx(6 / 20)
    assert summary.loc["aop", "mask_lat_s"] == pytest.approx(0.7 / 3)
    assert summary.loc["aop", "peak_mem_mb"] == 7 and np.isnan(summary.loc["amg_s", "peak_mem_mb"])
    difference = tables.difference_table(per_image).iloc[0]
    assert (difference["method"], difference["n_images"]) == ("amg_s", 2)
    interval = [difference[f"miou_diff{end}"] for end in ("", "_lo", "_hi")]
    assert interval == pytest.approx([-0.1] * 3)
    assert difference["n_decoded_ratio"] == pytest.approx(6)
    sentence = part("findings", tables.difference_table(per_image))
    assert "has +10.0 [+10.0, +10.0] points" in sentence and sentence.count("<li>") == 1
    assert "so it is better" in sentence
    assert "17% of the prompts" in sentence
    matched = {"ar_100": 3 / 20, "ar_1000": 1, "coverage": 0.75}
    others = {**matched, "n_truth": 3, "ar_100": 10 / 30, "ar_1000": 2 / 3, "coverage": 0.25}
    recalls = tables.per_image_table(
        [row("a", "aop", 0.6, **matched), row("b", "aop", 0.4, **others)]
    )
    pooled = tables.summary_table(recalls, {}).iloc[0]
    assert pooled[["ar_100", "ar_1000"]].tolist() == pytest.approx([13 / 50, 40 / 50])  # over masks
    assert pooled["coverage"] == pytest.approx(0.5) and np.isnan(summary.loc["aop", "ar_100"])
    shown = tables.results_for_people(summary.reset_index(), tables.difference_table(per_image))
    assert shown["Δ to AoP-SAM"].tolist() == ["-10.0 [-10.0, -10.0]", "–"]


def test_milliseconds_are_shown_with_three_digits():
    shown = [tables.milliseconds(seconds) for seconds in (0, 3e-7, 2.5e-4, 0.0123, 1.5)]
    assert shown == ["0", "0", "0.25", "12.3", "1,500"]


def test_example_images_are_drawn_beside_their_ground_truth():
    image = np.zeros((20, 30, 3), np.uint8)
    found = {"masks": [], "prompts": [[3.0, 4.0, "kept"], [5.0, 6.0, "eliminated"]]}
    sample = Sample("a", image, rles=[])
    figure = figures.examples_figure([(sample, {"aop": found})], ["aop"])
    assert len(figures.png(figure)) > 5000
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[0] == "ground truth\n0 masks; grey on the right: no match"
    assert titles[1:] == ["AoP-SAM\n0 masks, 1 prompts decoded"]
