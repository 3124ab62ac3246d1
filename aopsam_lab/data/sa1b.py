"""SA-1B as it is published: `sa_*.jpg` with `sa_*.json`, in folders or in tar shards."""

import json
import tarfile
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self

from aopsam_lab.data.image_set import ImageSet, Known


class _Bytes(NamedTuple):
    """Where a file's bytes are: in a file of its own, or in a piece of a tar file."""

    file: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with self.file.open("rb") as source:
            source.seek(self.offset)
            return source.read(self.size)


class Sa1b(ImageSet):
    """Images of SA-1B with their masks and the prompt points these were made from.

    The path is a folder with such files or tar shards, also in folders below it; or one shard. An
    id is the name without ending. An image or a JSON without the other counts as missing.
    """

    name = "sa1b"

    def _find(self) -> dict[str, Known]:
        self._places = {
            file.name: _Bytes(file) for file in self.path.rglob("sa_*.*") if file.is_file()
        }
        shards = [*self.path.rglob("*.tar"), *self.path.rglob("*.tar.gz")]
        for shard in [self.path] if self.path.is_file() else shards:
            self._places |= _members(shard)
        names = {Path(name).stem for name in self._places if name.endswith((".jpg", ".json"))}
        pairs = {name for name in names if {f"{name}.jpg", f"{name}.json"} <= self._places.keys()}
        if not pairs:
            raise FileNotFoundError(
                f"There is no sa_*.jpg with its .json in {self.path}, nor in a .tar there."
            )
        self._counts["missing_images"] = len(names) - len(pairs)
        return {name: partial(self._annotated, name) for name in pairs}

    def alone(self, i: int) -> Self:
        """A set of image i alone, with the place of its file."""
        one, name = super().alone(i), f"{self.ids[i]}.jpg"
        one._places = {name: self._places[name]}
        return one

    def _annotated(self, id: str) -> tuple[dict, list[dict]]:
        content = json.loads(self._places[f"{id}.json"].read())
        return content["image"], content["annotations"]

    def _image_bytes(self, id: str) -> bytes:
        return self._places[f"{id}.jpg"].read()


def _members(shard: Path) -> dict[str, _Bytes]:
    try:
        with tarfile.open(shard, "r:") as archive:
            return {
                PurePosixPath(member.name).name: _Bytes(shard, member.offset_data, member.size)
                for member in archive
            }
    except tarfile.TarError as error:
        with shard.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise ValueError(f"{shard} is compressed: run gunzip on it first.") from error
        broken = f"{shard} is not a whole, uncompressed tar file ({error})"
        raise ValueError(f"{broken}. Download it again.") from error
