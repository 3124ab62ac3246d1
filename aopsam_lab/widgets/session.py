"""One picture on the bench: encoded once, each prompt decoded once, any setting asked of it. Knows nothing of widgets."""

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
from aopsam_lab.pipeline.decode import STABILITY_OFFSET, all_masks, encode, full_resolution
from aopsam_lab.pipeline.decode_cache import DecodeCache, PcmCache
from aopsam_lab.pipeline.methods import method_named
from aopsam_lab.pipeline.run import run_method
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.types import Encoded, Found, Models, Prompts
from aopsam_lab.widgets.sources import Picture

CHUNK = 16  # prompts decoded between two looks at whether the answer is still wanted


class Cancelled(Exception):
    """The answer is not wanted any more."""


@dataclass(frozen=True)
class Answer:
    """seconds: what this answer took, less than a fresh run where decodes were kept. n_new: prompts decoded for it.
    miou: against the picture's truth, None without one."""

    segmentation: Segmentation
    seconds: float
    n_new: int
    miou: float | None


@dataclass(frozen=True)
class Mask:
    """One mask: COCO RLE, predicted IoU, stability, and its box x0 y0 x1 y1 (inclusive)."""

    rle: dict
    score: float
    stability: float
    box: np.ndarray


Clicks = Sequence[tuple[float, float, int]]  # x, y, and 1 for the object or 0 for the background


class Session:
    """sam: the model. models: a function that gives a method's predictor or detector by its kind, loaded when needed."""

    def __init__(self, picture: Picture, sam: Sam, models: Callable[[str], object]):
        self.picture, self.sam, self._models = picture, sam, models
        self.truth = None if picture.truth is None else encode_rle(picture.truth)
        self._lock = (
            threading.Lock()
        )  # decoding goes on in a worker thread while a click is answered in the main one

    @cached_property
    def encoded(self) -> Encoded:
        return encode(self.sam, self.picture.image)

    @cached_property
    def _cache(self) -> DecodeCache:
        return DecodeCache(self.sam, self.encoded)

    @cached_property
    def _pcm(self) -> PcmCache:
        return PcmCache(self._models("predictor"), self.encoded)

    def _models_for(self, method: str) -> Models:
        needs = method_named(method).needs
        return Models(
            predictor=self._pcm if needs == "predictor" else None,
            detector=self._models("detector") if needs == "detector" else None,
        )

    @torch.inference_mode()
    def sample(self, method: str, params: AsfParams) -> Prompts:
        """What the method proposes before anything is decoded."""
        with self._lock:
            return (
                method_named(method).start(self.encoded, self._models_for(method), params).prompts
            )

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
        """The method's Segmentation, from what is known already and what must still be decoded.

        cancelled: asked before every CHUNK prompts. progress: told how many prompts were decoded, and of how many that
        were proposed, where these are more than CHUNK.
        Raises Cancelled, and ValueError as run_method does.
        """
        start = time.perf_counter()
        before, done = self._cache.n_decoded, 0

        def decode(sam, encoded, prompts, index, spec) -> Found:
            nonlocal done
            for i in range(
                0, len(index), CHUNK
            ):  # a long round in pieces; the cache then joins them
                if cancelled():
                    raise Cancelled
                with self._lock:
                    found = self._cache(sam, encoded, prompts, index[i : i + CHUNK], spec)
                if len(prompts) > CHUNK:
                    progress(done + min(i + CHUNK, len(index)), len(prompts))
            done += len(index)
            if len(index) <= CHUNK:
                return found
            with self._lock:
                return self._cache(sam, encoded, prompts, index, spec)

        models = self._models_for(method)
        seg = run_method(
            self.sam, self.encoded, method, models.predictor, models.detector, params, decode=decode
        )
        return Answer(
            seg, time.perf_counter() - start, self._cache.n_decoded - before, self.miou(seg)
        )

    def miou(self, seg: Segmentation) -> float | None:
        """One-to-one mIoU with the truth, None where there is none."""
        return evaluate(self.truth, seg.masks).miou if self.truth else None

    @torch.inference_mode()
    def candidates(self, seg: Segmentation, row: int) -> list[Mask]:
        """All masks that the prompt ``row`` gives, before any threshold: three for a point, one for a box."""
        prompt = seg.prompts.iloc[row]
        box = prompt[["x0", "y0", "x1", "y1"]].to_numpy(float)
        has_box = not np.isnan(box).any()
        device = self.encoded.embedding.device
        as_tensor = lambda values: torch.tensor([values], dtype=torch.float32, device=device)  # noqa: E731
        prompts = Prompts(
            as_tensor([prompt["x"], prompt["y"]]),
            as_tensor(0.0),
            as_tensor(list(box)) if has_box else None,
            not has_box,
        )
        with self._lock:
            found = all_masks(self.sam, self.encoded, prompts, 0)
        masks = encode_rle(
            full_resolution(self.sam, self.encoded, found.low_res) > self.sam.mask_threshold
        )
        fields = zip(
            masks, found.iou.tolist(), found.stability.tolist(), found.boxes.float().cpu().numpy()
        )
        return [Mask(*values) for values in fields]

    @torch.inference_mode()
    def ask(self, clicks: Clicks) -> Mask | None:
        """SAM's mask for points set by hand: the best of three for one click, its single one for more; None if empty."""
        stock = SamPredictor(self.sam)  # takes any number of points with labels
        stock.features, stock.is_image_set = self.encoded.embedding, True
        stock.original_size, stock.input_size = (
            self.picture.image.shape[:2],
            self.encoded.input_size,
        )
        points, labels = np.array([c[:2] for c in clicks], float), np.array([c[2] for c in clicks])
        with self._lock:
            logits, scores, _ = stock.predict(
                points, labels, multimask_output=len(clicks) == 1, return_logits=True
            )
        best = int(scores.argmax())
        chosen = torch.from_numpy(logits[best])[None]
        pixels = chosen > self.sam.mask_threshold
        if not pixels.any():
            return None
        stability = calculate_stability_score(chosen, self.sam.mask_threshold, STABILITY_OFFSET)
        return Mask(
            encode_rle(pixels)[0],
            float(scores[best]),
            float(stability),
            batched_mask_to_box(pixels)[0].float().numpy(),
        )


