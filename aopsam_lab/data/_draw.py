"""What is in a scene: every parameter of it, drawn by NumPy's PCG64 from the scene's seed alone.

Nothing here depends on the picture's size or on a batch. All choices are ours.
"""

from __future__ import annotations

import numpy as np

from ._layout import FRAME, N_ARGS, OBJECT, PART, PART_FORMS, REGION, SHAPES, SceneParams
from ._palette import GROUND_PATTERNS, GROUNDS, OBJECT_PATTERNS, SRGB, Dice, surface_colour, texture


def _shape_args(dice: Dice, shape: str) -> tuple[np.ndarray, float]:
    """Arguments of a shape (read by shapes.py in this order) and the radius of a circle that holds it, in radii."""
    a = np.zeros(N_ARGS)
    if shape == "ellipse":
        return a, 1.0
    if shape == "superellipse":
        a[0] = dice.uniform(2.6, 9)
        return a, 1.42
    if shape == "blob":  # cosine and sine coefficients of the outline, harmonics 1 to 6
        rough = dice.uniform(0.06, 0.24)
        a[:12] = (dice.normal(0, 1, (2, 6)) * rough / np.arange(1, 7) ** 0.8).ravel()
        return a, 1.0 + np.hypot(a[:6], a[6:12]).sum()
    if shape == "ring":
        a[0] = dice.uniform(0.14, 0.42)  # half the tube's width
        return a, 1.0
    if shape == "lathe":
        neck, body = dice.uniform(0.12, 0.6), dice.uniform(0.35, 0.8)
        a[:6] = (
            neck,
            body,
            dice.uniform(-0.7, 0.5),
            dice.uniform(2.5, 14),
            dice.uniform(0, 0.25),
            dice.uniform(-0.05, 0.22),
        )
        a[6] = dice.uniform(0.05, 0.22)  # how much the rims bulge towards us
        if dice.chance(0.25):  # a handle: its height, radius and half width
            a[7:10] = dice.uniform(-0.4, 0.3), dice.uniform(0.2, 0.42), dice.uniform(0.05, 0.1)
        return a, 1.35 if a[9] == 0 else 1.7
    if shape == "polygon":
        n = 3 + dice.integer(5)
        angles = 2 * np.pi * (np.arange(n) + dice.uniform(-0.22, 0.22, n)) / n
        offsets = dice.uniform(0.6, 1.0, n)
        following = np.roll(angles, -1)
        # corners where neighbouring sides meet
        det = np.sin(following - angles)
        cx = (offsets * np.sin(following) - np.roll(offsets, -1) * np.sin(angles)) / det
        cy = (np.roll(offsets, -1) * np.cos(angles) - offsets * np.cos(following)) / det
        fill = np.arange(7) % n
        a[:7], a[7:14] = angles[fill], offsets[fill]
        return a, min(float(np.hypot(cx, cy).max()), 2.4)
    if shape == "branch":  # up to four capsules: x0 y0 x1 y1 half-width each
        n, p, reach = 2 + dice.integer(3), np.zeros(2), 0.0
        for i in range(4):
            if i < n:
                q, w = dice.uniform(-0.95, 0.95, 2), dice.uniform(0.07, 0.24)
                capsule = (*p, *q, w)
                reach = max(reach, float(np.hypot(*p)) + w, float(np.hypot(*q)) + w)
                p = q if dice.chance(0.6) else p
            a[5 * i : 5 * i + 5] = capsule
        return a, reach
    if shape == "crescent":  # a bite of radius a0 at (a1, a2)
        a[:3] = dice.uniform(0.4, 0.95), dice.uniform(0.35, 0.9), dice.uniform(-0.35, 0.35)
        return a, 1.0
    if shape == "box":  # three edges from the near corner, and how far each recedes
        turn, tilt = dice.uniform(0.35, 1.2), dice.uniform(0.3, 0.75)
        long = dice.uniform(0.5, 1.1, 3)
        a[:6] = (
            long[0] * np.cos(turn),
            -long[0] * np.sin(turn) * tilt,
            -long[1] * np.sin(turn),
            -long[1] * np.cos(turn) * tilt,
            0.0,
            long[2] * np.sqrt(1 - 0.6 * tilt**2),
        )
        a[6:9] = long[0] * np.sin(turn), long[1] * np.cos(turn), long[2] * tilt
        edges = a[:6].reshape(3, 2)
        corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) @ edges
        centre = (corners.max(0) + corners.min(0)) / 2
        a[9:11] = centre
        return a, float(np.hypot(*(corners - centre).T).max())
    a[0] = dice.uniform(0.6, 2.5)  # leaf: two circles whose centres are this far from the axis
    a[1] = dice.uniform(-0.25, 0.25)  # bend
    return a, 1.1


