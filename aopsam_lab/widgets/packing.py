"""What the page gets: plain lists, strings and little-endian bytes; masks.js reads them.

Points and boxes are in the image frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np
import pandas as pd

from aopsam_lab.masks.drawing import mask_colours
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.types import STATUSES, Prompts

LOSSLESS_PIXELS = 1_000_000
PNG = (".png", cv2.IMWRITE_PNG_COMPRESSION, 3)
JPEG = (".jpg", cv2.IMWRITE_JPEG_QUALITY, 92)  # of noise of 4 megapixels: 3.9 MB
PCM_COLOURS, PEM_COLOURS = "magma", "viridis"  # both grow evenly lighter


def colour_table(name: str) -> list[list[int]]:
    """256 RGB colours of a matplotlib colour map."""
    table = matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3]
    return np.round(table * 255).astype(int).tolist()


def pack_image(image: np.ndarray, ground_truth: Sequence[dict] = ()) -> dict:
    """(H, W, 3) uint8 and COCO RLE -> width, height, mime, data (PNG or JPEG), ground_truth."""
    height, width = image.shape[:2]
    is_small = height * width <= LOSSLESS_PIXELS
    ending, *option = PNG if is_small else JPEG
    data = cv2.imencode(ending, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), option)[1].tobytes()
    return {
        "width": width,
        "height": height,
        "mime": "image/png" if is_small else "image/jpeg",
        "data": data,
        "ground_truth": pack_masks(ground_truth),
    }


def pack_masks(masks: Sequence[dict], owners: Sequence[int] | None = None) -> dict:
    """COCO RLE of n masks -> counts, colours (RGB) and owners: each one's prompt, or -1."""
    return {
        "counts": [mask["counts"].decode("ascii") for mask in masks],
        "colours": mask_colours(len(masks)).tolist(),
        "owners": [-1] * len(masks) if owners is None else [int(owner) for owner in owners],
    }


def pack_maps(maps: np.ndarray) -> dict:
    """(n, h, w) or (h, w) in [0, 1] -> h, w and n maps of uint16, 65535 for 1."""
    h, w = maps.shape[-2:]
    data = np.round(np.clip(maps, 0, 1) * 65535).astype("<u2").tobytes()
    return {"h": h, "w": w, "data": data}


def pack_table(table: pd.DataFrame) -> dict:
    """A table of numbers -> the columns' names, and rows of float32."""
    return {"columns": list(table), "rows": table.to_numpy("<f4").tobytes()}


def pack_waiting(prompts: Prompts) -> dict:
    """Prompts that are not decoded yet -> a table of x, y."""
    return pack_table(pd.DataFrame(prompts.points.cpu().numpy(), columns=["x", "y"]))


def pack_prompts(seg: Segmentation) -> dict:
    """Prompts, references and the number of rounds.

    `status` is an index into STATUSES. It is known once more rounds than `decided` are shown. A
    reference's `round` is that of its prompt.
    """
    rounds = seg.prompts["round"].to_numpy()
    n_rounds = int(rounds.max(initial=-1)) + 1
    of_reference = rounds[seg.references["prompt"].to_numpy(int)]
    status = pd.Categorical(seg.prompts["status"], STATUSES).codes
    by = seg.prompts["by"].to_numpy()
    decided = np.where((rounds < 0) & (status > 0), n_rounds - 1, rounds)  # 0: kept
    decided[by >= 0] = of_reference[by[by >= 0]]
    prompts = seg.prompts.assign(status=status, decided=decided)
    return {
        "prompts": pack_table(prompts),
        "references": pack_table(seg.references.assign(round=of_reference)),
        "rounds": n_rounds,
    }


def pack_result(seg: Segmentation, smoothed: np.ndarray | None, badge: str) -> dict:
    """One side of the stage; `extent` is the (width, height) of its maps in the image frame.

    Args:
        seg: what is shown.
        smoothed: the PCM as adaptive sampling saw it, or None.
        badge: what is written above.
    """
    height, width = seg.image.shape[:2]
    scaled = seg.input_size if all(seg.input_size) else (height, width)
    maps = {"pcm": seg.pcm, "smoothed": smoothed, "pem": seg.pems}
    return {
        "title": seg.method,
        "setting": ", ".join(f"{name} {value:g}" for name, value in seg.params.items()),
        "badge": badge,
        "masks": pack_masks(seg.masks, seg.mask_prompt),
        "scores": [round(float(score), 3) for score in seg.scores],
        **pack_prompts(seg),
        "extent": [seg.model_size * width / scaled[1], seg.model_size * height / scaled[0]],
        "maps": {name: pack_maps(values) for name, values in maps.items() if values is not None},
    }
