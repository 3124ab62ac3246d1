"""Masks at the picture's size from low-resolution logits, worked out only where that cannot be told without (ours).

``Sam.postprocess_masks`` resizes twice, both times linearly along each axis: to the model frame, and from its part that
is picture to the picture. Both together are one small matrix an axis, and every pixel is a weighted mean of the at most
3 x 3 low-resolution logits around it. Pixels whose logits are the same make up a *cell*. Where all logits of a cell lie
on one side of a threshold, so do all its pixels, and they need only be counted; the others, along that threshold's own
outline, are worked out. Stability and boxes are therefore exact, from a few percent of the pixels. Small pictures are
not worth that on a CPU: there OpenCV resizes one mask after the other as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aopsam_lab.masks.rle import encode_changes, encode_rle

# of a picture whose masks a CPU resizes as a whole: at 0.3 M that was twice as quick, at 1 M a little, at 2 M no longer
WHOLE_PIXELS = 1 << 20
CELL_PIXELS = 1 << 17  # pixels of one row of all cells worked out at a time
ENCODE_PIXELS = 1 << 20  # pixels in cells' top rows, of masks encoded at a time


@dataclass(frozen=True)
class Axis:
    """One axis of the resizing: L low-resolution positions, n pixels, G cells of at most g pixels, k logits a pixel.

    base:    (G,) long, the first of the k logits that a cell's pixels are made of.
    start, size: (G,) long, a cell's first pixel and their number.
    weights: (g, k, G), those of each pixel of each cell; NaN where a cell has fewer pixels than g.
    """

    base: Tensor
    start: Tensor
    size: Tensor
    weights: Tensor

    @staticmethod
    def of(low: int, model: int, used: int, pixels: int, device: torch.device) -> Axis:
        """From ``low`` logits to ``model`` pixels, of which the first ``used`` become ``pixels``."""
        unit = torch.eye(low, device=device)[None]
        scaled = F.interpolate(unit, model, mode="linear", align_corners=False)[..., :used]
        matrix = F.interpolate(scaled, pixels, mode="linear", align_corners=False)[0].T.contiguous()
        used_logits = matrix != 0
        first, last = used_logits.int().argmax(1), low - 1 - used_logits.flip(1).int().argmax(1)
        k = int((last - first).max()) + 1
        base = first.clamp(max=low - k)
        place = torch.arange(pixels, device=device)
        begins = torch.ones_like(base, dtype=torch.bool)
        begins[1:] = base[1:] != base[:-1]
        since = (
            place - torch.where(begins, place, 0).cummax(0).values
        )  # pixels since the last change of base
        # at the picture's edges many more pixels share their logits: as several cells of the usual size
        inner = begins.nonzero()[1:, 0].diff()
        usual = int(inner.max()) if len(inner) else int(since.max()) + 1
        start = (since % usual == 0).nonzero()[:, 0]
        base, size = base[start], torch.cat([start, start.new_tensor([pixels])]).diff()
        g = int(size.max())
        offset = torch.arange(g, device=device)
        rows = (start[:, None] + offset).clamp(max=pixels - 1)  # (G, g)
        columns = base[:, None] + torch.arange(k, device=device)  # (G, k)
        weights = matrix[rows[:, :, None], columns[:, None]]  # (G, g, k)
        weights = weights.masked_fill((offset >= size[:, None])[:, :, None], float("nan"))
        return Axis(base, start, size, weights.permute(1, 2, 0).contiguous())

    @property
    def reach(self) -> int:
        """k."""
        return self.weights.shape[1]


class FullSize:
    """From low-resolution logits (n, 4h, 4w), model frame, to masks of one picture.

    low: (4h, 4w). model: S. input_size: (height, width) of the scaled picture in the model frame. image_size: (H, W).
    """

    def __init__(
        self,
        low: tuple[int, int],
        model: int,
        input_size: tuple[int, int],
        image_size: tuple[int, int],
        device: torch.device,
    ):
        self.model, self.input_size, self.image_size = model, input_size, image_size
        self.y, self.x = (
            Axis.of(low[i], model, input_size[i], image_size[i], device) for i in range(2)
        )

    def measure(
        self, logits: Tensor, threshold: float, offset: float, least: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Stability score (n,) and box (n, 4) long of masks ``logits > threshold`` at the picture's size.

        As segment_anything: stability is the IoU of the mask cut at ``threshold + offset`` and at ``threshold -
        offset``, NaN where the latter is empty; the box is x0 y0 x1 y1, inclusive pixel indices, all 0 for an empty
        mask.
        least: masks of a lower stability are not wanted. Those that cannot reach it are not worked out, their score is
        NaN; and the boxes of all of them are 0.
        """
        least = max(least, 0.0)  # -inf, for "all of them", times no pixels would be no number
        if self._as_a_whole(logits):
            return self._measure_whole(logits, threshold, offset, least)
        smallest, greatest = self._bounds(logits)
        surely_outer = self._pixels(smallest > threshold - offset)
        maybe_inner = self._pixels(greatest > threshold + offset)
        hopeful = (maybe_inner >= least * surely_outer).nonzero()[:, 0]
        part = logits, smallest, greatest
        if len(hopeful) < len(logits):
            part = tuple(x[hopeful] for x in part)
        stability = logits.new_full((len(logits),), float("nan"))
        stability[hopeful] = (
            self._area(*part, threshold + offset) / self._area(*part, threshold - offset)
        ).float()
        boxes = torch.zeros(len(logits), 4, dtype=torch.long, device=logits.device)
        wanted = (
            (stability >= least).nonzero()[:, 0]
            if least
            else torch.arange(len(logits), device=logits.device)
        )
        boxes[wanted] = self._boxes(logits[wanted], smallest[wanted], greatest[wanted], threshold)
        return stability, boxes

    def _measure_whole(
        self, logits: Tensor, threshold: float, offset: float, least: float
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`measure`, by resizing each mask."""
        stability, boxes = (
            logits.new_full((len(logits),), float("nan")),
            torch.zeros(len(logits), 4, dtype=torch.long),
        )
        for i, whole in enumerate(self._whole(logits)):
            inner, outer = (
                np.count_nonzero(whole > cut) for cut in (threshold + offset, threshold - offset)
            )
            stability[i] = inner / outer if outer else float("nan")
            if stability[i] >= least or not least:
                x, y, w, h = cv2.boundingRect((whole > threshold).view(np.uint8))
                boxes[i] = torch.tensor([x, y, x + w - 1, y + h - 1] if w else [0, 0, 0, 0])
        return stability, boxes

    def _as_a_whole(self, logits: Tensor) -> bool:
        """Whether resizing each mask as a whole is the quicker way."""
        return (
            logits.device.type == "cpu" and self.image_size[0] * self.image_size[1] <= WHOLE_PIXELS
        )

    def _whole(self, logits: Tensor) -> Iterator[np.ndarray]:
        """One mask after the other at the picture's size, (H, W) logits."""
        high, wide = self.input_size
        for mask in logits.numpy():
            scaled = cv2.resize(mask, (self.model, self.model), interpolation=cv2.INTER_LINEAR)[
                :high, :wide
            ]
            yield cv2.resize(scaled, self.image_size[::-1], interpolation=cv2.INTER_LINEAR)

    def _pixels(self, cells: Tensor) -> Tensor:
        """(n, Gy, Gx) bool -> (n,) double, the pixels of the cells that are on."""
        rows = cells.float() @ self.x.size.float()  # whole numbers below 2^24: exact
        return rows.double() @ self.y.size.double()

    def _area(self, logits: Tensor, smallest: Tensor, greatest: Tensor, cut: float) -> Tensor:
        """Pixels of each mask above ``cut`` -> (n,) double. smallest, greatest: see :meth:`_bounds`."""
        full = smallest > cut
        area = self._pixels(full)
        for cells in self._parts((~full & (greatest > cut)).nonzero()):
            counts = sum(
                (values > cut).sum(0, dtype=torch.uint8).float()
                for values in self._rows(logits, cells)
            )
            area = area.index_add(0, cells[:, 0], counts.double())
        return area

    def _boxes(
        self, logits: Tensor, smallest: Tensor, greatest: Tensor, threshold: float
    ) -> Tensor:
        """Boxes of masks, see :meth:`measure`. Only cells beyond the outermost full ones can make a box larger."""
        full = smallest > threshold
        on_x = full.any(1).repeat_interleave(self.x.size, 1)  # (n, W): columns with anything on
        on_y = full.any(2).repeat_interleave(self.y.size, 1)  # (n, H)
        beyond = _beyond(full.any(2))[:, :, None] | _beyond(full.any(1))[:, None]
        for cells in self._parts((beyond & ~full & (greatest > threshold)).nonzero()):
            mask, i, j = cells.unbind(1)
            on_columns = torch.zeros(
                len(self.x.weights), len(cells), dtype=torch.bool, device=logits.device
            )
            for r, values in enumerate(self._rows(logits, cells)):
                on = values > threshold
                on_columns |= on
                some = on.any(0)
                on_y[mask[some], self.y.start[i[some]] + r] = True
            column, cell = on_columns.nonzero(as_tuple=True)
            on_x[mask[cell], self.x.start[j[cell]] + column] = True
        (x0, x1), (y0, y1) = _ends(on_x), _ends(on_y)
        return torch.stack([x0, y0, x1, y1], 1).masked_fill(~on_x.any(1, keepdim=True), 0)

    def encode(self, logits: Tensor, threshold: float) -> list[dict]:
        """COCO RLE of the masks ``logits > threshold`` at the picture's size: (n, 4h, 4w) -> n.

        Run lengths go down the columns. A run begins or ends between two pixels of one open cell, or between cells.
        """
        if self._as_a_whole(logits):
            return [
                rle
                for whole in self._whole(logits)
                for rle in encode_rle((whole > threshold)[None])
            ]
        step = max(1, ENCODE_PIXELS // (len(self.y.size) * self.image_size[1]))
        return [rle for part in logits.split(step) for rle in self._encode(part, threshold)]

    def _encode(self, logits: Tensor, threshold: float) -> list[dict]:
        n, (height, width) = len(logits), self.image_size
        smallest, greatest = self._bounds(logits)
        full = smallest > threshold
        open_cells = (~full & (greatest > threshold)).nonzero()
        # the first and the last pixel of each cell's columns: (n, Gy, W)
        top = full.repeat_interleave(self.x.size, 2)
        bottom = top.clone()
        span = height * width + 1  # of one mask, whose last run may end past its last pixel
        changes = []
        for cells in self._parts(open_cells):
            mask, i, j = cells.unbind(1)
            column = (
                self.x.start[j] + torch.arange(len(self.x.weights), device=logits.device)[:, None]
            )  # (g_x, u)
            origin = mask * span + column * height + self.y.start[i]
            last = None
            for r, values in enumerate(self._rows(logits, cells)):
                on = values > threshold
                if last is None:
                    first = last = on
                    continue
                here = r < self.y.size[i]  # a cell may have fewer rows
                changes.append((origin + r)[(on != last) & here])
                last = torch.where(here, on, last)
            present = torch.arange(len(column), device=logits.device)[:, None] < self.x.size[j]
            at = ((mask * len(self.y.size) + i) * width + column)[present]
            top.view(-1)[at], bottom.view(-1)[at] = first[present], last[present]
        outside = top.new_zeros(n, 1, width)
        mask, i, column = (torch.cat([top, outside], 1) != torch.cat([outside, bottom], 1)).nonzero(
            as_tuple=True
        )
        starts = torch.cat([self.y.start, self.y.start.new_tensor([height])])
        changes.append(mask * span + column * height + starts[i])
        found = torch.cat(changes).cpu().numpy()
        found.sort()
        bounds = np.searchsorted(found, np.arange(1, n) * span)
        return [
            encode_changes(ends - k * span, self.image_size)
            for k, ends in enumerate(np.split(found, bounds))
        ]

    def _bounds(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(n, Gy, Gx), the least and the greatest of the logits that each cell's pixels are made of."""
        return tuple(
            _windows(logits, self.y, self.x, pick) for pick in (torch.minimum, torch.maximum)
        )

    def _parts(self, cells: Tensor) -> tuple[Tensor, ...]:
        """Cells so few at a time that what is worked out of them stays in cache."""
        return cells.split(max(1, CELL_PIXELS // len(self.x.weights))) if len(cells) else ()

    def _rows(self, logits: Tensor, cells: Tensor) -> Iterator[Tensor]:
        """Row by row the pixels of single cells (u, 3): (g_x, u) logits each, NaN where the cell has no such pixel."""
        y, x = self.y, self.x
        mask, i, j = cells.unbind(1)
        flat, stride = logits.reshape(-1), logits.shape[-1]
        at = mask * logits[0].numel() + y.base[i] * stride + x.base[j]
        window = torch.stack(
            [
                torch.stack([flat[at + a * stride + b] for b in range(x.reach)])
                for a in range(y.reach)
            ]
        )
        weights_x = x.weights[:, :, j].transpose(0, 1)  # (k, g_x, u)
        for weights_y in y.weights[:, :, i]:  # (k, u)
            yield _mix(weights_x, _mix(weights_y[:, None], window)[:, None])


def _ends(on: Tensor) -> tuple[Tensor, Tensor]:
    """First and last place that is on in each row of (n, L) bool."""
    on = on.byte()
    return on.argmax(1), on.shape[1] - 1 - on.flip(1).argmax(1)


def _beyond(on: Tensor) -> Tensor:
    """(n, G) bool -> the places before the first and after the last that is on; all where none is."""
    return (on.int().cumsum(1) == 0) | (on.flip(1).int().cumsum(1) == 0).flip(1)


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    """The sum over the first dimension of ``weights * values``, which has few entries."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:]):
        total = torch.addcmul(total, weight, value)
    return total


def _windows(logits: Tensor, y: Axis, x: Axis, pick) -> Tensor:
    """The least or the greatest of each cell's logits, by ``torch.minimum`` or ``torch.maximum``: (n, L, L) -> (n, Gy,
    Gx)."""
    for axis, dim in ((y, 1), (x, 2)):
        count = int(axis.base[-1]) + 1  # beyond it is padding
        found = logits.narrow(dim, 0, count)
        for i in range(1, axis.reach):
            found = pick(found, logits.narrow(dim, i, count))
        logits = found.index_select(dim, axis.base)
    return logits
