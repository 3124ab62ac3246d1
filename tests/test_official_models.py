"""MobileSAM and SAM's three ViTs give the numbers of their originals, from files of random weights."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from aopsam_lab.sam import zoo
from aopsam_lab.sam.mobile import build_mobile_sam
from aopsam_lab.sam.mobile_reference import encoder_shapes, reference_embedding
from aopsam_lab.sam.zoo import MODELS, load_sam
from aopsam_lab.study import official
from aopsam_lab.study.exactness import differences, mobile_sam_state, well_used

PARAMETERS = {"mobile_sam": 10_130_092, "vit_b": 93_735_472, "vit_l": 312_342_832, "vit_h": 641_090_608}


def picture(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def mobile(tmp_path_factory):
    """The tensors of a MobileSAM by the official file's names, made without the encoder's own code; their file."""
    state = mobile_sam_state()
    path = tmp_path_factory.mktemp("mobile") / "mobile_sam.pt"
    torch.save(state, path)
    return state, path


def test_mobile_sams_tensors_are_those_of_its_definition():
    state = build_mobile_sam().state_dict()
    encoder = {name: tuple(value.shape) for name, value in state.items() if name.startswith("image_encoder.")}
    assert encoder == encoder_shapes() and len(encoder) == 302


def test_mobile_sam_gives_the_embedding_of_its_definition(mobile):
    state, path = mobile
    sam = load_sam("mobile_sam", path, "cpu")
    image = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference_embedding(state, image)
        found = sam.image_encoder(image)
    assert expected.abs().max() > 1, "numbers of order one"
    assert (found - expected).abs().max() < 1e-5


def test_mobile_sam_gives_the_masks_of_segment_anything(mobile):
    state, path = mobile
    original = build_mobile_sam()
    original.load_state_dict(state)
    found = differences(original.eval(), load_sam("mobile_sam", path, "cpu"), picture(90, 120))
    assert found["embedding"] < 1e-5 and found["masks"] < 1e-4 and found["size"] > 1


def test_a_file_at_hand_is_compared_with_its_original(mobile, capsys):
    assert official.main(["exactness", "mobile_sam", "--checkpoint", str(mobile[1])]) == 0
    assert "within" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        official.main(["exactness", "mobile_sam", "vit_b", "--checkpoint", str(mobile[1])])
    assert "name that one" in capsys.readouterr().err
    assert official.main(["exactness", "mobile_sam", "--checkpoint", "not/there.pt"]) == 1
    assert "There is no checkpoint" in capsys.readouterr().err


def test_mobile_sam_in_half_precision(mobile):
    """Attention keeps tables beside its weights, which have to be halved as well; the whole encoder is slow so on a CPU."""
    whole, half = (load_sam("mobile_sam", mobile[1], "cpu", half=half) for half in (False, True))
    tokens = torch.randn(2, 49, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = whole.image_encoder.layers[1].blocks[0].attn(tokens)
        found = half.image_encoder.layers[1].blocks[0].attn(tokens.half())
    assert found.dtype == torch.float16
    assert 0 < (found.float() - expected).abs().mean() < 0.01 * expected.abs().mean()


def small_vit(width: int, heads: int) -> Sam:
    """A ViT of SAM with its own width and heads, but two blocks (one in windows, one global) and 240 pixels."""
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=240, patch_size=16, embed_dim=width, depth=2, num_heads=heads, global_attn_indexes=(1,),
            window_size=14, norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, qkv_bias=True, out_chans=256,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=256, image_embedding_size=(15, 15), input_image_size=(240, 240), mask_in_chans=16
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            transformer_dim=256,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "width", "heads"), [("vit_b", 768, 12), ("vit_l", 1024, 16), ("vit_h", 1280, 16)])
def test_vits_give_the_numbers_of_segment_anything(tmp_path, monkeypatch, name, width, heads):
    torch.manual_seed(0)
    original = well_used(small_vit(width, heads))
    torch.save(original.state_dict(), tmp_path / "sam.pth")
    monkeypatch.setitem(zoo.MODELS, name, partial(small_vit, width, heads))
    ours = load_sam(name, tmp_path / "sam.pth", "cpu")
    image = picture(75, 100)
    found = differences(original, ours, image)
    assert found["embedding"] < 1e-5 and found["masks"] < 1e-4 and found["size"] > 1


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_models_have_the_size_of_the_published_ones(name):
    with torch.device("cpu" if name == "mobile_sam" else "meta"):  # shapes without the gigabytes
        sam = MODELS[name]()
    assert sum(value.numel() for value in sam.parameters()) == PARAMETERS[name]


def test_a_fine_tuned_file_of_the_same_shape_loads(mobile, tmp_path):
    state = {key: value.clone() for key, value in mobile[0].items()}
    state["mask_decoder.iou_token.weight"] += 1
    torch.save({"state_dict": state}, tmp_path / "mine.pth")
    sam = load_sam("mobile_sam", tmp_path / "mine.pth", "cpu")
    assert torch.equal(sam.mask_decoder.iou_token.weight, state["mask_decoder.iou_token.weight"])
