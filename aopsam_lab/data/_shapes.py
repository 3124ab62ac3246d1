"""Outlines and relief of the objects of a scene, vectorised over objects.

A shape gets object coordinates u, v (n x w x w, in radii) and its arguments (n x 20, drawn by _draw.py), and returns
    d       n x w x w, negative inside, zero on the outline, roughly a distance in radii
    height  n x w x w, relief towards the viewer in radii, before the object's bulge
    s, t    n x w x w, coordinates that follow the surface, for textures and parts
Source: ours; the outlines are textbook implicit functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._layout import SHAPES

Surface = tuple[Tensor, Tensor, Tensor, Tensor]


def _dome(level: Tensor, rim: Tensor) -> Tensor:
    """Height over a level from 0 (ridge) to 1 (outline): flat inside, a quarter ellipse over the outer `rim`."""
    x = ((level - (1 - rim)) / rim).clamp(0, 1)
    return (1 - x * x).clamp_min(1e-4).sqrt()


def _cols(args: Tensor, *index: int) -> list[Tensor]:
    return [args[:, i, None, None] for i in index]


def _ellipse(u: Tensor, v: Tensor, args: Tensor, rim: Tensor) -> Surface:
    r = torch.hypot(u, v)
    bend = 1 + 0.25 * r * r  # a pattern on a ball crowds towards its outline
    return r - 1, _dome(r, rim), u * bend, v * bend


def _superellipse(u: Tensor, v: Tensor, args: Tensor, rim: Tensor) -> Surface:
    (p,) = _cols(args, 0)
    level = (u.abs().clamp(1e-4, 3) ** p + v.abs().clamp(1e-4, 3) ** p) ** (1 / p)
    return level - 1, _dome(level, rim), u, v


def _blob(u: Tensor, v: Tensor, args: Tensor, rim: Tensor) -> Surface:
    r = torch.hypot(u, v).clamp_min(1e-4)
    c1, s1 = u / r, v / r
    c, s, outline = c1, s1, torch.ones_like(r)
    for k in range(6):
        a, b = _cols(args, k, 6 + k)
        outline = outline + a * c + b * s
        c, s = c * c1 - s * s1, s * c1 + c * s1  # the next harmonic by the addition theorem
    outline = outline.clamp(0.3, 2)
    level = r / outline
    bend = 1 + 0.2 * level * level
    return r - outline, _dome(level, rim), u * bend, v * bend


def _ring(u: Tensor, v: Tensor, args: Tensor, rim: Tensor) -> Surface:
    (w,) = _cols(args, 0)
    off = torch.hypot(u, v) - (1 - w)
    return off.abs() - w, w * _dome(off.abs() / w, rim), u, v


def lathe_mouth(args: Tensor) -> tuple[Tensor, Tensor]:
    """Half axes of a lathe's mouth, each n x 1 x 1, in radii; it is centred at (0, -1)."""
    return _lathe_radius(torch.full_like(args[:, :1, None], -1.0), args), args[:, 6, None, None]


def _lathe_radius(v: Tensor, args: Tensor) -> Tensor:
    neck, body, shoulder, steep, foot, belly = _cols(args, 0, 1, 2, 3, 4, 5)
    v = v.clamp(-1.2, 1.2)
    radius = neck + (body - neck) * torch.sigmoid(steep * (v - shoulder)) + belly * torch.cos(1.5 * v)
    return (radius - foot * (v - 0.4).clamp_min(0) ** 2 * 2).clamp_min(0.08)


def _lathe(u: Tensor, v: Tensor, args: Tensor, rim: Tensor) -> Surface:
    """A turned vessel seen a little from above: its rims are arcs, its top a flat ellipse."""
    arc, handle_v, handle_r, handle_w = _cols(args, 6, 7, 8, 9)
    radius = _lathe_radius(v, args)
    across = (u / radius).clamp(-1, 1)
    round_ = (1 - across * across).clamp_min(1e-4).sqrt()
    t = v - arc * round_
    d = torch.maximum(u.abs() - radius, t.abs() - 1)
    mouth_a, mouth_b = lathe_mouth(args)
    d = torch.minimum(d, (torch.hypot(u / mouth_a, (v + 1) / mouth_b) - 1) * mouth_b)
    height = radius * round_
    at = _lathe_radius(handle_v, args) + 0.3 * handle_r
    off = (torch.hypot(u - at, (v - handle_v) * 0.8) - handle_r).abs()
    handle = torch.where(handle_w > 0, off - handle_w, torch.full_like(off, 9.0))
    grip = (handle < d) & (d > 0)
    height = torch.where(grip, handle_w * _dome(off / handle_w.clamp_min(1e-3), torch.ones_like(rim)), height)
    return torch.minimum(d, handle), height, torch.asin(across * 0.98) * radius, t


