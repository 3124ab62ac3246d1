"""Image in, Segmentation out: encode, propose, decode and filter in rounds, remove duplicates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.amg import generate_crop_boxes

from aopsam_lab.asf import AsfParams
from aopsam_lab.data.images import ImageLike, read_image
from aopsam_lab.detector import Detector, load_detector
from aopsam_lab.masks.rle import placed
from aopsam_lab.pipeline.decode import (
    CROP_NMS_THRESH,
    Stopwatch,
    cleaned,
    decode_and_filter,
    distinct,
    encode,
    encode_early,
    remove_duplicates,
)
from aopsam_lab.pipeline.decode_cache import PcmCache
from aopsam_lab.pipeline.methods import Grid, Method, method_named
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.types import Encoded, Found, MaskParams, Models, Prompts, Proposal
from aopsam_lab.predictor import PromptPredictor, load_predictor
from aopsam_lab.sam.zoo import SamSpec, load_sam, resolve_device, spec_of

DEFAULT_PARAMS = AsfParams()
# Prompts whose masks are gathered at a time; on a GPU all of a round, as its batches are large.
DECODED_AT_A_TIME = {"cpu": 64}
CROP_OVERLAP = 512 / 1500  # the generator's: of the shorter side, in the first layer

Decode = Callable[[Sam, Encoded, Prompts, torch.Tensor, SamSpec], Found]
Decoded = list[tuple[int, torch.Tensor, Found]]  # round, prompts, what was found


@torch.inference_mode()
def run_method(
    sam: Sam,
    encoded: Encoded,
    method: str | Method,
    predictor: PromptPredictor | PcmCache | None = None,
    detector: Detector | None = None,
    params: AsfParams = DEFAULT_PARAMS,
    decode: Decode = decode_and_filter,
    max_prompts: int | None = None,
    quality: MaskParams = MaskParams(),
) -> Segmentation:
    """Run one method, by its name in METHODS or of your own, on an image that `encode` encoded.

    `decode` decodes a round of prompts; it may be a DecodeCache. The rest is as for `segment`. What
    `quality` says of grids, points to a side and crops, means nothing to other methods.

    Raises:
        ValueError: no such method, a model that it needs is missing, or max_prompts is not a whole
            number of 1 or more.
    """
    chosen = method_named(method, quality)
    if max_prompts is not None and (max_prompts < 1 or int(max_prompts) != max_prompts):
        limits = "a whole number of 1 or more, or None for no limit"
        raise ValueError(f"max_prompts must be {limits}, not {max_prompts}")
    models = Models(predictor, detector)
    if chosen.needs and getattr(models, chosen.needs) is None:
        advice = f"pass {chosen.needs}=load_{chosen.needs}(...)"
        raise ValueError(f"method {chosen.name!r} needs a {chosen.needs}: {advice}")
    if isinstance(chosen, Grid) and quality.crop_n_layers:
        if max_prompts is not None:
            raise ValueError("max_prompts is for one image: leave it out, or crop_n_layers")
        return _run_on_crops(sam, encoded, chosen, decode, quality)
    spec, watch = quality.of(spec_of(sam)), Stopwatch(encoded.embedding.device)
    if decode is decode_and_filter:  # nothing is shared: its time counts
        encoded.made.clear()
    decoded: Decoded = []
    n_round = 0
    with watch("infer"):
        proposal = chosen.start(encoded, models, params)
        index = proposal.next_round()
    left = len(proposal.prompts) if max_prompts is None else int(max_prompts)
    while index is not None and left:
        with watch("mask"):
            index = strongest(proposal.prompts.confidence, index, left)
            left -= len(index)
        for part in index.split(DECODED_AT_A_TIME.get(index.device.type, len(index))):
            with watch("mask"):
                found = decode(sam, encoded, proposal.prompts, part, spec)
                decoded.append((n_round, part, found))
            with watch("infer"):
                proposal.observe(found, sam.mask_threshold)
            with watch("mask"):
                encode_early(sam, encoded, [found for _, _, found in decoded])
        n_round += 1
        with watch("infer"):
            index = proposal.next_round()
    with watch("mask"):
        result = remove_duplicates(sam, encoded, [found for _, _, found in decoded], quality)
    seconds = {"encode": encoded.seconds, **watch.seconds}
    return Segmentation(
        image=encoded.image,
        **result,
        prompts=_prompt_table(proposal, decoded, result["mask_prompt"], spec.pred_iou_thresh),
        pcm=None if proposal.pcm is None else proposal.pcm.float().cpu().numpy(),
        pems=torch.stack(proposal.pems).float().cpu().numpy() if proposal.pems else None,
        references=pd.DataFrame(proposal.references, columns=["prompt", "threshold"]),
        seconds={**seconds, "total": sum(seconds.values())},
        method=chosen.name,
        params={name: getattr(params, name) for name in chosen.uses},
        quality=quality,
        n_decoded=sum(len(part) for _, part, _ in decoded),
        n_sampled=len(proposal.prompts),
        n_eliminated=int((proposal.eliminated_by >= 0).sum()),
        input_size=encoded.input_size,
        model_size=encoded.model_image.shape[-1],
    )


def _run_on_crops(
    sam: Sam, encoded: Encoded, grid: Grid, decode: Decode, quality: MaskParams
) -> Segmentation:
    """A grid on an image and on its crops, as SamAutomaticMaskGenerator does it."""
    size = encoded.image.shape[:2]
    boxes, _ = generate_crop_boxes(size, quality.crop_n_layers, CROP_OVERLAP)
    alone = replace(quality, points_per_side=None, crop_n_layers=0, min_mask_region_area=0)
    parts = [run_method(sam, encoded, grid, decode=decode, quality=alone)]
    for x0, y0, x1, y1 in boxes[1:]:
        crop = encode(sam, encoded.image[y0:y1, x0:x1])
        crop.crop = [x0, y0, x1, y1], size
        parts.append(run_method(sam, crop, grid, quality=alone))
    prompts = pd.concat([part.prompts.assign(round=n) for n, part in enumerate(parts)])
    prompts[["x", "y"]] += np.array(boxes)[prompts["round"], :2]
    prompts = prompts.reset_index(drop=True)
    fields = ("masks", "scores", "stability", "boxes", "mask_prompt")
    kept = {name: np.concatenate([getattr(part, name) for part in parts]) for name in fields}
    of = np.repeat(range(len(parts)), [len(part.masks) for part in parts])
    x0, y0, x1, y1 = np.array(boxes, np.float32)[of].T
    kept["boxes"] += np.stack([x0, y0, x0, y0], 1)
    kept["mask_prompt"] += of * len(parts[0].prompts)
    # of duplicates the one of the smallest crop stays
    scores = torch.from_numpy(1 / ((x1 - x0) * (y1 - y0)))
    rows = distinct(torch.from_numpy(kept["boxes"]), scores, CROP_NMS_THRESH).numpy()
    for i in rows:
        kept["masks"][i] = placed(kept["masks"][i], boxes[of[i]], size)
    found = cleaned({name: values[rows] for name, values in kept.items()}, quality)
    prompts["status"] = prompts["status"].replace("kept", "duplicate")
    prompts.loc[found["mask_prompt"], "status"] = "kept"
    found |= {"prompts": prompts, "n_decoded": len(prompts), "n_sampled": len(prompts)}
    seconds = {stage: sum(part.seconds[stage] for part in parts) for stage in parts[0].seconds}
    return replace(parts[0], quality=quality, seconds=seconds, **found)


def strongest(confidence: torch.Tensor, index: torch.Tensor, limit: int) -> torch.Tensor:
    """At most `limit` of the prompts `index` (n,) long, the most confident, in their order.

    Where equals compete for the last places, the same draw decides each time: a part of a grid
    still covers the whole image.
    """
    if len(index) <= limit:
        return index
    values = confidence[index]
    weakest = values.sort(descending=True).values[limit - 1]
    chosen = values > weakest
    equals = (values == weakest).nonzero()[:, 0]
    places = limit - int(chosen.sum())
    draw = torch.randperm(len(equals), generator=torch.Generator().manual_seed(0))[:places]
    chosen[equals[draw.to(equals.device)]] = True
    return index[chosen]


def _prompt_table(
    proposal: Proposal, decoded: Decoded, mask_prompt: np.ndarray, pred_iou_thresh: float
) -> pd.DataFrame:
    """One row a prompt: where, how sure, in which round, and what became of it."""
    prompts, by = proposal.prompts, proposal.eliminated_by.cpu().numpy()
    table = pd.DataFrame(prompts.points.double().cpu().numpy(), columns=["x", "y"])
    table["confidence"] = prompts.confidence.cpu().numpy()
    table["by"] = by
    if (by >= 0).any():
        table["pem"] = proposal.pem_value.cpu().numpy()
    round_of = np.full(len(by), -1)
    status = np.where(by >= 0, "eliminated", "not_reached").astype(object)
    for n_round, part, found in decoded:
        rows = part.cpu().numpy()
        round_of[rows] = n_round
        passed = (found.best_iou > pred_iou_thresh).cpu().numpy()
        status[rows] = np.where(passed, "unstable", "low_iou")
        status[found.prompt.cpu().numpy()] = "duplicate"
    status[mask_prompt] = "kept"
    table["round"], table["status"] = round_of, status
    if prompts.boxes is not None:
        table[["x0", "y0", "x1", "y1"]] = prompts.boxes.double().cpu().numpy()
    return table.round(dict.fromkeys(table.columns, 2) | {"confidence": 4, "pem": 4})


def segment(
    image: ImageLike,
    method: str = "aop",
    sam: str | Sam = "mobile_sam",
    predictor: PromptPredictor | None = None,
    detector: Detector | None = None,
    params: AsfParams = DEFAULT_PARAMS,
    device: str | torch.device = "auto",
    max_prompts: int | None = None,
    **quality: float | None,
) -> Segmentation:
    """Segment everything in an image. Models loaded here are kept for the next call.

    Args:
        image: an array, a Pillow image or a path; see `read_image` for the formats.
        method: a name in METHODS.
        sam: a name for `load_sam`, or a `Sam`.
        predictor: for the methods that need one; None: the bundled one.
        detector: for the methods that need one; None: the bundled one.
        params: the ASF parameters.
        device: "auto" (the GPU if there is one), "cpu", "cuda", ...
        max_prompts: how many prompts are decoded at most, strongest first; None: all.
        **quality: fields of MaskParams, which are SamAutomaticMaskGenerator's.
    """
    kept = MaskParams(**quality)  # type: ignore[arg-type]
    pixels, needs = read_image(image), method_named(method).needs
    if needs and (kept.points_per_side or kept.crop_n_layers):
        grids = "points_per_side and crop_n_layers are for grids, such as method='amg_d'"
        raise ValueError(f"{grids}; {method!r} chooses its prompts itself.")
    sam = loaded_sam(sam, device)
    if needs == "predictor":
        predictor = predictor or loaded_predictor(sam)
    elif needs == "detector":
        detector = detector or loaded_detector(sam)
    more: dict[str, Any] = {"params": params, "max_prompts": max_prompts, "quality": kept}
    return run_method(sam, encode(sam, pixels), method, predictor, detector, **more)


def loaded_sam(sam: str | Sam, device: str | torch.device = "auto") -> Sam:
    """A SAM by name, loaded once in this process; a `Sam` as it is."""
    if not isinstance(sam, str):
        return sam
    return _loaded(load_sam, sam, device=str(resolve_device(device)))


def loaded_predictor(sam: Sam) -> PromptPredictor:
    """The bundled Prompt Predictor of a SAM, loaded once in this process."""
    return _loaded(load_predictor, spec_of(sam).name, device=str(sam.device))


def loaded_detector(sam: Sam) -> Detector:
    """The bundled detector, on a SAM's device, loaded once in this process."""
    return _loaded(load_detector, device=str(sam.device))


@cache
def _loaded(load: Callable, *name: str, device: str) -> Any:
    return load(*name, device=device)
