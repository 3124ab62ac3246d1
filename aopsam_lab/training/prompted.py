"""Pictures with prompts, drawn from training pools: what the tiny SAM learns from (ours).

Random crops in the model frame, flipped and coloured, on some of them pieces of another picture (copy-paste), each with some
masks and a click and a box for every mask. Photographs are few and soon known by heart, and a network that knows its pictures
errs too seldom on them to learn how good its masks are: so a share of theirs is distorted before.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from aopsam_lab.sam.tiny import IMG_SIZE
from aopsam_lab.training.distortions import distort
from aopsam_lab.training.pool import are_scenes, entries, half_size, read_entry, resize_masks

BOX_SHARE = 0.3
LEAST_PIXELS = 12  # of the model frame: a crop's smaller masks are left out
PASTE_SHARE = 0.35  # of the crops: pieces of another picture are laid over these
PASTED, PASTED_AREA = 4, (0.004, 0.3)  # at most so many pieces, each of such a share of the picture
LOOK_AGAIN = 2000  # pictures that a worker draws between two looks at what the pools hold
ZOOMED = 0.5  # of the crops show a part of their picture, the others all of it
HELD_OUT = 10  # one picture of so many is held out, where a training holds some out

Keep = Callable[[Path], bool]
Distortion = Callable[[np.random.Generator, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def is_held_out(path: Path) -> bool:
    """Whether a pool's entry is one to hold out: by its name, so that it stays so while the pool grows."""
    return zlib.crc32(path.stem.encode()) % HELD_OUT == 0


def is_for_training(path: Path) -> bool:
    """Whether a pool's entry is trained on where some are held out."""
    return not is_held_out(path)


