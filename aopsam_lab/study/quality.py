"""Masks from given prompts, and prompts on given masks, at the image's own resolution: for the lessons."""

from __future__ import annotations

import numpy as np
import torch
from segment_anything.modeling import Sam

from aopsam_lab.pipeline.batching import in_batches
from aopsam_lab.pipeline.decode import decode_batch, full_resolution, image_decoder
from aopsam_lab.pipeline.types import Encoded


@torch.inference_mode()
def decode_prompts(
    sam: Sam,
    encoded: Encoded,
    points: np.ndarray | None,
    labels: np.ndarray | None,
    boxes: np.ndarray | None,
    masks: slice,
) -> tuple[np.ndarray, np.ndarray]:
    """Masks (P, M, H, W) bool and predicted IoUs (P, M) of P prompts, each with K points or one box.

    points (P, K, 2) with labels (P, K), 1 foreground, 0 background; or boxes (P, 4). Image frame. masks: which of SAM's four.
    """
    device = encoded.embedding.device
    decoder, batch = image_decoder(sam, encoded), decode_batch(encoded)

    def found_of(index: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        part = index.cpu().numpy()
        if boxes is None:
            at = encoded.to_model(torch.as_tensor(points[part], dtype=torch.float32, device=device))
            prompt = dict(points=(at, torch.as_tensor(labels[part], device=device)), boxes=None)
        else:
            corners = torch.as_tensor(boxes[part], dtype=torch.float32, device=device).unflatten(
                1, (2, 2)
            )
            prompt = dict(points=None, boxes=encoded.to_model(corners).flatten(1))
        sparse = sam.prompt_encoder(**prompt, masks=None)[0]
        decoded = decoder.decode(sparse)
        scores = decoded.iou[:, masks]
        wanted = torch.zeros_like(decoded.iou, dtype=torch.bool)
        wanted[:, masks] = True
        full = full_resolution(sam, encoded, decoded.draw(wanted)) > sam.mask_threshold
        return full.unflatten(0, scores.shape).cpu().numpy(), scores.cpu().numpy()

    index = torch.arange(len(points if boxes is None else boxes), device=device)
    found, iou = zip(*in_batches(index, batch, found_of))
    return np.concatenate(found), np.concatenate(iou)


def ious(found: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """(P, M, H, W) bool against (P, H, W) bool -> (P, M)."""
    found, truth = (
        np.packbits(found.reshape(*found.shape[:2], -1), -1),
        np.packbits(truths.reshape(len(truths), 1, -1), -1),
    )
    both, either = (
        np.bitwise_count(x).sum(-1, dtype=np.int64) for x in (found & truth, found | truth)
    )
    return both / np.maximum(either, 1)


def hit(truths: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(T, H, W) bool and (P, 2) points, image frame -> (T,) bool: is any point on the truth?"""
    if not len(points):
        return np.zeros(len(truths), bool)
    x = np.clip(points[:, 0].astype(int), 0, truths.shape[2] - 1)
    y = np.clip(points[:, 1].astype(int), 0, truths.shape[1] - 1)
    return truths[:, y, x].any(1)
