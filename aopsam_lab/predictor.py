"""The Prompt Predictor: image and SAM's embedding in, Prompt Confidence Map (PCM) out."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from aopsam_lab.sam.zoo import file_sha256, load_weights, resolve_device
from aopsam_lab.weights import WEIGHTS

CELL = 4  # PCM cells along each side of a cell of the embedding
BLOCK = 4  # PCM cells along each side of a block, in which the network places one prompt
COARSE = 8  # PCM cells along each side of a cell of the last layers, which speak for 2 x 2 blocks
DROPPED = 0.2  # share of the embedding's channels set to 0 in training, against overfitting
SIGMA = 1.5  # of the Gaussian about a prompt, in PCM cells
BUNDLED = {"mobile_sam": WEIGHTS / "predictor_mobile_sam.safetensors"}


def _conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
    )


class PromptPredictor(nn.Module):
    """A CNN on the image and one on the embedding, summed, further convolutions, a Sigmoid.

    For each block of BLOCK x BLOCK cells of the PCM the network says how likely a prompt in it
    gives a mask that no other gives, and where in the block it should lie. Padding is zero in every
    layer: cutting it off changes no number.

    Args:
        embed_dim: C, channels of the embedding.
        stride: model-frame pixels along a side of an embedding's cell.
        width: channels in which the two branches meet; later layers have 1.5 times as many.
        sees_image: whether there is a branch on the image; the paper has one.
    """

    def __init__(
        self, embed_dim: int = 256, stride: int = 16, width: int = 64, sees_image: bool = True
    ) -> None:
        super().__init__()
        self.embed_dim, self.stride, self.width = embed_dim, stride, width
        self.sha256 = ""  # of its weights file
        inner = width + width // 2
        self.image = None
        if sees_image:
            self.image = nn.Sequential(_conv(3, 16, stride=2), _conv(16, width, stride=2))
        self.drop = nn.Dropout2d(DROPPED)
        self.embed = _conv(embed_dim, width, 1)
        self.fuse = nn.Sequential(
            _conv(width, inner, stride=COARSE // CELL), _conv(inner, inner), _conv(inner, inner)
        )
        parts = (COARSE // BLOCK) ** 2
        self.head = nn.Conv2d(inner, parts * (1 + BLOCK**2), 1)
        # few blocks need a prompt; a Sigmoid that starts at one half would have to unlearn the rest
        nn.init.constant_(self.head.get_parameter("bias")[:parts], -3.5)

    def blocks(self, image: Tensor, embedding: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """What the network says of each block.

        Args:
            image: (B, 3, 4h, 4w), see `cell_means`.
            embedding: (B, C, h, w), h and w even.
            valid: (B, 4h, 4w), 1 on the image and 0 on padding.

        Returns:
            Logits of its confidence (B, h, w) and of the places in it (B, BLOCK^2, h, w).
        """
        valid = valid[:, None].to(embedding.dtype)
        out = self.embed(self.drop(embedding))
        if self.image is not None:
            out = out + self.image[1](self.image[0](image) * F.max_pool2d(valid, 2))
        out = out * F.max_pool2d(valid, CELL)
        on = F.max_pool2d(valid, COARSE)
        for layer in self.fuse:
            out = layer(out) * on
        out = F.pixel_shuffle(self.head(out), COARSE // BLOCK)
        return out[:, 0], out[:, 1:]

    def cell_means(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 3, 4h, 4w), the mean of the pixels in each cell of the PCM."""
        return F.avg_pool2d(image, self.stride // CELL)

    def forward(self, image: Tensor, embedding: Tensor, valid: Tensor) -> Tensor:
        """Image (B, 3, S, S), embedding and valid as `blocks` -> PCM (B, 1, 4h, 4w) in [0, 1]."""
        return draw_pcm(*self.blocks(self.cell_means(image), embedding, valid))

    def fold(self) -> PromptPredictor:
        """Fold each BatchNorm into its convolution, in place: the same numbers in less time."""
        for block in [b for b in self.modules() if isinstance(b, nn.Sequential)]:
            for i, (conv, norm) in enumerate(itertools.pairwise(block)):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    block[i], block[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
        return self

    @torch.inference_mode()
    def pcm(self, image: Tensor, embedding: Tensor, valid: Tensor) -> Tensor:
        """The PCM (4h, 4w) of one image, in [0, 1]; zero on padding, of which nothing is computed.

        Args:
            image: (1, 3, S, S), normalised and padded.
            embedding: (1, C, h, w).
            valid: (4h, 4w) bool, cells on the image: a rectangle at the top left.
        """
        stride = image.shape[-1] // embedding.shape[-1]
        if (embedding.shape[1], stride) != (self.embed_dim, self.stride):
            own = f"{self.embed_dim} channels and cells of {self.stride} pixels"
            given = f"this one has {embedding.shape[1]} and {stride}"
            raise ValueError(f"The Prompt Predictor is for a SAM of {own}; {given}.")
        rows, columns = (COARSE * -(-int(valid.any(1 - axis).sum()) // COARSE) for axis in (0, 1))
        pixels = self.stride // CELL
        part = self(
            image[..., : rows * pixels, : columns * pixels],
            embedding[..., : rows // CELL, : columns // CELL],
            valid[None, :rows, :columns],
        )[0, 0]
        height, width = valid.shape
        return F.pad(part, (0, width - columns, 0, height - rows)) * valid


def draw_pcm(confidence: Tensor, place: Tensor, soft: bool = False) -> Tensor:
    """One Gaussian a block, as high as the block's confidence, about the likeliest place in it.

    So the peaks of neighbours stay apart when the PCM is smoothed.

    Args:
        confidence: (B, n, m) logits.
        place: (B, BLOCK^2, n, m) logits.
        soft: whether all places count by their probability, which gives a loss its gradient.

    Returns:
        (B, 1, n * BLOCK, m * BLOCK) in [0, 1].
    """
    if soft:
        weights = place.softmax(1)
    else:
        weights = torch.zeros_like(place).scatter_(1, place.argmax(1, keepdim=True), 1.0)
    tops = F.pixel_shuffle(confidence.sigmoid()[:, None] * weights, BLOCK)
    return blurred(tops, SIGMA).clamp(0, 1)


def blurred(tops: Tensor, sigma: float) -> Tensor:
    """A Gaussian of its height about each cell of (B, 1, H, W), summed; cut at 3 sigma."""
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, device=tops.device, dtype=tops.dtype)
    bell = torch.exp(-0.5 * (offsets / sigma) ** 2)
    along = F.conv2d(tops, bell.view(1, 1, 1, -1), padding=(0, reach))
    return F.conv2d(along, bell.view(1, 1, -1, 1), padding=(reach, 0))


def load_predictor(
    name: str = "mobile_sam",
    path: str | os.PathLike | None = None,
    device: str | torch.device = "auto",
) -> PromptPredictor:
    """Load the bundled Prompt Predictor of a SAM, or one that you trained, for inference.

    Args:
        name: the SAM's name.
        path: a safetensors file of `train-predictor`; None: the bundled one.
        device: "auto" (the GPU if there is one), "cpu", "cuda", ...

    Raises:
        ValueError: no predictor is bundled for this SAM, or the file does not hold one.
        FileNotFoundError: there is no such file.
    """
    if path is None and name not in BUNDLED:
        advice = f"train one and give its path (bundled: {', '.join(BUNDLED)})"
        raise ValueError(f"no Prompt Predictor is bundled for {name!r}: {advice}")
    path = Path(path or BUNDLED[name])
    if not path.is_file():
        raise FileNotFoundError(f"no Prompt Predictor weights at {path}")
    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}
        sizes = {key: int(about[key]) for key in ("embed_dim", "stride", "width")}
        predictor = PromptPredictor(**sizes, sees_image="image.0.0.weight" in weights)
        load_weights(predictor, weights)  # into float32, whatever the file has
    except (SafetensorError, KeyError, RuntimeError, ValueError, OverflowError) as error:
        found = f"{path} does not hold weights of this Prompt Predictor"
        raise ValueError(f"{found} ({str(error).splitlines()[0]})") from error
    predictor.sha256 = file_sha256(path)
    predictor = predictor.eval().fold().requires_grad_(False).to(resolve_device(device))
    # a sixth less time on a CPU, except for the matrix product of the embedding
    predictor.to(memory_format=torch.channels_last)
    predictor.embed.to(memory_format=torch.contiguous_format)
    return predictor
