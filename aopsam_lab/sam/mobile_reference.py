"""MobileSAM's image encoder written out from its definition, to check and to time the one in use against (ours).

TinyViT-5M (K. Wu et al., 2022) as MobileSAM (C. Zhang et al., 2023) uses it: 1024 x 1024 input, the last stage at
stride 16, SAM's neck. It works on the official file's tensors by their names and shares no code with kornia's module:
`encoder_shapes` says which tensors those are, `reference_embedding` what is made of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # of BatchNorm and LayerNorm
NECK_EPS = 1e-6
STAGES = ((2, 4, 7, 2), (6, 5, 14, 1), (2, 10, 7, None))  # blocks, heads, window, stride of the merging after them
WIDTHS = (64, 128, 160, 320)  # of the first stage, which has no attention, and of these
CLASSES = 1000  # of the classifier that the encoder was distilled with; the file still holds it


def reference_embedding(state: dict[str, Tensor], image: Tensor) -> Tensor:
    """(B, 3, 1024, 1024) normalised -> (B, 256, 64, 64). state: a MobileSAM's, `image_encoder.` and all."""
    weights = {key.removeprefix("image_encoder."): value for key, value in state.items()}
    x = F.gelu(_conv(weights, "patch_embed.seq.0", image, stride=2, padding=1))
    x = _conv(weights, "patch_embed.seq.2", x, stride=2, padding=1)  # (B, 64, 256, 256)
    for block in range(2):
        name = f"layers.0.blocks.{block}"
        inner = F.gelu(_conv(weights, f"{name}.conv1", x))
        inner = F.gelu(_conv(weights, f"{name}.conv2", inner, padding=1))
        x = F.gelu(x + _conv(weights, f"{name}.conv3", inner))
    x = _merge(weights, "layers.0.downsample", x, stride=2)  # (B, 128, 128, 128)
    for stage, (blocks, heads, window, stride) in enumerate(STAGES, 1):
        for block in range(blocks):
            x = _block(weights, f"layers.{stage}.blocks.{block}", x, heads, window)
        if stride is not None:
            x = _merge(weights, f"layers.{stage}.downsample", x, stride)
    x = _channel_norm(F.conv2d(x, weights["neck.0.weight"]), weights, "neck.1")
    return _channel_norm(F.conv2d(x, weights["neck.2.weight"], padding=1), weights, "neck.3")


