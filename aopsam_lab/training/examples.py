"""What a Prompt Predictor learns from: photographs, their embeddings, where prompts should lie."""

import io
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

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

SECOND = 0.5  # greatest height of a click that is not needed to give every mask
POINTS = 64  # of a prompt, at most


# A prompt to learn: (n, 2) float32 points x and y in the image frame, one of which a training draws
# anew each time; the target's height there, in [0, 1].
Prompt = tuple[np.ndarray, float]
Place = Callable[[Sample], list[Prompt]]  # where prompts should lie


def own_prompts(sample: Sample) -> list[Prompt]:
    """One prompt a mask, as in the paper: the data set's prompt point, else the deepest point."""
    points = sample.points
    if points is None:
        points = np.array([deepest_point(coco_mask.decode(rle))[:2] for rle in sample.rles])
    return [(np.array([point], np.float32), 1.0) for point in points]


def covering_prompts(sample: Sample) -> list[Prompt]:
    """About the fewest prompts that give every mask and, lower, all other clicks that give one.

    A mask that few clicks give comes first. Of its clicks the one is taken that gives the most
    masks not yet given, of equals the one deepest inside the mask. A mask without clicks gets its
    deepest point, unless a prompt lies on it already. Another click's height is SECOND times the
    sum of 1 / n over its masks, at most SECOND; n is the number of clicks that give a mask.
    """
    clicks = [[(x, y) for x, y in own] for own in sample.clicks or [[]] * len(sample.rles)]
    given: dict[tuple[float, float], set[int]] = defaultdict(set)
    for i, own in enumerate(clicks):
        for click in own:
            given[click].add(i)
    grid = np.array(list(given)).reshape(-1, 2).T
    reach = [int(min(np.diff(np.unique(along)), default=0) / 2) for along in grid]
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
        prompts.append((about[click], 1.0 if click in needed else share))
    lying = list(needed)
    for own, rle in zip(clicks, sample.rles, strict=True):
        mask = coco_mask.decode(rle)
        if not own and not any(_at(mask, point) for point in lying):
            lying.append(deepest_point(mask)[:2])
            prompts.append((np.array([lying[-1]], np.float32), 1.0))
    return prompts


def _about(click: tuple[float, float], depth: np.ndarray, reach: list[int]) -> np.ndarray:
    """Where a click's prompt may lie, (n, 2), or else the network would learn the clicks' grid.

    That is on pixels of its grid cell, whose half sides are the reach, at least half as deep in the
    mask as the deepest of these; depth is (H, W). Where there are none, it is the click itself.
    """
    left, top = (max(0, int(at) - half) for at, half in zip(click, reach, strict=True))
    window = depth[top : int(click[1]) + reach[1] + 1, left : int(click[0]) + reach[0] + 1]
    rows, columns = np.nonzero(window >= max(1, window.max(initial=0) / 2))
    points = np.stack((columns + left, rows + top), axis=1).astype(np.float32) + 0.5
    return points[:: -(-len(points) // POINTS)] if len(points) else np.array([click], np.float32)


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
        self._kept = cache(self._example)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: list[int], seed: int = 0) -> list[Tensor]:
        """Some of the examples, float32 on the SAM's device; the seed draws their prompts anew.

        Returns:
            (B, 3, 4h, 4w) mean pixels of the PCM's cells, normalised; embeddings (B, C, h, w); the
            targets (B, 4h, 4w), see `target_map`; (B, 4h, 4w), 1 in cells on the image.
        """
        rng, examples = np.random.default_rng(seed), []
        for i in indices:
            image, valid, prompts, scale = self._kept(i)
            target = torch.from_numpy(target_map(prompts, scale, self.grid, rng))
            file = embedding_file(self.embeddings, self.data.ids[self.rows[i]])
            examples.append((image, torch.from_numpy(np.load(file)), target, valid))
        stacked = map(torch.stack, zip(*examples, strict=True))
        return [part.to(self.sam.device).float() for part in stacked]

    def _example(self, i: int) -> tuple[Tensor, Tensor, list[Prompt], float]:
        """Image, valid cells, prompts and PCM cells along a pixel of example i."""
        sample = self.data[self.rows[i]]
        scaled = ResizeLongestSide(self.sam.image_encoder.img_size).apply_image(sample.image)
        pixels = torch.as_tensor(scaled, device=self.sam.device).permute(2, 0, 1)[None]
        image = self.sam.preprocess(pixels.contiguous())
        side = image.shape[-1]
        image = F.avg_pool2d(image, side // self.grid[1])[0].half().cpu()
        valid = valid_cells(scaled.shape[:2], side, self.grid)
        return image, valid, self.place(sample), self.grid[1] / max(sample.image.shape[:2])

    def masks(self, i: int) -> np.ndarray:
        """The ground truth of example i on the PCM's grid: (N, 4h, 4w) bool."""
        sample = self.data[self.rows[i]]
        scale = self.grid[1] / max(sample.image.shape[:2])
        width, height = (max(1, round(side * scale)) for side in sample.image.shape[1::-1])
        masks = np.zeros((len(sample.rles), *self.grid), bool)
        for mask, rle in zip(masks, sample.rles, strict=True):
            pixels = 255 * coco_mask.decode(rle)
            share = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
            mask[:height, :width] = share > 127  # of 255: more than half of the cell
        return masks


def embedding_file(folder: Path, image_id: str) -> Path:
    """Where the embedding of an image lies."""
    return folder / f"{Path(image_id).stem}.npy"


def write_embedding(path: Path, embedding: Tensor) -> None:
    """Write an embedding (1, C, h, w) as C x h x w float16."""
    file = io.BytesIO()
    np.save(file, embedding[0].half().cpu().numpy())
    write_atomically(path, file.getvalue())


def cache_embeddings(sam: Sam, data: Dataset, folder: Path) -> None:
    """Write the embedding of every image that has none in the folder yet."""
    for i, name in enumerate(tqdm(data.ids, desc="embeddings", unit="image")):
        path = embedding_file(folder, name)
        if not path.exists():
            write_embedding(path, encode(sam, data[i].image).embedding)
