"""The random draws of a scene, its natural colours and its textures. Source: ours."""

from __future__ import annotations

import numpy as np

from ._layout import N_FIELDS, PATTERNS, TEXTURE

# Surfaces as photographs show them: fruit, clay, leaf, cloth, wood, stone, metal, china, paper.
_HEX = """
    b23a30 92282c cc603c d68a3e e2b250 e8d078 c8a83c
    a09646 70863e 4e6838 344e34 608062 8ca484 608c8c
    3c6070 486896 2e3e62 6e80a0 96acbe 685478 583048
    965c6e ce9e96 debaa0 a86246 965034 7a4a2e 5c3a28
    3e2c24 b88c60 c8a47a d8c4a4 e8deca f0ece2 ceccc6
    a8a6a2 808082 5c5e62 3c3e42 242428 8c8270 706854
    b0a48c be7864
"""
SRGB = np.array([tuple(bytes.fromhex(colour)) for colour in _HEX.split()], np.float64) / 255
GROUNDS = [6, 12, 18, 24, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 40, 41, 42, 17, 10, 14, 16]


class Dice:
    """A generator reduced to the two draws whose streams we rely on."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([0x5CE9E, seed])))

    def uniform(self, low: float = 0.0, high: float = 1.0, size=None):
        return low + (high - low) * self._rng.random(size)

    def normal(self, mean: float = 0.0, sd: float = 1.0, size=None):
        return mean + sd * self._rng.standard_normal(size)

    def integer(self, n: int) -> int:
        return min(int(self._rng.random() * n), n - 1)

    def chance(self, p: float) -> bool:
        return bool(self._rng.random() < p)

    def pick(self, names: tuple[str, ...], weights: dict[str, float]) -> int:
        w = np.cumsum([weights.get(name, 0.0) for name in names])
        return int(np.searchsorted(w, self._rng.random() * w[-1], side="right"))


def surface_colour(dice: Dice, index: int, spread: float = 1.0) -> np.ndarray:
    """A palette colour, varied in lightness and saturation; linear light, between black velvet and white paper."""
    linear = SRGB[index] ** 2.2
    linear = linear * np.exp(dice.normal(0, 0.25 * spread)) * np.exp(dice.normal(0, 0.08 * spread, 3))
    grey = linear @ (0.2126, 0.7152, 0.0722)
    return np.clip(grey + (linear - grey) * dice.uniform(0.55, 1.08), 0.012, 0.86)


def _second_colour(dice: Dice, first: np.ndarray, palette: list[int]) -> np.ndarray:
    kind = dice.uniform()
    if kind < 0.5:  # the same stuff, lighter or darker
        return np.clip(first * np.exp(dice.normal(0, 0.6)) * np.exp(dice.normal(0, 0.1, 3)), 0.012, 0.86)
    if kind < 0.75:
        return surface_colour(dice, GROUNDS[dice.integer(len(GROUNDS))])
    return surface_colour(dice, palette[dice.integer(len(palette))])


OBJECT_PATTERNS = {
    "plain": 3.2,
    "stripes": 0.9,
    "checker": 0.3,
    "clouds": 1.6,
    "veins": 1.2,
    "dots": 0.6,
    "gradient": 1.0,
    "patches": 1.0,
    "plaid": 0.4,
    "rings": 0.4,
}
GROUND_PATTERNS = {
    "plain": 2.0,
    "stripes": 0.5,
    "checker": 0.4,
    "clouds": 2.2,
    "veins": 1.8,
    "dots": 0.3,
    "gradient": 0.5,
    "patches": 0.8,
    "plaid": 0.5,
}


def texture(
    dice: Dice, first: np.ndarray, palette: list[int], patterns: dict[str, float], busy: float = 1.0
) -> np.ndarray:
    t = np.zeros((), TEXTURE)
    t["pattern"] = dice.pick(PATTERNS, patterns)
    t["frequency"] = np.exp(dice.uniform(np.log(1.2), np.log(7.0))) * busy
    t["angle"] = dice.uniform(0, 2 * np.pi) if dice.chance(0.5) else dice.integer(2) * np.pi / 2
    t["field"] = dice.integer(N_FIELDS)
    t["offset"] = dice.uniform(0, 256, 2)
    t["grain_size"] = np.exp(dice.uniform(np.log(15), np.log(90))) * busy
    t["warp"] = dice.uniform(0.1, 0.6)
    t["sharpness"] = np.exp(dice.uniform(np.log(1.0), np.log(8.0)))
    t["mottle"] = dice.uniform(0.02, 0.22)
    t["grain"] = dice.uniform(0.0, 0.12)
    second = _second_colour(dice, first, palette)
    t["colours"] = np.stack([first, second, _second_colour(dice, first, palette)])
    return t
