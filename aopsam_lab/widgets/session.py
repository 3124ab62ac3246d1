"""One image: encoded once, each prompt decoded once, any setting asked of it. Knows no widget."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score

from aopsam_lab import asf
from aopsam_lab.asf import AsfParams
from aopsam_lab.evaluator import evaluate
from aopsam_lab.masks.rle import encode_rle
from aopsam_lab.pipeline.decode import STABILITY_OFFSET, Encoded, Found, encode
from aopsam_lab.pipeline.decode_cache import DecodeCache, PcmCache
from aopsam_lab.pipeline.methods import Models, Prompts, method_named
from aopsam_lab.pipeline.run import loaded_model, run_method
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.widgets.sources import Opened

CHUNK = 16  # prompts decoded between two looks at whether the answer is still wanted

Clicks = Sequence[tuple[float, float, int]]  # x, y, and 1 for the object or 0 for the background


class Cancelled(Exception):
    """The answer is not wanted any more."""


@dataclass(frozen=True)
class Answer:
    """What a setting gives.

    Attributes:
        segmentation: the same as that of a fresh run.
        seconds: what this answer took, less than a fresh run where decodes were kept.
        n_new: prompts decoded for it.
    """

    segmentation: Segmentation
    seconds: float
    n_new: int


@dataclass(frozen=True)
class Mask:
    """One mask: COCO RLE, predicted IoU, stability score, and its box x0 y0 x1 y1 (inclusive)."""

    rle: dict
    score: float
    stability: float
    box: np.ndarray


class Session:
    """An opened image on a SAM. The models that a method needs are loaded at its first use."""

    def __init__(self, opened: Opened, sam: Sam):
        self.opened, self.sam = opened, sam
        self._lock = threading.Lock()  # a worker decodes while the main thread answers a click

    @cached_property
    def encoded(self) -> Encoded:
        return encode(self.sam, self.opened.image)

    @cached_property
    def _cache(self) -> DecodeCache:
        return DecodeCache(self.sam, self.encoded)

    @cached_property
    def _pcm(self) -> PcmCache:
        return PcmCache(loaded_model("predictor", self.sam), self.encoded)

    def _models(self, method: str) -> Models:
        needs = method_named(method).needs
        if needs == "predictor":
            return Models(predictor=self._pcm)
        return Models(detector=loaded_model(needs, self.sam) if needs else None)

    @torch.inference_mode()
    def sample(self, method: str, params: AsfParams) -> Prompts:
        """What the method proposes before anything is decoded."""
        with self._lock:
            return method_named(method).start(self.encoded, self._models(method), params).prompts

    def smoothed(self, pcm: np.ndarray, params: AsfParams) -> np.ndarray:
        """The PCM (H, W) as adaptive sampling sees it."""
        sigma = params.smoothing * pcm.shape[-1] / asf.REFERENCE_WIDTH
        return asf.smooth(torch.from_numpy(pcm), sigma).numpy()

    def run(
        self,
        method: str,
        params: AsfParams,
        cancelled: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Answer:
        """The method's answer, from what is known already and what must still be decoded.

        Args:
            method: a name in METHODS.
            params: the parameters of adaptive sampling and filtering.
            cancelled: asked before every CHUNK prompts.
            progress: told how many prompts were decoded, and of how many.

        Raises:
            Cancelled: where `cancelled` says so.
            ValueError: as `run_method`.
        """
        start = time.perf_counter()
        before, done = self._cache.n_decoded, 0

        def decode(sam, encoded, prompts, index, spec) -> Found:
            nonlocal done
            for part in index.split(CHUNK):
                if cancelled():
                    raise Cancelled
                with self._lock:
                    self._cache(sam, encoded, prompts, part, spec)
                done += len(part)
                progress(done, len(prompts))
            with self._lock:
                return self._cache(sam, encoded, prompts, index, spec)  # joins the parts

        models = self._models(method)
        seg = run_method(
            self.sam, self.encoded, method, models.predictor, models.detector, params, decode=decode
        )
        return Answer(seg, time.perf_counter() - start, self._cache.n_decoded - before)

    def miou(self, seg: Segmentation) -> float | None:
        """One-to-one mIoU with the ground truth, None where there is none."""
        known = self.opened.ground_truth
        return evaluate(known, seg.masks).miou if known else None

    def candidates(self, seg: Segmentation, row: int) -> list[Mask]:
        """All masks of the prompt `row`, before any threshold: three of a point, one of a box."""
        prompt = seg.prompts.iloc[row]
        box = prompt[["x0", "y0", "x1", "y1"]].to_numpy(float)
        if not np.isnan(box).any():
            return self._predict(False, box=box)
        point = prompt[["x", "y"]].to_numpy(float)[None]
        return self._predict(True, point_coords=point, point_labels=np.ones(1))

    def ask(self, clicks: Clicks) -> Mask | None:
        """SAM's mask for clicks: the best of three for one, its single one for more; or None."""
        points = np.array(clicks, float)
        masks = self._predict(
            len(clicks) == 1, point_coords=points[:, :2], point_labels=points[:, 2]
        )
        return max(masks, key=lambda mask: mask.score, default=None)

    @torch.inference_mode()
    def _predict(self, multimask: bool, **prompt) -> list[Mask]:
        """The masks of one prompt as `SamPredictor.predict` takes it, without empty ones."""
        stock = SamPredictor(self.sam)
        stock.features, stock.is_image_set = self.encoded.embedding, True
        stock.original_size = self.opened.image.shape[:2]
        stock.input_size = self.encoded.input_size
        with self._lock:
            found = stock.predict(multimask_output=multimask, return_logits=True, **prompt)
        threshold = self.sam.mask_threshold
        logits = torch.from_numpy(found[0])
        logits = logits[(logits > threshold).flatten(1).any(1)]
        scores = found[1][(found[0] > threshold).any((1, 2))]
        masks = logits > threshold
        stability = calculate_stability_score(logits, threshold, STABILITY_OFFSET)
        boxes = batched_mask_to_box(masks).float().numpy()
        return list(map(Mask, encode_rle(masks), scores.tolist(), stability.tolist(), boxes))


