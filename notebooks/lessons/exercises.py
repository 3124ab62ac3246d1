"""What students write in the lessons, each with the library's answer and the usual mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou
from torchvision.ops import nms as library_nms

from aopsam_lab import asf
from aopsam_lab.evaluator import greedy_matching


@dataclass(frozen=True)
class Exercise:
    """A function that a student writes.

    Args:
        task: what it takes and returns, in one sentence.
        right: the same by the library.
        inputs: makes the arguments from a random generator.
        mistakes: wrong functions, each with the message that names the mistake.
        hints: the first is vague, the last nearly tells.
    """

    task: str
    right: Callable
    inputs: Callable[[np.random.Generator], tuple]
    mistakes: tuple[tuple[Callable, str], ...]
    hints: tuple[str, ...]


# --- Lesson 0: frames ---------------------------------------------------------------------------


def _to_model_frame(points, size, side):
    return points * side / max(size)


def _point_inputs(rng):
    height, width = rng.integers(200, 900, 2)
    return rng.uniform(0, 1, (5, 2)) * [width, height], (int(height), int(width)), 1024


FRAME = Exercise(
    task=(
        "points (n x 2, x and y in pixels of the image), size (height, width), side of the model "
        "frame -> the points in the model frame"
    ),
    right=_to_model_frame,
    inputs=_point_inputs,
    mistakes=(
        (
            lambda points, size, side: points * side / np.array([size[1], size[0]]),
            "each axis is stretched on its own: the model frame keeps the image's shape",
        ),
        (
            lambda points, size, side: points * side / np.array(size),
            "the axes are swapped: a point is (x, y), a size is (height, width)",
        ),
        (
            lambda points, size, side: points * side / min(size),
            "the shorter side fills the frame: it must be the longer one, or the image sticks out",
        ),
        (
            lambda points, size, side: points * max(size) / side,
            "the scale is upside down: the frame is `side` pixels long, the image `max(size)`",
        ),
        (
            lambda points, size, side: points * side / size[0],
            "you scale by the height: the longer side counts, which may be the width",
        ),
        (
            lambda points, size, side: points * side / size[1],
            "you scale by the width: the longer side counts, which may be the height",
        ),
        (
            lambda points, size, side: (points * side / max(size)).round(),
            "points are rounded: a point may lie between the middles of pixels",
        ),
        (
            lambda points, size, side: points / max(size),
            "points end between 0 and 1: the frame is `side` pixels long",
        ),
    ),
    hints=(
        "One number scales both x and y.",
        "The longer side of the image becomes `side` pixels long.",
        "points * side / max(size)",
    ),
)


# --- Lesson 1: IoU, grid, NMS ---------------------------------------------------------------------


def _iou(first, second):
    return _ratio((first & second).sum(), (first | second).sum())


def _mask_inputs(rng):
    shape = rng.integers(3, 8, 2)
    empty = rng.random() < 0.2  # two empty masks have no union
    masks = np.zeros((2, *shape), bool) if empty else rng.random((2, *shape)) < 0.4
    return masks[0], masks[1]


def _ratio(part, whole):
    return part / whole if whole else 0.0


IOU = Exercise(
    task="first and second (H x W bool) -> their intersection over union; 0 where both are empty",
    right=_iou,
    inputs=_mask_inputs,
    mistakes=(
        (
            lambda a, b: _ratio((a & b).sum(), a.sum()),
            "this is the intersection's share of the first mask: divide by the union",
        ),
        (
            lambda a, b: _ratio((a & b).sum(), a.sum() + b.sum()),
            "both areas are added: the intersection is counted twice, take it off once",
        ),
        (
            lambda a, b: _ratio(2 * (a & b).sum(), a.sum() + b.sum()),
            "this is the Dice coefficient: 2 |A and B| / (|A| + |B|)",
        ),
        (
            lambda a, b: (a == b).mean(),
            "pixels outside both masks count as agreement: they must not",
        ),
        (
            lambda a, b: _ratio((a & b).sum(), b.sum()),
            "this is the intersection's share of the second mask: divide by the union",
        ),
        (
            lambda a, b: (a & b).mean(),
            "this is the intersection's share of the picture: divide by the union",
        ),
        (
            lambda a, b: _iou(a, b) if (a | b).any() else 1.0,
            "two empty masks give 1: they should give 0",
        ),
        (
            lambda a, b: (a & b).sum() / (a | b).sum(),
            "two empty masks give NaN (0 / 0): they should give 0",
        ),
        (
            lambda a, b: 1 - _iou(a, b),
            "this is the distance, 1 - IoU: masks that are equal should give 1",
        ),
    ),
    hints=(
        "Count pixels: those in both, and those in either.",
        "`first & second` is the intersection, `first | second` the union.",
        "(first & second).sum() / (first | second).sum(), and 0 where the union is empty",
    ),
)


def _grid(n, width, height):
    centres = (np.arange(n) + 0.5) / n
    x, y = np.meshgrid(centres * width, centres * height)
    return np.stack([x.ravel(), y.ravel()], 1)


def _grid_of(centres_of):
    def points(n, width, height):
        x, y = np.meshgrid(centres_of(n) * width, centres_of(n) * height)
        return np.stack([x.ravel(), y.ravel()], 1)

    return points


GRID = Exercise(
    task="n points along each side, width, height -> n * n points (x, y), row by row",
    right=_grid,
    inputs=lambda rng: (
        int(rng.integers(2, 6)),
        int(rng.integers(20, 60)),
        int(rng.integers(20, 60)),
    ),
    mistakes=(
        (
            _grid_of(lambda n: np.arange(n) / n),
            "the first point lies on the edge: each point belongs in the middle of its cell",
        ),
        (
            _grid_of(lambda n: np.linspace(0, 1, n)),
            "the outer points lie on the border: each point belongs in the middle of its cell",
        ),
        (lambda n, width, height: _grid(n, height, width), "width and height are swapped"),
        (
            lambda n, width, height: (
                _grid(n, width, height).reshape(n, n, 2).transpose(1, 0, 2).reshape(-1, 2)
            ),
            "the points go down the columns: they should go along the rows",
        ),
        (
            lambda n, width, height: _grid(n, width, height)[:, ::-1],
            "the points are (y, x): a point is (x, y)",
        ),
        (
            _grid_of(lambda n: np.arange(1, n + 1) / (n + 1)),
            "the gaps are of one size, (i + 1) / (n + 1): the middle of a cell is (i + 0.5) / n",
        ),
        (
            _grid_of(lambda n: np.arange(1, n + 1) / n),
            "each point lies at the end of its cell: it belongs in the middle",
        ),
        (
            lambda n, width, height: _grid(n, 1, 1),
            "the points lie between 0 and 1: scale x by the width and y by the height",
        ),
    ),
    hints=(
        "Cut the image into n x n cells.",
        "The middle of cell i lies at (i + 0.5) / n of the side.",
        "np.meshgrid((np.arange(n) + 0.5) / n * width, ...) and np.stack",
    ),
)


def _nms(boxes, scores, threshold):
    return library_nms(torch.tensor(boxes), torch.tensor(scores), threshold)


def _box_inputs(rng):
    corner, size = rng.uniform(0, 10, (6, 2)), rng.uniform(4, 12, (6, 2))
    at_threshold = [[40, 0, 43, 2], [41, 0, 44, 2]]  # 2 x 2 of 2 x 4 pixels: an IoU of 0.5
    in_a_row = [[60 + i, 0, 64 + i, 2] for i in range(3)]  # neighbours 0.6, the outer ones 0.33
    boxes = np.concatenate([corner, corner + size], 1)
    return np.concatenate([boxes, at_threshold, in_a_row]), rng.permutation(11) / 20 + 0.1, 0.5


def _nms_by(order, drop):
    def kept_of(boxes, scores, threshold):
        overlap = box_iou(torch.tensor(boxes), torch.tensor(boxes)).numpy()
        kept: list[int] = []
        for i in order(scores):
            if not drop(overlap[i], kept, threshold):
                kept.append(int(i))
        return kept

    return kept_of


NMS = Exercise(
    task="boxes (n x 4), scores (n), threshold -> the indices that stay, best score first",
    right=_nms,
    inputs=_box_inputs,
    mistakes=(
        (
            _nms_by(
                lambda scores: range(len(scores)),
                lambda overlap, kept, t: any(overlap[k] > t for k in kept),
            ),
            "boxes are taken in their order in the list: the best score comes first",
        ),
        (
            _nms_by(np.argsort, lambda overlap, kept, t: any(overlap[k] > t for k in kept)),
            "the worst score comes first: sort the other way round",
        ),
        (
            _nms_by(
                lambda scores: np.argsort(-scores),
                lambda overlap, kept, t: bool(kept) and overlap[kept[-1]] > t,
            ),
            "a box is compared with the last one kept only: compare it with all of them",
        ),
        (
            lambda boxes, scores, t: [
                int(i)
                for n, i in enumerate(np.argsort(-scores))
                if not (
                    box_iou(torch.tensor(boxes[[i]]), torch.tensor(boxes[np.argsort(-scores)[:n]]))
                    > t
                ).any()
            ],
            "a box that was dropped still drops others: only kept boxes may",
        ),
        (
            _nms_by(
                lambda scores: np.argsort(-scores),
                lambda overlap, kept, t: any(overlap[k] >= t for k in kept),
            ),
            "a box whose IoU is exactly the threshold is dropped: only a higher IoU drops it",
        ),
        (
            _nms_by(
                lambda scores: np.argsort(-scores),
                lambda overlap, kept, t: any(overlap[k] < t for k in kept),
            ),
            "boxes that overlap little are dropped: drop those that overlap more than threshold",
        ),
        (
            lambda boxes, scores, t: _nms(boxes, scores, t).sort().values,
            "the indices are in the order of the list: return the best score first",
        ),
        (
            lambda boxes, scores, t: boxes[_nms(boxes, scores, t).numpy()],
            "these are the boxes: return their indices",
        ),
        (
            lambda boxes, scores, t: scores[_nms(boxes, scores, t).numpy()],
            "these are the scores: return the indices",
        ),
    ),
    hints=(
        "Go from the best score to the worst, and keep a list.",
        "A box stays where its IoU with every box in the list is at most the threshold.",
        "for i in np.argsort(-scores): if all(iou(boxes[i], boxes[k]) <= threshold for k in kept)",
    ),
)


# --- Lesson 2: peaks ------------------------------------------------------------------------------


def _peaks(values, threshold, spacing):
    cells, _ = asf.local_maxima(torch.tensor(values), threshold, spacing)
    return cells


def _map_inputs(rng):
    values, spacing = rng.permutation(70).reshape(7, 10) / 70, 1 + int(rng.integers(2))
    heights = values[tuple(_peaks(values, 0, spacing).numpy().T)]
    return values, float(heights[max(1, len(heights) - 2)]), spacing  # as high as a peak


def _peaks_by(window, exceeds=lambda value, threshold: value > threshold, rank=lambda v: -v):
    def cells(values, threshold, spacing):
        rows, columns = values.shape
        found = [
            (r, c)
            for r in range(rows)
            for c in range(columns)
            if exceeds(values[r, c], threshold)
            and values[r, c] == window(values, r, c, spacing).max()
        ]
        found.sort(key=lambda cell: rank(values[cell]))
        return np.array(found).reshape(-1, 2)

    return cells


def _square(values, r, c, s):
    return values[max(0, r - s) : r + s + 1, max(0, c - s) : c + s + 1]


PEAKS = Exercise(
    task=(
        "values (H x W), threshold, spacing -> the cells (row, column) above the threshold that "
        "are the maximum of their window, `spacing` cells to each side, highest first"
    ),
    right=_peaks,
    inputs=_map_inputs,
    mistakes=(
        (
            _peaks_by(lambda v, r, c, s: v[max(0, r - s) : r + s, max(0, c - s) : c + s]),
            "the window ends one cell too early: a slice a:b does not hold b",
        ),
        (
            _peaks_by(
                lambda v, r, c, s: (
                    v[r - s : r + s + 1, c - s : c + s + 1]
                    if min(r, c) >= s
                    else np.array([np.inf])
                )
            ),
            "a window starts at a negative index, which NumPy counts from the end: use max(0, ...)",
        ),
        (
            _peaks_by(lambda v, r, c, s: v[r, max(0, c - s) : c + s + 1]),
            "only cells in the same row are compared: the window is a square",
        ),
        (
            _peaks_by(_square, rank=lambda v: 0),
            "cells come row by row: sort them by their value, highest first",
        ),
        (
            _peaks_by(_square, rank=lambda v: v),
            "the lowest cell comes first: sort the other way round",
        ),
        (
            lambda v, t, s: _peaks(v, t, s).flip(1),
            "the cells are (column, row): a cell is (row, column)",
        ),
        (
            _peaks_by(_square, lambda value, threshold: value >= threshold),
            "a cell as high as the threshold counts: a peak is above it",
        ),
        (
            _peaks_by(_square, lambda value, threshold: True),
            "the threshold is not used: a peak is above it",
        ),
        (
            _peaks_by(lambda v, r, c, s: v[r, c]),
            "every cell above the threshold is a peak: it must also be its window's maximum",
        ),
        (
            _peaks_by(lambda v, r, c, s: _square(v, r, c, 1)),
            "the window is always 3 x 3: it reaches `spacing` cells to each side",
        ),
        (
            _peaks_by(lambda v, r, c, s: v[max(0, r - s) : r + s + 1, c]),
            "only cells in the same column are compared: the window is a square",
        ),
    ),
    hints=(
        "For each cell, look at the square around it.",
        "values[max(0, r - spacing) : r + spacing + 1, ...] is the window.",
        "Keep (r, c) where values[r, c] > threshold and equals window.max(); then sort.",
    ),
)


# --- Lesson 3: the loss ---------------------------------------------------------------------------


def _loss(pcm, target, valid):
    return ((pcm - target) ** 2)[valid].mean()


def _loss_inputs(rng):
    valid = np.zeros((6, 8), bool)
    valid[: rng.integers(2, 6), : rng.integers(2, 8)] = True
    target = rng.random((6, 8)) * (rng.random((6, 8)) < 0.5)  # zero away from all prompts
    return rng.random((6, 8)), target, valid


LOSS = Exercise(
    task=(
        "pcm, target (H x W), valid (H x W bool, cells on the image) -> the mean squared error "
        "over the cells on the image"
    ),
    right=_loss,
    inputs=_loss_inputs,
    mistakes=(
        (lambda p, t, v: ((p - t) ** 2).mean(), "padding counts: take the cells of `valid` only"),
        (
            lambda p, t, v: ((p - t) ** 2 * v).mean(),
            "padding is zero in the sum but counts in the mean: divide by valid.sum()",
        ),
        (
            lambda p, t, v: abs(p - t)[v].mean(),
            "this is the mean absolute error: square the differences",
        ),
        (
            lambda p, t, v: ((p - t) ** 2)[v].sum(),
            "this is the sum: a larger image would have a larger loss",
        ),
        (
            lambda p, t, v: np.sqrt(_loss(p, t, v)),
            "this is the square root of the loss: leave the root out",
        ),
        (
            lambda p, t, v: (p - t)[v].mean() ** 2,
            "the mean is squared: square each difference, then take the mean",
        ),
        (
            lambda p, t, v: ((p - t) ** 2)[v & (t > 0)].mean(),
            "only cells with a target above 0 count: a click that is not wanted is a mistake, too",
        ),
        (
            lambda p, t, v: ((p - t) ** 2)[~v].mean(),
            "the padding's cells are taken: `valid` is True on the image",
        ),
    ),
    hints=(
        "An array indexed by a boolean array gives the chosen cells.",
        "((pcm - target) ** 2)[valid] are the squared errors that count.",
        "((pcm - target) ** 2)[valid].mean()",
    ),
)


# --- Lesson 4: the elimination map ----------------------------------------------------------------


def _pem(features, mask):
    unit = torch.nn.functional.normalize(torch.tensor(features), dim=0)
    reference = asf.reference_features(unit, torch.tensor(mask)[None].to(unit.dtype))
    return asf.elimination_maps(unit, reference)[0]


def _feature_inputs(rng):
    mask = np.zeros((4, 6), bool)
    mask[1:3, 1 : 1 + int(rng.integers(1, 4))] = True
    return rng.normal(size=(5, 4, 6)), mask


def _unit(features):
    return features / np.linalg.norm(features, axis=0)


def _half(cosine):
    return (1 + cosine) / 2


def _cosine_to(features, mean):
    return np.einsum("c,chw->hw", mean / np.linalg.norm(mean), features)


PEM = Exercise(
    task=(
        "features (C x h x w), mask (h x w bool) -> (1 + cos) / 2 of each cell's features and the "
        "mean of the mask's, every cell scaled to length 1 first"
    ),
    right=_pem,
    inputs=_feature_inputs,
    mistakes=(
        (
            lambda f, m: _cosine_to(_unit(f), _unit(f)[:, m].mean(1)),
            "the cosine is not moved into 0 to 1: (1 + cos) / 2",
        ),
        (
            lambda f, m: _half(_cosine_to(f, f[:, m].mean(1))),
            "cells are not scaled to length 1: this is no cosine",
        ),
        (
            lambda f, m: _half(np.einsum("c,chw->hw", _unit(f)[:, m].mean(1), _unit(f))),
            "the mean is not scaled to length 1: this is no cosine",
        ),
        (
            lambda f, m: _half(_cosine_to(_unit(f), _unit(f).mean((1, 2)))),
            "the mean is over the whole map: take the mask's cells",
        ),
        (
            lambda f, m: _half(_cosine_to(_unit(f), f[:, m].mean(1))),
            "the mean is of cells of any length: scale every cell to length 1 first",
        ),
        (
            lambda f, m: 1 + _cosine_to(_unit(f), _unit(f)[:, m].mean(1)) / 2,
            "1 + cos / 2 is not (1 + cos) / 2: put the parentheses",
        ),
        (
            lambda f, m: np.maximum(_cosine_to(_unit(f), _unit(f)[:, m].mean(1)), 0),
            "negative cosines are cut off at 0: the map is (1 + cos) / 2",
        ),
        (
            lambda f, m: _half(
                _cosine_to(
                    f / np.linalg.norm(f, axis=(1, 2), keepdims=True),
                    (f / np.linalg.norm(f, axis=(1, 2), keepdims=True))[:, m].mean(1),
                )
            ),
            "each channel is scaled over the map: scale each cell over its channels, axis 0",
        ),
        (
            lambda f, m: _half(_cosine_to(_unit(f), _unit(f)[:, ~m].mean(1))),
            "the mean is over the cells outside the mask: take those inside",
        ),
    ),
    hints=(
        "A cosine is the product of two vectors of length 1.",
        "unit[:, mask].mean(1) is the mask's vector; scale it to length 1, too.",
        "np.einsum('c,chw->hw', reference, unit) are the cosines of all cells",
    ),
)


# --- Lesson 5: matching ---------------------------------------------------------------------------


def _miou(iou):
    taken = greedy_matching(iou)
    return np.mean([iou[i, j] if j >= 0 else 0.0 for i, j in enumerate(taken)])


def _iou_inputs(rng):
    return (rng.permutation(20).reshape(4, 5)[:, : rng.integers(2, 6)] / 20 + 0.01,)


def _row_by_row(iou):
    left, total = set(range(iou.shape[1])), 0.0
    for row in iou:
        if left:
            best = max(left, key=lambda j: row[j])
            left.remove(best)
            total += row[best]
    return total / len(iou)


def _best_total(iou):
    rows, columns = linear_sum_assignment(iou, maximize=True)
    return iou[rows, columns].sum() / len(iou)


def _matched_only(iou):
    return _miou(iou) * len(iou) / min(iou.shape)


MIOU = Exercise(
    task=(
        "iou (ground-truth masks x found masks) -> the greedy mean IoU: the highest pair first, "
        "each mask used once, a ground-truth mask without a partner counts 0"
    ),
    right=_miou,
    inputs=_iou_inputs,
    mistakes=(
        (
            lambda iou: iou.max(1).mean(),
            "a found mask is used more than once: strike out its column",
        ),
        (
            _row_by_row,
            "objects are taken row by row: the highest IoU of the whole matrix comes first",
        ),
        (_matched_only, "objects without a partner are left out of the mean: they count 0"),
        (
            lambda iou: _miou(iou) * len(iou) / iou.shape[1],
            "the mean is over the found masks: it is over the ground truth's",
        ),
        (
            _best_total,
            "this is the best total that any matching has: greedy takes the highest pair first",
        ),
        (
            lambda iou: iou.max(0).mean(),
            "this is the mean over found masks of their best object: go by pairs instead",
        ),
        (
            lambda iou: np.diagonal(iou).sum() / len(iou),
            "object i is matched with mask i: the highest pair of the whole matrix comes first",
        ),
        (
            lambda iou: _miou(iou) * len(iou),
            "this is the sum: divide it by the number of objects",
        ),
    ),
    hints=(
        "Find the highest entry of the whole matrix.",
        "Note it, then set its row and its column to -1, and go on while an entry is above 0.",
        "np.unravel_index(iou.argmax(), iou.shape) is the place of the highest entry",
    ),
)


EXERCISES = {
    "to_model_frame": FRAME,
    "iou": IOU,
    "grid": GRID,
    "nms": NMS,
    "peaks": PEAKS,
    "loss": LOSS,
    "elimination_map": PEM,
    "greedy_miou": MIOU,
}