class PromptedPictures(IterableDataset):
    """Endless random crops with prompts, on some of them pieces of another picture (copy-paste).

    Pools may grow meanwhile: what they hold is looked up again now and then. Yields ``image`` (3, S, S) uint8 in the model
    frame, ``size`` (h, w) of its unpadded part, ``masks`` (P, S, S) bool, ``points`` (P, 2) and ``boxes`` (P, 4) in the model
    frame. The last ``round(P * BOX_SHARE)`` prompts are meant to be boxes, the others clicks.

    keep: which of the pools' entries to draw from; None: all. Raises ValueError for a pool of which it leaves nothing.
    distorted: share of the photographs to distort, by ``distortion`` (see `training.distortions`).
    """

    def __init__(
        self,
        pools: list[tuple[float, list[Path]]],
        prompts: int,
        seed: int | list[int],
        keep: Keep | None = None,
        distorted: float = 0.0,
        distortion: Distortion = distort,
    ):
        self.prompts, self.seed, self.keep, self.distorted, self.distortion = prompts, seed, keep, distorted, distortion
        self.pools = [(share, list(filter(keep, paths))) for share, paths in pools]
        self.shares = np.array([share for share, _ in pools]) / sum(share for share, _ in pools)
        for (_, kept), (_, paths) in zip(self.pools, pools):
            if not kept:
                raise ValueError(f"{paths[0].parent} holds too few pictures ({len(paths)}) to hold some out: make more, or hold out none.")

    def __iter__(self):
        cv2.setNumThreads(1)
        worker = get_worker_info()
        rng = np.random.default_rng([*np.atleast_1d(self.seed), worker.id if worker else 0])
        pools = [paths for _, paths in self.pools]
        for drawn in itertools.count(1):
            sample = self._draw(rng, pools)
            if sample is not None:
                yield sample
            if drawn % LOOK_AGAIN == 0:
                pools = [list(filter(self.keep, entries(paths[0].parent))) for paths in pools]

    def _draw(self, rng: np.random.Generator, pools: list[list[Path]]) -> dict[str, np.ndarray] | None:
        def crop_of(pool: int) -> tuple[np.ndarray, np.ndarray]:
            image, masks = read_entry(pools[pool][rng.integers(len(pools[pool]))])
            if self.distorted and not are_scenes(pools[pool]) and rng.random() < self.distorted:
                image, masks = self.distortion(rng, image, masks)
            return random_crop(rng, image, masks)

        image, masks = crop_of(rng.choice(len(pools), p=self.shares))
        if rng.random() < PASTE_SHARE:
            image, masks = paste(rng, image, masks, *crop_of(rng.integers(len(pools))))  # photographs are few: from each pool as often
        masks = teaching(masks)
        if not len(masks):
            return None
        chosen = masks[choose(rng, len(masks), self.prompts)]
        points = np.stack([click(rng, mask) for mask in chosen])
        boxes = np.stack([jittered_box(rng, mask) for mask in chosen])
        canvas = np.zeros((3, IMG_SIZE, IMG_SIZE), np.uint8)
        targets = np.zeros((self.prompts, IMG_SIZE, IMG_SIZE), bool)
        canvas[:, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
        targets[:, : chosen.shape[1], : chosen.shape[2]] = chosen
        size = np.array(image.shape[:2])
        return dict(image=canvas, size=size, masks=targets, points=points.astype(np.float32), boxes=boxes.astype(np.float32))


def choose(rng: np.random.Generator, available: int, wanted: int) -> np.ndarray:
    """``wanted`` indices below ``available``, each as often as any other, or nearly."""
    rounds = -(-wanted // available)
    return np.concatenate([rng.permutation(available) for _ in range(rounds)])[:wanted]


def teaching(masks: np.ndarray) -> np.ndarray:
    """Those of a crop's masks (N, h, w) that a network can learn from: ``LEAST_PIXELS``, and something left at half the size."""
    large = [np.count_nonzero(mask) >= LEAST_PIXELS for mask in masks]
    return masks[half_size(masks).any((1, 2)) & np.array(large, bool)]


def random_crop(
    rng: np.random.Generator, image: np.ndarray, masks: np.ndarray, zoomed: float = ZOOMED
) -> tuple[np.ndarray, np.ndarray]:
    """Crop, flip and colour a picture (H, W, 3) and its masks (N, H, W); longest side becomes S, both sides even.

    zoomed: how often a part of the picture is taken, not all of it.
    """
    h, w = masks.shape[1:]
    y, x, high, wide = 0, 0, h, w
    if rng.random() < zoomed:
        scale = rng.uniform(0.4, 1.0)
        aspect = math.exp(rng.normal(0, 0.15))
        high = int(np.clip(h * scale * aspect, 48, h))
        wide = int(np.clip(w * scale / aspect, 48, w))
        y, x = rng.integers(h - high + 1), rng.integers(w - wide + 1)
    image = image[y : y + high, x : x + wide]
    masks = masks[:, y : y + high, x : x + wide]
    masks = masks[masks.any((1, 2))]
    if rng.random() < 0.5:
        image, masks = image[:, ::-1], masks[:, :, ::-1]
    if rng.random() < 0.15:
        image, masks = image[::-1], masks[:, ::-1]
    if rng.random() < 0.15:
        image, masks = image.transpose(1, 0, 2), masks.transpose(0, 2, 1)
    scale = IMG_SIZE / max(image.shape[:2])
    size = tuple(max(2, 2 * round(side * scale / 2)) for side in image.shape[1::-1])
    image = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    return recolour(rng, image), resize_masks(masks, size)


def paste(
    rng: np.random.Generator, image: np.ndarray, masks: np.ndarray, other: np.ndarray, pieces: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lay up to ``PASTED`` of another picture's masked regions over this one, where they lie in theirs, seams softened.

    Pictures (h, w, 3) uint8 and masks (N, h, w) bool, the other's of a size of their own. What the pieces cover is no longer
    visible: masks give way, and the pieces have masks of their own.
    """
    h, w = (min(a, b) for a, b in zip(masks.shape[1:], pieces.shape[1:]))
    pieces = pieces[:, :h, :w]
    share = pieces.mean((1, 2))
    fitting = np.flatnonzero((share > PASTED_AREA[0]) & (share < PASTED_AREA[1]))
    image, masks = image.copy(), list(masks.copy())
    for k in rng.permutation(fitting)[: rng.integers(1, PASTED + 1)]:
        soft = cv2.GaussianBlur(pieces[k].astype(np.float32), (0, 0), 0.7)
        under = image[:h, :w].astype(np.float32)
        image[:h, :w] = np.rint(under + (other[:h, :w] - under) * soft[..., None])
        for mask in masks:
            mask[:h, :w] &= ~pieces[k]
        new = np.zeros(image.shape[:2], bool)
        new[:h, :w] = pieces[k]
        masks.append(new)
    return image, np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool)


def recolour(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Brightness, contrast, white balance, sometimes grey or noise; uint8 in, uint8 out."""
    if rng.random() < 0.25:
        return image
    x = image.astype(np.float32)
    x = (x - 128) * rng.uniform(0.7, 1.25) + 128
    x = x * rng.uniform(0.88, 1.12, 3).astype(np.float32) + rng.uniform(-25, 25)
    if rng.random() < 0.12:
        x = np.repeat(x.mean(2, keepdims=True), 3, 2)
    if rng.random() < 0.15:
        x = x + rng.normal(0, rng.uniform(2, 10), x.shape).astype(np.float32)
    return np.clip(x, 0, 255).astype(np.uint8)


def click(rng: np.random.Generator, mask: np.ndarray) -> tuple[float, float]:
    """A point (x, y), model frame, inside the mask: its pole half of the time, else anywhere but less at the edge."""
    x, y, wide, high = cv2.boundingRect(mask.view(np.uint8))  # most masks are small
    part = mask[y : y + high, x : x + wide]
    distance = cv2.distanceTransform(np.pad(part.view(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    ys, xs = np.nonzero(part)
    weights = distance[ys, xs]
    if rng.random() < 0.5:
        i = int(np.argmax(weights + rng.random(len(weights)) * 0.5))
    else:
        weights = np.sqrt(weights)
        i = rng.choice(len(weights), p=weights / weights.sum())
    return x + xs[i] + rng.random(), y + ys[i] + rng.random()


def jittered_box(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """The mask's box (x0, y0, x1, y1), model frame, each side moved by 5% of the box's, at most 20 pixels (as SAM)."""
    x, y, wide, high = cv2.boundingRect(mask.view(np.uint8))
    box = np.array([x, y, x + wide, y + high])
    noise = rng.normal(0, 0.05, 4) * [wide, high, wide, high]
    return np.clip(box + np.clip(noise, -20, 20), 0, IMG_SIZE)
