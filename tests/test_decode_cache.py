"""Decoding within a limit, and decoding each prompt once for many settings."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aopsam_lab.asf import AsfParams
from aopsam_lab.pipeline import decode_cache
from aopsam_lab.pipeline.decode import STABILITY_OFFSET, decode_and_filter
from aopsam_lab.pipeline.decode_cache import DecodeCache, PcmCache
from aopsam_lab.pipeline.methods import METHODS, method_named
from aopsam_lab.pipeline.run import run_method, strongest
from aopsam_lab.pipeline.types import Found, Models

FEW = {"spacing": 16, "confidence": 0.05, "elimination": 1.1}
CHANGES = ({}, {"smoothing": 1}, {"confidence": 0.2}, {"spacing": 12}, {"elimination": 1.0})
SETTINGS = [AsfParams(**{**FEW, **change}) for change in CHANGES]


class Boxes:
    """A detector of thirty boxes, the surest last."""

    def boxes(self, image, max_boxes):
        corners = np.random.default_rng(0).integers(0, 90, (30, 2)).astype(np.float32)
        scores = np.linspace(0.1, 0.9, 30, dtype=np.float32)
        return np.concatenate([corners, corners + 60], 1), scores


# --- max_prompts ---


@pytest.mark.parametrize("limit", [1, 16])
@pytest.mark.parametrize("method", METHODS)
def test_no_method_decodes_more_than_the_limit(sam, predictor, photo, method, limit):
    params = AsfParams(confidence=0.02)
    result = run_method(sam, photo, method, predictor, Boxes(), params, max_prompts=limit)
    table = result.prompts
    decoded = table["round"] >= 0
    assert result.n_decoded == decoded.sum() <= limit and len(table) == result.n_sampled
    waiting = table["status"] == "not_reached"
    assert result.n_decoded == limit or not waiting.any()
    assert (decoded | waiting | (table["status"] == "eliminated")).all()
    assert result.n_sampled == result.n_decoded + result.n_eliminated + waiting.sum()
    if waiting.any():  # strongest first
        assert table.loc[decoded, "confidence"].min() >= table.loc[waiting, "confidence"].max()


def test_a_part_of_a_grid_covers_the_picture(sam, photo):
    table = run_method(sam, photo, "amg_d", max_prompts=64).prompts
    points = table.loc[table["round"] >= 0, ["x", "y"]]
    thirds = (points / (np.array(photo.image.shape[1::-1]) / 3)).astype(int)
    assert len(points) == 64
    assert len(thirds.drop_duplicates()) == 9  # each ninth of the picture has one


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 45))
def test_the_strongest_are_chosen_up_to_the_limit(values, limit):
    confidence = torch.tensor([9.0, *values, 9.0])
    index = torch.arange(1, len(values) + 1)
    chosen = strongest(confidence, index, limit).tolist()
    assert len(chosen) == len(set(chosen)) == min(limit, len(values)) and chosen == sorted(chosen)
    left = sorted(set(index.tolist()) - set(chosen))
    assert not left or confidence[chosen].min() >= confidence[left].max()


@pytest.mark.parametrize("limit", [0, -3, 2.5])
def test_a_bad_limit_is_refused_by_name(sam, photo, limit):
    with pytest.raises(ValueError, match="max_prompts"):
        run_method(sam, photo, "amg_s", max_prompts=limit)


# --- the cache ---


def assert_same(ours: Found, expected: Found) -> None:
    for name in ("low_res", "iou", "boxes", "prompt", "best_iou"):
        pair = getattr(ours, name), getattr(expected, name)
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
    # a ratio of counts: a pixel on the edge may fall to either side
    pixel = 1 / (expected.low_res > -STABILITY_OFFSET).sum((1, 2))
    assert ((ours.stability - expected.stability).abs() <= 1.1 * pixel).all()


def proposal(encoded, predictor, method="aop_no_af", **values):
    params = AsfParams(**{"confidence": 0.02, **values})
    with torch.inference_mode():
        return method_named(method).start(encoded, Models(predictor, Boxes()), params)


@torch.inference_mode()
def test_the_cache_gives_what_decoding_gives(sam, predictor, photo):
    cache = DecodeCache(sam, photo)
    for method in ("aop_no_af", "oas_box", "oas_point"):  # a box is not its centre
        prompts = proposal(photo, predictor, method).prompts
        for rows in ([3, 0, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8], [7], [8, 3]):
            arguments = sam, photo, prompts, torch.tensor(rows), sam.spec
            assert_same(cache(*arguments), decode_and_filter(*arguments))
    assert cache.n_decoded == 3 * 9


def test_settings_share_what_they_decode(sam, predictor, photo, monkeypatch):
    asked = []

    def counting(sam, encoded, prompts, index, spec):
        asked.extend(map(tuple, prompts.points[index].tolist()))
        return decode_and_filter(sam, encoded, prompts, index, spec)

    monkeypatch.setattr(decode_cache, "decode_and_filter", counting)
    cache, drawn_once = DecodeCache(sam, photo), PcmCache(predictor, photo)
    total = 0
    for params in SETTINGS:
        alone = run_method(sam, photo, "aop", predictor, params=params)
        shared = run_method(sam, photo, "aop", drawn_once, params=params, decode=cache)
        assert (alone.n_decoded, alone.n_eliminated) == (shared.n_decoded, shared.n_eliminated)
        assert alone.prompts["status"].tolist() == shared.prompts["status"].tolist()
        np.testing.assert_allclose(alone.scores, shared.scores, atol=1e-4)
        assert len(alone.masks) and (alone.to_array() != shared.to_array()).mean() < 1e-4
        total += alone.n_decoded
    assert len(asked) == len(set(asked)) == cache.n_decoded < total


def test_the_pcm_is_drawn_once(predictor, photo, monkeypatch):
    cache = PcmCache(predictor, photo)
    first = proposal(photo, cache).pcm
    assert torch.equal(first, proposal(photo, predictor).pcm)
    monkeypatch.delattr(type(predictor), "pcm")
    assert proposal(photo, cache, smoothing=3).pcm is first


@torch.inference_mode()
def test_another_image_model_or_pair_of_thresholds_is_refused(sam, small_sam, predictor, photo):
    other = replace(photo, model_image=photo.model_image + 0, embedding=photo.embedding + 0)
    cache, asked = DecodeCache(sam, photo), (proposal(photo, predictor).prompts, torch.arange(4))
    strict = replace(sam.spec, pred_iou_thresh=0.999)
    for wrong in ((sam, other, sam.spec), (small_sam, photo, sam.spec), (sam, photo, strict)):
        with pytest.raises(ValueError, match="another image, model or pair of thresholds"):
            cache(*wrong[:2], *asked, wrong[2])
    with pytest.raises(ValueError, match="another image"):
        proposal(other, PcmCache(predictor, photo))


@torch.inference_mode()
def test_memory_is_bounded_and_what_is_forgotten_is_decoded_again(sam, predictor, photo):
    prompts = proposal(photo, predictor, confidence=0.0).prompts
    one_mask = 4 * math.prod(sam.prompt_encoder.mask_input_size)
    cache = DecodeCache(sam, photo, max_bytes=8 * one_mask)
    index = torch.arange(40)
    for part in (*index.split(10), *index.split(10)):
        arguments = sam, photo, prompts, part, sam.spec
        assert_same(cache(*arguments), decode_and_filter(*arguments))
        kept = sum(strict.low_res.nbytes for strict, _ in cache._known.values())
        assert kept == cache.bytes <= cache.max_bytes
    assert cache.n_decoded > len(index)
