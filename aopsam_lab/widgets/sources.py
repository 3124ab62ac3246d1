"""What a person wants to look at -> a list of named images, read when they are chosen."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from aopsam_lab.data import Dataset, open_dataset
from aopsam_lab.data.images import ImageLike, find_images, image_from_bytes, read_image
from aopsam_lab.data.sample import Sample
from aopsam_lab.pipeline.segmentation import Segmentation

MAX_PIXELS = 4_000_000  # SAM sees 1,024 pixels a side: more only makes the page slow
MIN_SIDE = 8


class Opened(NamedTuple):
    """An image that was read."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    ground_truth: Sequence[dict] = ()  # COCO RLE
    note: str = ""  # what was done to the image


class Source(NamedTuple):
    """An image that can be chosen."""

    name: str
    code: str  # Python that names the image, for the call that makes a state again
    read: Callable[[], Opened]


def sources_of(what: object, code: str = "image") -> list[Source]:
    """Sources of what `explore` takes, no two of one name, nothing read yet.

    `code` is Python that names it. Raises ValueError where it holds no image.
    """
    if isinstance(what, (Sample, np.ndarray, Image.Image)):
        return [Source(getattr(what, "id", "image"), code, lambda: prepared(what))]
    if isinstance(what, Segmentation):
        return [Source("image", "seg.image", lambda: Opened(what.image))]
    if isinstance(what, (str, os.PathLike)):
        return _of_path(what)
    if isinstance(what, Mapping):
        return _joined((str(key), sources_of(what[key], f"{code}[{key!r}]")) for key in what)
    if isinstance(what, (list, tuple)):
        return _joined(("", sources_of(item, f"{code}[{i}]")) for i, item in enumerate(what))
    if isinstance(what, Dataset):
        return _of_dataset(what, code)
    advice = "give an array, a Pillow image, a path, or a list of them"
    raise ValueError(f"Nothing to explore in a {type(what).__name__}: {advice}.")


def prepared(what: Sample | ImageLike) -> Opened:
    """An image as `read_image` reads it, reduced to MAX_PIXELS; ValueError where it is tiny."""
    opened = Opened(what.image, what.rles) if isinstance(what, Sample) else Opened(read_image(what))
    height, width = opened.image.shape[:2]
    if min(height, width) < MIN_SIDE:
        problem = f"An image of {width} x {height} pixels is too small to explore"
        raise ValueError(f"{problem}: each side needs {MIN_SIDE} or more.")
    if height * width <= MAX_PIXELS:
        return opened
    scale = (MAX_PIXELS / (height * width)) ** 0.5
    size = int(width * scale), int(height * scale)
    reduced = cv2.resize(opened.image, size, interpolation=cv2.INTER_AREA)
    decoded = map(coco_mask.decode, opened.ground_truth)
    masks = [cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST) for mask in decoded]
    note = f"{width} x {height} pixels, explored at {size[0]} x {size[1]}; "
    note += "aop.segment gives masks of the full size."
    return Opened(reduced, [coco_mask.encode(np.asfortranarray(mask)) for mask in masks], note)


def read_quietly(source: Source) -> Opened:
    """Read an image; of a large one `prepared` has a note in place of Pillow's warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return source.read()


def uploaded(data: bytes, name: str, names: Sequence[str]) -> Source:
    """A file's content as a source, named apart from those that are there."""
    n = 1 + sum(known.partition(" (")[0] == name for known in names)
    unique = name if n == 1 else f"{name} ({n})"
    return Source(unique, repr(name), lambda: prepared(image_from_bytes(data, name)))


def _of_path(path: str | os.PathLike) -> list[Source]:
    if path == "photos" or (Path(path) / "annotations.json").exists():
        name = "./photos" if path == Path("photos") else str(path)
        return _of_dataset(open_dataset(path), f"aop.open_dataset({name!r})")
    found, bad = find_images([str(path)])
    if bad:
        raise ValueError(f"{bad[0][0]}: {bad[0][1]}.")
    return [Source(file.name, repr(str(file)), partial(prepared, file)) for file in found]


def _of_dataset(dataset: Dataset, code: str) -> list[Source]:
    def read(i: int) -> Opened:
        return prepared(dataset[i])

    return [Source(id, f"{code}[{i}]", partial(read, i)) for i, id in enumerate(dataset.ids)]


def _joined(groups: Iterable[tuple[str, list[Source]]]) -> list[Source]:
    """The sources of all groups, each with its group's name; equal names are numbered."""
    sources: list[Source] = []
    times: Counter[str] = Counter()
    for group_name, group in groups:
        for source in group:
            name = source.name
            if group_name:
                name = group_name if len(group) == 1 else f"{group_name}: {name}"
            times[name] += 1
            unique = name if times[name] == 1 else f"{name} {times[name]}"
            sources.append(source._replace(name=unique))
    if not sources:
        raise ValueError("There is no image in this list.")
    return sources
