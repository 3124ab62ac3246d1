"""Metrics, on cases small enough to work out by hand, and what must hold for any masks."""

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

from aopsam_lab import evaluator
from aopsam_lab.masks.rle import encode_rle as encode
from aopsam_lab.study.score import mask_scores

SIDE = 10


def rle(rows: slice, columns: slice) -> dict:
    mask = np.zeros((1, SIDE, SIDE), dtype=bool)
    mask[0, rows, columns] = True
    return encode(mask)[0]


LEFT, RIGHT = rle(slice(0, 10), slice(0, 5)), rle(slice(0, 10), slice(5, 10))
WHOLE, NOTHING = rle(slice(0, 10), slice(0, 10)), rle(slice(0, 0), slice(0, 0))


def test_nothing_scores_zero_and_without_ground_truth_it_is_no_number():
    for truth, found in ((LEFT, [NOTHING]), (LEFT, []), (NOTHING, [LEFT]), (NOTHING, [NOTHING])):
        score = evaluator.evaluate([truth], found)
        assert (score.miou, score.miou_best, *score.matches) == (0, 0, -1)
    for found in ([LEFT], []):
        score = evaluator.evaluate([], found)
        assert np.isnan([score.miou, score.miou_best]).all() and len(score.matches) == 0


def test_masks_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="share one"):
        evaluator.evaluate([LEFT], encode(np.ones((1, 4, 6), dtype=bool)))


def test_a_prediction_is_used_once_but_the_best_match_may_share():
    # Both overlap the one prediction, the left half exactly, the whole by half.
    score = evaluator.evaluate([WHOLE, LEFT], [LEFT])
    assert score.matches.tolist() == [-1, 0]
    assert score.miou == pytest.approx(0.5)  # (0 + 1) / 2
    assert score.miou_best == pytest.approx(0.75)  # (0.5 + 1) / 2


@pytest.mark.parametrize(
    ("iou", "matches"),
    [
        # highest first: the other assignment would reach (0.8 + 0.85) / 2
        ([[0.9, 0.8], [0.85, 0.0]], [0, -1]),
        ([[0.5, 0.5]], [0]),  # equal: the lower prediction
        ([[0.5], [0.5]], [0, -1]),  # equal: the lower ground truth
        ([[0.5, 0.5], [0.5, 0.5]], [0, 1]),
        # ground truth 0 before 1, though its prediction has the higher index
        ([[0.3, 0.5], [0.5, 0.5]], [1, 0]),
        ([[0.5, 0.3], [0.5, 0.0]], [0, -1]),  # nothing is left for ground truth 1
    ],
)
def test_greedy_matching_by_hand(iou, matches):
    assert evaluator.greedy_matching(np.array(iou)).tolist() == matches


def test_interval_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        _, low, high = evaluator.mean_interval(rng.normal(size=30))
        covered += low <= 0 <= high
    # of 60 draws; 57 expected, three standard deviations of a binomial below
    assert 51 <= covered <= 60


def test_intervals_of_many_few_and_equal_values():
    values = np.random.default_rng(3).uniform(size=24)
    mean, low, high = evaluator.mean_interval(values)
    assert (mean, low, high) == evaluator.mean_interval(values), "the same every time"
    assert low < mean < high and mean == pytest.approx(values.mean())
    assert np.isnan(evaluator.mean_interval([])).all()
    mean, low, high = evaluator.mean_interval([0.4])
    assert mean == 0.4 and np.isnan(low) and np.isnan(high)
    assert evaluator.mean_interval([0.4, 0.4, 0.4]) == (pytest.approx(0.4),) * 3
    assert np.isfinite(evaluator.mean_interval([0.0, 1.0])).all()


def test_a_paired_difference_is_narrower_than_the_spread_over_images():
    hard = np.linspace(0, 1, 24)
    mean, low, high = evaluator.paired_difference(hard + 0.05 + 0.001 * np.sin(np.arange(24)), hard)
    assert mean == pytest.approx(0.05, abs=1e-3) and high - low < 0.01
    with pytest.raises(ValueError, match="same images"):
        evaluator.paired_difference([1.0], [1.0, 2.0])


