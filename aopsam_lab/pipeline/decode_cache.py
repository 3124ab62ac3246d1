"""What was computed of an image for one setting, kept for the next.

The caches belong to one encoded image and one model and refuse others. Times of a run that uses
them are not those of the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from aopsam_lab.pipeline.decode import (
    decode_and_filter,
    encoded_masks,
    joined,
    nothing,
    remove_duplicates,
)
from aopsam_lab.pipeline.types import Encoded, Found, MaskParams, Prompts
from aopsam_lab.predictor import PromptPredictor
from aopsam_lab.sam.zoo import SamSpec, spec_of

MAX_BYTES = 512 * 2**20
WRONG = "this cache belongs to another image, model or pair of thresholds: make one for each image"

# of one prompt: what passes the run's own thresholds, and what passes the cache's, without logits
Decoded = tuple[Found, Found]


class DecodeCache:
    """Decodes each prompt of an image once: for `run_method(decode=...)`.

    A prompt is known by its exact point or box. `n_decoded` counts the prompts that were decoded.

    Args:
        sam: the model.
        encoded: the image.
        loosest: (predicted IoU, stability score) below which nothing is kept, if lower than the
            runs' own. Masks are then encoded at once: nearly all pass, and 1,024 prompts of
            MobileSAM have 800 MB of logits but 3 MB of RLE. None: the runs' own.
        quality: of the runs.
        max_bytes: of logits kept; beyond it the prompts asked for longest ago are forgotten.
    """

    def __init__(
        self,
        sam: Sam,
        encoded: Encoded,
        loosest: tuple[float, float] | None = None,
        quality: MaskParams = MaskParams(),
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.sam, self.encoded, self.max_bytes = sam, encoded, max_bytes
        self.own, self.quality, self._early = quality.of(spec_of(sam)), quality, bool(loosest)
        own = self.own.pred_iou_thresh, self.own.stability_score_thresh
        self.loosest = tuple(map(min, own, loosest or own))
        self.n_decoded = self.bytes = 0
        self._known: dict[tuple, Decoded] = {}  # those asked for longest ago first

    def __call__(
        self, sam: Sam, encoded: Encoded, prompts: Prompts, index: Tensor, spec: SamSpec
    ) -> Found:
        """As `decode_and_filter`: the masks that pass the run's own thresholds."""
        return of_prompts(self.decoded(sam, encoded, prompts, index, spec), index)

    def decoded(
        self, sam: Sam, encoded: Encoded, prompts: Prompts, index: Tensor, spec: SamSpec
    ) -> list[Decoded]:
        """What each of the prompts `index` gives.

        Raises:
            ValueError: another image, model or pair of thresholds than the cache was made for.
        """
        if sam is not self.sam or encoded is not self.encoded or spec != self.own:
            raise ValueError(WRONG)
        places = prompts.points if prompts.boxes is None else prompts.boxes
        keys = [(*place, prompts.multimask) for place in places[index].tolist()]
        known = {key: self._known.pop(key) for key in keys if key in self._known}
        new = [i for i, key in enumerate(keys) if key not in known]
        if new:
            known |= zip([keys[i] for i in new], self._decode(prompts, index[new]), strict=True)
        self.n_decoded += len(new)
        self._known |= known  # at the end: asked for last
        self.bytes = sum(strict.low_res.nbytes for strict, _ in self._known.values())
        while self.bytes > self.max_bytes:
            strict, _ = self._known.pop(next(iter(self._known)))
            self.bytes -= strict.low_res.nbytes
        return [known[key] for key in keys]

    def _decode(self, prompts: Prompts, index: Tensor) -> list[Decoded]:
        least_iou, least_stability = self.loosest
        spec = replace(self.own, pred_iou_thresh=least_iou, stability_score_thresh=least_stability)
        found = decode_and_filter(self.sam, self.encoded, prompts, index, spec)
        found.masks = encoded_masks(self.sam, self.encoded, found) if self._early else None
        strict = found.iou > self.own.pred_iou_thresh
        strict &= found.stability >= self.own.stability_score_thresh
        loose = replace(found, low_res=found.low_res[:, :0, :0])
        decoded = []
        for row, best in zip(index, found.best_iou, strict=True):
            own = found.prompt == row
            decoded.append((_some(found, own & strict, best), _some(loose, own, best)))
        return decoded


def _some(found: Found, wanted: Tensor, best_iou: Tensor) -> Found:
    """A copy of the masks marked, (n,) bool: the rest can be forgotten."""
    fields = (found.low_res, found.iou, found.stability, found.boxes, found.prompt)
    masks = found.masks and [found.masks[i] for i in wanted.nonzero()[:, 0].tolist()]
    return Found(*(x[wanted] for x in fields), best_iou=best_iou.clone()[None], masks=masks)


def of_prompts(decoded: Sequence[Decoded], index: Tensor) -> Found:
    """The masks of the prompts `index` that pass the run's own thresholds, as one."""
    found = joined([strict for strict, _ in decoded])
    counts = torch.tensor([len(strict.iou) for strict, _ in decoded], device=index.device)
    return replace(found, prompt=index.repeat_interleave(counts))


@dataclass
class LooseRun:
    """An ordinary run of a method on a cache with loose thresholds: for `run_method(decode=...)`.

    `masks_at` tells what other thresholds would have kept.
    """

    cache: DecodeCache
    _loose: list[Found] = field(default_factory=list, init=False)

    def __call__(
        self, sam: Sam, encoded: Encoded, prompts: Prompts, index: Tensor, spec: SamSpec
    ) -> Found:
        """As the cache."""
        decoded = self.cache.decoded(sam, encoded, prompts, index, spec)
        self._loose += [loose for _, loose in decoded]
        return of_prompts(decoded, index)

    @torch.inference_mode()
    def masks_at(self, thresholds: Sequence[tuple[float, float]]) -> list[list[dict]]:
        """COCO RLE of the masks kept at each pair (predicted IoU, stability score), best first.

        Raises:
            ValueError: a pair is below the cache's thresholds.
        """
        loosest, kept = self.cache.loosest, []
        found = joined(self._loose) if self._loose else nothing(self.cache.encoded)
        for pair in thresholds:
            if pair[0] < loosest[0] or pair[1] < loosest[1]:
                problem = f"masks were decoded down to {loosest}, not to the thresholds {pair}"
                raise ValueError(problem)
            passing = (found.iou > pair[0]) & (found.stability >= pair[1])
            own = [_some(found, passing, found.best_iou)]
            of_image = self.cache.sam, self.cache.encoded, own, self.cache.quality
            kept.append(remove_duplicates(*of_image)["masks"])
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
