"""The Prompt Predictor: image and SAM's embedding in, Prompt Confidence Map (PCM) out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from aopsam_lab.sam.tiny_predictor import TinyPredictor
from aopsam_lab.sam.zoo import WEIGHTS, resolve_device

CELL = 4  # PCM cells along each side of a cell of the embedding
BUNDLED = {
    "mobile_sam": WEIGHTS / "predictor_mobile_sam.safetensors",
    "tiny": WEIGHTS / "predictor_tiny.safetensors",
}


def _conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
    )


class PromptPredictor(nn.Module):
    """A CNN on the image and one on the embedding, their sum through further convolutions, a Sigmoid.

    Args:
        embed_dim: C, channels of the embedding.
        stride: model-frame pixels along a side of an embedding's cell, 8 or 16.
        width: channels in which the two branches meet.

    Shapes: image (B, 3, S, S), normalised and padded, and embedding (B, C, h, w) -> PCM (B, 1, 4h, 4w) in [0, 1], both
    in the model frame.
    """

    def __init__(self, embed_dim: int = 256, stride: int = 16, width: int = 64) -> None:
        super().__init__()
        if stride not in (8, 16):
            raise ValueError(f"a Prompt Predictor is made for embeddings at stride 8 or 16, not {stride}")
        self.embed_dim, self.stride, self.width = embed_dim, stride, width
        self.image = nn.Sequential(_conv(3, 16, stride=2), _conv(16, 24, stride=2), _conv(24, width, stride=2))
        self.embed = _conv(embed_dim, width, 1)
        self.fuse = nn.Sequential(_conv(width, width), _conv(width, width), nn.Conv2d(width, CELL**2, 1))
        # few cells deserve a prompt: a Sigmoid that starts at one half would first have to unlearn all the others
        nn.init.constant_(self.fuse[-1].bias, -4.0)

    def logits(self, image: Tensor, embedding: Tensor) -> Tensor:
        """The PCM before the Sigmoid, (B, 1, 4h, 4w)."""
        if self.stride == 16:
            image = F.avg_pool2d(image, 2)  # detail finer than a PCM cell only costs time
        return F.pixel_shuffle(self.fuse(self.image(image) + self.embed(embedding)), CELL)

    def forward(self, image: Tensor, embedding: Tensor) -> Tensor:
        return self.logits(image, embedding).sigmoid()

    def fold(self) -> PromptPredictor:
        """Fold each BatchNorm into the convolution before it, in place: the same numbers in less time, for inference."""
        for block in [b for b in self.modules() if isinstance(b, nn.Sequential)]:
            for i, (conv, norm) in enumerate(zip(block, block[1:])):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    block[i], block[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
        return self

    @torch.inference_mode()
    def pcm(self, image: Tensor, embedding: Tensor, valid: Tensor) -> Tensor:
        """The PCM of one image, zero on padding.

        Args:
            image: (1, 3, S, S), normalised and padded.
            embedding: (1, C, h, w).
            valid: (4h, 4w) bool, cells on the image.

        Returns:
            (4h, 4w) in [0, 1].
        """
        return self(image, embedding)[0, 0] * valid


def load_predictor(
    name: str = "mobile_sam", path: str | Path | None = None, device: str = "auto"
) -> PromptPredictor | TinyPredictor:
    """The bundled Prompt Predictor of a SAM, or one that you trained.

    Args:
        name: the SAM's name.
        path: a safetensors file of `train-predictor`; its metadata says for which embedding it is. None: bundled.
        device: "auto" (the GPU if there is one), "cpu", "cuda", ...

    Returns:
        The predictor, ready for inference, the sha256 of its file in ``.sha256``.

    Raises:
        ValueError: where no predictor is bundled for this SAM, or the file does not hold one.
        FileNotFoundError: where there is no file.
    """
    if path is None:
        if name not in BUNDLED:
            raise ValueError(
                f"no Prompt Predictor is bundled for {name!r}: train one and give its path "
                f"(bundled: {', '.join(BUNDLED)})"
            )
        path = BUNDLED[name]
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no Prompt Predictor weights at {path}")
    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}
        if "width" in about:
            predictor = PromptPredictor(int(about["embed_dim"]), int(about["stride"]), int(about["width"]))
        else:
            predictor = TinyPredictor(int(about["embed_dim"]), int(about["stride"]))
        predictor.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    except (SafetensorError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not hold weights of this Prompt Predictor ({reason})") from error
    predictor.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    predictor = predictor.eval().fold().requires_grad_(False).to(resolve_device(device))
    return predictor.to(memory_format=torch.channels_last)  # a sixth quicker on a CPU
