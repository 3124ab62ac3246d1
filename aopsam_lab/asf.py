"""Adaptive Sampling and Filtering (ASF): pure functions on tensors.

Coarse (adaptive sampling): smooth the Prompt Confidence Map (PCM), take its local maxima above a confidence, keep them apart.
Fine (adaptive filtering): after each round of decoding, drop the waiting prompts that a mask already found explains, by the
Prompt Elimination Map (PEM) of that mask.

The order of steps, the Gaussian, the threshold, the spacing and "PEM = cosine similarity, adaptive threshold" are the paper's
(AoP-SAM, AAAI 2025, adaptive sampling and filtering); everything marked "ours" fills in what it leaves open.

Frames: PCM cells are (row, column) of the 4h x 4w grid, PEM cells of the h x w grid; both cover the whole model frame,
padding included. Pixel centres lie at +0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Chosen on training pictures of the first edition (commit 372a11b), not yet anew for MobileSAM.
OWN_QUANTILE = 0.1
RIDGE = 0.05  # added to the covariance's diagonal, in units of its mean, before it is inverted
EVERY = 2  # the covariance is that of every second row and column: the same masks in less time
NO_COSINE = 0.5  # a PEM's value where a cell has no features, as on padding
REFERENCE_WIDTH = 256  # smoothing and spacing are given in cells of a PCM this wide (ours: others scale by width / 256)


@dataclass(frozen=True)
class AsfParams:
    """The paper's four knobs with its defaults.

    smoothing:    sigma of the Gaussian, in cells of a 256-wide PCM; 0 switches it off.
    confidence:   a peak counts where the smoothed PCM exceeds this, in [0, 1).
    spacing:      a peak is the maximum of a window reaching this far to each side, in cells of a 256-wide PCM.
    elimination:  a prompt is dropped where a PEM exceeds this many times its own mean (and a floor, see below).
    """

    smoothing: float = 2.0
    confidence: float = 0.2
    spacing: float = 6.0
    elimination: float = 1.3

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing <= 64:
            raise ValueError(
                f"smoothing must lie in [0, 64] (cells of a 256-wide PCM), not {self.smoothing}"
            )
        if not 0 <= self.confidence < 1:
            raise ValueError(f"confidence must lie in [0, 1), not {self.confidence}")
        if not 0 < self.spacing <= 128:
            raise ValueError(
                f"spacing must lie in (0, 128] (cells of a 256-wide PCM), not {self.spacing}"
            )
        if not self.elimination > 0:
            raise ValueError(f"elimination must be positive, not {self.elimination}")


# --- coarse: adaptive sampling -------------------------------------------------------------------------------------------


def smooth(pcm: Tensor, sigma: float) -> Tensor:
    """Gaussian filter of an (H, W) map, cut at 4 sigma, edges repeated (scipy's ``gaussian_filter(mode="nearest")``)."""
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return pcm
    offsets = torch.arange(-radius, radius + 1, dtype=pcm.dtype, device=pcm.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    x = F.pad(pcm[None, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[0, 0]


def _window_maximum(x: Tensor, reach: int, dim: int) -> Tensor:
    """Of each cell of (H, W) and the ``reach`` to either side of it along ``dim``: maxima of windows that double."""
    ends = (reach, reach, 0, 0) if dim == 1 else (0, 0, reach, reach)
    x, width, side = F.pad(x, ends, value=-float("inf")), 1, 2 * reach + 1
    while width < side:
        step = min(width, side - width)
        x = torch.maximum(
            x.narrow(dim, 0, x.shape[dim] - step), x.narrow(dim, step, x.shape[dim] - step)
        )
        width += step
    return x


def local_maxima(score: Tensor, threshold: float, spacing: int) -> tuple[Tensor, Tensor]:
    """Cells that exceed ``threshold`` and are the maximum of their ``(2 * spacing + 1)`` window.

    score: (H, W). Returns (n, 2) long (row, column) and their n scores, strongest first, ties by row then column. Of equal
    maxima within one window (a plateau) the first in that order stays.
    """
    peak = _window_maximum(_window_maximum(score, spacing, 1), spacing, 0)
    cells = ((score == peak) & (score > threshold)).nonzero()  # row-major
    values = score[cells[:, 0], cells[:, 1]]
    order = values.argsort(descending=True, stable=True)
    cells, values = cells[order], values[order]
    if (values[1:] == values[:-1]).any():  # only of equal ones can two be this near
        near = (cells[:, None] - cells[None]).abs().amax(-1) <= spacing
        near.fill_diagonal_(False)
        keep = torch.ones(len(cells), dtype=torch.bool, device=cells.device)
        for i in near.any(1).nonzero()[:, 0].tolist():
            keep[i] = not (near[i, :i] & keep[:i]).any()
        cells, values = cells[keep], values[keep]
    return cells, values


def sample_prompts(
    pcm: Tensor, smoothing: float = 2.0, confidence: float = 0.2, spacing: float = 6.0
) -> tuple[Tensor, Tensor]:
    """Adaptive sampling: peaks of the smoothed PCM (H, W) in [0, 1].

    ``smoothing`` and ``spacing`` are in cells of a 256-wide PCM. A window has the whole cells that lie within the spacing: on a map
    160 wide 6 means 3.75, and so 3 to each side. Returns (n, 2) long cells (row, column) of the PCM and (n,) confidences (values
    of the smoothed map), strongest first.
    """
    scale = pcm.shape[-1] / REFERENCE_WIDTH
    return local_maxima(
        smooth(pcm, smoothing * scale), confidence, max(1, int(spacing * scale + 1e-6))
    )


def component_prompts(pcm: Tensor, confidence: float = 0.2) -> tuple[Tensor, Tensor]:
    """Sampling without ASF (ours, for the ablation): the highest cell of each 8-connected component of ``pcm > confidence``.

    Same returns as :func:`sample_prompts`.
    """
    from scipy import ndimage

    values = pcm.cpu().numpy()
    labels, count = ndimage.label(values > confidence, structure=np.ones((3, 3), int))
    found = ndimage.maximum_position(values, labels, range(1, count + 1))
    cells = torch.tensor(found, dtype=torch.long, device=pcm.device).reshape(-1, 2)
    scores = pcm[cells[:, 0], cells[:, 1]]
    order = scores.argsort(descending=True, stable=True)
    return cells[order], scores[order]


# --- fine: adaptive filtering --------------------------------------------------------------------------------------------


def cells_on_picture(
    input_size: tuple[int, int], img_size: int, grid: tuple[int, int]
) -> tuple[int, int]:
    """(rows, columns) of a grid over the model frame whose cells' centres lie on the picture, not on its padding.

    input_size: (height, width) of the picture in the model frame, of which img_size is the side.
    """
    # the centre of cell i lies at (i + 1/2) * img_size / cells; in whole numbers, as it may lie right on the edge
    return tuple(
        min(cells, max(0, -((img_size - 2 * side * cells) // (2 * img_size))))
        for side, cells in zip(input_size, grid)
    )


def valid_cells(
    input_size: tuple[int, int],
    img_size: int,
    grid: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """(h, w) bool: which cells are those of :func:`cells_on_picture`."""
    rows, columns = cells_on_picture(input_size, img_size, grid)
    valid = torch.zeros(grid, dtype=torch.bool, device=device)
    valid[:rows, :columns] = True
    return valid


def centred_features(features: Tensor, valid: Tensor) -> Tensor:
    """(C, h, w) minus its mean over the valid cells (h, w); zero on padding."""
    weights = valid.to(features.dtype).flatten()
    mean = features.flatten(1) @ (weights / weights.sum())
    return (features - mean[:, None, None]) * valid


def whitened_features(embedding: Tensor, valid: Tensor) -> Tensor:
    """The centred embedding (C, h, w), its channels decorrelated over the valid cells: ``L^-1 x`` with ``L L^T`` their covariance.

    Cosines of what this returns weigh all directions of the picture's features alike, not just the few large ones.
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
    """Image features of the PEM: what a cell looks like, and where it lies -> (2C, h, w), each valid cell of unit length (ours).

    embedding: (C, h, w). image_pe: (C, h, w), SAM's own dense positional encoding. valid: (h, w) bool.

    The paper says "image features". SAM's decoder attends to embedding + positional encoding, and so does this: the whitened
    embedding and the centred encoding, each of one length in every cell, stand one upon the other, and a cosine is the mean
    of both. The few large directions of an embedding that is only centred tell kinds of surface apart, but not one object from
    its like.
    """
    parts = [whitened_features(embedding, valid), centred_features(image_pe, valid)]
    return torch.cat([part * (2 * part.square().sum(0)).clamp(min=1e-12).rsqrt() for part in parts])


def raw_features(embedding: Tensor, valid: Tensor) -> Tensor:
    """Image features of the PEM in the paper's words to the letter: the embedding as it is, cells of unit length.

    Args:
        embedding: (C, h, w).
        valid: (h, w) bool, cells on the image.

    Returns:
        (C, h, w), zero on padding.
    """
    return F.normalize(embedding, dim=0) * valid


def on_mask(logits: Tensor, index: Tensor, threshold: float) -> Tensor:
    """``logits[index] > threshold``: logits (N, H, W), index (n,) long -> (n, H, W) bool.

    On a CPU mask by mask, so that no logits are copied, and by NumPy, which takes a sixth of torch's time for it.
    """
    if logits.device.type != "cpu":
        return logits[index] > threshold
    all_of_them, on = logits.numpy(), np.empty((len(index), *logits.shape[1:]), bool)
    for i, row in enumerate(index.tolist()):
        np.greater(all_of_them[row], threshold, out=on[i])
    return torch.from_numpy(on)


def cell_coverage(masks: Tensor) -> Tensor:
    """Area-average of masks (n, 4h, 4w) bool over the cells of the h x w grid -> (n, h, w) float in [0, 1]."""
    rows = masks.contiguous().view(
        torch.int32
    )  # four bools side by side are the bytes of one number
    counts = rows.unflatten(1, (-1, 4)).sum(2, dtype=torch.int32)  # each byte 0 to 4
    return (
        (counts * 0x01010101) >> 24
    ).float() / 16  # so multiplied, the top byte is the sum of the four


def filled_cells(coverage: Tensor, valid: Tensor) -> Tensor:
    """A mask's own cells: those that it covers by half at least -> (n, h, w) bool.

    A mask without any should explain nothing (ours): what lies in its cells is mostly its surroundings, and so it would drop
    the prompts of other small things upon them.
    """
    return (coverage >= 0.5) & valid


def reference_features(features: Tensor, coverage: Tensor) -> Tensor:
    """One unit vector a mask: the mean of ``features`` (C, h, w) under ``coverage`` (n, h, w), normalised -> (n, C).

    The coverage's own scale cancels. A mask that covers no cell gives zeros, and a PEM of one half everywhere.
    """
    return F.normalize(coverage.flatten(1) @ features.flatten(1).T, dim=1)


def elimination_maps(features: Tensor, references: Tensor) -> Tensor:
    """PEM of each reference: ``(1 + cos(features, reference)) / 2`` on the h x w grid, in [0, 1] -> (n, h, w).

    features: (C, h, w), cells of unit length (or zero, where the PEM is one half). references: (n, C), of unit length.
    """
    cosines = torch.addmm(
        references.new_full((1,), NO_COSINE), references, features.flatten(1), alpha=0.5
    )  # their half, and a half
    return cosines.clamp_(0, 1).unflatten(1, features.shape[1:])


def elimination_thresholds(
    pems: Tensor, coverage: Tensor, valid: Tensor, elimination: float, floor: bool = True
) -> Tensor:
    """What a PEM must exceed for its reference to eliminate a prompt -> (n,).

    floor: whether the threshold has the lower bound described below; without it, it is the paper's to the letter.

    ``elimination`` times the mean of the PEM (n, h, w) over the valid cells (the paper's adaptive threshold; the mean is
    ours), but not less than the OWN_QUANTILE of the PEM over the reference's own cells (ours, see :func:`filled_cells`): a
    prompt must look as much like the mask as most of the mask's own cells do. Without that floor a part is lost to its object,
    and a small object to what surrounds it.
    """
    weights = valid.to(pems.dtype).flatten()
    adaptive = elimination * (pems.flatten(1) @ (weights / weights.sum()))
    if not floor:
        return adaptive
    own = torch.where(filled_cells(coverage, valid), pems, float("nan")).flatten(1)
    least = torch.nanquantile(own, OWN_QUANTILE, dim=1).nan_to_num(
        nan=0.0
    )  # a mask that fills no cell has none
    return torch.maximum(adaptive, least)


def eliminate(
    pems: Tensor, thresholds: Tensor, cells: Tensor, gates: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Adaptive filtering: which waiting prompts do the references explain?

    pems:       (n, h, w). thresholds: (n,).
    cells:      (m, 2) long, the (row, column) of each waiting prompt on that grid.
    gates:      (n, h, w) bool or None; where given, a reference eliminates only where its gate is on (``aop_gated``, ours).

    Returns (m,) long, the reference that eliminates the prompt, -1 where none does (where several do, the one whose PEM
    exceeds its threshold by the largest factor), and (m,) the PEM value there (NaN where none does).
    """
    m = len(cells)
    if len(pems) == 0 or m == 0:
        return cells.new_full((m,), -1), pems.new_full((m,), float("nan"))
    at = pems[:, cells[:, 0], cells[:, 1]]  # (n, m)
    excess = at / thresholds[:, None]
    if gates is not None:
        excess = excess.masked_fill(~gates[:, cells[:, 0], cells[:, 1]], 0)
    best, by = excess.max(0)
    gone = best > 1
    values = at[by, torch.arange(m, device=at.device)]
    return torch.where(gone, by, -1), torch.where(gone, values, float("nan"))


def dilate(coverage: Tensor, cells: int = 1) -> Tensor:
    """Masks on the grid grown by ``cells``: (n, h, w) coverage -> (n, h, w) bool, on where a covered cell is that near."""
    return F.max_pool2d(coverage[:, None], 2 * cells + 1, stride=1, padding=cells)[:, 0] > 0.5
