"""What the page gets: images and maps as bytes, masks as COCO RLE. pane.js unpacks it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torchvision.ops import box_iou

from aopsam_lab import asf
from aopsam_lab.masks.drawing import PALETTE
from aopsam_lab.pipeline.methods import TITLES
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.show import MAP_COLOURS, STATUS_STYLES
from aopsam_lab.pipeline.types import BOX_NMS_THRESH, STATUSES
from aopsam_lab.widgets.session import Mask

LOSSLESS_PIXELS = 1_000_000
# as STATUS_STYLES: prompts that no round has decided yet, and clicks
WAITING, BY_HAND = ("O", "#dddddd", "waiting"), ("+", "#ffffff", "by hand")
STYLES = [*STATUS_STYLES.values(), WAITING, BY_HAND]
COLOURS = {  # of each layer that is a map 256 RGB
    layer: matplotlib.colormaps[name](range(256), bytes=True)[:, :3].tolist()
    for layer, name in MAP_COLOURS.items()
}


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


def pack_winner(seg: Segmentation, candidates: Sequence[Mask]) -> dict:
    """Why a prompt's masks are duplicates -> winner (the prompt of the mask that won) and fact."""
    boxes = torch.from_numpy(seg.boxes)
    by_hand = torch.from_numpy(seg.prompts["round"].to_numpy()[seg.mask_prompt] < 0)
    for mask in sorted(candidates, key=lambda one: -one.score):
        iou = box_iou(torch.from_numpy(mask.box)[None], boxes)[0].masked_fill(by_hand, 0)
        for i in (iou > BOX_NMS_THRESH).nonzero()[:1, 0].tolist():  # best first, as NMS goes
            owner = int(seg.mask_prompt[i])
            fact = f"Mask {i} of prompt {owner} won, predicted IoU {seg.scores[i]:.2f}: "
            return {"winner": owner, "fact": fact + f"the IoU of their boxes is {iou[i]:.2f}."}
    return {}


def why_empty(seg: Segmentation, score: np.ndarray | None) -> str:
    """Why there is no mask, "" where there is one. `score`: the map whose peaks become prompts."""
    if seg.masks:
        return ""
    if len(seg.prompts):
        return "no mask: none was sure and stable enough"
    if score is None:
        return "no prompt: the detector found nothing"
    highest = f"no prompt: the highest confidence here is {score.max():.2f}"
    return f"{highest}, the least asked for {seg.params['confidence']:.2f}"


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
        "title": TITLES.get(seg.method, seg.method),
        "empty": why_empty(seg, maps["smoothed" if "smoothing" in seg.params else "pcm"]),
        "setting": ", ".join(f"{name} {value:g}" for name, value in seg.params.items()),
        "badge": badge,
        "masks": pack_masks(seg.masks, seg.mask_prompt, colours),
        "scores": seg.scores.tolist(),
        "prompts": pack_table(seg.prompts.assign(status=status, decided=decided)),
        "references": pack_table(seg.references.assign(round=of_reference)),
        "rounds": n_rounds,
        "maps": {name: pack_maps(values) for name, values in maps.items() if values is not None},
    }
