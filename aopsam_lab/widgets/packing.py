"""What the page gets, as compact binary: plain dictionaries of numbers, strings and bytes, little-endian.

pane.js is the other end. Maps are uint16, 65535 for 1.0; masks are COCO's compressed run lengths one after the other;
prompts are rows of float32. All points are in the image frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np

from aopsam_lab.masks.drawing import mask_colours
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.types import STATUSES, Prompts

MAX_IMAGE_BYTES = 4_000_000
LOSSLESS_PIXELS = 1_000_000
COLOUR_MAPS = (
    "magma",
    "viridis",
)  # of confidence (PCM) and of similarity (PEM); both grow evenly lighter


def pack_image(image: np.ndarray) -> dict:
    """H x W x 3 uint8 -> mime and bytes: a PNG up to LOSSLESS_PIXELS, else the best JPEG within MAX_IMAGE_BYTES."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    if image.shape[0] * image.shape[1] <= LOSSLESS_PIXELS:
        return {
            "mime": "image/png",
            "data": cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 3])[1].tobytes(),
        }
    for quality in (92, 80, 60, 40, 20):
        data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(data) <= MAX_IMAGE_BYTES:
            break
    return {"mime": "image/jpeg", "data": data}


def pack_masks(masks: Sequence[dict], owners: Sequence[int] | None = None) -> dict:
    """n COCO RLE -> counts (all of them), ends (n uint32: where each one's counts end), colours (n x 3), owners (n int32:
    the prompt each is of, or -1)."""
    counts = [mask["counts"] for mask in masks]
    owners = np.full(len(counts), -1) if owners is None else np.asarray(owners)
    return {
        "n": len(counts),
        "counts": b"".join(counts),
        "ends": np.cumsum([len(c) for c in counts], dtype="<u4").tobytes() if counts else b"",
        "colours": mask_colours(len(counts)).tobytes(),
        "owners": owners.astype("<i4").tobytes(),
    }


def pack_maps(maps: np.ndarray) -> dict:
    """n x h x w or h x w in [0, 1] -> n, h, w and uint16."""
    maps = maps[None] if maps.ndim == 2 else maps
    n, h, w = maps.shape
    return {
        "n": n,
        "h": h,
        "w": w,
        "data": np.round(np.clip(maps, 0, 1) * 65535).astype("<u2").tobytes(),
    }


def pack_prompts(seg: Segmentation) -> dict:
    """Rows of x, y, confidence, round, fate (index into STATUSES), by, pem, round it was eliminated in, x0, y0, x1, y1; and
    references: rows of prompt, threshold, round. Numbers that are not there are NaN, rounds and references -1."""
    table, references = seg.prompts, seg.references
    rounds = table["round"].to_numpy()
    of_reference = (
        rounds[references["prompt"].to_numpy(int)] if len(references) else np.zeros(0, int)
    )
    by = table["by"].to_numpy()
    gone = np.full(len(table), -1)
    gone[by >= 0] = of_reference[by[by >= 0]]
    fate = table["status"].map({status: i for i, status in enumerate(STATUSES)})
    columns = [table["x"], table["y"], table["confidence"], rounds, fate, by, table["pem"], gone]
    rows = np.column_stack([*columns, table[["x0", "y0", "x1", "y1"]]])
    kin = np.column_stack([references["prompt"], references["threshold"], of_reference])
    return {
        "n": len(rows),
        "rows": rows.astype("<f4").tobytes(),
        "references": kin.astype("<f4").tobytes(),
        "rounds": int(rounds.max(initial=-1)) + 1,
    }


def pack_waiting(prompts: Prompts) -> dict:
    """Prompts that are not decoded yet -> n and rows of x, y."""
    return {"n": len(prompts), "rows": prompts.points.cpu().numpy().astype("<f4").tobytes()}


def colour_tables() -> dict:
    """Name -> 256 x 3 bytes, of each of COLOUR_MAPS."""
    steps = np.linspace(0, 1, 256)
    return {
        name: np.round(matplotlib.colormaps[name](steps)[:, :3] * 255).astype(np.uint8).tobytes()
        for name in COLOUR_MAPS
    }


def pack_result(seg: Segmentation, smoothed: np.ndarray | None, badge: str) -> dict:
    """One side of the canvas: title, setting, badge, masks with scores, prompts, and the maps there are with their extent,
    (width, height) in the image frame. smoothed: the PCM as sampling saw it."""
    height, width = seg.image.shape[:2]
    scaled = seg.input_size if all(seg.input_size) else (height, width)
    maps = {} if seg.pcm is None else {"pcm": pack_maps(seg.pcm), "smoothed": pack_maps(smoothed)}
    if seg.pems is not None:
        maps["pem"] = pack_maps(seg.pems)
    return {
        "title": seg.method,
        "setting": ", ".join(f"{name} {value:g}" for name, value in seg.params.items()),
        "badge": badge,
        "masks": pack_masks(seg.masks, seg.mask_prompt),
        "scores": [round(float(score), 3) for score in seg.scores],
        "prompts": pack_prompts(seg),
        "extent": [seg.model_size * width / scaled[1], seg.model_size * height / scaled[0]],
        **maps,
    }
