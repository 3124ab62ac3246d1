"""Masks to look at: colours, label images, overlays."""

import colorsys
import io
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageColor
from pycocotools import mask as coco_mask

# Okabe and Ito's colours (2008), told apart with every common kind of colour vision, less black.
OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


def mask_colours(n: int) -> np.ndarray:
    """Colours (n, 3) uint8 RGB: Okabe and Ito's, the same lighter, then darker, then again."""
    colours = []
    for change in (0.0, 0.18, -0.16):
        for code in OKABE_ITO:
            rgb = (value / 255 for value in ImageColor.getrgb(code))
            hue, light, saturation = colorsys.rgb_to_hls(*rgb)
            light = min(max(light + change, 0.15), 0.9)
            colours.append(colorsys.hls_to_rgb(hue, light, saturation))
    table = np.round(np.array(colours) * 255).astype(np.uint8)
    return table[np.arange(n) % len(table)]


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


def overlay(image: np.ndarray, masks: Sequence[dict], alpha: float = 0.45) -> np.ndarray:
    """Draw COCO RLE over their image (H, W, 3) uint8, coloured with opacity `alpha`, outlined."""
    table = np.concatenate([np.zeros((1, 3), np.uint8), mask_colours(len(masks))])
    labels = label_image(masks, image.shape[:2])
    drawn, covered = image.copy(), labels > 0
    drawn[covered] = cv2.addWeighted(image, 1 - alpha, table[labels], alpha, 0)[covered]
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
