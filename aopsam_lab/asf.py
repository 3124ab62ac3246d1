"""Adaptive Sampling and Filtering (ASF).

Adaptive sampling (`sample_prompts`): smooth the Prompt Confidence Map (PCM), take its local maxima
above a confidence, keep them apart. Adaptive filtering (`FilteredProposal`): after each round of
decoding, drop the waiting prompts at which the Prompt Elimination Map (PEM) of a mask is high.

PCM cells are (row, column) of the 4h x 4w grid, PEM cells of the h x w grid, the embedding's. Both
grids cover the whole model frame, padding included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from aopsam_lab.pipeline.types import BOX_NMS_THRESH, Found, Proposal
from aopsam_lab.predictor import CELL

REFERENCE_WIDTH = 256  # smoothing and spacing are in cells of a PCM this wide
# OWN_QUANTILE, RIDGE and REFERENCE_IOU were chosen for the first edition (commit 372a11b), not yet
# anew for MobileSAM.
OWN_QUANTILE = 0.1  # of the PEM over a mask's own cells: the lower bound of its threshold
RIDGE = 0.05  # added to the covariance's diagonal, in units of its mean, before it is inverted
EVERY = 2  # the covariance is that of every second row and column: a quarter of its cost
CHANNELS = 2  # of embedding and positions every second channel: half the cost of the PEM
REFERENCE_IOU = 0.5  # predicted IoU of a mask that may explain waiting prompts
NO_COSINE = 0.5  # a PEM's value where a cell has no features, as on padding
# `python -m aopsam_lab.training.trials filtering` chose these two on training photographs
FIRST = 0.2  # the share of the prompts, the strongest, that is decoded before any is eliminated
ROUNDS = 4  # in which prompts are decoded


@dataclass(frozen=True)
class AsfParams:
    """The paper's four parameters with its defaults."""

    smoothing: float = 2.0  # sigma of the Gaussian, in cells of a 256-wide PCM; 0 switches it off
    confidence: float = 0.2  # a peak counts where the smoothed PCM exceeds this, in [0, 1)
    spacing: float = 6.0  # a peak is the maximum within this many cells of a 256-wide PCM
    elimination: float = 1.3  # a prompt is eliminated where a PEM exceeds its mean times this

    def __post_init__(self) -> None:
        in_cells = "(cells of a 256-wide PCM)"
        if not 0 <= self.smoothing <= 64:
            raise ValueError(f"smoothing must lie in [0, 64] {in_cells}, not {self.smoothing}")
        if not 0 <= self.confidence < 1:
            raise ValueError(f"confidence must lie in [0, 1), not {self.confidence}")
        if not 0 < self.spacing <= 128:
            raise ValueError(f"spacing must lie in (0, 128] {in_cells}, not {self.spacing}")
        if not self.elimination > 0:
            raise ValueError(f"elimination must be positive, not {self.elimination}")


# --- adaptive sampling ----------------------------------------------------------------------------


