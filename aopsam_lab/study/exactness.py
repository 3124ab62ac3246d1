"""Whether the official models give their originals' numbers, on files of random weights at full size or on a file at hand.

Where none is given, a file is written as the official one would be. It is loaded by `load_sam`, and its embedding and masks
are compared: with `segment_anything`'s own code for ViT-B, L and H, and for MobileSAM's encoder with its definition written
out (`sam.mobile_reference`). It takes a few times the weights' size of memory: 8 GB for ViT-H.
"""

from __future__ import annotations

import gc
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch import Tensor, nn

from aopsam_lab.decoding import decode_and_filter, encode
from aopsam_lab.methods import Prompts
from aopsam_lab.sam.mobile_reference import encoder_shapes, reference_embedding
from aopsam_lab.sam.zoo import MODELS, SamSpec, load_sam

BARS = {"embedding": 1e-5, "masks": 1e-4}
EVERYTHING = SamSpec("custom", -float("inf"), -float("inf"), "")  # no mask is filtered out


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


def mobile_sam_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights with the names and shapes of the official `mobile_sam.pt`, made without the encoder's own code:
    what its definition lists, and segment_anything's prompt encoder and mask decoder."""
    torch.manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, shape in encoder_shapes().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1000)
        elif name.endswith("running_var"):
            state[name] = torch.empty(shape).uniform_(0.5, 2)
        elif len(shape) == 1:  # of norms and biases
            state[name] = torch.empty(shape).uniform_(0.5, 1.5) if name.endswith("weight") else 0.1 * torch.randn(shape)
        elif name.endswith("attention_biases"):
            state[name] = 0.5 * torch.randn(shape)
        else:
            state[name] = torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
    rest = MODELS["mobile_sam"]().state_dict()
    return {**state, **{name: value for name, value in rest.items() if not name.startswith("image_encoder.")}}


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


def compare(name: str, image: np.ndarray, folder: Path, checkpoint: Path | None = None) -> dict[str, float]:
    """`differences` of one model, loaded from `checkpoint` or from a file of random weights in `folder`, to its original.

    MobileSAM's embedding is compared with that of its definition, and SamPredictor runs on the encoder in use.
    checkpoint: as `torch.save` writes it, which all official ones are. Raises what `load_sam` raises.
    """
    torch.manual_seed(0)
    original = MODELS[name]()
    if checkpoint is not None:
        ours = load_sam(name, checkpoint, "cpu")
        original.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
        original.eval()
    else:
        file = folder / f"{name}.pth"
        if name == "mobile_sam":
            original.load_state_dict(mobile_sam_state())
            original.eval()  # caches what it makes of the weights, and so comes after them
        else:
            well_used(original)
        torch.save(original.state_dict(), file)
        ours = load_sam(name, file, "cpu")
    with torch.inference_mode():
        found = differences(original, ours, image)
        if name == "mobile_sam":
            encoded = encode(ours, image)
            expected = reference_embedding(original.state_dict(), encoded.model_image)
            found["embedding"] = (encoded.embedding - expected).abs().max().item()
    return found


def report(names: list[str], checkpoint: Path | None = None) -> bool:
    """Print the differences of each model; whether all are within BARS. checkpoint: its weights, where one is named."""
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    passed = True
    for name in names:
        with tempfile.TemporaryDirectory(prefix="aopsam_exact_") as folder:
            found = compare(name, image, Path(folder), checkpoint)
        gc.collect()
        within = all(found[key] < bar for key, bar in BARS.items())
        passed &= within
        print(
            f"{name}: embedding differs by {found['embedding']:.1e} (values to {found['size']:.1f}), masks' logits by "
            f"{found['masks']:.1e}: {'within' if within else 'NOT within'} {BARS['embedding']:g} and {BARS['masks']:g}.",
            flush=True,
        )
    return passed
