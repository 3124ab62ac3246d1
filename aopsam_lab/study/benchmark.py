"""Decoding as segment_anything does it against ours, technique by technique: for
`notebooks/benchmark.ipynb`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import pandas as pd
import torch
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam
from segment_anything.utils import amg
from torchvision.ops import nms

from aopsam_lab.pipeline import decode as decoding
from aopsam_lab.asf import AsfParams
from aopsam_lab.pipeline.decode import STABILITY_OFFSET, encode
from aopsam_lab.pipeline.methods import Grid
from aopsam_lab.pipeline.types import BOX_NMS_THRESH, Encoded, Models
from aopsam_lab.pipeline.run import run_method
from aopsam_lab.sam.zoo import load_sam, spec_of
from aopsam_lab.study import memory


def stock(sam: Sam, encoded: Encoded, side: int) -> list[dict]:
    """COCO RLE of what `SamAutomaticMaskGenerator` finds on a grid, given the embedding."""
    spec = spec_of(sam)
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=side,
        pred_iou_thresh=spec.pred_iou_thresh,
        stability_score_thresh=spec.stability_score_thresh,
        output_mode="coco_rle",
    )
    predictor = generator.predictor
    predictor.features, predictor.is_image_set = encoded.embedding, True
    predictor.original_size, predictor.input_size = encoded.image.shape[:2], encoded.input_size
    predictor.set_image = predictor.reset_image = lambda *_: None  # it is there already
    return [record["segmentation"] for record in generator.generate(encoded.image)]


def composed(
    sam: Sam, encoded: Encoded, side: int, gate: bool = False, outlines: bool = False
) -> list[dict]:
    """The generator's steps with our decoder in them; all else is segment_anything's.

    Args:
        sam, encoded, side: the model, the image, and prompts along each side of the grid.
        gate: whether masks below the predicted-IoU threshold stay undrawn.
        outlines: whether stability and boxes come from the masks' outlines.
    """
    spec, decoder = spec_of(sam), decoding.image_decoder(sam, encoded)
    prompts = Grid("grid", side).start(encoded, Models(), AsfParams()).prompts
    index = torch.arange(side**2, device=sam.device)
    iou, boxes, rles = [], [], []
    for part in index.split(decoding.decode_batch(encoded)):
        decoded = decoder.decode(decoding.prompt_tokens(sam, encoded, prompts, part))
        good = torch.zeros_like(decoded.iou, dtype=torch.bool)
        good[:, 1:] = decoded.iou[:, 1:] > spec.pred_iou_thresh
        drawn = good.clone()
        drawn[:, 1:] |= not gate
        low = decoded.draw(drawn)[good[drawn]]
        if not len(low):
            continue
        cuts = sam.mask_threshold, STABILITY_OFFSET
        if outlines:
            stability, box = decoding.full_size(sam, encoded).measure(low, *cuts)
            stable = stability >= spec.stability_score_thresh
            masks = decoding.full_resolution(sam, encoded, low[stable]) > sam.mask_threshold
        else:
            full = decoding.full_resolution(sam, encoded, low)
            stable = amg.calculate_stability_score(full, *cuts) >= spec.stability_score_thresh
            masks = full[stable] > sam.mask_threshold
        iou.append(decoded.iou[good][stable])
        boxes.append(box[stable] if outlines else amg.batched_mask_to_box(masks))
        rles += amg.mask_to_rle_pytorch(masks)
    if not rles:
        return []
    keep = nms(torch.cat(boxes).float(), torch.cat(iou), BOX_NMS_THRESH)
    return [amg.coco_encode_rle(rles[i]) for i in keep.tolist()]


def ours(sam: Sam, encoded: Encoded, side: int) -> list[dict]:
    """COCO RLE as the package finds them."""
    return run_method(sam, encoded, Grid("grid", side)).masks


# each includes those before it
TECHNIQUES: dict[str, Callable[[Sam, Encoded, int], list[dict]]] = {
    "segment_anything": stock,
    "decoder: pixels stay with the image": composed,
    "masks of a low predicted IoU undrawn": partial(composed, gate=True),
    "stability and boxes by outline": partial(composed, gate=True, outlines=True),
    "RLE by outline, batches side by side": ours,
}


def agreement(masks: Sequence[dict], reference: Sequence[dict]) -> float:
    """The lowest IoU that a mask of either list has with its best match in the other."""
    if not masks or not reference:
        return float(len(masks) == len(reference))
    iou = coco_mask.iou(list(masks), list(reference), [0] * len(reference))
    return float(min(iou.max(0).min(), iou.max(1).min()))


@torch.inference_mode()
def measure(sam: Sam, images: Sequence[np.ndarray], side: int) -> pd.DataFrame:
    """One row an image and technique: seconds, masks, lowest IoU with stock's.

    Each image begins with another technique: what slows the machine for a while meets all alike.
    """
    rows, names = [], list(TECHNIQUES)
    ours(sam, encode(sam, images[0]), 2)  # what libraries load at first use
    for n, image in enumerate(images):
        encoded, found, seconds = encode(sam, image), {}, {}
        for name in names[n % len(names) :] + names[: n % len(names)]:
            encoded.made.clear()
            start = time.perf_counter()
            found[name] = TECHNIQUES[name](sam, encoded, side)
            seconds[name] = time.perf_counter() - start
        for name in names:
            lowest = agreement(found[name], found[names[0]])
            rows.append((n, name, seconds[name], len(found[name]), lowest))
    return pd.DataFrame(rows, columns=["image", "technique", "seconds", "masks", "lowest_iou"])


@torch.inference_mode()
def _peak(name: str, image: np.ndarray, side: int, model: tuple[str, str | None, str]) -> float:
    sam = load_sam(*model)
    ours(sam, encode(sam, np.zeros((8, 8, 3), np.uint8)), 2)
    encoded = encode(sam, image)
    before = memory._start_peak()
    TECHNIQUES[name](sam, encoded, side)
    if sam.device.type == "cuda":
        return torch.cuda.max_memory_allocated(sam.device) / memory.MIB
    return max(memory._peak() - before, 0) / memory.MIB


def peak_memory(
    image: np.ndarray, side: int, sam: str, checkpoint: str | None, device: str
) -> dict[str, float]:
    """MiB that each technique takes beyond model and embedding, in a process of its own."""
    model = sam, checkpoint, device
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        return {name: pool.submit(_peak, name, image, side, model).result() for name in TECHNIQUES}
