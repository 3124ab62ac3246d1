"""The masks of several images as one COCO data set, with what it takes to go on with them."""

import json
from collections.abc import Mapping
from pathlib import Path

from aopsam_lab.pipeline.segmentation import Segmentation

EMPTY: dict[str, list] = {"images": [], "annotations": [], "categories": []}


def read_annotations(path: Path) -> dict:
    """The data set in a file, EMPTY where there is none; ValueError where it is of another kind."""
    try:
        coco = json.loads(path.read_bytes()) if path.exists() else EMPTY
        {(one["id"], one["file_name"]) for one in coco["images"]}
        {(one["id"], one["name"]) for one in coco["categories"]}
        {one["image_id"] for one in coco["annotations"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no COCO annotations: name another file.") from None
    return coco


def with_image(
    coco: Mapping, seg: Segmentation, file_name: str, labels: Mapping[str, str], state: Mapping
) -> dict:
    """The data set with one image's masks anew. A category is a name that `labels` gives to counts.

    `state` is kept in the image's entry under "explorer"; `state_of` reads it.
    """
    ids = {one["file_name"]: one["id"] for one in coco["images"]}
    image_id = ids.get(file_name, max(ids.values(), default=0) + 1)
    own = seg.to_coco(image_id, file_name)
    categories = {one["name"]: one for one in coco["categories"] or own["categories"]}
    for one in own["annotations"]:
        name = labels.get(one["segmentation"]["counts"]) or "object"
        new = max(known["id"] for known in categories.values()) + 1
        one["category_id"] = categories.setdefault(name, {"id": new, "name": name})["id"]
    others = [one for one in coco["annotations"] if one["image_id"] != image_id]
    images = {one["id"]: one for one in coco["images"]}
    images[image_id] = {**own["images"][0], "explorer": state}
    return {
        "images": list(images.values()),
        "annotations": [{**one, "id": i} for i, one in enumerate(others + own["annotations"], 1)],
        "categories": list(categories.values()),
    }


def state_of(coco: Mapping, file_name: str) -> dict:
    """What `with_image` was given as the state of an image; empty where it is not known."""
    images = [one for one in coco["images"] if one["file_name"] == file_name]
    known = images[0].get("explorer", {}) if images else {}
    return {"manual": [], "labels": {}, "deleted": [], **known}
