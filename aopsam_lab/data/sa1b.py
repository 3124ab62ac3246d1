"""SA-1B as it is published: `sa_*.jpg`, each with a `.json`, in folders or in tar shards that stay packed."""

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

from aopsam_lab.data.annotations import LEFT_OUT, GroundTruth, order, truths, upright_size
from aopsam_lab.data.sample import Sample
from aopsam_lab.data.images import read_image


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
    """Pictures of SA-1B with their masks and the prompt points these were made from.

    path:     a folder with `sa_*.jpg` and `sa_*.json`, with tar shards (`sa_000000.tar`), or with both, also in folders
              below it; or one shard. A shard is read where it lies: opening reads its headers (a second or two for its
              11,000 pictures), a sample reads two pieces of it.
    n_images: how many to take, None for all; where there are fewer, all.
    seed:     which, ordered by a hash of the seed and the picture's name: the same everywhere, whatever the order on
              the disk and whether packed or not, and fewer are a part of more.

    An id is the name without ending. A picture without its JSON, or the other way round, is left out before the n are
    chosen, and of a name that is there twice the first is taken (files before shards, by path). Both are counted, as is
    what `aopsam_lab.data.annotations.truths` leaves out. Nothing of a sample is kept once it has been read.

    Raises FileNotFoundError where there is no picture, ValueError for a damaged shard, a JSON that is not SA-1B's, and
    a picture or mask that does not have the size that the JSON says.
    """

    name = "sa1b"

    def __init__(self, path: str | os.PathLike, n_images: int | None = None, seed: int = 0) -> None:
        self.path = Path(path)
        images, notes, self._duplicates = _index(self.path)
        whole = images.keys() & notes.keys()
        if not whole:
            raise FileNotFoundError(
                f"There is no sa_*.jpg with its .json in {self.path}, nor in a .tar there."
            )
        self._available = len(whole)
        self._missing_images, self._missing_notes = (
            len(notes.keys() - whole),
            len(images.keys() - whole),
        )
        self.ids = sorted(whole, key=lambda name: order(seed, name))[:n_images]
        self._images = [images[name] for name in self.ids]
        self._notes = [notes[name] for name in self.ids]
        self._fingerprints: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Sample:
        """Read sample i: its masks in the order of the file, a point for each."""
        data = self._images[i].read()
        rles, points, _ = self._truths(i, data, Counter())
        try:
            image = read_image(Image.open(io.BytesIO(data)))
        except OSError as error:
            raise ValueError(
                f"{self.ids[i]} of {self.path} is damaged: {error}. Download it again."
            ) from error
        return Sample(self.ids[i], image, points=points, rles=rles)

    def sample_fingerprint(self, i: int) -> str:
        """A hash of the bytes of picture i and of its JSON; read when first asked for."""
        if i not in self._fingerprints:
            digest = hashlib.sha256(self._images[i].read())
            digest.update(self._notes[i].read())
            self._fingerprints[i] = digest.hexdigest()
        return self._fingerprints[i]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all samples' bytes; read when first asked for."""
        return hashlib.sha256(
            "\n".join(map(self.sample_fingerprint, range(len(self)))).encode()
        ).hexdigest()

    def describe(self) -> dict[str, str | int]:
        """Name, fingerprint and counts, as CocoFolder's; the images taken are all read for it."""
        left_out: Counter[str] = Counter()
        masks = [
            len(self._truths(i, self._images[i].read(), left_out).rles) for i in range(len(self))
        ]
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

    def _truths(self, i: int, image: bytes, left_out: Counter[str]) -> GroundTruth:
        where = f"{self.ids[i]} of {self.path}"
        height, width = upright_size(image, where)
        try:
            content = json.loads(self._notes[i].read())
            said = content["image"]["height"], content["image"]["width"]
            annotations = content["annotations"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"The JSON of {where} is not SA-1B's: {type(error).__name__} {error}."
            ) from error
        if said != (height, width):
            raise ValueError(
                f"{where} is {width} x {height} pixels, but its JSON says {said[1]} x {said[0]}."
            )
        return truths(annotations, height, width, where, left_out)


def _index(path: Path) -> tuple[dict[str, _Bytes], dict[str, _Bytes], int]:
    """Pictures and JSON files by name without ending, and how many names of pictures were there again."""
    images: dict[str, _Bytes] = {}
    notes: dict[str, _Bytes] = {}
    if path.is_file():
        files, shards = [], [path]
    else:
        files = sorted(file for file in path.rglob("sa_*.*") if file.suffix in (".jpg", ".json"))
        shards = sorted(path.rglob("*.tar"))
    members = [(file.name, _Bytes(file)) for file in files]
    for shard in shards:
        members += _members(shard)
    again = 0
    for name, where in members:
        stem, _, ending = name.rpartition(".")
        known = images if ending == "jpg" else notes
        again += ending == "jpg" and stem in known
        known.setdefault(stem, where)
    return images, notes, again


def _members(shard: Path) -> list[tuple[str, _Bytes]]:
    """Names and places of a shard's pictures and JSON files."""
    found = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if member.isfile() and name.startswith("sa_") and name.endswith((".jpg", ".json")):
                    found.append((name, _Bytes(shard, member.offset_data, member.size)))
                archive.members = []  # tarfile would keep them all
    except tarfile.TarError as error:
        raise ValueError(
            f"{shard} is not a whole, uncompressed tar file ({error}). Download it again."
        ) from error
    return found
