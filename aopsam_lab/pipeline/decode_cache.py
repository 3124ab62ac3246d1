"""What was computed of an image for one setting, kept for the next.

The caches belong to one encoded image and one model and refuse others. Times of a run that uses
them are not those of the method.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress

import torch
from segment_anything.modeling import Sam
from torch import Tensor
from torchvision.ops import nms

from aopsam_lab.pipeline.decode import decode_and_filter, encoded_masks
from aopsam_lab.pipeline.types import BOX_NMS_THRESH, Encoded, Found, Prompts
from aopsam_lab.predictor import PromptPredictor
from aopsam_lab.sam.zoo import SamSpec, spec_of

MAX_BYTES = 512 * 2**20
WRONG = "this cache belongs to another image, model or pair of thresholds: make one for each image"


@dataclass(frozen=True)
class Candidates:
    """The n masks of one prompt that pass the cache's thresholds, in the decoder's order.

    Args:
        iou, stability: (n,).
        boxes: (n, 4) long, image frame, inclusive.
        masks: n COCO RLE, or None where they are not encoded yet.
        strict: (n,) bool, which of them pass SAM's own thresholds.
        logits: (k, 4h, 4w), model frame, of these k masks only.
        best_iou: (), the highest predicted IoU of all the prompt's masks.
    """

    iou: Tensor
    stability: Tensor
    boxes: Tensor
    masks: list[dict] | None
    strict: Tensor
    logits: Tensor
    best_iou: Tensor


class DecodeCache:
    """Decodes each prompt of an image once: for `run_method(decode=...)`.

    A prompt is known by its exact point or box. `n_decoded` counts the prompts that were decoded,
    `n_served` those that were known.

    Args:
        sam: the model.
        encoded: the image.
        loosest: (predicted IoU, stability score) below which nothing is kept, if lower than SAM's
            own thresholds. Masks are then encoded at once: at loose thresholds nearly all pass, and
            1,024 prompts of MobileSAM have 800 MB of logits but 3 MB of RLE. None: SAM's own.
        max_bytes: of logits kept; beyond it the prompts asked for longest ago are forgotten.
    """

    def __init__(
        self,
        sam: Sam,
        encoded: Encoded,
        loosest: tuple[float, float] | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.sam, self.encoded, self.max_bytes = sam, encoded, max_bytes
        self.own = self.loosest = spec_of(sam)
        self._early = loosest is not None
        if loosest is not None:
            self.loosest = replace(
                self.own,
                pred_iou_thresh=min(loosest[0], self.own.pred_iou_thresh),
                stability_score_thresh=min(loosest[1], self.own.stability_score_thresh),
            )
        self.n_decoded = self.n_served = self.bytes = 0
        self._known: OrderedDict[Hashable, Candidates] = OrderedDict()

    def __call__(
        self, sam: Sam, encoded: Encoded, prompts: Prompts, index: Tensor, spec: SamSpec
    ) -> Found:
        """As `decode_and_filter`: the masks that pass SAM's own thresholds."""
        return _strict_masks(self.candidates(sam, encoded, prompts, index, spec), index)

    def candidates(
        self, sam: Sam, encoded: Encoded, prompts: Prompts, index: Tensor, spec: SamSpec
    ) -> list[Candidates]:
        """What passes the cache's thresholds, of each of the prompts `index`.

        Raises:
            ValueError: another image, model or pair of thresholds than the cache was made for.
        """
        if sam is not self.sam or encoded is not self.encoded or spec != self.own:
            raise ValueError(WRONG)
        keys = [_key(prompts, row) for row in index.tolist()]
        known = {key: self._known[key] for key in keys if key in self._known}
        new = [i for i, key in enumerate(keys) if key not in known]
        if new:
            decoded = self._decode(prompts, index[new])
            known |= {keys[i]: own for i, own in zip(new, decoded, strict=True)}
        self.n_decoded += len(new)
        self.n_served += len(keys) - len(new)
        for key, own in known.items():
            if key not in self._known:
                self.bytes += own.logits.nbytes
            self._known[key] = own
            self._known.move_to_end(key)
        while self.bytes > self.max_bytes:
            _, oldest = self._known.popitem(last=False)
            self.bytes -= oldest.logits.nbytes
        return [known[key] for key in keys]

    def _decode(self, prompts: Prompts, index: Tensor) -> list[Candidates]:
        found = decode_and_filter(self.sam, self.encoded, prompts, index, self.loosest)
        rles = encoded_masks(self.sam, self.encoded, found.low_res) if self._early else None
        strict = found.iou > self.own.pred_iou_thresh
        strict &= found.stability >= self.own.stability_score_thresh
        decoded, first = [], 0
        for row, best in zip(index, found.best_iou, strict=True):  # masks stand prompt by prompt
            part = slice(first, first + int((found.prompt == row).sum()))
            # copies: the rest is forgotten
            fields = found.iou, found.stability, found.boxes, strict
            *numbers, own = (x[part].clone() for x in fields)
            masks = None if rles is None else rles[part]
            logits = found.low_res[part][own]
            decoded.append(Candidates(*numbers, masks, own, logits, best.clone()))
            first = part.stop
        return decoded


