import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from small import all_masks, stock_predictor
from torch.utils._python_dispatch import TorchDispatchMode

import aopsam_lab as aop
from aopsam_lab.asf import FIRST, NO_COSINE, ROUNDS, AsfParams
from aopsam_lab.evaluator import iou_matrix
from aopsam_lab.pipeline import decode as decoding
from aopsam_lab.pipeline import run as pipeline
from aopsam_lab.pipeline.decode import encode
from aopsam_lab.pipeline.methods import METHODS, Grid, method_named
from aopsam_lab.pipeline.run import run_method
from aopsam_lab.pipeline.types import Models
from aopsam_lab.sam.zoo import load_sam
from aopsam_lab.widgets.session import Session
from aopsam_lab.widgets.sources import Opened

FEW = AsfParams(spacing=10, confidence=0.05, elimination=1.1)


@pytest.fixture(scope="module")
def pictures():
    rng, shapes = np.random.default_rng(0), [(96, 96), (60, 96), (96, 51)]  # with padding
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


@pytest.fixture(scope="module")
def result(sam, predictor, photo):
    return run_method(sam, photo, "aop", predictor, params=FEW)


def test_encoding_equals_sam_predictor(small_sam, pictures):
    stock = SamPredictor(small_sam)
    for image in pictures:
        stock.set_image(image)
        ours = encode(small_sam, image)
        assert torch.equal(ours.embedding, stock.features)
        assert tuple(ours.input_size) == tuple(stock.input_size)
        point = np.array([[13.5, 40.25]])
        expected = stock.transform.apply_coords(point, image.shape[:2])
        assert np.allclose(ours.to_model(torch.tensor(point)).numpy(), expected)
        assert np.allclose(ours.to_image(ours.to_model(torch.tensor(point))).numpy(), point)


def test_a_grid_keeps_the_masks_of_the_stock_generator(sam, photo):
    """As many, each matched at an IoU of 0.98: a logit near zero falls to either side."""
    stock = SamAutomaticMaskGenerator(sam, 6, output_mode="coco_rle")
    stock.predictor = stock_predictor(sam, photo)
    stock.predictor.set_image = stock.predictor.reset_image = lambda *_: None
    expected = [record["segmentation"] for record in stock.generate(photo.image)]
    iou = iou_matrix(expected, run_method(sam, photo, Grid("grid", 6)).masks)
    assert len(expected) > 10, "too few masks for the comparison to mean anything"
    assert iou.shape == (len(expected),) * 2
    assert min(iou.max(0).min(), iou.max(1).min()) > 0.98


@pytest.mark.parametrize("method", sorted(n for n, m in METHODS.items() if m.needs != "detector"))
def test_every_method_accounts_for_every_prompt(sam, small_sam, predictor, photo, pictures, method):
    grid = method.startswith("amg")
    model, encoded = (small_sam, encode(small_sam, pictures[1])) if grid else (sam, photo)
    result = run_method(model, encoded, method, predictor, params=FEW)
    table = result.prompts
    assert len(table) == result.n_sampled == result.n_decoded + result.n_eliminated
    assert (table["status"] == "eliminated").sum() == result.n_eliminated
    assert ((table["by"] >= 0) == (table["status"] == "eliminated")).all()
    assert ((table["round"] < 0) == (table["status"] == "eliminated")).all()
    assert set(table.index[table["status"] == "kept"]) == set(result.mask_prompt)
    h, w = result.image.shape[:2]
    assert table["x"].between(0, w).all() and table["y"].between(0, h).all()
    assert (np.diff(result.scores) <= 0).all()
    parts = [result.seconds[stage] for stage in ("encode", "infer", "mask")]
    assert result.seconds["total"] == pytest.approx(sum(parts))
    assert (result.pcm is None) == grid


