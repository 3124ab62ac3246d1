"""MobileSAM (Zhang et al., 2023): a TinyViT encoder before segment_anything's other parts."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor

WIDTH, STRIDE = 256, 16
STRIP = 8  # rows of the widest layer computed at a time: more do not stay in a CPU's cache


def build_mobile_sam() -> Sam:
    """An untrained MobileSAM with the keys and shapes of the official `mobile_sam.pt`.

    Call `.eval()` again after loading weights: TinyViT stores its attention biases then.
    """
    with warnings.catch_warnings():
        # mobile_sam uses old names of timm's modules and registers models that timm has as well
        warnings.simplefilter("ignore")
        from mobile_sam import sam_model_registry  # here: it imports timm, which no other needs
    encoder = sam_model_registry["vit_t"]().image_encoder
    side = encoder.img_size // STRIDE
    transformer = TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=2048, num_heads=8)
    return Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(
            embed_dim=WIDTH,
            image_embedding_size=(side, side),
            input_image_size=(encoder.img_size, encoder.img_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(transformer=transformer, transformer_dim=WIDTH),
    )


def embed(encoder: Any, image: Tensor) -> Tensor:
    """The embedding (1, C, h, w) that SAM's encoder gives of an image (1, 3, S, S), in eval mode.

    On a CPU mobile_sam's TinyViT runs in half the time: channels last, BatchNorm folded into the
    convolutions (at each call, in 2 ms, so that weights may change). It is equal but for rounding.
    """
    is_tiny = type(encoder).__module__ == "mobile_sam.modeling.tiny_vit_sam"
    if not is_tiny or encoder.training or image.device.type != "cpu":
        return encoder(image)
    first, _, second = encoder.patch_embed.seq
    x = _conv(second, _conv(first, image.permute(0, 2, 3, 1), gelu=True))
    for layer in encoder.layers:
        for block in layer.blocks:
            x = _block(block, x) if hasattr(block, "attn") else _mbconv(block, x)
        if (down := layer.downsample) is not None:
            x = _conv(down.conv3, _conv(down.conv2, _conv(down.conv1, x, gelu=True), gelu=True))
    for conv, norm in (encoder.neck[:2], encoder.neck[2:]):
        x = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return x.permute(0, 3, 1, 2)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False, plus: Tensor | None = None
) -> Tensor:
    """A linear layer of x (..., C), then GELU or `plus` (..., D): in one pass where oneDNN can."""
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        if plus is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, plus, weight, bias, "add")
        after = "gelu" if gelu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], "none")
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y if plus is None else y.add_(plus)


def _conv(layer: Any, x: Tensor, gelu: bool = False, plus: Tensor | None = None) -> Tensor:
    """A Conv2d_BN of x (1, H, W, C), then GELU, or the addition of `plus`."""
    conv, norm = layer.c, layer.bn
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight, bias = conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale
    if conv.kernel_size == (1, 1):
        return _linear(x, weight.flatten(1), bias, gelu, plus)
    weight = weight.contiguous(memory_format=torch.channels_last)
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, conv.stride, conv.padding, 1, conv.groups)
    x = x.permute(0, 2, 3, 1)
    return torch.ops.aten.gelu_(x) if gelu else x


def _mbconv(block: Any, x: Tensor) -> Tensor:
    """An MBConv of x (1, H, W, C), strip by strip; one needs a row of its neighbours."""
    done = []
    for i, own in enumerate(x.split(STRIP, 1)):
        y = _conv(block.conv1, x[:, max(0, i * STRIP - 1) : (i + 1) * STRIP + 1], gelu=True)
        y = _conv(block.conv2, y, gelu=True)[:, min(i, 1) :][:, : own.shape[1]]
        done.append(torch.ops.aten.gelu_(_conv(block.conv3, y, plus=own)))
    return torch.cat(done, 1)


def _block(block: Any, x: Tensor) -> Tensor:
    """A TinyViTBlock of x (1, H, W, C): attention in windows, a convolution, an MLP."""
    (height, width, c), side, attn = x.shape[1:], block.window_size, block.attn
    y = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    y = y.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    windows, y = y.shape, attn.norm(y.reshape(-1, side * side, c))
    y = _linear(y, attn.qkv.weight, attn.qkv.bias).unflatten(2, (attn.num_heads, -1))
    q, k, v = y.transpose(1, 2).split([attn.key_dim, attn.key_dim, attn.d], -1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn.ab[None], scale=attn.scale)
    y = _linear(y.transpose(1, 2).flatten(2), attn.proj.weight, attn.proj.bias)
    y = y.view(windows).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    x = _conv(block.local_conv, x + y[:, :height, :width])
    first, second = block.mlp.fc1, block.mlp.fc2
    y = _linear(block.mlp.norm(x), first.weight, first.bias, gelu=True)
    return _linear(y, second.weight, second.bias, plus=x)
