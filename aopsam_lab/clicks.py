"""Where a person who corrects a mask would click next: for training, and for measuring, with more than one click (ours)."""

from __future__ import annotations

import numpy as np

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
