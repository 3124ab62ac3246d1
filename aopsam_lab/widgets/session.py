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
from pycocotools import mask as coco_mask
from segment_anything.modeling import Sam

from aopsam_lab.asf import AsfParams
from aopsam_lab.pipeline.decode import STABILITY_OFFSET, encode, full_size, image_decoder
from aopsam_lab.pipeline.decode_cache import DecodeCache, PcmCache
from aopsam_lab.pipeline.methods import METHODS
from aopsam_lab.pipeline.run import loaded_detector, loaded_predictor, run_method
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.types import Encoded, Found, Models, Prompts
from aopsam_lab.sam.zoo import SamSpec
from aopsam_lab.widgets.sources import Opened

CHUNK = 16  # prompts decoded before each check whether the answer is still wanted

# x, y and SAM's label: 1 object, 0 background, 2 and 3 corners of a box; a number that follows
# chooses one of `options`
Clicks = Sequence[tuple[float, float, int] | int]


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

    def __init__(self, opened: Opened, sam: Sam):
        self.opened, self.sam = opened, sam
        self._lock = threading.Lock()  # a worker decodes while the main thread answers a click
        self.colours: dict[bytes, int] = {}  # of every mask shown so far, see mask_colours
        self._asked: dict[str, list[Mask]] = {}  # by the clicks, as JSON

    @cached_property
    def _cache(self) -> DecodeCache:
        """The decodes, and with them the image with its embedding."""
        return DecodeCache(self.sam, encode(self.sam, self.opened.image))

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
            proposal = METHODS[method].start(self._cache.encoded, self._models(method), params)
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
        seg = run_method(self.sam, self._cache.encoded, method, *models, params, decode=decode)
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
        """SAM's mask for clicks: the chosen one; else the best of three for one point, SAM's single
        one for more; or None."""
        points = [one for one in clicks if not isinstance(one, (int, float))]
        options, chosen = self.options(points), clicks[len(points) :]
        if chosen:
            return options[int(chosen[0])] if int(chosen[0]) < len(options) else None  # type: ignore
        if len(points) > 1:
            options = self._asked_for(points, False)
        return max(options, key=lambda mask: mask.score, default=None)

    def options(self, clicks: Clicks) -> list[Mask]:
        """Up to three masks for clicks, the smallest first: often a part, the whole, a group."""
        points = [one for one in clicks if not isinstance(one, (int, float))]
        return sorted(self._asked_for(points, True), key=lambda mask: coco_mask.area(mask.rle))

    def _asked_for(self, points: Sequence, multimask: bool) -> list[Mask]:
        key = json.dumps([points, multimask])
        if key not in self._asked:
            xy, labels = np.hsplit(np.array(points, float), [2])
            is_point = labels[:, 0] < 2
            prompt = {}
            if is_point.any():
                prompt = {"point_coords": xy[is_point], "point_labels": labels[is_point, 0]}
            if not is_point.all():
                prompt["box"] = xy[~is_point].ravel()[:4]
            self._asked[key] = self._predict(multimask, **prompt)
        return self._asked[key]

    @torch.inference_mode()
    def _predict(
        self,
        multimask: bool,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        best_only: bool = False,
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
            if best_only:
                wanted &= decoded.iou == decoded.iou[wanted].max()
            low_res, sizes = decoded.draw(wanted), full_size(encoded)
            rles = sizes.encode(low_res, threshold)
            stability, found = sizes.measure(low_res, threshold, STABILITY_OFFSET)
        scores, rest = decoded.iou[wanted].cpu().numpy(), (stability.cpu(), found.cpu().float())
        masks = list(map(Mask, rles, scores, *(values.numpy() for values in rest)))
        return [mask for mask in masks if coco_mask.area(mask.rle)]

    def preview(self, clicks: Clicks) -> list[Mask]:
        """The mask that clicks would give, or none; quick enough for each move of the pointer."""
        points = [one for one in clicks if not isinstance(one, (int, float))]
        xy, labels = np.hsplit(np.array(points, float), [2])
        if (labels > 1).any():
            return [mask for mask in [self.ask(points)] if mask]
        single = len(points) == 1
        return self._predict(single, xy, labels[:, 0], best_only=True)


def with_clicked(seg: Segmentation, clicked: Sequence[tuple[Clicks, Mask]]) -> Segmentation:
    """The Segmentation with masks of clicks among its own, each with a prompt of round -1."""
    if not clicked:
        return seg
    n, m = len(seg.prompts), len(clicked)
    rows = pd.DataFrame([clicks[0][:2] for clicks, _ in clicked], columns=["x", "y"])  # type: ignore
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
