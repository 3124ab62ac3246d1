"""Images with a COCO-style annotation file: any folder, COCO itself, LVIS; classes ignored."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

from aopsam_lab.data.annotations import (
    LEFT_OUT,
    GroundTruth,
    ground_truth,
    order,
    packed,
    upright_size,
)
from aopsam_lab.data.images import read_image
from aopsam_lab.data.sample import Sample

SOURCE = "sam"  # the `source` of an annotation that a SAM found


class CocoFolder:
    """A folder with `images/` and `annotations.json` in COCO's instances format.

    An image without masks stays: methods run on it, the scores skip it. An image whose file is
    missing is left out before the n images are chosen. `ground_truth` says which masks are left
    out. All are counted, see `describe`. An id is the image's `file_name`. Opening reads each image
    taken once, for its hash; afterwards only its RLE are kept.

    Args:
        path: the folder.
        n_images: how many images to take, None for all; where there are fewer, all.
        seed: which: images are ordered by a hash of the seed and their file name. So a seed always
            gives the same images, and fewer images are a part of more.

    Attributes:
        sizes: (height, width) of each image in pixels.

    Raises:
        FileNotFoundError: there is no such folder, no file or no image.
        ValueError: the file is not in COCO's format, an image does not have the size that the file
            says, or a mask does not fit its image.
    """

    def __init__(self, path: str | os.PathLike, n_images: int | None = None, seed: int = 0) -> None:
        self.path = Path(path)
        self._counts: Counter[str] = Counter()
        self._file, self._root, self.name = self._locate()
        records, annotations = self._read()
        present = [record for record in records if (self._root / record["path"]).is_file()]
        if not present:
            message = f"None of the {len(records)} images that {self._file} names is in"
            raise FileNotFoundError(f"{message} {self._root}.")
        self._counts["missing_images"] = len(records) - len(present)
        self._available = len(present)
        present.sort(key=lambda record: order(seed, record["path"]))
        self._truth: list[GroundTruth] = []
        self.sizes: list[tuple[int, int]] = []
        self._fingerprints: list[str] = []
        self.ids: list[str] = []
        for record in present[:n_images]:
            self._prepare(record, annotations.pop(record["id"], []))
        self.fingerprint = hashlib.sha256("\n".join(self._fingerprints).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Sample:
        """Read image i; its masks are in the order of the file."""
        rles, points, clicks = self._truth[i]
        image = read_image(self._root / self.ids[i])
        return Sample(self.ids[i], image, points=points, rles=rles, clicks=clicks)

    def sample_fingerprint(self, i: int) -> str:
        """A hash of the bytes of image i and of its masks."""
        return self._fingerprints[i]

    def describe(self) -> dict[str, str | int]:
        """Name, fingerprint and counts: of images and masks, and of what was left out, by reason.

        images_available counts the files that are there, missing_images those that are not; the
        rest is about the images taken.
        """
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "images": len(self),
            "images_available": self._available,
            "masks": sum(len(found.rles) for found in self._truth),
            "images_without_masks": sum(not found.rles for found in self._truth),
            **{key: self._counts[key] for key in ("missing_images", *LEFT_OUT)},
        }

    def _locate(self) -> tuple[Path, Path, str]:
        """The annotation file, the folder that image paths start from, the data set's name."""
        file = self.path / "annotations.json"
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"There is no folder {self.path}. A data set is 'photos' or a COCO-style "
                "folder, or coco:PATH, lvis:PATH or sa1b:PATH."
            )
        if not file.is_file():
            where = "a COCO-style folder has it beside images/"
            raise FileNotFoundError(f"{self.path} has no annotations.json; {where}.")
        return file, self.path / "images", self.path.resolve().name

    @staticmethod
    def _image_path(record: dict) -> str:
        """An image's path below the image folder; LVIS has only coco_url, which ends in it."""
        return record.get("file_name") or record["coco_url"].rsplit("/", 1)[-1]

    def _read(self) -> tuple[list[dict], dict[int, list[dict]]]:
        """The images, each with its `path`, and their annotations by image id."""
        annotations: dict[int, list[dict]] = defaultdict(list)

        def keep(entry: dict) -> dict | bool:
            # as soon as it is read: the large files would not fit into memory as they are
            if "image_id" not in entry:
                return entry
            annotations[entry["image_id"]].append(packed(entry))
            return True

        try:
            with self._file.open(encoding="utf-8") as file:
                content = json.load(file, object_hook=keep)
            records = [{**x, "path": _below(self._image_path(x))} for x in content["images"]]
            if not all(annotation is True for annotation in content["annotations"]):
                raise KeyError("image_id")
            counts = {"id": Counter(record["id"] for record in records)}
            counts["file_name"] = Counter(record["path"] for record in records)
        # JSON's own error is a ValueError as well, but so is that of _below
        except (
            json.JSONDecodeError,
            UnicodeDecodeError,
            LookupError,
            TypeError,
            AttributeError,
        ) as e:
            reason = f"{type(e).__name__} {e}"
            raise ValueError(f"{self._file} is not in COCO's instances format: {reason}.") from e
        for what, counter in counts.items():
            for value, n in counter.most_common(1):
                if n > 1:
                    message = f"{self._file} lists {n} images with the {what} {value!r}"
                    raise ValueError(f"{message}; each needs its own.")
        return records, annotations

    def _prepare(self, record: dict, annotations: list[dict]) -> None:
        """Hash one image's bytes, check its size and read its annotations."""
        path = record["path"]
        file = self._root / path
        data = file.read_bytes()
        height, width = upright_size(data, str(file))
        if (record.get("height", height), record.get("width", width)) != (height, width):
            raise ValueError(
                f"{file} is {width} x {height} pixels, but {self._file.name} says "
                f"{record['width']} x {record['height']}: its masks would not fit. Correct the "
                "entry or remove it."
            )
        found = ground_truth(annotations, height, width, f"{path} of {self.name}", self._counts)
        digest = hashlib.sha256(data)
        for i, rle in enumerate(found.rles):
            point = None if found.points is None else found.points[i].tolist()
            digest.update(b"|" + rle["counts"] + json.dumps(point).encode())
        self.ids.append(path)
        self._truth.append(found)
        self.sizes.append((height, width))
        self._fingerprints.append(digest.hexdigest())


