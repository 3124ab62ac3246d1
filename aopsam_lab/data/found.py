"""Masks that a SAM found on a data set's images: `found.json` beside its `annotations.json`."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from aopsam_lab.data.annotations import packed, truths
from aopsam_lab.data.coco import CocoFolder

if TYPE_CHECKING:
    from aopsam_lab.data import Dataset

SOURCE = "sam"  # the `source` of an annotation that a SAM found


def found_masks(dataset: Dataset) -> dict[str, list[dict]] | None:
    """Read the masks that a SAM found on the images of a data set.

    `found.json` has the format of `annotations.json`: `images` (id, file_name) and `annotations`
    (image_id, segmentation). An image is known by its file_name, so its id may be another one than
    in `annotations.json`, and the file may list images that `dataset` has not taken. An annotation
    may have a `source`; only those of "sam" are read.

    Args:
        dataset: a data set as `open_dataset` opens it.

    Returns:
        For each id of the data set a list of COCO RLE in the image frame, in the order of the file;
        or None where the data set is no COCO-style folder or has no `found.json`.

    Raises:
        ValueError: if the file is not in COCO's format, an image of the data set is not in it, or
            a mask belongs to no image or does not have its image's size.
    """
    if not isinstance(dataset, CocoFolder) or not (dataset.path / "found.json").is_file():
        return None
    file = dataset.path / "found.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        found: dict[str, list[dict]] = {name: [] for name in names.values()}
        annotations = [a for a in content["annotations"] if a.get("source", SOURCE) == SOURCE]
        owners = [annotation["image_id"] for annotation in annotations]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise ValueError(f"{file} is not in COCO's instances format: {reason}.") from error
    for owner, annotation in zip(owners, annotations):
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
        name: truths(found[name], height, width, f"{name} in {file}", Counter())[0]
        for name, (height, width) in zip(dataset.ids, dataset.sizes)
    }
