"""What goes through the pipeline: an encoded image, prompts, the masks found, a proposal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

STATUSES = ("kept", "eliminated", "low_iou", "unstable", "duplicate", "not_reached")
BOX_NMS_THRESH = 0.7  # of two boxes with a higher IoU the surer one stays, as in segment_anything


@dataclass
class Encoded:
    """An image with its SAM embedding.

    Args:
        image: (H, W, 3) uint8, RGB.
        model_image: (1, 3, S, S), normalised and zero-padded.
        embedding: (1, C, h, w).
        image_pe: (1, C, h, w), SAM's dense positional encoding.
        input_size: (height, width) of the scaled image in the model frame.
        seconds: what encoding took.
    """

    image: np.ndarray
    model_image: Tensor
    embedding: Tensor
    image_pe: Tensor
    input_size: tuple[int, int]
    seconds: float
    made: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def _scale(self, like: Tensor) -> Tensor:
        height, width = self.image.shape[:2]
        return like.new_tensor([self.input_size[1] / width, self.input_size[0] / height])

    def to_model(self, points: Tensor) -> Tensor:
        """(..., 2) points (x, y), image frame -> model frame."""
        return points * self._scale(points)

    def to_image(self, points: Tensor) -> Tensor:
        """(..., 2) points (x, y), model frame -> image frame."""
        return points / self._scale(points)


@dataclass
class Models:
    """What a method may need beside SAM: a predictor has `pcm`, a detector `boxes`."""

    predictor: Any = None
    detector: Any = None


@dataclass
class Prompts:
    """m prompts in the image frame, strongest first.

    Args:
        points: (m, 2) float32 (x, y); of a box, its centre.
        confidence: (m,).
        boxes: (m, 4) x0 y0 x1 y1, or None for points.
        multimask: whether each is decoded to SAM's three masks or to its single one.
    """

    points: Tensor
    confidence: Tensor
    boxes: Tensor | None = None
    multimask: bool = True

    def __len__(self) -> int:
        return len(self.points)


@dataclass
class Found:
    """n masks of m decoded prompts that passed both thresholds, duplicates among them.

    Args:
        low_res: (n, 4h, 4w) logits, model frame; on padding they may be 0.
        iou: (n,), predicted.
        stability: (n,).
        boxes: (n, 4) long, image frame, inclusive.
        prompt: (n,) long, index into the prompts.
        best_iou: (m,), the highest predicted IoU of each prompt's masks, passed or not.
        masks: n COCO RLE where they are encoded already.
    """

    low_res: Tensor
    iou: Tensor
    stability: Tensor
    boxes: Tensor
    prompt: Tensor
    best_iou: Tensor = field(repr=False)
    masks: list[dict] | None = field(default=None, repr=False)


@dataclass
class Proposal:
    """The prompts of a method, here all in one round; a subclass may have several.

    Args:
        prompts: all of them.
        pcm: (4h, 4w), or None.
        eliminated_by: (m,) long, the row of `pems` that eliminated the prompt, -1 for none.
        pem_value: (m,) the PEM there, NaN for none.
        pems: (h, w) maps, one a reference mask.
        references: for each the prompt that found it and what its PEM must exceed.
    """

    prompts: Prompts
    pcm: Tensor | None = None
    eliminated_by: Tensor = field(init=False)
    pem_value: Tensor = field(init=False)
    pems: list[Tensor] = field(default_factory=list)
    references: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        m, device = len(self.prompts), self.prompts.points.device
        self.eliminated_by = torch.full((m,), -1, dtype=torch.long, device=device)
        self.pem_value = torch.full((m,), float("nan"), device=device)
        self.waiting = torch.ones(m, dtype=torch.bool, device=device)

    def next_round(self) -> Tensor | None:
        """Indices (long) of the prompts to decode now, or None when none are left."""
        if not self.waiting.any():
            return None
        self.waiting[:] = False
        return torch.arange(len(self.prompts), device=self.waiting.device)

    def observe(self, found: Found, mask_threshold: float) -> None:
        """See this round's masks; a logit above `mask_threshold` is on the mask."""
