"""The one result type: what a method finds in an image, and how it came to it."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from pycocotools import mask as coco_mask

import aopsam_lab
from aopsam_lab.masks import drawing
from aopsam_lab.masks.rle import decode_rle
from aopsam_lab.pipeline.types import MaskParams

SHOWN_SIDE = 800  # pixels, at most, of the picture in a notebook


@dataclass(eq=False, repr=False)
class Segmentation:
    """Masks of one image, best first, with the prompts they came from.

    n masks, m prompts; S is the side of SAM's input, h x w its embedding. Points and boxes are in
    the image frame: pixels of `image`, (x, y), pixel centres at +0.5.

    The columns of `prompts`: x, y (the point, or the centre of the box); confidence; round (in
    which it was decoded, or -1); status; by (the row of `pems` that eliminated it, or -1). Where
    any was eliminated: pem (the value there, or NaN). Of boxes: x0, y0, x1, y1.

    A status is "kept" where a mask of the prompt is among `masks`; "duplicate" where box NMS
    removed all; "low_iou" or "unstable" where all missed a threshold, of predicted IoU or of
    stability, or lie at the edge of a crop; "eliminated"; or "not_reached", beyond `max_prompts`.
    The last two are not decoded. Crops are rounds: after the whole image one each.
    """

    image: np.ndarray  # (H, W, 3) uint8, RGB
    masks: list[dict]  # n COCO RLE `{"size": [H, W], "counts": bytes}`, by `scores`, highest first
    scores: np.ndarray  # (n,) float32, the IoU that SAM predicts
    stability: np.ndarray  # (n,) float32, IoU of the mask cut at a higher and at a lower logit
    boxes: np.ndarray  # (n, 4) float32, x0 y0 x1 y1, inclusive pixels as in segment_anything
    mask_prompt: np.ndarray  # (n,) int, the row of `prompts` that made the mask
    prompts: pd.DataFrame  # m rows
    pcm: np.ndarray | None = None  # (4h, 4w) float32 in [0, 1], over the model frame
    pems: np.ndarray | None = None  # (r, h, w) float32 in [0, 1], the PEM of each reference
    # r rows. prompt: the row of `prompts` whose mask it is; threshold: what its PEM must exceed
    references: pd.DataFrame = field(default_factory=pd.DataFrame)
    # encode, infer (until prompts are there: the paper's Inf_Lat), mask (from prompts to masks:
    # Mask_Lat), total
    seconds: dict[str, float] = field(default_factory=dict)
    method: str = ""  # its name
    params: dict[str, float] = field(default_factory=dict)  # the ASF parameters that it used
    quality: MaskParams = MaskParams()
    n_decoded: int = 0  # prompts that SAM decoded
    n_sampled: int = 0  # m, all prompts that the method proposed
    n_eliminated: int = 0  # prompts that a PEM eliminated
    input_size: tuple[int, int] = (0, 0)  # (height, width) of the scaled image in the model frame
    model_size: int = 0  # S

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        found = f"{len(self.masks)} masks, {self.n_decoded} of {self.n_sampled} prompts decoded"
        return f"Segmentation({self.method!r}, {width} x {height} pixels: {found})"

    def _repr_html_(self) -> str:
        """The picture with its masks, and how many prompts have which status."""
        picture = Image.fromarray(drawing.overlay(self.image, self.masks))
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        png = base64.b64encode(drawing.png_bytes(np.asarray(picture))).decode()
        counts = self.prompts["status"].value_counts().to_frame("prompts").T
        counts.columns = [status.replace("_", " ") for status in counts]
        if "total" in self.seconds:
            counts["seconds"] = f"{self.seconds['total']:.2f}"
        text = f"<div>{escape(repr(self))}</div>{counts.to_html(border=0)}"
        return f'<img src="data:image/png;base64,{png}" style="max-width: 100%">{text}'

    def to_array(self) -> np.ndarray:
        """The masks, (n, H, W) bool."""
        return decode_rle(self.masks, self.image.shape[:2])

    def to_records(self) -> list[dict]:
        """The masks as SamAutomaticMaskGenerator gives them, for supervision's `from_sam`."""
        height, width = self.image.shape[:2]
        return [
            {
                "segmentation": coco_mask.decode(rle).astype(bool),
                "predicted_iou": float(self.scores[i]),
                "crop_box": [0, 0, width, height],
                **self._about(i),
            }
            for i, rle in enumerate(self.masks)
        ]

    def to_coco(self, image_id: int = 1, file_name: str = "") -> dict:
        """A COCO data set of this image, ready for `json.dump`; annotation i + 1 is mask i."""
        height, width = self.image.shape[:2]
        annotations = [
            {
                "id": i + 1,
                "image_id": image_id,
                "category_id": 1,
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode("ascii")},
                "iscrowd": 0,
                "score": float(self.scores[i]),
                **self._about(i),
                "bbox": coco_mask.toBbox(rle).tolist(),  # the generator's is a pixel smaller
            }
            for i, rle in enumerate(self.masks)
        ]
        return {
            "info": {"description": f"aopsam_lab, method {self.method}"},
            "images": [{"id": image_id, "file_name": file_name, "width": width, "height": height}],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "object", "supercategory": ""}],
        }

    def _about(self, i: int) -> dict:
        """What COCO and the generator tell of mask i under the same names."""
        x0, y0, x1, y1 = map(float, self.boxes[i])
        prompt = self.prompts.iloc[self.mask_prompt[i]]
        return {
            "area": int(coco_mask.area(self.masks[i])),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "stability_score": float(self.stability[i]),
            "point_coords": [[float(prompt["x"]), float(prompt["y"])]],
        }

    def pem(self, i: int | None = None) -> np.ndarray:
        """The PEM of reference i, or the highest value of all references, (h, w) float32."""
        if self.pems is None:
            raise ValueError(f"Method {self.method!r} made no PEM here; method 'aop' makes some.")
        if i is None:
            return self.pems.max(axis=0)
        if not 0 <= i < len(self.pems):
            raise ValueError(f"There is no reference {i}: this image has {len(self.pems)}, from 0.")
        return self.pems[i]

    # The package's face knows who draws and who writes; a result does not.
    def plot(self, *args: Any, **kwargs: Any) -> Any:
        """Draw image, masks and prompts: `aopsam_lab.plot` of this result."""
        return aopsam_lab.plot(self, *args, **kwargs)

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """Write masks as JSON and PNG: `aopsam_lab.save` of this result."""
        return aopsam_lab.save(self, *args, **kwargs)
