"""Whether COCO's loader gives pycocotools' masks, and what it takes to open and read a data set as large as COCO's."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

from aopsam_lab.data.coco import Coco, CocoFolder

HEIGHT, WIDTH = 480, 640
JPEG_BYTES = 163_000  # the mean of val2017
ANNOTATIONS_EACH, CROWD_SHARE = 36_781 / 5000, 0.012  # val2017's
CORNERS = 26  # of an outline, about
COMPARED = 200  # made-up pictures whose masks are compared: they are polygons
WARM_UP = 200  # pictures read before the memory is first looked at


def compare_masks(dataset: CocoFolder, file: Path) -> tuple[int, int]:
    """(masks, how many of them differ by a pixel or more from what pycocotools makes of the same annotation file)."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools says what it does
        oracle = COCO(str(file))
    numbers = {record["file_name"]: number for number, record in oracle.imgs.items()}
    masks = different = 0
    for i in range(len(dataset)):
        sample = dataset[i]
        entries = oracle.loadAnns(oracle.getAnnIds(imgIds=numbers[sample.id], iscrowd=False))
        expected = [mask for mask in map(oracle.annToMask, entries) if mask.any()]
        found = sample.masks
        if len(found) != len(expected):
            raise RuntimeError(f"{sample.id} has {len(found)} masks here and {len(expected)} by pycocotools")
        masks += len(found)
        different += sum(not np.array_equal(ours, theirs) for ours, theirs in zip(found, expected))
    return masks, different


def write_coco(folder: Path, pictures: int, seed: int = 0) -> Path:
    """A made-up data set in COCO's layout: as many annotations a picture and bytes a file as val2017 has; its JSON."""
    rng = np.random.default_rng(seed)
    noise = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(noise, "jpeg", quality=35)
    data = noise.getvalue()
    data += bytes(max(0, JPEG_BYTES - len(data)))  # what follows the end of a JPEG is passed over
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for i in range(pictures):
        name = f"{i:012}.jpg"
        (folder / "val2017" / name).write_bytes(data)
        images.append({"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH})
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    for n in range(round(pictures * ANNOTATIONS_EACH)):
        crowd = n < pictures * ANNOTATIONS_EACH * CROWD_SHARE
        radius = rng.uniform(4, 120) * rng.uniform(0.7, 1.3, CORNERS)
        x = np.clip(rng.uniform(0, WIDTH) + radius * np.cos(angles), 0, WIDTH)
        y = np.clip(rng.uniform(0, HEIGHT) + radius * np.sin(angles), 0, HEIGHT)
        outline = np.stack([x, y], 1).ravel().round(2).tolist()
        region = {"size": [HEIGHT, WIDTH], "counts": [1000, 200, HEIGHT * WIDTH - 1200]}
        annotations.append(
            {
                "id": n,
                "image_id": int(rng.integers(pictures)),
                "category_id": 1,
                "iscrowd": int(crowd),
                "area": 1.0,
                "bbox": [0.0, 0.0, 1.0, 1.0],
                "segmentation": region if crowd else [outline],
            }
        )
    file = folder / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}))
    return file


def read_all(folder: Path) -> dict[str, float]:
    """Open a COCO folder and read every sample once.

    open_s: seconds until it is open, every picture's bytes hashed and every outline drawn; open_cpu_s: of work in it,
    which is less where others use the machine. each_ms: of a sample, its
    picture and masks decoded. grown_mb: by how much the process's peak grew from the first WARM_UP samples to the last.
    """
    start, work = time.perf_counter(), time.process_time()
    dataset = Coco(folder)
    opened, work = time.perf_counter(), time.process_time() - work
    masks = 0
    early = 0
    for i in range(len(dataset)):
        masks += len(dataset[i].masks)
        if i == min(WARM_UP, len(dataset) - 1):
            early = _peak_mb()
    read = time.perf_counter()
    return {
        "open_s": opened - start,
        "open_cpu_s": work,
        "each_ms": 1e3 * (read - opened) / len(dataset),
        "grown_mb": _peak_mb() - early,
        "peak_mb": _peak_mb(),
        "masks": masks,
        "images": len(dataset),
    }


def _print_compared(dataset: CocoFolder, file: Path) -> bool:
    masks, different = compare_masks(dataset, file)
    print(f"{dataset.name}: {masks:,} masks of {len(dataset)} pictures, {different} differ from pycocotools'.", flush=True)
    return different == 0


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def report(folders: list[Path], pictures: int, scratch: Path) -> bool:
    """Print how the masks of `folders` compare, and what a made-up COCO of `pictures` in `scratch` takes; whether all
    masks are equal."""
    equal = True
    for folder in folders:
        equal &= _print_compared(CocoFolder(folder), folder / "annotations.json")
    file = write_coco(scratch, pictures)
    equal &= _print_compared(Coco(scratch, min(pictures, COMPARED)), file)
    size = file.stat().st_size / 1e6
    found = read_all(scratch)
    print(
        f"A COCO of {found['images']:,} pictures and {found['masks']:,} masks ({size:.0f} MB of JSON) opens in "
        f"{found['open_s']:.1f} s ({found['open_cpu_s']:.1f} s of work). Reading all takes {found['each_ms']:.1f} ms a sample, in which the process's peak "
        f"grows by {found['grown_mb']:.0f} MB from sample {WARM_UP} on ({found['peak_mb']:.0f} MB in all)."
    )
    return equal
