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
from aopsam_lab.pipeline.decode import (
    STABILITY_OFFSET,
    encode,
    encoded_masks,
    full_size,
    image_decoder,
)
from aopsam_lab.pipeline.decode_cache import DecodeCache, PcmCache
from aopsam_lab.pipeline.methods import METHODS
from aopsam_lab.pipeline.run import loaded_detector, loaded_predictor, run_method
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.types import Encoded, Found, Models, Prompts
from aopsam_lab.sam.zoo import SamSpec
from aopsam_lab.widgets.sources import Opened

CHUNK = 16  # prompts decoded before each check whether the answer is still wanted

# x, y and SAM's label: 1 for the object, 0 for the background, 2 and 3 for a box's upper left and
# lower right. At the end (i, 0, CHOSEN) may choose the candidate i.
Clicks = Sequence[tuple[float, float, int]]
Progress = Callable[[int, int, list[dict]], None]
CHOSEN = 4
ROW = ["x", "y", "x0", "y0", "x1", "y1"]  # a point and, if there is one, a box


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

    def encode(self) -> None:
        """Encode the image now."""
        with self._lock:
            _ = self._cache

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

    def run(self, method: str, params: AsfParams, progress: Progress | None = None) -> Answer:
        """The method's answer, from what is known already and what must still be decoded.

        Before every CHUNK prompts `progress` is told how many of how many were decoded, and which
        masks were found by then, duplicates among them. What it raises ends the run.
        """
        start = time.perf_counter()
        before, done = self._cache.n_decoded, 0
        masks: list[dict] = []

        def decode(
            sam: Sam, encoded: Encoded, prompts: Prompts, index: torch.Tensor, spec: SamSpec
        ) -> Found:
            nonlocal done
            for part in index.split(CHUNK):
                if progress:
                    progress(done, len(prompts), masks)
                with self._lock:
                    self._cache(sam, encoded, prompts, part, spec)
                done += len(part)
            with self._lock:
                found = self._cache(sam, encoded, prompts, index, spec)  # joins the parts
            if progress:
                found.masks = encoded_masks(sam, encoded, found)
                masks.extend(found.masks)
            return found

        models = self._models(method)
        seg = run_method(self.sam, self._cache.encoded, method, *models, params, decode=decode)
        seconds = time.perf_counter() - start
        return Answer((method, params), seg, seconds, self._cache.n_decoded - before)

    def described(
        self, seg: Segmentation, row: int, clicks: Clicks | None
    ) -> tuple[list[str], list[Mask], int]:
        """The masks to choose from at a prompt, before any threshold, and what was chosen.

        `clicks` are those that made the prompt, if any did.

        Returns:
            A line about each mask; the masks; the index of that of the clicks, or -1.
        """
        if clicks:
            masks, own = self.options(clicks), self.ask(clicks)
            names = ["part: ", "whole: ", "group: "][: len(masks)]
            if own and own.rle not in [mask.rle for mask in masks]:
                masks, names = [*masks, own], [*names, "as clicked: "]
            only = [mask.rle for mask in masks].index(own.rle) if own else -1
        else:
            x, y, *box = seg.prompts.iloc[row][ROW].to_numpy(float)
            is_point = np.isnan(box[0])
            masks = self._answer([(x, y, 1)] if is_point else [(*box[:2], 2), (*box[2:], 3)])
            best = max(masks, key=lambda mask: mask.score, default=None)
            names, only = ["best: " if mask is best else "" for mask in masks], -1
        about = "{}predicted IoU {:.2f}, stability {:.2f}"
        pairs = zip(names, masks, strict=True)
        return [about.format(name, one.score, one.stability) for name, one in pairs], masks, only

    def ask(self, clicks: Clicks) -> Mask | None:
        """SAM's mask for clicks: the chosen one, the best for one point, its only one for more."""
        which, _, label = clicks[-1]
        if label == CHOSEN:
            return dict(enumerate(self.options(clicks))).get(int(which))
        return max(self._answer(clicks), key=lambda mask: mask.score, default=None)

    def options(self, clicks: Clicks) -> list[Mask]:
        """SAM's three masks for clicks, the smallest first: often a part, the whole, a group."""
        masks = self._answer([one for one in clicks if one[2] != CHOSEN], True)
        return sorted(masks, key=lambda mask: coco_mask.area(mask.rle))

    def _answer(self, clicks: Clicks, multimask: bool | None = None) -> list[Mask]:
        key = json.dumps([clicks, multimask])
        if key not in self._asked:
            self._asked[key] = self.predict(clicks, multimask)
        return self._asked[key]

    @torch.inference_mode()
    def predict(
        self, clicks: Clicks, multimask: bool | None = None, best_only: bool = False
    ) -> list[Mask]:
        """The masks of clicks as `SamPredictor.predict` gives them, without empty ones.

        There are three for one point, and one for more, unless `multimask` says. `best_only` draws
        no other.
        """
        encoded, sam, threshold = self._cache.encoded, self.sam, self.sam.mask_threshold
        multimask = len(clicks) == 1 if multimask is None else multimask
        with self._lock:
            values = torch.tensor(clicks, device=encoded.embedding.device).float()
            xy, labels = encoded.to_model(values[:, :2]), values[:, 2].int()
            is_point = labels < 2
            points = (xy[is_point][None], labels[is_point][None]) if is_point.any() else None
            boxes = None if is_point.all() else xy[~is_point].view(1, 4)
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


def _row(clicks: Clicks) -> list[float]:
    """The ROW of clicks; its point is the first one of the object, or the middle of all."""
    corners = [(x, y) for x, y, label in clicks if label in (2, 3)]
    middle = np.mean([(x, y) for x, y, label in clicks if label != CHOSEN], 0)
    point = next(((x, y) for x, y, label in clicks if label == 1), middle)
    return [*point, *np.ravel(corners or [(np.nan, np.nan)] * 2)]


def with_clicked(seg: Segmentation, clicked: Sequence[tuple[Clicks, Mask]]) -> Segmentation:
    """The Segmentation with masks of clicks among its own, each with a prompt of round -1."""
    if not clicked:
        return seg
    n, m = len(seg.prompts), len(clicked)
    rows = pd.DataFrame([_row(clicks) for clicks, _ in clicked], columns=ROW)
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


def some_masks(seg: Segmentation, wanted: Sequence[bool]) -> Segmentation:
    """A Segmentation with those of its n masks alone that `wanted` (n,) marks."""
    rows = np.flatnonzero(wanted)
    names = ("scores", "stability", "boxes", "mask_prompt")
    fields = {name: getattr(seg, name)[rows] for name in names}
    return replace(seg, masks=[seg.masks[i] for i in rows], **fields)
