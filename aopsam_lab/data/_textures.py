"""Surface colours of a scene: patterns and noise, vectorised over surfaces. Source: ours."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ._layout import N_FIELDS, PATTERNS

_SIDE = 256


@lru_cache(maxsize=4)
def atlas(device: torch.device) -> Tensor:
    """N_FIELDS tileable noise fields of 256 x 256, mean 0, deviation 1, cut at 2.5; flattened to one row on `device`.

    8 soft, 8 rough, 4 streaked, 4 ridged, 4 cellular, 4 of one scale. Made once from a fixed seed.
    """
    rng = np.random.Generator(np.random.PCG64(20_26))
    fy, fx = np.meshgrid(np.fft.fftfreq(_SIDE) * _SIDE, np.fft.fftfreq(_SIDE) * _SIDE, indexing="ij")
    fields = []
    for k in range(N_FIELDS):
        stretch = 9.0 if 16 <= k < 20 else 1.0
        f = np.hypot(fx, fy * stretch) + 1e-3
        if k < 8:
            gain = f**-1.7
        elif k < 28:
            gain = f**-1.15
        else:
            gain = np.exp(-((np.log2(f) - 3.5 - 0.5 * (k - 28)) ** 2))
        gain = gain * (f > 1.5) * np.exp(-((f / 70) ** 2))
        if 24 <= k < 28:  # distance to the nearest of scattered points
            points = rng.random((40 + 40 * (k - 24), 2)) * _SIDE
            grid = np.arange(_SIDE) + 0.5
            gaps = [np.abs(grid[:, None] - points[None, :, axis]) for axis in (0, 1)]
            gy, gx = (np.minimum(g, _SIDE - g) for g in gaps)
            field = np.sqrt((gy[:, None, :] ** 2 + gx[None, :, :] ** 2).min(-1))
        else:
            field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((_SIDE, _SIDE))) * gain).real
        if 20 <= k < 24:
            field = -np.abs(field)
        fields.append(np.clip((field - field.mean()) / field.std(), -2.5, 2.5))
    return torch.from_numpy(np.stack(fields).astype(np.float32).ravel()).to(device)


def noise(field: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Values of noise fields (n x 1 x 1 int64) at x, y (n x h x w, in texels, any value), bilinear."""
    table = atlas(x.device)
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    x0, y0 = x0.int(), y0.int()
    rows = field.int() * (_SIDE * _SIDE)
    row0, row1 = rows + (y0 & (_SIDE - 1)) * _SIDE, rows + ((y0 + 1) & (_SIDE - 1)) * _SIDE
    x1 = (x0 + 1) & (_SIDE - 1)
    x0 = x0 & (_SIDE - 1)

    def at(row: Tensor, column: Tensor) -> Tensor:  # index_select is several times as fast as indexing on a CPU
        index = row + column
        return table.index_select(0, index.view(-1)).view(index.shape)

    return torch.lerp(torch.lerp(at(row0, x0), at(row0, x1), fx), torch.lerp(at(row1, x0), at(row1, x1), fx), fy)


def _step(x: Tensor, blur: Tensor) -> Tensor:
    """A step at x = 0 as wide as a pixel sees it."""
    return (0.5 + x / blur).clamp(0, 1)


def _wave(x: Tensor) -> Tensor:
    """A triangle wave of period 1 between -0.25 and 0.25."""
    return (x - x.floor() - 0.5).abs() - 0.25


def _pattern(name: str, s: Tensor, t: Tensor, soft: Tensor, texture: dict[str, Tensor], pixel: Tensor) -> Tensor:
    """The second colour's share, in [0, 1]. soft: the coarse noise; pixel: a pixel's size in the units of s and t."""
    freq, sharp = texture["frequency"], texture["sharpness"]
    freq = torch.minimum(freq, 0.16 / pixel)  # nothing finer than a pixel can show
    blur = 1.5 * freq * pixel + 0.02
    if name == "stripes":
        return _step(_wave(s * freq), blur)
    if name == "checker":
        return _step(_wave(s * freq / 2) * _wave(t * freq / 2) * 4, blur)
    if name == "clouds":
        return torch.sigmoid(sharp * soft)
    if name == "veins":
        return 0.5 + 0.5 * torch.sin(6.2832 * freq * (s + texture["warp"] * soft * 0.5))
    if name == "dots":
        a, b = s * freq - (s * freq).floor() - 0.5, t * freq - (t * freq).floor() - 0.5
        return _step(0.18 + 0.2 * texture["warp"] - torch.hypot(a, b), blur)
    if name == "gradient":
        return (0.5 + 0.5 * s + 0.15 * soft).clamp(0, 1)
    if name == "patches":
        return _step(soft - 0.3, 0.15 + blur)
    if name == "plaid":
        return 0.5 * _step(_wave(s * freq), blur) + 0.5 * _step(_wave(t * freq), blur)
    if name == "rings":
        return _step(_wave(torch.hypot(s, t) * freq + 0.15 * soft), blur)
    return torch.zeros_like(s)


def albedo(kinds: np.ndarray, texture: dict[str, Tensor], s: Tensor, t: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """Colour of textured surfaces.

    kinds:   n, the patterns' numbers on the host. texture: _layout.TEXTURE as tensors, n x 1 x 1, colours n x 3 x 3.
    s, t:    n x h x w surface coordinates; pixel: a pixel's size in their units, n x 1 x 1 or n x h x w.

    Returns: 3 x n x h x w linear albedo, and n x h x w fine noise for the relief.
    """
    c, si = texture["angle"].cos(), texture["angle"].sin()
    s, t = s * c + t * si, t * c - s * si
    scale = torch.minimum(texture["grain_size"], 0.8 / pixel)
    soft = noise(texture["field"], s * scale * 0.5 + texture["offset"][0], t * scale * 0.5 + texture["offset"][1])
    fine = noise(
        (texture["field"] + 8) % N_FIELDS, s * scale * 2 + texture["offset"][1], t * scale * 2 + texture["offset"][0]
    )
    fine = fine * (0.4 / (pixel * scale)).clamp(0, 1)  # fades where pixels are coarser than it
    share = torch.zeros_like(s)
    for k in np.unique(kinds):
        rows = np.flatnonzero(kinds == k)
        if PATTERNS[k] == "plain":
            continue
        at = torch.as_tensor(rows, device=s.device)
        pick = {name: texture[name][at] for name in ("frequency", "sharpness", "warp")}
        share[at] = _pattern(PATTERNS[k], s[at], t[at], soft[at], pick, pixel[at])
    third = 0.5 * torch.sigmoid(2 * (fine - 1) + soft)
    light = torch.exp(texture["mottle"] * soft + texture["grain"] * fine)
    colours = texture["colours"]  # n x 3 (which) x 3 (rgb)
    planes = []
    for rgb in range(3):
        first, second, other = (colours[:, i, rgb, None, None] for i in range(3))
        plane = first + (second - first) * share
        planes.append((plane + (other - plane) * third * 0.5) * light)
    return torch.stack(planes), fine