def test_masks_encoded_early_are_the_same_and_their_logits_are_gone(
    sam, predictor, photo, result, monkeypatch
):
    waiting, remove = [], pipeline.remove_duplicates

    def watched(sam, encoded, found, quality):
        waiting.append(sum(len(part.low_res) for part in found))
        return remove(sam, encoded, found, quality)

    monkeypatch.setattr(pipeline, "remove_duplicates", watched)
    monkeypatch.setattr(decoding, "KEPT_LOGITS", 0)
    run_method(sam, photo, "aop", predictor, params=FEW)
    assert waiting.pop(), "as many as a few masks of the picture's size take may wait"
    monkeypatch.setattr(decoding, "KEPT_MASKS", 0)
    one = 4 * math.prod(sam.prompt_encoder.mask_input_size)
    for kept in (0, 5 * one):  # none, and what a few masks take
        monkeypatch.setattr(decoding, "KEPT_LOGITS", kept)
        early = run_method(sam, photo, "aop", predictor, params=FEW)
        assert early.masks == result.masks and early.scores.tolist() == result.scores.tolist()
        assert early.prompts.equals(result.prompts)
        assert waiting.pop() * one <= kept and len(result.masks) > 4


def test_the_strongest_are_decoded_first_and_only_others_eliminated(result):
    table = result.prompts
    decoded, gone = table[table["round"] >= 0], table[table["by"] >= 0]
    assert (decoded["round"] == 0).sum() == math.ceil(FIRST * len(table))
    assert decoded["round"].max() == ROUNDS - 1
    assert decoded.sort_values("round", kind="stable")["confidence"].is_monotonic_decreasing
    assert gone["confidence"].max() <= decoded[decoded["round"] == 0]["confidence"].min()
    assert gone["by"].nunique() > 1, "masks of several rounds eliminate"


def test_the_table_of_prompts_is_rounded_and_has_no_empty_columns(sam, predictor, photo, result):
    grid = run_method(sam, photo, Grid("grid", 3)).prompts
    assert list(grid) == ["x", "y", "confidence", "by", "round", "status"]
    assert list(result.prompts) == ["x", "y", "confidence", "by", "pem", "round", "status"]
    points = result.prompts[["x", "y"]].to_numpy()
    assert np.array_equal(points, points.round(2))
    assert result.prompts["pem"].notna().any()


def test_elimination_maps_cover_the_padding_and_hold_the_values(photo, result):
    h, w = photo.embedding.shape[-2:]
    rows = math.ceil(result.input_size[0] * h / result.model_size)
    assert result.pems.shape[1:] == (h, w) and rows < h
    assert (result.pems[:, rows:] == NO_COSINE).all()
    assert (result.pems[:, : rows - 1] != NO_COSINE).any((1, 2)).all()
    gone = result.prompts[result.prompts["by"] >= 0]
    assert len(gone)
    points = photo.to_model(torch.tensor(gone[["x", "y"]].to_numpy()))
    x, y = (points / result.model_size * w).int().numpy().T
    np.testing.assert_allclose(result.pems[gone["by"], y, x], gone["pem"], atol=1e-6)


def test_references_say_whose_mask_and_at_which_threshold(sam, predictor, photo, result):
    table, references = result.prompts, result.references
    assert len(references) == len(result.pems)
    gone = table[table["by"] >= 0]
    assert (gone["pem"].to_numpy() > references["threshold"].iloc[gone["by"]].to_numpy()).all()
    assert table["status"].iloc[references["prompt"]].isin(["kept", "duplicate"]).all()
    assert table["round"].iloc[references["prompt"]].is_monotonic_increasing
    no_filter = run_method(sam, photo, "aop_no_af", predictor, params=FEW, max_prompts=5)
    assert len(no_filter.references) == 0


def test_prompts_never_lie_on_the_padding(small_sam, small_predictor, pictures):
    encoded, params = encode(small_sam, pictures[0][:17]), AsfParams(confidence=0.0)
    result = run_method(small_sam, encoded, "aop_no_af", small_predictor, params=params)
    assert len(result.prompts) and result.prompts["y"].max() < 17
    valid = math.ceil(len(result.pcm) * 17 / 96)
    assert result.pcm[:valid].any() and (result.pcm[valid:] == 0).all()


