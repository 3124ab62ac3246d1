"""MobileSAM and SAM's three ViTs give the numbers of their originals."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from aopsam_lab.decoding import decode_and_filter, encode
from aopsam_lab.methods import Prompts
from aopsam_lab.sam import zoo
from aopsam_lab.sam.zoo import MODELS, SamSpec, load_sam

PARAMETERS = {"mobile_sam": 10_130_092, "vit_b": 93_735_472, "vit_l": 312_342_832, "vit_h": 641_090_608}
EVERYTHING = SamSpec("custom", -float("inf"), -float("inf"), "")  # no mask is filtered out


def picture(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def well_used(sam: Sam) -> Sam:
    """Weights as training leaves them: BatchNorm statistics, position tables and biases are neither zero nor one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in sam.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
        for name, value in sam.named_parameters():
            if "attention_biases" in name or "pos_embed" in name or "rel_pos" in name:
                value.normal_(0, 0.5, generator=generator)
    return sam.eval()


def differences(original: Sam, ours: Sam, image: np.ndarray) -> dict[str, float]:
    """The largest absolute differences on one picture between segment_anything's SamPredictor and our decoding.

    image: H x W x 3 uint8. embedding: of the image embedding. masks: of the logits on the picture (padding is not
    drawn) over six prompts with three masks each. size: the largest value of the original's embedding.
    """
    height, width = image.shape[:2]
    points = torch.tensor([[x * width, y * height] for x in (0.2, 0.5, 0.8) for y in (0.3, 0.7)])
    stock = SamPredictor(original)
    stock.set_image(image)
    clicks = stock.transform.apply_coords_torch(points[:, None], image.shape[:2])
    _, scores, expected = stock.predict_torch(clicks, torch.ones(len(points), 1), return_logits=True)
    encoded = encode(ours, image)
    prompts = Prompts(points, torch.ones(len(points)))
    found = decode_and_filter(ours, encoded, prompts, torch.arange(len(points)), EVERYTHING)
    if len(found.low_res) < len(points):  # masks without a pixel fall out, the others stay
        raise RuntimeError(f"only {len(found.low_res)} masks of {len(points)} prompts are there to be compared")
    side, whole = expected.shape[-1], ours.image_encoder.img_size
    rows, columns = (length * side // whole for length in encoded.input_size)
    apart = (found.low_res[:, None] - expected[found.prompt])[..., :rows, :columns].abs().flatten(2).amax(2)
    apart += (found.iou[:, None] - scores[found.prompt]).abs()  # (found, 3): which of the three it is, is not told
    embedding = stock.get_image_embedding()
    return {
        "embedding": (encoded.embedding - embedding).abs().max().item(),
        "masks": apart.amin(1).max().item(),
        "size": embedding.abs().max().item(),
    }


def test_mobile_sam_gives_the_masks_of_segment_anything():
    sam = load_sam(device="cpu")
    found = differences(sam, sam, picture(90, 120))
    assert found["embedding"] < 1e-5 and found["masks"] < 1e-4


def test_mobile_sam_in_half_precision():
    """Attention keeps tables beside its weights, which have to be halved as well; the whole encoder is slow so on a CPU."""
    whole, half = (load_sam("mobile_sam", device="cpu", half=half) for half in (False, True))
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


def test_a_fine_tuned_file_of_the_same_shape_loads(tmp_path):
    state = {key: value.clone() for key, value in load_sam(device="cpu").state_dict().items()}
    state["mask_decoder.iou_token.weight"] += 1
    torch.save({"state_dict": state}, tmp_path / "mine.pth")
    sam = load_sam("mobile_sam", tmp_path / "mine.pth", "cpu")
    assert torch.equal(sam.mask_decoder.iou_token.weight, state["mask_decoder.iou_token.weight"])
