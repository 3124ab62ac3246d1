"""The mask decoder of one image: point and box prompts decoded the quickest way that gives the
stock decoder's numbers.

That is `shared.py`. A decoder of a make that it does not know is run as it is, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn

from aopsam_lab.sam.shared import SharedDecoder


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

    Args:
        decoder: a `MaskDecoder`; its weights are read, not changed.
        embedding: (1, C, h, w).
        image_pe: (1, C, h, w), `PromptEncoder.get_dense_pe()`.
        no_mask: (C,), what stands for the mask prompt, as no prompt has one.
        used: (rows, columns) of the embedding, from its first, whose masks matter; None: all.
            Logits beyond may be 0.
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
        self.stock = misfit(decoder)
        self._shared = None
        if self.stock:
            warnings.warn(f"This mask decoder is run as it is, slowly: {self.stock}.", stacklevel=2)
        else:  # made here, as batches of prompts may come from several threads
            self._shared = SharedDecoder(decoder, embedding, image_pe, no_mask, used)

    @torch.no_grad()
    def decode(self, sparse: Tensor) -> DecodedPrompts:
        """Decode P prompts, given by their token embeddings (P, t, C)."""
        if self._shared is None:
            dense = self.no_mask.view(1, -1, 1, 1)
            logits, iou = self.decoder.predict_masks(self.embedding, self.image_pe, sparse, dense)
            return DecodedPrompts(iou.float(), lambda wanted: logits[wanted].float())
        decoded = self._shared.decode(sparse)
        return DecodedPrompts(decoded.iou, lambda wanted: self._shared.draw(decoded, wanted))


def misfit(decoder: nn.Module) -> str:
    """Why a mask decoder is not the one that ``shared.py`` knows, in a few words; "" where it is.

    Known is segment_anything's ``MaskDecoder`` with its two-way transformer of two layers, of any
    width, heads and
    number of masks.
    """
    if type(decoder) is not MaskDecoder:
        name = f"{type(decoder).__name__} of {type(decoder).__module__}"
        return f"it is a {name}, not segment_anything's MaskDecoder"
    transformer = decoder.transformer
    if type(transformer) is not TwoWayTransformer or len(transformer.layers) != 2:
        return "its transformer is not segment_anything's with two layers"
    if [layer.skip_first_layer_pe for layer in transformer.layers] != [True, False]:
        return "its layers use the positional encoding otherwise"
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        if type(layer) is not TwoWayAttentionBlock or type(layer.norm4) is not nn.LayerNorm:
            return "its layers are not segment_anything's"
        attentions += [
            layer.self_attn,
            layer.cross_attn_token_to_image,
            layer.cross_attn_image_to_token,
        ]
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
