"""Measures of the models themselves, on masks and points that can be counted by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt, uniform_filter

from aopsam_lab.clicks import next_click, next_clicks, squared_depths
from aopsam_lab.data import open_dataset
from aopsam_lab.data.sample import Sample
from aopsam_lab.decoding import encode
from aopsam_lab.predictor import load_predictor
from aopsam_lab.sam.tiny import build_tiny_sam
from aopsam_lab.study import models, quality
from aopsam_lab.study.figures import png


def test_next_click_goes_to_the_deeper_error():
    truth, found = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    truth[2:9, 2:9] = True
    found[2:9, 2:5] = True  # 7 x 4 are missing
    found[12:15, 12:15] = True  # 3 x 3 are too much
    x, y, label = next_click(found, truth)
    assert label == 1 and truth[int(y), int(x)] and not found[int(y), int(x)]
    found[10:19, 10:19] = True
    x, y, label = next_click(found, truth)
    assert label == 0 and found[int(y), int(x)] and not truth[int(y), int(x)]
    x, y, label = next_click(truth, truth)
    assert label == 1 and truth[int(y), int(x)]


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40))
def test_clicks_on_many_masks_at_once_are_as_deep_as_one_by_one(seed, high, wide):
    rng = np.random.default_rng(seed)
    blobs = np.stack([uniform_filter(rng.random((high, wide)), 5) > level for level in (0.45, 0.5, 0.55, 2)])
    found, truth = blobs[[0, 1, 3, 2]], np.array([mask if mask.any() else ~mask for mask in blobs[[1, 2, 0, 2]]])
    depths = squared_depths(torch.from_numpy(truth)).sqrt()
    for mask, depth in zip(truth, depths.numpy()):
        assert np.allclose(depth, distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1], atol=1e-3)
    points, labels = next_clicks(torch.from_numpy(found), torch.from_numpy(truth))
    for mask, true, (x, y), label in zip(found, truth, points.tolist(), labels.tolist()):
        at_x, at_y, as_one = next_click(mask, true)
        wrong = (true & ~mask, mask & ~true)[label == 0] if (mask != true).any() else true
        depth = distance_transform_edt(np.pad(wrong, 1))[1:-1, 1:-1]
        assert depth[int(y), int(x)] == pytest.approx(depth[int(at_y), int(at_x)] if label == as_one else depth.max(), abs=1e-3)
        assert label == as_one


def test_hits_and_recall_by_size():
    truths = np.zeros((3, 10, 10), bool)
    truths[0, 0, 0] = truths[1, 5:, 5:] = truths[2, 9, :] = True
    assert quality.hit(truths, np.array([[0.9, 0.2], [7.5, 7.5]])).tolist() == [True, True, False]
    assert quality.hit(truths, np.zeros((0, 2))).tolist() == [False] * 3
    table = pd.DataFrame({"area": [0.01, 0.25, 0.1], "image": "a", "grid_8": [True, True, False]})
    by_size = quality.recall_by_size(table)
    assert by_size.loc["above 5%", ["grid_8", "n"]].tolist() == [0.5, 2]
    assert by_size.loc["0.2% to 1%", "grid_8"] == 1


def test_calibration_by_hand():
    pairs = np.array([[0.05, 0.1], [0.06, 0.3], [1.0, 0.9]])
    steps = quality.calibration(pairs)
    assert steps["n"].tolist() == [2, 1] and steps["true"].tolist() == pytest.approx([0.2, 0.9])


def test_prompts_decode_as_the_stock_predictor_does(sam):
    from segment_anything import SamPredictor

    sample = open_dataset("scenes", 1)[0]
    stock = SamPredictor(sam)
    stock.set_image(sample.image)
    points, labels = np.array([[[200.0, 150.0], [40.0, 300.0]]]), np.array([[1, 0]])
    found, iou = quality.decode_prompts(sam, encode(sam, sample.image), points, labels, None, slice(0, 1))
    masks, scores, _ = stock.predict(points[0], labels[0], multimask_output=False)
    assert (found[0] != masks).mean() < 1e-3 and iou[0] == pytest.approx(scores, abs=1e-4)
    box = np.array([[100.0, 80.0, 300.0, 260.0]])
    found, iou = quality.decode_prompts(sam, encode(sam, sample.image), None, None, box, slice(0, 1))
    masks, scores, _ = stock.predict(box=box[0], multimask_output=False)
    assert (found[0] != masks).mean() < 1e-3 and iou[0] == pytest.approx(scores, abs=1e-4)


def test_every_truth_of_a_scene_is_prompted(sam):
    torch.manual_seed(0)
    sample = open_dataset("scenes", 1)[0]
    table, pairs = quality.prompted_truths(sam, sample, clicks=2)
    assert len(table) == len(sample.masks) and pairs.shape == (len(table), 3, 2)
    assert table[["box", "click_1", "click_2"]].stack().between(0, 1).all()
    assert np.allclose(table["click_1"], pairs[..., 1].max(1))


def test_two_sams_are_compared_on_the_same_prompts(sam):
    scene = open_dataset("scenes", 1)[0]
    torch.manual_seed(0)
    blind = build_tiny_sam().eval()
    images = [Sample("no truths", scene.image, scene.masks[:0]), Sample("few", scene.image, scene.masks[:4])]
    table = quality.compare_masks({"ours": sam, "theirs": blind}, "two", images).set_index("sam")
    assert table[["dataset", "n_images", "n_truth"]].values.tolist() == [["two", 1, 4]] * 2
    alone, pairs = quality.prompted_truths(sam, images[1], clicks=1)
    assert table.loc["ours", ["box", "click_1"]].tolist() == pytest.approx(alone[["box", "click_1"]].mean().tolist())
    ranks = pd.DataFrame(pairs.reshape(-1, 2)).rank()
    assert table.loc["ours", "spearman"] == pytest.approx(ranks[0].corr(ranks[1]))
    assert table.loc["theirs", "click_1"] < 0.5 < table.loc["ours", "click_1"]
    with pytest.raises(ValueError, match="no picture of none has masks"):
        quality.compare_masks({"ours": sam}, "none", images[:1])


def test_a_fifth_of_the_prompts_against_the_grid(sam):
    scene = open_dataset("scenes", 1)[0]
    images = [Sample("no truths", scene.image, scene.masks[:0]), scene, None]  # the last is never looked at: two were asked for
    table = quality.against_grid(sam, load_predictor("tiny", device="cpu"), images, 2)
    assert set(table["image"]) == {scene.id} and table["miou"].between(0.2, 1).all()
    runs = table.set_index(["method", "limit"])["n_decoded"]
    assert (runs["amg_d", 0], runs["amg_s", 0], quality.BUDGET) == (1024, 256, 204)
    assert all(0 < runs["aop", limit] <= limit for limit in quality.LIMITS) and runs["aop", 32] == 32
    # the fewer prompts, the more is lost on truths that have none
    missed = table.set_index(["method", "limit"])["missed"]
    assert missed["amg_d", 0] == 0 and missed["aop", 32] > missed["aop", quality.BUDGET]


def of_pictures(method, limit, mious, decoded, missed):
    return pd.DataFrame({"image": list("abc"), "method": method, "limit": limit, "n_decoded": decoded, "miou": mious, "missed": missed})


def test_the_grids_lead_by_hand():
    aop = of_pictures("aop", quality.BUDGET, [0.5, 0.6, 0.7], [200, 201, 202], [0.0, 0.03, 0.06])
    fewer = of_pictures("aop", 32, [0.3, 0.3, 0.3], 32, 0.1)
    table = pd.concat([of_pictures("amg_d", 0, [0.6, 0.7, 0.8], 1024, 0.0), aop, fewer])
    row = quality.budget_row("x", table)
    assert (row["dataset"], row["n_images"], row["n_decoded"]) == ("x", 3, 201)
    numbers = [row[k] for k in ("aop", "amg_d", "lead", "lead_lo", "lead_hi", "missed")]
    assert numbers == pytest.approx([0.6, 0.7, 0.1, 0.1, 0.1, 0.03])
    curve = quality.miou_by_prompts(table)
    assert curve["n_decoded"].tolist() == [32, 201, 1024] and curve["miou"].tolist() == pytest.approx([0.3, 0.6, 0.7])
    assert png(models.prompts_figure({"x": curve})).startswith(b"\x89PNG")


def test_learning_curves_are_read_from_the_cards():
    assert png(models.learning_curves()).startswith(b"\x89PNG")
