"""One image and its mask decoder: whatever the prompts, decoded the quickest way that gives the stock decoder's
numbers.

| prompts | way |
|---|---|
| points, boxes | ``shared.py``: pixels stay with the image |
| masks, whose embedding adds something else to every pixel; and all in bf16 | ``decoder.py``: projections folded into
the tokens |
| any, for a decoder of unknown make | the stock call, with a warning |
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn

from aopsam_lab.sam.decoder import decode_tokens, draw_masks
from aopsam_lab.sam.shared import SharedDecoder

PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True)
class DecodedPrompts:
    """P prompts, their masks not yet drawn.

    iou:  (P, M) predicted IoU of the M masks (4 in stock SAM: the single mask first).
    draw: (P, M) bool -> (k, 4h, 4w) float32 logits of the k masks marked, prompt by prompt.
    """

    iou: Tensor
    draw: Callable[[Tensor], Tensor]


class ImageDecoder:
    """The mask decoder of one image.

    decoder:   a ``MaskDecoder``; its weights are read, not changed.
    embedding: (1, C, h, w). image_pe: (1, C, h, w), ``PromptEncoder.get_dense_pe()``.
    no_mask:   (C,), what stands for the mask prompt where there is none.
    precision: "float32", or "bf16": products in bfloat16, sums over channels and softmax in float32
               (``torch.autocast``). On a CPU without bfloat16 instructions that is slower, and masks differ a little.
    used:      (rows, columns) of the embedding, from its first, whose masks matter; None: all. Logits beyond may be 0.

    Raises ValueError for another precision.
    """

    def __init__(
        self,
        decoder: MaskDecoder,
        embedding: Tensor,
        image_pe: Tensor,
        no_mask: Tensor,
        precision: str = "float32",
        used: tuple[int, int] | None = None,
    ):
        if precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}.")
        self.decoder, self.embedding, self.image_pe, self.no_mask = decoder, embedding, image_pe, no_mask
        self.precision, self.used = precision, used
        self.stock = misfit(decoder)
        self._shared = None
        if not self.stock and precision == "float32":  # made here, as batches of prompts may come from several threads
            self._shared = SharedDecoder(decoder, embedding, image_pe, no_mask, used)
        if self.stock:
            warnings.warn(f"This mask decoder is run as it is, slowly: {self.stock}.", stacklevel=2)

    @torch.no_grad()
    def decode(self, sparse: Tensor, dense: Tensor | None = None) -> DecodedPrompts:
        """P prompts: their token embeddings (P, t, C) and, for mask prompts, dense embeddings (P, C, h, w)."""
        with self._products():
            if self.stock:
                return self._decode_stock(sparse, self.no_mask.view(1, -1, 1, 1) if dense is None else dense)
            if dense is not None:  # as many images as prompts, each with one
                none = torch.zeros_like(self.no_mask)
                return self._folded(self.embedding + dense, sparse[:, None], none)
            if self.precision != "float32":
                return self._folded(self.embedding, sparse[None], self.no_mask)
            decoded = self._shared.decode(sparse)
            return DecodedPrompts(decoded.iou, lambda wanted: self._shared.draw(decoded, wanted))

    def _products(self):
        """Where matrix products are to be in bfloat16, the context that makes them so."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.embedding.device.type, torch.bfloat16)

    def _folded(self, embedding: Tensor, sparse: Tensor, dense: Tensor) -> DecodedPrompts:
        decoded = decode_tokens(self.decoder, embedding, self.image_pe, sparse, dense)

        @torch.no_grad()
        def draw(wanted: Tensor) -> Tensor:
            rows = wanted.any(1)
            with self._products():
                chosen = replace(decoded, pixels=decoded.pixels[rows], tokens=decoded.tokens[rows])
                logits = draw_masks(self.decoder, chosen, slice(None))
            return logits[wanted[rows]].float()

        return DecodedPrompts(decoded.iou.float(), draw)

    def _decode_stock(self, sparse: Tensor, dense: Tensor) -> DecodedPrompts:
        logits, iou = self.decoder.predict_masks(self.embedding, self.image_pe, sparse, dense)
        return DecodedPrompts(iou.float(), lambda wanted: logits[wanted].float())


def misfit(decoder: nn.Module) -> str:
    """Why a mask decoder is not the one that ``shared.py`` and ``decoder.py`` know, in a few words; "" where it is.

    Known is segment_anything's ``MaskDecoder`` with its two-way transformer of two layers, of any width, heads and
    number of masks.
    """
    if type(decoder) is not MaskDecoder:
        return f"it is a {type(decoder).__name__} of {type(decoder).__module__}, not segment_anything's MaskDecoder"
    transformer = decoder.transformer
    if type(transformer) is not TwoWayTransformer or len(transformer.layers) != 2:
        return "its transformer is not segment_anything's with two layers"
    if [layer.skip_first_layer_pe for layer in transformer.layers] != [True, False]:
        return "its layers use the positional encoding otherwise"
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        if type(layer) is not TwoWayAttentionBlock or type(layer.norm4) is not nn.LayerNorm:
            return "its layers are not segment_anything's"
        attentions += [layer.self_attn, layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    if any(type(attention) is not Attention for attention in attentions):
        return "its attention is not segment_anything's"
    if len({attention.num_heads for attention in attentions}) != 1:
        return "its layers differ in their number of heads"
    up = list(decoder.output_upscaling)
    doubling = [c for c in up if type(c) is nn.ConvTranspose2d]
    doubling = [c for c in doubling if c.kernel_size == c.stride == (2, 2) and c.padding == (0, 0)]
    if len(up) != 5 or type(up[1]) is not LayerNorm2d or doubling != [up[0], up[3]]:
        return "its upscaling is not two doublings with a LayerNorm between"
    return ""
