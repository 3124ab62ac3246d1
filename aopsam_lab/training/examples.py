"""What a Prompt Predictor learns from: photographs, their embeddings, where prompts should lie."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from tqdm import tqdm

from aopsam_lab.asf import valid_cells
from aopsam_lab.data import Dataset
from aopsam_lab.data.sample import Sample
from aopsam_lab.files import write_atomically
from aopsam_lab.masks.points import deepest_point
from aopsam_lab.pipeline.decode import encode

HELD_OUT = 8  # one photograph in so many is held out
SECOND = 0.5  # greatest height of a click that is not needed to give every mask
POINTS = 64  # of a prompt, at most
ON_MASK = 0.5  # a cell of the PCM's grid is on a mask that covers this share of it


class Prompt(NamedTuple):
    """A prompt to learn: a training draws one of its points anew each time."""

    points: np.ndarray  # (n, 2) float32, x and y in the image frame
    height: float  # of the target there, in [0, 1]


Place = Callable[[Sample], list[Prompt]]  # where prompts should lie


class Example(NamedTuple):
    """One photograph to learn from, or a batch of them."""

    image: Tensor  # (3, 4h, 4w) float16, the normalised mean of the pixels in each PCM cell
    embedding: Tensor  # (C, h, w) float16
    target: Tensor  # (4h, 4w) float32, see `target_map`
    valid: Tensor  # (4h, 4w) bool, cells on the image


def split(data: Dataset) -> tuple[list[int], list[int]]:
    """The rows of a data set to train on, and those that are held out; neither is empty.

    A hash of the image's name decides, so more photographs change nothing for those before.
    """
    parts: tuple[list[int], list[int]] = [], []
    for i, name in enumerate(data.ids):
        digest = int(hashlib.sha256(name.encode()).hexdigest(), 16)
        parts[digest % HELD_OUT == 0].append(i)
    if not all(parts):
        few = "too few to train on some and hold some out."
        raise ValueError(f"{data.name} has {len(data)} photographs: {few}")
    return parts


def own_prompts(sample: Sample) -> list[Prompt]:
    """One prompt a mask, as in the paper: the data set's prompt point, else the deepest point."""
    points = sample.points
    if points is None:
        points = [deepest_point(coco_mask.decode(rle))[:2] for rle in sample.rles]
    return [Prompt(np.float32([point]), 1.0) for point in points]


def covering_prompts(sample: Sample) -> list[Prompt]:
    """About the fewest prompts that give every mask and, lower, all other clicks that give one.

    A mask that few clicks give comes first. Of its clicks the one is taken that gives the most
    masks not yet given, and of equals the one deepest inside the mask. A mask without clicks (a
    person drew it) gets its deepest point, unless a prompt lies on it already. Another click's
    height is SECOND times the sum of 1 / n over its masks, at most SECOND; n is the number of
    clicks that give a mask. A click is a point of a regular grid; its prompt may lie anywhere about
    it, see `_about`, or else the network would learn the grid.
    """
    clicks = [[(x, y) for x, y in own] for own in sample.clicks or [[]] * len(sample.rles)]
    given: dict[tuple[float, float], set[int]] = {click: set() for own in clicks for click in own}
    for i, own in enumerate(clicks):
        for click in own:
            given[click].add(i)
    reach = _half_steps(np.array(list(given)).reshape(-1, 2))
    about: dict[tuple[float, float], np.ndarray] = {}
    needed: set[tuple[float, float]] = set()
    left = {i for i, own in enumerate(clicks) if own}
    for i in sorted(left, key=lambda i: len(clicks[i])):
        mask = np.pad(coco_mask.decode(sample.rles[i]), 1)
        depth = cv2.distanceTransform(mask, cv2.DIST_L2, 5)[1:-1, 1:-1]
        for click in clicks[i]:
            if click not in about:
                about[click] = _about(click, depth, reach)
        if i in left:
            best = max(clicks[i], key=lambda p: (len(given[p] & left), _at(depth, p)))
            needed.add(best)
            left -= given[best]
    prompts = []
    for click, masks in given.items():
        share = SECOND * min(1.0, sum(1 / len(clicks[i]) for i in masks))
        prompts.append(Prompt(about[click], 1.0 if click in needed else share))
    lying = list(needed)
    for own, rle in zip(clicks, sample.rles, strict=True):
        mask = coco_mask.decode(rle)
        if not own and not any(_at(mask, point) for point in lying):
            lying.append(deepest_point(mask)[:2])
            prompts.append(Prompt(np.float32([lying[-1]]), 1.0))
    return prompts


def _half_steps(clicks: np.ndarray) -> tuple[int, int]:
    """Half the step of the grid that clicks (n, 2) lie on, in whole pixels along x and y."""
    steps = (np.diff(np.unique(along)) for along in clicks.T)
    reach_x, reach_y = (int(step.min() / 2) if len(step) else 0 for step in steps)
    return reach_x, reach_y