@torch.inference_mode()
def test_each_parameter_of_sampling_changes_the_number_of_prompts(predictor, photo):
    def sampled(**values):
        method = method_named("aop_no_af")
        return len(method.start(photo, Models(predictor), AsfParams(**values)).prompts)

    assert sampled(confidence=0.5) < sampled(confidence=0.2)
    assert sampled(spacing=12) < sampled(spacing=6) < sampled(spacing=2)
    assert sampled(smoothing=4) < sampled(smoothing=2)


def test_one_pixel_is_segmented_and_a_missing_model_is_named(small_sam, small_predictor):
    encoded = encode(small_sam, np.zeros((1, 1, 3), np.uint8))
    assert run_method(small_sam, encoded, "aop", small_predictor).image.shape == (1, 1, 3)
    with pytest.raises(ValueError, match="needs a predictor"):
        run_method(small_sam, encoded, "aop")
    with pytest.raises(ValueError, match="amg_s"):
        run_method(small_sam, encoded, "nonesuch")


def test_a_box_is_decoded_to_one_mask(sam, photo):
    class Boxes:
        def boxes(self, image, max_boxes):
            assert max_boxes == 100
            corners = np.array([[100, 80, 300, 260], [5, 60, 40, 110]], np.float32)
            return corners, np.array([0.9, 0.4], np.float32)

    result = run_method(sam, photo, "oas_box", detector=Boxes())
    assert result.n_decoded == 2 and len(result.masks) <= 2
    assert result.prompts.loc[0, ["x", "y", "x1"]].tolist() == [200, 170, 300]
    box = np.array([100, 80, 300, 260])
    masks, scores, _ = stock_predictor(sam, photo).predict(box=box, multimask_output=False)
    proposal = method_named("oas_box").start(photo, Models(detector=Boxes()), AsfParams())
    with torch.inference_mode():
        found = all_masks(sam, photo, proposal.prompts, 0)
        ours = decoding.full_resolution(sam, photo, found.low_res)[0] > 0
    assert found.iou.tolist() == pytest.approx(scores.tolist(), abs=1e-4)
    assert (ours.numpy() != masks[0]).mean() < 1e-3


class NoDoubles(TorchDispatchMode):
    """Apple's GPU has no float64: none is made, on whatever device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else [made]:
            assert getattr(value, "dtype", None) != torch.float64, func
        return made


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_no_tensor_is_double(small_sam, small_predictor, pictures, monkeypatch, method, on_gpu):
    if on_gpu:  # its way of resizing
        monkeypatch.setattr("aopsam_lab.masks.fullsize._on_cpu", lambda _: False)
    detector = SimpleNamespace(boxes=lambda *_: (np.float32([[5, 5, 30, 40]]), np.float32([0.9])))
    with NoDoubles():
        encoded = encode(small_sam, pictures[1])
        params = AsfParams(confidence=0, spacing=60)
        result = run_method(small_sam, encoded, method, small_predictor, detector, params)
        assert result.n_decoded
        session = Session(Opened(pictures[1]), small_sam)
        session.candidates(result, 0)
        session.ask([(9.5, 7.0, 1), (20.0, 7.0, 0)])


def test_segment_takes_any_picture_and_keeps_its_models(pictures, monkeypatch):
    loads = []
    monkeypatch.setattr(pipeline, "load_sam", lambda *a, **k: loads.append(a) or load_sam(*a, **k))
    pipeline._loaded.cache_clear()  # other tests load models as well
    grey = pictures[1].mean(2).astype(np.uint8)
    result = aop.segment(grey, device="cpu", max_prompts=3, params=AsfParams(confidence=0.0))
    assert result.image.shape == (*grey.shape, 3) and result.n_decoded == 3
    again = aop.segment(grey, method="amg_s", device=torch.device("cpu"), max_prompts=4)
    assert again.n_decoded == 4 and again.n_sampled == 256
    if not torch.cuda.is_available():
        assert pipeline.loaded_sam("mobile_sam") is pipeline.loaded_sam("mobile_sam", "cpu")
    assert loads == [("mobile_sam",)]
