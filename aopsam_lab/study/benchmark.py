"""segment_anything's decoding against ours, technique by technique."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import Sam

from aopsam_lab.pipeline.decode import encode, full_resolution, image_decoder
from aopsam_lab.pipeline.methods import Grid
from aopsam_lab.pipeline.run import run_method
from aopsam_lab.pipeline.types import Encoded
from aopsam_lab.sam.zoo import load_sam, spec_of
from aopsam_lab.study.memory import peak_while


def stock_predictor(sam: Sam, encoded: Encoded) -> SamPredictor:
    """segment_anything's own predictor, given the embedding of an image."""
    predictor = SamPredictor(sam)
    predictor.features, predictor.is_image_set = encoded.embedding, True
    predictor.original_size, predictor.input_size = encoded.image.shape[:2], encoded.input_size
    predictor.set_image = predictor.reset_image = lambda *_: None  # it is there already
    return predictor


def stock(
    sam: Sam, encoded: Encoded, side: int, predict: Callable[..., tuple] | None = None
) -> list[dict]:
    """COCO RLE of what `SamAutomaticMaskGenerator` finds on a side x side grid.

    The embedding is given. `predict` takes the place of `SamPredictor.predict_torch`.
    """
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=side,
        pred_iou_thresh=spec_of(sam).pred_iou_thresh,
        stability_score_thresh=spec_of(sam).stability_score_thresh,
        output_mode="coco_rle",
    )
    generator.predictor = stock_predictor(sam, encoded)
    generator.predictor.predict_torch = predict or generator.predictor.predict_torch
    return [record["segmentation"] for record in generator.generate(encoded.image)]


def our_decoder(sam: Sam, encoded: Encoded, side: int) -> list[dict]:
    """`stock` with our mask decoder in it."""
    decoder = image_decoder(sam, encoded)

    def predict(points: torch.Tensor, labels: torch.Tensor, **_: bool) -> tuple:
        prompts = sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)[0]
        decoded = decoder.decode(prompts)
        wanted = torch.ones_like(decoded.iou, dtype=torch.bool)
        wanted[:, 0] = False  # the mask for prompts that are not ambiguous
        masks = full_resolution(sam, encoded, decoded.draw(wanted))
        return masks.unflatten(0, (-1, 3)), decoded.iou[:, 1:], None

    return stock(sam, encoded, side, predict)


def ours(sam: Sam, encoded: Encoded, side: int) -> list[dict]:
    """COCO RLE as the package finds them."""
    return run_method(sam, encoded, Grid("grid", side)).masks


TECHNIQUES = {  # each includes those before it
    "segment_anything": stock,
    "decoder: pixels stay with the image": our_decoder,
    "only good masks drawn, all by outline": ours,
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
def peak_memory(name: str, image: np.ndarray, side: int, *model: str | None) -> float:
    """MiB that a technique takes in this process beyond the model and the embedding."""
    sam = load_sam(*model)
    ours(sam, encode(sam, np.zeros((8, 8, 3), np.uint8)), 2)
    encoded = encode(sam, image)
    return peak_while(sam.device, lambda: TECHNIQUES[name](sam, encoded, side))
