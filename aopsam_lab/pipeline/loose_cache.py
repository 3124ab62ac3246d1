"""Prompts of one picture decoded once, at loose thresholds, then filtered at stricter ones (ours).

What a method finds at several pairs of thresholds then costs its decodes once and a filter a pair.
Masks are encoded as soon as they are drawn: at loose thresholds nearly all are, and 1,024 prompts
of MobileSAM have 800 MB of logits but 3 MB of RLE.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from segment_anything.modeling import Sam
from torch import Tensor
from torchvision.ops import nms

from aopsam_lab.pipeline.decode_cache import MAX_BYTES, prompt_key
from aopsam_lab.pipeline.decode import Encoded, Found, decode_and_filter, encoded_masks
from aopsam_lab.pipeline.methods import BOX_NMS_THRESH, Prompts
from aopsam_lab.sam.zoo import SamSpec, spec_of


@dataclass(frozen=True)
class Candidates:
    """The n masks of one prompt that pass the loosest thresholds, in the decoder's order.

    iou, stability: (n,). boxes: (n, 4) long, image frame, inclusive. masks: n COCO RLE.
    strict:   (n,) bool, which of them pass SAM's own thresholds.
    logits:   (k, 4h, 4w), model frame, of these k masks only: adaptive filtering reads no others.
    best_iou: (), the highest predicted IoU of all its masks.
    """

    iou: Tensor
    stability: Tensor
    boxes: Tensor
    masks: list[dict]
    strict: Tensor
    logits: Tensor
    best_iou: Tensor


class LooseCache:
    """The candidates of one picture's prompts, each decoded once at the loosest thresholds.

    Args:
        sam, encoded: the model and the picture; no others are accepted.
        loosest: (predicted IoU, stability score) below which nothing is kept. Where SAM's own
            thresholds are lower, these hold.
        max_bytes: of logits kept. Beyond it the prompts asked for longest ago are forgotten.
    """

    def __init__(
        self,
        sam: Sam,
        encoded: Encoded,
        loosest: tuple[float, float],
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.sam, self.encoded, self.max_bytes, self.own = sam, encoded, max_bytes, spec_of(sam)
        self.loosest = replace(
            self.own,
            pred_iou_thresh=min(loosest[0], self.own.pred_iou_thresh),
            stability_score_thresh=min(loosest[1], self.own.stability_score_thresh),
        )
        self.bytes = 0
        self._known: OrderedDict[Hashable, Candidates] = OrderedDict()

    def candidates(self, prompts: Prompts, index: Tensor) -> list[Candidates]:
        """Of each of the prompts ``index``, in its order, what passes the loosest thresholds."""
        keys = [prompt_key(prompts, row, self.loosest) for row in index.tolist()]
        known = {key: self._known[key] for key in keys if key in self._known}
        new = [i for i, key in enumerate(keys) if key not in known]
        if new:
            decoded = self._decode(prompts, index[new])
            known |= {keys[i]: candidates for i, candidates in zip(new, decoded)}
        self._remember(known)
        return [known[key] for key in keys]

    def _decode(self, prompts: Prompts, index: Tensor) -> list[Candidates]:
        found = decode_and_filter(self.sam, self.encoded, prompts, index, self.loosest)
        every = torch.arange(len(found.iou), device=found.iou.device)
        masks = encoded_masks(self.sam, self.encoded, found.low_res, every)
        strict = _passing(found, self.own.pred_iou_thresh, self.own.stability_score_thresh)
        decoded, first = [], 0
        for row, best in zip(index, found.best_iou):  # the masks stand prompt by prompt
            end = first + int((found.prompt == row).sum())
            numbers = (x[first:end].clone() for x in (found.iou, found.stability, found.boxes))
            own = strict[first:end]
            logits = found.low_res[first:end][own]
            own_masks = masks[first:end]
            decoded.append(Candidates(*numbers, own_masks, own.clone(), logits, best.clone()))
            first = end
        return decoded

    def _remember(self, entries: dict[Hashable, Candidates]) -> None:
        for key, entry in entries.items():
            if key not in self._known:
                self.bytes += entry.logits.nbytes
            self._known[key] = entry
            self._known.move_to_end(key)
        while self.bytes > self.max_bytes:
            _, entry = self._known.popitem(last=False)
            self.bytes -= entry.logits.nbytes


@dataclass
class LooseRun:
    """One run of a method on a LooseCache: for ``run_method(decode=...)``, then :meth:`masks_at`.

    The run itself sees the masks that pass SAM's own thresholds. So the prompts that are decoded,
    and the references that eliminate others, are those of an ordinary run, whatever is asked for
    afterwards.
    """

    cache: LooseCache
    _decoded: list[Candidates] = field(default_factory=list, init=False)

    def __call__(
        self, sam: Sam, encoded: Encoded, prompts: Prompts, index: Tensor, spec: SamSpec
    ) -> Found:
        """As :func:`decode_and_filter`. Raises ValueError for another picture or SAM."""
        cache = self.cache
        if sam is not cache.sam or encoded is not cache.encoded or spec != cache.own:
            raise ValueError("this cache belongs to another picture, model or pair of thresholds")
        decoded = cache.candidates(prompts, index)
        # without logits: what the cache forgets must not stay here
        self._decoded += [replace(own, logits=own.logits.new_zeros(0)) for own in decoded]
        counts = torch.tensor([int(own.strict.sum()) for own in decoded], device=index.device)
        return Found(
            low_res=torch.cat([own.logits for own in decoded]),
            iou=torch.cat([own.iou[own.strict] for own in decoded]),
            stability=torch.cat([own.stability[own.strict] for own in decoded]),
            boxes=torch.cat([own.boxes[own.strict] for own in decoded]),
            prompt=index.repeat_interleave(counts),
            best_iou=torch.stack([own.best_iou for own in decoded]),
            masks=[
                rle for own in decoded for rle, kept in zip(own.masks, own.strict.tolist()) if kept
            ],
        )

    @torch.inference_mode()
    def masks_at(self, thresholds: Sequence[tuple[float, float]]) -> list[list[dict]]:
        """The masks kept at each pair of thresholds, duplicates removed.

        Args:
            thresholds: pairs (predicted IoU, stability score).

        Returns:
            For each pair a list of COCO RLE, by predicted IoU, highest first.

        Raises:
            ValueError: for a pair below the cache's loosest thresholds.
        """
        loosest = self.cache.loosest
        low = loosest.pred_iou_thresh, loosest.stability_score_thresh
        for pair in thresholds:
            if pair[0] < low[0] or pair[1] < low[1]:
                raise ValueError(f"masks were decoded down to {low}, not to the thresholds {pair}")
        if not self._decoded:
            return [[] for _ in thresholds]
        iou, stability, boxes = (
            torch.cat([getattr(own, name) for own in self._decoded])
            for name in ("iou", "stability", "boxes")
        )
        masks = [rle for own in self._decoded for rle in own.masks]
        kept = []
        for least_iou, least_stability in thresholds:
            passing = ((iou > least_iou) & (stability >= least_stability)).nonzero()[:, 0]
            best_first = passing[nms(boxes[passing].float(), iou[passing], BOX_NMS_THRESH)]
            kept.append([masks[i] for i in best_first.tolist()])
        return kept


def _passing(found: Found, pred_iou_thresh: float, stability_score_thresh: float) -> Tensor:
    """(n,) bool, which masks pass both thresholds, as in :func:`decode_and_filter`."""
    return (found.iou > pred_iou_thresh) & (found.stability >= stability_score_thresh)
