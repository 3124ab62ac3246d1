"""Metrics, on cases small enough to work out by hand, and what must hold for any masks."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aopsam_lab import evaluator
from aopsam_lab.study.score import mask_scores

SIDE = 10


def rle(rows: slice, columns: slice) -> dict:
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
    mask[rows, columns] = 1
    return coco_mask.encode(mask)


LEFT, RIGHT = rle(slice(0, 10), slice(0, 5)), rle(slice(0, 10), slice(5, 10))
TOP, WHOLE = rle(slice(0, 5), slice(0, 10)), rle(slice(0, 10), slice(0, 10))
NOTHING = rle(slice(0, 0), slice(0, 0))


def test_iou_matrix_by_hand():
    # Top and left share 25 of 75 pixels; left is half of the whole; left and right share nothing.
    assert evaluator.iou_matrix([LEFT, WHOLE], [TOP, RIGHT, LEFT]) == pytest.approx(
        np.array([[1 / 3, 0, 1], [0.5, 0.5, 0.5]])
    )


def test_nothing_scores_zero_and_without_ground_truth_it_is_no_number():
    for truth, found in ((LEFT, [NOTHING]), (LEFT, []), (NOTHING, [LEFT]), (NOTHING, [NOTHING])):
        score = evaluator.evaluate([truth], found)
        assert (score.miou, score.miou_best, score.n_truth) == (0, 0, 1)
        assert score.matches.tolist() == [-1]
    for found in ([LEFT], []):
        score = evaluator.evaluate([], found)
        assert np.isnan(score.miou) and np.isnan(score.miou_best) and score.n_truth == 0


def test_masks_of_two_sizes_are_refused():
    other = coco_mask.encode(np.ones((4, 6), dtype=np.uint8, order="F"))
    with pytest.raises(ValueError, match="share one"):
        evaluator.evaluate([LEFT], [other])


def test_a_prediction_is_used_once_but_the_best_match_may_share():
    # Both ground_truth overlap the one prediction, the left half exactly, the whole by half.
    score = evaluator.evaluate([WHOLE, LEFT], [LEFT])
    assert score.matches.tolist() == [-1, 0]
    assert score.miou == pytest.approx(0.5)  # (0 + 1) / 2
    assert score.miou_best == pytest.approx(0.75)  # (0.5 + 1) / 2


def test_highest_iou_goes_first_even_where_that_costs_the_mean():
    iou = np.array([[0.9, 0.8], [0.85, 0.0]])  # the other assignment would reach (0.8 + 0.85) / 2
    score = evaluator.score_matrix(iou)
    assert score.matches.tolist() == [0, -1]
    assert score.miou == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("iou", "matches"),
    [
        ([[0.5, 0.5]], [0]),  # equal: the lower prediction
        ([[0.5], [0.5]], [0, -1]),  # equal: the lower truth
        ([[0.5, 0.5], [0.5, 0.5]], [0, 1]),
        # truth 0 before truth 1, though its prediction has the higher index
        ([[0.3, 0.5], [0.5, 0.5]], [1, 0]),
        ([[0.5, 0.3], [0.5, 0.0]], [0, -1]),  # truth 0 takes the tie; nothing is left for truth 1
    ],
)
def test_ties(iou, matches):
    assert evaluator.greedy_matching(np.array(iou)).tolist() == matches


def test_overlapping_masks_each_count_and_duplicates_do_not_help():
    # A part within its whole: both are ground_truth, both are found.
    score = evaluator.evaluate([WHOLE, LEFT], [LEFT, WHOLE])
    assert score.miou == 1 and score.matches.tolist() == [1, 0]
    assert evaluator.evaluate([LEFT, RIGHT], [LEFT, LEFT]).miou == pytest.approx(0.5)


def test_interval_is_the_same_every_time_and_holds_the_mean():
    values = np.random.default_rng(3).uniform(size=24)
    mean, low, high = evaluator.mean_interval(values)
    assert (mean, low, high) == evaluator.mean_interval(values)
    assert low < mean < high and mean == pytest.approx(values.mean())


def test_interval_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        _, low, high = evaluator.mean_interval(rng.normal(size=30))
        covered += low <= 0 <= high
    # of 60 draws; 57 expected, three standard deviations of a binomial below
    assert 51 <= covered <= 60


def test_intervals_of_few_or_equal_values():
    assert np.isnan(evaluator.mean_interval([])[0])
    mean, low, high = evaluator.mean_interval([0.4])
    assert mean == 0.4 and np.isnan(low) and np.isnan(high)
    assert evaluator.mean_interval([0.4, 0.4, 0.4]) == (pytest.approx(0.4),) * 3
    _, low, high = evaluator.mean_interval([0.0, 1.0])
    assert np.isfinite(low) and np.isfinite(high)


def test_a_paired_difference_is_narrower_than_the_spread_over_images():
    hard = np.linspace(0, 1, 24)
    mean, low, high = evaluator.paired_difference(hard + 0.05 + 0.001 * np.sin(np.arange(24)), hard)
    assert mean == pytest.approx(0.05, abs=1e-3) and high - low < 0.01
    with pytest.raises(ValueError, match="same images"):
        evaluator.paired_difference([1.0], [1.0, 2.0])


masks = st.integers(0, 6).flatmap(lambda n: arrays(bool, (n, 7, 6)))


def encode(pixels: np.ndarray) -> list[dict]:
    return [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in pixels]


@given(ground_truth=masks, predictions=masks)
def test_iou_agrees_with_counting_pixels(ground_truth, predictions):
    iou = evaluator.iou_matrix(encode(ground_truth), encode(predictions))
    for i, truth in enumerate(ground_truth):
        for j, prediction in enumerate(predictions):
            union = (truth | prediction).sum()
            assert iou[i, j] == pytest.approx((truth & prediction).sum() / union if union else 0)


@given(ground_truth=masks, predictions=masks)
def test_one_to_one_is_at_most_the_best_match(ground_truth, predictions):
    score = evaluator.evaluate(encode(ground_truth), encode(predictions))
    assume(score.n_truth)
    assert 0 <= score.miou <= score.miou_best + 1e-12 <= 1 + 2e-12
    used = score.matches[score.matches >= 0]
    assert len(set(used)) == len(used)


@given(ground_truth=masks, predictions=masks, seed=st.integers(0, 1000))
def test_order_changes_nothing_in_the_mean(ground_truth, predictions, seed):
    iou = evaluator.iou_matrix(encode(ground_truth), encode(predictions))
    overlaps = iou[iou > 0]
    # with exact ties the order is what decides, see above
    assume(len(np.unique(overlaps)) == len(overlaps))
    rng = np.random.default_rng(seed)
    parts = (encode(rng.permutation(masks)) for masks in (ground_truth, predictions))
    shuffled = evaluator.evaluate(*parts)
    score = evaluator.score_matrix(iou)
    assert shuffled.n_truth == score.n_truth
    if score.n_truth:
        assert shuffled.miou == pytest.approx(score.miou)
        assert shuffled.miou_best == pytest.approx(score.miou_best)


matrices = st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(
    lambda shape: arrays(float, shape, elements=st.floats(0, 1))
)


@given(iou=matrices)
def test_more_predictions_never_lower_the_best_match(iou):
    fewer, all_of_them = (evaluator.score_matrix(x) for x in (iou[:, :-1], iou))
    assert fewer.miou_best <= all_of_them.miou_best + 1e-12


# --- recall ---


def test_average_recall_by_hand():
    # The first takes ground truth 1 up to an IoU of 0.75, the second ground truth 0 up to 0.60.
    iou = np.array([[0.55, 0.62], [0.77, 0.4], [0.3, 0.2]])
    matches = evaluator.recall_matches(iou, (1, 2))
    assert matches[0].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert matches[1].tolist() == [2, 2, 2, 1, 1, 1, 0, 0, 0, 0]
    assert evaluator.average_recall(matches[1], 3) == pytest.approx(9 / 30)


def test_a_better_prediction_comes_too_late_where_a_surer_one_took_its_mask():
    iou = np.array([[0.6, 0.9]])  # the surer prediction takes the only mask up to 0.60
    assert evaluator.recall_matches(iou, (100,))[0].tolist() == [1] * 9 + [0]


def test_of_equals_the_last_is_taken():
    iou = np.array([[0.7, 0.6], [0.7, 0.0]])  # the other choice would leave 0.6 unused
    assert evaluator.recall_matches(iou, (100,))[0].tolist() == [2, 2, 2, 1, 1, 0, 0, 0, 0, 0]


def test_recall_without_masks():
    assert (
        evaluator.recall_matches(np.zeros((2, 0))).sum()
        == evaluator.recall_matches(np.zeros((0, 3))).sum()
        == 0
    )
    assert np.isnan(evaluator.average_recall([0] * 10, 0))


def test_coverage_by_hand():
    iou = np.array([[0.75, 0.2], [0.8, 0.1], [0.74, 0.7]])  # one prediction covers two masks
    assert (
        evaluator.covered(iou) == 2
        and evaluator.covered(np.zeros((3, 0))) == evaluator.covered(np.zeros((0, 3))) == 0
    )
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
def test_average_recall_is_cocos(images):
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
    annotations = [
        [
            {"id": k, "image_id": i, "category_id": 1, "segmentation": rle, "iscrowd": 0}
            | {"area": float(coco_mask.area(rle)), "bbox": coco_mask.toBbox(rle).tolist()}
            | ({} if score is None else {"score": score})
            for k, (i, rle, score) in enumerate(rows, 1)
        ]
        for rows in (ground_truth, predictions)
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
