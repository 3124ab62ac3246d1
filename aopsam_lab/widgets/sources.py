"""Whatever a person wants to look at -> a list of named pictures, read when they are chosen."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from aopsam_lab.data import open_dataset
from aopsam_lab.data.images import find_images, read_image
from aopsam_lab.data.sample import Sample

# SAM sees no more than 1,024 pixels a side, and its masks have 256: beyond this a picture only makes the page slow (ours).
MAX_PIXELS = 4_000_000
MIN_SIDE = 8


@dataclass(frozen=True)
class Picture:
    """image: H x W x 3 uint8. truth: N x H x W bool, or None where there is none. note: what was done to it, or ""."""

    image: np.ndarray
    truth: np.ndarray | None = None
    note: str = ""


@dataclass(frozen=True)
class Source:
    """name: for people. code: Python that names it, for the call that reproduces a state. read: the picture itself."""

    name: str
    code: str
    read: Callable[[], Picture]


def sources_of(what, code: str = "image") -> list[Source]:
    """One or more pictures -> their sources.

    what: an array, a Pillow image, a path (an image file, a folder of them, a COCO-style folder),
          "photos" (those in the box, with ground truth; a folder of that name is "./photos"),
          a Sample, a data set, a dictionary from names to any of these, or a list of any of these.
    Nothing is read yet; `Source.read` raises what :func:`read_image` does. Raises ValueError for a folder without images
    and for an empty list, FileNotFoundError for a path where there is nothing.
    """
    if isinstance(what, Sample):
        return [Source(what.id, code, lambda: prepared(what.image, what.masks))]
    if isinstance(what, (np.ndarray, Image.Image)):
        return [Source("picture", code, lambda: prepared(read_image(what)))]
    if isinstance(what, (str, os.PathLike)):
        return _of_path(what)
    if isinstance(what, Mapping):
        return _renamed(
            [(str(name), sources_of(item, f"{code}[{name!r}]")) for name, item in what.items()]
        )
    if hasattr(what, "sample_fingerprint"):
        return _of_dataset(what, code)
    if isinstance(what, (list, tuple)):
        return _renamed([("", sources_of(item, f"{code}[{i}]")) for i, item in enumerate(what)])
    raise ValueError(
        f"Nothing to explore in a {type(what).__name__}: give an array, a Pillow image, a path, or a list of them."
    )


def prepared(image: np.ndarray, truth: np.ndarray | None = None) -> Picture:
    """A picture ready to explore: one of more than MAX_PIXELS is reduced, with a note. Raises ValueError for a tiny one."""
    height, width = image.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise ValueError(
            f"A picture of {width} x {height} pixels is too small to explore: each side needs {MIN_SIDE} or more."
        )
    if height * width <= MAX_PIXELS:
        return Picture(image, truth)
    scale = (MAX_PIXELS / (height * width)) ** 0.5
    size = (max(MIN_SIDE, int(width * scale)), max(MIN_SIDE, int(height * scale)))
    note = f"{width} x {height} pixels, explored at {size[0]} x {size[1]}; aop.segment gives masks of the full size."
    reduced = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if truth is not None:
        shrunk = [
            cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool)
            for mask in truth
        ]
        truth = np.array(shrunk, bool).reshape(-1, size[1], size[0])
    return Picture(reduced, truth, note)


def _of_path(path: str | os.PathLike) -> list[Source]:
    folder = Path(path)
    if path == "photos" or (folder / "annotations.json").exists():
        name = "./photos" if path == Path("photos") else str(path)
        return _of_dataset(open_dataset(path), f"aop.open_dataset({name!r})")
    found, bad = find_images([str(path)])
    if bad:
        raise ValueError(f"{bad[0][0]}: {bad[0][1]}.")
    return [
        Source(file.name, repr(str(file)), lambda file=file: prepared(read_image(file)))
        for file in found
    ]


def _of_dataset(dataset, code: str) -> list[Source]:
    def read(i: int) -> Picture:
        sample = dataset[i]
        return prepared(sample.image, sample.masks)

    return [
        Source(str(name), f"{code}[{i}]", lambda i=i: read(i)) for i, name in enumerate(dataset.ids)
    ]


def _renamed(groups: list[tuple[str, list[Source]]]) -> list[Source]:
    """All sources of the groups: those of a named group under its name, and no name twice."""
    sources, taken = [], set()
    for name, group in groups:
        for source in group:
            base = (
                source.name if not name else name if len(group) == 1 else f"{name}: {source.name}"
            )
            unique, n = base, 1
            while unique in taken:
                n += 1
                unique = f"{base} {n}"
            taken.add(unique)
            sources.append(Source(unique, source.code, source.read))
    if not sources:
        raise ValueError("There is no picture in this list.")
    return sources


def uploaded_picture(data: bytes, name: str) -> Picture:
    """A file's bytes as a Picture. Raises ValueError, which names the file, where they are no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return prepared(read_image(image))
    except UnidentifiedImageError:
        raise ValueError(
            f"{name} cannot be read as an image: its format is none that Pillow knows."
        ) from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error
