"""From parameters to pixels: patches of objects, grouped by window size, then composed back to front. Source: ours.

Everything is vectorised over the objects of all scenes of a batch. An object's window lies wholly in the picture, so
that patches are read and written by plain indices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import _shapes, _textures
from ._layout import SceneParams

_WINDOWS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
_CHUNK = 1 << 18  # pixels of patches at a time on a CPU: what stays in its cache


@dataclass(frozen=True)
class Canvas:
    """3 x (B*S*S) linear colour and the three maps, each B*S*S int16."""

    colour: Tensor
    objects: Tensor
    parts: Tensor
    regions: Tensor


@dataclass(frozen=True)
class _Patches:
    """n square patches of one window size, sorted by layer."""

    layer: np.ndarray  # n
    pixels: Tensor  # n x w x w int64, flat indices into the canvas
    colour: Tensor  # 3 x n x w x w
    alpha: Tensor  # n x w x w
    shadow: Tensor  # n x w x w, the light taken from what lies below
    part: Tensor  # n x w x w int16
    number: Tensor  # n x 1 x 1 int16


def _tensors(rows: np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """The fields of a structured array: scalars as n x 1 x 1, vectors of two as pairs of those, others as they are."""
    out: dict[str, Tensor] = {}
    for name in rows.dtype.names:
        column = np.ascontiguousarray(rows[name])
        if column.dtype.names:
            continue
        column = torch.from_numpy(column.astype(np.int64) if column.dtype.kind == "i" else column).to(device)
        if column.ndim == 1:
            column = column[:, None, None]
        elif column.ndim == 2 and column.shape[1] == 2:
            column = column.T[:, :, None, None]
        out[name] = column
    return out


def _slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along x and y, per pixel."""
    dx, dy = torch.empty_like(x), torch.empty_like(x)
    dx[..., 1:-1] = (x[..., 2:] - x[..., :-2]) * 0.5
    dx[..., 0], dx[..., -1] = x[..., 1] - x[..., 0], x[..., -1] - x[..., -2]
    dy[..., 1:-1, :] = (x[..., 2:, :] - x[..., :-2, :]) * 0.5
    dy[..., 0, :], dy[..., -1, :] = x[..., 1, :] - x[..., 0, :], x[..., -1, :] - x[..., -2, :]
    return dx, dy


def _in_pixels(d: Tensor, scale: Tensor) -> Tensor:
    """An implicit function as a distance in pixels; scale: its usual slope, per pixel."""
    dx, dy = _slopes(d)
    return d / torch.maximum(torch.hypot(dx, dy), 0.4 * scale)


