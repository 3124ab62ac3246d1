"""What the page gets: images and maps as bytes, masks as COCO RLE. pane.js unpacks it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from PIL import Image

from aopsam_lab import asf
from aopsam_lab.masks.drawing import PALETTE
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.show import MAP_COLOURS, STATUS_STYLES
from aopsam_lab.pipeline.types import STATUSES

LOSSLESS_PIXELS = 1_000_000
# as STATUS_STYLES: prompts that no round has decided yet, and clicks
WAITING, BY_HAND = ("O", "#dddddd", "waiting"), ("+", "#ffffff", "by hand")
STYLES = [*STATUS_STYLES.values(), WAITING, BY_HAND]
COLOURS = {  # of each layer that is a map 256 RGB
    layer: matplotlib.colormaps[name](range(256), bytes=True)[:, :3].tolist()
    for layer, name in MAP_COLOURS.items()
}


def page_text(name: str) -> str:
    """A file of the page."""
    return Path(__file__).with_name(name).read_text("utf-8")


def bundled(names: Sequence[str] = ("pane", "stage", "side", "explorer")) -> str:
    """The page's ES modules as the single one that anywidget takes: without imports and exports."""
    text = "\n".join(page_text(f"{name}.js") for name in names)
    return re.sub(r"^(import [^;]*;|export (?!default))", "", text, flags=re.MULTILINE)


def pack_image(image: np.ndarray, ground_truth: Sequence[dict] = ()) -> dict:
    """(H, W, 3) uint8 and COCO RLE -> width, height, data (PNG or JPEG), ground_truth."""
    height, width = image.shape[:2]
    kind, stream = "PNG" if height * width <= LOSSLESS_PIXELS else "JPEG", io.BytesIO()
    Image.fromarray(image).save(stream, kind, compress_level=3, quality=92)
    return {
        "width": width,
        "height": height,
        "data": stream.getvalue(),
        "ground_truth": pack_masks(ground_truth),
    }


def pack_masks(
    masks: Sequence[dict], owners: Sequence[int] | np.ndarray = (), colours: np.ndarray = PALETTE
) -> dict:
    """COCO RLE of n masks -> counts, colours (RGB) and, where known, owners: each one's prompt."""
    return {
        "counts": [mask["counts"].decode("ascii") for mask in masks],
        "colours": np.resize(colours, (len(masks), 3)).tolist(),
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


def pack_growing(method: str, masks: Sequence[dict] = (), colours: np.ndarray = PALETTE) -> dict:
    """As `pack_result` before there is one: the masks found so far."""
    none: dict[str, Any] = {"scores": [], "prompts": [], "references": [], "rounds": 0, "maps": {}}
    own = {"title": method, "setting": "", "badge": "", "masks": pack_masks(masks, (), colours)}
    return {**none, **own, "growing": True}


def pack_result(
    seg: Segmentation, smoothing: float, badge: str, colours: np.ndarray = PALETTE
) -> dict:
    """One side of the stage; `smoothing` as in AsfParams, `badge` is written above.

    In the prompts, `status` is an index into STYLES. It is known once more rounds than `decided`
    are shown. A reference's `round` is that of its prompt.
    """
    rounds, by = seg.prompts["round"].to_numpy(), seg.prompts["by"].to_numpy()
    n_rounds = int(rounds.max(initial=-1)) + 1
    of_reference = rounds[seg.references["prompt"].to_numpy(int)]
    status = pd.Categorical(seg.prompts["status"], STATUSES).codes
    is_by_hand = (rounds < 0) & (status == STATUSES.index("kept"))
    decided = np.where((rounds < 0) & ~is_by_hand, n_rounds - 1, rounds)
    decided[by >= 0] = of_reference[by[by >= 0]]
    status = np.where(is_by_hand, STYLES.index(BY_HAND), status)
    maps = {"pcm": seg.pcm, "smoothed": None, "pem": seg.pems}
    if seg.pcm is not None:
        sigma = smoothing * seg.pcm.shape[-1] / asf.REFERENCE_WIDTH
        maps["smoothed"] = asf.smooth(torch.from_numpy(seg.pcm), sigma).numpy()
    return {
        "title": seg.method,
        "setting": ", ".join(f"{name} {value:g}" for name, value in seg.params.items()),
        "badge": badge,
        "masks": pack_masks(seg.masks, seg.mask_prompt, colours),
        "scores": seg.scores.tolist(),
        "prompts": pack_table(seg.prompts.assign(status=status, decided=decided)),
        "references": pack_table(seg.references.assign(round=of_reference)),
        "rounds": n_rounds,
        "maps": {name: pack_maps(values) for name, values in maps.items() if values is not None},
    }
