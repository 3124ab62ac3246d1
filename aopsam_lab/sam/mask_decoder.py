"""SAM's mask decoder for many prompts on one image, exact and with a fraction of the work.

After a two-way layer the N pixels of a prompt are the image's own plus what its T tokens added, and
all of that went through the image-to-token attention: a matrix A (N x HT, its softmax weights),
whose rank is far below the number of channels. So

    after layer 0:  x1 = r1 (y + A1 U1) + b1
    after layer 1:  x2 = r2 (r1 (z + A1 U1') + A2 U2) + b2

with y and z of the image, U (HT x C) of the tokens, and r = 1 / standard deviation of a LayerNorm,
one number a pixel, which follows from the Gram matrices of U. Each projection x W of the pixels
splits into y W, computed once an image (a table), and products with A. No prompt's pixels are
formed. The softmax weights of a head sum to 1 over the tokens: a bias added to the pixels is shared
out among the rows of U.

Shapes: P prompts, T tokens a prompt, R = P * T rows, H heads of d channels, D = H * d, C channels,
N = h * w pixels. Weights over the pixels are (P, T * H, N), tables (D, N) or (C, N). For inference
only: it writes over its own results.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn

DRAWN_AT_A_TIME = {"cpu": 1}  # prompts whose pixels stay in cache; elsewhere all


@dataclass(frozen=True)
class DecodedPrompts:
    """P prompts, their masks not yet drawn."""

    iou: Tensor  # (P, M), predicted, of M masks (4 in stock SAM: the single mask first)
    # (P, M) bool -> (k, 4h, 4w) float32 logits of the k masks marked, prompt by prompt
    draw: Callable[[Tensor], Tensor]


class ImageDecoder:
    """The mask decoder of one image; one that is not segment_anything's is run as it is.

    Args:
        decoder: a `MaskDecoder`.
        embedding, image_pe: (1, C, h, w); the latter is `PromptEncoder.get_dense_pe()`.
        no_mask: (C,), what is added to every pixel where a prompt has no mask.
        used: (rows, columns) of the embedding on which masks are drawn; logits beyond may be 0.
    """

    def __init__(
        self,
        decoder: MaskDecoder,
        embedding: Tensor,
        image_pe: Tensor,
        no_mask: Tensor,
        used: tuple[int, int] | None = None,
    ) -> None:
        self.decoder, self.embedding, self.image_pe = decoder, embedding, image_pe
        self.no_mask = no_mask
        self._shared = None
        if is_stock(decoder):  # made here, as batches of prompts may come from several threads
            self._shared = _SharedDecoder(decoder, embedding, image_pe, no_mask, used)
        else:
            reason = "it is not segment_anything's own"
            warnings.warn(f"This mask decoder is run as it is, slowly: {reason}.", stacklevel=2)

    @torch.no_grad()
    def decode(self, sparse: Tensor) -> DecodedPrompts:
        """Decode P prompts, given by their token embeddings (P, t, C)."""
        if self._shared is not None:
            return self._shared.decode(sparse)
        dense = self.no_mask.view(1, -1, 1, 1)
        logits, iou = self.decoder.predict_masks(self.embedding, self.image_pe, sparse, dense)
        return DecodedPrompts(iou.float(), lambda wanted: logits[wanted].float())


def is_stock(decoder: MaskDecoder) -> bool:
    """Whether a mask decoder is segment_anything's with two layers, of any width and heads."""
    if type(decoder) is not MaskDecoder or repr(decoder.output_upscaling[2]) != repr(nn.GELU()):
        return False
    transformer = decoder.transformer
    return type(transformer) is TwoWayTransformer and len(transformer.layers) == 2


def _over_pixels(rows: Tensor, table: Tensor, heads: int, out: Tensor, add: bool = False) -> Tensor:
    """Head by head rows @ table, added where `add`: (R, D), (D, N) -> out (P, T * H, N)."""
    r, n = len(rows), table.shape[-1]
    by_head = out.view(r, heads, n).transpose(0, 1)
    left, right = rows.view(r, heads, -1).transpose(0, 1), table.view(heads, -1, n)
    if add:
        by_head.baddbmm_(left, right)
    else:
        torch.bmm(left, right, out=by_head)
    return out


def _from_pixels(weights: Tensor, table: Tensor, heads: int) -> Tensor:
    """Head by head weights @ table^T: (P, T * H, N), (D, N) -> (R, D)."""
    n = table.shape[-1]
    left, right = weights.view(-1, heads, n).transpose(0, 1), table.view(heads, -1, n)
    return torch.bmm(left, right.transpose(1, 2)).transpose(0, 1).flatten(1)


