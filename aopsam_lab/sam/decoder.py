"""SAM's mask decoder with the same weights and the same numbers, from far less work (ours).

The stock decoder repeats the image embedding for every prompt and projects the copies again and again. Here the pixels
stay shared until the first image-to-token attention, and projections of ``N = h * w`` pixels move to the few tokens:

    token to image:   q_h (x W_k,h)^T  =  (q_h W_k,h) x^T           the key bias drops out of the softmax
                      A_h (x W_v,h^T)  =  (A_h x) W_v,h^T           rows of A_h sum to 1, so the value bias is added once
    image to token:   concat_h(A_h V_h) W_o  =  sum_h A_h (V_h W_o,h)

Shapes: B images, P prompts an image, T tokens a prompt, N pixels, C channels, H heads, d = D / H inner channels a head.
Attention is kept as ``(B*P, H*T, N)`` throughout: every step is one large matrix product, and none of it copies pixels.
Transposed convolutions of stride = kernel are matrix products too, so the upscaling stays in the same layout and pixels
are put in picture order once, at the very end, for the masks that are wanted. All of it is differentiable: the bundled
model is trained through this code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor


@dataclass
class Decoded:
    """What the transformer makes of the prompts, before any mask is drawn.

    pixels:  (B*P, N, C) image features after both layers.
    tokens:  (B*P, M, C) output tokens of the M masks (4 in stock SAM: the single mask first).
    iou:     (B*P, M) predicted IoU.
    grid:    (h, w) of the embedding.
    """

    pixels: Tensor
    tokens: Tensor
    iou: Tensor
    grid: tuple[int, int]


def _split_heads(x: Tensor, heads: int) -> Tensor:  # (X, T, D) -> (X, H, T, d)
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _merge_heads(x: Tensor) -> Tensor:  # (X, H, T, d) -> (X, T, D)
    return x.transpose(-3, -2).flatten(-2)


def _head_weights(linear: torch.nn.Linear, heads: int) -> Tensor:  # rows by head: (H, d, C)
    return linear.weight.unflatten(0, (heads, -1))


def _tokens_to_shared_image(attn: Attention, tokens: Tensor, keys: Tensor, values: Tensor, prompts: int) -> Tensor:
    """Layer 0: pixels (B, N, C) are the same for all prompts, so keys and values are projected once an image."""
    b, heads = keys.shape[0], attn.num_heads
    q = _split_heads(attn.q_proj(tokens).reshape(b, -1, attn.internal_dim), heads)  # (B, H, P*T, d)
    k, v = _split_heads(attn.k_proj(keys), heads), _split_heads(attn.v_proj(values), heads)
    out = _merge_heads(F.scaled_dot_product_attention(q, k, v))  # (B, P*T, D)
    return attn.out_proj(out).reshape(b * prompts, -1, attn.embedding_dim)


def _tokens_to_image(attn: Attention, tokens: Tensor, pixels: Tensor, pos: Tensor) -> Tensor:
    """Folded token-to-image attention. tokens (B*P, T, C), pixels (B*P, N, C), pos (N, C) -> (B*P, T, C)."""
    x, t, c = tokens.shape
    heads, d = attn.num_heads, attn.internal_dim // attn.num_heads
    q = _split_heads(attn.q_proj(tokens), heads) * d**-0.5  # (X, H, T, d)
    folded = (q @ _head_weights(attn.k_proj, heads)).reshape(x, heads * t, c)  # (X, HT, C)
    positional = (folded.reshape(-1, c) @ pos.T).view(x, heads * t, -1)  # (X, HT, N)
    weights = torch.baddbmm(positional, folded, pixels.transpose(1, 2)).softmax(-1)
    seen = (weights @ pixels).view(x, heads, t, c)  # (X, H, T, C)
    out = seen @ _head_weights(attn.v_proj, heads).transpose(1, 2)  # (X, H, T, d)
    return attn.out_proj(_merge_heads(out) + attn.v_proj.bias)


def _image_to_tokens(attn: Attention, pixels: Tensor, pos: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Folded image-to-token attention -> (B*P, N, C).

    pixels are (B, N, C) where prompts still share them, else (B*P, N, C); keys and values (B*P, T, C) are tokens.
    """
    x, t, c = keys.shape
    b, n, _ = pixels.shape
    heads, d = attn.num_heads, attn.internal_dim // attn.num_heads
    k = _split_heads(attn.k_proj(keys), heads) * d**-0.5  # (X, H, T, d)
    folded = (k @ _head_weights(attn.q_proj, heads)).reshape(x, heads * t, c)
    bias = (k @ attn.q_proj.bias.view(heads, d, 1)).reshape(x, heads * t, 1)
    scores = (folded.reshape(-1, c) @ pos.T).view(x, heads * t, n)
    # (B, P*HT, C) @ (B, C, N): with shared pixels P > 1 prompts stand in one product
    scores = torch.baddbmm(scores.view(b, -1, n), folded.view(b, -1, c), pixels.transpose(1, 2)).view(x, heads * t, n)
    weights = (scores + bias).view(x, heads, t, n).softmax(2).view(x, heads * t, n)  # over the tokens
    v = _split_heads(attn.v_proj(values), heads)  # (X, H, T, d)
    out_weight = attn.out_proj.weight.T.unflatten(0, (heads, d))  # (H, d, C)
    folded_values = (v @ out_weight).reshape(x, heads * t, c)
    return torch.baddbmm(attn.out_proj.bias.expand(x, n, c), weights.transpose(1, 2), folded_values)


