"""What a study stores of one image and method, as JSON can hold it."""

from __future__ import annotations

import hashlib
from typing import Any

from aopsam_lab.evaluator import MAX_MASKS, covered, iou_matrix, recall_matches, score_matrix
from aopsam_lab.pipeline.segmentation import Segmentation

TIMES = ("encode_s", "inf_lat_s", "mask_lat_s", "total_s")


def mask_scores(truths: list[dict], masks: list[dict], found: list[dict] | None) -> dict[str, Any]:
    """Scores of one image's masks.

    Args:
        truths: COCO RLE of the ground truth.
        masks: COCO RLE, by predicted IoU, highest first.
        found: COCO RLE of the masks that a SAM itself found, or None where they are not at hand.

    Returns:
        miou, miou_best: None without ground truth, as JSON has no NaN. n_truth, n_masks.
        matched_100, matched_1000: ten counts each, see `recall_matches`. n_found, n_covered: where
        found masks are at hand, how many, and how many of them the masks cover.
    """
    iou = iou_matrix(truths, masks)
    score = score_matrix(iou)
    values = {
        "miou": score.miou if score.n_truth else None,
        "miou_best": score.miou_best if score.n_truth else None,
        "n_truth": score.n_truth,
        "n_masks": len(masks),
    }
    for most, matches in zip(MAX_MASKS, recall_matches(iou).tolist()):
        values[f"matched_{most}"] = matches
    if found is not None:
        values |= {"n_found": len(found), "n_covered": covered(iou_matrix(found, masks))}
    return values


def row_values(
    found: Segmentation, truths: list[dict], sam_masks: list[dict] | None
) -> dict[str, Any]:
    """`mask_scores` of a result, with its counts of prompts and its times."""
    seconds = {"encode_s": "encode", "inf_lat_s": "infer", "mask_lat_s": "mask", "total_s": "total"}
    return {
        **mask_scores(truths, found.masks, sam_masks),
        "n_sampled": int(found.n_sampled),
        "n_decoded": int(found.n_decoded),
        "n_eliminated": int(found.n_eliminated),
        **{name: float(found.seconds[stage]) for name, stage in seconds.items()},
    }


def masks_fingerprint(masks: list[dict]) -> str:
    """A hash of COCO RLE."""
    digest = hashlib.sha256()
    for rle in masks:
        digest.update(b"|" + str(tuple(rle["size"])).encode() + rle["counts"])
    return digest.hexdigest()


def detail(found: Segmentation) -> dict[str, Any]:
    """Masks and prompts of one image and method, to be shown."""
    prompts = found.prompts
    return {
        "size": list(found.image.shape[:2]),
        "masks": [mask["counts"].decode("ascii") for mask in found.masks],
        "prompts": [
            [round(float(x), 2), round(float(y), 2), str(status)]
            for x, y, status in zip(prompts["x"], prompts["y"], prompts["status"])
        ],
    }
