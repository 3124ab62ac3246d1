import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, maximum_filter

from aopsam_lab import asf
from aopsam_lab.asf import FIRST, REFERENCE_IOU, AsfParams, FilteredProposal
from aopsam_lab.pipeline.types import Found, Prompts


def random_map(seed: int, side: int = 48) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((side, side))).float()


# --- sampling ---


def test_smoothing_equals_scipy():
    x = random_map(0)
    expected = gaussian_filter(x.numpy(), 1.7, mode="nearest", truncate=4.0)
    assert np.allclose(asf.smooth(x, 1.7).numpy(), expected, atol=1e-6)
    assert asf.smooth(x, 0.0) is x


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), spacing=st.integers(1, 7), threshold=st.floats(0, 0.99))
def test_local_maxima_are_the_highest_of_their_windows(seed, spacing, threshold):
    x = random_map(seed)
    cells, values = asf.local_maxima(x, threshold, spacing)
    highest = maximum_filter(x.numpy(), 2 * spacing + 1, mode="constant") == x.numpy()
    expected = np.argwhere(highest & (x.numpy() > threshold))
    assert sorted(cells.tolist()) == expected.tolist()
    assert (values.diff() <= 0).all()


def test_maxima_of_peaks_ties_and_a_plateau_by_hand():
    x = torch.zeros(7, 9)
    x[1, 1], x[1, 3], x[5, 7], x[5, 1] = 0.9, 0.8, 0.5, 0.5
    # (1, 3) lies in the window of (1, 1); ties go row, then column
    cells, values = asf.local_maxima(x, 0.2, 2)
    assert cells.tolist() == [[1, 1], [5, 1], [5, 7]]
    assert values.tolist() == pytest.approx([0.9, 0.5, 0.5])
    assert asf.local_maxima(x, 0.2, 1)[0].tolist() == [[1, 1], [1, 3], [5, 1], [5, 7]]
    assert len(asf.local_maxima(x, 0.5, 1)[0]) == 2, "the threshold itself does not pass"
    plateau = torch.zeros(6, 20)
    plateau[2, 2:16] = 0.7
    one_a_window = [[2, 2], [2, 6], [2, 10], [2, 14]]
    assert asf.local_maxima(plateau, 0.1, 3)[0].tolist() == one_a_window


def test_spacing_scales_with_the_map():
    x = torch.zeros(160, 160)
    x[80, 80], x[80, 83], x[80, 87], x[40, 40], x[44, 40] = 1.0, 0.9, 0.8, 0.7, 0.6
    # at a width of 160 a spacing of 6 (of 256) is 3.75 cells: three away is within it, four is not
    assert asf.sample_prompts(x, 0, 0.2, 6)[0].tolist() == [[80, 80], [80, 87], [40, 40], [44, 40]]
    assert len(asf.sample_prompts(x, 0, 0.2, 6.4)[0]) == 2, "6.4 is four cells, exactly"


def test_each_component_gives_one_prompt_at_its_highest_cell():
    x = torch.zeros(8, 8)
    x[1, 1], x[2, 2], x[1, 5], x[6, 6] = 0.4, 0.6, 0.9, 0.15  # the first two touch at a corner
    cells, values = asf.component_prompts(x, 0.2)
    assert cells.tolist() == [[1, 5], [2, 2]]
    assert values.tolist() == pytest.approx([0.9, 0.6])


@pytest.mark.parametrize("sample", [asf.sample_prompts, asf.component_prompts])
def test_a_map_below_the_confidence_gives_no_prompts(sample):
    cells, values = sample(torch.full((32, 32), 0.1))
    assert cells.shape == (0, 2) and values.shape == (0,)


@pytest.mark.parametrize(
    "bad", [dict(smoothing=-1), dict(confidence=1.0), dict(spacing=0), dict(elimination=0)]
)
def test_bad_parameters_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AsfParams(**bad)


# --- filtering ---


@given(st.integers(1, 96), st.integers(1, 96), st.integers(1, 24), st.integers(1, 24))
@example(18, 96, 24, 4)  # the centre of a row lies at 18 of 96: just beyond the picture
@example(19, 96, 24, 4)
def test_valid_cells_are_those_whose_centres_lie_on_the_picture(high, wide, rows, columns):
    ys, xs = ((np.arange(n) + 0.5) * 96 / n for n in (rows, columns))
    inside_y, inside_x = ys < high, xs < wide
    inside_y[0] = inside_x[0] = True  # a strip thinner than half a cell has one
    wanted = inside_y[:, None] & inside_x
    assert np.array_equal(asf.valid_cells((high, wide), 96, (rows, columns)).numpy(), wanted)