def _about(click: tuple[float, float], depth: np.ndarray, reach: tuple[int, int]) -> np.ndarray:
    """Centres of pixels near a click (x, y) that lie half as deep in its mask as the deepest.

    The pixels are those of the click's grid cell, (n, 2) float32, at most POINTS taken evenly;
    where there are none, the click itself. Depth is (H, W), 0 outside of the mask.
    """
    left, top = (max(0, int(at) - half) for at, half in zip(click, reach, strict=True))
    window = depth[top : int(click[1]) + reach[1] + 1, left : int(click[0]) + reach[0] + 1]
    rows, columns = np.nonzero(window >= max(1, window.max(initial=0) / 2))
    points = np.stack((columns + left, rows + top), axis=1).astype(np.float32) + 0.5
    return points[:: -(-len(points) // POINTS)] if len(points) else np.float32([click])


def _at(values: np.ndarray, point: tuple[float, float]) -> float:
    x, y = (min(int(v), side - 1) for v, side in zip(point, values.shape[::-1], strict=True))
    return values[y, x]


PLACES: dict[str, Place] = {"own": own_prompts, "covering": covering_prompts}


def target_map(
    prompts: list[Prompt], scale: float, grid: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """The prompts' heights in the cells of the PCM (H, W), the maximum where they meet, else 0.

    The scale is PCM cells along a pixel of the image; rng draws one of each prompt's points.
    """
    target = np.zeros(grid, np.float32)
    if prompts:
        drawn = np.stack([points[rng.integers(len(points))] for points, _ in prompts])
        cells = np.clip((drawn[:, ::-1] * scale).astype(int), 0, np.subtract(grid, 1))
        np.maximum.at(target, tuple(cells.T), [height for _, height in prompts])
    return target


class Examples:
    """Rows of a data set; their embeddings are read from the folder of `cache_embeddings`."""

    def __init__(
        self, data: Dataset, rows: list[int], embeddings: Path, sam: Sam, place: Place
    ) -> None:
        self.data, self.rows, self.embeddings, self.place = data, rows, embeddings, place
        self.sam, self.grid = sam, tuple(sam.prompt_encoder.mask_input_size)
        self._resize = ResizeLongestSide(sam.image_encoder.img_size)
        self._kept: dict[int, tuple[Tensor, Tensor, Path, list[Prompt], float]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, i: int, rng: np.random.Generator) -> Example:
        """Example i, each of its prompts drawn anew."""
        if i not in self._kept:
            self._kept[i] = self._make(self.data[self.rows[i]])
        image, valid, file, prompts, scale = self._kept[i]
        target = torch.from_numpy(target_map(prompts, scale, self.grid, rng))
        return Example(image, torch.from_numpy(np.load(file)), target, valid)

    def _make(self, sample: Sample) -> tuple[Tensor, Tensor, Path, list[Prompt], float]:
        scaled = self._resize.apply_image(sample.image)
        pixels = torch.as_tensor(scaled, device=self.sam.device).permute(2, 0, 1)[None]
        image = self.sam.preprocess(pixels.contiguous())
        side = image.shape[-1]
        image = F.avg_pool2d(image, side // self.grid[1])[0].half().cpu()
        valid = valid_cells(scaled.shape[:2], side, self.grid)
        file = embedding_file(self.embeddings, sample.id)
        return image, valid, file, self.place(sample), self.grid[1] / max(sample.image.shape[:2])

    def batch(self, indices: list[int], seed: int = 0) -> Example:
        """Some of the examples, stacked, as float32 on the SAM's device; the seed draws prompts."""
        rng = np.random.default_rng(seed)
        stacked = map(torch.stack, zip(*(self.example(i, rng) for i in indices), strict=True))
        return Example(*(part.to(self.sam.device).float() for part in stacked))

    def masks(self, i: int) -> np.ndarray:
        """The ground truth of example i on the PCM's grid, from its top left: N x H' x W' bool."""
        sample = self.data[self.rows[i]]
        scale = self.grid[1] / max(sample.image.shape[:2])
        size = [max(1, round(side * scale)) for side in sample.image.shape[1::-1]]
        masks = np.zeros((len(sample.rles), *size[::-1]), bool)
        for mask, rle in zip(masks, sample.rles, strict=True):
            share = cv2.resize(255 * coco_mask.decode(rle), size, interpolation=cv2.INTER_AREA)
            mask[:] = share > 255 * ON_MASK
        return masks


def embedding_file(folder: Path, image_id: str) -> Path:
    """Where the embedding of an image lies."""
    return folder / f"{Path(image_id).stem}.npy"


def write_embedding(path: Path, embedding: Tensor) -> None:
    """Keep an embedding, (1, C, h, w), as C x h x w float16."""
    file = io.BytesIO()
    np.save(file, embedding[0].half().cpu().numpy())
    write_atomically(path, file.getvalue())


def cache_embeddings(sam: Sam, data: Dataset, folder: Path) -> None:
    """Keep the embedding of every image that has none in the folder yet, one file an image."""
    for i, name in enumerate(tqdm(data.ids, desc="embeddings", unit="image")):
        path = embedding_file(folder, name)
        if not path.exists():
            write_embedding(path, encode(sam, data[i].image).embedding)
