import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from aopsam_lab.masks.rle import decode_rle, encode_rle

some_masks = arrays(bool, st.tuples(st.integers(0, 4), st.integers(1, 13), st.integers(1, 13)))


def oracle(masks: np.ndarray) -> list[dict]:
    return [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]


@settings(deadline=None)
@given(some_masks)
def test_encoding_equals_pycocotools_and_decoding_gives_the_masks_back(masks):
    rles = encode_rle(torch.from_numpy(masks))
    assert rles == oracle(masks)
    assert np.array_equal(decode_rle(rles, masks.shape[1:]), masks)


def test_large_masks_and_views_of_them_are_encoded_as_by_pycocotools():
    generator = torch.Generator().manual_seed(3)
    masks = torch.rand(2, 517, 1031, generator=generator) > 0.5
    assert encode_rle(masks) == oracle(masks.numpy())
    assert encode_rle(masks.transpose(1, 2)[:, ::3]) == oracle(
        masks.numpy().transpose(0, 2, 1)[:, ::3]
    )


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 3).bool(), torch.zeros(1, 2, 3), torch.zeros(1, 0, 3).bool()]
)
def test_bad_masks_are_refused(bad):
    with pytest.raises(ValueError, match="encode_rle needs"):
        encode_rle(bad)
