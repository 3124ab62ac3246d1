"""What was computed of a picture for one setting, kept for the next: its PCM, and each decoded prompt's masks (ours).

A point decoded for one setting of the knobs is the same point in another, so sweeps and live sliders decode each once.
Both caches belong to one encoded picture and one model, which they hold, and refuse any other. Times of a run that
uses them are not those of the method.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import fields, replace

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from aopsam_lab.pipeline.decode import Encoded, Found, decode_and_filter
from aopsam_lab.pipeline.methods import Prompts
from aopsam_lab.predictor import PromptPredictor
from aopsam_lab.sam.zoo import SamSpec

MAX_BYTES = 512 * 2**20
_NOT_OF_MASKS = ("prompt", "best_iou", "masks")
# (n, ...), one row a mask
_OF_MASKS = tuple(f.name for f in fields(Found) if f.name not in _NOT_OF_MASKS)


class DecodeCache:
    """``decode_and_filter`` for one picture and one SAM, each prompt decoded once: for ``run_method(decode=...)``.

    A prompt is known by its exact point or box, whether it is decoded to one mask or to three, and the two thresholds.
    max_bytes: of mask tensors kept; beyond it the prompts that were asked for longest ago are forgotten.
    n_decoded counts the prompts that went through the decoder, n_served those that did not need to.
    """

    def __init__(self, sam: Sam, encoded: Encoded, max_bytes: int = MAX_BYTES):
        self.sam, self.encoded, self.max_bytes = sam, encoded, max_bytes
        self.n_decoded = self.n_served = self.bytes = 0
        self._known: OrderedDict[Hashable, tuple[dict[str, Tensor], Tensor]] = OrderedDict()

    def __call__(
        self, sam: Sam, encoded: Encoded, prompts: Prompts, index: Tensor, spec: SamSpec
    ) -> Found:
        """As :func:`decode_and_filter`. Raises ValueError for another picture or model than the cache was made for."""
        if sam is not self.sam or encoded is not self.encoded:
            raise ValueError(
                "this cache belongs to another picture or model: make a DecodeCache for each picture"
            )
        keys = [prompt_key(prompts, row, spec) for row in index.tolist()]
        known = {key: self._known[key] for key in keys if key in self._known}
        new = [i for i, key in enumerate(keys) if key not in known]
        if new:
            found = decode_and_filter(sam, encoded, prompts, index[new], spec)
            for i, entry in zip(new, _by_prompt(found, index[new])):
                known[keys[i]] = entry
        self.n_decoded += len(new)
        self.n_served += len(keys) - len(new)
        self._remember(known)
        return _joined([known[key] for key in keys], index)

    def candidates(self, prompts: Prompts, row: int) -> Found:
        """All masks of the prompt ``row`` before any threshold, in the decoder's order, without those of no pixel."""
        everything = replace(
            self.sam.spec, pred_iou_thresh=float("-inf"), stability_score_thresh=float("-inf")
        )
        return self(
            self.sam,
            self.encoded,
            prompts,
            torch.tensor([row], device=prompts.points.device),
            everything,
        )

    def _remember(self, entries: dict[Hashable, tuple[dict[str, Tensor], Tensor]]) -> None:
        for key, entry in entries.items():
            if key not in self._known:
                self.bytes += _size(entry)
            self._known[key] = entry
            self._known.move_to_end(key)
        while self.bytes > self.max_bytes:
            _, entry = self._known.popitem(last=False)
            self.bytes -= _size(entry)


class PcmCache:
    """A Prompt Predictor for one picture that draws its PCM once: pass it to ``run_method`` as the predictor."""

    def __init__(self, predictor: PromptPredictor, encoded: Encoded):
        self.predictor, self.encoded = predictor, encoded
        self._pcm: Tensor | None = None

    def pcm(self, image: Tensor, embedding: Tensor, valid: Tensor) -> Tensor:
        """As :meth:`PromptPredictor.pcm`. Raises ValueError for another picture than the cache was made for."""
        if image is not self.encoded.model_image or embedding is not self.encoded.embedding:
            raise ValueError(
                "this cache belongs to another picture: make a PcmCache for each encoded picture"
            )
        if self._pcm is None:
            self._pcm = self.predictor.pcm(image, embedding, valid)
        return self._pcm


def prompt_key(prompts: Prompts, row: int, spec: SamSpec) -> Hashable:
    box = None if prompts.boxes is None else tuple(prompts.boxes[row].tolist())
    return tuple(prompts.points[row].tolist()), box, prompts.multimask, spec


def _by_prompt(found: Found, index: Tensor) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Of each prompt ``index`` its masks' fields and its best predicted IoU, as copies."""
    entries = []
    for row, best in zip(index, found.best_iou):
        own = found.prompt == row
        entries.append(({name: getattr(found, name)[own] for name in _OF_MASKS}, best.clone()))
    return entries


def _joined(entries: list[tuple[dict[str, Tensor], Tensor]], index: Tensor) -> Found:
    masks = {name: torch.cat([fields[name] for fields, _ in entries]) for name in _OF_MASKS}
    counts = torch.tensor([len(fields["iou"]) for fields, _ in entries], device=index.device)
    best = torch.stack([best for _, best in entries])
    return Found(**masks, prompt=index.repeat_interleave(counts), best_iou=best)


def _size(entry: tuple[dict[str, Tensor], Tensor]) -> int:
    return sum(x.element_size() * x.nelement() for x in entry[0].values())
