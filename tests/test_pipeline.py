import math

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

from aopsam_lab import decoding, pipeline
from aopsam_lab.asf import NO_COSINE, AsfParams
from aopsam_lab.data.scenes import render, scene
from aopsam_lab.methods import FIRST, METHODS, ROUNDS, Models, method_named
from aopsam_lab.decoding import encode
from aopsam_lab.pipeline import run_method


@pytest.fixture(scope="module")
def pictures():
    """Ten scenes of training seeds, some cut to other shapes, so that padding and scaling are met."""
    images = render(range(10_000, 10_010), 192).images.permute(0, 2, 3, 1).numpy()
    cuts = [(192, 192), (120, 192), (192, 101)]
    return [np.ascontiguousarray(image[: cuts[i % 3][0], : cuts[i % 3][1]]) for i, image in enumerate(images)]


def test_encoding_equals_sam_predictor(sam, pictures):
    stock = SamPredictor(sam)
    for image in pictures[:3]:
        stock.set_image(image)
        ours = encode(sam, image)
        assert torch.equal(ours.embedding, stock.features)
        assert tuple(ours.input_size) == tuple(stock.input_size)
        point = np.array([[13.5, 40.25]])
        expected = stock.transform.apply_coords(point, image.shape[:2])
        assert np.allclose(ours.to_model(torch.tensor(point)).numpy(), expected)
        assert np.allclose(ours.to_image(ours.to_model(torch.tensor(point))).numpy(), point)


def test_amg_keeps_the_masks_of_the_stock_generator(sam, pictures):
    """Same settings, ten pictures: same count, each mask matched at IoU >= 0.99.

    A mask of fewer than a hundred pixels may differ in one: a logit within rounding of zero falls to either side.
    """
    stock = SamAutomaticMaskGenerator(
        sam,
        points_per_side=16,
        pred_iou_thresh=sam.spec.pred_iou_thresh,
        stability_score_thresh=sam.spec.stability_score_thresh,
        output_mode="coco_rle",
    )
    total = 0
    for image in pictures:
        expected = [record["segmentation"] for record in stock.generate(image)]
        ours = run_method(sam, encode(sam, image), "amg_s").masks
        assert len(ours) == len(expected)
        total += len(ours)
        if expected:
            iou = coco_mask.iou(ours, expected, [0] * len(expected))
            area = np.array([coco_mask.area(mask) for mask in ours], float)  # one by one: its list form fails at 256
            least = np.minimum(0.99, (area - 1) / area)
            assert (iou.max(1) >= least).all()
            assert (iou.max(0) >= np.minimum(0.99, (area[iou.argmax(0)] - 1) / area[iou.argmax(0)])).all()
    assert total > 20, "too few masks for the comparison to mean anything"


@pytest.mark.parametrize("method", sorted(name for name, m in METHODS.items() if m.needs != "detector"))
def test_every_method_accounts_for_every_prompt(sam, predictor, pictures, method):
    result = run_method(sam, encode(sam, pictures[1]), method, predictor)
    table = result.prompts
    assert len(table) == result.n_sampled == result.n_decoded + result.n_eliminated
    assert (table["status"] == "eliminated").sum() == result.n_eliminated == (table["by"] >= 0).sum()
    assert ((table["round"] < 0) == (table["status"] == "eliminated")).all()
    assert set(table.index[table["status"] == "kept"]) == set(result.mask_prompt)
    h, w = result.image.shape[:2]
    assert table["x"].between(0, w).all() and table["y"].between(0, h).all()
    assert (np.diff(result.scores) <= 0).all()
    assert result.seconds["total"] == pytest.approx(sum(result.seconds[k] for k in ("encode", "infer", "mask")))
    assert (result.pcm is None) == method.startswith("amg")


@pytest.mark.parametrize("method", ["amg_s", "aop"])
def test_masks_encoded_early_are_the_same_and_their_logits_are_gone(sam, predictor, pictures, method, monkeypatch):
    whole = run_method(sam, encode(sam, pictures[0]), method, predictor)
    waiting, remove = [], pipeline.remove_duplicates

    def watched(sam, encoded, found):
        waiting.append(sum(len(part.low_res) for part in found))
        return remove(sam, encoded, found)

    monkeypatch.setattr(pipeline, "remove_duplicates", watched)
    monkeypatch.setattr(decoding, "KEPT_LOGITS", 0)
    run_method(sam, encode(sam, cv2.resize(pictures[0], (1280, 1280))), method, predictor)
    assert waiting.pop(), "of a larger picture more logits wait"
    monkeypatch.setattr(decoding, "KEPT_MASKS", 0)
    for kept in (0, 200 << 10):  # none, and what a few masks take
        monkeypatch.setattr(decoding, "KEPT_LOGITS", kept)
        early = run_method(sam, encode(sam, pictures[0]), method, predictor)
        assert early.masks == whole.masks and early.scores.tolist() == whole.scores.tolist()
        assert early.prompts.equals(whole.prompts)
        assert waiting.pop() * 4 * math.prod(sam.prompt_encoder.mask_input_size) <= kept and len(whole.masks) > 4


def test_the_strongest_are_decoded_first_and_only_others_eliminated(sam, predictor, pictures):
    table = run_method(sam, encode(sam, pictures[0]), "aop", predictor, params=AsfParams(confidence=0.05)).prompts
    decoded = table[table["round"] >= 0]
    assert (decoded["round"] == 0).sum() == math.ceil(FIRST * len(table)) and decoded["round"].max() == ROUNDS - 1
    assert decoded.sort_values("round", kind="stable")["confidence"].is_monotonic_decreasing
    gone = table[table["by"] >= 0]
    assert gone["confidence"].max() <= decoded[decoded["round"] == 0]["confidence"].min()
    assert gone["by"].nunique() > 1, "masks of several rounds eliminate"
    assert len(gone), "the picture should see some prompt eliminated"


