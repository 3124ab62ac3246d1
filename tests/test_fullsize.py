"""Masks at the image's size against segment_anything's own and pycocotools' RLE."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score

from aopsam_lab.masks.fullsize import FullSize


@pytest.fixture(params=["as a whole", "by rows", "on a device"], autouse=True)
def way(request, monkeypatch):
    """All ways of resizing, whatever the image's size."""
    if request.param == "on a device":
        monkeypatch.setattr("aopsam_lab.masks.fullsize._on_cpu", lambda logits: False)
        monkeypatch.setattr("aopsam_lab.masks.fullsize.GPU_PIXELS", 20_000)
    pixels = 1 << 30 if request.param == "as a whole" else 0
    monkeypatch.setattr("aopsam_lab.masks.fullsize.WHOLE_PIXELS", pixels)


NEAR = 2e-5  # logits this near to a cut may fall to either side: resizing works in float32


def stock(logits, model, input_size, image_size) -> torch.Tensor:
    """``Sam.postprocess_masks`` of (n, L, L) logits."""
    scaled = F.interpolate(logits[:, None], (model, model), mode="bilinear", align_corners=False)
    part = scaled[..., : input_size[0], : input_size[1]]
    return F.interpolate(part, image_size, mode="bilinear", align_corners=False)[:, 0]


def blobs(low: int, seed: int) -> torch.Tensor:
    """Logits of smooth, ragged, empty, full and nowhere sure masks."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(3, 1, 6, 6, generator=generator) * 8
    coarse = F.interpolate(coarse, (low, low), mode="bicubic")[:, 0]
    ragged = 3 * torch.randn(1, low, low, generator=generator)
    empty, full = torch.full((2, low, low), -5.0), torch.full((1, low, low), 5.0)
    return torch.cat([coarse, ragged, empty, full, 0.05 * ragged])


def same(logits, model, input_size, image_size, threshold=0.0, offset=1.0) -> None:
    sizes = FullSize(model, input_size, image_size)
    stability, boxes = sizes.measure(logits, threshold, offset)
    rles = sizes.encode(logits, threshold)
    full = stock(logits, model, input_size, image_size)
    expected = calculate_stability_score(full, threshold, offset).nan_to_num(-1)
    expected_boxes = batched_mask_to_box(full > threshold)
    stability = stability.nan_to_num(-1)
    for i, pixels in enumerate(full):
        mask = coco_mask.decode(rles[i]).astype(bool)
        near = ((pixels - threshold).abs() < NEAR).numpy()
        assert np.array_equal(mask[~near], (pixels > threshold).numpy()[~near])
        if not near.any():
            assert rles[i] == coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            assert torch.equal(boxes[i], expected_boxes[i])
        cuts = (threshold - offset, threshold + offset)
        if not any(((pixels - cut).abs() < NEAR).any() for cut in cuts):
            assert torch.equal(stability[i], expected[i])
        few = 20 / pixels.numel() + 1e-6
        assert float(stability[i]) == pytest.approx(float(expected[i]), abs=few)


@pytest.mark.parametrize(
    "low, model, input_size, image_size",
    [
        (160, 320, (214, 320), (321, 481)),  # a photograph
        (160, 320, (320, 213), (600, 400)),
        (256, 1024, (768, 1024), (120, 160)),  # MobileSAM, fewer pixels than logits
        (256, 1024, (1024, 1024), (256, 256)),
        (64, 256, (3, 256), (2, 171)),  # a strip
        (64, 256, (1, 1), (1, 1)),
    ],
)
def test_measures_and_masks_equal_those_of_all_logits_resized(low, model, input_size, image_size):
    same(blobs(low, seed=low + image_size[0]), model, input_size, image_size)
    same(blobs(low, seed=1), model, input_size, image_size, threshold=0.5, offset=0.25)


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.tuples(*[st.integers(1, 64)] * 2),
    st.tuples(*[st.integers(1, 90)] * 2),
    st.sampled_from([16, 32]),
    st.integers(0, 99),
)
def test_measures_and_masks_are_equal_at_any_size(used, size, low, seed):
    same(blobs(low, seed), 64, used, size)


def test_a_box_of_few_pixels_by_hand():
    """One logit on, doubled to the model frame: its own 2 x 2 pixels, no others."""
    logits = torch.full((1, 4, 4), -9.0)
    # at 3/4 of each axis: (9 * 12 - 7 * 9) / 16 > 0; at 1/4 and 3/4: (3 * 12 - 13 * 9) / 16 < 0
    logits[0, 1, 2] = 12.0
    sizes = FullSize(8, (8, 8), (8, 8))
    stability, boxes = sizes.measure(logits, 0.0, 1.0)
    assert boxes.tolist() == [[4, 2, 5, 3]] and stability.item() == 1.0
    uncompressed = {"size": [8, 8], "counts": [34, 2, 6, 2, 20]}
    assert sizes.encode(logits, 0.0) == [coco_mask.frPyObjects(uncompressed, 8, 8)]
