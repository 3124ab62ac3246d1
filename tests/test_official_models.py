"""SAM's three ViTs give the numbers of their originals."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from small import EVERYTHING, build_small_sam

from aopsam_lab.pipeline.decode import decode_and_filter, encode
from aopsam_lab.pipeline.types import Prompts
from aopsam_lab.sam import zoo
from aopsam_lab.sam.zoo import load_sam


@torch.no_grad()
def well_used(sam: Sam) -> Sam:
    """Weights as training leaves them: no position table is zero."""
    generator = torch.Generator().manual_seed(7)
    for name, value in sam.named_parameters():
        if "pos_embed" in name or "rel_pos" in name:
            value.normal_(0, 0.5, generator=generator)
    return sam.eval()


def differences(original: Sam, ours: Sam, image: np.ndarray) -> dict[str, float]:
    """The largest differences between segment_anything's SamPredictor and our decoding.

    Returns:
        embedding: of the image embedding. masks: of the logits on the image, over six prompts with
        three masks each. size: the largest value of the original's.
    """
    height, width = image.shape[:2]
    points = torch.tensor([[x * width, y * height] for x in (0.2, 0.5, 0.8) for y in (0.3, 0.7)])
    stock = SamPredictor(original)
    stock.set_image(image)
    clicks = stock.transform.apply_coords_torch(points[:, None], image.shape[:2])
    _, scores, expected = stock.predict_torch(
        clicks, torch.ones(len(points), 1), return_logits=True
    )
    encoded = encode(ours, image)
    prompts = Prompts(points, torch.ones(len(points)))
    found = decode_and_filter(ours, encoded, prompts, torch.arange(len(points)), EVERYTHING)
    assert len(found.low_res) >= len(points), "masks without a pixel fall out, the others stay"
    side, whole = expected.shape[-1], ours.image_encoder.img_size
    rows, columns = (length * side // whole for length in encoded.input_size)
    apart = (found.low_res[:, None] - expected[found.prompt])[..., :rows, :columns]
    apart = apart.abs().amax((2, 3))
    # (found, 3): which of the three it is, is not told
    apart += (found.iou[:, None] - scores[found.prompt]).abs()
    embedding = stock.get_image_embedding()
    return {
        "embedding": (encoded.embedding - embedding).abs().max().item(),
        "masks": apart.amin(1).max().item(),
        "size": embedding.abs().max().item(),
    }


@pytest.mark.parametrize(
    ("name", "width", "heads"), [("vit_b", 768, 12), ("vit_l", 1024, 16), ("vit_h", 1280, 16)]
)
def test_vits_give_the_numbers_of_segment_anything(tmp_path, monkeypatch, name, width, heads):
    torch.manual_seed(0)
    original = well_used(build_small_sam(width, heads))
    torch.save(original.state_dict(), tmp_path / "sam.pth")
    monkeypatch.setitem(zoo.MODELS, name, partial(build_small_sam, width, heads))
    ours = load_sam(name, tmp_path / "sam.pth", "cpu")
    image = np.random.default_rng(0).integers(0, 256, (75, 100, 3), dtype=np.uint8)
    found = differences(original, ours, image)
    assert found["embedding"] < 1e-5 and found["masks"] < 1e-4 and found["size"] > 1
    other = "vit_h" if name == "vit_b" else "vit_b"
    with pytest.raises(ValueError, match=f"of {name}, not of {other}.*load_sam\\('{name}'"):
        load_sam(other, tmp_path / "sam.pth", "cpu")
