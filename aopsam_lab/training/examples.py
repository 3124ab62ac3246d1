"""What a Prompt Predictor learns from: photographs, their embeddings, and where prompts should
lie."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
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
from aopsam_lab.masks.points import deepest_point
from aopsam_lab.data.sample import Sample
from aopsam_lab.files import write_atomically

SECOND = 0.5  # of the value of clicks that are not needed to give every mask
SURE = 0.5  # a cell of the PCM's grid is on a mask that covers this share of it

# (sample, PCM cells a pixel of the image) -> prompts (x, y, height), n x 3 float32: PCM cells, and
# a height in [0, 1]
Place = Callable[[Sample, float], np.ndarray]


class Example(NamedTuple):
    """image (3, 4h, 4w) float16, the normalised mean of the pixels in each PCM cell; embedding
    (C, h, w) float16; target (4h, 4w) float32; valid (4h, 4w) bool."""

    image: Tensor
    embedding: Tensor
    target: Tensor
    valid: Tensor


def own_prompts(sample: Sample, scale: float) -> np.ndarray:
    """One prompt a mask: the data set's own prompt point, else the one deepest inside the mask.

    This is the paper's ground truth: SA-1B's masks with the points that found them.
    """
    points = sample.points
    if points is None:
        points = [deepest_point(coco_mask.decode(rle))[:2] for rle in sample.rles]
    return _with_heights(points, [1.0] * len(points), scale)


def _with_heights(points: Sequence, heights: Sequence[float], scale: float) -> np.ndarray:
    return np.column_stack([np.float32(points).reshape(-1, 2) * scale, np.float32(heights)])


def covering_prompts(sample: Sample, scale: float) -> np.ndarray:
    """The fewest prompts, about, that give every mask; and lower, all other clicks that give one.

    A mask that few clicks give comes first. Of its clicks the one is taken that gives the most
    masks not yet given, and of equals the one deepest inside the mask. A mask without clicks (a
    person drew it) gets its deepest point, unless a prompt lies on it already. Another
    click is as high as the masks are rare that it gives: SECOND times the sum of 1 / n, n the
    clicks that give a mask, at most SECOND.
    """
    prompts: list[tuple[float, float]] = []
    given: dict[tuple[float, float], set[int]] = {}
    for i, clicks in enumerate(sample.clicks or [()] * len(sample.rles)):
        for click in map(tuple, clicks):
            given.setdefault(click, set()).add(i)
    left = set().union(*given.values()) if given else set()
    for i in sorted(left, key=lambda i: len(sample.clicks[i])):
        if i not in left:
            continue
        depth = _depths(coco_mask.decode(sample.rles[i]))
        best = max(
            map(tuple, sample.clicks[i]), key=lambda p: (len(given[p] & left), _at(depth, p))
        )
        prompts.append(best)
        left -= given[best]
    for i, rle in enumerate(sample.rles):
        if sample.clicks and len(sample.clicks[i]):
            continue
        mask = coco_mask.decode(rle)
        if not any(_at(mask, p) for p in prompts):
            prompts.append(deepest_point(mask)[:2])
    others = {
        click: SECOND * min(1.0, sum(1 / len(sample.clicks[i]) for i in masks))
        for click, masks in given.items()
    }
    heights = {**others, **dict.fromkeys(prompts, 1.0)}
    return _with_heights(list(heights), list(heights.values()), scale)


def _depths(mask: np.ndarray) -> np.ndarray:
    return cv2.distanceTransform(np.pad(mask, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]


def _at(values: np.ndarray, point: tuple[float, float]) -> float:
    x, y = (min(int(v), side - 1) for v, side in zip(point, values.shape[::-1]))
    return values[y, x]


PLACES: dict[str, Place] = {"own": own_prompts, "covering": covering_prompts}


def target_map(prompts: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The prompts' heights in the cells that they lie in, the maximum where they meet, 0 elsewhere.

    Args:
        prompts: n x 3 (x, y, height), x and y in PCM cells with cell centres at +0.5.
        grid: (H, W) of the PCM.

    Returns:
        H x W float32 in [0, 1].
    """
    target = np.zeros(grid, np.float32)
    columns, rows = (np.clip(prompts[:, i].astype(int), 0, grid[1 - i] - 1) for i in (0, 1))
    np.maximum.at(target, (rows, columns), prompts[:, 2])
    return target


