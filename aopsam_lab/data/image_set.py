"""What COCO-style folders, COCO, LVIS and SA-1B have in common: n images chosen by a seed."""

import copy
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from aopsam_lab.data.images import image_from_bytes
from aopsam_lab.data.sample import Sample

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # of an image: more, and Pillow reads none of it
# pycocotools walks along an outline in steps of a fifth of a pixel, and counts them in 32 bits
MAX_COORDINATE, MAX_OUTLINE = 1e7, 2e6
LEFT_OUT = (
    *("missing_images", "crowd_regions"),
    *("annotations_without_mask", "annotations_of_no_image"),
)
_UNEXPECTED = (
    *(json.JSONDecodeError, UnicodeError, AttributeError, LookupError, TypeError),
    *(OverflowError, RecursionError),
)
Known = Callable[[], tuple[dict, list[dict]]]  # gives COCO's record of an image and its annotations
# see `ground_truth`
GroundTruth = tuple[list[dict], np.ndarray | None, list[list[list[float]]] | None]


class ImageSet:
    """Images with masks in COCO's format. Opening reads each chosen image once, for its hash.

    An image without masks stays: methods run on it, the scores skip it. One whose file is missing
    is left out before the n images are chosen.

    Attributes:
        ids: of the chosen images; unique.
        sizes: (height, width) of each in pixels.
        fingerprint: a hash of all images and masks.
    """

    name: str

    def __init__(self, path: str | os.PathLike, n_images: int | None = None, seed: int = 0) -> None:
        self.path = Path(path).absolute()  # other processes run in other folders
        self._counts: Counter[str] = Counter()
        with expected_format(self.path):
            known = self._find()
        self._available = len(known)
        self.ids = sorted(known, key=lambda id: _order(seed, id))[:n_images]
        self._ground_truth: list[GroundTruth] = []
        self.sizes: list[tuple[int, int]] = []
        self._fingerprints: list[str] = []
        for id in self.ids:
            with expected_format(f"{id} of {self.path}"):
                self._take(id, *known[id]())
        self.fingerprint = hashlib.sha256("\n".join(self._fingerprints).encode()).hexdigest()

    def _find(self) -> dict[str, Known]:
        """The images that are there, by id; sets the name and counts what the set lacks."""
        raise NotImplementedError

    def _image_bytes(self, id: str) -> bytes:
        raise NotImplementedError

    def _take(self, id: str, record: dict, annotations: list[dict]) -> None:
        size = record["height"], record["width"]
        if (
            not all(type(side) is int and side > 0 for side in size)
            or size[0] * size[1] > MAX_PIXELS
        ):
            limit = f"whole numbers from 1, at most {MAX_PIXELS:,} pixels: else reduce or cut it"
            raise ValueError(f"The size of {id} of {self.path} is {size}; sizes are {limit}.")
        found = ground_truth(annotations, size, f"{id} of {self.path}", self._counts)
        self._ground_truth.append(found)
        self.sizes.append(size)
        self._fingerprints.append(_digest(self._image_bytes(id), found))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Sample:
        """Read image i; its masks are in the order of the file."""
        where = f"{self.ids[i]} of {self.path}"
        content = self._image_bytes(self.ids[i])
        image = image_from_bytes(content, where)
        if image.shape[:2] != self.sizes[i]:
            said = "{} x {}".format(*self.sizes[i])
            raise ValueError(f"{where} has {image.shape[:2]} pixels, its annotations say {said}.")
        if _digest(content, self._ground_truth[i]) != self._fingerprints[i]:
            raise ValueError(f"{where} is not the image that it was when the data set was opened.")
        return Sample(self.ids[i], image, *self._ground_truth[i])

    def alone(self, i: int) -> Self:
        """A set of image i alone, small enough to be sent to a process that can read its file."""
        one = copy.copy(self)
        for name in ("ids", "sizes", "_ground_truth", "_fingerprints"):
            setattr(one, name, getattr(self, name)[i : i + 1])
        return one

    def sample_fingerprint(self, i: int) -> str:
        """A hash of the bytes of image i and of its masks."""
        return self._fingerprints[i]

    def describe(self) -> dict[str, str | int]:
        """Name, fingerprint, counts.

        images_available, missing_images and annotations_of_no_image are of the whole set.
        """
        n_masks = [len(rles) for rles, *_ in self._ground_truth]
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "images": len(self),
            "images_available": self._available,
            "masks": sum(n_masks),
            "images_without_masks": n_masks.count(0),
            **{name: self._counts[name] for name in LEFT_OUT},
        }

    def require_masks(self) -> None:
        """ValueError, which counts what was left out, where no image has a mask."""
        counts = self.describe()
        if not counts["masks"]:
            lost = [f"{counts[name]} {name.replace('_', ' ')}" for name in LEFT_OUT if counts[name]]
            why = f"left out: {', '.join(lost)}" if lost else "there are no annotations of them"
            raise ValueError(f"None of the {len(self)} images of {self.path} has a mask ({why}).")


