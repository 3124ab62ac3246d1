"""Data sets: the photographs in the box, COCO-style folders, COCO, LVIS, SA-1B, rendered scenes."""

from __future__ import annotations

import hashlib
import os
from importlib import resources
from pathlib import Path
from typing import Protocol

from aopsam_lab.data.sample import Sample
from aopsam_lab.fingerprint import code_fingerprint

PHOTOS = Path(__file__).parent / "photos"  # the photographs in the box: a COCO-style folder
EVALUATION_SCENES = 10_000  # scenes with a lower number are for evaluation, the others for training
SCENE_SIDE = 512
DEFAULT_SCENES = 24
# modules that no scene depends on
NOT_RENDERING = {"__init__.py", "annotations.py", "coco.py", "found.py", "sa1b.py", "sample.py"}


class Dataset(Protocol):
    """What the studies need of a data set. Samples are made when asked for."""

    name: str
    ids: list[str]
    fingerprint: str  # changes when the content of any sample would

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Sample: ...

    def sample_fingerprint(self, i: int) -> str: ...

    def describe(self) -> dict[str, str | int]: ...


class SceneSet:
    """Rendered evaluation scenes, 512 x 512.

    Seed 0 takes the scenes 0, 1, 2, ...; seed s those from 1,000 s on, counting on from 0 after 9,999: a larger set
    holds the smaller of the same seed, and seeds 0 to 9 share no scene below a thousand images.
    Raises ValueError for more than 10,000 images.
    """

    name = "scenes"

    def __init__(self, n_images: int | None = None, seed: int = 0, size: int = SCENE_SIDE) -> None:
        n_images = DEFAULT_SCENES if n_images is None else n_images
        if n_images > EVALUATION_SCENES:
            raise ValueError(f"There are {EVALUATION_SCENES} evaluation scenes; n_images {n_images} asks for more.")
        self.size = size
        self.seeds = [(1000 * seed + i) % EVALUATION_SCENES for i in range(n_images)]
        self.ids = [f"scene-{number:04d}" for number in self.seeds]
        self._renderer = _renderer_hash()
        digest = hashlib.sha256("\n".join(map(self.sample_fingerprint, range(n_images))).encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, i: int) -> Sample:
        """Render scene i."""
        from aopsam_lab.data.scenes import scene

        rendered = scene(self.seeds[i], self.size)
        return Sample(self.ids[i], rendered.image, rendered.masks, rendered.points)

    def sample_fingerprint(self, i: int) -> str:
        """A hash of the scene's number and size and of the code that renders it."""
        return hashlib.sha256(f"{self._renderer} {self.seeds[i]} {self.size}".encode()).hexdigest()

    def describe(self) -> dict[str, str | int]:
        """Name, fingerprint, and which scenes."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "images": len(self),
            "first_scene": self.seeds[0],
            "last_scene": self.seeds[-1],
            "side": self.size,
        }


def open_dataset(dataset: str | os.PathLike, n_images: int | None = None, seed: int = 0) -> Dataset:
    """Open a data set by its name, or a COCO-style folder by its path.

    Args:
        dataset: "photos", the 28 photographs in the box, with the masks that people drew for COCO;
            "coco:PATH", "lvis:PATH" or "sa1b:PATH", where PATH is the folder with the files as
            they are published, or an annotation file or shard in it (see Coco, Lvis, Sa1b);
            "scenes", rendered scenes; or the path of a COCO-style folder. The plain string
            "photos" is always the set in the box: give a folder of that name as "./photos", or as
            a `Path`.
        n_images: how many images; None: all of them, or 24 scenes.
        seed: which images, and their order. The same seed gives the same images, and a larger
            n_images adds to them.

    Returns:
        The data set, see Dataset and Sample.

    Raises:
        ValueError: for n_images < 1 or seed < 0; and what the data sets raise.
    """
    if n_images is not None and n_images < 1:
        raise ValueError(f"n_images must be 1 or more, or None; got {n_images}.")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more; got {seed}.")
    if str(dataset) == "scenes":
        return SceneSet(n_images, seed)
    if dataset == "photos":  # a Path of that name is not equal to it
        dataset = PHOTOS
    from aopsam_lab.data.coco import Coco, CocoFolder, Lvis
    from aopsam_lab.data.sa1b import Sa1b

    published = {"coco": Coco, "lvis": Lvis, "sa1b": Sa1b}
    kind, colon, path = str(dataset).partition(":")
    if kind in published and colon:
        return published[kind](path, n_images, seed)
    if kind in published and not Path(kind).exists():
        raise ValueError(f"{kind} needs the folder it lies in: {kind}:PATH (with make: DATASET={kind} DATA=PATH).")
    return CocoFolder(dataset, n_images, seed)


def _renderer_hash() -> str:
    """A hash of all code that draws scenes: no version number that someone must remember to raise."""
    names = {entry.name for entry in resources.files("aopsam_lab.data").iterdir() if entry.name.endswith(".py")}
    return code_fingerprint(f"data/{name}" for name in names - NOT_RENDERING)
