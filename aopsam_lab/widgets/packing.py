"""What the page gets: plain lists, strings and little-endian bytes; masks.js reads them.

Points and boxes are in the image frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np
import pandas as pd
import torch

from aopsam_lab import asf
from aopsam_lab.masks.drawing import mask_colours
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.types import STATUSES

LOSSLESS_PIXELS = 1_000_000
PNG = ("png", cv2.IMWRITE_PNG_COMPRESSION, 3)
JPEG = ("jpeg", cv2.IMWRITE_JPEG_QUALITY, 92)  # of noise of 4 megapixels: 3.9 MB
PCM_COLOURS, PEM_COLOURS = "magma", "viridis"  # both grow evenly lighter


def colour_table(name: str) -> list[list[int]]:
    """256 RGB colours of a matplotlib colour map."""
    table = matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3]
    return np.round(table * 255).astype(int).tolist()


def pack_image(image: np.ndarray, ground_truth: Sequence[dict] = ()) -> dict:
    """(H, W, 3) uint8 and COCO RLE -> width, height, mime, data (PNG or JPEG), ground_truth."""
    height, width = image.shape[:2]
    kind, *option = PNG if height * width <= LOSSLESS_PIXELS else JPEG
    _, data = cv2.imencode(f".{kind}", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), option)
    return {
        "width": width,
        "height": height,
        "mime": f"image/{kind}",
        "data": data.tobytes(),
        "ground_truth": pack_masks(ground_truth),
    }


def pack_masks(masks: Sequence[dict], owners: Sequence[int] = ()) -> dict:
    """COCO RLE of n masks -> counts, colours (RGB) and, where known, owners: each one's prompt."""
    return {
        "counts": [mask["counts"].decode("ascii") for mask in masks],
        "colours": mask_colours(len(masks)).tolist(),
        "owners": [int(owner) for owner in owners],
    }


def pack_maps(maps: np.ndarray) -> dict:
    """(n, h, w) or (h, w) in [0, 1] -> h, w and n maps of uint16, 65535 for 1."""
    h, w = maps.shape[-2:]
    data = np.round(np.clip(maps, 0, 1) * 65535).astype("<u2").tobytes()
    return {"h": h, "w": w, "data": data}


def pack_table(table: pd.DataFrame) -> dict:
    """A table of numbers -> the columns' names, and rows of float32."""
    return {"columns": list(table), "rows": table.to_numpy("<f4").tobytes()}


def extent_of(seg: Segmentation) -> tuple[float, float]:
    """(width, height) of the model frame, which the maps cover, in the image frame."""
    height, width = seg.image.shape[:2]
    scaled = seg.input_size if all(seg.input_size) else (height, width)
    return seg.model_size * width / scaled[1], seg.model_size * height / scaled[0]


def pack_result(seg: Segmentation, smoothing: float, badge: str) -> dict:
    """One side of the stage.

    In the prompts, `status` is an index into STATUSES. It is known once more rounds than `decided`
    are shown. A reference's `round` is that of its prompt.

    Args:
        seg: what is shown.
        smoothing: as AsfParams, for the smoothed PCM.
        badge: what is written above.
    """
    rounds = seg.prompts["round"].to_numpy()
    n_rounds = int(rounds.max(initial=-1)) + 1
    of_reference = rounds[seg.references["prompt"].to_numpy(int)]
    status = pd.Categorical(seg.prompts["status"], STATUSES).codes
    by = seg.prompts["by"].to_numpy()
    decided = np.where((rounds < 0) & (status > 0), n_rounds - 1, rounds)  # 0: kept
    decided[by >= 0] = of_reference[by[by >= 0]]
    maps = {"pcm": seg.pcm, "smoothed": None, "pem": seg.pems}
    if seg.pcm is not None:
        sigma = smoothing * seg.pcm.shape[-1] / asf.REFERENCE_WIDTH
        maps["smoothed"] = asf.smooth(torch.from_numpy(seg.pcm), sigma).numpy()
    return {
        "title": seg.method,
        "setting": ", ".join(f"{name} {value:g}" for name, value in seg.params.items()),
        "badge": badge,
        "masks": pack_masks(seg.masks, seg.mask_prompt),
        "scores": [round(float(score), 3) for score in seg.scores],
        "prompts": pack_table(seg.prompts.assign(status=status, decided=decided)),
        "references": pack_table(seg.references.assign(round=of_reference)),
        "rounds": n_rounds,
        "extent": extent_of(seg),
        "maps": {name: pack_maps(values) for name, values in maps.items() if values is not None},
    }
