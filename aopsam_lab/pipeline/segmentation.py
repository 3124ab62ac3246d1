"""The one result type: what every method finds in a picture, and how it came to it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pycocotools import mask as coco_mask

from aopsam_lab.masks import drawing
from aopsam_lab.files import write_atomically
from aopsam_lab.masks.rle import decode_rle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATUSES = ("kept", "eliminated", "low_iou", "unstable", "duplicate", "not_reached")
PROMPT_COLUMNS = ("x", "y", "confidence", "round", "status", "by", "pem", "x0", "y0", "x1", "y1")

# How a prompt of each fate is drawn: marker, colour, legend. Shape tells them apart where colour does not.
FATES = {
    "kept": ("o", "#FFFFFF", "kept"),
    "eliminated": ("x", "#E69F00", "eliminated, never decoded"),
    "low_iou": ("v", "#56B4E9", "low predicted IoU"),
    "unstable": ("s", "#CC79A7", "unstable"),
    "duplicate": ("D", "#F0E442", "duplicate"),
    "not_reached": ("+", "#BBBBBB", "beyond the limit, never decoded"),
}


@dataclass(eq=False, repr=False)
class Segmentation:
    """Masks of one image, best first, with the prompts they came from.

    n masks, m prompts proposed; S is the side of SAM's input, h x w its embedding. Points and boxes are in the image
    frame: pixels of `image`, (x, y), pixel centres at +0.5.

    image:        H x W x 3 uint8, RGB.
    masks:        n COCO RLE `{"size": [H, W], "counts": bytes}`, by `scores`, highest first.
    scores:       (n,) float32, the IoU that SAM predicts.
    stability:    (n,) float32, IoU of the mask cut at a higher and at a lower logit.
    boxes:        (n, 4) float32, x0 y0 x1 y1; the last two are the highest pixel indices on the mask, as in
                  segment_anything.
    mask_prompt:  (n,) int, the row of `prompts` that made the mask.
    prompts:      m rows. x, y: the point, or the centre of the box; confidence; round: in which it was decoded, -1 if
                  never; status: one of STATUSES; by: the reference (row of `pems`) that eliminated it, -1 for none;
                  pem: its value there, NaN for none; x0, y0, x1, y1: the box, NaN for a point.
    pcm:          (4h, 4w) float32 in [0, 1], the Prompt Confidence Map over the whole model frame, padding included;
                  None for methods without one.
    pems:         (r, h, w) float32, a Prompt Elimination Map for each reference mask, in the order they were found;
                  None for methods without.
    references:   r rows, one a PEM. prompt: the row of `prompts` whose mask it is; threshold: what the PEM must exceed
                  for the reference to eliminate a prompt.
    seconds:      encode, infer (prompts proposed: the paper's Inf_Lat), mask (prompts to masks: Mask_Lat), total.
    method:       its name in the registry; params: its settings.
    n_decoded:    prompts that went through the mask decoder; n_sampled: proposed; n_eliminated: dropped before that.
    input_size:   (height, width) of the scaled image within the S x S model frame, padding excluded.
    model_size:   S.

    Raises ValueError where these do not fit each other.
    """

    image: np.ndarray
    masks: list[dict]
    scores: np.ndarray
    stability: np.ndarray
    boxes: np.ndarray
    mask_prompt: np.ndarray
    prompts: pd.DataFrame
    pcm: np.ndarray | None = None
    pems: np.ndarray | None = None
    references: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame({"prompt": [], "threshold": []})
    )
    seconds: dict[str, float] = field(default_factory=dict)
    method: str = ""
    params: dict = field(default_factory=dict)
    n_decoded: int = 0
    n_sampled: int = 0
    n_eliminated: int = 0
    input_size: tuple[int, int] = (0, 0)
    model_size: int = 0

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise ValueError(
                f"image must be H x W x 3 uint8, got {self.image.dtype} of shape {self.image.shape}."
            )
        n = len(self.masks)
        shapes = {"scores": (n,), "stability": (n,), "boxes": (n, 4), "mask_prompt": (n,)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(
                    f"{name} must have shape {shape} for {n} masks, got {getattr(self, name).shape}."
                )
        missing = [name for name in PROMPT_COLUMNS if name not in self.prompts]
        if missing:
            raise ValueError(f"prompts lacks the columns {', '.join(missing)}.")
        unknown = set(self.prompts["status"]) - set(STATUSES)
        if unknown:
            raise ValueError(
                f"prompts has the status {unknown.pop()!r}; it must be one of {', '.join(STATUSES)}."
            )

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return (
            f"Segmentation({self.method!r}, {width} x {height} pixels: {len(self.masks)} masks, "
            f"{self.n_decoded} of {self.n_sampled} prompts decoded)"
        )

    def to_array(self) -> np.ndarray:
        """n x H x W bool."""
        return decode_rle(self.masks, self.image.shape[:2])

    def to_records(self) -> list[dict]:
        """The masks as SamAutomaticMaskGenerator returns them: the same keys in the same frames.

        Each has segmentation (H x W bool), area (pixels), bbox (x, y, w, h), predicted_iou, point_coords ([[x, y]]; of
        a box prompt its centre), stability_score and crop_box (x, y, w, h: the whole image).
        `supervision.Detections.from_sam` reads them.
        """
        height, width = self.image.shape[:2]
        points = self.prompts[["x", "y"]].to_numpy(dtype=float)
        return [
            {
                "segmentation": coco_mask.decode(rle).astype(bool),
                "area": int(coco_mask.area(rle)),
                "bbox": _xywh(self.boxes[i]),
                "predicted_iou": float(self.scores[i]),
                "point_coords": [points[self.mask_prompt[i]].tolist()],
                "stability_score": float(self.stability[i]),
                "crop_box": [0, 0, width, height],
            }
            for i, rle in enumerate(self.masks)
        ]

    def to_coco(self, image_id: int = 1, file_name: str = "") -> dict:
        """A COCO data set of this one image, ready for `json.dump` and for `pycocotools.coco.COCO`.

        Annotation i + 1 is mask i: compressed RLE, area, bbox (x, y, w, h), iscrowd 0, one category "object"; and
        score, stability_score and point_coords beside COCO's own keys.
        """
        height, width = self.image.shape[:2]
        points = self.prompts[["x", "y"]].to_numpy(dtype=float)
        annotations = [
            {
                "id": i + 1,
                "image_id": image_id,
                "category_id": 1,
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode("ascii")},
                "area": int(coco_mask.area(rle)),
                "bbox": _xywh(self.boxes[i]),
                "iscrowd": 0,
                "score": float(self.scores[i]),
                "stability_score": float(self.stability[i]),
                "point_coords": [points[self.mask_prompt[i]].tolist()],
            }
            for i, rle in enumerate(self.masks)
        ]
        return {
            "info": {"description": f"aopsam_lab, method {self.method}"},
            "images": [{"id": image_id, "file_name": file_name, "width": width, "height": height}],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "object", "supercategory": ""}],
        }

    def pem(self, i: int | None = None) -> np.ndarray:
        """h x w float32: the PEM of reference i (the order they were found), or the maximum over all references.

        Raises ValueError where the method made none, or none with that number.
        """
        n = 0 if self.pems is None else len(self.pems)
        if n == 0:
            raise ValueError(
                f"Method {self.method!r} made no PEM here; one with adaptive filtering, as 'aop', does."
            )
        if i is None:
            return self.pems.max(axis=0)
        if not 0 <= i < n:
            raise ValueError(f"There is no reference {i}: this image has {n}, numbered from 0.")
        return self.pems[i]

    def save(
        self, folder: str | os.PathLike, stem: str, file_name: str | None = None
    ) -> dict[str, Path]:
        """Write `<stem>_labels.png`, `<stem>_overlay.png` and `<stem>.json` to `folder` (made if missing).

        labels: 16-bit grey, i + 1 where mask i lies, larger masks below smaller ones; json: `to_coco` with `file_name`
        (default: the stem). Each file appears whole; the JSON comes last, so where it is, the other two are.
        Returns their paths under "labels", "overlay" and "coco".
        """
        folder = Path(folder)
        size = self.image.shape[:2]
        labels = drawing.png_bytes(drawing.label_image(self.masks, size))
        picture = drawing.png_bytes(drawing.overlay(self.image, self.masks))
        coco = json.dumps(self.to_coco(file_name=stem if file_name is None else file_name))
        return {
            "labels": write_atomically(folder / f"{stem}_labels.png", labels),
            "overlay": write_atomically(folder / f"{stem}_overlay.png", picture),
            "coco": write_atomically(folder / f"{stem}.json", coco),
        }

    def plot(
        self,
        ax: Axes | None = None,
        masks: bool = True,
        prompts: bool | Sequence[str] = True,
        alpha: float = 0.45,
        legend: bool = True,
    ) -> Axes:
        """Draw the image, its masks and its prompts (all, none, or those of the given STATUSES); the axes.

        The axes are in the image frame. Without `ax` a figure is made with whatever matplotlib backend is set.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots(layout="constrained")
        height, width = self.image.shape[:2]
        picture = drawing.overlay(self.image, self.masks, alpha) if masks else self.image
        ax.imshow(picture, extent=(0, width, height, 0), interpolation="nearest")
        chosen = STATUSES if prompts is True else tuple(prompts or ())
        for status in chosen:
            if status not in FATES:
                raise ValueError(f"prompts: {status!r} is not one of {', '.join(STATUSES)}.")
            self._draw_prompts(ax, status)
        if legend and any(status in set(self.prompts["status"]) for status in chosen):
            ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize="small")
        ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        title = f"{self.method}: {len(self.masks)} masks, {self.n_decoded} of {self.n_sampled} prompts decoded"
        ax.set_title(title, fontsize="small")
        return ax

    def explore(self, sam: str = "mobile_sam"):
        """This result in the explorer, as it is, for a notebook's cell; the SAM is asked only when something changes."""
        from aopsam_lab.widgets.explorer import explore_segmentation

        return explore_segmentation(self, sam)

    def _draw_prompts(self, ax: Axes, status: str) -> None:
        from matplotlib import patheffects
        from matplotlib.patches import Rectangle

        rows = self.prompts[self.prompts["status"] == status]
        if rows.empty:
            return
        marker, colour, text = FATES[status]
        edge = {"linewidths": 1.4} if marker in "x+" else {"edgecolors": "black", "linewidths": 0.7}
        label = f"{text} ({len(rows)})"
        area = float(
            np.clip(2600 / len(self.prompts), 7, 26)
        )  # points squared: room to see under a dense grid
        drawn = ax.scatter(
            rows["x"], rows["y"], s=area, marker=marker, c=colour, label=label, zorder=3, **edge
        )
        if (
            marker in "x+"
        ):  # a cross has no edge of its own: a dark rim keeps it visible on bright pixels
            drawn.set_path_effects(
                [patheffects.Stroke(linewidth=2.6, foreground="black"), patheffects.Normal()]
            )
        for box in rows[["x0", "y0", "x1", "y1"]].dropna().itertuples(index=False):
            size = (box.x1 - box.x0, box.y1 - box.y0)
            ax.add_patch(
                Rectangle((box.x0, box.y0), *size, fill=False, ec=colour, lw=0.9, zorder=2)
            )


def _xywh(box: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = map(float, box)
    return [x0, y0, x1 - x0, y1 - y0]