def _surfaces(
    shapes: np.ndarray, u: Tensor, v: Tensor, args: Tensor, rim: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d, height, s, t = (torch.empty_like(u) for _ in range(4))
    for shape in np.unique(shapes):
        at = torch.as_tensor(np.flatnonzero(shapes == shape), device=u.device)
        d[at], height[at], s[at], t[at] = _shapes.surface(int(shape), u[at], v[at], args[at], rim[at])
    return d, height, s, t


def _rotate(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    c, s = angle.cos(), angle.sin()
    return x * c + y * s, y * c - x * s


def _cast_shadow(o: dict[str, Tensor], rows: np.ndarray, x: Tensor, y: Tensor, light: Tensor) -> Tensor:
    """Light taken by the cast shadow: a lying object's silhouette, an ellipse by the foot of an upright one.

    x, y: from the object's centre, in sides.
    """
    sx, sy = -light[:, 0] * o["shadow_shift"], -light[:, 1] * o["shadow_shift"]
    soft = o["shadow_soft"] / o["radius"]
    d = torch.empty_like(x)
    lying = torch.as_tensor(np.flatnonzero(rows["upright"] == 0), device=x.device)
    if len(lying):
        u, v = _rotate(
            (x[lying] - sx[lying]) / o["radius"][lying], (y[lying] - sy[lying]) / o["radius"][lying], o["angle"][lying]
        )
        a = o["aspect"][lying]
        d[lying] = _surfaces(rows["shape"][rows["upright"] == 0], u / a, v * a, o["args"][lying], o["rim"][lying])[0]
    standing = torch.as_tensor(np.flatnonzero(rows["upright"] == 1), device=x.device)
    if len(standing):
        r, a = o["radius"][standing], o["aspect"][standing]
        wide = 0.85 * a + (sx[standing] / r).abs()
        d[standing] = (
            torch.hypot(
                (x[standing] / r - 1.5 * sx[standing] / r) / wide, (y[standing] / r - o["foot"][standing] + 0.12) / 0.3
            )
            - 1
        ) * 0.4
    dark = ((soft - d) / (2 * soft)).clamp(0, 1)
    return o["shadow"] * dark * dark * (3 - 2 * dark)


def _paint_parts(
    rows: np.ndarray,
    o: dict[str, Tensor],
    owner_of: np.ndarray,
    number_of: np.ndarray,
    s: Tensor,
    t: Tensor,
    inside: Tensor,
    light: Tensor,
    base: Tensor,
    pixel: Tensor,
) -> Tensor:
    """Paints parts (sorted by rank) over the albedo `base` in place; returns the part map, n x w x w int16."""
    part_map = torch.zeros(s.shape, dtype=torch.int16, device=s.device)
    for rank in np.unique(rows["rank"]):
        pick = np.flatnonzero(rows["rank"] == rank)
        owner = torch.as_tensor(owner_of[pick], device=s.device)
        p, texture = _tensors(rows[pick], s.device), _tensors(rows["texture"][pick], s.device)
        su, sv = s[owner], t[owner]
        x, y, a, b = p["x"], p["y"], p["a"], p["b"]
        mouth = (rows["hollow"][pick] == 1) & (rows["y"][pick] == -1)
        if mouth.any():  # given in units of the mouth, and on the flat picture
            m = torch.as_tensor(mouth, device=s.device)[:, None, None]
            ma, mb = _shapes.lathe_mouth(o["args"][owner])
            a, b = torch.where(m, a * ma, a), torch.where(m, b * mb, b)
            su, sv = torch.where(m, o["u"][owner], su), torch.where(m, o["v"][owner], sv)
        pu, pv = _rotate(su - x, sv - y, p["angle"])
        pu, pv = pu / a, pv / b
        level = (pu.abs().clamp(1e-4, 9) ** p["power"] + pv.abs().clamp(1e-4, 9) ** p["power"]) ** (1 / p["power"])
        level = torch.where(p["form"] == 1, pv.abs(), torch.where(p["form"] == 2, (level - 0.8).abs() / 0.2, level))
        distance = _in_pixels((level - 1) * torch.minimum(a, b), pixel[owner])
        alpha = (0.5 - distance).clamp(0, 1) * inside[owner]
        colour, _ = _textures.albedo(
            rows["texture"]["pattern"][pick], texture, pu, pv, pixel[owner] / torch.minimum(a, b)
        )
        facing = (0.5 - 0.35 * (pu * light[owner, 0] + pv * light[owner, 1])).clamp(
            0.1, 1
        )  # a hollow is lit on its far side
        colour = torch.where(p["hollow"] == 1, colour * facing, colour)
        base[:, owner] = torch.lerp(base[:, owner], colour, alpha)
        number = torch.as_tensor(number_of[pick].astype(np.int16), device=s.device)[:, None, None]
        part_map[owner] = torch.where(alpha >= 0.5, number, part_map[owner])
    return part_map


def _patches(
    rows: np.ndarray,
    parts: np.ndarray,
    part_owner: np.ndarray,
    part_number: np.ndarray,
    frame: np.ndarray,
    scene: np.ndarray,
    layer: np.ndarray,
    number: np.ndarray,
    window: int,
    size: int,
    device: torch.device,
) -> _Patches:
    o = _tensors(rows, device)
    light = torch.from_numpy(frame["light"].copy()).to(device)[:, :, None, None]
    ambient = torch.from_numpy(frame["ambient"].copy()).to(device)[:, None, None]
    left = np.clip(np.rint(rows["x"].astype(np.float64) * size - window / 2), 0, size - window).astype(np.int64)
    top = np.clip(np.rint(rows["y"].astype(np.float64) * size - window / 2), 0, size - window).astype(np.int64)
    left, top, which = (torch.from_numpy(a).to(device)[:, None, None] for a in (left, top, scene.astype(np.int64)))
    step = torch.arange(window, device=device)
    px, py = left + step[None, None, :], top + step[None, :, None]
    pixels = which * (size * size) + py * size + px

    radius = o["radius"]
    pixel = 1 / (radius * size)  # in radii
    x, y = torch.broadcast_tensors((px + 0.5) / size - o["x"], (py + 0.5) / size - o["y"])
    u, v = _rotate(x / radius, y / radius, o["angle"])
    u, v = u / o["aspect"], v * o["aspect"]
    d, height, s, t = _surfaces(rows["shape"], u, v, o["args"], o["rim"])
    distance = _in_pixels(d, pixel)
    alpha = (0.5 - distance).clamp(0, 1)

    colour, fine = _textures.albedo(rows["texture"]["pattern"], _tensors(rows["texture"], device), s, t, pixel)
    part_map = _paint_parts(parts, {**o, "u": u, "v": v}, part_owner, part_number, s, t, alpha, light, colour, pixel)

    relief = (height * o["bulge"] + fine * o["bump"]) / pixel
    dx, dy = _slopes(relief)
    nz = torch.rsqrt(dx * dx + dy * dy + 1)
    lx, ly, lz = light.unbind(1)
    facing = ((lz - dx * lx - dy * ly) * nz).clamp_min(0) / lz
    sky = 0.75 + 0.25 * nz + 0.2 * dy * nz  # ambient light comes from above and in front
    shade = ambient * sky + (1 - ambient) * facing.clamp_max(1.7)
    half = torch.rsqrt(2 + 2 * lz)
    gleam = ((lz + 1 - dx * lx - dy * ly) * nz * half).clamp(0, 1) ** o["gloss_power"]
    colour = colour * shade + o["gloss"] * gleam * 0.8

    shadow = _cast_shadow(o, rows, x, y, light)
    touch = 0.35 * torch.exp(-distance.clamp_min(0) * pixel / 0.12)  # less sky reaches the ground close to an object
    shadow = 1 - (1 - shadow) * (1 - touch * o["shadow"])
    num = torch.from_numpy(number.astype(np.int16)).to(device)[:, None, None]
    return _Patches(layer, pixels, colour, alpha, shadow, part_map, num)


def _window_of(objects: np.ndarray, size: int) -> np.ndarray:
    """The side of each object's window: it holds the object, its shadow and a margin, or else is the picture's."""
    reach = (
        objects["reach"] * objects["radius"]
        + 1.6 * objects["shadow_shift"]
        + objects["shadow_soft"]
        + 0.12 * objects["radius"]
    )
    need = np.ceil(2 * reach.astype(np.float64) * size) + 4
    steps = np.array([w for w in _WINDOWS if w < size] + [size])
    return steps[np.minimum(np.searchsorted(steps, need), len(steps) - 1)]


def _background(scenes: list[SceneParams], size: int, canvas: Canvas, device: torch.device) -> None:
    colour = canvas.colour.view(3, len(scenes), size, size)
    regions = canvas.regions.view(len(scenes), size, size)
    axis = (torch.arange(size, device=device) + 0.5) / size
    for k in range(max(len(p.regions) for p in scenes)):
        have = [b for b, p in enumerate(scenes) if len(p.regions) > k]
        rows = np.stack([scenes[b].regions[k] for b in have])
        g, at = _tensors(rows, device), torch.as_tensor(have, device=device)
        x, y = axis[None, None, :].expand(len(have), size, size), axis[None, :, None].expand(len(have), size, size)
        along = x * g["normal"][0] + y * g["normal"][1] - g["offset"]
        d = torch.maximum(-along, along - g["width"]) * size
        # a table recedes: its pattern shrinks towards the horizon
        depth = 1 / (1 + g["recede"] * (y - g["horizon"] - 0.5).clamp(-0.5, 1))
        s, t = (x - 0.5) * 2 * depth, 2 * depth * (y - 0.5) * (1 + g["recede"])
        pixel = (2 / size) * depth * (1 + g["recede"])
        paint, _ = _textures.albedo(rows["texture"]["pattern"], _tensors(rows["texture"], device), s, t, pixel)
        paint = paint * g["shade"]
        alpha = (0.5 - d).clamp(0, 1)
        below = colour[:, at]
        # the nearer sheet shades what lies under its edge
        below = below * (1 - 0.3 * torch.exp(-d.clamp_min(0) / (0.008 * size))) if k else below
        colour[:, at] = torch.lerp(below, paint, alpha)
        regions[at] = torch.where(d <= 0, torch.full_like(regions[at], k + 1), regions[at])


def _stamp(canvas: Canvas, p: _Patches, rows: slice) -> None:
    at, alpha = p.pixels[rows].reshape(-1), p.alpha[rows].reshape(-1)
    light = (1 - p.shadow[rows]).reshape(-1)
    for plane, colour in zip(canvas.colour, p.colour[:, rows]):
        plane.index_copy_(0, at, torch.lerp(plane.index_select(0, at) * light, colour.reshape(-1), alpha))
    covered = alpha >= 0.5
    number = p.number[rows].expand(p.part[rows].shape)
    for plane, value in ((canvas.objects, number), (canvas.parts, p.part[rows])):
        plane.index_copy_(0, at, torch.where(covered, value.reshape(-1), plane.index_select(0, at)))


def compose(scenes: list[SceneParams], size: int, device: torch.device) -> Canvas:
    """All scenes in linear light, and their maps; objects are numbered from 1 in painting order, parts likewise."""
    n_pixels = len(scenes) * size * size
    maps = (torch.zeros(n_pixels, dtype=torch.int16, device=device) for _ in range(3))
    canvas = Canvas(torch.zeros(3, n_pixels, device=device), *maps)
    _background(scenes, size, canvas, device)

    counts = np.array([len(p.objects) for p in scenes])
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    objects = np.concatenate([p.objects for p in scenes])
    scene = np.repeat(np.arange(len(scenes)), counts)
    layer = np.arange(len(objects)) - first[scene]
    frames = np.stack([p.frame for p in scenes])
    parts = np.concatenate([p.parts for p in scenes])
    part_owner = np.concatenate([p.parts["owner"] + first[b] for b, p in enumerate(scenes)]).astype(np.int64)
    part_number = np.concatenate([np.arange(1, len(p.parts) + 1) for p in scenes])
    window = _window_of(objects, size)

    stacks: list[_Patches] = []
    order = np.argsort(layer, kind="stable")
    for w in np.unique(window):
        rows = order[window[order] == w]
        block = max(1, _CHUNK // int(w * w)) if device.type == "cpu" else len(rows)
        for i in range(0, len(rows), block):
            pick = rows[i : i + block]
            place = np.full(len(objects), -1)
            place[pick] = np.arange(len(pick))
            mine = np.flatnonzero(place[part_owner] >= 0)
            stacks.append(
                _patches(
                    objects[pick],
                    parts[mine],
                    place[part_owner[mine]],
                    part_number[mine],
                    frames[scene[pick]],
                    scene[pick],
                    layer[pick],
                    layer[pick] + 1,
                    int(w),
                    size,
                    device,
                )
            )
    bounds = [np.searchsorted(p.layer, np.arange(counts.max() + 1)) for p in stacks]
    for k in range(counts.max()):
        for p, bound in zip(stacks, bounds):
            if bound[k] < bound[k + 1]:
                _stamp(canvas, p, slice(int(bound[k]), int(bound[k + 1])))
    return canvas


def _hash_noise(seeds: np.ndarray, size: int, device: torch.device) -> Tensor:
    """B x 3 x S x S, nearly Gaussian, deviation 1: four bytes of an integer hash of (seed, channel, pixel), summed."""
    mask = 0xFFFFFFFF
    x = torch.arange(3 * size * size, device=device).view(1, 3, size, size)
    x = (x + torch.from_numpy((seeds * 0x9E3779B1 + 0x7F4A7C15) & mask).to(device)[:, None, None, None]) & mask
    for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & mask
    total = (x & 255) + ((x >> 8) & 255) + ((x >> 16) & 255) + (x >> 24)
    return (total.float() - 510) / 147.8


def _blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """Each picture of B x 3 x S x S under its own Gaussian (sigma in pixels, at most 2)."""
    reach = 5
    tap = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-0.5 * (tap / sigma.clamp(0.15, 2)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    b, _, h, w = x.shape
    kernel = kernel.repeat_interleave(3, 0)[:, None]
    flat = torch.nn.functional.pad(x.reshape(1, 3 * b, h, w), (reach,) * 4, mode="replicate")
    flat = torch.nn.functional.conv2d(flat, kernel[..., None], groups=3 * b)
    return torch.nn.functional.conv2d(flat, kernel[:, :, None], groups=3 * b).view(b, 3, h, w)


def develop(scenes: list[SceneParams], canvas: Canvas, size: int, device: torch.device) -> Tensor:
    """Linear light to B x 3 x S x S uint8: uneven lighting, exposure, white balance, blur, tone curve, sensor noise."""
    frames = np.stack([p.frame for p in scenes])
    f = _tensors(frames, device)
    x = canvas.colour.view(3, len(scenes), size, size).transpose(0, 1).contiguous()
    axis = (torch.arange(size, device=device) + 0.5) / size - 0.5
    gx, gy = axis[None, None, :], axis[None, :, None]
    light, white = f["light"], f["white"]
    fall = torch.exp(f["falloff"] * (gx * light[:, 0, None, None] + gy * light[:, 1, None, None]) * 1.6)
    ox, oy = f["dapple_offset"]
    dapple = torch.exp(f["dapple"] * _textures.noise(f["dapple_field"], ox + gx * 40, oy + gy * 40))
    vignette = 1 - f["vignette"] * 2 * (gx * gx + gy * gy)
    x = x * (fall * dapple * vignette * f["exposure"])[:, None] * white[:, :, None, None]
    x = _blurred(x, f["blur"].view(-1) * size)
    x = torch.where(x < 0.6, x, 0.6 + 0.4 * (1 - torch.exp(-(x - 0.6).clamp_min(0) / 0.4)))  # highlights roll off
    x = x.clamp(0, 1) ** (f["contrast"][..., None] / 2.2)
    x = x + f["noise"][..., None] * _hash_noise(np.array([p.seed for p in scenes], np.int64), size, device) * (1.15 - x)
    return (x * 255).round().clamp(0, 255).to(torch.uint8)