def _layer(block: TwoWayAttentionBlock, tokens: Tensor, token_pe: Tensor, pixels: Tensor, pos: Tensor, prompts: int):
    """One two-way block. While prompts share the pixels, these are (B, N, C) and prompts > 1; after it (B*P, N, C)."""
    if block.skip_first_layer_pe:
        tokens = block.self_attn(q=tokens, k=tokens, v=tokens)
    else:
        q = tokens + token_pe
        tokens = tokens + block.self_attn(q=q, k=q, v=tokens)
    tokens = block.norm1(tokens)
    shared = pixels.shape[0] != tokens.shape[0]
    query = tokens + token_pe
    if shared:
        seen = _tokens_to_shared_image(block.cross_attn_token_to_image, query, pixels + pos, pixels, prompts)
    else:
        seen = _tokens_to_image(block.cross_attn_token_to_image, query, pixels, pos)
    tokens = block.norm2(tokens + seen)
    tokens = block.norm3(tokens + block.mlp(tokens))
    update = _image_to_tokens(block.cross_attn_image_to_token, pixels, pos, tokens + token_pe, tokens)
    if shared:
        pixels = (pixels.unsqueeze(1) + update.view(pixels.shape[0], prompts, *update.shape[1:])).flatten(0, 1)
    else:
        pixels = pixels + update
    return tokens, block.norm4(pixels)


def decode_tokens(decoder: MaskDecoder, embedding: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor) -> Decoded:
    """Run the transformer for every prompt; draw no mask yet.

    embedding: (B, C, h, w) of B images.
    image_pe:  (1, C, h, w), ``PromptEncoder.get_dense_pe()``.
    sparse:    (B, P, t, C) token embeddings of P prompts for each image.
    dense:     (C,) the "no mask" embedding, the same for every pixel (mask prompts go through the stock decoder).
    """
    b, p = sparse.shape[:2]
    h, w = embedding.shape[-2:]
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    token_pe = torch.cat([outputs.expand(b, p, -1, -1), sparse.to(outputs.dtype)], dim=2).flatten(0, 1)  # (B*P, T, C)
    pixels = (embedding + dense.view(1, -1, 1, 1)).flatten(2).transpose(1, 2)  # (B, N, C)
    pos = image_pe[0].flatten(1).T  # (N, C)
    tokens = token_pe
    for block in decoder.transformer.layers:
        tokens, pixels = _layer(block, tokens, token_pe, pixels, pos, p)
    transformer = decoder.transformer
    seen = _tokens_to_image(transformer.final_attn_token_to_image, tokens + token_pe, pixels, pos)
    tokens = transformer.norm_final_attn(tokens + seen)
    masks = decoder.num_mask_tokens
    return Decoded(pixels, tokens[:, 1 : 1 + masks], decoder.iou_prediction_head(tokens[:, 0]), (h, w))


def draw_masks(decoder: MaskDecoder, decoded: Decoded, masks: slice) -> Tensor:
    """Low-resolution logits (B*P, M, 4h, 4w) of the masks in the slice (``slice(1, None)`` is SAM's multimask output)."""
    up1, norm, act1, up2, act2 = decoder.output_upscaling
    x = act1(_layer_norm_last(norm, _upscale(up1, decoded.pixels)))  # (X, N, 4, C/4)
    x = act2(_upscale(up2, x))  # (X, N, 4, 4, C/8)
    nets = list(decoder.output_hypernetworks_mlps)[masks]
    hyper = torch.stack([net(decoded.tokens[:, i]) for i, net in zip(range(len(decoder.mask_tokens.weight))[masks], nets)], 1)
    logits = hyper @ x.flatten(1, -2).transpose(1, 2)  # (X, M, N*16)
    h, w = decoded.grid
    logits = logits.unflatten(-1, (h, w, 2, 2, 2, 2))  # y, x, then dy, dx of each of the two upscalings
    return logits.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(*logits.shape[:2], 4 * h, 4 * w)


def _upscale(conv: torch.nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """A 2 x 2 transposed convolution of stride 2 as a product: (..., C) -> (..., 4, C'), the four being (dy, dx)."""
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # (C, dy*dx*C')
    return (x @ weight).unflatten(-1, (4, -1)) + conv.bias


def _layer_norm_last(norm: torch.nn.Module, x: Tensor) -> Tensor:
    """segment_anything's LayerNorm2d for channels that stand last."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
