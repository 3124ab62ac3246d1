"""Photographs made strange, with their masks: those that a network knows by heart become new to it (ours).

Two families that share little, so that what was trained on the one can be fitted or tried on the other.
Pictures are (H, W, 3) uint8 with masks (N, H, W) bool; what comes in from outside is the picture mirrored, without masks, and
masks that leave are gone.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

SCALED = (0.8, 1.6)  # distort: by how much a picture is enlarged
CORNERS = 0.22  # deform: how far a corner moves, of the side
WAVES, WAVE_HEIGHT = (0.04, 0.12), (0.1, 0.45)  # deform: sigma of the waves, of the longest side, and their height, of the sigma
NEGATIVE = 0.3  # deform: of the pictures, turned about their mean colour
COARSE, COARSEST = 0.5, 2.5  # deform: of the pictures, and by how much their resolution is lowered at most
NOISE = 0.04  # deform: sigma at most, of the range


def distort(rng: np.random.Generator, image: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turned by any angle, scaled, channels swapped, blurred, gamma."""
    h, w = masks.shape[1:]
    turn = cv2.getRotationMatrix2D((w / 2, h / 2), rng.uniform(-180, 180), math.exp(rng.uniform(*np.log(SCALED))))
    image = cv2.warpAffine(image, turn, (w, h), borderMode=cv2.BORDER_REFLECT_101)
    warped = [cv2.warpAffine(mask.view(np.uint8) * 255, turn, (w, h)) > 127 for mask in masks]
    masks = np.array(warped, bool).reshape(-1, h, w)
    image = image[..., rng.permutation(3)]
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.5))
    gamma = (np.arange(256) / 255) ** math.exp(rng.uniform(-0.5, 0.5))
    return np.rint(255 * gamma).astype(np.uint8)[image], masks[masks.any((1, 2))]


def deform(rng: np.random.Generator, image: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In perspective and in waves, colours mixed, sometimes negative or coarse, noise."""
    h, w = masks.shape[1:]
    corners = np.float32([[0, 0], [w, 0], [w, h], [0, h]])
    moved = corners + rng.uniform(-CORNERS, CORNERS, (4, 2)).astype(np.float32) * np.float32([w, h])
    ys, xs = np.mgrid[:h, :w].astype(np.float32)
    from_x, from_y, depth = np.tensordot(cv2.getPerspectiveTransform(moved, corners), np.stack([xs, ys, np.ones_like(xs)]), 1)
    sigma = rng.uniform(*WAVES) * max(h, w)
    height = rng.uniform(*WAVE_HEIGHT) * sigma
    waves = [cv2.GaussianBlur(rng.normal(0, 1, (h, w)).astype(np.float32), (0, 0), sigma) for _ in range(2)]
    at = [(part / depth + height * wave / wave.std()).astype(np.float32) for part, wave in zip((from_x, from_y), waves)]
    image = cv2.remap(image, *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    warped = [cv2.remap(mask.view(np.uint8) * 255, *at, cv2.INTER_LINEAR) > 127 for mask in masks]
    masks = np.array(warped, bool).reshape(-1, h, w)
    x = image.astype(np.float32) / 255
    mean = x.mean((0, 1))
    mix = rng.dirichlet([0.6] * 3, 3) + rng.normal(0, 0.25, (3, 3))
    mix /= np.abs(mix.sum(1, keepdims=True)).clip(0.3)
    x = (x - mean) @ mix.T.astype(np.float32) + rng.permutation(mean)
    if rng.random() < NEGATIVE:
        x = 2 * x.mean((0, 1)) - x
    if rng.random() < COARSE:
        by = rng.uniform(1, COARSEST)
        small = cv2.resize(x, (max(8, int(w / by)), max(8, int(h / by))), interpolation=cv2.INTER_AREA)
        x = cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC)
    x = x + rng.normal(0, rng.uniform(0, NOISE), x.shape)
    return np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8), masks[masks.any((1, 2))]
