"""Masks at the image's own size, from low-resolution logits.

`Sam.postprocess_masks` resizes linearly to the model frame, then the image's part of it to the
image. Of a large image only the rows are made that the mask can be on, some at a time: a pixel is a
weighted mean of the logits around it, so it exceeds a threshold only where one does.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score
from torch import Tensor

from aopsam_lab.masks.rle import encode_rle

WHOLE_PIXELS = 1 << 20  # so many are resized at a time; the rows of a smaller image are all made
GPU_PIXELS = 1 << 26  # of masks that a GPU resizes at a time


@dataclass(frozen=True)
class FullSize:
    """Resizes low-resolution logits (n, 4h, 4w), model frame, to masks of one image."""

    model: int  # S, the side of the model frame
    input_size: tuple[int, int]  # (height, width) of the scaled image in the model frame
    image_size: tuple[int, int]  # (H, W) of the image

    def measure(self, logits: Tensor, threshold: float, offset: float) -> tuple[Tensor, Tensor]:
        """Stability scores (n,) and boxes (n, 4) of masks, as segment_anything defines them.

        The score is the IoU of the mask cut at threshold plus and minus the offset, NaN for 0 / 0.
        Boxes are inclusive pixel indices, 0 for an empty mask.
        """
        scores = logits.new_full((len(logits),), float("nan"))
        boxes = torch.zeros(len(logits), 4, dtype=torch.long, device=logits.device)
        if not _on_cpu(logits):
            for part, full in self._batches(logits):
                scores[part] = calculate_stability_score(full, threshold, offset)
                boxes[part] = batched_mask_to_box(full > threshold)
            return scores, boxes
        for i, strips in enumerate(self._rows(logits, threshold - offset)):
            inner, outer, corners = 0, 0, []
            for pixels, top in strips:
                outer += int(np.count_nonzero(pixels > threshold - offset))
                inner += int(np.count_nonzero(pixels > threshold + offset))
                x, y, width, height = cv2.boundingRect((pixels > threshold).view(np.uint8))
                if width:
                    corners += [(x, top + y), (x + width - 1, top + y + height - 1)]
            scores[i] = inner / (outer or float("nan"))
            if corners:
                boxes[i] = torch.tensor([*np.min(corners, 0), *np.max(corners, 0)])
        return scores, boxes

    def encode(self, logits: Tensor, threshold: float) -> list[dict]:
        """COCO RLE of the masks `logits > threshold`, (n, 4h, 4w)."""
        if not _on_cpu(logits):
            return [r for _, full in self._batches(logits) for r in encode_rle(full > threshold)]
        height, width = self.image_size
        found = []
        for strips in self._rows(logits, threshold):
            columns = np.zeros((width, height), np.uint8)
            for pixels, top in strips:
                on = (pixels > threshold).view(np.uint8)
                columns[:, top : top + len(pixels)] = cv2.transpose(on)
            found.append(coco_mask.encode(columns.T))
        return found

    def _rows(self, logits: Tensor, least: float) -> Iterator[Iterable[tuple[np.ndarray, int]]]:
        """Of each mask strips of the rows that may exceed `least`, and the first row's index."""
        (height, width), (used_y, used_x) = self.image_size, self.input_size
        times = self.model // logits.shape[-1]
        # no logits on padding: a pixel at the edge is made of the last on it and the next one
        logits = logits[:, : -(-used_y // times) + 1, : -(-used_x // times) + 1]
        for mask in logits.numpy():
            model = cv2.resize(mask, (mask.shape[1] * times, mask.shape[0] * times))
            model = model[:used_y, :used_x]
            if height * width <= WHOLE_PIXELS:
                yield [(cv2.resize(model, (width, height)), 0)]  # linearly
                continue
            on = (model > least).any(1).nonzero()[0]
            top, bottom = (on[0], on[-1]) if len(on) else (0, 0)
            scale = height / used_y  # a row of pixels is made of the two rows beside it
            first = max(0, int((top - 0.5) * scale - 0.5))
            last = min(height, int((bottom + 1.5) * scale + 1.5))
            step = max(1, WHOLE_PIXELS // width)
            parts = ((i, min(i + step, last)) for i in range(first, last, step))
            yield ((_resized_rows(model, self.image_size, i, j), i) for i, j in parts)

    def _batches(self, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Full-size logits (k, H, W) of a few masks at a time, and which masks these are."""
        (height, width), (used_y, used_x) = self.image_size, self.input_size
        step = max(1, GPU_PIXELS // (height * width))
        for i in range(0, len(logits), step):
            model = F.interpolate(logits[i : i + step, None], (self.model,) * 2, mode="bilinear")
            full = F.interpolate(model[..., :used_y, :used_x], self.image_size, mode="bilinear")
            yield slice(i, i + step), full[:, 0]


def _on_cpu(logits: Tensor) -> bool:
    return logits.device.type == "cpu"


def _resized_rows(values: np.ndarray, size: tuple[int, int], first: int, last: int) -> np.ndarray:
    """The rows first to last of `values` (h, w) resized linearly to `size` (H, W)."""
    at = (np.arange(first, last) + 0.5) * (len(values) / size[0]) - 0.5
    at = at.clip(0, len(values) - 1)
    above = at.astype(int)
    below = np.minimum(above + 1, len(values) - 1)
    weight = (at - above).astype(np.float32)[:, None]
    rows = values[above] * (1 - weight) + values[below] * weight
    return cv2.resize(rows, (size[1], last - first))
