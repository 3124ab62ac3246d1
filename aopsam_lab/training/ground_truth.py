"""Find with a SAM all masks that it can on a folder of photographs, as SA-1B's own masks were made.

    python -m aopsam_lab find-masks PHOTOS --out FOUND --side 32 --workers 2

A grid of SIDE x SIDE points prompts the SAM; the rules of `SamAutomaticMaskGenerator` keep, drop
and merge the masks. The result is one COCO-style folder. Every photograph has a record of its own
in OUT/records, written whole as soon as it is done: a stopped run goes on with the next photograph,
and a run on more photographs adds to the folder.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask
from segment_anything.modeling import Sam
from torchvision.ops import box_iou
from tqdm import tqdm

from aopsam_lab.asf import AsfParams
from aopsam_lab.cluster import add_arguments as cluster_arguments
from aopsam_lab.cluster import connected, see
from aopsam_lab.data import open_dataset
from aopsam_lab.data.images import find_images, read_image
from aopsam_lab.files import write_atomically
from aopsam_lab.pipeline.decode import decode_and_filter, encode, encode_early, remove_duplicates
from aopsam_lab.pipeline.methods import Grid
from aopsam_lab.pipeline.run import LoadedModels, ModelFiles
from aopsam_lab.pipeline.types import BOX_NMS_THRESH, Encoded, Models
from aopsam_lab.sam.zoo import MODELS, first_line, spec_of
from aopsam_lab.training.examples import embedding_file, write_embedding

AT_A_TIME = 64  # prompts decoded before masks that fail are forgotten
Photo = tuple[Path, list[dict]]  # a photograph, and the COCO RLE of masks that people drew of it


@torch.inference_mode()
def find_masks(sam: Sam, encoded: Encoded, side: int) -> list[dict]:
    """COCO annotations of all masks that a SAM gives from a grid of side x side points, best first.

    `point_coords` is the prompt that gave the mask, [x, y] in the image frame, `clicks` all prompts
    of the grid that gave it or a duplicate of it.
    """
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


def _record(photo: Path, out: Path) -> Path:
    return out / "records" / f"{photo.stem}.json"


def _work(models: LoadedModels, job: tuple) -> None:
    """Find the masks of one photograph and write its record."""
    (path, people), out, side, embeddings = job
    encoded = encode(models.sam, read_image(path))
    if embeddings:
        write_embedding(embedding_file(embeddings, path.name), encoded.embedding)
    annotations = [_annotation(rle, "people") for rle in people]
    record = {
        "file_name": path.name,
        "height": encoded.image.shape[0],
        "width": encoded.image.shape[1],
        "annotations": annotations + find_masks(models.sam, encoded, side),
    }
    write_atomically(_record(path, out), json.dumps(record))


def write_folder(photos: list[Path], args: argparse.Namespace) -> None:
    """Gather the records in OUT/annotations.json, with copies of the photographs in OUT/images."""
    images: list[dict] = []
    annotations: list[dict] = []
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    for i, photo in enumerate(sorted(photos, key=lambda photo: photo.name), 1):
        image = json.loads(_record(photo, args.out).read_text())
        for annotation in image.pop("annotations"):
            annotations.append({"id": len(annotations) + 1, "image_id": i, **annotation})
        images.append({"id": i, **image})
        copy = args.out / "images" / photo.name
        if not copy.exists():
            write_atomically(copy, photo.read_bytes())
    about = f"masks that {args.sam} finds from a {args.side} x {args.side} grid"
    content = {
        "info": {"description": about},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }
    write_atomically(args.out / "annotations.json", json.dumps(content))


def photos_of(folder: Path) -> list[Photo]:
    """The photographs of a folder of images, or of a COCO-style folder with its masks."""
    if (folder / "annotations.json").is_file():
        data = open_dataset(folder)
        return [(folder / "images" / name, data[i].rles) for i, name in enumerate(data.ids)]
    paths = find_images([str(folder)])[0] if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"{folder} is no folder with images.")
    return [(path, []) for path in paths]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `find-masks`."""
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="folders of images, or COCO-style folders")
    add("--out", required=True, type=Path, help="the COCO-style folder of the result")
    add("--side", type=int, default=32, help="points along each side of the grid")
    add("--sam", default="mobile_sam", choices=list(MODELS))
    add("--checkpoint", help="weights of the SAM other than the bundled or official ones")
    add("--device", default="auto")
    cluster_arguments(parser)
    add("--embeddings", type=Path, help="folder in which the embeddings are kept, for a training")


def run(args: argparse.Namespace) -> int:
    """The command `find-masks`; 0, or 1 where some photographs failed."""
    photos = [photo for folder in args.folders for photo in photos_of(folder.absolute())]
    todo = [photo for photo in photos if not _record(photo[0], args.out).exists()]
    files, failures = ModelFiles(args.sam, args.checkpoint, device=args.device), []
    out, kept = args.out.absolute(), args.embeddings and args.embeddings.absolute()
    bar = tqdm(desc="finding masks", unit="photo", total=len(todo))
    with connected(args.scheduler, files, files.load()) as crew, bar:
        see(crew, out, (path for path, _ in todo))
        jobs = ((photo, out, args.side, kept) for photo in todo)
        for ((path, _), *_), error in crew.each(_work, jobs):
            bar.update()
            if error is not None:
                failures.append((path, error))
    done = [path for path, _ in photos if _record(path, args.out).exists()]
    write_folder(done, args)
    print(f"{len(done)} of {len(photos)} photographs in {args.out}")
    for path, error in failures:
        print(f"  {path}: {first_line(error)}", file=sys.stderr)
    return 0 if len(done) == len(photos) else 1
