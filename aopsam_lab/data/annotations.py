"""What COCO, LVIS and SA-1B files say of one image: its masks, and what had to be left out."""

from __future__ import annotations

import hashlib
import io
from array import array
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

LEFT_OUT = ("crowd_regions", "degenerate_polygons", "annotations_without_mask")


class GroundTruth(NamedTuple):
    """The masks of one image.

    Args:
        rles: N COCO RLE.
        points: (N, 2) float32, a prompt point (x, y) for each, where all have one; else None.
        clicks: for each the points [x, y] known to give it, where the file has any; else None.
    """

    rles: list[dict]
    points: np.ndarray | None
    clicks: list[list[list[float]]] | None


def ground_truth(
    annotations: Iterable[dict], height: int, width: int, where: str, left_out: Counter[str]
) -> GroundTruth:
    """Read one image's annotations, in their order.

    Crowd regions (`iscrowd` 1) mark many objects at once and are left out. An outline of fewer than
    three points is no polygon; an annotation without another part, without a segmentation, or whose
    mask has no pixel is left out. RLE counts may be a list or a string.

    Args:
        annotations: COCO's records.
        height: of the image.
        width: of the image.
        where: what errors name.
        left_out: counts what is left out.

    Raises:
        ValueError: a mask does not fit the image, or its counts are of another kind.
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
    """An annotation with only what `ground_truth` reads, its numbers in a tenth of the memory."""
    names = ("id", "iscrowd", "point_coords", "clicks")
    kept = {key: annotation[key] for key in names if annotation.get(key)}
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list):
        segmentation = [_packed_part(part) for part in segmentation]
    return {**kept, "segmentation": None if kept.get("iscrowd") else segmentation}


def _packed_part(part: Any) -> Any:
    try:
        return array("d", part) if isinstance(part, list) else part
    except TypeError:  # not all are numbers: no polygon
        return []


def _encode(
    annotation: dict, height: int, width: int, where: str, left_out: Counter[str]
) -> dict | None:
    """One annotation's compressed RLE, None where it has no mask."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        where = f"annotation {annotation.get('id')} of {where}"
        return _whole_rle(segmentation, height, width, where)
    if not segmentation:
        return None
    # pycocotools takes four numbers for a box, so it must not see what is no polygon
    lists = [part for part in segmentation if isinstance(part, (list, array))]
    polygons = [list(part) for part in lists if len(part) >= 6 and len(part) % 2 == 0]
    left_out["degenerate_polygons"] += len(segmentation) - len(polygons)
    if not polygons:
        return None
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


def _whole_rle(rle: dict, height: int, width: int, where: str) -> dict:
    size = [height, width]
    if list(rle.get("size", [])) != size:
        raise ValueError(f"The mask of {where} has size {rle.get('size')}, its image {size}.")
    counts = rle.get("counts")
    if isinstance(counts, list):
        if sum(counts) != height * width:
            pixels = f"{sum(counts)} pixels, not {height} x {width}"
            raise ValueError(f"The counts of {where} add up to {pixels}.")
        return coco_mask.frPyObjects(rle, height, width)
    if not isinstance(counts, str):
        raise ValueError(f"The counts of {where} are neither a list nor a string.")
    return {"size": size, "counts": counts.encode("ascii")}


def upright_size(data: bytes, where: str) -> tuple[int, int]:
    """Height and width of an image file as a person sees it, without decoding its pixels.

    Raises:
        ValueError: it is no image; the message names `where`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return image.size if turned else image.size[::-1]
    except OSError as error:  # no image, or one that ends within its header
        advice = "Replace it or take it out of the folder."
        raise ValueError(f"{where} cannot be read as an image. {advice}") from error


def order(seed: int, name: str) -> tuple[str, str]:
    """A sort key that shuffles by seed, on every machine alike."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest(), name
