"""Masks to look at: colours, label images, overlays."""

import colorsys
import io
import zlib
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageColor
from pycocotools import mask as coco_mask

# Okabe and Ito's colours (2008), told apart with every common kind of colour vision, less black.
OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


GREY = (150, 150, 150)  # of a mask that matches none
STRIP = 1 << 22  # pixels coloured at a time, so that a large image is not there five times
MATCH_IOU = 0.5  # from which two masks show the same object


def palette() -> np.ndarray:
    """Colours (21, 3) uint8 RGB: Okabe and Ito's, the same lighter, then darker."""
    colours = []
    for change in (0.0, 0.18, -0.16):
        for code in OKABE_ITO:
            rgb = (value / 255 for value in ImageColor.getrgb(code))
            hue, light, saturation = colorsys.rgb_to_hls(*rgb)
            light = min(max(light + change, 0.15), 0.9)
            colours.append(colorsys.hls_to_rgb(hue, light, saturation))
    return np.round(np.array(colours) * 255).astype(np.uint8)


PALETTE = palette()


def mask_colours(masks: Sequence[dict], known: dict[bytes, int] | None = None) -> np.ndarray:
    """Colours of COCO RLE, (n, 3) uint8 RGB. Each mask's own runs choose; neighbours differ.

    Neighbours are masks whose boxes meet. `known` keeps each mask's row of PALETTE by its counts:
    with the same dictionary a mask keeps its colour, whatever masks come and go.
    """
    if not len(masks):
        return np.zeros((0, 3), np.uint8)
    known = {} if known is None else known
    boxes = coco_mask.toBbox(list(masks)) + np.array([-1, -1, 2, 2])
    meets = coco_mask.iou(boxes, boxes, [False] * len(masks)) > 0
    keys = [mask["counts"] for mask in masks]
    for i in painting_order(masks):
        if keys[i] not in known:
            near = [known[keys[j]] for j in meets[i].nonzero()[0] if keys[j] in known]
            used = np.bincount(np.array(near, int), minlength=len(PALETTE))
            first = zlib.crc32(keys[i]) % len(PALETTE)
            known[keys[i]] = (first + int(np.roll(used, -first).argmin())) % len(PALETTE)
    return PALETTE[[known[key] for key in keys]]


def matched_colours(
    masks: Sequence[dict], others: Sequence[dict], theirs: np.ndarray
) -> np.ndarray:
    """Colours of masks beside others of the colours `theirs`: of the match, or GREY without one.

    Two masks match where each is the other's best by IoU, and it is MATCH_IOU or more.
    """
    colours = np.tile(np.array(GREY, np.uint8), (len(masks), 1))
    if len(masks) and len(others):
        iou = np.array(coco_mask.iou(list(masks), list(others), [False] * len(others)))
        best, back = iou.argmax(1), iou.argmax(0)
        rows = np.arange(len(masks))
        is_match = (back[best] == rows) & (iou[rows, best] >= MATCH_IOU)
        colours[is_match] = theirs[best[is_match]]
    return colours


def label_image(masks: Sequence[dict], size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint16: i + 1 where COCO RLE i is on top, smaller over larger, earlier over later."""
    if len(masks) > 65535:
        raise ValueError(f"A 16-bit label image holds 65535 masks, not {len(masks)}.")
    labels = np.zeros(size, dtype=np.uint16, order="F")  # as masks decode: columns first
    for i in painting_order(masks):
        pixels, (x, y) = _cut_out(masks[i])
        labels[y : y + pixels.shape[0], x : x + pixels.shape[1]][pixels.view(bool)] = i + 1
    return np.ascontiguousarray(labels)


def painting_order(masks: Sequence[dict]) -> np.ndarray:
    """Indices of COCO RLE from the largest to the smallest, the later first of equal sizes."""
    areas = np.array([coco_mask.area(mask) for mask in masks], dtype=np.int64)
    return np.lexsort((-np.arange(len(areas)), -areas))


def overlay(
    image: np.ndarray,
    masks: Sequence[dict],
    alpha: float = 0.45,
    colours: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """Draw COCO RLE over their image (H, W, 3) uint8, coloured with opacity `alpha`, outlined.

    `colours` (n, 3) uint8 RGB: by default `mask_colours`, as `labels` are those of `label_image`.
    """
    colours = mask_colours(masks) if colours is None else colours
    table = np.concatenate([np.zeros((1, 3), np.uint8), colours])
    labels = label_image(masks, image.shape[:2]) if labels is None else labels
    drawn, parts = image.copy(), 1 + labels.size // STRIP
    for part, own in zip(np.array_split(drawn, parts), np.array_split(labels, parts), strict=True):
        part[own > 0] = cv2.addWeighted(part, 1 - alpha, table[own], alpha, 0)[own > 0]
    width = max(1, round(max(labels.shape) / 700))
    for i in painting_order(masks):
        pixels, corner = _cut_out(masks[i])
        pixels = np.ascontiguousarray(pixels)
        contours, _ = cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=corner)
        cv2.drawContours(drawn, contours, -1, table[i + 1].tolist(), width)
    return drawn


def _cut_out(mask: dict) -> tuple[np.ndarray, tuple[int, int]]:
    """The part of a mask within its box, (h, w) uint8, and that box's corner (x, y)."""
    x, y, width, height = map(int, coco_mask.toBbox(mask))
    return coco_mask.decode(mask)[y : y + height, x : x + width], (x, y)


def png_bytes(pixels: np.ndarray) -> bytes:
    """A PNG of (H, W, 3) uint8, or of (H, W) uint8 or uint16."""
    stream = io.BytesIO()
    # level 3 is as small within a tenth as the default, in half the time
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=3)
    return stream.getvalue()