_LYING = {
    "ellipse": 2,
    "superellipse": 1.4,
    "blob": 2,
    "ring": 0.8,
    "lathe": 0.8,
    "polygon": 1,
    "branch": 0.8,
    "crescent": 0.7,
    "box": 0.8,
    "leaf": 0.8,
}
_STANDING = {
    "ellipse": 2,
    "superellipse": 0.8,
    "blob": 1.6,
    "ring": 0.3,
    "lathe": 3.0,
    "polygon": 0.4,
    "branch": 0.5,
    "crescent": 0.3,
    "box": 1.8,
    "leaf": 0.4,
}


def _thing(dice: Dice, palette: list[int], standing: bool, small: bool) -> np.ndarray:
    """An object without its place: shape, relief, finish, texture."""
    o = np.zeros((), OBJECT)
    shape = SHAPES[dice.pick(SHAPES, _STANDING if standing else _LYING)]
    o["shape"] = SHAPES.index(shape)
    o["args"], reach = _shape_args(dice, shape)
    o["aspect"] = (
        1.0 if shape in ("ring", "box") and dice.chance(0.7) else np.exp(np.clip(dice.normal(0, 0.24), -0.5, 0.5))
    )
    o["reach"] = reach * max(o["aspect"], 1 / o["aspect"])
    o["rim"] = dice.uniform(0.55, 1.0) if dice.chance(0.62) else dice.uniform(0.06, 0.4)
    o["bulge"] = dice.uniform(0.45, 1.0) if o["rim"] > 0.5 else dice.uniform(0.1, 0.6)
    o["bump"] = dice.uniform(0, 0.03) if dice.chance(0.6) else 0.0
    o["gloss"] = dice.uniform(0.08, 0.75) if dice.chance(0.55) else dice.uniform(0, 0.06)
    o["gloss_power"] = np.exp(dice.uniform(np.log(8), np.log(110)))
    patterns = {"plain": 2, "clouds": 1, "gradient": 1, "patches": 0.5, "stripes": 0.4} if small else OBJECT_PATTERNS
    o["texture"] = texture(dice, surface_colour(dice, palette[dice.integer(len(palette))]), palette, patterns)
    return o


def _foot(o: np.ndarray) -> float:
    """How far an upright object's foot is below its centre, in radii."""
    shape, a = SHAPES[o["shape"]], o["args"]
    down = 1.0
    if shape == "lathe":
        down = 1 + a[6]
    elif shape == "box":  # the lower ends of its three edges
        down = max(a[1] + a[5], a[3] + a[5], a[5]) - a[10]
    return 0.95 * float(down) / float(o["aspect"])


def _like(dice: Dice, model: np.ndarray) -> np.ndarray:
    """Another of the same kind: a second apple, the next pebble."""
    o = model.copy()
    o["aspect"] = np.clip(o["aspect"] * np.exp(dice.normal(0, 0.06)), 0.55, 1.8)
    o["reach"] = o["reach"] * 1.15
    o["texture"]["offset"] = dice.uniform(0, 256, 2)
    o["texture"]["colours"] = np.clip(
        o["texture"]["colours"] * np.exp(dice.normal(0, 0.1)) * np.exp(dice.normal(0, 0.04, 3)), 0.01, 0.88
    )
    return o