def with_clicked(seg: Segmentation, clicked: Sequence[tuple[Clicks, Mask]]) -> Segmentation:
    """The Segmentation with masks of clicks among its own, by score.

    Each mask adds a prompt at its first click: status kept, round -1, no confidence.
    """
    if not clicked:
        return seg
    masks = [mask for _, mask in clicked]
    n, m = len(seg.prompts), len(masks)
    rows = [
        {"x": clicks[0][0], "y": clicks[0][1], "round": -1, "status": "kept", "by": -1}
        for clicks, _ in clicked
    ]
    more = pd.DataFrame(rows).reindex(columns=seg.prompts.columns)
    columns = {
        "scores": [mask.score for mask in masks],
        "stability": [mask.stability for mask in masks],
        "boxes": [mask.box for mask in masks],
        "mask_prompt": range(n, n + m),
    }
    for name, values in columns.items():
        own = getattr(seg, name)
        columns[name] = np.concatenate([own, np.array(values, own.dtype)])
    order = np.argsort(-columns["scores"], kind="stable")
    rles = [*seg.masks, *(mask.rle for mask in masks)]
    return replace(
        seg,
        masks=[rles[i] for i in order],
        prompts=pd.concat([seg.prompts, more.astype({"round": int, "by": int})], ignore_index=True),
        n_decoded=seg.n_decoded + m,
        n_sampled=seg.n_sampled + m,
        **{name: values[order] for name, values in columns.items()},
    )


def same_prompt(old: Segmentation | None, row: int, new: Segmentation) -> int:
    """The row of `new` whose prompt lies where that of `old` in `row` lay; -1 where none does."""
    if old is None or not 0 <= row < len(old.prompts):
        return -1
    same = (new.prompts[["x", "y"]] == old.prompts[["x", "y"]].iloc[row]).all(axis=1)
    return int(same.argmax()) if same.any() else -1
