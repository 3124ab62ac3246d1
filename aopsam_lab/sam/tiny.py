"""The bundled tiny SAM: a small image encoder in front of segment_anything's own prompt encoder and mask decoder (ours).

It is a plain ``segment_anything.modeling.Sam``, so everything written for SAM runs on it.

Where the multiply-adds go, for one 320 x 320 picture (4.1 G in all): convolutions where pixels are many and channels few
(stride 4 and 8), attention where tokens are few (stride 16), and a neck that brings both together at stride 8. Beside them, what
a network trained on ImageNet sees (0.5 G) joins both scales: the photographs here are too few to learn that from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from aopsam_lab.sam.efficientnet import CHANNELS_8, CHANNELS_16, EfficientNetLite0

IMG_SIZE = 320
STRIDE = 8
WIDTH = 128  # channels of the image embedding and of the mask decoder
PIXEL_MEAN, PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # as every SAM's


class ConvBN(nn.Sequential):
    """Convolution, BatchNorm, GELU. A from-scratch encoder learns sooner with BatchNorm, and it folds away later."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1, act: bool = True):
        super().__init__(
            nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(c_out),
            nn.GELU() if act else nn.Identity(),
        )


class ResidualBlock(nn.Module):
    """``x + conv(conv(x))`` with full 3 x 3 convolutions: on a CPU they run nearer to peak than depthwise ones."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = ConvBN(channels, channels)
        self.conv2 = ConvBN(channels, channels, act=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        return F.gelu(x + self.conv2(self.conv1(x)))


class AttentionBlock(nn.Module):
    """Pre-norm transformer block with global attention over all tokens."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int = 3):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(self.norm2(x))


def _joining(c_in: int, c_out: int) -> nn.Sequential:
    """From the backbone's channels to ours. Starts at zero: what is already trained is not disturbed."""
    conv = nn.Conv2d(c_in, c_out, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(LayerNorm2d(c_in), conv)


class TinyEncoder(nn.Module):
    """Image encoder: ``B x 3 x S x S`` (model frame, normalised) -> ``B x 128 x S/8 x S/8``."""

    def __init__(self, img_size: int = IMG_SIZE, dim: int = 256, depth: int = 6, heads: int = 8, out: int = WIDTH):
        super().__init__()
        self.img_size = img_size
        side = img_size // 16
        self.stem = nn.Sequential(ConvBN(3, 32, stride=2), ConvBN(32, 64, stride=2), ResidualBlock(64))  # stride 4
        self.stage8 = nn.Sequential(ConvBN(64, 128, stride=2), ResidualBlock(128))
        self.down16 = ConvBN(128, dim, stride=2)
        self.pos_embed = nn.Parameter(torch.randn(1, side * side, dim) * 0.02)
        self.blocks = nn.Sequential(*[AttentionBlock(dim, heads) for _ in range(depth)])
        self.backbone = EfficientNetLite0(torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD))
        self.more8, self.more16 = _joining(CHANNELS_8, 128), _joining(CHANNELS_16, dim)
        self.norm = nn.LayerNorm(dim)
        self.lateral = nn.Conv2d(dim, out, 1)
        self.fuse = nn.Sequential(ConvBN(128 + out, out), nn.Conv2d(out, out, 3, padding=1, bias=False), LayerNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        seen8, seen16 = self.backbone(x)
        x8 = self.stage8(self.stem(x))  # (B, 128, S/8, S/8)
        x16 = self.down16(x8) + self.more16(seen16)  # (B, D, S/16, S/16)
        x8 = x8 + self.more8(seen8)
        b, d, h, w = x16.shape
        tokens = self.norm(self.blocks(x16.flatten(2).transpose(1, 2) + self.pos_embed))  # (B, h*w, D)
        coarse = self.lateral(tokens.transpose(1, 2).reshape(b, d, h, w))
        coarse = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        return self.fuse(torch.cat([x8, coarse], dim=1))  # (B, 128, S/8, S/8)


def build_tiny_sam() -> Sam:
    """An untrained tiny SAM: 320 x 320 input, embedding 128 x 40 x 40, low-resolution masks 160 x 160."""
    side = IMG_SIZE // STRIDE
    return Sam(
        image_encoder=TinyEncoder(),
        prompt_encoder=PromptEncoder(
            embed_dim=WIDTH, image_embedding_size=(side, side), input_image_size=(IMG_SIZE, IMG_SIZE), mask_in_chans=16
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=512, num_heads=8),
            transformer_dim=WIDTH,
            iou_head_depth=3,
            iou_head_hidden_dim=128,
        ),
        pixel_mean=PIXEL_MEAN,
        pixel_std=PIXEL_STD,
    )
