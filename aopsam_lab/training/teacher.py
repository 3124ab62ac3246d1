"""Objects that nobody labelled, as a larger SAM finds them on training photographs (ours).

    python -m aopsam_lab.training.teacher --pool POOLS/coco --out POOLS/coco_found --sam mobile_sam

Photographs with masks are few, and of most only some objects are labelled: a network knows those by heart before it has learnt
what an object is. An official SAM, prompted where tiny's Prompt Predictor is surest, finds others. The new pool has the same
photographs with their labelled masks and these, and any of the trainings here takes it in the place of the old one. Nothing in
`make train` needs it. An entry is there whole or not at all: killed and started again, it goes on at the first missing one.

On one core (without AVX-512) MobileSAM takes about ten seconds a photograph, half of them for its embedding.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from segment_anything.modeling import Sam

from aopsam_lab.asf import AsfParams
from aopsam_lab.data.sample import Sample
from aopsam_lab.decoding import decode_and_filter, encode, remove_duplicates
from aopsam_lab.evaluator import iou_matrix
from aopsam_lab.methods import METHODS, Models, Prompts
from aopsam_lab.predictor import PromptPredictor, load_predictor
from aopsam_lab.rle import decode_rle, encode_rle
from aopsam_lab.sam.zoo import load_sam, spec_of
from aopsam_lab.training.pool import entries, fill_pool, read_entry

PROMPTS = 80  # a photograph
LABELLED = 0.5  # IoU with a labelled mask from which on a found one is no news


@torch.inference_mode()
def found_objects(teacher: Sam, scout: Sam, predictor: PromptPredictor, image: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """Masks (N, H, W) bool of objects that ``labelled`` (M, H, W) lacks: the teacher's, filtered as all masks here are.

    image: (H, W, 3) uint8. scout, predictor: the SAM that the Prompt Predictor was trained on; they only say where to click.
    """
    proposed = METHODS["aop_no_af"].start(encode(scout, image), Models(predictor, None), AsfParams()).prompts
    prompts = Prompts(proposed.points[:PROMPTS], proposed.confidence[:PROMPTS])
    encoded = encode(teacher, image)
    found = decode_and_filter(teacher, encoded, prompts, torch.arange(len(prompts), device=teacher.device), spec_of(teacher))
    masks = remove_duplicates(teacher, encoded, [found])["masks"]
    news = iou_matrix(encode_rle(labelled), masks).max(0, initial=0) < LABELLED
    return decode_rle([mask for mask, new in zip(masks, news) if new], image.shape[:2])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True, help="photographs with masks, see aopsam_lab.training.pool")
    parser.add_argument("--out", type=Path, required=True, help="the new pool's folder")
    parser.add_argument("--sam", default="mobile_sam", help="mobile_sam, vit_b, vit_l or vit_h")
    parser.add_argument("--checkpoint", type=Path, help="its weights, where they are not in the cache folder")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    paths = {path.stem: path for path in entries(args.pool)}
    if not paths:
        print(f"error: no pool entries in {args.pool}: make them with `python -m aopsam_lab.training.pool`", file=sys.stderr)
        return 1
    try:
        teacher = load_sam(args.sam, args.checkpoint, args.device)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    scout, predictor = load_sam("tiny", device=args.device), load_predictor("tiny", device=args.device)

    def looked_at(name: str) -> Sample:
        image, labelled = read_entry(paths[name])
        found = found_objects(teacher, scout, predictor, image, labelled)
        return Sample(name, image, np.concatenate([labelled, found]))

    fill_pool(args.out, paths, looked_at, args.out.name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