def two_tone() -> tuple[torch.Tensor, torch.Tensor]:
    """2 x 2 grid: left and right cells point opposite ways, all in a large shared direction."""
    features = torch.zeros(2, 2, 2)
    features[0, :, 0], features[0, :, 1], features[1] = 1.0, -1.0, 50.0
    return features, torch.ones(2, 2, dtype=torch.bool)


def test_centring_removes_what_all_cells_share_and_leaves_padding_out():
    features, valid = two_tone()
    centred = asf.centred_features(features, valid)
    assert centred[1].abs().max() == 0 and centred[0].tolist() == [[1, -1], [1, -1]]
    valid[1] = False
    features[0, 1] = 100.0
    assert asf.centred_features(features, valid)[0].tolist() == [[1, -1], [0, 0]]


def test_references_maps_thresholds_and_elimination_by_hand():
    features, valid = two_tone()
    centred = asf.centred_features(features, valid)
    coverage = torch.tensor([[[1.0, 0.0], [0.5, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    references = asf.reference_features(centred, coverage)
    assert references.tolist() == [[1.0, 0.0], [0.0, 0.0]]  # of the left column, and of no cell
    pems = asf.elimination_maps(centred, references)
    assert pems.tolist() == [[[1.0, 0.0], [1.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]]]
    thresholds = asf.elimination_thresholds(pems, coverage, valid, 1.3, floor=False)
    assert thresholds.tolist() == pytest.approx([0.65, 0.65])
    by, value = asf.eliminate(pems, thresholds, torch.tensor([[0, 0], [0, 1], [1, 0]]))
    assert by.tolist() == [0, -1, 0] and value[0] == 1 and value[1].isnan()


def test_the_map_furthest_above_its_threshold_eliminates():
    pems = torch.tensor([[[0.9, 0.6]], [[0.8, 0.1]]])  # the first cell: factors 1.29 and 1.78
    cells = torch.tensor([[0, 0], [0, 1]])
    by, value = asf.eliminate(pems, torch.tensor([0.7, 0.45]), cells)
    assert by.tolist() == [1, -1] and value[0].item() == pytest.approx(0.8)
    by, _ = asf.eliminate(pems[1:], pems[1, :, 0], cells)
    assert by.tolist() == [-1, -1], "the threshold itself does not eliminate"


def test_threshold_is_the_larger_of_mean_and_own_quantile():
    pem = torch.tensor([[[0.9, 0.8, 0.7, 0.6], [0.2, 0.2, 0.2, 0.0]]])
    valid = torch.ones(2, 4, dtype=torch.bool)
    valid[1, 3] = False
    mean = (0.9 + 0.8 + 0.7 + 0.6 + 3 * 0.2) / 7
    coverage = torch.tensor([[[1.0, 0.5, 1.0, 1.0], [0.4, 0, 0, 1.0]]])  # own cells: the first row
    assert asf.elimination_thresholds(pem, coverage, valid, 1.7).item() == pytest.approx(1.7 * mean)
    # 0.1 of the way from 0.6 to 0.9
    assert asf.elimination_thresholds(pem, coverage, valid, 1.0).item() == pytest.approx(0.63)
    assert asf.elimination_thresholds(pem, coverage * 0.3, valid, 1.0).item() == pytest.approx(mean)


def filtered(features: torch.Tensor, cells: torch.Tensor, elimination: float) -> FilteredProposal:
    """Prompts of falling confidence on a grid of 1 x 4 cells."""
    prompts = Prompts(torch.zeros(len(cells), 2), torch.linspace(0.9, 0.5, len(cells)))
    valid = torch.ones(1, 4, dtype=torch.bool)
    return FilteredProposal(
        prompts, cells=cells, valid=valid, features=features, grid=(1, 4), elimination=elimination
    )


def observe(proposal, logits: torch.Tensor, iou: list[float], lefts: list[int], prompt: list[int]):
    """Masks with boxes of 10 x 10 pixels from `lefts` on."""
    boxes = torch.tensor([[left, 0, left + 9, 9] for left in lefts])
    scores, prompt = torch.tensor(iou), torch.tensor(prompt)
    proposal.observe(Found(logits, scores, scores, boxes, prompt, best_iou=scores), 0.0)


@pytest.mark.parametrize("rows, gone", [(4, True), (2, True), (1, False)])
def test_a_mask_that_fills_no_cell_explains_nothing(rows, gone):
    """Cells at 20, -20, 0 and 90 degrees; a mask on the first two looks most like the third."""
    angles = torch.tensor([[20.0, -20.0, 0.0, 90.0]]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()])
    proposal = filtered(features, torch.tensor([[0, 0], [0, 2]]), 1.0)
    proposal.waiting[0] = False  # the first prompt has been decoded
    logits = torch.zeros(1, 4, 16)  # a logit at the threshold is off the mask
    logits[0, :rows, :8] = 1  # of four rows in a cell
    observe(proposal, logits, [1.0], [0], [0])
    second = proposal.next_round()
    assert (second is None) == gone
    assert (proposal.eliminated_by[1] == 0) == gone
    assert not proposal.waiting.any()
    assert len(proposal.pems) == gone


def test_references_are_sure_masks_one_a_prompt_and_one_a_place():
    count = math.floor(4 / FIRST)
    proposal = filtered(torch.ones(1, 1, 4), torch.zeros(count, 2, dtype=torch.long), 0.5)
    assert proposal.next_round().tolist() == [0, 1, 2, 3]
    iou, lefts = [0.8, 0.9, 0.7, 0.85, REFERENCE_IOU - 0.01], [0, 0, 40, 20, 60]
    observe(proposal, torch.ones(5, 4, 16), iou, lefts, [0, 1, 1, 2, 3])
    proposal.next_round()
    assert [prompt for prompt, _ in proposal.references] == [1, 2]


def test_whitening_takes_correlation_out_of_the_features():
    torch.manual_seed(0)
    mix = torch.randn(6, 6)
    embedding = (mix @ torch.randn(6, 400)).view(6, 20, 20) + 30
    valid = torch.ones(20, 20, dtype=torch.bool)
    valid[15:] = False
    white = asf.whitened_features(embedding, valid)
    assert white[:, ~valid].abs().max() == 0
    cells = white[:, valid]
    covariance = cells @ cells.T / cells.shape[1]
    off = covariance - covariance.diagonal().diag()
    raw = embedding[:, valid]
    assert off.abs().max() < 0.5 * torch.corrcoef(raw).fill_diagonal_(0).abs().max()
    assert covariance.diagonal().max() <= 1


def test_features_are_half_look_half_place_and_padding_may_be_left_away():
    torch.manual_seed(1)
    look, place = torch.randn(8, 9, 9), torch.randn(8, 9, 9)
    valid = torch.zeros(9, 9, dtype=torch.bool)
    valid[:6, :7] = True
    whole = asf.elimination_features(look, place, valid)
    assert whole.shape == (8, 9, 9) and whole[:, ~valid].abs().max() == 0
    halves = whole[:, valid].unflatten(0, (2, 4)).norm(dim=1)
    assert torch.allclose(halves, torch.full((2, 42), 0.5**0.5), atol=1e-5)
    part = asf.elimination_features(look[:, :7, :7], place[:, :7, :7], valid[:7, :7])
    assert torch.allclose(part, whole[:, :7, :7], atol=1e-5)


def test_the_gate_spares_a_like_object_elsewhere():
    pem = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]])
    gate = asf.dilate(torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]))
    assert gate.tolist() == [[[True, True, False, False]]]
    cells = torch.tensor([[0, 0], [0, 1], [0, 3]])
    assert asf.eliminate(pem, torch.tensor([0.65]), cells)[0].tolist() == [0, -1, 0]
    assert asf.eliminate(pem, torch.tensor([0.65]), cells, gate)[0].tolist() == [0, -1, -1]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_higher_threshold_removes_no_more(seed):
    rng = torch.Generator().manual_seed(seed)
    pems, coverage, gates = torch.rand(3, 5, 8, 8, generator=rng)
    valid = torch.rand(8, 8, generator=rng) > 0.3
    valid[0, 0] = True
    cells = torch.randint(8, (30, 2), generator=rng)
    thresholds = [asf.elimination_thresholds(pems, coverage, valid, t) for t in (1.25, 1.3, 1.4)]
    gone = [asf.eliminate(pems, t, cells)[0] >= 0 for t in thresholds]
    assert (gone[1] <= gone[0]).all() and (gone[2] <= gone[1]).all()
    gated = asf.eliminate(pems, thresholds[0], cells, gates > 0.5)[0] >= 0
    assert (gated <= gone[0]).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_coverage_is_the_share_of_a_cell_that_the_mask_fills(seed):
    rng = torch.Generator().manual_seed(seed)
    masks = torch.rand(3, 12, 20, generator=rng) < torch.rand(3, 1, 1, generator=rng)
    pooled = torch.nn.functional.avg_pool2d(masks.float()[:, None], 4)[:, 0]
    assert torch.equal(asf.cell_coverage(masks), pooled)