def test_elimination_values_are_on_the_maps(sam, predictor, pictures):
    encoded = encode(sam, pictures[0])
    params = AsfParams(confidence=0.05)
    result = run_method(sam, encoded, "aop", predictor, params=params)
    side = result.pems.shape[-1]
    for _, row in result.prompts[result.prompts["by"] >= 0].iterrows():
        x, y = encoded.to_model(torch.tensor([row["x"], row["y"]])).tolist()
        cell = int(y / result.model_size * side), int(x / result.model_size * side)
        assert result.pem(int(row["by"]))[cell] == pytest.approx(row["pem"], abs=1e-6)


def test_elimination_maps_cover_the_padding_too(sam, predictor, pictures):
    result = run_method(sam, encode(sam, pictures[0][:100]), "aop", predictor, params=AsfParams(confidence=0.05))
    h, w = sam.prompt_encoder.image_embedding_size
    rows = math.ceil(result.input_size[0] * h / result.model_size)
    assert result.pems.shape[1:] == (h, w) and rows < h
    assert (result.pems[:, rows:] == NO_COSINE).all() and (result.pems[:, : rows - 1] != NO_COSINE).any((1, 2)).all()


def test_prompts_never_lie_on_the_padding(sam, predictor):
    image = scene(10_003, 96).image[:17]
    result = run_method(sam, encode(sam, image), "aop_no_af", predictor, params=AsfParams(confidence=0.0))
    assert len(result.prompts) and result.prompts["y"].max() < 17
    assert (result.pcm[-64:] == 0).all()


def test_turning_sliders_off_gives_fewer_or_more(sam, predictor, pictures):
    encoded = encode(sam, pictures[0])

    def sampled(**knobs):
        return run_method(sam, encoded, "aop_no_af", predictor, params=AsfParams(**knobs)).n_sampled

    assert sampled(confidence=0.4) <= sampled(confidence=0.2) <= sampled(confidence=0.05)
    assert sampled(spacing=12) <= sampled(spacing=6) <= sampled(spacing=2)


def test_a_missing_model_is_named(sam, pictures):
    encoded = encode(sam, pictures[0])
    with pytest.raises(ValueError, match="predictor"):
        run_method(sam, encoded, "aop")
    with pytest.raises(ValueError, match="amg_s"):
        method_named("nonesuch")


def test_one_pixel_picture(sam, predictor):
    result = run_method(sam, encode(sam, np.zeros((1, 1, 3), np.uint8)), "aop", predictor)
    assert result.image.shape == (1, 1, 3)


def test_a_box_is_decoded_to_one_mask(sam, pictures):
    class Boxes:
        def boxes(self, image, max_boxes):
            assert max_boxes == 100
            return np.array([[10, 10, 90, 80], [5, 60, 40, 110]], np.float32), np.array([0.9, 0.4], np.float32)

    encoded = encode(sam, pictures[0])
    result = run_method(sam, encoded, "oas_box", detector=Boxes())
    assert result.n_decoded == 2 and len(result.masks) <= 2
    assert result.prompts.loc[0, ["x", "y", "x1"]].tolist() == [50, 45, 90]
    stock = SamPredictor(sam)
    stock.set_image(encoded.image)
    masks, scores, _ = stock.predict(box=np.array([10, 10, 90, 80]), multimask_output=False)
    proposal = method_named("oas_box").start(encoded, Models(detector=Boxes()), AsfParams())
    with torch.inference_mode():
        spec = sam.spec.__class__("tiny", -1.0, 0.0, "")
        found = decoding.decode_and_filter(sam, encoded, proposal.prompts, torch.tensor([0]), spec)
        ours = decoding.full_resolution(sam, encoded, found.low_res)[0] > 0
    assert float(scores[0]) == pytest.approx(float(found.iou[0]), abs=1e-4)
    assert (ours.numpy() != masks[0]).mean() < 1e-3


def test_segment_takes_any_picture_and_keeps_its_models(pictures, monkeypatch):
    import aopsam_lab as aop

    monkeypatch.setattr(pipeline, "_LOADED", {})  # other tests load models as well

    grey = pictures[1].mean(2).astype(np.uint8)
    result = aop.segment(grey, method="amg_s", device="cpu")
    assert result.image.shape == (*grey.shape, 3)
    assert aop.segment(grey, method="amg_s", device=torch.device("cpu")).n_decoded == 256
    if not torch.cuda.is_available():
        assert pipeline.loaded_sam("mobile_sam") is pipeline.loaded_sam("mobile_sam", "cpu")
    assert len([key for key in pipeline._LOADED if key[0] == "sam"]) == 1


def test_references_say_whose_mask_and_at_which_threshold(sam, predictor, pictures):
    for image in pictures[:4]:
        result = run_method(sam, encode(sam, image), "aop", predictor, params=AsfParams(confidence=0.1, elimination=1.1))
        table, references = result.prompts, result.references
        assert len(references) == (0 if result.pems is None else len(result.pems))
        gone = table[table["status"] == "eliminated"]
        by = references.iloc[gone["by"]]
        assert len(gone) and (gone["pem"].to_numpy() > by["threshold"].to_numpy()).all()
        assert table["status"].iloc[references["prompt"]].isin(["kept", "duplicate"]).all()
        assert table["round"].iloc[references["prompt"]].is_monotonic_increasing
    no_filter = run_method(sam, encode(sam, pictures[0]), "aop_no_af", predictor)
    assert len(no_filter.references) == 0
