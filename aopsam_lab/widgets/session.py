"""One image: encoded once, each prompt decoded once, any setting asked of it. Knows no widget."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score

from aopsam_lab.asf import AsfParams
from aopsam_lab.masks.rle import encode_rle
from aopsam_lab.pipeline.decode import STABILITY_OFFSET, encode
from aopsam_lab.pipeline.decode_cache import DecodeCache, PcmCache
from aopsam_lab.pipeline.methods import METHODS
from aopsam_lab.pipeline.run import loaded_model, run_method
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.types import Encoded, Found, Models
from aopsam_lab.widgets.sources import Opened

CHUNK = 16  # prompts decoded between two looks at whether the answer is still wanted

Clicks = Sequence[tuple[float, float, int]]  # x, y, and 1 for the object or 0 for the background


class Answer(NamedTuple):
    """What a setting gives: the same as a fresh run, in less time where decodes were kept."""

    setting: tuple[str, AsfParams]  # the method's name, and the four parameters
    segmentation: Segmentation
    seconds: float
    n_new: int  # prompts decoded for it


class Mask(NamedTuple):
    """A mask as COCO RLE, its predicted IoU and stability score, and its box x0 y0 x1 y1."""

    rle: dict
    score: float
    stability: float
    box: np.ndarray  # the last two are the highest pixel indices on the mask


class Session:
    """An opened image on a SAM. The models that a method needs are loaded at its first use."""

    def __init__(self, opened: Opened, sam: Sam):
        self.opened, self.sam = opened, sam
        self._lock = threading.Lock()  # a worker decodes while the main thread answers a click
        self._asked: dict[str, Mask | None] = {}  # by the clicks, as JSON

    @cached_property
    def encoded(self) -> Encoded:
        """The image with its embedding."""
        return encode(self.sam, self.opened.image)

    @cached_property
    def _cache(self) -> DecodeCache:
        return DecodeCache(self.sam, self.encoded)

    @cached_property
    def _pcm(self) -> PcmCache:
        return PcmCache(loaded_model("predictor", self.sam), self.encoded)

    def _models(self, method: str) -> Models:
        needs = METHODS[method].needs
        if needs == "predictor":
            return Models(predictor=self._pcm)
        return Models(detector=loaded_model(needs, self.sam) if needs else None)

    @torch.inference_mode()
    def sample(self, method: str, params: AsfParams) -> pd.DataFrame:
        """Points of the prompts that the method proposes before anything is decoded."""
        with self._lock:
            proposal = METHODS[method].start(self.encoded, self._models(method), params)
        return pd.DataFrame(proposal.prompts.points.cpu().numpy(), columns=["x", "y"])

    def run(
        self,
        method: str,
        params: AsfParams,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Answer:
        """The method's answer, from what is known already and what must still be decoded.

        Args:
            method: a name in METHODS.
            params: the four parameters.
            progress: told before every CHUNK prompts how many were decoded, and of how many. What
                it raises ends the run.
        """
        start = time.perf_counter()
        before, done = self._cache.n_decoded, 0

        def decode(sam, encoded, prompts, index, spec) -> Found:
            nonlocal done
            for part in index.split(CHUNK):
                progress(done, len(prompts))
                with self._lock:
                    self._cache(sam, encoded, prompts, part, spec)
                done += len(part)
            with self._lock:
                return self._cache(sam, encoded, prompts, index, spec)  # joins the parts

        models = self._models(method)
        seg = run_method(
            self.sam, self.encoded, method, models.predictor, models.detector, params, decode=decode
        )
        seconds = time.perf_counter() - start
        return Answer((method, params), seg, seconds, self._cache.n_decoded - before)

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
        key = json.dumps(clicks)
        if key not in self._asked:
            clicks = np.array(clicks, float)
            points, labels = clicks[:, :2], clicks[:, 2]
            masks = self._predict(len(clicks) == 1, point_coords=points, point_labels=labels)
            self._asked[key] = max(masks, key=lambda mask: mask.score, default=None)
        return self._asked[key]

    @torch.inference_mode()
    def _predict(self, multimask: bool, **prompt) -> list[Mask]:
        """The masks of one prompt as `SamPredictor.predict` takes it, without empty ones."""
        stock = SamPredictor(self.sam)
        stock.features, stock.is_image_set = self.encoded.embedding, True
        stock.original_size = self.opened.image.shape[:2]
        stock.input_size = self.encoded.input_size
        with self._lock:
            found = stock.predict(multimask_output=multimask, return_logits=True, **prompt)
        logits, scores = map(torch.from_numpy, found[:2])
        threshold = self.sam.mask_threshold
        some = (logits > threshold).flatten(1).any(1)
        logits, scores = logits[some], scores[some]
        stability = calculate_stability_score(logits, threshold, STABILITY_OFFSET)
        boxes = batched_mask_to_box(logits > threshold).float().numpy()
        rles = encode_rle(logits > threshold)
        return list(map(Mask, rles, scores.tolist(), stability.tolist(), boxes))


def with_clicked(seg: Segmentation, clicked: Sequence[tuple[Clicks, Mask]]) -> Segmentation:
    """The Segmentation with masks of clicks among its own, by score.

    Each mask adds a prompt at its first click: status kept, round -1, no confidence.
    """
    if not clicked:
        return seg
    n, m = len(seg.prompts), len(clicked)
    rows = pd.DataFrame([clicks[0][:2] for clicks, _ in clicked], columns=["x", "y"])
    rows = rows.assign(round=-1, status="kept", by=-1)
    rles, scores, stability, boxes = zip(*(mask for _, mask in clicked), strict=True)
    order = np.argsort(-np.append(seg.scores, scores), kind="stable")

    def joined(own: np.ndarray, more: Sequence) -> np.ndarray:
        return np.concatenate([own, np.array(more, own.dtype)])[order]

    return replace(
        seg,
        masks=joined(np.array(seg.masks, object), rles).tolist(),
        scores=joined(seg.scores, scores),
        stability=joined(seg.stability, stability),
        boxes=joined(seg.boxes, boxes),
        mask_prompt=joined(seg.mask_prompt, range(n, n + m)),
        prompts=pd.concat([seg.prompts, rows], ignore_index=True),
        n_decoded=seg.n_decoded + m,
        n_sampled=seg.n_sampled + m,
    )


def same_prompt(old: Segmentation | None, row: int, new: Segmentation) -> int:
    """The row of `new` whose prompt lies where that of `old` in `row` lay; -1 where none does."""
    if old is None or not 0 <= row < len(old.prompts):
        return -1
    same = (new.prompts[["x", "y"]] == old.prompts[["x", "y"]].iloc[row]).all(axis=1)
    return int(same.argmax()) if same.any() else -1