def with_manual(seg: Segmentation, manual: Sequence[tuple[Clicks, Mask]]) -> Segmentation:
    """The Segmentation with masks asked for by hand among its own, by score.

    Each adds a prompt at its first click: status kept, round -1 (no round of the method's), no confidence.
    """
    if not manual:
        return seg
    rows = pd.DataFrame(
        [
            {"x": clicks[0][0], "y": clicks[0][1], "round": -1, "status": "kept", "by": -1}
            for clicks, _ in manual
        ]
    ).reindex(columns=seg.prompts.columns)
    masks = [mask for _, mask in manual]
    scores = np.concatenate([seg.scores, np.array([m.score for m in masks], np.float32)])
    order = np.argsort(-scores, kind="stable")
    all_masks = list(seg.masks) + [m.rle for m in masks]
    return replace(
        seg,
        masks=[all_masks[i] for i in order],
        scores=scores[order],
        stability=np.concatenate(
            [seg.stability, np.array([m.stability for m in masks], np.float32)]
        )[order],
        boxes=np.concatenate([seg.boxes, np.array([m.box for m in masks], np.float32)])[order],
        mask_prompt=np.concatenate([seg.mask_prompt, len(seg.prompts) + np.arange(len(masks))])[
            order
        ],
        prompts=pd.concat([seg.prompts, rows.astype({"round": int, "by": int})], ignore_index=True),
        n_decoded=seg.n_decoded + len(masks),
        n_sampled=seg.n_sampled + len(masks),
    )


def same_prompt(old: Segmentation | None, row: int, new: Segmentation) -> int:
    """The row of `new` whose prompt stands where that of `old` in `row` stood; -1 where none does."""
    if old is None or not 0 <= row < len(old.prompts):
        return -1
    at = old.prompts[["x", "y"]].iloc[row]
    found = ((new.prompts["x"] == at["x"]) & (new.prompts["y"] == at["y"])).to_numpy().nonzero()[0]
    return int(found[0]) if len(found) else -1
