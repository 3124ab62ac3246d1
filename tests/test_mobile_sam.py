"""The bundled MobileSAM is the official one."""

import copy
import hashlib
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from aopsam_lab.sam import mobile
from aopsam_lab.sam.zoo import BUNDLED

# sha256 over name, shape and bytes of each tensor of the official mobile_sam.pt, by name
OFFICIAL_TENSORS = "ab03ae3567ff93cf36c6eb64636240afcefdb3896e8e1c30da5500cc5cebfcf7"


def digest(state: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


def test_the_bundled_tensors_are_the_official_ones(sam):
    assert digest(load_file(BUNDLED["mobile_sam"])) == OFFICIAL_TENSORS
    assert type(sam) is Sam and not sam.training and sam.spec.name == "mobile_sam"
    assert digest(sam.state_dict()) == OFFICIAL_TENSORS
    assert not any(parameter.requires_grad for parameter in sam.parameters())
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
    both = (one.predict(np.array([[60.0, 40.0]]), np.array([1])) for one in (ours, theirs))
    for found, expected in zip(*both, strict=True):
        assert np.allclose(found, expected, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("has_onednn", [True, False])
def test_the_faster_encoder_gives_the_same_embedding(sam, photo, has_onednn, monkeypatch):
    """Channels last, BatchNorm folded, strips that do not divide the height."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    monkeypatch.setattr(mobile, "STRIP", 100)
    expected = sam.image_encoder(photo.model_image)
    found = mobile.embed(sam.image_encoder, photo.model_image)
    assert found.shape == expected.shape and not torch.equal(found, expected)
    assert (found - expected).abs().max() <= 1e-5
    assert (photo.embedding - expected).abs().max() <= 1e-5
    assert digest(sam.state_dict()) == OFFICIAL_TENSORS


@torch.no_grad()
def test_the_faster_encoder_follows_its_weights(sam):
    """What is folded is not kept: a model may be trained between two images."""
    changed, image = copy.deepcopy(sam.image_encoder), torch.randn(1, 3, 1024, 1024)
    for norm in (module.bn for module in changed.modules() if hasattr(module, "bn")):
        norm.running_mean += 0.1 * norm.running_var.sqrt()
    error = (mobile.embed(changed, image) - changed(image)).abs().max()
    assert error <= 1e-5 < (changed(image) - sam.image_encoder(image)).abs().max()
