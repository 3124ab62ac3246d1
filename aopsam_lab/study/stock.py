"""The 32 x 32 grid run by segment_anything's own generator, for studies that name it."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import torch
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam

from aopsam_lab.decoding import Encoded
from aopsam_lab.sam.zoo import spec_of
from aopsam_lab.segmentation import PROMPT_COLUMNS, Segmentation

STOCK = "amg_d_stock"
POINTS_PER_BATCH = 64  # SamAutomaticMaskGenerator's default


def stock_records(sam: Sam, encoded: Encoded) -> list[dict]:
    """What ``SamAutomaticMaskGenerator`` finds with a 32 x 32 grid, as COCO RLE; it is given the embedding."""
    spec = spec_of(sam)
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_batch=POINTS_PER_BATCH,
        pred_iou_thresh=spec.pred_iou_thresh,
        stability_score_thresh=spec.stability_score_thresh,
        output_mode="coco_rle",
    )
    predictor = generator.predictor

    def set_image(image: np.ndarray) -> None:
        predictor.features, predictor.is_image_set = encoded.embedding, True
        predictor.original_size, predictor.input_size = image.shape[:2], tuple(encoded.input_size)

    predictor.set_image = set_image
    return generator.generate(encoded.image)


@torch.inference_mode()
def run_stock(sam: Sam, encoded: Encoded) -> Segmentation:
    """The stock generator's masks. `prompts` holds those whose masks were kept: it tells nothing of the others."""
    start = time.perf_counter()
    records = stock_records(sam, encoded)
    took = time.perf_counter() - start
    order = np.argsort([-record["predicted_iou"] for record in records], kind="stable")
    records = [records[i] for i in order]
    points = np.array([record["point_coords"][0] for record in records]).reshape(-1, 2)
    places, which = np.unique(points, axis=0, return_inverse=True)
    prompts = pd.DataFrame(np.nan, index=range(len(places)), columns=list(PROMPT_COLUMNS)).astype({"status": object})
    prompts[["x", "y"]] = places
    prompts[["confidence", "round", "status", "by"]] = 1.0, 0, "kept", -1
    boxes = np.array([record["bbox"] for record in records], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    seconds = {"encode": encoded.seconds, "infer": 0.0, "mask": took, "total": encoded.seconds + took}
    return Segmentation(
        image=encoded.image,
        masks=[{**r["segmentation"], "counts": r["segmentation"]["counts"].encode("ascii")} for r in records],
        scores=np.array([record["predicted_iou"] for record in records], np.float32),
        stability=np.array([record["stability_score"] for record in records], np.float32),
        boxes=boxes,
        mask_prompt=which.reshape(-1),
        prompts=prompts,
        seconds=seconds,
        method=STOCK,
        n_decoded=1024,
        n_sampled=1024,
        input_size=tuple(encoded.input_size),
        model_size=encoded.model_image.shape[-1],
    )
