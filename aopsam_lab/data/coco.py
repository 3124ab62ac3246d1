"""Pictures with a COCO-style annotation file as data sets: any folder, COCO itself, LVIS; classes ignored."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

from aopsam_lab.data.annotations import LEFT_OUT, GroundTruth, order, packed, truths, upright_size
from aopsam_lab.data.sample import Sample
from aopsam_lab.data.images import read_image


class CocoFolder:
    """A folder with `images/` and `annotations.json`, and their masks, whatever their class.

    path:     the folder; `annotations.json` in it is COCO's instances format: `images` (id, file_name or coco_url, and
              mostly width and height) and `annotations` (image_id, segmentation, and perhaps iscrowd, point_coords).
    n_images: how many images to take, None for all; where there are fewer, all.
    seed:     which: images are ordered by a hash of the seed and their file name. So a seed always gives the same
              images, whatever the order in the file or on the disk, and fewer images are a part of more.
    sizes:    (height, width) of each image in pixels.

    What becomes of crowd regions, degenerate polygons and empty masks: `aopsam_lab.data.annotations.truths`. An image
    without masks stays: methods run on it, the scores skip it. An image whose file is missing is left out before the n
    images are chosen. All are counted, see `describe`.

    An id is the image's `file_name`. Masks are in the frame of the image as `read_image` shows it. Opening reads each
    image taken once, for its hash; afterwards only its RLE are kept.
    Raises FileNotFoundError without the folder, the file or any image; ValueError for a file that is not COCO's
    format, an image that does not have the size the file says, and a mask that does not fit its image.
    """

    def __init__(self, path: str | os.PathLike, n_images: int | None = None, seed: int = 0) -> None:
        self.path = Path(path)
        self._counts: Counter[str] = Counter()
        self._file, self._root, self.name = self._locate()
        records, annotations = self._read()
        present = [record for record in records if (self._root / record["path"]).is_file()]
        if not present:
            raise FileNotFoundError(
                f"None of the {len(records)} images that {self._file} names is in {self._root}."
            )
        self._counts["missing_images"] = len(records) - len(present)
        self._available = len(present)
        present.sort(key=lambda record: order(seed, record["path"]))
        self._records = present if n_images is None else present[:n_images]
        self._truths: list[GroundTruth] = []
        self.sizes: list[tuple[int, int]] = []
        self._fingerprints: list[str] = []
        for record in self._records:
            self._prepare(record, annotations.pop(record["id"], []))
        self.ids = [record["path"] for record in self._records]
        self.fingerprint = hashlib.sha256("\n".join(self._fingerprints).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Sample:
        """Read image i: a Sample, its masks in the order of the file, its points where every mask has one."""
        path = self._records[i]["path"]
        rles, points, clicks = self._truths[i]
        return Sample(path, read_image(self._root / path), points=points, rles=rles, clicks=clicks)

    def sample_fingerprint(self, i: int) -> str:
        """A hash of the bytes of image i and of its masks."""
        return self._fingerprints[i]

    def describe(self) -> dict[str, str | int]:
        """Name, fingerprint and counts: of images and masks taken, and of what was left out of them, by reason.

        images_available counts the files that are there, missing_images those that are not; the rest is about the
        images taken.
        """
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "images": len(self),
            "images_available": self._available,
            "masks": sum(len(found.rles) for found in self._truths),
            "images_without_masks": sum(not found.rles for found in self._truths),
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
            raise FileNotFoundError(
                f"{self.path} has no annotations.json; a COCO-style folder has it beside images/."
            )
        return file, self.path / "images", self.path.resolve().name

    @staticmethod
    def _image_path(record: dict) -> str:
        """An image's path below the image folder: COCO's file_name; LVIS has only coco_url, which ends in it."""
        return (
            record["file_name"] if "file_name" in record else record["coco_url"].rsplit("/", 1)[-1]
        )

    def _read(self) -> tuple[list[dict], dict[int, list[dict]]]:
        """The images, each with its `path`, and their annotations by image id."""
        annotations: dict[int, list[dict]] = defaultdict(list)

        def keep(entry: dict):
            """Packs each annotation as soon as it is read: the large files would not fit into memory as they are."""
            if "image_id" not in entry:
                return entry
            annotations[entry["image_id"]].append(packed(entry))
            return True

        try:
            with self._file.open(encoding="utf-8") as file:
                content = json.load(file, object_hook=keep)
            records = [
                {**record, "path": _below(self._image_path(record))} for record in content["images"]
            ]
            if not all(annotation is True for annotation in content["annotations"]):
                raise KeyError("image_id")
            ids, paths = (
                Counter(record["id"] for record in records),
                Counter(record["path"] for record in records),
            )
        except (
            json.JSONDecodeError,
            UnicodeDecodeError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise ValueError(
                f"{self._file} is not in COCO's instances format: {type(error).__name__} {error}."
            ) from error
        for counter, what in ((ids, "id"), (paths, "file_name")):
            if counter and (most := counter.most_common(1)[0])[1] > 1:
                raise ValueError(
                    f"{self._file} lists {most[1]} images with the {what} {most[0]!r}; each needs its own."
                )
        return records, annotations

    def _prepare(self, record: dict, annotations: list[dict]) -> None:
        """Hash one image's bytes, check its size and turn its annotations into RLE."""
        file = self._root / record["path"]
        data = file.read_bytes()
        height, width = upright_size(data, str(file))
        if (record.get("height", height), record.get("width", width)) != (height, width):
            raise ValueError(
                f"{file} is {width} x {height} pixels, but {self._file.name} says {record['width']} x "
                f"{record['height']}: its masks would not fit. Correct the entry or remove it."
            )
        found = truths(annotations, height, width, f"{record['path']} of {self.name}", self._counts)
        digest = hashlib.sha256(data)
        for i, rle in enumerate(found.rles):
            point = None if found.points is None else found.points[i].tolist()
            digest.update(b"|" + rle["counts"] + json.dumps(point).encode())
        self._truths.append(found)
        self.sizes.append((height, width))
        self._fingerprints.append(digest.hexdigest())


