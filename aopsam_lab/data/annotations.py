"""What COCO, LVIS and SA-1B files say of one picture -> masks in COCO RLE, and what had to be left out."""

from __future__ import annotations

import hashlib
import io
from array import array
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask


class GroundTruth(NamedTuple):
    """The masks of one image as COCO RLE; a prompt point (x, y) for each, N x 2 float32, where all have one; for each
    the clicks [x, y] known to give it, where the file has any (`find-masks` writes them)."""

    rles: list[dict]
    points: np.ndarray | None
    clicks: list[list[list[float]]] | None


LEFT_OUT = ("crowd_regions", "degenerate_polygons", "annotations_without_mask")


def truths(
    annotations: Iterable[dict], height: int, width: int, where: str, left_out: Counter[str]
) -> GroundTruth:
    """One picture's annotations -> its ground truth, masks in their order.

    What the files leave open is decided so (our choices), and counted in `left_out`:
      - crowd regions (`iscrowd` 1) are no truth: they mark many objects at once;
      - an outline of fewer than three points is no polygon and is dropped; an annotation with no other part, with no
        segmentation at all or whose mask has no pixel is dropped with it;
      - RLE counts may be a list or a string.

    Raises ValueError, naming `where`, for a mask that does not fit the picture and for counts of another kind.
    """
    rles, points, clicks = [], [], []
    for annotation in annotations:
        if annotation.get("iscrowd", 0):
            left_out["crowd_regions"] += 1
            continue
        rle = _encode(annotation, height, width, where, left_out)
        if rle is None or coco_mask.area(rle) == 0:
            left_out["annotations_without_mask"] += 1
            continue
        rles.append(rle)
        points.append(annotation.get("point_coords"))
        clicks.append(annotation.get("clicks", []))
    return GroundTruth(
        rles,
        np.float32([p[0] for p in points]) if points and all(points) else None,
        clicks if any(clicks) else None,
    )


def packed(annotation: dict) -> dict:
    """An annotation with only what `truths` reads, its numbers as arrays: a tenth of the memory of Python's floats."""
    kept = {
        key: annotation[key]
        for key in ("id", "iscrowd", "point_coords", "clicks")
        if annotation.get(key)
    }
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list):
        segmentation = [_packed_part(part) for part in segmentation]
    return {**kept, "segmentation": None if kept.get("iscrowd") else segmentation}


def _packed_part(part) -> array | list:
    try:
        return array("d", part) if isinstance(part, list) else part
    except TypeError:  # not all numbers: no polygon, as truths will find
        return []


def _encode(
    annotation: dict, height: int, width: int, where: str, left_out: Counter[str]
) -> dict | None:
    """One annotation's compressed RLE, None where it has no mask."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return _whole_rle(
            segmentation, height, width, f"annotation {annotation.get('id')} of {where}"
        )
    if not segmentation:
        return None
    # pycocotools reads four numbers as a box, so parts that are no polygon have to go before it sees them.
    parts = [
        list(p)
        for p in segmentation
        if isinstance(p, (list, array)) and len(p) >= 6 and len(p) % 2 == 0
    ]
    left_out["degenerate_polygons"] += len(segmentation) - len(parts)
    if not parts:
        return None
    return coco_mask.merge(coco_mask.frPyObjects(parts, height, width))


def _whole_rle(rle: dict, height: int, width: int, where: str) -> dict:
    if list(rle.get("size", [])) != [height, width]:
        raise ValueError(
            f"The mask of {where} has size {rle.get('size')}, its image {[height, width]}."
        )
    counts = rle.get("counts")
    if isinstance(counts, list):
        if sum(counts) != height * width:
            raise ValueError(
                f"The counts of {where} add up to {sum(counts)} pixels, not {height} x {width}."
            )
        return coco_mask.frPyObjects(rle, height, width)
    if not isinstance(counts, str):
        raise ValueError(f"The counts of {where} are neither a list nor a string.")
    return {"size": [height, width], "counts": counts.encode("ascii")}


def upright_size(data: bytes, where: str) -> tuple[int, int]:
    """Height and width of an image file's picture as a person sees it, without decoding its pixels.

    Raises ValueError, naming `where`, for what is no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            turned = picture.getexif().get(0x0112, 1) in (
                5,
                6,
                7,
                8,
            )  # EXIF orientations that swap the sides
            width, height = picture.size[::-1] if turned else picture.size
    except OSError as error:  # what is no picture, and one that ends within its header
        raise ValueError(
            f"{where} cannot be read as an image. Replace it or take it out of the folder."
        ) from error
    return height, width


def order(seed: int, name: str) -> tuple[str, str]:
    """A sort key that shuffles by seed: the same on every machine, whatever the order of the names."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest(), name
