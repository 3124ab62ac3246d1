"""A COCO-style folder as a data set: `images/` and `annotations.json`, classes ignored."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask

from aopsam_lab.data.sample import Sample
from aopsam_lab.imaging import read_image
from aopsam_lab.rle import decode_rle


class CocoFolder:
    """Images of a COCO-style folder and their masks, whatever their class; see `describe` for what was left out.

    path:     the folder; `annotations.json` in it is COCO's instances format: `images` (id, file_name or coco_url, and
              mostly width and height) and `annotations` (image_id, segmentation, and perhaps iscrowd, point_coords).
    n_images: how many images to take, None for all; where there are fewer, all.
    seed:     which: images are ordered by a hash of the seed and their file name. So a seed always gives the same
              images, whatever the order in the file or on the disk, and fewer images are a part of more.

    What the file leaves open is decided so (our choices), and counted:
      - crowd regions (`iscrowd` 1) are no truth: they mark many objects at once;
      - an outline of fewer than three points is no polygon and is dropped; an annotation with no other part, with no
        segmentation at all or whose mask has no pixel is dropped with it;
      - RLE counts may be a list or a string;
      - an image without masks stays: methods run on it, the scores skip it;
      - an image whose file is missing is left out before the n images are chosen.

    An id is the image's `file_name`. Masks are in the frame of the image as `read_image` shows it.
    Raises FileNotFoundError without the folder, the file or any image; ValueError for a file that is not COCO's
    format, an image that does not have the size the file says, and a mask that does not fit its image.
    """

    def __init__(self, path: str | os.PathLike, n_images: int | None = None, seed: int = 0) -> None:
        self.path = Path(path)
        self.name = self.path.resolve().name
        self._counts: Counter[str] = Counter()
        records, annotations = self._read()
        present = [record for record in records if (self.path / "images" / record["file_name"]).is_file()]
        if not present:
            raise FileNotFoundError(
                f"None of the {len(records)} images that {self.path / 'annotations.json'} names is in "
                f"{self.path / 'images'}."
            )
        self._counts["missing_images"] = len(records) - len(present)
        self._available = len(present)
        present.sort(key=lambda record: _order(seed, record["file_name"]))
        self._records = present if n_images is None else present[:n_images]
        self._rles: list[list[dict]] = []
        self._points: list[np.ndarray | None] = []
        self._fingerprints: list[str] = []
        for record in self._records:
            self._prepare(record, annotations[record["id"]])
        self.ids = [record["file_name"] for record in self._records]
        self.fingerprint = hashlib.sha256("\n".join(self._fingerprints).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Sample:
        """Read image i: a Sample, its masks in the order of the file, its points where every mask has one."""
        record = self._records[i]
        image = read_image(self.path / "images" / record["file_name"])
        return Sample(record["file_name"], image, decode_rle(self._rles[i], image.shape[:2]), self._points[i])

    def sample_fingerprint(self, i: int) -> str:
        """A hash of the bytes of image i and of its masks."""
        return self._fingerprints[i]

    def describe(self) -> dict[str, str | int]:
        """Name, fingerprint and counts: of images and masks taken, and of what was left out of them, by reason.

        images_available counts the folder's, missing_images those of them without a file; the rest is about the images
        taken.
        """
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "images": len(self),
            "images_available": self._available,
            "masks": sum(map(len, self._rles)),
            "images_without_masks": sum(not rles for rles in self._rles),
            **{
                key: self._counts[key]
                for key in ("missing_images", "crowd_regions", "degenerate_polygons", "annotations_without_mask")
            },
        }

    def _read(self) -> tuple[list[dict], dict]:
        file = self.path / "annotations.json"
        if not self.path.is_dir():
            raise FileNotFoundError(f"There is no folder {self.path}. A data set is 'scenes' or a COCO-style folder.")
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} has no annotations.json; a COCO-style folder has it beside images/.")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            records = [{**record, "file_name": _file_name(record)} for record in content["images"]]
            annotations = defaultdict(list)
            for annotation in content["annotations"]:
                annotations[annotation["image_id"]].append(annotation)
            ids, names = Counter(record["id"] for record in records), Counter(r["file_name"] for r in records)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not in COCO's instances format: {type(error).__name__} {error}.") from error
        for counter, what in ((ids, "id"), (names, "file_name")):
            if counter and (most := counter.most_common(1)[0])[1] > 1:
                raise ValueError(f"{file} lists {most[1]} images with the {what} {most[0]!r}; each needs its own.")
        return records, annotations

    def _prepare(self, record: dict, annotations: list[dict]) -> None:
        """Hash one image's bytes, check its size and turn its annotations into RLE."""
        file = self.path / "images" / record["file_name"]
        data = file.read_bytes()
        height, width = _upright_size(file, data)
        if (record.get("height", height), record.get("width", width)) != (height, width):
            raise ValueError(
                f"{file} is {width} x {height} pixels, but annotations.json says {record['width']} x "
                f"{record['height']}: its masks would not fit. Correct the entry or remove it."
            )
        rles, points = [], []
        for annotation in annotations:
            if annotation.get("iscrowd", 0):
                self._counts["crowd_regions"] += 1
                continue
            rle = self._encode(annotation, height, width)
            if rle is None or coco_mask.area(rle) == 0:
                self._counts["annotations_without_mask"] += 1
                continue
            rles.append(rle)
            points.append(annotation.get("point_coords"))
        digest = hashlib.sha256(data)
        for rle, point in zip(rles, points):
            digest.update(b"|" + rle["counts"] + json.dumps(point).encode())
        self._rles.append(rles)
        self._points.append(np.float32([p[0] for p in points]) if points and all(points) else None)
        self._fingerprints.append(digest.hexdigest())

    def _encode(self, annotation: dict, height: int, width: int) -> dict | None:
        """One annotation's compressed RLE, None where it has no mask."""
        segmentation, where = annotation.get("segmentation"), f"annotation {annotation.get('id')} of {self.name}"
        if isinstance(segmentation, dict):
            return _whole_rle(segmentation, height, width, where)
        if not segmentation:
            return None
        # pycocotools reads four numbers as a box, so parts that are no polygon have to go before it sees them.
        parts = [part for part in segmentation if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0]
        self._counts["degenerate_polygons"] += len(segmentation) - len(parts)
        if not parts:
            return None
        return coco_mask.merge(coco_mask.frPyObjects(parts, height, width))


