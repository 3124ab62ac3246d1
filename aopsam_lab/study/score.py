"""One image and one setting -> a row of scores, as JSON can hold it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from aopsam_lab.data.sample import Sample
from aopsam_lab.evaluator import iou_matrix, score_matrix
from aopsam_lab.pipeline.decode import Encoded, encode
from aopsam_lab.pipeline.decode_cache import DecodeCache, PcmCache
from aopsam_lab.pipeline.loose_cache import LooseCache, LooseRun
from aopsam_lab.pipeline.run import run_method
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.recall import MAX_MASKS, covered, recall_matches
from aopsam_lab.study.settings import GRIDS, LoadedModels, Pair, Setting

TIMES = {"encode_s": "encode", "inf_lat_s": "infer", "mask_lat_s": "mask", "total_s": "total"}
Row = dict[str, Any]


def score(
    models: LoadedModels,
    sample: Sample,
    setting: Setting,
    found_masks: list[dict] | None = None,
    encoded: Encoded | None = None,
) -> Row:
    """Run one setting alone on an image.

    Args:
        models: what the method needs.
        sample: the image and its ground truth.
        setting: the method, its parameters and its limit of prompts.
        found_masks: COCO RLE of the masks that a SAM itself found; None: not at hand.
        encoded: the image as `encode` returns it; None: it is encoded here.

    Returns:
        `mask_scores`, the counts of prompts n_sampled, n_decoded and n_eliminated, and the times
        encode_s, inf_lat_s, mask_lat_s and total_s in seconds.
    """
    encoded = encode(models.sam, sample.image) if encoded is None else encoded
    result = run(models, encoded, setting)
    return row_values(result, sample.rles, found_masks) | times(result)


def score_together(
    models: LoadedModels,
    sample: Sample,
    settings: Sequence[Setting],
    pairs: Sequence[Pair] = (),
    found_masks: list[dict] | None = None,
) -> Iterator[tuple[Setting, Row, dict[str, Any]]]:
    """Run settings on an image; its embedding, its PCM and every prompt are computed once for all.

    Args:
        models, sample, found_masks: as `score`.
        settings: all different.
        pairs: thresholds at which masks are filtered as well, strictest first; may be empty.

    Yields:
        A setting; its row, as `score` returns it but without times, and where there are pairs with
        `curve`: the `mask_scores` at each pair; and its `detail`. Settings without a limit of
        prompts come first.
    """
    encoded = encode(models.sam, sample.image)
    predictor = models.predictor and PcmCache(models.predictor, encoded)
    if pairs:
        loosest = tuple(min(values) for values in zip(*pairs))
        cache = LooseCache(models.sam, encoded, loosest)
    else:
        cache = DecodeCache(models.sam, encoded)
    unlimited: dict[tuple, tuple[Row, dict]] = {}
    for setting in sorted(settings, key=lambda setting: setting.max_prompts is not None):
        which = (setting.method, setting.params)
        row, shown = unlimited.get(which, (None, None))
        # a limit that is not reached changes nothing
        if row is None or row["n_decoded"] > setting.max_prompts:
            decode = LooseRun(cache) if pairs else cache
            result = run(models, encoded, setting, decode=decode, predictor=predictor)
            row, shown = row_values(result, sample.rles, found_masks), detail(result)
            if pairs:
                row["curve"] = [
                    {"thresholds": pair, **mask_scores(sample.rles, kept, found_masks)}
                    for pair, kept in zip(pairs, decode.masks_at(pairs))
                ]
        if setting.max_prompts is None:
            unlimited[which] = row, shown
        yield setting, row, shown


def run(models: LoadedModels, encoded: Encoded, setting: Setting, **shared: Any) -> Segmentation:
    """Run one setting on an encoded image.

    Args:
        models, encoded, setting: as `score`.
        **shared: caches for `run_method` in the place of what they remember.
    """
    return run_method(
        models.sam,
        encoded,
        GRIDS.get(setting.method, setting.method),
        params=setting.params,
        max_prompts=setting.max_prompts,
        **{"predictor": models.predictor, "detector": models.detector, **shared},
    )


def row_values(result: Segmentation, truth: list[dict], found_masks: list[dict] | None) -> Row:
    """`mask_scores` of a result with its counts of prompts."""
    counts = ("n_sampled", "n_decoded", "n_eliminated")
    return {
        **mask_scores(truth, result.masks, found_masks),
        **{name: int(getattr(result, name)) for name in counts},
    }


def times(result: Segmentation) -> Row:
    """The seconds of a result, by the names of a row."""
    return {name: float(result.seconds[stage]) for name, stage in TIMES.items()}


def mask_scores(truth: list[dict], masks: list[dict], found_masks: list[dict] | None) -> Row:
    """Scores of one image's masks.

    Args:
        truth: COCO RLE of the ground truth.
        masks: COCO RLE, by predicted IoU, highest first.
        found_masks: COCO RLE of the masks that a SAM itself found, or None.

    Returns:
        miou, miou_best: None without ground truth, as JSON has no NaN. n_truth: masks of the ground
        truth; n_masks. matched_100, matched_1000: ten counts each, see `recall_matches`. n_found,
        n_covered: how many found masks there are, and how many of them the masks cover.
    """
    iou = iou_matrix(truth, masks)
    matched = score_matrix(iou)
    values = {
        "miou": matched.miou if truth else None,
        "miou_best": matched.miou_best if truth else None,
        "n_truth": len(truth),
        "n_masks": len(masks),
    }
    for most, matches in zip(MAX_MASKS, recall_matches(iou).tolist()):
        values[f"matched_{most}"] = matches
    if found_masks is not None:
        values["n_found"] = len(found_masks)
        values["n_covered"] = covered(iou_matrix(found_masks, masks))
    return values


def masks_fingerprint(masks: list[dict]) -> str:
    """A hash of COCO RLE."""
    digest = hashlib.sha256()
    for rle in masks:
        digest.update(b"|" + str(tuple(rle["size"])).encode() + rle["counts"])
    return digest.hexdigest()


def detail(result: Segmentation) -> dict[str, Any]:
    """Masks and prompts of a result, to be shown."""
    prompts = result.prompts
    return {
        "size": list(result.image.shape[:2]),
        "masks": [mask["counts"].decode("ascii") for mask in result.masks],
        "prompts": [
            [round(float(x), 2), round(float(y), 2), str(status)]
            for x, y, status in zip(prompts["x"], prompts["y"], prompts["status"])
        ],
    }