class Coco(CocoFolder):
    """COCO as it is published: `annotations/instances_val2017.json` and the pictures in `val2017/`.

    path: the folder that holds both, for the validation split; or the annotation file of another split, such as
    `annotations/instances_train2017.json`. Everything else is as in CocoFolder.
    """

    kind, default = "coco", "instances_val2017.json"

    def _locate(self) -> tuple[Path, Path, str]:
        file = _annotation_file(self.path, self.default, self.kind)
        split = file.stem.removeprefix("instances_")
        folders = [
            root / name for root in _roots(file) for name in (split, f"images/{split}", "images")
        ]
        return file, _first_folder(folders, file), f"coco-{split}"


class Lvis(CocoFolder):
    """LVIS v1 as it is published: `lvis_v1_val.json`, and COCO's `train2017/` and `val2017/` with the pictures.

    A split's pictures come from both of COCO's folders (`coco_url` says from which), so an id is `val2017/NAME.jpg`.
    path: the folder that holds the three, for the validation split; or the annotation file of another split.
    Everything else is as in CocoFolder.
    """

    kind, default = "lvis", "lvis_v1_val.json"

    def _locate(self) -> tuple[Path, Path, str]:
        file = _annotation_file(self.path, self.default, self.kind)
        roots = [
            folder for root in _roots(file) for folder in (root, root / "images", root / "coco")
        ]
        found = [
            root for root in roots if (root / "train2017").is_dir() or (root / "val2017").is_dir()
        ]
        return (
            file,
            _first_folder(found or [roots[0] / "val2017"], file),
            file.stem.replace("_", "-"),
        )

    @staticmethod
    def _image_path(record: dict) -> str:
        return "/".join(record["coco_url"].split("/")[-2:])


def _annotation_file(path: Path, default: str, kind: str) -> Path:
    if path.is_file():
        return path
    for file in (path / "annotations" / default, path / default):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"There is no {default} in {path} or its annotations/. Give {kind}: the folder that holds it, or the path of "
        "another annotation file."
    )


def _roots(file: Path) -> list[Path]:
    """Where pictures may lie: beside the annotation file, or beside the folder it is in."""
    return [file.parent, file.parent.parent]


def _first_folder(folders: list[Path], file: Path) -> Path:
    for folder in folders:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"The pictures of {file} are in none of {', '.join(map(str, folders))}."
    )


def _below(name: str) -> str:
    """A path that stays below its folder."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(
            f"The image {name!r} lies outside the folder images/; its file_name must stay below it."
        )
    return str(parts)
