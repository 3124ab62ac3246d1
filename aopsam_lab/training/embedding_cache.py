"""Pictures, their SAM embeddings and their targets, computed once and kept on disk for a predictor's training (ours).

The cache is a folder of shards, each a safetensors file of SHARD entries that is there whole or not at all: a run that
was stopped goes on at the first shard that is missing. Entries are read one by one, never mapped as a whole, so memory
does not grow with the cache. Embeddings are float16, targets uint8 of 255 steps, pictures JPEG at quality 95.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor
from tqdm.auto import tqdm

from aopsam_lab.asf import valid_cells
from aopsam_lab.files import write_atomically
from aopsam_lab.sam.zoo import spec_of

SHARD = 64
# Pixels of the model frame through the image encoder at a time: a CPU takes a quarter less time for one picture of 320 pixels
# by itself than for each of ten, whose channels leave its cache
ENCODE_PIXELS = {"cpu": 1 << 17, "cuda": 1 << 20}
JPEG_BITS = 4  # a pixel, about, of a photograph at quality 95: only to say beforehand how much room it takes
AHEAD = 2  # batches read while one is trained on, and pictures while one is encoded
_DTYPES = {"F16": np.float16, "U8": np.uint8, "I64": np.int64}


class Batch(NamedTuple):
    """float32: image (B, 3, S, S) normalised, padded; embedding (B, C, h, w); target, valid (B, 4h, 4w) in [0, 1]."""

    image: Tensor
    embedding: Tensor
    target: Tensor
    valid: Tensor


class EmbeddingCache:
    """`count` entries of one SAM in `folder`.

    key: what the entries were made from. A cache of another key, or of other SAM weights, is made anew.
    """

    def __init__(self, folder: Path, sam: Sam, count: int, key: dict) -> None:
        self.folder, self.count = folder, count
        self.side = sam.image_encoder.img_size
        self.grid = sam.prompt_encoder.mask_input_size
        self.embedding = (sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size)
        self.key = json.loads(json.dumps({**key, "sam": spec_of(sam).sha256, "side": self.side}))
        self._shards: dict[int, dict] = {}

    def megabytes(self) -> dict[str, float]:
        """How much disk the whole cache takes, by part."""
        return {
            "embeddings": self.count * int(np.prod(self.embedding)) * 2 / 1e6,
            "targets": self.count * int(np.prod(self.grid)) / 1e6,
            "pictures": self.count * self.side**2 * JPEG_BITS / 8 / 1e6,
        }

    def fill(
        self, sam: Sam, entry: Callable[[int], tuple[np.ndarray, np.ndarray]], most_gb: float | None = None
    ) -> None:
        """Make the shards that are missing from `entry(row)`: picture (h', w', 3) uint8 in the model frame, unpadded,
        and target (4h, 4w) float32 in [0, 1]. Says first how much disk it takes.

        Raises OSError where that is more than `most_gb` gigabytes or than is free.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "cache.json"
        if not note.exists() or json.loads(note.read_text()) != self.key:
            for shard in self.folder.glob("shard-*.safetensors"):
                shard.unlink()
            write_atomically(note, json.dumps(self.key))
        starts = range(0, self.count, SHARD)
        missing = [first for first in starts if self._entries(first) < min(SHARD, self.count - first)]
        self._check_room(len(missing) / len(starts), most_gb)
        done = self.count - sum(min(SHARD, self.count - first) for first in missing)
        with tqdm(total=self.count, initial=done, desc="embeddings", unit="picture", dynamic_ncols=True) as bar:
            for first in missing:
                self._shards.pop(first, None)
                write_atomically(self._path(first), self._shard(sam, entry, first, bar))

    def batches(self, sam: Sam, indices: Iterable[np.ndarray]) -> Iterator[Batch]:
        """The entries of each index array as a batch on the SAM's device, read ahead by a thread."""
        pin = sam.device.type == "cuda"
        with ThreadPoolExecutor(AHEAD) as readers:
            waiting = deque()
            for index in indices:
                waiting.append(readers.submit(self._read, index, pin))
                if len(waiting) > AHEAD:
                    yield self._on_device(sam, waiting.popleft().result())
            while waiting:
                yield self._on_device(sam, waiting.popleft().result())

    def _path(self, first: int) -> Path:
        return self.folder / f"shard-{first // SHARD:06d}.safetensors"

    def _entries(self, first: int) -> int:
        """How many entries the shard has whose first one is `first`; 0 where it is missing."""
        if first not in self._shards:
            if not self._path(first).exists():
                return 0
            self._shards[first] = _layout(self._path(first))
        return self._shards[first]["sizes"][1][0]

    def _check_room(self, share: float, most_gb: float | None) -> None:
        parts = self.megabytes()
        needed, free = sum(parts.values()) * share / 1e3, shutil.disk_usage(self.folder).free / 1e9
        listed = ", ".join(f"{name} {size / 1e3:.1f} GB" for name, size in parts.items())
        print(
            f"{self.count:,} pictures in {self.folder}: {listed}; {needed:.1f} GB of it still to be made, "
            f"{free:.1f} GB free.",
            flush=True,
        )
        bound = free if most_gb is None else min(free, most_gb)
        if needed > bound:
            fitting = int(self.count * bound / (sum(parts.values()) / 1e3))
            raise OSError(
                f"The cache needs {needed:.1f} GB and may take {bound:.1f} GB. Take fewer pictures (--limit {fitting} "
                "would fit), or another --workdir."
            )

    @torch.inference_mode()
    def _shard(self, sam: Sam, entry: Callable, first: int, bar: tqdm) -> list[bytes | memoryview]:
        """A shard's bytes in pieces. Nothing of it is held twice: the embeddings of a large SAM fill most of the memory."""
        rows = range(first, min(first + SHARD, self.count))
        at_once = max(1, ENCODE_PIXELS.get(sam.device.type, ENCODE_PIXELS["cpu"]) // self.side**2)
        embeddings = np.empty((len(rows), *self.embedding), np.float16)
        targets, sizes, pictures = np.empty((len(rows), *self.grid), np.uint8), [], []
        with closing(_made_ahead(entry, rows, at_once + AHEAD)) as made:
            while some := list(islice(made, at_once)):
                at = len(sizes)
                images = torch.cat([sam.preprocess(_channels_first(image, sam.device)) for image, _ in some])
                embeddings[at : at + len(some)] = sam.image_encoder(images).half().cpu().numpy()
                for image, target in some:
                    options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111]
                    pictures.append(cv2.imencode(".jpg", image[..., ::-1], options)[1].ravel())
                    targets[len(sizes)] = np.rint(target * 255)
                    sizes.append(image.shape[:2])
                bar.update(len(some))
        ends = np.cumsum([len(picture) for picture in pictures], dtype=np.int64)
        arrays = {"sizes": np.array(sizes, np.int64), "ends": ends, "embeddings": embeddings, "targets": targets}
        return [*_safetensors(arrays, {"pictures": int(ends[-1])}), *map(memoryview, pictures)]

    def _read(self, index: np.ndarray, pin: bool) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
        """Pictures (uint8, padded), embeddings (float16), targets (uint8) and sizes of some entries, in main memory."""
        images = np.zeros((len(index), 3, self.side, self.side), np.uint8)
        embeddings = np.empty((len(index), *self.embedding), np.float16)
        targets = np.empty((len(index), *self.grid), np.uint8)
        sizes = np.empty((len(index), 2), np.int64)
        for i, row in enumerate(index):
            first, at = int(row) // SHARD * SHARD, int(row) % SHARD
            if not self._entries(first):
                raise FileNotFoundError(f"{self._path(first)} is missing: fill the cache first.")
            with self._path(first).open("rb") as file:
                embeddings[i], targets[i], sizes[i] = (
                    self._piece(file, first, name, at) for name in ("embeddings", "targets", "sizes")
                )
                start = self._piece(file, first, "ends", at - 1) if at else 0
                size = self._piece(file, first, "ends", at) - start
                data = self._piece(file, first, "pictures", int(start), int(size))
            picture = cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]
            images[i, :, : picture.shape[0], : picture.shape[1]] = picture.transpose(2, 0, 1)
        tensors = [torch.from_numpy(array) for array in (images, embeddings, targets)]
        return (*(tensor.pin_memory() if pin else tensor for tensor in tensors), sizes)

    def _piece(self, file, first: int, name: str, at: int, count: int = 1) -> np.ndarray:
        """Items `at` to `at + count` of one of a shard's arrays; without the leading axis for a single one."""
        dtype, shape, offset = self._shards[first][name]
        items = int(np.prod(shape[1:], dtype=np.int64))
        file.seek(offset + at * items * np.dtype(dtype).itemsize)
        found = np.fromfile(file, dtype, count * items)
        return found if name == "pictures" else found.reshape(shape[1:])

    def _on_device(self, sam: Sam, read: tuple[Tensor, Tensor, Tensor, np.ndarray]) -> Batch:
        device = sam.device
        images, embeddings, targets = (tensor.to(device, non_blocking=True) for tensor in read[:3])
        square = (self.side, self.side)
        inside = torch.stack([valid_cells(tuple(size), self.side, square, device) for size in read[3]])
        valid = torch.stack([valid_cells(tuple(size), self.side, self.grid, device) for size in read[3]])
        image = images.float()  # 12.6 MB a picture of 1024 pixels: worked on in place
        image.sub_(sam.pixel_mean).div_(sam.pixel_std).mul_(inside[:, None])
        return Batch(image, embeddings.float(), targets.float() / 255, valid.float())