def _to_channels(rows: Tensor, weight: Tensor, heads: int, prompts: int) -> Tensor:
    """Head by head rows @ weight: (R, D), (D, C) -> (P, T * H, C)."""
    out = rows.new_empty(prompts, len(rows) * heads // prompts, weight.shape[-1])
    return _over_pixels(rows, weight, heads, out)


def _centred(x: Tensor, dim: int = -1) -> Tensor:
    """Minus its mean over the channels."""
    return x - x.mean(dim, keepdim=True)


def _token_softmax(scores: Tensor, tokens: int) -> Tensor:
    """(P, T * H, N) -> the same, each pixel's and head's weights over the T tokens summing to 1."""
    p, _, n = scores.shape
    return scores.view(p, tokens, -1).softmax(1).view(p, -1, n)


def _rows_dot(a: Tensor, b: Tensor) -> Tensor:
    """(P, K, N), (P, K, N) -> (P, 1, N), the sum of a * b over K; overwrites a."""
    return a.mul_(b).sum(1, keepdim=True)


class _SharedDecoder:
    """Tables of one image, made once, then any number of prompts on it; see ImageDecoder."""

    @torch.no_grad()
    def __init__(
        self,
        decoder: MaskDecoder,
        embedding: Tensor,
        image_pe: Tensor,
        dense: Tensor,
        used: tuple[int, int] | None = None,
    ):
        self.decoder, self.grid = decoder, tuple(embedding.shape[-2:])
        self.used = self.grid if used is None else used
        transformer = decoder.transformer
        layer0, layer1 = transformer.layers
        x = embedding[0].flatten(1).T + dense  # (N, C)
        pos = image_pe[0].flatten(1).T

        def table(attn: Attention, name: str, pixels: Tensor, bias: bool = False) -> Tensor:
            """(N, C) -> (D, N)."""
            projection = getattr(attn, name)
            projected = projection.weight @ pixels.T
            return projected + projection.bias[:, None] if bias else projected

        to_image, to_tokens = layer0.cross_attn_token_to_image, layer0.cross_attn_image_to_token
        self.key0 = table(to_image, "k_proj", x + pos)
        self.value0 = table(to_image, "v_proj", x, bias=True)
        self.query0 = table(to_tokens, "q_proj", x + pos, bias=True)
        # layer 0's update: x + A1 (V1 W_o) + its bias, and the LayerNorm over it
        x = _centred(x + to_tokens.out_proj.bias)
        self.out0 = _centred(to_tokens.out_proj.weight.T)  # (D, C)
        self.square0, self.cross0 = x.square().sum(-1), self.out0 @ x.T  # (N,), (D, N)
        scale, self.bias1 = layer0.norm4.weight, layer0.norm4.bias
        self.out01 = self.out0 * scale
        x = x * scale
        # layer 1 reads r1 (x + A1 U1) + bias1
        to_image, to_tokens = layer1.cross_attn_token_to_image, layer1.cross_attn_image_to_token
        self.key1, self.key_pos1 = table(to_image, "k_proj", x), table(to_image, "k_proj", pos)
        self.value1 = table(to_image, "v_proj", x)
        self.query1 = table(to_tokens, "q_proj", x)
        self.query_pos1 = table(to_tokens, "q_proj", pos + self.bias1, bias=True)
        # layer 1's update and its LayerNorm
        x = _centred(x)
        self.out01c = _centred(self.out01)
        self.out1 = _centred(to_tokens.out_proj.weight.T)
        self.out_bias1 = _centred(self.bias1 + to_tokens.out_proj.bias)
        self.square1 = x.square().sum(-1)
        self.cross01, self.cross1 = self.out01c @ x.T, self.out1 @ x.T
        self.bias_cross1 = x @ self.out_bias1  # (N,)
        self.scale2, self.bias2 = layer1.norm4.weight, layer1.norm4.bias
        x = x * self.scale2
        # the last attention and the upscaling read r2 (r1 (x + A1 U1) + A2 U2) + bias2
        final = transformer.final_attn_token_to_image
        self.key2, self.key_pos2 = table(final, "k_proj", x), table(final, "k_proj", pos)
        self.value2 = table(final, "v_proj", x)
        up = decoder.output_upscaling[0]
        # (dy dx C/4, C): of four new pixels, less the mean that the LayerNorm takes off
        self.up_weight = _centred(up.weight.permute(2, 3, 1, 0), 2).flatten(0, 2)
        self.up = self._on_used(self.up_weight @ x.T).flatten(1).T.contiguous()  # (n, C)
        self.up_bias = self.up_weight @ self.bias2 + _centred(up.bias, 0).repeat(4)

    def _on_used(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., rows, columns), the pixels on which masks are drawn."""
        return x.unflatten(-1, self.grid)[..., : self.used[0], : self.used[1]]

    @torch.no_grad()
    def decode(self, sparse: Tensor) -> DecodedPrompts:
        """Decode P prompts, given by their token embeddings (P, t, C)."""
        decoder = self.decoder
        p = len(sparse)
        outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        token_pe = torch.cat([outputs.expand(p, -1, -1), sparse.to(outputs.dtype)], dim=1)
        t, n = token_pe.shape[1], self.key0.shape[1]
        layer0, layer1 = decoder.transformer.layers
        heads = layer0.cross_attn_token_to_image.num_heads
        scores, work = (token_pe.new_empty(p, t * heads, n) for _ in range(2))

        def queries(projection: nn.Linear, x: Tensor) -> Tensor:
            """(P, T, C) -> (R, D), scaled for the softmax."""
            rows = projection(x).flatten(0, 1)
            return rows.mul_((rows.shape[-1] // heads) ** -0.5)

        # layer 0
        tokens = layer0.norm1(layer0.self_attn(q=token_pe, k=token_pe, v=token_pe))
        attn = layer0.cross_attn_token_to_image
        _over_pixels(queries(attn.q_proj, tokens + token_pe), self.key0, heads, scores)
        seen = _from_pixels(torch.softmax(scores, -1, out=work), self.value0, heads)
        tokens = layer0.norm2(tokens + attn.out_proj(seen).view(p, t, -1))
        tokens = layer0.norm3(tokens + layer0.mlp(tokens))
        attn = layer0.cross_attn_image_to_token
        _over_pixels(queries(attn.k_proj, tokens + token_pe), self.query0, heads, scores)
        a1 = _token_softmax(scores, t)
        value = attn.v_proj(tokens).flatten(0, 1)
        u0 = _to_channels(value, self.out0, heads, p)
        _over_pixels(2 * value, self.cross0, heads, work)
        # |x + A1 U|^2, expanded
        square = self.square0 + _rows_dot(work.baddbmm_(u0 @ u0.mT, a1), a1)
        c = u0.shape[-1]
        r1 = torch.rsqrt(square / c + layer0.norm4.eps)  # (P, 1, N)
        u1 = u0 * layer0.norm4.weight

        # layer 1
        q = tokens + token_pe
        tokens = layer1.norm1(tokens + layer1.self_attn(q=q, k=q, v=tokens))
        attn = layer1.cross_attn_token_to_image
        q = queries(attn.q_proj, tokens + token_pe)
        _over_pixels(q, self.key1, heads, scores)
        scores.baddbmm_(_to_channels(q, attn.k_proj.weight, heads, p) @ u1.mT, a1).mul_(r1)
        _over_pixels(q, self.key_pos1, heads, scores, add=True)
        weights = torch.softmax(scores, -1, out=work).mul_(r1)
        seen = _from_pixels(weights, self.value1, heads)
        seen += _from_pixels(torch.bmm(weights, a1.mT) @ u1, attn.v_proj.weight, heads)
        seen += attn.v_proj.weight @ self.bias1 + attn.v_proj.bias
        tokens = layer1.norm2(tokens + attn.out_proj(seen).view(p, t, -1))
        tokens = layer1.norm3(tokens + layer1.mlp(tokens))
        attn = layer1.cross_attn_image_to_token
        k = queries(attn.k_proj, tokens + token_pe)
        _over_pixels(k, self.query1, heads, scores)
        scores.baddbmm_(_to_channels(k, attn.q_proj.weight, heads, p) @ u1.mT, a1).mul_(r1)
        _over_pixels(k, self.query_pos1, heads, scores, add=True)
        a2 = _token_softmax(scores, t)
        value1, value = value, attn.v_proj(tokens).flatten(0, 1)
        u1 = _centred(u1)
        u2 = _to_channels(value, self.out1, heads, p) + self.out_bias1 / heads
        # |r1 (z + A1 U1) + A2 U2|^2, expanded; both of its halves by rows of A1 and of A2
        _over_pixels(2 * value1, self.cross01, heads, work)
        square = self.square1 + _rows_dot(work.baddbmm_(u1 @ u1.mT, a1), a1)
        _over_pixels(value, self.cross1, heads, work).baddbmm_(u2 @ u1.mT, a1)
        work.mul_(2 * r1).baddbmm_(u2 @ u2.mT, a2)
        square = square * r1.square() + 2 * r1 * self.bias_cross1 + _rows_dot(work, a2)
        r2 = torch.rsqrt(square / c + layer1.norm4.eps)
        u1, u2 = u1 * self.scale2, u2 * self.scale2
        r12 = r1 * r2
        a1, a2 = a1.mul_(r12), a2.mul_(r2)

        # the last attention: what it makes of the prompt's own tokens, nothing reads
        attn = decoder.transformer.final_attn_token_to_image
        tokens, token_pe = (x[:, : len(outputs)] for x in (tokens, token_pe))
        size = p * len(outputs) * heads * n
        scores, work = (x.view(-1)[:size].view(p, -1, n) for x in (scores, work))
        q = queries(attn.q_proj, tokens + token_pe)
        folded = _to_channels(q, attn.k_proj.weight, heads, p)
        _over_pixels(q, self.key2, heads, scores).mul_(r12)
        scores.baddbmm_(folded @ u1.mT, a1).baddbmm_(folded @ u2.mT, a2)
        _over_pixels(q, self.key_pos2, heads, scores, add=True)
        weights = torch.softmax(scores, -1, out=work)
        by_channel = (torch.bmm(weights, a1.mT) @ u1).baddbmm_(torch.bmm(weights, a2.mT), u2)
        seen = _from_pixels(weights.mul_(r12), self.value2, heads)
        seen += _from_pixels(by_channel, attn.v_proj.weight, heads)
        seen += attn.v_proj.weight @ self.bias2 + attn.v_proj.bias
        tokens = decoder.transformer.norm_final_attn(tokens + attn.out_proj(seen).view_as(tokens))
        iou = decoder.iou_prediction_head(tokens[:, 0])
        return DecodedPrompts(iou, partial(self._draw, tokens[:, 1:], r12, ((u1, a1), (u2, a2))))

    @torch.no_grad()
    def _draw(
        self,
        tokens: Tensor,
        scale: Tensor,
        halves: tuple[tuple[Tensor, Tensor], ...],
        wanted: Tensor,
    ) -> Tensor:
        """Draw masks; but for a constant the pixels are scale * image + sum of attention @ values.

        Tokens (P, M, C), scale (P, 1, N), wanted (P, M) bool; of each layer values (P, T * H, C)
        and attention (P, T * H, N).
        """
        decoder, (height, width), (h, w) = self.decoder, self.grid, self.used
        _, norm, _, up2, _ = decoder.output_upscaling
        nets = decoder.output_hypernetworks_mlps
        # (P, M, C/8)
        hyper = torch.stack([net(tokens[:, i]) for i, net in enumerate(nets)], 1)
        weight2 = up2.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (dy dx C/8, C/4)
        n, gelu_ = h * w, torch.ops.aten.gelu_  # in place
        logits = hyper.new_empty(int(wanted.sum()), 4 * height, 4 * width)
        logits[:, 4 * h :], logits[:, : 4 * h, 4 * w :] = 0, 0
        # (k, y, dy, dy, x, dx, dx)
        places = logits[:, : 4 * h, : 4 * w].unflatten(2, (w, 2, 2)).unflatten(1, (h, 2, 2))
        rows, done = wanted.any(1).nonzero()[:, 0], 0
        step = DRAWN_AT_A_TIME.get(rows.device.type, len(rows))
        for some in rows.split(step) if len(rows) else ():
            p, own = len(some), self._on_used(scale[some]).flatten(2).mT
            x = torch.addcmul(self.up_bias, self.up, own)  # (p, n, C)
            for values, attention in halves:
                # prompt by prompt, so that no attention is copied
                added = values[some] @ self.up_weight.T
                for part, value, i in zip(x, added, some.tolist(), strict=True):
                    part.addmm_(self._on_used(attention[i]).flatten(1).T, value)
            x = x.view(p, 4 * n, -1)
            x = F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
            x = F.linear(gelu_(x), weight2, up2.bias.repeat(4))  # (p, 4 n, 4 C/8)
            x = gelu_(x).view(p, 16 * n, -1) @ hyper[some].mT
            # y x and of the two upscalings dy dx dy dx -> y dy dy x dx dx
            x = x.view(p, h, w, 2, 2, 2, 2, -1).permute(0, 7, 1, 3, 5, 2, 4, 6)
            marked = x[wanted[some]]
            places[done : done + len(marked)] = marked
            done += len(marked)
        return logits
