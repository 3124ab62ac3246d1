"""Rendered still lifes with exact visible masks: any number of them, without files.

A scene is a function of its seed: all its parameters come from NumPy's PCG64, so it looks the same alone or in a batch,
small or large, on a CPU or a GPU (up to rounding). Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aopsam_lab.batching import one_thread

from . import _draw, _render
from ._layout import SceneParams
from .points import pole
from .sample import Sample

EVALUATION_SEEDS = range(0, 10_000)  # training takes seeds from 10,000 on
MIN_SIDE, MAX_SIDE = 32, 1024
_SCENE_PIXELS = {"cpu": 1 << 21, "cuda": 1 << 24}  # rendered at a time: bounds the memory


@dataclass(frozen=True)
class SceneBatch:
    """B scenes of side S, tensors on one device.

    images:  B x 3 x S x S uint8, RGB.
    objects: B x S x S int16, the number (from 1) of the object a pixel shows, 0 where it shows none.
    parts:   B x S x S int16, the number (from 1) of the part of that object, 0 where it shows none.
    regions: B x S x S int16, the number (from 1) of the background region, 0 where an object covers it.
    """

    images: Tensor
    objects: Tensor
    parts: Tensor
    regions: Tensor

    @property
    def min_area(self) -> int:
        """The least visible pixels of a mask: 48 at side 512, in proportion to the picture's area, at least 12."""
        return max(12, round(48 * (self.images.shape[-1] / 512) ** 2))

    def masks(self, b: int) -> Tensor:
        """The visible masks of scene b, N x S x S bool: objects (with their parts), parts, background regions.

        Left out are masks below min_area, and parts that are all (over 90%) that is seen of their object.
        """
        objects, parts, regions = self.objects[b], self.parts[b], self.regions[b]
        areas = torch.bincount(objects.flatten().long())
        found = [objects == k for k in _large(areas, self.min_area)]
        part_areas = torch.bincount(parts.flatten().long())
        for k in _large(part_areas, self.min_area):
            mask = parts == k
            if part_areas[k] <= 0.9 * areas[objects[mask][0].long()]:
                found.append(mask)
        found += [regions == k for k in _large(torch.bincount(regions.flatten().long()), self.min_area)]
        return torch.stack(found) if found else objects.new_zeros((0, *objects.shape), dtype=torch.bool)


def _large(areas: Tensor, least: int) -> list[int]:
    return [k for k, area in enumerate(areas.tolist()) if k > 0 and area >= least]


@torch.no_grad()
def render(seeds: Sequence[int], size: int, device: str | torch.device = "cpu") -> SceneBatch:
    """Renders one scene per seed as size x size pixels.

    seeds: non-negative integers. size: from 32 to 1024. device: where it is rendered and stays.
    On a CPU one core does the work; run several processes to use more.
    Raises: ValueError for a size or a seed out of range, or no seeds.
    """
    if not MIN_SIDE <= size <= MAX_SIDE:
        raise ValueError(f"scenes are rendered at sides from {MIN_SIDE} to {MAX_SIDE}, not {size}")
    if len(seeds) == 0 or min(seeds) < 0:
        raise ValueError("render() needs at least one seed, and no negative ones")
    device = torch.device(device)
    step = max(1, _SCENE_PIXELS.get(device.type, 1 << 21) // size**2)
    with one_thread(device):
        pieces = [
            _render_some([_draw.draw(int(seed)) for seed in seeds[i : i + step]], size, device)
            for i in range(0, len(seeds), step)
        ]
    return SceneBatch(*(torch.cat(column) for column in zip(*pieces)))


def _render_some(
    scenes: list[SceneParams], size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    canvas = _render.compose(scenes, size, device)
    shape = (len(scenes), size, size)
    objects, parts, regions = (plane.view(shape) for plane in (canvas.objects, canvas.parts, canvas.regions))
    regions = torch.where(objects == 0, regions, torch.zeros_like(regions))
    return _render.develop(scenes, canvas, size, device), objects, parts, regions


def scene(seed: int, size: int = 512) -> Sample:
    """One scene as a Sample with the pole of every mask as its prompt point; its id is scene-<seed, five digits>."""
    batch = render([seed], size)
    masks = batch.masks(0).numpy()
    points = np.array([pole(mask)[:2] for mask in masks], np.float32).reshape(-1, 2)
    return Sample(f"scene-{seed:05d}", batch.images[0].permute(1, 2, 0).contiguous().numpy(), masks, points)
