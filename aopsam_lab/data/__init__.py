"""Data sets: the photographs in the box, COCO-style folders, COCO, LVIS, SA-1B."""

import os
from pathlib import Path

from aopsam_lab.data.coco import Coco, CocoFolder, Lvis
from aopsam_lab.data.image_set import ImageSet
from aopsam_lab.data.sa1b import Sa1b

PHOTOS = Path(__file__).parent / "photos"  # the photographs in the box: a COCO-style folder
Dataset = ImageSet  # what the studies need of a data set
PUBLISHED: dict[str, type[ImageSet]] = {"coco": Coco, "lvis": Lvis, "sa1b": Sa1b}


def open_dataset(dataset: str | os.PathLike, n_images: int | None = None, seed: int = 0) -> Dataset:
    """Open a data set by its name, or a COCO-style folder by its path.

    Args:
        dataset: "photos", the 28 photographs in the box; "coco:PATH", "lvis:PATH" or "sa1b:PATH"
            (see Coco, Lvis, Sa1b); or the path of a COCO-style folder, also "./photos".
        n_images: how many images; None: all of them. More images are added to fewer.
        seed: which images, and their order.
    """
    if n_images is not None and n_images < 1:
        raise ValueError(f"n_images must be 1 or more, or None; got {n_images}.")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more; got {seed}.")
    if dataset == "photos":  # a Path of that name is not equal to it
        dataset = PHOTOS
    kind, colon, path = str(dataset).partition(":")
    if kind in PUBLISHED and colon:
        return PUBLISHED[kind](path, n_images, seed)
    if kind in PUBLISHED and not Path(kind).exists():
        advice = f"{kind}:PATH (with make: DATASET={kind} DATA=PATH)"
        raise ValueError(f"{kind} needs the folder it lies in: {advice}.")
    return CocoFolder(dataset, n_images, seed)
