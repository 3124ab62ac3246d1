"""EfficientNet-Lite0 as far as stride 16: what ImageNet taught, beside the tiny SAM's own encoder.

The network of Tan and Le (2019) in the Lite form (no squeeze-and-excitation, ReLU6), its inference only: each BatchNorm is folded
into the convolution before it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = 127.0, 128.0  # of the pixels (0 to 255) that it was trained on
# expansion, kernel, stride, channels out
BLOCKS = (
    (1, 3, 1, 16),
    (6, 3, 2, 24), (6, 3, 1, 24),
    (6, 5, 2, 40), (6, 5, 1, 40),
    (6, 3, 2, 80), (6, 3, 1, 80), (6, 3, 1, 80),
    (6, 5, 1, 112), (6, 5, 1, 112), (6, 5, 1, 112),
)  # fmt: skip
LAST_8 = 4  # the last block at stride 8
CHANNELS_8, CHANNELS_16 = BLOCKS[LAST_8][3], BLOCKS[-1][3]


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's "same" pads even sides: of an odd total, the smaller half comes first."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__(c_in, c_out, kernel, stride, groups=groups)
        before, total = (kernel - stride) // 2, max(0, kernel - stride)
        self.ends = (before, total - before) * 2

    def forward(self, x: Tensor) -> Tensor:
        if self.ends[0] == self.ends[1]:
            return F.conv2d(x, self.weight, self.bias, self.stride, self.ends[0], groups=self.groups)
        return super().forward(F.pad(x, self.ends))


class InvertedResidual(nn.Module):
    """1 x 1 convolution to more channels, one of each channel by itself, 1 x 1 back (MobileNetV2's block)."""

    def __init__(self, c_in: int, ratio: int, kernel: int, stride: int, c_out: int):
        super().__init__()
        wide = c_in * ratio
        self.expand = SameConv(c_in, wide) if ratio > 1 else None
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, c_out)
        self.adds = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """(B, 3, S, S) pixels, normalised by ``mean`` and ``std``, -> (B, 40, S/8, S/8) and (B, 112, S/16, S/16); S a multiple of 16.

    mean, std: by which the pictures that come in were normalised, three values each, of pixels from 0 to 255.
    """

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("scale", (std / STD).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean - MEAN) / STD).view(1, 3, 1, 1), persistent=False)
        self.stem = SameConv(3, 32, 3, 2)
        channels = [32, *(block[3] for block in BLOCKS)]
        self.blocks = nn.ModuleList(InvertedResidual(c, *block) for c, block in zip(channels, BLOCKS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu6(self.stem(x * self.scale + self.shift))
        for block in self.blocks[: LAST_8 + 1]:
            x = block(x)
        x8 = x
        for block in self.blocks[LAST_8 + 1 :]:
            x = block(x)
        return x8, x