@contextmanager
def expected_format(where: str | Path) -> Iterator[None]:
    """Turn an error from unexpected content of a JSON file into a ValueError that says where."""
    try:
        yield
    except _UNEXPECTED as error:
        reason = f"{type(error).__name__} {error}"[:300]
        raise ValueError(f"{where} is not in COCO's instances format: {reason}.") from error


def ground_truth(
    annotations: Iterable[dict], size: tuple[int, int], where: str, left_out: Counter[str]
) -> GroundTruth:
    """Read one image's annotations, in their order; crowds and masks without a pixel are left out.

    Args:
        annotations: COCO's records; segmentations are polygons or RLE.
        size: (height, width) of the image.
        where: what errors name.
        left_out: counts crowd_regions and annotations_without_mask.

    Returns:
        The rles, points and clicks of a `Sample`.
    """
    rles, points, clicks = [], [], []
    for i, annotation in enumerate(annotations):
        name = f"annotation {_get(annotation, 'id', i)} of {where}"
        with expected_format(name):
            if annotation.get("iscrowd", 0):
                left_out["crowd_regions"] += 1
                continue
            rle = _encoded(annotation.get("segmentation"), size, name)
            if rle is None or coco_mask.area(rle) == 0:
                left_out["annotations_without_mask"] += 1
                continue
            rles.append(rle)
            points.append(_numbers(annotation.get("point_coords", []), (-1, 2), name).tolist())
            clicks.append(_numbers(annotation.get("clicks", []), (-1, 2), name).tolist())
    first = np.array([p[0] for p in points], np.float32) if points and all(points) else None
    return rles, first, clicks if any(clicks) else None


def _digest(content: bytes, found: GroundTruth) -> str:
    """A hash of the bytes of an image and of its masks."""
    (rles, points, _), digest = found, hashlib.sha256(content)
    for i, rle in enumerate(rles):
        point = None if points is None else points[i].tolist()
        digest.update(b"|" + rle["counts"] + json.dumps(point).encode())
    return digest.hexdigest()


def _get(annotation: object, key: str, default: object) -> object:
    return annotation.get(key, default) if isinstance(annotation, dict) else default


def _numbers(values: object, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Finite numbers of JSON as float64 of a shape; ValueError for anything else."""
    try:
        found = np.array(values)
        found = found.astype(float).reshape(shape) if found.size else np.zeros((0, *shape[1:]))
        if found.size and np.array(values).dtype.kind in "iuf" and (abs(found) < math.inf).all():
            return found
    except (TypeError, ValueError):
        found = np.zeros(1)
    if found.size:
        raise ValueError(f"{where} has coordinates that are no finite numbers, or too few.")
    return found


def _encoded(segmentation: dict | list | None, size: tuple[int, int], where: str) -> dict | None:
    """Compressed RLE, None where there is no mask. Nothing reaches pycocotools unchecked."""
    if isinstance(segmentation, dict):
        if tuple(segmentation["size"]) != size:
            raise ValueError(f"A mask of {where} has size {segmentation['size']}, not {size}.")
        runs = _runs(segmentation["counts"])
        if runs is None or (runs < 0).any() or runs.sum() != size[0] * size[1]:
            raise ValueError(f"The counts of a mask of {where} do not add up to its pixels.")
        rle = coco_mask.frPyObjects({"size": list(size), "counts": runs.tolist()}, *size)
        # pycocotools ends its comparison of two masks at a run of no pixels
        return coco_mask.encode(coco_mask.decode(rle)) if (runs[1:] == 0).any() else rle
    # pycocotools takes four numbers for a box, and they are no polygon
    polygons = [part for part in segmentation or [] if len(part) >= 6 and len(part) % 2 == 0]
    for part in polygons:
        corners = _numbers(part, (-1, 2), where)
        near = corners.clip(-MAX_COORDINATE, MAX_COORDINATE)
        length = abs(np.diff(near, axis=0, append=near[:1])).max(1).sum()
        if (near != corners).any() or length > MAX_OUTLINE:
            raise ValueError(f"The outline of {where} lies too far outside the image.")
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *size)) if polygons else None


def _runs(counts: object) -> np.ndarray | None:
    """The lengths of an RLE's runs, of COCO's text or list, int64; None for anything else."""
    if isinstance(counts, list):
        fits = all(type(run) is int and abs(run) <= MAX_PIXELS for run in counts)
        return np.array(counts, np.int64) if fits else None
    if not isinstance(counts, str) or not counts.isascii():
        return None
    # six bits a character: five of a number, lowest first, and whether more of it follow
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 32) == 0)
    lengths = np.diff(ends, prepend=-1)
    if not len(ends) or ends[-1] != len(codes) - 1 or lengths.max() > 7:
        return None
    if codes.min() < 0 or codes.max() > 63:
        return None
    starts = ends - lengths + 1
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    # from the fourth on, each is told by its difference to the one before the last
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs


def _order(seed: int, id: str) -> tuple[str, str]:
    """A sort key that shuffles by seed, on every machine alike."""
    return hashlib.sha256(f"{seed}:{id}".encode()).hexdigest(), id
