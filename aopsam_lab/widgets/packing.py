"""What is shown: packed for the page, whose masks.js unpacks it, and as a matplotlib figure.

Images and maps are packed as bytes. Points and boxes are in the image frame.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from aopsam_lab import asf
from aopsam_lab.masks.drawing import mask_colours
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.types import STATUSES

LOSSLESS_PIXELS = 1_000_000
PNG = ("png", cv2.IMWRITE_PNG_COMPRESSION, 3)
JPEG = ("jpeg", cv2.IMWRITE_JPEG_QUALITY, 92)  # of noise of 4 megapixels: 3.9 MB
PCM_COLOURS, PEM_COLOURS = "magma", "viridis"  # both grow evenly lighter
PANEL = 3.6  # inches, of a square image


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


def pack_table(table: pd.DataFrame) -> list[dict]:
    """A table of numbers -> a dictionary a row, None for NaN."""
    return json.loads(table.to_json(orient="records"))


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


class ShownFigure(Figure):
    """A figure that a notebook shows without pyplot, which nothing here imports."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png", dpi=90)
        return stream.getvalue()


def state_figure(
    seg: Segmentation, compared: Segmentation | None = None, selected: int = -1
) -> ShownFigure:
    """Masks and prompts, those of what it is compared with, then PCM and PEM where there are any.

    The PEM is that of the prompt `selected`, where its mask is a reference, else the maximum.
    """
    results = [seg] if compared is None else [seg, compared]
    maps = [] if seg.pcm is None else [("PCM", seg.pcm, PCM_COLOURS)]
    if seg.pems is not None:
        rows = seg.references.index[seg.references["prompt"] == selected].tolist()
        title = f"PEM of prompt {selected}" if rows else "PEM, maximum"
        maps.append((title, seg.pem(rows[0] if rows else None), PEM_COLOURS))
    height, width = seg.image.shape[:2]
    across, down = PANEL * (width / height) ** 0.5, PANEL * (height / width) ** 0.5
    count = len(results) + len(maps)
    size = (across * count + 0.6 * len(maps), down + 0.5)
    figure = ShownFigure(figsize=size, layout="constrained")
    axes = iter(figure.subplots(1, count, squeeze=False)[0])
    for result in results:
        result.plot(next(axes), legend=False)
    right, bottom = extent_of(seg)
    look = {"vmin": 0, "vmax": 1, "alpha": 0.85, "extent": (0, right, bottom, 0)}
    for ax, (title, values, colours) in zip(axes, maps, strict=True):
        ax.imshow(seg.image, extent=(0, width, height, 0))
        drawn = ax.imshow(values, cmap=colours, **look)
        ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        ax.set_title(title, fontsize="small")
        figure.colorbar(drawn, ax=ax, shrink=0.7)
    return figure
