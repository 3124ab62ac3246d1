"""A pool of training pictures on disk: decoded once, read many times, one small file each (ours).

An entry ``<id>.npz`` holds ``image`` (H x W x 3 uint8, longest side ``POOL_SIDE``) and ``masks`` (N x h x w bool, packed
along the last axis, at half the picture's size; ``width`` undoes the packing). Writing is resumable: an entry is renamed
into place when whole, and one that is there is not made again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np

from aopsam_lab.data.sample import Sample

POOL_SIDE = 384
MIN_CELLS = 6  # a mask of fewer half-size pixels than this teaches nothing


def _resize_masks(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """N x H x W bool -> N x h x w bool, a cell being on where more than half of it is covered. size is (w, h)."""
    out = np.zeros((len(masks), size[1], size[0]), bool)
    for i, mask in enumerate(masks):
        out[i] = cv2.resize(mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_AREA) > 127
    return out


def write_entry(folder: Path, sample: Sample) -> None:
    """Write one sample; a sample without a usable mask leaves an empty marker so that it is not tried again."""
    h, w = sample.image.shape[:2]
    scale = POOL_SIDE / max(h, w)
    wide, high = max(2, round(w * scale)), max(2, round(h * scale))
    image = cv2.resize(sample.image, (wide, high), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    masks = _resize_masks(sample.masks, (max(1, wide // 2), max(1, high // 2)))
    masks = masks[masks.reshape(len(masks), -1).sum(1) >= MIN_CELLS]
    partial = folder / f".{sample.id}.tmp"
    with open(partial, "wb") as file:
        np.savez(file, image=image, masks=np.packbits(masks, axis=-1), width=masks.shape[-1])
    os.replace(partial, folder / f"{sample.id}.npz")


def read_entry(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """-> image (H x W x 3 uint8), masks (N x H/2 x W/2 bool)."""
    with np.load(path) as entry:
        masks = np.unpackbits(entry["masks"], axis=-1, count=int(entry["width"])).astype(bool)
        return entry["image"], masks


def fill_pool(folder: str | Path, ids: Iterable[str], samples: Iterator[Sample] | None = None, get=None) -> list[Path]:
    """Make every entry of ``ids`` that is missing, by ``get(id) -> Sample``; returns the paths of all that hold masks."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in ids:
        path = folder / f"{name}.npz"
        if not path.exists():
            write_entry(folder, get(name))
        paths.append(path)
    return paths
