"""What a Prompt Predictor learns from: random crops of training pools, or whole pictures of a data set (ours)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

from aopsam_lab.data import Dataset
from aopsam_lab.data.sample import Sample
from aopsam_lab.sam.tiny import IMG_SIZE
from aopsam_lab.training.card import licence, pool_counts
from aopsam_lab.training.pool import half_size, read_entry, resize_masks
from aopsam_lab.training.prompted import random_crop, teaching

ZOOMED = 0.25  # of the crops show a part of their picture: a predictor sees whole pictures later, and in those most things are small
HELD_OUT = 20  # every 20th picture of a pool is for choosing, not for training
Draw = Callable[[np.ndarray, "np.ndarray | None"], np.ndarray]  # masks, prompt points -> target, all on the PCM's grid


class PoolExamples:
    """`count` random crops of pools (see `training.pool`), each the same whenever it is asked for.

    held_out: whole pictures that no crop is of, of each pool by its share, but one at least. Raises ValueError for a SAM of
    another size than the crops'.
    """

    def __init__(self, pools: list[tuple[float, list[Path]]], sam: Sam, count: int, held_out: int, seed: int) -> None:
        self.count, self._seed, self._side = count, seed, sam.image_encoder.img_size
        if self._side != IMG_SIZE:
            raise ValueError(f"Pools are for SAMs of {IMG_SIZE} pixels, this one has {self._side}: train it on --data.")
        total = sum(share for share, _ in pools)
        least = min(1, held_out)
        self._held = [
            path for share, paths in pools for path in paths[::HELD_OUT][: max(least, round(held_out * share / total))]
        ]
        self._pools = [(share, [path for i, path in enumerate(paths) if i % HELD_OUT]) for share, paths in pools]
        shares = np.array([share for share, _ in pools])
        self._shares = shares / shares.sum()
        self.key = {"seed": seed, "zoomed": ZOOMED, "pools": [[share, len(paths)] for share, paths in self._pools]}

    def entry(self, row: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        """Crop `row` (h', w', 3) uint8 in the model frame, and its target."""
        rng = np.random.default_rng([self._seed, row])
        paths = self._pools[rng.choice(len(self._pools), p=self._shares)][1]
        masks = np.zeros((0, 1, 1), bool)
        while not len(masks):
            image, masks = random_crop(rng, *read_entry(paths[rng.integers(len(paths))]), ZOOMED)
            masks = teaching(masks)
        return image, draw(half_size(masks), None)

    def held_out(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Whole pictures (h', w', 3) uint8 in the model frame, with masks (N, h'/2, w'/2) bool."""
        return [whole_picture(*read_entry(path), self._side) for path in self._held]

    def facts(self) -> dict[str, str]:
        """What a model card says of the data."""
        data = f"{self.count} crops; pictures: {pool_counts(self._pools)}; scenes with training seeds only"
        return {"Data": data, "Licence": licence(self._pools)}


class DatasetExamples:
    """Whole pictures of a data set as SAM sees them, with the data set's own prompt points where it has them.

    The last `held_out` pictures (a tenth, where that is fewer) are not trained on. Pictures without masks stay: they
    say where no prompt should be. Raises ValueError for a data set of fewer than two pictures.
    """

    def __init__(self, dataset: Dataset, sam: Sam, held_out: int) -> None:
        if len(dataset) < 2:
            raise ValueError(f"{dataset.name} has {len(dataset)} pictures; training needs two at least.")
        self._dataset = dataset
        self._side, self._grid = sam.image_encoder.img_size, sam.prompt_encoder.mask_input_size
        self._resize = ResizeLongestSide(self._side)
        held = min(held_out, max(1, len(dataset) // 10))
        self.count = len(dataset) - held
        self._held = range(self.count, len(dataset))
        self.key = {"dataset": dataset.name, "ids": dataset.ids[: self.count]}

    def entry(self, row: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        """Picture `row` (h', w', 3) uint8 in the model frame, and its target."""
        sample = self._dataset[row]
        image = self._resize.apply_image(sample.image)
        if sample.points is None:
            return image, draw(self._masks(sample, image.shape[:2]), None)
        scale = np.float32(self._grid[::-1]) / self._side * (np.float32(image.shape[1::-1]) / sample.image.shape[1::-1])
        return image, draw(np.zeros((0, 1, 1), bool), sample.points * scale)

    def held_out(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Pictures (h', w', 3) uint8 in the model frame, with masks (N, ., .) bool on the PCM's grid, top left."""
        found = []
        for i in self._held:
            sample = self._dataset[i]
            image = self._resize.apply_image(sample.image)
            masks = self._masks(sample, image.shape[:2])
            found.append((image, masks[masks.any((1, 2))]))
        return found

    def facts(self) -> dict[str, str]:
        """What a model card says of the data."""
        return {
            "Data": f"{self.count} pictures of {self._dataset.name}, {len(self._held)} more held out",
            "Licence": f"the terms of {self._dataset.name} hold for weights trained on it",
        }

    def _masks(self, sample: Sample, size: tuple[int, int]) -> np.ndarray:
        """Masks on the PCM's grid, one decoded at a time: a cell is on where more than half of it is covered."""
        high, wide = (max(1, round(side * cells / self._side)) for side, cells in zip(size, self._grid))
        masks = np.zeros((len(sample.rles), high, wide), bool)
        for i, rle in enumerate(sample.rles):
            masks[i] = cv2.resize(coco_mask.decode(rle) * 255, (wide, high), interpolation=cv2.INTER_AREA) > 127
        return masks


def whole_picture(image: np.ndarray, masks: np.ndarray, side: int = IMG_SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Longest side to ``side`` (picture) and ``side / 2`` (masks), nothing cropped or changed."""
    scale = side / max(image.shape[:2])
    half = tuple(max(1, round(x * scale / 2)) for x in image.shape[1::-1])
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    image = cv2.resize(image, (2 * half[0], 2 * half[1]), interpolation=interpolation)
    small = resize_masks(masks, half)
    return image, small[small.any((1, 2))]
