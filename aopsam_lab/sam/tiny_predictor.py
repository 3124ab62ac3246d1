"""The Prompt Predictor of the tiny SAM: picture and embedding in, Prompt Confidence Map (PCM) out.

From the paper: two encoders (a CNN on the picture, SAM's ViT embedding), convolutions with ReLU, a Sigmoid at the end,
lightweight. Ours: the widths, BatchNorm, the scale at which the branches meet, a bump a cell, and the last bias of -3 (with a
bias of 0 the Sigmoid starts at one half everywhere, is driven to zero by the empty cells and stays there).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CELL = 4  # PCM cells to a side of an embedding's cell
SIGMA = 1.0  # of the bumps, in PCM cells: neighbours, about four apart, stay two when smoothed


def _conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)
    )


class TinyPredictor(nn.Module):
    """(B, 3, S, S) model-frame pictures (normalised, padded) and (B, C, h, w) embeddings -> (B, 1, 4h, 4w) PCM in [0, 1].

    embed_dim: C of the embedding. stride: S / h, 8 or 16 (so one PCM cell is 2 or 4 model-frame pixels wide).

    Both branches meet on the embedding's own grid. Of each of its cells the network says whether a prompt there is worth its
    decoding (a Sigmoid), and at which of the 4 x 4 PCM cells in it (a Softmax); the PCM shows this as one bump a cell, see
    :func:`draw_pcm`. So neighbours never run together into one peak, and nothing is computed at the PCM's own size, where most
    of the time would go.
    """

    def __init__(self, embed_dim: int = 128, stride: int = 8):
        super().__init__()
        if stride not in (8, 16):
            raise ValueError(f"a Prompt Predictor is made for embeddings at stride 8 or 16, not {stride}")
        self.embed_dim, self.stride = embed_dim, stride
        first = [_conv(3, 16, stride=2)] if stride == 8 else [_conv(3, 16, stride=2), _conv(16, 16, stride=2)]
        self.image = nn.Sequential(*first, _conv(16, 24, stride=2), _conv(24, 64, stride=2))  # (B, 64, h, w)
        self.embed = _conv(embed_dim, 64, 1)  # as many, so that they are added: stacked, the next convolution would take twice as long
        self.fuse = nn.Sequential(_conv(64, 64), _conv(64, 64), nn.Conv2d(64, 1 + CELL**2, 1))
        nn.init.constant_(self.fuse[-1].bias[0], -3.0)

    def cells(self, image: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Of each cell of the embedding the logit of its worth (B, h, w), and those of the 16 places in it (B, 16, h, w)."""
        out = self.fuse(self.image(image) + self.embed(embedding))
        return out[:, 0], out[:, 1:]

    def fold(self) -> TinyPredictor:
        """Each BatchNorm folded into the convolution before it, in place: the same numbers in eval mode, in less time."""
        for block in [b for b in self.modules() if isinstance(b, nn.Sequential)]:
            for i, (conv, norm) in enumerate(zip(block, block[1:])):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    block[i], block[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
        return self

    def forward(self, image: Tensor, embedding: Tensor) -> Tensor:
        return draw_pcm(*self.cells(image, embedding))

    @torch.inference_mode()
    def pcm(self, image: Tensor, embedding: Tensor, valid: Tensor) -> Tensor:
        """The PCM of one picture (1, 3, S, S), zero on padding (``valid``: (4h, 4w) bool) -> (4h, 4w)."""
        return self(image, embedding)[0, 0] * valid


def draw_pcm(worth: Tensor, place: Tensor, soft: bool = False) -> Tensor:
    """One bump a cell of the embedding, as high as the cell is worth, where its place is -> (B, 1, 4h, 4w) in [0, 1].

    worth: (B, h, w) logits. place: (B, 16, h, w) logits, row by row; the likeliest counts. soft: all count, each by its
    probability, so that a loss on the PCM has a gradient; a cell in doubt then has a lower and broader bump than it is worth.
    """
    if soft:
        tops = F.pixel_shuffle(worth.sigmoid()[:, None] * place.softmax(1), CELL)
    else:
        b, h, w = worth.shape
        at = place.argmax(1)
        rows = torch.arange(0, h * CELL, CELL, device=at.device)[:, None] + at // CELL
        columns = torch.arange(0, w * CELL, CELL, device=at.device) + at % CELL
        tops = worth.new_zeros(b, h * w * CELL**2)
        tops.scatter_(1, (rows * (w * CELL) + columns).flatten(1), worth.sigmoid().flatten(1))
        tops = tops.view(b, 1, h * CELL, w * CELL)
    reach = math.ceil(3 * SIGMA)
    bump = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=tops.device, dtype=tops.dtype) / SIGMA) ** 2)
    along = F.conv2d(tops, bump.view(1, 1, 1, -1), padding=(0, reach))
    return F.conv2d(along, bump.view(1, 1, -1, 1), padding=(reach, 0)).clamp(0, 1)
