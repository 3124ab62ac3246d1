"""SamAutomaticMaskGenerator's parameters: our masks are the generator's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator
from small import build_small_sam

import aopsam_lab as aop
from aopsam_lab.evaluator import iou_matrix
from aopsam_lab.masks.rle import encode_rle
from aopsam_lab.pipeline.decode import cleaned, encode
from aopsam_lab.pipeline.decode_cache import DecodeCache, LooseRun
from aopsam_lab.pipeline.methods import Grid
from aopsam_lab.pipeline.run import run_method
from aopsam_lab.pipeline.types import MaskParams
from aopsam_lab.sam.zoo import SamSpec

GRID = Grid("grid", 6)
LOOSE = {"pred_iou_thresh": 0.2, "stability_score_thresh": 0.1}
CHANGES = [
    {},
    {"pred_iou_thresh": 0.7, "stability_score_thresh": 0.3},
    {"box_nms_thresh": 0.3},
    {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0},
    {"min_mask_region_area": 6},
    {"points_per_side": 3, "crop_n_layers": 1},
    {"points_per_side": 2, "crop_n_layers": 2, "min_mask_region_area": 4, "box_nms_thresh": 0.97},
]


@pytest.fixture(scope="module")
def spread_sam():
    """A small Sam whose masks, predicted IoUs and stability scores differ from point to point."""
    torch.manual_seed(0)
    sam = build_small_sam().requires_grad_(False).eval()
    decoder, head = sam.mask_decoder, sam.mask_decoder.iou_prediction_head.layers[-1]
    for part in (decoder.transformer, *decoder.output_hypernetworks_mlps):
        for weights in part.parameters():
            weights *= 5 if weights.dim() == 2 else 1
    for net in decoder.output_hypernetworks_mlps:
        net.layers[-1].weight *= 12
    head.weight *= 10
    head.bias += 1
    sam.mask_threshold = 20.0  # so masks are small, and most crops have some
    return sam


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (90, 128, 3), dtype=np.uint8)


def assert_same(records: list[dict], expected: list[dict]) -> None:
    """As many, each with its partner: a pixel of a mask may differ."""
    # a box without an area has no duplicates in the generator; an empty mask is none here
    expected, records = ([r for r in own if min(r["bbox"][2:])] for own in (expected, records))
    masks = [encode_rle(np.stack([r["segmentation"] for r in of])) for of in (expected, records)]
    assert len(records) == len(expected)
    iou = iou_matrix(*masks)
    partner = iou.argmax(1)
    assert iou.max(1).min() > 0.98 and len(set(partner.tolist())) == len(records)
    for i, record in enumerate(expected):
        own = records[partner[i]]
        for name in ("predicted_iou", "stability_score"):
            assert own[name] == pytest.approx(record[name], abs=5e-3), name
        assert np.allclose(own["bbox"], record["bbox"], atol=1.5)
        assert np.allclose(own["point_coords"], record["point_coords"], atol=1e-3)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_masks_are_those_of_the_generator(spread_sam, picture, change):
    values = {"points_per_side": GRID.side, **LOOSE, **change}
    ours = run_method(spread_sam, encode(spread_sam, picture), GRID, quality=MaskParams(**values))
    expected = SamAutomaticMaskGenerator(spread_sam, **values).generate(picture)
    assert len(expected) > 4, "too few masks for the comparison to mean anything"
    assert_same(ours.to_records(), expected)
    assert (np.diff(ours.scores) <= 0).all() and ours.quality == MaskParams(**values)
    kept = ours.prompts.index[ours.prompts["status"] == "kept"]
    assert set(kept) == set(ours.mask_prompt)


def test_masks_of_mobile_sam_on_crops_are_those_of_the_generator(sam, sample):
    values = {"points_per_side": 4, "crop_n_layers": 1, "min_mask_region_area": 300}
    values |= {"pred_iou_thresh": 0.8, "stability_score_thresh": 0.9, "box_nms_thresh": 0.6}
    ours = aop.segment(sample.image, "amg_s", sam, **values)
    expected = SamAutomaticMaskGenerator(sam, **values).generate(sample.image)
    assert len(expected) > 10
    assert_same(ours.to_records(), expected)
    assert ours.n_decoded == len(ours.prompts) == 5 * 16 and ours.prompts["round"].max() == 4


def test_defaults_are_the_generators(small_sam):
    stock = SamAutomaticMaskGenerator(small_sam)
    resolved = MaskParams().of(SamSpec("custom", 0.88, 0.95, ""))
    for name in ("pred_iou_thresh", "stability_score_thresh"):
        assert getattr(resolved, name) == getattr(stock, name)
    for name in ("box_nms_thresh", "crop_n_layers", "min_mask_region_area"):
        assert getattr(MaskParams(), name) == getattr(stock, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("points_per_side", 0),
        ("points_per_side", 2.5),
        ("crop_n_layers", -1),
        ("min_mask_region_area", float("inf")),
        ("pred_iou_thresh", 1.5),
        ("stability_score_thresh", float("nan")),
        ("box_nms_thresh", -0.1),
    ],
)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        MaskParams(**{name: value})


def test_what_only_grids_have_is_refused_elsewhere(picture, spread_sam):
    for name in ("points_per_side", "crop_n_layers"):
        with pytest.raises(ValueError, match="are for grids"):
            aop.segment(picture, "aop", spread_sam, **{name: 2})
    crops = {"quality": MaskParams(crop_n_layers=1), "max_prompts": 9}
    with pytest.raises(ValueError, match="crop_n_layers"):
        run_method(spread_sam, encode(spread_sam, picture), GRID, **crops)


def test_a_cache_gives_the_same_at_every_pair(spread_sam, picture):
    quality = MaskParams(**LOOSE, box_nms_thresh=0.5, min_mask_region_area=5)
    encoded = encode(spread_sam, picture)
    alone = run_method(spread_sam, encoded, GRID, quality=quality)
    loose = LooseRun(DecodeCache(spread_sam, encoded, (0.1, 0.05), quality))
    shared = run_method(spread_sam, encoded, GRID, decode=loose, quality=quality)
    assert len(alone.masks) > 5 and shared.masks == alone.masks
    pairs = [(0.2, 0.1), (0.7, 0.4)]
    own, stricter = loose.masks_at(pairs)
    assert own == alone.masks
    values = {"pred_iou_thresh": 0.7, "stability_score_thresh": 0.4}
    assert (
        stricter == run_method(spread_sam, encoded, GRID, quality=replace(quality, **values)).masks
    )
    with pytest.raises(ValueError, match="another image, model or pair"):
        run_method(spread_sam, encoded, GRID, decode=loose)


def test_small_holes_and_islands_go_and_an_unchanged_duplicate_stays():
    pixels = np.zeros((2, 20, 20), bool)
    pixels[:, 2:12, 2:12] = True
    pixels[0, 5:7, 5:7] = False  # a hole of 4, and an island of 4
    pixels[0, 16:18, 16:18] = True
    kept = {"scores": np.float32([0.9, 0.8]), "boxes": np.float32([[2, 2, 17, 17], [2, 2, 11, 11]])}
    kept["masks"] = np.array(encode_rle(pixels), object)
    same = cleaned({k: v.copy() for k, v in kept.items()}, MaskParams(min_mask_region_area=4))
    assert same["masks"] == encode_rle(pixels)
    clean = cleaned({k: v.copy() for k, v in kept.items()}, MaskParams(min_mask_region_area=5))
    assert clean["masks"] == encode_rle(pixels[1:]) and clean["scores"] == np.float32(0.8)
    alone = cleaned({k: v[:1].copy() for k, v in kept.items()}, MaskParams(min_mask_region_area=5))
    assert alone["masks"] == clean["masks"] and alone["boxes"].tolist() == [[2, 2, 11, 11]]


def test_a_study_and_the_command_line_take_them(study, tmp_path, picture):
    quality = MaskParams(crop_n_layers=1, points_per_side=2, pred_iou_thresh=0.0)
    some = {"n_images": 1, "methods": ["amg_s", "aop"], "thresholds": [(0.2, 0.1)]}
    result = study(**some, quality=quality)
    decoded = result.per_image.set_index("method")["n_decoded"]
    assert decoded["amg_s"] == 5 * 4 and result.provenance["parameters"]["crop_n_layers"] == 1
    own = result.curves[result.curves["own"]].set_index("method")["n_masks"]
    assert own.eq(result.per_image.set_index("method")["n_masks"]).all()
    assert (study(**some, quality=quality).n_scored, study(**some).n_scored) == (0, 2)
