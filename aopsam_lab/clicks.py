"""Where a person who corrects a mask would click next: for training, and for measuring, with more than one click (ours)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aopsam_lab.data.points import pole


def next_click(found: np.ndarray, truth: np.ndarray) -> tuple[float, float, int]:
    """The pole of what a mask lacks or of what it has too much, whichever lies deeper inside.

    found, truth: (H, W) bool, one frame; the truth has at least one pixel. Returns x, y in that frame (pixel centres at +0.5)
    and the label, 1 where the mask should grow, 0 where it should shrink. A perfect mask is clicked at its truth's pole again.
    """
    missing, extra = truth & ~found, found & ~truth
    at = [(*pole(part), label) for part, label in ((missing, 1), (extra, 0)) if part.any()]
    x, y, _, label = max(at, key=lambda p: p[2]) if at else (*pole(truth), 1)
    return x, y, label


def squared_depths(masks: Tensor) -> Tensor:
    """(..., H, W) bool -> float32: the square of each pixel's distance to the nearest one outside its mask, 0 outside.

    Exact, as the Euclidean distance transform; what lies beyond the picture's edge counts as outside.
    """
    height, width = masks.shape[-2:]
    row = torch.arange(1, height + 1, device=masks.device)[:, None]
    above = torch.where(masks, 0, row).cummax(-2).values
    below = torch.where(masks, height + 1, row).flip(-2).cummin(-2).values.flip(-2)
    along = torch.minimum(row - above, below - row).float() ** 2  # within the column
    reach = (min(height, width) + 1) // 2  # no pixel lies deeper
    padded = F.pad(along, (reach, reach))
    found = along
    for step in range(1, reach + 1):
        sides = torch.minimum(padded[..., reach - step : reach - step + width], padded[..., reach + step : reach + step + width])
        found = torch.minimum(found, sides + step**2)
    return found


def next_clicks(found: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`next_click` of many masks at once, on their device: (..., H, W) bool each -> x, y (..., 2) and labels (...)."""
    depths = squared_depths(torch.stack([truth & ~found, found & ~truth, truth], -3)).flatten(-2)  # (..., 3, H * W)
    deepest, at = depths.max(-1)
    missing, extra, _ = deepest.unbind(-1)
    which = torch.where(torch.maximum(missing, extra) == 0, 2, (extra > missing).long())
    at = at.gather(-1, which[..., None])[..., 0]
    width = truth.shape[-1]
    return torch.stack([at % width, at // width], -1) + 0.5, (which != 1).float()
