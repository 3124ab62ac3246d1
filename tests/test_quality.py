"""Masks from given prompts, and prompts on given masks."""

import numpy as np
import pytest
from small import stock_predictor

from aopsam_lab.study import quality


def test_hits_and_recall_by_size():
    truths = np.zeros((3, 10, 10), bool)
    truths[0, 0, 0] = truths[1, 5:, 5:] = truths[2, 9, :] = True
    assert quality.hit(truths, np.array([[0.9, 0.2], [7.5, 7.5]])).tolist() == [True, True, False]
    assert quality.hit(truths, np.zeros((0, 2))).tolist() == [False] * 3


def test_prompts_decode_as_the_stock_predictor_does(sam, photo):
    stock = stock_predictor(sam, photo)
    points, labels = np.array([[[200.0, 150.0], [40.0, 300.0]]]), np.array([[1, 0]])
    found, iou = quality.decode_prompts(sam, photo, points, labels, None, slice(0, 1))
    masks, scores, _ = stock.predict(points[0], labels[0], multimask_output=False)
    assert (found[0] != masks).mean() < 1e-3 and iou[0] == pytest.approx(scores, abs=1e-4)
    box = np.array([[100.0, 80.0, 300.0, 260.0]])
    found, iou = quality.decode_prompts(sam, photo, None, None, box, slice(0, 1))
    masks, scores, _ = stock.predict(box=box[0], multimask_output=False)
    assert (found[0] != masks).mean() < 1e-3 and iou[0] == pytest.approx(scores, abs=1e-4)