def _polygon(u: Tensor, v: Tensor, args: Tensor, rim: Tensor) -> Surface:
    d = torch.full_like(u, -9.0)
    for k in range(7):
        angle, offset = _cols(args, k, 7 + k)
        d = torch.maximum(d, u * angle.cos() + v * angle.sin() - offset)
    depth = args[:, 7:14].amin(1)[:, None, None]
    return d, depth * _dome(1 + d / depth, rim), u, v


def _branch(u: Tensor, v: Tensor, args: Tensor, rim: Tensor) -> Surface:
    d, height, along = torch.full_like(u, 9.0), torch.zeros_like(u), torch.zeros_like(u)
    for k in range(4):
        x0, y0, x1, y1, w = _cols(args, *range(5 * k, 5 * k + 5))
        bx, by = x1 - x0, y1 - y0
        h = (((u - x0) * bx + (v - y0) * by) / (bx * bx + by * by + 1e-6)).clamp(0, 1)
        off = torch.hypot(u - x0 - h * bx, v - y0 - h * by)
        nearer = off - w < d
        d = torch.where(nearer, off - w, d)
        height = torch.maximum(
            height, torch.where(off < w, w * _dome(off / w, rim.clamp_min(0.5)), torch.zeros_like(off))
        )
        along = torch.where(nearer, h + k, along)
    return d, height, along, d


def _crescent(u: Tensor, v: Tensor, args: Tensor, rim: Tensor) -> Surface:
    bite, x, y = _cols(args, 0, 1, 2)
    d = torch.maximum(torch.hypot(u, v) - 1, bite - torch.hypot(u - x, v - y))
    depth = ((1 - bite + torch.hypot(x, y)) / 2).clamp(0.1, 1)
    return d, depth * _dome(1 + d / depth, rim), u, v


def _box(u: Tensor, v: Tensor, args: Tensor, rim: Tensor) -> Surface:
    """Three faces that meet in the near corner; the relief falls away from it, so light tells them apart."""
    cx, cy = _cols(args, 9, 10)
    u, v = u + cx, v + cy
    d = torch.full_like(u, 9.0)
    height, s, t = torch.zeros_like(u), torch.zeros_like(u), torch.zeros_like(u)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        ax, ay, bx, by = _cols(args, 2 * i, 2 * i + 1, 2 * j, 2 * j + 1)
        fall_a, fall_b = _cols(args, 6 + i, 6 + j)
        det = ax * by - ay * bx
        det = torch.where(det.abs() < 0.02, torch.full_like(det, 0.02), det)
        p, q = (u * by - v * bx) / det, (v * ax - u * ay) / det
        la, lb = torch.hypot(ax, ay), torch.hypot(bx, by)
        skew = det.abs() / (la * lb)
        face = torch.maximum(((p - 0.5).abs() - 0.5) * la, ((q - 0.5).abs() - 0.5) * lb) * skew
        nearer = face < d
        d = torch.where(nearer, face, d)
        height = torch.where(nearer, -(p * fall_a + q * fall_b), height)
        s, t = torch.where(nearer, p * 2 - 1, s), torch.where(nearer, q * 2 - 1, t)
    return d, height, s, t


def _leaf(u: Tensor, v: Tensor, args: Tensor, rim: Tensor) -> Surface:
    k, bend = _cols(args, 0, 1)
    t = v + bend * (u * u - 0.5)
    reach = (1 + k * k).sqrt()
    d = torch.maximum(torch.hypot(u, t - k), torch.hypot(u, t + k)) - reach
    depth = reach - k
    height = depth * _dome(1 + d / depth, rim) - 0.25 * depth * torch.exp(-((t / (0.12 * depth)) ** 2))  # a midrib
    return d, height, u, t


_BY_NAME: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Surface]] = {
    "ellipse": _ellipse,
    "superellipse": _superellipse,
    "blob": _blob,
    "ring": _ring,
    "lathe": _lathe,
    "polygon": _polygon,
    "branch": _branch,
    "crescent": _crescent,
    "box": _box,
    "leaf": _leaf,
}


def surface(shape: int, u: Tensor, v: Tensor, args: Tensor, rim: Tensor) -> Surface:
    """The surface of objects of one shape (its number in SHAPES); rim is n x 1 x 1. See the module for the result."""
    return _BY_NAME[SHAPES[shape]](u, v, args, rim)