def encoder_shapes() -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of the official `mobile_sam.pt` that belongs to the image encoder."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def conv(name: str, width: int, given: int, side: int) -> None:
        norm(f"{name}.bn", width)
        shapes.update({f"{name}.bn.{key}": (width,) for key in ("running_mean", "running_var")})
        shapes.update({f"{name}.c.weight": (width, given, side, side), f"{name}.bn.num_batches_tracked": ()})

    def linear(name: str, width: int, given: int) -> None:
        shapes.update({f"{name}.weight": (width, given), f"{name}.bias": (width,)})

    def three(name: str, given: int, inner: int, width: int) -> None:
        """1 x 1, depthwise 3 x 3, 1 x 1."""
        conv(f"{name}.conv1", inner, given, 1)
        conv(f"{name}.conv2", inner, 1, 3)
        conv(f"{name}.conv3", width, inner, 1)

    conv("patch_embed.seq.0", WIDTHS[0] // 2, 3, 3)
    conv("patch_embed.seq.2", WIDTHS[0], WIDTHS[0] // 2, 3)
    for block in range(2):
        three(f"layers.0.blocks.{block}", WIDTHS[0], 4 * WIDTHS[0], WIDTHS[0])
    for stage, (blocks, heads, window, _) in enumerate(STAGES, 1):
        three(f"layers.{stage - 1}.downsample", WIDTHS[stage - 1], WIDTHS[stage], WIDTHS[stage])
        for block in range(blocks):
            name, width = f"layers.{stage}.blocks.{block}", WIDTHS[stage]
            shapes[f"{name}.attn.attention_biases"] = (heads, window**2)
            norm(f"{name}.attn.norm", width)
            linear(f"{name}.attn.qkv", 3 * width, width)
            linear(f"{name}.attn.proj", width, width)
            conv(f"{name}.local_conv", width, 1, 3)
            norm(f"{name}.mlp.norm", width)
            linear(f"{name}.mlp.fc1", 4 * width, width)
            linear(f"{name}.mlp.fc2", width, 4 * width)
    norm("norm_head", WIDTHS[-1])
    linear("head", CLASSES, WIDTHS[-1])
    shapes.update({"neck.0.weight": (256, WIDTHS[-1], 1, 1), "neck.2.weight": (256, 256, 3, 3)})
    norm("neck.1", 256)
    norm("neck.3", 256)
    return {f"image_encoder.{name}": shape for name, shape in shapes.items()}


def _conv(weights: dict, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Convolution without bias (depthwise where the weights are), then BatchNorm by its running statistics."""
    kernel = weights[f"{name}.c.weight"]
    x = F.conv2d(x, kernel, None, stride, padding, groups=x.shape[1] // kernel.shape[1])
    statistics = (weights[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *statistics, training=False, eps=EPS)


def _merge(weights: dict, name: str, x: Tensor, stride: int) -> Tensor:
    x = F.gelu(_conv(weights, f"{name}.conv1", x))
    x = F.gelu(_conv(weights, f"{name}.conv2", x, stride, padding=1))
    return _conv(weights, f"{name}.conv3", x)


def _block(weights: dict, name: str, x: Tensor, heads: int, window: int) -> Tensor:
    """Attention within windows, a depthwise convolution, an MLP. x: (B, C, H, W)."""
    b, c, h, w = x.shape
    below, right = -h % window, -w % window
    tokens = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, right, 0, below))
    high, wide = (h + below) // window, (w + right) // window
    tokens = tokens.view(b, high, window, wide, window, c).transpose(2, 3).reshape(-1, window * window, c)
    tokens = _attention(weights, f"{name}.attn", tokens, heads, window)
    tokens = tokens.view(b, high, wide, window, window, c).transpose(2, 3).reshape(b, h + below, w + right, c)
    x = x + tokens[:, :h, :w].permute(0, 3, 1, 2)
    x = _conv(weights, f"{name}.local_conv", x, padding=1)
    tokens = _layer_norm(weights, f"{name}.mlp.norm", x.permute(0, 2, 3, 1))
    tokens = _linear(weights, f"{name}.mlp.fc2", F.gelu(_linear(weights, f"{name}.mlp.fc1", tokens)))
    return x + tokens.permute(0, 3, 1, 2)


def _attention(weights: dict, name: str, x: Tensor, heads: int, window: int) -> Tensor:
    """(windows, N, C): softmax(q k^T / sqrt(d) + bias) v, the bias by the rows and columns between two cells."""
    n, tokens, c = x.shape
    each = c // heads
    qkv = _linear(weights, f"{name}.qkv", _layer_norm(weights, f"{name}.norm", x))
    q, k, v = qkv.view(n, tokens, heads, 3 * each).transpose(1, 2).split(each, 3)  # (windows, heads, N, d)
    rows, columns = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
    apart = (rows[:, None] - rows).abs() * window + (columns[:, None] - columns).abs()
    scores = q @ k.transpose(-2, -1) * each**-0.5 + weights[f"{name}.attention_biases"][:, apart]
    return _linear(weights, f"{name}.proj", (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, tokens, c))


def _linear(weights: dict, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _layer_norm(weights: dict, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], EPS)


def _channel_norm(x: Tensor, weights: dict, name: str) -> Tensor:
    mean = x.mean(1, keepdim=True)
    centred = x - mean
    x = centred / (centred.pow(2).mean(1, keepdim=True) + NECK_EPS).sqrt()
    return weights[f"{name}.weight"][:, None, None] * x + weights[f"{name}.bias"][:, None, None]