def _parts_of(dice: Dice, owner: int, o: np.ndarray, palette: list[int]) -> list[np.ndarray]:
    """Labels, spots, bands, openings; a vase has its mouth."""
    shape, found = SHAPES[o["shape"]], []

    def part(
        form: str, x: float, y: float, a: float, b: float, angle: float = 0.0, power: float = 2.0, hollow: bool = False
    ):
        p = np.zeros((), PART)
        p["owner"], p["rank"], p["form"] = owner, len(found), PART_FORMS.index(form)
        p["x"], p["y"], p["a"], p["b"], p["angle"], p["power"], p["hollow"] = x, y, a, b, angle, power, hollow
        first = surface_colour(dice, palette[dice.integer(len(palette))])
        if hollow:
            first = o["texture"]["colours"][0] * 0.5
        p["texture"] = texture(dice, first, palette, {"plain": 1.0} if hollow else OBJECT_PATTERNS, busy=1.5)
        if hollow:
            p["texture"]["colours"] = first
        found.append(p)

    if shape == "lathe" and o["radius"] > 0.05 and dice.chance(0.7):
        part("superellipse", 0, -1, 0.84, 0.8, hollow=True)  # in units of the mouth: see shapes.py
    if o["radius"] < 0.055 or shape in ("branch", "ring", "crescent") or not dice.chance(0.55):
        return found
    kind = dice.uniform()
    if kind < 0.3:  # a label
        part(
            "superellipse",
            *dice.uniform(-0.2, 0.2, 2),
            *dice.uniform(0.2, 0.5, 2),
            dice.normal(0, 0.1),
            dice.uniform(3, 9),
        )
    elif kind < 0.55:  # one or two bands
        for _ in range(1 + dice.integer(2)):
            part("band", 0, dice.uniform(-0.6, 0.6), 9, dice.uniform(0.08, 0.2), dice.normal(0, 0.05))
    elif kind < 0.85:  # spots, patches
        for _ in range(1 + dice.integer(3)):
            size = dice.uniform(0.14, 0.36)
            part(
                "superellipse", *dice.uniform(-0.55, 0.55, 2), size, size * dice.uniform(0.6, 1), dice.uniform(0, np.pi)
            )
    elif kind < 0.93:
        size = dice.uniform(0.3, 0.6)
        part("ring", 0, 0, size, size * dice.uniform(0.6, 1))
    else:
        size = dice.uniform(0.2, 0.5)
        part(
            "superellipse",
            *dice.uniform(-0.2, 0.2, 2),
            size,
            size * dice.uniform(0.6, 1),
            0.0,
            dice.uniform(2, 5),
            hollow=True,
        )
    return found


def _regions(dice: Dice, palette: list[int], standing: bool, horizon: float) -> np.ndarray:
    out = []

    def region(normal, offset, width, recede, shade):
        g = np.zeros((), REGION)
        g["normal"], g["offset"], g["width"], g["recede"], g["horizon"], g["shade"] = (
            normal,
            offset,
            width,
            recede,
            horizon,
            shade,
        )
        index = GROUNDS[dice.integer(len(GROUNDS))] if dice.chance(0.75) else palette[dice.integer(len(palette))]
        first = surface_colour(dice, index)
        g["texture"] = texture(dice, first, palette, GROUND_PATTERNS, busy=dice.uniform(1.2, 4))
        # a ground that does not shout down what stands on it
        colours = g["texture"]["colours"].astype(np.float64)
        g["texture"]["colours"] = first + (colours - first) * dice.uniform(0.2, 0.8)
        out.append(g)

    region((0, 1), -9, 99, 0.0, dice.uniform(0.6, 1.0))
    if standing:
        tilt = dice.normal(0, 0.04)
        region(
            (-np.sin(tilt), np.cos(tilt)),
            horizon - np.sin(tilt) / 2,
            99,
            dice.uniform(0.25, 0.9),
            dice.uniform(0.85, 1.1),
        )
        if dice.chance(0.3):  # the table's edge, and what is below it
            region((-np.sin(tilt), np.cos(tilt)), dice.uniform(0.86, 0.97), 99, 0.0, dice.uniform(0.3, 0.8))
    elif dice.chance(0.55):  # a cloth, a board, the edge of a table
        turn = dice.uniform(0, 2 * np.pi)
        normal = np.array([np.cos(turn), np.sin(turn)])
        region(
            normal,
            normal @ (0.5, 0.5) + dice.uniform(-0.3, 0.25),
            99 if dice.chance(0.6) else dice.uniform(0.15, 0.5),
            0.0,
            1.0,
        )
    return np.stack(out)


