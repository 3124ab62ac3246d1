"""The bundled MobileSAM is the official one."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from aopsam_lab.sam.zoo import BUNDLED, load_sam

# sha256 over name, shape and bytes of each tensor of the official mobile_sam.pt, by name
OFFICIAL_TENSORS = "ab03ae3567ff93cf36c6eb64636240afcefdb3896e8e1c30da5500cc5cebfcf7"
SHARED = Path(__file__).parents[2] / "shared" / "weights" / "mobile_sam.pt"


def digest(state: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def sam() -> Sam:
    return load_sam(device="cpu")


def test_the_bundled_tensors_are_the_official_ones(sam):
    assert digest(load_file(BUNDLED["mobile_sam"])) == OFFICIAL_TENSORS
    assert type(sam) is Sam and not sam.training and sam.spec.name == "mobile_sam"
    assert digest({name: value for name, value in sam.state_dict().items()}) == OFFICIAL_TENSORS
    assert (sam.spec.pred_iou_thresh, sam.spec.stability_score_thresh) == (0.88, 0.95)


def test_its_embedding_and_masks_are_those_of_the_mobile_sam_package(sam):
    """The package's own Sam, built and loaded by its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mobile_sam import SamPredictor as MobilePredictor
        from mobile_sam import sam_model_registry
    original = sam_model_registry["vit_t"]()
    original.load_state_dict(load_file(BUNDLED["mobile_sam"]))
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    theirs, ours = MobilePredictor(original.eval()), SamPredictor(sam)
    theirs.set_image(image)
    ours.set_image(image)
    assert torch.equal(theirs.features, ours.features)
    point = {
        "point_coords": np.array([[60.0, 40.0]]),
        "point_labels": np.array([1]),
        "return_logits": True,
    }
    for found, expected in zip(ours.predict(**point), theirs.predict(**point)):
        assert np.allclose(found, expected, atol=1e-4)


@pytest.mark.skipif(
    not (SHARED.exists() or os.environ.get("MOBILE_SAM_PT")),
    reason="no official mobile_sam.pt at hand",
)
def test_its_embedding_is_that_of_the_official_file(sam):
    official = load_sam("mobile_sam", os.environ.get("MOBILE_SAM_PT") or SHARED, "cpu")
    image = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(sam.image_encoder(image), official.image_encoder(image))
