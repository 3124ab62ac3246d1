"""Looser thresholds: the same prompts filtered again, and methods at equal masks kept."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import part
from small import all_masks

from aopsam_lab.asf import AsfParams
from aopsam_lab.pipeline.decode import decode_and_filter
from aopsam_lab.pipeline.decode_cache import DecodeCache, LooseRun
from aopsam_lab.pipeline.methods import Grid, method_named
from aopsam_lab.pipeline.run import run_method
from aopsam_lab.pipeline.types import Models
from aopsam_lab.study import figures, runner, score, tables
from aopsam_lab.study.figures import curve_figure
from aopsam_lab.study.settings import THRESHOLDS

OWN = (0.88, 0.95)
PAIRS = [OWN, (0.8, 0.9), (0.5, 0.85), (0.7, 0.6)]
LOOSEST = (0.5, 0.6)
FEW_POINTS = AsfParams(spacing=12, confidence=0.05, elimination=1.1)
GRID = Grid("grid", 6)


# --- the cache ---


@pytest.mark.parametrize("method", [GRID, "aop", "aop_no_af"])
def test_masks_at_sams_own_thresholds_are_those_of_an_ordinary_run(sam, predictor, photo, method):
    loose = LooseRun(DecodeCache(sam, photo, LOOSEST))
    shared = run_method(sam, photo, method, predictor, params=FEW_POINTS, decode=loose)
    alone = run_method(sam, photo, method, predictor, params=FEW_POINTS)
    own = loose.masks_at([OWN])[0]
    assert len(own) > 3 and own == shared.masks
    assert shared.prompts["status"].tolist() == alone.prompts["status"].tolist()
    assert shared.n_eliminated == alone.n_eliminated and len(shared.masks) == len(alone.masks)
    np.testing.assert_allclose(shared.scores, alone.scores, atol=1e-4)
    assert (shared.to_array() != alone.to_array()).mean() < 1e-4
    assert method != "aop" or alone.n_eliminated > 0


def test_masks_at_looser_thresholds_are_those_of_a_sam_that_has_them(sam, photo):
    loose = LooseRun(DecodeCache(sam, photo, LOOSEST))
    run_method(sam, photo, GRID, decode=loose)
    kept = loose.masks_at(PAIRS)
    assert len({len(masks) for masks in kept}) == len(PAIRS)
    for pair, masks in zip(PAIRS, kept, strict=True):
        spec = replace(sam.spec, pred_iou_thresh=pair[0], stability_score_thresh=pair[1])

        def decode(sam, encoded, prompts, index, _, spec=spec):
            return decode_and_filter(sam, encoded, prompts, index, spec)

        alone = run_method(sam, photo, GRID, decode=decode)
        assert len(masks) == len(alone.masks)
        different = score.mask_scores(alone.masks, masks, None)["miou"]
        assert different == pytest.approx(1, abs=1e-3)


def test_thresholds_below_the_caches_and_another_image_are_refused(sam, photo):
    run = LooseRun(DecodeCache(sam, photo, LOOSEST))
    assert run.masks_at(PAIRS) == [[]] * len(PAIRS)  # nothing decoded yet
    with pytest.raises(ValueError, match="not to the thresholds"):
        run.masks_at([(0.1, 0.97)])
    with pytest.raises(ValueError, match="another image"):
        run_method(sam, replace(photo), GRID, decode=run)


@torch.inference_mode()
def test_the_highest_predicted_iou_is_that_of_all_masks(sam, photo):
    prompts = method_named("amg_s").start(photo, Models(), AsfParams()).prompts
    found = decode_and_filter(sam, photo, prompts, torch.arange(6), sam.spec)
    for row in range(6):
        every = all_masks(sam, photo, prompts, row)
        torch.testing.assert_close(found.best_iou[row], every.iou.max(), rtol=1e-4, atol=1e-4)


# --- in a study ---


def test_the_curve_of_a_study_holds_its_ordinary_result_and_is_kept(study):
    some = {"n_images": 2, "thresholds": THRESHOLDS}
    result = study(**some)
    curves = result.curves
    assert list(curves.columns) == list(tables.CURVE_COLUMNS)
    assert len(curves) == 2 * 2 * 6  # five pairs, and this SAM's own
    own = curves[curves["own"]].set_index(["image", "method"])
    ordinary = result.per_image.set_index(["image", "method"])
    for column in ("miou", "n_masks", "ar_1000"):
        pd.testing.assert_series_equal(own[column], ordinary[column])
    assert result.provenance["parameters"]["thresholds"][0] == "0.88 / 0.95"
    again = study(**some)
    assert (again.n_scored, again.n_reused) == (0, 4)
    pd.testing.assert_frame_equal(curves, again.curves)
    assert study(n_images=2).n_scored == 4 and study(n_images=2).curves.empty
    assert study(n_images=2, thresholds=[(0.9, 0.9)]).n_scored == 4


def test_coverage_is_there_where_found_masks_are(study, monkeypatch):
    some = {"n_images": 2, "thresholds": THRESHOLDS}
    assert "coverage" not in study(**some).summary
    shown = study(methods=["aop"], **some)
    masks = {
        sample.id: [{**rle, "counts": rle["counts"].encode()} for rle in found["aop"]["masks"]]
        for sample, found in shown.examples
    }  # what a method found itself
    monkeypatch.setattr(runner, "found_masks", lambda images: masks)
    result = study(**some)
    assert result.n_scored == 4  # found masks are among what a row depends on
    covered = result.per_image.set_index("method")["coverage"]
    assert covered["aop"].eq(1).all() and covered.between(0, 1).all()
    assert result.summary["coverage"].notna().all() and result.curves["coverage"].notna().all()
    shown = tables.results_for_people(result.summary, result.differences)
    assert shown["Coverage %"].str.startswith("100.0").any()
    monkeypatch.setattr(runner, "found_masks", lambda images: {key: [] for key in masks})
    assert study(**some).per_image["coverage"].isna().all()


# --- tables and figure ---


def made_up(points: dict[str, list[tuple[float, float]]], images: int = 2) -> pd.DataFrame:
    """Curves from (masks kept, mIoU) at the first thresholds of each method."""
    return pd.DataFrame(
        {
            "image": f"i{i}",
            "method": method,
            **dict(zip(tables.PAIR, pair, strict=True)),
            "own": pair == THRESHOLDS[0],
            "n_truth": 2 + i,
            "n_masks": n_masks,
            "miou": miou + 0.1 * i,
            "ar_1000": 0.3 + 0.1 * i,
        }
        for method, own in points.items()
        for pair, (n_masks, miou) in zip(THRESHOLDS, own, strict=False)
        for i in range(images)
    )


def test_methods_at_equal_masks_by_hand():
    curves = made_up(
        {"aop": [(40, 0.4), (60, 0.5), (90, 0.6)], "amg_d": [(50, 0.3), (90, 0.5), (120, 0.6)]}
    )
    equal = tables.equal_masks(curves)
    assert equal["n_masks"].tolist() == [50, 90]  # aop never keeps 120
    # half-way from 40 to 60; its last place
    assert equal["miou"].tolist() == pytest.approx([0.5, 0.65])
    assert equal["miou_diff"].tolist() == pytest.approx([0.15, 0.1])
    assert equal["miou_diff_lo"].tolist() == pytest.approx([0.15, 0.1])  # equal on all images
    first = part("equal", equal)
    assert "With 50 masks kept an image, as many as AMG-D keeps at the thresholds 0.88" in first
    assert "50.0% mIoU against 35.0%: a difference of +15.0 [+15.0, +15.0] points." in first
    assert tables.equal_masks(curves[curves["method"] == "aop"]).empty
    assert np.isnan(tables.equal_masks(curves[curves["image"] == "i0"])["miou_diff_lo"]).all()


def test_the_summary_of_curves_by_hand():
    curves = made_up({"aop": [(40, 0.4), (60, 0.5)], "amg_d": [(50, 0.3), (55, 0.5)]})
    unknown = {"image": "e", "n_truth": 0, "miou": np.nan, "ar_1000": np.nan, "n_masks": 999}
    with_empty = pd.concat([curves, curves[curves["image"] == "i0"].assign(**unknown)])
    pd.testing.assert_frame_equal(tables.equal_masks(curves), tables.equal_masks(with_empty))
    summary = tables.curve_summary(with_empty)
    assert summary["n_images"].eq(2).all()  # those with ground truth
    assert summary["miou"].tolist() == pytest.approx([0.45, 0.55, 0.35, 0.55])
    summary = tables.curve_summary(curves.assign(coverage=0.25))
    assert list(summary.columns) == [*tables.CURVE_MEANS, *tables.COVERAGE_COLUMNS]
    aop, _, grid, _ = summary.to_dict("records")
    found = [grid[name] for name in ("n_masks", "miou", "miou_diff", "miou_diff_lo")]
    assert found == pytest.approx([50, 0.35, -0.1, -0.1])
    assert np.isnan(aop["miou_diff"]) and aop["coverage_hi"] == 0.25
    assert aop["ar_1000"] == pytest.approx((2 * 0.3 + 3 * 0.4) / 5)  # over masks


def test_the_figure_has_a_panel_a_column_and_a_line_a_method():
    curves = made_up({"aop": [(40, 0.4), (60, 0.5)], "amg_d": [(50, 0.3), (90, 0.5)]}, images=4)
    figure = curve_figure(tables.curve_summary(curves))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["mIoU %", "AR@1000 %"]
    for axes in figure.axes:
        assert {"AoP-SAM", "AMG-D"} < {line.get_label() for line in axes.lines}
    assert figures.png(figure).startswith(b"\x89PNG")
    whole = curve_figure(tables.curve_summary(curves.assign(coverage=0.5)))
    assert whole.axes[2].get_title(loc="left") == "coverage %"