class Coco(CocoFolder):
    """COCO as it is published: `annotations/instances_val2017.json`, and the images in `val2017/`.

    Args:
        path: the folder that holds both, for the validation split; or the annotation file of
            another split, such as `annotations/instances_train2017.json`.
        n_images, seed: as CocoFolder.
    """

    def _locate(self) -> tuple[Path, Path, str]:
        file = _annotation_file(self.path, "instances_val2017.json", "coco")
        split = file.stem.removeprefix("instances_")
        names = (split, f"images/{split}", "images")
        folders = [root / name for root in file.parents[:2] for name in names]
        return file, _first_folder(folders, file), f"coco-{split}"


class Lvis(CocoFolder):
    """LVIS v1 as it is published: `lvis_v1_val.json`, and COCO's `train2017/` and `val2017/`.

    A split's images come from both of COCO's folders, so an id is `val2017/NAME.jpg`.

    Args:
        path: the folder that holds the three, for the validation split; or the annotation file of
            another split.
        n_images, seed: as CocoFolder.
    """

    def _locate(self) -> tuple[Path, Path, str]:
        file = _annotation_file(self.path, "lvis_v1_val.json", "lvis")
        roots = [root / name for root in file.parents[:2] for name in ("", "images", "coco")]
        folders = [root / part for root in roots for part in ("train2017", "val2017")]
        return file, _first_folder(folders, file).parent, file.stem.replace("_", "-")

    @staticmethod
    def _image_path(record: dict) -> str:
        return "/".join(record["coco_url"].split("/")[-2:])


def _annotation_file(path: Path, default: str, kind: str) -> Path:
    for file in (path, path / "annotations" / default, path / default):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"There is no {default} in {path} or its annotations/. Give {kind}: the folder that holds "
        "it, or the path of another annotation file."
    )


def _first_folder(folders: list[Path], file: Path) -> Path:
    for folder in folders:
        if folder.is_dir():
            return folder
    tried = ", ".join(map(str, folders))
    raise FileNotFoundError(f"The images of {file} are in none of {tried}.")


def _below(name: str) -> str:
    """A path that stays below its folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        message = f"The image {name!r} lies outside the folder images/"
        raise ValueError(f"{message}; its file_name must stay below it.")
    return str(path)


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
