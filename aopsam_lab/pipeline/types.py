"""What goes through the pipeline: an encoded image, prompts, the masks found, a proposal."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aopsam_lab.sam.zoo import SamSpec

STATUSES = ("kept", "eliminated", "low_iou", "unstable", "duplicate", "not_reached")
BOX_NMS_THRESH = 0.7  # of two boxes with a higher IoU the surer one stays, as in segment_anything


@dataclass(frozen=True)
class MaskParams:
    """Which masks are kept: names, meanings and defaults of SamAutomaticMaskGenerator.

    As there, a threshold of 0 drops no mask; an empty one always goes.
    """

    points_per_side: int | None = None  # of a grid; None: the method's own
    pred_iou_thresh: float | None = None  # the least predicted IoU; None: the SAM's own
    stability_score_thresh: float | None = None  # the least stability score; None: the SAM's own
    box_nms_thresh: float = BOX_NMS_THRESH
    crop_n_layers: int = 0  # of crops on which a grid is laid as well: layer i has 4 ** i
    min_mask_region_area: int = 0  # smaller holes are filled, smaller islands dropped; in pixels

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_whole = not name.endswith("_thresh")
            least, most = int(name == "points_per_side"), math.inf if is_whole else 1
            if value is not None and not (least <= value <= most and not (is_whole and value % 1)):
                wanted = f"be a whole number of {least} or more" if is_whole else "lie in [0, 1]"
                raise ValueError(f"{name} must {wanted}, not {value}")

    def of(self, spec: SamSpec) -> SamSpec:
        """The spec of a SAM with these thresholds."""
        iou, stability = self.pred_iou_thresh, self.stability_score_thresh
        given = {"pred_iou_thresh": iou, "stability_score_thresh": stability}
        own: dict[str, Any] = {k: v or -math.inf for k, v in given.items() if v is not None}
        return replace(spec, **own)


@dataclass
class Encoded:
    """An image with its SAM embedding."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    model_image: Tensor  # (1, 3, S, S), normalised and zero-padded
    embedding: Tensor  # (1, C, h, w)
    image_pe: Tensor  # (1, C, h, w), SAM's dense positional encoding
    input_size: tuple[int, int]  # (height, width) of the scaled image in the model frame
    seconds: float  # what encoding took
    # where the image is a crop: its x0 y0 x1 y1 in the whole, and (height, width) of the whole
    crop: tuple[list[int], tuple[int, int]] | None = None
    # the image's mask decoder, by SAM's
    made: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def to_model(self, points: Tensor) -> Tensor:
        """(..., 2) points (x, y), image frame -> model frame."""
        return points * points.new_tensor(self._scale)

    def to_image(self, points: Tensor) -> Tensor:
        """(..., 2) points (x, y), model frame -> image frame."""
        return points / points.new_tensor(self._scale)

    @property
    def _scale(self) -> list[float]:
        height, width = self.image.shape[:2]
        return [self.input_size[1] / width, self.input_size[0] / height]


class Models(NamedTuple):
    """What a method may need beside SAM."""

    predictor: Any = None  # has `pcm`
    detector: Any = None  # has `boxes`


@dataclass
class Prompts:
    """m prompts in the image frame, strongest first."""

    points: Tensor  # (m, 2) float32 (x, y); of a box, its centre
    confidence: Tensor  # (m,)
    boxes: Tensor | None = None  # (m, 4) x0 y0 x1 y1, or None for points
    multimask: bool = True  # whether each is decoded to SAM's three masks or to its single one

    def __len__(self) -> int:
        return len(self.points)


@dataclass
class Found:
    """n masks of m decoded prompts that passed both thresholds, duplicates among them."""

    low_res: Tensor  # (n, 4h, 4w) logits, model frame; on padding they may be 0
    iou: Tensor  # (n,), predicted
    stability: Tensor  # (n,)
    boxes: Tensor  # (n, 4) long, image frame, inclusive
    prompt: Tensor  # (n,) long, index into the prompts
    _: KW_ONLY
    best_iou: Tensor  # (m,), the highest predicted IoU of each prompt's masks, passed or not
    masks: list[dict] | None = None  # n COCO RLE where they are encoded already


@dataclass
class Proposal:
    """The m prompts of a method, here all in one round; a subclass may have several."""

    prompts: Prompts
    pcm: Tensor | None = None  # (4h, 4w)

    def __post_init__(self) -> None:
        m, device = len(self.prompts), self.prompts.points.device
        self.waiting = torch.ones(m, dtype=torch.bool, device=device)
        # the row of `pems` that eliminated each prompt, -1 for none, and the PEM there
        self.eliminated_by = torch.full((m,), -1, dtype=torch.long, device=device)
        self.pem_value = torch.full((m,), float("nan"), device=device)
        self.pems: list[Tensor] = []  # (h, w) maps, one a reference mask
        # for each the prompt that found it and what its PEM must exceed
        self.references: list[tuple[int, float]] = []

    def next_round(self) -> Tensor | None:
        """Indices (long) of the prompts to decode now, or None when none are left."""
        index = self.waiting.nonzero()[:, 0]
        self.waiting[index] = False
        return index if len(index) else None

    def observe(self, found: Found, mask_threshold: float) -> None:
        """See this round's masks; a logit above `mask_threshold` is on the mask."""