def smooth(pcm: Tensor, sigma: float) -> Tensor:
    """A map (H, W) by SciPy's `gaussian_filter(mode="nearest")`."""
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return pcm
    offsets = torch.arange(-radius, radius + 1, dtype=pcm.dtype, device=pcm.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    x = F.pad(pcm[None, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[0, 0]


def local_maxima(score: Tensor, threshold: float, spacing: int) -> tuple[Tensor, Tensor]:
    """Cells of (H, W) that exceed a threshold and are the maximum within `spacing` cells.

    Returns:
        (n, 2) long (row, column) and their (n,) scores, highest first, ties by row then column. Of
        equal maxima within one window (a plateau) the first in this order stays.
    """
    window = np.ones((2 * spacing + 1,) * 2, np.uint8)
    highest = torch.from_numpy(cv2.dilate(score.cpu().numpy(), window)).to(score.device)
    cells = ((score == highest) & (score > threshold)).nonzero()  # row by row
    values, order = score[tuple(cells.T)].sort(descending=True, stable=True)
    cells = cells[order]
    if (values[1:] == values[:-1]).any():  # only of equal ones can two be this near
        near = (cells[:, None] - cells[None]).abs().amax(-1) <= spacing
        keep = torch.ones_like(values, dtype=torch.bool)
        for i in range(len(cells)):
            keep[i] = not (near[i, :i] & keep[:i]).any()
        cells, values = cells[keep], values[keep]
    return cells, values


def sample_prompts(
    pcm: Tensor, smoothing: float = 2.0, confidence: float = 0.2, spacing: float = 6.0
) -> tuple[Tensor, Tensor]:
    """Adaptive sampling: the `local_maxima` of the smoothed PCM (H, W), by AsfParams' values."""
    scale = pcm.shape[-1] / REFERENCE_WIDTH
    reach = max(1, int(spacing * scale + 1e-6))
    return local_maxima(smooth(pcm, smoothing * scale), confidence, reach)


def component_prompts(pcm: Tensor, confidence: float = 0.2) -> tuple[Tensor, Tensor]:
    """The highest cell of each 8-connected part of pcm > confidence, as `sample_prompts`."""
    from scipy import ndimage

    score = pcm.cpu().numpy()
    labels, count = ndimage.label(score > confidence, structure=np.ones((3, 3), int))
    found = ndimage.maximum_position(score, labels, range(1, count + 1))
    cells = torch.tensor(found, dtype=torch.long, device=pcm.device).reshape(-1, 2)
    values, order = pcm[tuple(cells.T)].sort(descending=True, stable=True)
    return cells[order], values


# --- adaptive filtering ---------------------------------------------------------------------------


def valid_cells(
    input_size: tuple[int, int],
    img_size: int,
    grid: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which cells (h, w) of a grid over the model frame have their centre on the image.

    The first always counts. `input_size` is the (height, width) of the scaled image, `img_size` the
    side of the frame.
    """

    def on_image(part: int, cells: int) -> Tensor:
        # the centre of cell i, (i + 1/2) * img_size / cells, lies before `part`: in whole numbers
        inside = (2 * torch.arange(cells, device=device) + 1) * img_size < 2 * part * cells
        inside[0] = True  # of a strip that is thinner than half a cell, too
        return inside

    rows, columns = map(on_image, input_size, grid)
    return rows[:, None] & columns


def centred_features(features: Tensor, valid: Tensor) -> Tensor:
    """(C, h, w) minus its mean over the valid cells (h, w); zero on padding."""
    weights = valid.to(features.dtype).flatten()
    mean = features.flatten(1) @ (weights / weights.sum())
    return (features - mean[:, None, None]) * valid


def whitened_features(embedding: Tensor, valid: Tensor) -> Tensor:
    """The centred embedding (C, h, w), its channels decorrelated over the valid cells.

    So a cosine weighs all directions of the image's features alike, not just the few large ones.
    """
    x = centred_features(embedding, valid).float()  # zero on padding, which adds nothing
    part = x[:, ::EVERY, ::EVERY].flatten(1)
    identity = torch.eye(len(x), device=x.device)
    covariance = part @ part.T / valid[::EVERY, ::EVERY].sum()
    ridge = RIDGE * covariance.diagonal().mean() + 1e-6
    factor = torch.linalg.cholesky(covariance + ridge * identity)
    # C x C; solving for x itself takes twice as long
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return (inverse @ x.flatten(1)).view_as(embedding)


def elimination_features(embedding: Tensor, image_pe: Tensor, valid: Tensor) -> Tensor:
    """Features of the PEM: what a cell looks like, and where it lies.

    The whitened embedding tells kinds of surface apart; SAM's centred positional encoding tells one
    object from another of its kind. Both have the same length in every cell.

    Returns:
        (C, h, w), from every second channel of both; valid cells (h, w) have unit length, others 0.
    """
    look, place = embedding[::CHANNELS], image_pe[::CHANNELS]
    parts = [whitened_features(look, valid), centred_features(place, valid)]
    return torch.cat([part * (2 * part.square().sum(0)).clamp(min=1e-12).rsqrt() for part in parts])


def raw_features(embedding: Tensor, valid: Tensor) -> Tensor:
    """Features of the PEM as the paper words it: the embedding (C, h, w), of unit length."""
    return F.normalize(embedding, dim=0) * valid


def on_mask(logits: Tensor, index: Tensor, threshold: float) -> Tensor:
    """`logits[index] > threshold`: logits (N, H, W), index (n,) long -> (n, H, W) bool, n > 0."""
    if logits.device.type != "cpu":
        return logits[index] > threshold
    pixels = logits.numpy()  # NumPy takes a sixth of torch's time
    return torch.from_numpy(np.stack([pixels[i] > threshold for i in index.tolist()]))


def cell_coverage(masks: Tensor) -> Tensor:
    """Area-average of masks (n, 4h, 4w) bool over the cells: (n, h, w) float in [0, 1]."""
    rows = masks.contiguous().view(torch.int32)  # four bools side by side as one number
    counts = rows.unflatten(1, (-1, 4)).sum(2, dtype=torch.int32)  # each byte 0 to 4
    # so multiplied, the highest byte is the sum of the four
    return ((counts * 0x01010101) >> 24).float() / 16


def filled_cells(coverage: Tensor, valid: Tensor) -> Tensor:
    """A mask's own cells, those that it covers by half at least: (n, h, w) bool."""
    return (coverage >= 0.5) & valid


def reference_features(features: Tensor, coverage: Tensor) -> Tensor:
    """The mean of features (C, h, w) under coverage (n, h, w): (n, C), of length 1 or 0."""
    return F.normalize(coverage.flatten(1) @ features.flatten(1).T, dim=1)


def elimination_maps(features: Tensor, references: Tensor) -> Tensor:
    """The PEM of each reference (n, C): (1 + cos(features, reference)) / 2, (n, h, w) in [0, 1]."""
    half = references.new_full((1,), NO_COSINE)
    pems = torch.addmm(half, references, features.flatten(1), alpha=0.5)
    return pems.clamp_(0, 1).unflatten(1, features.shape[1:])


def elimination_thresholds(
    pems: Tensor, coverage: Tensor, valid: Tensor, elimination: float, floor: bool = True
) -> Tensor:
    """What each PEM must exceed to eliminate a prompt: `elimination` times its mean.

    With the floor it is at least the OWN_QUANTILE of the PEM over the mask's own cells. Without it
    an object eliminates its parts, and surroundings a small object. The paper has no floor.
    """
    weights = valid.to(pems.dtype).flatten()
    adaptive = elimination * (pems.flatten(1) @ (weights / weights.sum()))
    if not floor:
        return adaptive
    own = torch.where(filled_cells(coverage, valid), pems, float("nan")).flatten(1)
    # a mask that fills no cell has no quantile
    least = torch.nanquantile(own, OWN_QUANTILE, dim=1).nan_to_num(nan=0.0)
    return torch.maximum(adaptive, least)


def eliminate(
    pems: Tensor, thresholds: Tensor, cells: Tensor, gates: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which waiting prompts do the references explain?

    Args:
        pems: (n, h, w), n at least 1.
        thresholds: (n,).
        cells: (m, 2) long, the (row, column) of each waiting prompt.
        gates: (n, h, w) bool, where each reference may eliminate; None: everywhere.

    Returns:
        (m,) long, the reference that eliminates the prompt, -1 for none; where several do, the one
        whose PEM exceeds its threshold by the largest factor. And (m,) the PEM there, NaN for none.
    """
    rows, columns = cells.T
    at = pems[:, rows, columns]  # (n, m)
    excess = at / thresholds[:, None]
    if gates is not None:
        excess = excess.masked_fill(~gates[:, rows, columns], 0)
    best, by = excess.max(0)
    gone = best > 1
    values = at.gather(0, by[None])[0]
    return torch.where(gone, by, -1), torch.where(gone, values, float("nan"))


def dilate(coverage: Tensor) -> Tensor:
    """The cells (n, h, w) that a mask covers by more than half, and those beside them."""
    return F.max_pool2d(coverage[:, None], 3, stride=1, padding=1)[:, 0] > 0.5


def best_of_each(iou: Tensor, prompt: Tensor, m: int) -> Tensor:
    """Indices of masks whose predicted IoU is the highest of their prompt: iou, prompt (r,)."""
    highest = iou.new_zeros(m).scatter_reduce(0, prompt, iou, "amax")
    return (iou == highest[prompt]).nonzero()[:, 0]


@dataclass(kw_only=True)
class FilteredProposal(Proposal):
    """Adaptive filtering: prompts in rounds; what the masks found explain is eliminated.

    The strongest share `first` is decoded at once, the others in `rounds - 1` equal parts. The
    reference of a prompt is its surest mask; of references that are duplicates the surest counts.
    """

    cells: Tensor  # (m, 2) long, each prompt's (row, column) on the grid
    features: Tensor  # (C', h', w') of the part of the grid, top left, that the image covers
    valid: Tensor  # (h', w') bool, see `valid_cells`
    grid: tuple[int, int]  # (h, w)
    elimination: float  # see AsfParams
    floor: bool = True  # see `elimination_thresholds`
    gated: bool = False  # whether a mask eliminates only prompts on it or beside it
    first: float = FIRST
    rounds: int = ROUNDS

    def __post_init__(self) -> None:
        super().__post_init__()
        m, later = len(self.prompts), self.rounds - 1
        start = math.ceil(self.first * m)
        # where each round ends among the prompts, strongest first
        ends = (start + math.ceil((m - start) * i / later) for i in range(1, self.rounds))
        self._ends = [start, *ends]
        # of possible references: coverage, prompt, predicted IoU and box
        self._seen: list[tuple[Tensor, ...]] = []

    def next_round(self) -> Tensor | None:
        """Eliminate, then choose; see Proposal."""
        if self._seen:
            self._eliminate(*(torch.cat(parts) for parts in zip(*self._seen, strict=True)))
            self._seen.clear()
        while self._ends:
            chosen = self.waiting[: self._ends.pop(0)].nonzero()[:, 0]
            if len(chosen):
                self.waiting[chosen] = False
                return chosen
        return None

    def observe(self, found: Found, mask_threshold: float) -> None:
        """Remember the surest masks; see Proposal."""
        sure = best_of_each(found.iou, found.prompt, len(self.prompts))
        sure = sure[found.iou[sure] >= REFERENCE_IOU]
        if len(sure) and self.waiting.any():
            rows, columns = (CELL * side for side in self.valid.shape)  # logits: the PCM's cells
            masks = on_mask(found.low_res[:, :rows, :columns], sure, mask_threshold)
            seen = cell_coverage(masks), found.prompt[sure], found.iou[sure], found.boxes[sure]
            self._seen.append(seen)

    def _eliminate(self, coverage: Tensor, owners: Tensor, iou: Tensor, boxes: Tensor) -> None:
        coverage = coverage * self.valid
        # a mask that fills no cell explains nothing: its cells are mostly its surroundings
        large = filled_cells(coverage, self.valid).flatten(1).any(1).nonzero()[:, 0]
        if not len(large):
            return
        distinct = large[nms(boxes[large].float(), iou[large], BOX_NMS_THRESH)]
        coverage, owners = coverage[distinct], owners[distinct]
        pems = elimination_maps(self.features, reference_features(self.features, coverage))
        least = elimination_thresholds(pems, coverage, self.valid, self.elimination, self.floor)
        waiting = self.waiting.nonzero()[:, 0]
        gates = dilate(coverage) if self.gated else None
        by, value = eliminate(pems, least, self.cells[waiting], gates)
        gone = by >= 0
        self.eliminated_by[waiting[gone]] = len(self.pems) + by[gone]  # after earlier rounds'
        self.pem_value[waiting[gone]] = value[gone]
        self.waiting[waiting[gone]] = False
        whole = pems.new_full((len(pems), *self.grid), NO_COSINE)
        whole[:, : pems.shape[1], : pems.shape[2]] = pems
        self.pems.extend(whole)
        self.references.extend(zip(owners.tolist(), least.tolist(), strict=True))
