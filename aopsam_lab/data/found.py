"""Masks that a SAM found on a data set's images: `found.json` beside its `annotations.json`."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from aopsam_lab.data.annotations import ground_truth, packed
from aopsam_lab.data.coco import CocoFolder

SOURCE = "sam"  # the `source` of an annotation that a SAM found


def found_masks(dataset: Any) -> dict[str, list[dict]] | None:
    """Read the masks that a SAM found on the images of a data set.

    `found.json` has the format of `annotations.json`. An image is known by its file_name, and the
    file may list images that `dataset` has not taken. Annotations may have a `source`; only those
    of "sam" are read.

    Args:
        dataset: a data set as `open_dataset` opens it.

    Returns:
        For each id of the data set a list of COCO RLE in the image frame, in the order of the file;
        or None where the data set is no COCO-style folder or has no `found.json`.

    Raises:
        ValueError: the file is not in COCO's format, an image of the data set is not in it, or a
            mask belongs to no image or does not have its image's size.
    """
    if not isinstance(dataset, CocoFolder) or not (dataset.path / "found.json").is_file():
        return None
    file = dataset.path / "found.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        annotations = [a for a in content["annotations"] if a.get("source", SOURCE) == SOURCE]
        owners = [annotation["image_id"] for annotation in annotations]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise ValueError(f"{file} is not in COCO's instances format: {reason}.") from error
    found: dict[str, list[dict]] = {name: [] for name in names.values()}
    for owner, annotation in zip(owners, annotations, strict=True):
        if owner not in names:
            raise ValueError(f"{file} has a mask of image {owner!r}, which its images do not list.")
        found[names[owner]].append(packed(annotation))
    missing = [name for name in dataset.ids if name not in found]
    if missing:
        raise ValueError(
            f"{file} does not list {missing[0]!r} ({len(missing)} of {len(dataset)} images are "
            "missing). Find the masks of these images too, or remove the file."
        )
    return {
        name: ground_truth(found[name], *size, f"{name} in {file}", Counter()).rles
        for name, size in zip(dataset.ids, dataset.sizes, strict=True)
    }