def _frame(dice: Dice, standing: bool) -> np.ndarray:
    f = np.zeros((), FRAME)
    turn = dice.uniform(-np.pi, 0) if standing or dice.chance(0.7) else dice.uniform(-np.pi, np.pi)  # mostly from above
    elevation = dice.uniform(0.55, 1.15)
    f["light"] = np.cos(turn) * np.cos(elevation), np.sin(turn) * np.cos(elevation), np.sin(elevation)
    f["ambient"] = dice.uniform(0.28, 0.55)
    f["falloff"] = dice.uniform(0.0, 0.5)
    f["dapple"] = dice.uniform(0.15, 0.4) if dice.chance(0.25) else dice.uniform(0, 0.08)
    f["dapple_field"], f["dapple_offset"] = dice.integer(8), dice.uniform(0, 256, 2)
    f["exposure"] = np.exp(dice.normal(0.15, 0.22))
    f["contrast"] = dice.uniform(0.85, 1.2)
    warm = dice.normal(0, 0.07)
    f["white"] = np.exp((warm, dice.normal(0, 0.02), -warm))
    f["vignette"] = dice.uniform(0, 0.35)
    f["blur"] = dice.uniform(0, 0.0018) if dice.chance(0.6) else 0.0  # Gaussian, in sides
    f["noise"] = dice.uniform(0.002, 0.03)
    return f


def draw(seed: int) -> SceneParams:
    """Parameters of the scene `seed` (a non-negative integer).

    Source: ours.
    """
    dice = Dice(seed)
    standing = dice.chance(0.5)
    horizon = dice.uniform(0.2, 0.6)
    palette = [dice.integer(len(SRGB)) for _ in range(3 + dice.integer(6))]
    frame = _frame(dice, standing)
    regions = _regions(dice, palette, standing, horizon)

    count = int(np.clip(np.exp(dice.normal(2.85, 0.5)), 6, 48))
    middle = 0.06 * (18 / count) ** 0.3
    radii = np.clip(np.exp(dice.normal(np.log(middle), 0.6, count)), 0.0085, 0.24)
    anchors = dice.integer(4)
    radii[:anchors] = dice.uniform(0.11, 0.27, min(anchors, count))
    crumbs = 4 + dice.integer(14) if dice.chance(0.4) else 0  # beans, buttons, coins
    radii = np.concatenate([radii, dice.uniform(0.0085, 0.022, crumbs)])
    count += crumbs

    gathered = dice.chance(0.4)
    centre, spread = dice.uniform(0.3, 0.7, 2), dice.uniform(0.12, 0.3)
    things: list[np.ndarray] = []
    keys = []
    for i in range(count):
        small = radii[i] < 0.025
        if things and dice.chance(0.55 if small else 0.3):
            o = _like(dice, things[-1] if dice.chance(0.7) else things[dice.integer(len(things))])
            r = radii[i] if small else things[-1]["radius"] * np.exp(dice.normal(0, 0.12))
        else:
            o, r = _thing(dice, palette, standing, small), radii[i]
        x, y = centre + dice.normal(0, spread, 2) if gathered else dice.uniform(-0.02, 1.02, 2)
        turned = dice.uniform(0, 2 * np.pi)
        if standing:
            base = horizon + (1.04 - horizon) * (
                np.clip((y - 0.1) / 0.8, 0, 1) if gathered else dice.uniform(0.06, 1.0)
            )
            r = r * (0.7 + 0.5 * (base - horizon) / (1.04 - horizon))
            rooted = SHAPES[o["shape"]] in ("lathe", "box", "superellipse", "blob", "ellipse") and not small
            foot = _foot(o) if rooted else 0.5
            y = base - foot * r
            o["upright"], o["foot"], o["angle"] = rooted, foot, dice.normal(0, 0.05) if rooted else turned
            keys.append(base - 0.15 * r)
        else:
            o["angle"] = turned if dice.chance(0.75) else dice.normal(0, 0.1)
            keys.append(-r + dice.normal(0, 0.06))
        o["radius"], o["x"], o["y"] = r, x, y
        o["shadow"] = dice.uniform(0.3, 0.75)
        o["shadow_shift"] = r * dice.uniform(0.12, 0.6) * o["bulge"]
        o["shadow_soft"] = o["shadow_shift"] * dice.uniform(0.35, 1.0) + 0.002
        things.append(o)
    objects = np.stack([things[i] for i in np.argsort(keys, kind="stable")])
    parts = [p for i, o in enumerate(objects) for p in _parts_of(dice, i, o, palette)]
    return SceneParams(seed, frame, regions, objects, np.stack(parts) if parts else np.zeros(0, PART))