def _whole_rle(rle: dict, height: int, width: int, where: str) -> dict:
    if list(rle.get("size", [])) != [height, width]:
        raise ValueError(f"The mask of {where} has size {rle.get('size')}, its image {[height, width]}.")
    counts = rle.get("counts")
    if isinstance(counts, list):
        if sum(counts) != height * width:
            raise ValueError(f"The counts of {where} add up to {sum(counts)} pixels, not {height} x {width}.")
        return coco_mask.frPyObjects(rle, height, width)
    if not isinstance(counts, str):
        raise ValueError(f"The counts of {where} are neither a list nor a string.")
    return {"size": [height, width], "counts": counts.encode("ascii")}


def _file_name(record: dict) -> str:
    """COCO's file_name; LVIS has only coco_url, which ends in it. Always below images/."""
    name = record["file_name"] if "file_name" in record else record["coco_url"].rsplit("/", 1)[-1]
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"The image {name!r} lies outside the folder images/; its file_name must stay below it.")
    return str(parts)


def _upright_size(file: Path, data: bytes) -> tuple[int, int]:
    """Height and width of an image as a person sees it, without decoding its pixels."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientations that swap the sides
            width, height = picture.size[::-1] if turned else picture.size
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} cannot be read as an image. Replace it or take it out of the folder.") from error
    return height, width


def _order(seed: int, name: str) -> tuple[str, str]:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest(), name