def _strict_masks(decoded: Sequence[Candidates], index: Tensor) -> Found:
    counts = torch.tensor([int(own.strict.sum()) for own in decoded], device=index.device)
    masks = None
    if all(own.masks is not None for own in decoded):
        masks = [rle for own in decoded for rle in compress(own.masks, own.strict.tolist())]
    return Found(
        torch.cat([own.logits for own in decoded]),
        *(
            torch.cat([getattr(own, name)[own.strict] for own in decoded])
            for name in ("iou", "stability", "boxes")
        ),
        prompt=index.repeat_interleave(counts),
        best_iou=torch.stack([own.best_iou for own in decoded]),
        masks=masks,
    )


@dataclass
class LooseRun:
    """One run of a method on a cache with loose thresholds: for `run_method(decode=...)`.

    Its prompts and references are those of an ordinary run; `masks_at` tells what other thresholds
    would have kept.
    """

    cache: DecodeCache
    _decoded: list[Candidates] = field(default_factory=list, init=False)

    def __call__(
        self, sam: Sam, encoded: Encoded, prompts: Prompts, index: Tensor, spec: SamSpec
    ) -> Found:
        """As the cache."""
        decoded = self.cache.candidates(sam, encoded, prompts, index, spec)
        # without logits: what the cache forgets must not stay here
        self._decoded += [replace(own, logits=own.logits.new_zeros(0)) for own in decoded]
        return _strict_masks(decoded, index)

    @torch.inference_mode()
    def masks_at(self, thresholds: Sequence[tuple[float, float]]) -> list[list[dict]]:
        """The masks kept at each pair (predicted IoU, stability score), duplicates removed.

        Returns:
            For each pair a list of COCO RLE, by predicted IoU, highest first.

        Raises:
            ValueError: a pair is below the cache's thresholds.
        """
        low = self.cache.loosest.pred_iou_thresh, self.cache.loosest.stability_score_thresh
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


class PcmCache:
    """A Prompt Predictor that draws the PCM of one image once: for `run_method(predictor=...)`."""

    def __init__(self, predictor: PromptPredictor, encoded: Encoded) -> None:
        self.predictor, self.encoded = predictor, encoded
        self._pcm: Tensor | None = None

    def pcm(self, image: Tensor, embedding: Tensor, valid: Tensor) -> Tensor:
        """As `PromptPredictor.pcm`; ValueError for another image than the cache was made for."""
        if image is not self.encoded.model_image or embedding is not self.encoded.embedding:
            raise ValueError(WRONG)
        if self._pcm is None:
            self._pcm = self.predictor.pcm(image, embedding, valid)
        return self._pcm


def _key(prompts: Prompts, row: int) -> Hashable:
    box = None if prompts.boxes is None else tuple(prompts.boxes[row].tolist())
    return tuple(prompts.points[row].tolist()), box, prompts.multimask
