"""A small Sam with random weights, and what several tests write or compare with.

Where this module is imported, a process that a test starts included, the Sam is named "small".
"""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import save_file
from segment_anything import SamPredictor
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)

from aopsam_lab.pipeline.decode import decode_and_filter
from aopsam_lab.pipeline.run import LoadedModels
from aopsam_lab.pipeline.types import Encoded, Found, Prompts
from aopsam_lab.predictor import PromptPredictor
from aopsam_lab.sam.zoo import MODELS, SamSpec

IMG_SIZE, WIDTH, STRIDE = 128, 32, 16
EVERYTHING = SamSpec("custom", -float("inf"), -float("inf"), "")  # no mask is filtered out


def build_small_sam(width: int = 32, heads: int = 4) -> Sam:
    """A Sam of the usual parts: 128 x 128 pixels in, an embedding of 32 x 8 x 8 out.

    The image encoder has so many channels inside, by which official ViTs are told, and heads.
    """
    vit = {"img_size": IMG_SIZE, "embed_dim": width, "depth": 2, "num_heads": heads}
    vit |= {"out_chans": WIDTH, "global_attn_indexes": (1,), "use_rel_pos": True, "window_size": 4}
    grid = (IMG_SIZE // STRIDE,) * 2
    two_way = TwoWayTransformer(depth=2, embedding_dim=WIDTH, num_heads=4, mlp_dim=64)
    return Sam(
        ImageEncoderViT(**vit),
        PromptEncoder(WIDTH, grid, (IMG_SIZE, IMG_SIZE), mask_in_chans=16),
        MaskDecoder(transformer_dim=WIDTH, transformer=two_way, iou_head_hidden_dim=32),
    )


def write_weights(folder: Path, seed: int) -> dict[str, str]:
    """A small Sam and a Prompt Predictor for it as files; their paths as `run_study` takes them."""
    torch.manual_seed(seed)
    paths = {name: str(folder / f"{name}.safetensors") for name in ("checkpoint", "predictor")}
    thresholds = {"pred_iou_thresh": "0", "stability_score_thresh": "0"}
    sam = build_small_sam()
    # so some masks pass, whatever the draw
    torch.nn.init.ones_(sam.mask_decoder.iou_prediction_head.layers[-1].bias)
    save_file(sam.state_dict(), paths["checkpoint"], thresholds)
    shape = {"embed_dim": str(WIDTH), "stride": str(STRIDE), "width": "16"}
    save_file(PromptPredictor(WIDTH, STRIDE, 16).state_dict(), paths["predictor"], shape)
    return {"sam": "small", **paths}


def stock_predictor(sam: Sam, encoded: Encoded) -> SamPredictor:
    """segment_anything's own predictor, given the embedding of an image."""
    stock = SamPredictor(sam)
    stock.features, stock.is_image_set = encoded.embedding, True
    stock.original_size, stock.input_size = encoded.image.shape[:2], tuple(encoded.input_size)
    return stock


def write_coco(
    folder: Path,
    images: dict[str, np.ndarray],
    annotations: dict[str, list[dict]],
    file: str = "annotations.json",
    first: int = 1,
) -> Path:
    """A COCO-style folder, or another file of it: of each image its annotations, ids counted."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    content = {"images": [], "annotations": [], "categories": [{"id": 1}, {"id": 2}]}
    for i, (name, image) in enumerate(images.items(), first):
        Image.fromarray(image).save(folder / "images" / name)
        size = {"height": image.shape[0], "width": image.shape[1]}
        content["images"].append({"id": i, "file_name": name, **size})
        for own in annotations.get(name, []):
            about = {"id": len(content["annotations"]) + 1, "image_id": i, "category_id": 1}
            content["annotations"].append({**about, "iscrowd": 0, **own})
    (folder / file).write_text(json.dumps(content))
    return folder


def corners(x: float, y: float, side: float) -> list[list[float]]:
    """A square as COCO's polygon."""
    return [[float(v) for v in (x, y, x + side, y, x + side, y + side, x, y + side)]]


def rle_text(mask: np.ndarray) -> dict:
    """A mask (H, W) as COCO's RLE in a JSON file."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {**rle, "counts": rle["counts"].decode()}


class RunsCode:
    """In a pickle, what makes the folder `marker` when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def all_masks(sam: Sam, encoded: Encoded, prompts: Prompts, row: int) -> Found:
    """All masks of the prompt `row`, whatever their scores."""
    return decode_and_filter(sam, encoded, prompts, torch.tensor([row]), EVERYTHING)


# --- what workers are asked to do ---


def double(models: LoadedModels, job: int | str) -> tuple[int, int]:
    if job == "bad":
        raise LookupError("no such job")
    return models.sam.image_encoder.img_size, 2 * job


def die_once(_: LoadedModels, job: tuple[int, Path | None]) -> tuple[int, int]:
    """A worker dies at a job with a marker that is not there yet."""
    number, marker = job
    if marker and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return number, os.getpid()


MODELS["small"] = build_small_sam
