"""One image and one setting -> a row of scores, as JSON can hold it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from segment_anything.modeling import Sam

from aopsam_lab import evaluator
from aopsam_lab.data.sample import Sample
from aopsam_lab.pipeline.decode import encode
from aopsam_lab.pipeline.decode_cache import DecodeCache, LooseRun, PcmCache
from aopsam_lab.pipeline.run import run_method
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.types import Encoded, MaskParams
from aopsam_lab.sam.zoo import spec_of
from aopsam_lab.study.settings import METHODS, LoadedModels, Pair, Setting

TIMES = {"encode_s": "encode", "inf_lat_s": "infer", "mask_lat_s": "mask", "total_s": "total"}
COUNTS = ("n_sampled", "n_decoded", "n_eliminated")
PAIR = ("pred_iou_thresh", "stability_score_thresh")
Row = dict[str, Any]


def score(
    models: LoadedModels, sample: Sample, setting: Setting, encoded: Encoded | None = None
) -> Row:
    """Run one setting alone on an image: `mask_scores`, COUNTS of prompts, TIMES in seconds.

    `encoded` is the image as `encode` returns it; None: it is encoded here.
    """
    result = run(models, encoded or encode(models.sam, sample.image), setting)
    times = {name: float(result.seconds[stage]) for name, stage in TIMES.items()}
    return mask_scores(sample.rles, result.masks) | _counts(result) | times


def score_together(
    models: LoadedModels,
    sample: Sample,
    settings: Sequence[Setting],
    pairs: Sequence[Pair] = (),
    found_masks: list[dict] | None = None,
    shown: bool = False,
) -> Iterator[tuple[Setting, Row]]:
    """Run settings on an image; its embedding, its PCM and every prompt are computed once for all.

    Yields each with its row as `score` returns it, without times; `curve`: the `mask_scores` at
    each of the pairs of thresholds; `detail`, if it is to be `shown`: masks and prompts.
    """
    encoded = encode(models.sam, sample.image)
    predictor = models.predictor and PcmCache(models.predictor, encoded)
    quality = settings[0].quality  # a study has one
    own = own_pair(models.sam, quality)
    iou, stability = zip(own, *pairs, strict=True)
    cache = DecodeCache(models.sam, encoded, (min(iou), min(stability)), quality)
    for setting in settings:
        decode = LooseRun(cache)
        result = run(models, encoded, setting, decode=decode, predictor=predictor)
        row = mask_scores(sample.rles, result.masks, found_masks) | _counts(result)
        at_pairs = decode.masks_at(pairs)
        if result.quality.crop_n_layers and not METHODS[setting.method].needs:  # shares nothing
            at_pairs = []
            for pair in pairs:
                least: dict[str, Any] = dict(zip(PAIR, (max(0.0, x) for x in pair), strict=True))
                looser = replace(setting, quality=replace(quality, **least))
                at_pairs.append(run(models, encoded, looser).masks)
        row["curve"] = [
            dict(zip(PAIR, pair, strict=True))
            | {"own": pair == own, **mask_scores(sample.rles, kept, found_masks)}
            for pair, kept in zip(pairs, at_pairs, strict=True)
        ]
        if shown:
            prompts = result.prompts[["x", "y", "status"]].round(2).to_numpy().tolist()
            masks = [{**rle, "counts": rle["counts"].decode("ascii")} for rle in result.masks]
            row["detail"] = {"masks": masks, "prompts": prompts}
        yield setting, row


def own_pair(sam: Sam, quality: MaskParams) -> Pair:
    """The thresholds that a SAM's masks are filtered with."""
    spec = quality.of(spec_of(sam))
    return spec.pred_iou_thresh, spec.stability_score_thresh


def run(models: LoadedModels, encoded: Encoded, setting: Setting, **shared: Any) -> Segmentation:
    """Run one setting on an encoded image; `shared` are caches for `run_method`."""
    return run_method(
        models.sam,
        encoded,
        METHODS[setting.method],
        params=setting.params,
        max_prompts=setting.max_prompts,
        quality=setting.quality,
        **{"predictor": models.predictor, "detector": models.detector, **shared},
    )


def mask_scores(ground_truth: list[dict], kept: list[dict], found: list[dict] | None = None) -> Row:
    """Score the kept masks of one image, best first, against its ground truth, all COCO RLE.

    What is not defined is None, as JSON has no NaN. coverage, where the masks that a SAM itself
    found are at hand: the share of them that the kept masks find.
    """
    iou = evaluator.iou_matrix(ground_truth, kept)
    matched = evaluator.score_matrix(iou)
    values: Row = {"miou": matched.miou, "miou_best": matched.miou_best}
    for most, counts in zip(evaluator.MAX_MASKS, evaluator.recall_matches(iou), strict=True):
        values[f"ar_{most}"] = evaluator.average_recall(counts.tolist(), len(ground_truth))
    values = {name: value if ground_truth else None for name, value in values.items()}
    if found is not None:
        n_covered = evaluator.covered(evaluator.iou_matrix(found, kept))
        values["coverage"] = n_covered / len(found) if found else None
    return values | {"n_truth": len(ground_truth), "n_masks": len(kept)}


def _counts(result: Segmentation) -> Row:
    return {name: int(getattr(result, name)) for name in COUNTS}
