"""Find with a SAM all masks that it can on a folder of photographs, as SA-1B's own masks were made.

    python -m aopsam_lab find-masks PHOTOS --out FOUND --side 32 --workers 2

A grid of ``side * side`` points prompts the SAM; `SamAutomaticMaskGenerator`'s rules keep, drop and
merge the masks. The result is one COCO-style folder. Every photograph has a record of its own in
``OUT/records``, written whole as soon as it is done: a stopped run goes on with the next
photograph, and a run on more photographs adds to the folder.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask
from segment_anything.modeling import Sam
from torchvision.ops import box_iou
from tqdm import tqdm

from aopsam_lab.asf import AsfParams
from aopsam_lab.data import open_dataset
from aopsam_lab.pipeline.decode import decode_and_filter, encode, encode_early, remove_duplicates
from aopsam_lab.files import write_atomically
from aopsam_lab.data.images import read_image
from aopsam_lab.pipeline.methods import Grid
from aopsam_lab.pipeline.types import BOX_NMS_THRESH, Models
from aopsam_lab.sam.zoo import MODELS, load_sam, spec_of

PEOPLE, FOUND = "people", "sam"  # the source of an annotation
AT_A_TIME = 64  # prompts decoded before masks that fail are forgotten


@dataclass(frozen=True)
class Photo:
    """A photograph to find masks on. people: the RLE of the masks that people drew of it, perhaps
    none."""

    path: Path
    people: tuple[dict, ...] = ()


@dataclass(frozen=True)
class Search:
    """How masks are found.

    sam, checkpoint, device: as `load_sam` takes them. side: points along each side of the grid.
    out: the folder of the result. embeddings: where each photograph's embedding is kept as float16,
        or None.
    """

    sam: str
    checkpoint: str | None
    device: str
    side: int
    out: Path
    embeddings: Path | None = None

    def record(self, photo: Photo) -> Path:
        """The file that holds what was found on a photograph."""
        return self.out / "records" / f"{photo.path.stem}.json"


@torch.inference_mode()
def find_masks(
    sam: Sam, image: np.ndarray, side: int, embeddings: Path | None = None
) -> list[dict]:
    """All masks that a SAM finds from a grid of points, with `SamAutomaticMaskGenerator`'s rules.

    Args:
        sam: the model, with its thresholds in ``.spec``.
        image: H x W x 3 uint8, RGB.
        side: points along each side of the grid.
        embeddings: a file to which the embedding (C x h x w, float16) is written, or None.

    Returns:
        A list of COCO annotations, the highest predicted IoU first. Beside COCO's keys each has
        ``predicted_iou``, ``stability_score``, ``point_coords`` (the prompt that gave the mask, one
        ``[x, y]`` in the image frame), and ``clicks`` (all prompts of the grid that gave this mask
        or a duplicate of it).
    """
    encoded = encode(sam, image)
    if embeddings is not None:
        write_atomically(embeddings, _npy(encoded.embedding[0].half().cpu().numpy()))
    prompts = Grid("grid", side).start(encoded, Models(), AsfParams()).prompts
    parts = []
    for index in torch.arange(len(prompts), device=encoded.embedding.device).split(AT_A_TIME):
        parts.append(decode_and_filter(sam, encoded, prompts, index, spec_of(sam)))
        encode_early(sam, encoded, parts)
    kept = remove_duplicates(sam, encoded, parts)
    if not kept["masks"]:
        return []
    boxes, owner = (
        torch.cat([part.boxes for part in parts]).float(),
        torch.cat([part.prompt for part in parts]),
    )
    overlap = box_iou(boxes, torch.from_numpy(kept["boxes"]).to(boxes.device).float())
    # a mask that was dropped is a duplicate of the surest kept one whose box overlaps it by more
    # than the threshold
    same = (overlap > BOX_NMS_THRESH).int().argmax(1).cpu().numpy()
    points, owner = prompts.points.cpu().numpy().round(1), owner.cpu().numpy()
    found = []
    for i, rle in enumerate(kept["masks"]):
        own = kept["mask_prompt"][i]
        clicks = np.unique(np.append(owner[same == i], own))
        found.append(
            {
                **_annotation(rle, FOUND),
                "predicted_iou": round(float(kept["scores"][i]), 4),
                "stability_score": round(float(kept["stability"][i]), 4),
                "point_coords": [points[own].tolist()],
                "clicks": points[clicks].tolist(),
            }
        )
    return found


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _annotation(rle: dict, source: str) -> dict:
    counts = rle["counts"]
    return {
        "segmentation": {
            "size": list(rle["size"]),
            "counts": counts.decode() if isinstance(counts, bytes) else counts,
        },
        "area": int(coco_mask.area(rle)),
        "bbox": [float(x) for x in coco_mask.toBbox(rle)],
        "iscrowd": 0,
        "category_id": 1,
        "source": source,
    }


_SAM: dict[Search, Sam] = {}


def _work(search: Search, photo: Photo, threads: int | None) -> None:
    """Find the masks of one photograph and write its record."""
    if search not in _SAM:
        if threads:
            torch.set_num_threads(threads)
        _SAM[search] = load_sam(search.sam, search.checkpoint, search.device)
    sam, image = _SAM[search], read_image(photo.path)
    embeddings = search.embeddings and search.embeddings / f"{photo.path.stem}.npy"
    record = {
        "file_name": photo.path.name,
        "height": image.shape[0],
        "width": image.shape[1],
        "sam_sha256": spec_of(sam).sha256,
        "side": search.side,
        "annotations": [_annotation(rle, PEOPLE) for rle in photo.people]
        + find_masks(sam, image, search.side, embeddings),
    }
    write_atomically(search.record(photo), json.dumps(record))


def find_on(photos: list[Photo], search: Search, workers: int = 1) -> list[tuple[Path, str]]:
    """Find the masks of every photograph that has no record yet, then write the COCO-style folder.

    Args:
        photos: what to look at.
        search: how, and where to.
        workers: processes; on a CPU each uses its share of the cores.

    Returns:
        The photographs that could not be read or segmented, each with the reason.
    """
    todo = [photo for photo in photos if not search.record(photo).exists()]
    failures: list[tuple[Path, str]] = []
    with tqdm(
        total=len(photos), initial=len(photos) - len(todo), desc="finding masks", unit="photo"
    ) as bar:
        if workers == 1:
            for photo in todo:
                try:
                    _work(search, photo, None)
                except (ValueError, OSError) as error:
                    failures.append((photo.path, str(error)))
                bar.update()
        elif todo:
            threads = max(1, torch.get_num_threads() // workers)
            with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
                jobs = {pool.submit(_work, search, photo, threads): photo for photo in todo}
                for job in as_completed(jobs):
                    if isinstance(job.exception(), (ValueError, OSError)):
                        failures.append((jobs[job].path, str(job.exception())))
                    else:
                        job.result()
                    bar.update()
    write_folder([photo for photo in photos if search.record(photo).exists()], search)
    return failures


def write_folder(photos: Iterable[Photo], search: Search) -> Path:
    """Gather the records in ``OUT/annotations.json``, with copies of the photographs in
    ``OUT/images``; its path."""
    images, annotations = [], []
    (search.out / "images").mkdir(parents=True, exist_ok=True)
    for photo in sorted(photos, key=lambda photo: photo.path.name):
        record = json.loads(search.record(photo).read_text())
        images.append(
            {
                "id": len(images) + 1,
                **{key: record[key] for key in ("file_name", "height", "width")},
            }
        )
        for annotation in record["annotations"]:
            annotations.append({"id": len(annotations) + 1, "image_id": len(images), **annotation})
        copy = search.out / "images" / photo.path.name
        if not copy.exists():
            shutil.copyfile(photo.path, copy)
    grid = f"{search.side} x {search.side}"
    content = {
        "info": {"description": f"masks that {search.sam} finds from a {grid} grid"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object", "supercategory": ""}],
    }
    return write_atomically(search.out / "annotations.json", json.dumps(content))


def photos_of(folder: Path) -> list[Photo]:
    """The photographs of a folder of images, or of a COCO-style folder with what people labelled.

    Raises FileNotFoundError where there is no such folder or no image in it.
    """
    if (folder / "annotations.json").is_file():
        data = open_dataset(folder)
        return [
            Photo(folder / "images" / name, tuple(data[i].rles)) for i, name in enumerate(data.ids)
        ]
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    endings = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in endings)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no images ({', '.join(sorted(endings))}).")
    return [Photo(path) for path in paths]


def _in_turn(lists: list[list[Photo]]) -> list[Photo]:
    """Photographs of several folders, in proportion: what a stopped run has done is then a sample
    of all of them."""
    places = [
        ((i + 0.5) / len(photos), n, i)
        for n, photos in enumerate(lists)
        for i in range(len(photos))
    ]
    return [lists[n][i] for _, n, i in sorted(places)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `find-masks`."""
    parser.add_argument(
        "folders", nargs="+", type=Path, help="folders of images, or COCO-style folders"
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="the COCO-style folder of the result"
    )
    parser.add_argument("--side", type=int, default=32, help="points along each side of the grid")
    parser.add_argument("--sam", default="mobile_sam", choices=list(MODELS))
    parser.add_argument(
        "--checkpoint", help="weights of the SAM other than the bundled or official ones"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes, on a CPU at most one a core"
    )
    parser.add_argument(
        "--embeddings", type=Path, help="folder in which the embeddings are kept, for a training"
    )
    parser.add_argument(
        "--limit",
        type=int,
        help="how many photographs of each folder, taken evenly; all if not given",
    )
    parser.add_argument(
        "--skip", type=Path, help="text file with names of photographs to leave out, one a line"
    )


def run(args: argparse.Namespace) -> int:
    """The command `find-masks`; 0, or 1 where some photographs failed."""
    skipped = set(args.skip.read_text().split("\n")) if args.skip else set()
    lists = []
    for folder in args.folders:
        photos = [photo for photo in photos_of(folder) if photo.path.name not in skipped]
        lists.append(
            photos[:: max(1, len(photos) // args.limit)][: args.limit] if args.limit else photos
        )
    photos = _in_turn(lists)
    search = Search(args.sam, args.checkpoint, args.device, args.side, args.out, args.embeddings)
    failures = find_on(photos, search, args.workers)
    print(f"{len(photos) - len(failures)} of {len(photos)} photographs in {args.out}")
    for path, reason in failures:
        print(f"  {path}: {reason}", file=sys.stderr)
    return 1 if failures else 0
