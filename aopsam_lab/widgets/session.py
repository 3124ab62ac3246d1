"""One image: encoded once, each prompt decoded once, any setting asked of it. Knows no widget."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from pycocotools import mask as coco_mask
from segment_anything.modeling import Sam

from aopsam_lab.asf import AsfParams
from aopsam_lab.pipeline.decode import STABILITY_OFFSET, encode, full_size, image_decoder
from aopsam_lab.pipeline.decode_cache import DecodeCache, PcmCache
from aopsam_lab.pipeline.methods import METHODS, method_named
from aopsam_lab.pipeline.run import loaded_detector, loaded_predictor, run_method
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.types import Encoded, Found, MaskParams, Models, Prompts
from aopsam_lab.sam.zoo import SamSpec
from aopsam_lab.widgets.sources import Opened

CHUNK = 16  # prompts decoded before each check whether the answer is still wanted

Clicks = Sequence[tuple[float, float, int]]  # x, y, and 1 for the object or 0 for the background


class Answer(NamedTuple):
    """What a setting gives: the same as a fresh run, in less time where decodes were kept."""

    setting: tuple[str, AsfParams]  # the method's name, and the four parameters
    segmentation: Segmentation
    seconds: float
    n_new: int  # prompts decoded for it


class Mask(NamedTuple):
    """A mask as COCO RLE, its predicted IoU, its stability score and its box."""

    rle: dict
    score: np.float32
    stability: np.float32
    box: np.ndarray  # x0 y0 x1 y1, inclusive pixel indices


class Session:
    """An opened image on a SAM. The models that a method needs are loaded at its first use."""

    def __init__(self, opened: Opened, sam: Sam, quality: MaskParams = MaskParams()):
        self.opened, self.sam, self.quality = opened, sam, quality
        self._lock = threading.Lock()  # a worker decodes while the main thread answers a click
        self.colours: dict[bytes, int] = {}  # of every mask shown so far, see mask_colours
        self._asked: dict[str, Mask | None] = {}  # by the clicks, as JSON

    @cached_property
    def _cache(self) -> DecodeCache:
        """The decodes, and with them the image with its embedding."""
        encoded = encode(self.sam, self.opened.image)
        return DecodeCache(self.sam, encoded, quality=self.quality)

    @cached_property
    def _pcm(self) -> PcmCache:
        return PcmCache(loaded_predictor(self.sam), self._cache.encoded)

    def _models(self, method: str) -> Models:
        needs = METHODS[method].needs
        if needs == "predictor":
            return Models(predictor=self._pcm)
        return Models(detector=loaded_detector(self.sam) if needs else None)

    @torch.inference_mode()
    def sample(self, method: str, params: AsfParams) -> list[dict]:
        """Where the method would prompt, before anything is decoded: x and y of each point."""
        with self._lock:
            chosen = method_named(method, self.quality)
            proposal = chosen.start(self._cache.encoded, self._models(method), params)
        return [{"x": x, "y": y} for x, y in proposal.prompts.points.tolist()]

    def run(
        self, method: str, params: AsfParams, progress: Callable[..., None] = lambda *_: None
    ) -> Answer:
        """The method's answer, from what is known already and what must still be decoded.

        Before every CHUNK prompts `progress` is told how many of how many were decoded. What it
        raises ends the run.
        """
        start = time.perf_counter()
        before, done = self._cache.n_decoded, 0

        def decode(
            sam: Sam, encoded: Encoded, prompts: Prompts, index: torch.Tensor, spec: SamSpec
        ) -> Found:
            nonlocal done
            for part in index.split(CHUNK):
                progress(done, len(prompts))
                with self._lock:
                    self._cache(sam, encoded, prompts, part, spec)
                done += len(part)
            with self._lock:
                return self._cache(sam, encoded, prompts, index, spec)  # joins the parts

        models = self._models(method)
        more: dict[str, Any] = {"params": params, "decode": decode, "quality": self.quality}
        seg = run_method(self.sam, self._cache.encoded, method, *models, **more)
        seconds = time.perf_counter() - start
        return Answer((method, params), seg, seconds, self._cache.n_decoded - before)

    def candidates(self, seg: Segmentation, row: int) -> list[Mask]:
        """All masks of the prompt `row`, before any threshold: three of a point, one of a box."""
        prompt = seg.prompts.iloc[row]
        box = prompt.reindex(["x0", "y0", "x1", "y1"]).to_numpy(float)
        if not np.isnan(box).any():
            return self._predict(False, box=box)
        point = prompt[["x", "y"]].to_numpy(float)[None]
        return self._predict(True, point_coords=point, point_labels=np.ones(1))

    def ask(self, clicks: Clicks) -> Mask | None:
        """SAM's mask for clicks: the best of three for one, its single one for more; or None."""
        key = json.dumps(clicks)
        if key not in self._asked:
            points, labels = np.hsplit(np.array(clicks, float), [2])
            masks = self._predict(len(clicks) == 1, point_coords=points, point_labels=labels[:, 0])
            self._asked[key] = max(masks, key=lambda mask: mask.score, default=None)
        return self._asked[key]

    @torch.inference_mode()
    def _predict(
        self,
        multimask: bool,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
    ) -> list[Mask]:
        """The masks of one prompt as `SamPredictor.predict` gives them, without empty ones."""
        encoded, sam, threshold = self._cache.encoded, self.sam, self.sam.mask_threshold
        points = boxes = None
        with self._lock:
            device = encoded.embedding.device
            if point_coords is not None:
                xy = encoded.to_model(torch.tensor(point_coords, device=device).float())
                points = xy[None], torch.tensor(point_labels, device=device).int()[None]
            if box is not None:
                corners = torch.tensor(box, device=device).float().view(1, 2, 2)
                boxes = encoded.to_model(corners).flatten(1)
            tokens = sam.prompt_encoder(points=points, boxes=boxes, masks=None)[0]
            decoded = image_decoder(sam, encoded).decode(tokens)
            wanted = torch.zeros_like(decoded.iou, dtype=torch.bool)
            wanted[:, slice(1, None) if multimask else slice(0, 1)] = True
            low_res, sizes = decoded.draw(wanted), full_size(encoded)
            rles = sizes.encode(low_res, threshold)
            stability, found = sizes.measure(low_res, threshold, STABILITY_OFFSET)
        scores, rest = decoded.iou[wanted].cpu().numpy(), (stability.cpu(), found.cpu().float())
        masks = list(map(Mask, rles, scores, *(values.numpy() for values in rest)))
        return [mask for mask in masks if coco_mask.area(mask.rle)]


def with_clicked(seg: Segmentation, clicked: Sequence[tuple[Clicks, Mask]]) -> Segmentation:
    """The Segmentation with masks of clicks among its own, each with a prompt of round -1."""
    if not clicked:
        return seg
    n, m = len(seg.prompts), len(clicked)
    rows = pd.DataFrame([clicks[0][:2] for clicks, _ in clicked], columns=["x", "y"])
    rows = rows.assign(round=-1, status="kept", by=-1)
    rles, scores, stability, boxes = zip(*(mask for _, mask in clicked), strict=True)
    masks, scores = [*seg.masks, *rles], np.append(seg.scores, scores)
    order = np.argsort(-scores, kind="stable")
    return replace(
        seg,
        masks=[masks[i] for i in order],
        scores=scores[order],
        stability=np.append(seg.stability, stability)[order],
        boxes=np.vstack([seg.boxes, boxes])[order],
        mask_prompt=np.append(seg.mask_prompt, range(n, n + m))[order],
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
