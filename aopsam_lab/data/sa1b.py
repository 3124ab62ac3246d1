"""SA-1B as it is published: `sa_*.jpg` with `sa_*.json`, in folders or in tar shards."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from PIL import Image

from aopsam_lab.data.annotations import LEFT_OUT, GroundTruth, ground_truth, order, upright_size
from aopsam_lab.data.images import read_image
from aopsam_lab.data.sample import Sample


@dataclass(frozen=True)
class _Bytes:
    """Where some file's bytes are: in a file of its own, or in a piece of a tar file."""

    file: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with self.file.open("rb") as source:
            source.seek(self.offset)
            data = source.read(self.size)
        if self.size >= 0 and len(data) < self.size:
            raise ValueError(f"{self.file} is cut short. Download it again.")
        return data


class Sa1b:
    """Images of SA-1B with their masks and the prompt points these were made from.

    An id is the name without ending. An image without its JSON, or the other way round, is left out
    before the n are chosen, and of a name that is there twice the first is taken (files before
    shards, by path). Both are counted, as is what `ground_truth` leaves out. Nothing of a sample is
    kept once it has been read.

    Args:
        path: a folder with `sa_*.jpg` and `sa_*.json`, with tar shards (`sa_000000.tar`), or with
            both, also in folders below it; or one shard. A shard is read where it lies: opening
            reads its headers, a sample two pieces of it.
        n_images: how many to take, None for all; where there are fewer, all.
        seed: which, ordered by a hash of the seed and the image's name: the same on every disk,
            packed or not, and fewer are a part of more.

    Raises:
        FileNotFoundError: there is no image.
        ValueError: a shard is damaged, a JSON is not SA-1B's, or an image or mask does not have the
            size that the JSON says.
    """

    name = "sa1b"

    def __init__(self, path: str | os.PathLike, n_images: int | None = None, seed: int = 0) -> None:
        self.path = Path(path)
        images, notes, self._duplicates = _index(self.path)
        whole = images.keys() & notes.keys()
        if not whole:
            where = f"{self.path}, nor in a .tar there"
            raise FileNotFoundError(f"There is no sa_*.jpg with its .json in {where}.")
        self._available = len(whole)
        self._missing_images = len(notes.keys() - whole)
        self._missing_notes = len(images.keys() - whole)
        self.ids = sorted(whole, key=lambda name: order(seed, name))[:n_images]
        self._images = [images[name] for name in self.ids]
        self._notes = [notes[name] for name in self.ids]
        self._fingerprints: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Sample:
        """Read sample i: its masks in the order of the file, a point for each."""
        data = self._images[i].read()
        rles, points, _ = self._ground_truth(i, data, Counter())
        try:
            image = read_image(Image.open(io.BytesIO(data)))
        except OSError as error:
            where = f"{self.ids[i]} of {self.path}"
            raise ValueError(f"{where} is damaged: {error}. Download it again.") from error
        return Sample(self.ids[i], image, points=points, rles=rles)

    def sample_fingerprint(self, i: int) -> str:
        """A hash of the bytes of image i and of its JSON; read when first asked for."""
        if i not in self._fingerprints:
            digest = hashlib.sha256(self._images[i].read())
            digest.update(self._notes[i].read())
            self._fingerprints[i] = digest.hexdigest()
        return self._fingerprints[i]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all samples' bytes; read when first asked for."""
        prints = map(self.sample_fingerprint, range(len(self)))
        return hashlib.sha256("\n".join(prints).encode()).hexdigest()

    def describe(self) -> dict[str, str | int]:
        """Name, fingerprint and counts, as CocoFolder's; the images taken are all read for it."""
        left_out: Counter[str] = Counter()
        truth = (self._ground_truth(i, x.read(), left_out) for i, x in enumerate(self._images))
        masks = [len(found.rles) for found in truth]
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "images": len(self),
            "images_available": self._available,
            "masks": sum(masks),
            "images_without_masks": masks.count(0),
            "missing_images": self._missing_images,
            "missing_annotation_files": self._missing_notes,
            "duplicate_images": self._duplicates,
            **{key: left_out[key] for key in LEFT_OUT},
        }

    def _ground_truth(self, i: int, image: bytes, left_out: Counter[str]) -> GroundTruth:
        where = f"{self.ids[i]} of {self.path}"
        height, width = upright_size(image, where)
        try:
            content = json.loads(self._notes[i].read())
            said = content["image"]["height"], content["image"]["width"]
            annotations = content["annotations"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__} {error}"
            raise ValueError(f"The JSON of {where} is not SA-1B's: {reason}.") from error
        if said != (height, width):
            sizes = f"{width} x {height} pixels, but its JSON says {said[1]} x {said[0]}"
            raise ValueError(f"{where} is {sizes}.")
        return ground_truth(annotations, height, width, where, left_out)


def _index(path: Path) -> tuple[dict[str, _Bytes], dict[str, _Bytes], int]:
    """Images and JSON files by name without ending, and how many images were there again."""
    if path.is_file():
        files, shards = [], [path]
    else:
        files = sorted(file for file in path.rglob("sa_*.*") if file.suffix in (".jpg", ".json"))
        shards = sorted(path.rglob("*.tar"))
    places = [(file.name, _Bytes(file)) for file in files]
    for shard in shards:
        places += _members(shard)
    by_ending: dict[str, dict[str, _Bytes]] = {"jpg": {}, "json": {}}
    for name, where in places:
        stem, _, ending = name.rpartition(".")
        by_ending[ending].setdefault(stem, where)
    images = by_ending["jpg"]
    again = sum(name.endswith(".jpg") for name, _ in places) - len(images)
    return images, by_ending["json"], again


def _members(shard: Path) -> list[tuple[str, _Bytes]]:
    """Names and places of a shard's images and JSON files."""
    found = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if member.isfile() and name.startswith("sa_") and name.endswith((".jpg", ".json")):
                    found.append((name, _Bytes(shard, member.offset_data, member.size)))
                archive.members = []  # tarfile would keep them all
    except tarfile.TarError as error:
        message = f"{shard} is not a whole, uncompressed tar file ({error})"
        raise ValueError(f"{message}. Download it again.") from error
    return found
