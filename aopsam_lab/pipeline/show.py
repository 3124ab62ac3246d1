"""A Segmentation drawn and written to files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aopsam_lab.files import write_atomically
from aopsam_lab.masks import drawing
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.types import STATUSES

# How a prompt of each status is drawn: marker, colour, legend. Markers differ as well as colours.
STATUS_STYLES = {
    "kept": ("o", "#FFFFFF", "kept"),
    "eliminated": ("x", "#E69F00", "eliminated, never decoded"),
    "low_iou": ("v", "#56B4E9", "low predicted IoU"),
    "unstable": ("s", "#CC79A7", "unstable"),
    "duplicate": ("D", "#F0E442", "duplicate"),
    "not_reached": ("+", "#BBBBBB", "beyond the limit, never decoded"),
}
MAP_COLOURS = {"pcm": "magma", "smoothed": "magma", "pem": "viridis"}  # all grow evenly lighter
PANEL = 3.6  # inches, of a square image
WIDEST, HIGHEST, LEGEND = 10.0, 8.0, 2.4  # inches, of one image that fills a notebook's cell


def save(
    seg: Segmentation, folder: str | os.PathLike, stem: str, file_name: str = "", **info: Any
) -> dict[str, Path]:
    """Write `<stem>_labels.png`, `<stem>_overlay.png` and `<stem>.json` (COCO).

    Labels are 16-bit grey, i + 1 where mask i is on top. The JSON names the image `file_name`, or
    `stem`, and has `info` beside it. It is written last: where it is, the other two are.

    Returns:
        The paths under "labels", "overlay" and "coco".
    """
    labels = drawing.label_image(seg.masks, seg.image.shape[:2])
    images = {"labels": labels, "overlay": drawing.overlay(seg.image, seg.masks, labels=labels)}
    content = seg.to_coco(file_name=stem if file_name is None else file_name)
    content["info"] |= info
    written = {
        name: write_atomically(Path(folder, f"{stem}_{name}.png"), drawing.png_bytes(pixels))
        for name, pixels in images.items()
    }
    return {**written, "coco": write_atomically(Path(folder, f"{stem}.json"), json.dumps(content))}


def plot(
    seg: Segmentation,
    ax: Any = None,
    masks: bool = True,
    prompts: bool | Sequence[str] = True,
    alpha: float = 0.45,
    legend: bool = True,
    colours: np.ndarray | None = None,
) -> Any:
    """Draw the image, its masks and its prompts with matplotlib; return the axes.

    Args:
        seg: what to draw.
        ax: the axes, in the image frame; None: those of a new figure.
        masks: whether masks are drawn, with the opacity `alpha`.
        prompts: whether prompts are drawn, or the STATUSES of those that are.
        alpha: from 0 to 1.
        legend: whether the statuses are explained.
        colours: (n, 3) uint8 RGB of the masks, each mask's own by default.
    """
    height, width = seg.image.shape[:2]
    if ax is None:
        import matplotlib.pyplot as plt

        scale, beside = min(WIDEST / width, HIGHEST / height), LEGEND if legend and prompts else 0
        size = (scale * width + beside, scale * height + 0.4)
        _, ax = plt.subplots(figsize=size, layout="constrained")
    image = drawing.overlay(seg.image, seg.masks, alpha, colours) if masks else seg.image
    ax.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
    for status in STATUSES if prompts is True else tuple(prompts or ()):
        if status not in STATUSES:
            raise ValueError(f"prompts: {status!r} is not one of {', '.join(STATUSES)}.")
        _draw_prompts(seg, ax, status)
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize="small")
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    counts = f"{len(seg.masks)} masks, {seg.n_decoded} of {seg.n_sampled} prompts decoded"
    ax.set_title(f"{seg.method}: {counts}", fontsize="small")
    return ax


def _draw_prompts(seg: Segmentation, ax: Any, status: str) -> None:
    from matplotlib import patheffects
    from matplotlib.patches import Rectangle

    rows = seg.prompts[seg.prompts["status"] == status]
    if rows.empty:
        return
    marker, colour, text = STATUS_STYLES[status]
    cross = marker in "x+"
    edge = {"linewidths": 1.4} if cross else {"edgecolors": "black", "linewidths": 0.7}
    # points squared: the image stays visible under a dense grid
    area = float(np.clip(2600 / len(seg.prompts), 7, 26))
    label = f"{text} ({len(rows)})"
    drawn = ax.scatter(rows["x"], rows["y"], area, colour, marker=marker, label=label, **edge)
    drawn.set_zorder(3)
    if cross:  # it has no edge; a dark rim keeps it visible on bright pixels
        rim = patheffects.Stroke(linewidth=2.6, foreground="black")
        drawn.set_path_effects([rim, patheffects.Normal()])
    for box in rows.reindex(columns=["x0", "y0", "x1", "y1"]).dropna().itertuples(index=False):
        size = (box.x1 - box.x0, box.y1 - box.y0)
        ax.add_patch(Rectangle((box.x0, box.y0), *size, fill=False, ec=colour, lw=0.9, zorder=2))


def plot_panels(
    figure: Any, seg: Segmentation, compared: Segmentation | None = None, selected: int = -1
) -> None:
    """Draw the result, the one it is compared with, and its PCM and PEM, on an empty figure.

    The PEM is that of the prompt `selected`, where its mask is a reference, else the maximum.
    """
    results = [seg] if compared is None else [seg, compared]
    maps = [] if seg.pcm is None else [("PCM", seg.pcm, MAP_COLOURS["pcm"])]
    if seg.pems is not None:
        rows = seg.references.index[seg.references["prompt"] == selected].tolist()
        title = f"PEM of prompt {selected}" if rows else "PEM, maximum"
        maps.append((title, seg.pem(rows[0] if rows else None), MAP_COLOURS["pem"]))
    height, width = seg.image.shape[:2]
    count, scale = len(results) + len(maps), (width / height) ** 0.5
    figure.set_size_inches(PANEL * scale * count + 0.6 * len(maps), PANEL / scale + 0.5)
    axes = iter(figure.subplots(1, count, squeeze=False)[0])
    own = drawing.mask_colours(seg.masks)
    for result in results:
        matched = drawing.matched_colours(result.masks, seg.masks, own)
        plot(result, next(axes), legend=False, colours=own if result is seg else matched)
    side = max(height, width)  # it fills the model frame, which the maps cover
    look = {"vmin": 0, "vmax": 1, "alpha": 0.85, "extent": (0, side, side, 0)}
    for ax, (title, values, colours) in zip(axes, maps, strict=True):
        plot(seg, ax, masks=False, prompts=False)
        drawn = ax.imshow(values, cmap=colours, **look)
        ax.set_title(title, fontsize="small")
        figure.colorbar(drawn, ax=ax, shrink=0.7)
