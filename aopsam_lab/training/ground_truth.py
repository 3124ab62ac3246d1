"""Find with a SAM all masks that it can on a folder of photographs, as SA-1B's own masks were made.

    python -m aopsam_lab find-masks PHOTOS --out FOUND --side 32 --workers 2

A grid of SIDE x SIDE points prompts the SAM; the rules of `SamAutomaticMaskGenerator` keep, drop
and merge the masks. The result is one COCO-style folder. Every photograph has a record of its own
in OUT/records, written whole as soon as it is done: a stopped run goes on with the next photograph,
and a run on more photographs adds to the folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from segment_anything.modeling import Sam
from torchvision.ops import box_iou
from tqdm import tqdm

from aopsam_lab.asf import AsfParams
from aopsam_lab.data import open_dataset
from aopsam_lab.data.images import read_image
from aopsam_lab.files import write_atomically
from aopsam_lab.pipeline.decode import decode_and_filter, encode, encode_early, remove_duplicates
from aopsam_lab.pipeline.methods import Grid
from aopsam_lab.pipeline.types import BOX_NMS_THRESH, Models
from aopsam_lab.sam.zoo import MODELS, load_sam, spec_of
from aopsam_lab.training.examples import embedding_file, write_embedding

AT_A_TIME = 64  # prompts decoded before masks that fail are forgotten


class Photo(NamedTuple):
    """A photograph to find masks on, and the COCO RLE of masks that people drew of it."""

    path: Path
    people: list[dict]


@torch.inference_mode()
def find_masks(
    sam: Sam, image: np.ndarray, side: int, embeddings: Path | None = None
) -> list[dict]:
    """Find all masks that a SAM gives from a grid, by the rules of `SamAutomaticMaskGenerator`.

    Args:
        sam: the model.
        image: H x W x 3 uint8, RGB.
        side: points along each side of the grid.
        embeddings: a file to which the embedding is written, or None.

    Returns:
        COCO annotations, the highest predicted IoU first. `point_coords` is the prompt that gave
        the mask, [x, y] in the image frame, `clicks` all prompts of the grid that gave it or a
        duplicate of it.
    """
    encoded = encode(sam, image)
    if embeddings is not None:
        write_embedding(embeddings, encoded.embedding)
    prompts = Grid("grid", side).start(encoded, Models(), AsfParams()).prompts
    parts = []
    for index in torch.arange(len(prompts), device=encoded.embedding.device).split(AT_A_TIME):
        parts.append(decode_and_filter(sam, encoded, prompts, index, spec_of(sam)))
        encode_early(sam, encoded, parts)
    kept = remove_duplicates(sam, encoded, parts)
    if not kept["masks"]:
        return []
    boxes = torch.cat([part.boxes for part in parts]).float()
    overlap = box_iou(boxes, torch.from_numpy(kept["boxes"]).to(boxes.device).float())
    # a mask that was dropped is a duplicate of the surest kept one whose box overlaps it by more
    # than the threshold
    same = (overlap > BOX_NMS_THRESH).int().argmax(1).cpu().numpy()
    owner = torch.cat([part.prompt for part in parts]).cpu().numpy()
    points = prompts.points.cpu().numpy().round(1)
    found = []
    for i, (rle, own) in enumerate(zip(kept["masks"], kept["mask_prompt"], strict=True)):
        about = {
            "predicted_iou": round(float(kept["scores"][i]), 4),
            "stability_score": round(float(kept["stability"][i]), 4),
            "point_coords": [points[own].tolist()],
            "clicks": points[np.unique(np.append(owner[same == i], own))].tolist(),
        }
        found.append(_annotation(rle, "sam") | about)
    return found


def _annotation(rle: dict, source: str) -> dict:
    return {
        "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
        "area": int(coco_mask.area(rle)),
        "bbox": [float(x) for x in coco_mask.toBbox(rle)],
        "iscrowd": 0,
        "category_id": 1,
        "source": source,
    }


_loaded = cache(load_sam)


def _record(photo: Photo, out: Path) -> Path:
    return out / "records" / f"{photo.path.stem}.json"


def _work(args: argparse.Namespace, threads: int, photo: Photo) -> str | None:
    """Find the masks of one photograph and write its record; what went wrong, or None."""
    torch.set_num_threads(threads)
    try:
        sam, image = _loaded(args.sam, args.checkpoint, args.device), read_image(photo.path)
        embedding = args.embeddings and embedding_file(args.embeddings, photo.path.name)
        people = [_annotation(rle, "people") for rle in photo.people]
        record = {
            "file_name": photo.path.name,
            "height": image.shape[0],
            "width": image.shape[1],
            "sam_sha256": spec_of(sam).sha256,
            "side": args.side,
            "annotations": people + find_masks(sam, image, args.side, embedding),
        }
        write_atomically(_record(photo, args.out), json.dumps(record))
    except (ValueError, OSError) as error:
        return str(error)
    return None


def find_on(photos: list[Photo], args: argparse.Namespace) -> list[tuple[Path, str]]:
    """Find the masks of photographs without a record, then write the COCO-style folder.

    Returns:
        The photographs that failed, each with the reason.
    """
    todo = [photo for photo in photos if not _record(photo, args.out).exists()]
    work = partial(_work, args, max(1, torch.get_num_threads() // args.workers))
    pool = ProcessPoolExecutor(args.workers, get_context("spawn")) if args.workers > 1 else None
    try:
        results = pool.map(work, todo) if pool else map(work, todo)
        reasons = list(tqdm(results, desc="finding masks", unit="photo", total=len(todo)))
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    write_folder([photo for photo in photos if _record(photo, args.out).exists()], args)
    return [(photo.path, reason) for photo, reason in zip(todo, reasons, strict=True) if reason]


def write_folder(photos: list[Photo], args: argparse.Namespace) -> None:
    """Gather the records in OUT/annotations.json, with copies of the photographs in OUT/images."""
    images: list[dict] = []
    annotations: list[dict] = []
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    for photo in sorted(photos, key=lambda photo: photo.path.name):
        record = json.loads(_record(photo, args.out).read_text())
        about = {key: record[key] for key in ("file_name", "height", "width")}
        images.append({"id": len(images) + 1, **about})
        for annotation in record["annotations"]:
            annotations.append({"id": len(annotations) + 1, "image_id": len(images), **annotation})
        copy = args.out / "images" / photo.path.name
        if not copy.exists():
            shutil.copyfile(photo.path, copy)
    grid = f"{args.side} x {args.side}"
    content = {
        "info": {"description": f"masks that {args.sam} finds from a {grid} grid"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object", "supercategory": ""}],
    }
    write_atomically(args.out / "annotations.json", json.dumps(content))


def photos_of(folder: Path) -> list[Photo]:
    """The photographs of a folder of images, or of a COCO-style folder with its masks."""
    if (folder / "annotations.json").is_file():
        data = open_dataset(folder)
        return [Photo(folder / "images" / name, data[i].rles) for i, name in enumerate(data.ids)]
    endings = Image.registered_extensions()
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in endings)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no images.")
    return [Photo(path, []) for path in paths]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `find-masks`."""
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="folders of images, or COCO-style folders")
    add("--out", required=True, type=Path, help="the COCO-style folder of the result")
    add("--side", type=int, default=32, help="points along each side of the grid")
    add("--sam", default="mobile_sam", choices=list(MODELS))
    add("--checkpoint", help="weights of the SAM other than the bundled or official ones")
    add("--device", default="auto")
    add("--workers", type=int, default=1, help="processes, on a CPU at most one a core")
    add("--embeddings", type=Path, help="folder in which the embeddings are kept, for a training")
    add("--skip", type=Path, help="text file with names of photographs to leave out, one a line")


def run(args: argparse.Namespace) -> int:
    """The command `find-masks`; 0, or 1 where some photographs failed."""
    skipped = args.skip.read_text().split("\n") if args.skip else []
    given = [photo for folder in args.folders for photo in photos_of(folder)]
    photos = [photo for photo in given if photo.path.name not in skipped]
    failures = find_on(photos, args)
    print(f"{len(photos) - len(failures)} of {len(photos)} photographs in {args.out}")
    for path, reason in failures:
        print(f"  {path}: {reason}", file=sys.stderr)
    return 1 if failures else 0