def _channels_first(image: np.ndarray, device: torch.device) -> Tensor:
    """(h', w', 3) uint8 -> (1, 3, h', w') on the device."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(device)[None]


def _made_ahead(entry: Callable, rows: Iterable[int], ahead: int) -> Iterator:
    """`entry(row)` of each row in order, by two threads, while earlier ones are used; at most `ahead` are kept."""
    with ThreadPoolExecutor(2) as makers:
        waiting = deque()
        for row in rows:
            waiting.append(makers.submit(entry, row))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _safetensors(arrays: dict[str, np.ndarray], then: dict[str, int]) -> list[bytes | memoryview]:
    """The pieces of a safetensors file, the arrays as they lie in memory; `then`: bytes by name that are to follow."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header, at = {}, 0
    pieces = [(name, names[array.dtype.type], array.shape, array.nbytes) for name, array in arrays.items()]
    for name, dtype, shape, size in [*pieces, *((name, "U8", (size,), size) for name, size in then.items())]:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the arrays begin at a multiple of eight
    return [len(text).to_bytes(8, "little"), text, *(memoryview(array).cast("B") for array in arrays.values())]


def _layout(path: Path) -> dict[str, tuple[type, tuple[int, ...], int]]:
    """By name: type, shape, and where in the file the array begins (safetensors: 8 bytes of length, JSON, arrays)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: (_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }
