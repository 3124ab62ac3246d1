"""Average recall and coverage: by hand, and against pycocotools' own evaluation."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aopsam_lab.evaluator import iou_matrix
from aopsam_lab.recall import average_recall, covered, recall_matches
from aopsam_lab.study.score import mask_scores


def test_average_recall_by_hand():
    # The first takes ground truth 1 up to an IoU of 0.75, the second ground truth 0 up to 0.60.
    iou = np.array([[0.55, 0.62], [0.77, 0.4], [0.3, 0.2]])
    matches = recall_matches(iou, (1, 2))
    assert matches[0].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert matches[1].tolist() == [2, 2, 2, 1, 1, 1, 0, 0, 0, 0]
    assert average_recall(matches[1], 3) == pytest.approx(9 / 30)


def test_a_better_prediction_comes_too_late_where_a_surer_one_took_its_mask():
    iou = np.array([[0.6, 0.9]])  # the surer prediction takes the only mask up to 0.60
    assert recall_matches(iou, (100,))[0].tolist() == [1] * 9 + [0]


def test_of_equals_the_last_is_taken():
    iou = np.array([[0.7, 0.6], [0.7, 0.0]])  # the other choice would leave 0.6 unused
    assert recall_matches(iou, (100,))[0].tolist() == [2, 2, 2, 1, 1, 0, 0, 0, 0, 0]


def test_recall_without_masks():
    assert recall_matches(np.zeros((2, 0))).sum() == recall_matches(np.zeros((0, 3))).sum() == 0
    assert np.isnan(average_recall([0] * 10, 0))


def test_coverage_by_hand():
    iou = np.array([[0.75, 0.2], [0.8, 0.1], [0.74, 0.7]])  # one prediction covers two masks
    assert covered(iou) == 2 and covered(np.zeros((3, 0))) == covered(np.zeros((0, 3))) == 0
    square = np.zeros((8, 8), np.uint8, order="F")
    square[:4, :4] = 1
    rle = coco_mask.encode(square)
    values = mask_scores([rle], [rle], [rle, coco_mask.encode(np.asfortranarray(1 - square))])
    assert (values["coverage"], values["ar_100"], values["miou"]) == (0.5, 1, 1)
    assert mask_scores([], [rle], [])["coverage"] is mask_scores([], [rle], [])["ar_100"] is None
    assert "coverage" not in mask_scores([rle], [rle], None)


images = st.lists(
    st.tuples(
        *(st.integers(0, 6).flatmap(lambda n: arrays(bool, (n, 4, 5))) for _ in range(2)),
        st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=6, max_size=6),
    ),
    min_size=1,
    max_size=3,
)


@settings(deadline=None)
@given(images)
def test_average_recall_is_cocos(images):
    limits = (1, 3, 100)
    truths, predictions = [], []
    matches, n_truth = np.zeros((len(limits), 10), int), 0
    for i, (truth, found, scores) in enumerate(images, 1):
        order = np.argsort([-score for score in scores[: len(found)]], kind="stable")
        rles = [[_rle(mask) for mask in masks] for masks in (truth, found)]
        truths += [(i, rle, None) for rle in rles[0]]
        predictions += [(i, rles[1][k], scores[k]) for k in range(len(found))]
        matches += recall_matches(iou_matrix(rles[0], [rles[1][k] for k in order]), limits)
        n_truth += len(truth)
    if truths and predictions:
        ours = [average_recall(counts, n_truth) for counts in matches.tolist()]
        assert ours == pytest.approx(cocos_recall(len(images), truths, predictions, limits))


def _rle(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def cocos_recall(n_images, truths, predictions, limits) -> list[float]:
    """Average recall of class-agnostic masks by COCOeval itself."""
    annotations = [
        [
            {"id": k, "image_id": i, "category_id": 1, "segmentation": rle, "iscrowd": 0}
            | {"area": float(coco_mask.area(rle)), "bbox": coco_mask.toBbox(rle).tolist()}
            | ({} if score is None else {"score": score})
            for k, (i, rle, score) in enumerate(rows, 1)
        ]
        for rows in (truths, predictions)
    ]
    sides = []
    with contextlib.redirect_stdout(io.StringIO()):
        for own in annotations:
            side = COCO()
            side.dataset = {
                "images": [{"id": i, "height": 4, "width": 5} for i in range(1, n_images + 1)],
                "annotations": own,
                "categories": [{"id": 1}],
            }
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, "segm")
        evaluation.params.useCats, evaluation.params.maxDets = 0, list(limits)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["recall"][:, 0, 0].mean(axis=0).tolist()