masks = st.integers(0, 6).flatmap(lambda n: arrays(bool, (n, 7, 6)))


@given(ground_truth=masks, predictions=masks)
def test_iou_agrees_with_counting_pixels(ground_truth, predictions):
    iou = evaluator.iou_matrix(encode(ground_truth), encode(predictions))
    for i, truth in enumerate(ground_truth):
        for j, prediction in enumerate(predictions):
            union = (truth | prediction).sum()
            assert iou[i, j] == pytest.approx((truth & prediction).sum() / union if union else 0)


# --- recall ---


@pytest.mark.parametrize(
    ("iou", "first", "both"),
    [
        # the first takes ground truth 1 up to an IoU of 0.75, the second ground truth 0 up to 0.60
        ([[0.55, 0.62], [0.77, 0.4], [0.3, 0.2]], [1] * 6 + [0] * 4, [2] * 3 + [1] * 3 + [0] * 4),
        # a better prediction comes too late where a surer one took its mask, up to 0.60
        ([[0.6, 0.9]], [1] * 3 + [0] * 7, [1] * 9 + [0]),
        # of equals the last is taken: the other choice would leave 0.6 unused
        ([[0.7, 0.6], [0.7, 0.0]], [1] * 5 + [0] * 5, [2] * 3 + [1] * 2 + [0] * 5),
    ],
)
def test_recall_by_hand(iou, first, both):
    assert evaluator.recall_matches(np.array(iou), (1, 2)).tolist() == [first, both]
    expected = pytest.approx(sum(both) / 10 / len(iou))
    assert evaluator.average_recall(both, len(iou)) == expected


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_recall_and_coverage_without_masks(shape):
    nothing = np.zeros(shape)
    assert evaluator.recall_matches(nothing).sum() == evaluator.covered(nothing) == 0
    assert np.isnan(evaluator.average_recall([0] * 10, 0))


def test_coverage_by_hand():
    iou = np.array([[0.75, 0.2], [0.8, 0.1], [0.74, 0.7]])  # one prediction covers two masks
    assert evaluator.covered(iou) == 2
    values = mask_scores([LEFT], [LEFT], [LEFT, RIGHT])
    assert (values["coverage"], values["ar_100"]) == (0.5, 1)
    assert "coverage" not in mask_scores([LEFT], [LEFT], None)


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
def test_average_recall_is_that_of_cocoeval(images):
    limits = (1, 3, 100)
    ground_truth, predictions = [], []
    matches, n_truth = np.zeros((len(limits), 10), int), 0
    for i, (truth, found, scores) in enumerate(images, 1):
        order = np.argsort([-score for score in scores[: len(found)]], kind="stable")
        rles = encode(truth), encode(found)
        ground_truth += [(i, rle, None) for rle in rles[0]]
        predictions += [(i, rles[1][k], scores[k]) for k in range(len(found))]
        matches += evaluator.recall_matches(
            evaluator.iou_matrix(rles[0], [rles[1][k] for k in order]), limits
        )
        n_truth += len(truth)
    if ground_truth and predictions:
        ours = [evaluator.average_recall(counts, n_truth) for counts in matches.tolist()]
        assert ours == pytest.approx(cocos_recall(len(images), ground_truth, predictions, limits))


def cocos_recall(n_images, ground_truth, predictions, limits) -> list[float]:
    """Average recall of class-agnostic masks by COCOeval itself."""
    drawn, found = (
        [
            {"id": k, "image_id": i, "category_id": 1, "segmentation": rle, "score": score}
            | {"iscrowd": 0, "area": float(coco_mask.area(rle))}
            for k, (i, rle, score) in enumerate(rows, 1)
        ]
        for rows in (ground_truth, predictions)
    )
    coco, sizes = COCO(), [{"id": i, "height": 4, "width": 5} for i in range(1, n_images + 1)]
    coco.dataset = {"images": sizes, "annotations": drawn, "categories": [{"id": 1}]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "segm")
        evaluation.params.useCats, evaluation.params.maxDets = 0, list(limits)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["recall"][:, 0, 0].mean(axis=0).tolist()