class Examples:
    """Photographs of a data set with their embeddings, read from the disk when asked for.

    Args:
        data: the data set.
        rows: which of its images.
        embeddings: the folder that `cache_embeddings` fills.
        sam: the SAM of these embeddings.
        place: where prompts should lie, see `PLACES`.
    """

    def __init__(
        self, data: Dataset, rows: Sequence[int], embeddings: Path, sam: Sam, place: Place
    ) -> None:
        self.data, self.rows, self.embeddings, self.place = data, list(rows), embeddings, place
        self.sam, self.grid = sam, tuple(sam.prompt_encoder.mask_input_size)
        self._resize = ResizeLongestSide(sam.image_encoder.img_size)
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor, Path]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        if i not in self._kept:
            self._kept[i] = self._make(self.data[self.rows[i]])
        image, target, valid, file = self._kept[i]
        return Example(image, torch.from_numpy(np.load(file)), target, valid)

    def _make(self, sample: Sample) -> tuple[Tensor, Tensor, Tensor, Path]:
        scaled = self._resize.apply_image(sample.image)
        pixels = torch.as_tensor(scaled, device=self.sam.device).permute(2, 0, 1)[None]
        image = self.sam.preprocess(pixels.contiguous())
        side = image.shape[-1]
        image = F.avg_pool2d(image, side // self.grid[1])[0].half().cpu()
        target = target_map(self.place(sample, self.scale(sample)), self.grid)
        valid = valid_cells(scaled.shape[:2], side, self.grid)
        file = embedding_file(self.embeddings, sample.id)
        return image, torch.from_numpy(target), valid, file

    def batch(self, indices: Sequence[int]) -> Example:
        """Some of the examples, stacked, as float32 on the SAM's device."""
        stacked = map(torch.stack, zip(*(self[i] for i in indices)))
        return Example(*(part.to(self.sam.device).float() for part in stacked))

    def scale(self, sample: Sample) -> float:
        """PCM cells along a pixel of the image."""
        return self.grid[1] / max(sample.image.shape[:2])

    def masks(self, i: int) -> np.ndarray:
        """The ground truth of photograph i on the PCM's grid, from its top left: N x H' x W'
        bool."""
        sample = self.data[self.rows[i]]
        size = [max(1, round(side * self.scale(sample))) for side in sample.image.shape[1::-1]]
        masks = np.zeros((len(sample.rles), size[1], size[0]), bool)
        for k, rle in enumerate(sample.rles):
            masks[k] = (
                cv2.resize(coco_mask.decode(rle) * 255, size, interpolation=cv2.INTER_AREA)
                > 255 * SURE
            )
        return masks


def embedding_file(folder: Path, image_id: str) -> Path:
    """Where the embedding of an image lies."""
    return folder / f"{Path(image_id).stem}.npy"


@torch.inference_mode()
def cache_embeddings(sam: Sam, data: Dataset, folder: Path) -> None:
    """Keep the embedding of every image that has none in the folder yet: C x h x w float16, one
    file an image."""
    for i, name in enumerate(tqdm(data.ids, desc="embeddings", unit="image")):
        path = embedding_file(folder, name)
        if path.exists():
            continue
        scaled = ResizeLongestSide(sam.image_encoder.img_size).apply_image(data[i].image)
        pixels = torch.as_tensor(scaled, device=sam.device).permute(2, 0, 1)[None].contiguous()
        embedding = sam.image_encoder(sam.preprocess(pixels))[0].half().cpu().numpy()
        file = io.BytesIO()
        np.save(file, embedding)
        write_atomically(path, file.getvalue())
