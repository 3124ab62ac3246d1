"""Images with a COCO-style annotation file: any folder, COCO itself, LVIS; classes ignored."""

import json
import warnings
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

from aopsam_lab.data.image_set import ImageSet, Known, expected_format, ground_truth

SOURCE = "sam"  # the `source` of an annotation that a SAM found


class CocoFolder(ImageSet):
    """A folder with `images/` and `annotations.json`; an id is the image's `file_name`."""

    def _find(self) -> dict[str, Known]:
        file, self._root, self.name = self._locate()
        images, annotations, self._counts["annotations_of_no_image"] = _read(file)
        known: dict[str, Known] = {}
        for what in (lambda image: image["id"], self._image_path):
            for value, n in Counter(map(what, images)).most_common(1):
                if n > 1:
                    raise ValueError(f"{file} lists {n} images as {value!r}; each needs its own.")
        for image in images:
            id = self._image_path(image)
            if Path(id).is_absolute() or ".." in Path(id).parts:
                raise ValueError(f"The image {id!r} of {file} lies outside the folder.")
            if (self._root / id).is_file():
                known[id] = partial(lambda image: (image, annotations[image["id"]]), image)
        if not known:
            none = f"None of the {len(images)} images that {file} names"
            raise FileNotFoundError(f"{none} is in {self._root}.")
        self._counts["missing_images"] = len(images) - len(known)
        return known

    def _image_bytes(self, id: str) -> bytes:
        return (self._root / id).read_bytes()

    def _locate(self) -> tuple[Path, Path, str]:
        """The annotation file, the folder that image paths start from, the data set's name."""
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"There is no folder {self.path}. A data set is 'photos' or a COCO-style "
                "folder, or coco:PATH, lvis:PATH or sa1b:PATH."
            )
        file = self.path / "annotations.json"
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} has no annotations.json beside images/.")
        return file, self.path / "images", self.path.resolve().name

    @staticmethod
    def _image_path(image: dict) -> str:
        return image["file_name"]


class Coco(CocoFolder):
    """COCO as published: the folder with `annotations/` and `val2017/`, or a split's `.json`."""

    def _locate(self) -> tuple[Path, Path, str]:
        file = _annotation_file(self.path, "instances_val2017.json", "coco")
        split = file.stem.removeprefix("instances_")
        names = (split, f"images/{split}", "images")
        folders = [root / name for root in file.parents[:2] for name in names]
        return file, _first_folder(folders, file), f"coco-{split}"


class Lvis(CocoFolder):
    """LVIS v1 as published: the folder with `lvis_v1_val.json`, or the `.json` of another split.

    A split's images come from both of COCO's folders, so an id is `val2017/NAME.jpg`.
    """

    def _locate(self) -> tuple[Path, Path, str]:
        file = _annotation_file(self.path, "lvis_v1_val.json", "lvis")
        roots = [root / name for root in file.parents[:2] for name in ("", "images", "coco")]
        folders = [root / part for root in roots for part in ("train2017", "val2017")]
        return file, _first_folder(folders, file).parent, file.stem.replace("_", "-")

    @staticmethod
    def _image_path(image: dict) -> str:
        return "/".join(image["coco_url"].split("/")[-2:])


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


def _read(file: Path) -> tuple[list[dict], dict[int, list[dict]], int]:
    """The images of a file, their annotations by image id, and how many are of no image."""
    annotations: dict[int, list[dict]] = defaultdict(list)
    with expected_format(file):
        content = json.loads(file.read_text(encoding="utf-8"))
        for annotation in content["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
        listed = {image["id"] for image in content["images"]}
        lost = sum(len(own) for id, own in annotations.items() if id not in listed)
    if lost:
        which = "belong to no image that it lists (image_id, id) and are left out"
        warnings.warn(f"{lost} annotations of {file} {which}.", stacklevel=2)
    return content["images"], annotations, lost


def found_masks(dataset: ImageSet) -> dict[str, list[dict]] | None:
    """Read the masks that a SAM found on a data set: `found.json`, beside `annotations.json`.

    Returns:
        For each id COCO RLE in the order of the file; or None where the data set is no COCO-style
        folder or has no such file. Annotations whose `source` is not "sam" are left out.
    """
    file = dataset.path / "found.json" if isinstance(dataset, CocoFolder) else None
    if file is None or not file.is_file():
        return None
    images, annotations, _ = _read(file)
    by_name = {image["file_name"]: annotations[image["id"]] for image in images}
    found = {}
    for name, size in zip(dataset.ids, dataset.sizes, strict=True):
        if name not in by_name:
            advice = "Find the masks of this image too, or remove the file."
            raise ValueError(f"{file} does not list {name!r}. {advice}")
        by_sam = [one for one in by_name[name] if one.get("source", SOURCE) == SOURCE]
        found[name] = ground_truth(by_sam, size, f"{name} in {file}", Counter())[0]
    return found
