"""A pool of training pictures on disk: decoded or rendered once, read many times, one small file each (ours).

    python -m aopsam_lab.training.pool --out runs/pools --scenes 800 --photos PHOTOS/train/bsds PHOTOS/train/coco

An entry ``<id>.npz`` holds ``image`` (H x W x 3 uint8, longest side ``POOL_SIDE``) and ``masks`` (N x H x W bool, packed
along the last axis; ``width`` undoes the packing). Writing is resumable: an entry is renamed
into place when whole, and one that is there is not made again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from tqdm.auto import tqdm

from aopsam_lab.data import open_dataset
from aopsam_lab.data.sample import Sample
from aopsam_lab.data.scenes import EVALUATION_SEEDS, render

POOL_SIDE = 384
FIRST_TRAINING_SEED = EVALUATION_SEEDS.stop
MIN_PIXELS = 24  # a mask of fewer than this teaches nothing


def resize_masks(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """N x H x W bool -> N x h x w bool, a pixel being on where about half of it is covered. size is (w, h)."""
    out = np.zeros((len(masks), size[1], size[0]), bool)
    interpolation = cv2.INTER_AREA if size[0] < masks.shape[2] else cv2.INTER_LINEAR
    for i, mask in enumerate(masks):
        out[i] = cv2.resize(mask.view(np.uint8) * 255, size, interpolation=interpolation) > 127
    return out


def write_entry(folder: Path, name: str, sample: Sample) -> None:
    """Write one sample beside its place and rename it there."""
    h, w = sample.image.shape[:2]
    scale = POOL_SIDE / max(h, w)
    wide, high = max(2, round(w * scale)), max(2, round(h * scale))
    image = cv2.resize(sample.image, (wide, high), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    masks = resize_masks(sample.masks, (wide, high))
    masks = masks[masks.sum((1, 2)) >= MIN_PIXELS]
    partial = folder / f".{name}.tmp"
    with open(partial, "wb") as file:
        np.savez(file, image=image, masks=np.packbits(masks, axis=-1), width=masks.shape[-1])
    os.replace(partial, folder / f"{name}.npz")


def read_entry(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """-> image (H x W x 3 uint8), masks (N x H x W bool). Raises ValueError for an entry of another layout."""
    with np.load(path) as entry:
        image, masks = entry["image"], np.unpackbits(entry["masks"], axis=-1, count=int(entry["width"])).view(bool)
    if masks.shape[1:] != image.shape[:2]:
        raise ValueError(f"{path} was made by an earlier version: remove {path.parent} and make the pool again.")
    return image, masks


def half_size(masks: np.ndarray) -> np.ndarray:
    """N x H x W bool, H and W even -> N x H/2 x W/2 bool: on where two or more of the four pixels are."""
    pixels = masks.view(np.uint8)
    rows = pixels[:, ::2] + pixels[:, 1::2]
    return rows[..., ::2] + rows[..., 1::2] >= 2


def entries(folder: Path) -> list[Path]:
    """The whole entries that a pool holds by now, in order."""
    return sorted(folder.glob("*.npz"))


def are_scenes(paths: list[Path]) -> bool:
    """Whether a pool's entries are rendered scenes, not photographs."""
    return paths[0].parent.name == "scenes"


def parse_pools(specs: list[str]) -> list[tuple[float, list[Path]]]:
    """``FOLDER:SHARE`` of each pool -> (share, its entries)."""
    pools = []
    for spec in specs:
        folder, _, share = spec.rpartition(":")
        try:
            weight = float(share)
        except ValueError:
            raise ValueError(f"{spec!r} is not of the form FOLDER:SHARE, as in runs/pools/scenes:0.4") from None
        paths = entries(Path(folder))
        if not paths:
            raise FileNotFoundError(f"no pool entries in {folder!r}: make them with `python -m aopsam_lab.training.pool`")
        pools.append((weight, paths))
    return pools


def fill_pool(folder: str | Path, ids: Iterable[str], get: Callable[[str], Sample], label: str = "pool") -> None:
    """Make every entry of ``ids`` that is missing, from ``get(id)``; what has no usable mask leaves an empty entry."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in ids if not (folder / f"{name}.npz").exists()]
    for name in tqdm(missing, desc=label):
        write_entry(folder, name, get(name))


def fill_scenes(
    folder: str | Path, count: int, device: str = "cpu", batch: int = 16, processes: int = 1, first: int = FIRST_TRAINING_SEED
) -> None:
    """``count`` training scenes from seed ``first`` on, rendered at the pool's side, on a CPU by as many processes as wanted.

    Raises ValueError for a seed that is for evaluation.
    """
    if first < FIRST_TRAINING_SEED:
        raise ValueError(f"training scenes begin at seed {FIRST_TRAINING_SEED}; {first} is for evaluation")
    seeds = range(first, first + count)
    work = partial(_fill_some, Path(folder), device)
    batches = [seeds[at : at + batch] for at in range(0, count, batch)]
    if processes == 1:
        for some in tqdm(batches, desc="scenes", unit="batch"):
            work(some)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as workers:
        for _ in tqdm(workers.map(work, batches), desc="scenes", unit="batch", total=len(batches)):
            pass


def _fill_some(folder: Path, device: str, seeds: range) -> None:
    todo = [seed for seed in seeds if not (folder / f"scene-{seed}.npz").exists()]
    if not todo:
        return
    scenes = render(todo, POOL_SIDE, device)
    images = scenes.images.permute(0, 2, 3, 1).cpu().numpy()
    folder.mkdir(parents=True, exist_ok=True)
    for b, seed in enumerate(todo):
        write_entry(folder, f"scene-{seed}", Sample("", images[b], scenes.masks(b).cpu().numpy()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the pools: OUT/scenes and one for each folder of photographs")
    parser.add_argument("--scenes", type=int, default=0, help="how many scenes to render")
    parser.add_argument("--first-scene", type=int, default=FIRST_TRAINING_SEED, help="seed of the first one")
    parser.add_argument("--photos", nargs="*", default=[], help="COCO-style folders (images/ and annotations.json)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="that render scenes; one a core at most")
    args = parser.parse_args(argv)
    for folder in args.photos:
        data = open_dataset(folder, n_images=None)
        position = {name: i for i, name in enumerate(data.ids)}
        fill_pool(Path(args.out) / Path(folder).name, data.ids, lambda name: data[position[name]], Path(folder).name)
    fill_scenes(Path(args.out) / "scenes", args.scenes, args.device, processes=args.processes, first=args.first_scene)


if __name__ == "__main__":
    main()
