"""Picture in, :class:`Segmentation` out: encode, propose, decode and filter in rounds, remove duplicates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from segment_anything.modeling import Sam

from aopsam_lab.asf import AsfParams
from aopsam_lab.pipeline.decode import (
    Encoded,
    Found,
    Stopwatch,
    decode_and_filter,
    encode,
    encode_early,
    remove_duplicates,
)
from aopsam_lab.data.images import read_image
from aopsam_lab.pipeline.methods import Method, Models, Prompts, Proposal, method_named
from aopsam_lab.sam.zoo import SamSpec, load_sam, resolve_device, spec_of
from aopsam_lab.pipeline.segmentation import Segmentation

if TYPE_CHECKING:
    from aopsam_lab.detector import Detector
    from aopsam_lab.predictor import PromptPredictor

# prompts whose masks are gathered at a time; what passes is there twice meanwhile. On a GPU all of a round: batches are large
DECODED_AT_A_TIME = {"cpu": 64}

Decode = Callable[[Sam, Encoded, Prompts, torch.Tensor, SamSpec], Found]


@torch.inference_mode()
def run_method(
    sam: Sam,
    encoded: Encoded,
    method: str | Method,
    predictor: PromptPredictor | None = None,
    detector: Detector | None = None,
    params: AsfParams = AsfParams(),
    decode: Decode = decode_and_filter,
    max_prompts: int | None = None,
) -> Segmentation:
    """One method on an encoded picture.

    method:      a name in METHODS, or a method of your own making.
    decode:      what decodes and filters a round; a :class:`aopsam_lab.pipeline.decode_cache.DecodeCache` remembers earlier
                 settings.
    max_prompts: how many prompts may be decoded at most, strongest first (see :func:`strongest`); None: all. Prompts
                 for which nothing was left have the status ``not_reached``.
    Raises ValueError for an unknown method, a missing model of its, and a max_prompts below 1.
    """
    chosen = method_named(method)
    if max_prompts is not None and (max_prompts < 1 or int(max_prompts) != max_prompts):
        raise ValueError(
            f"max_prompts must be a whole number of 1 or more, or None for no limit, not {max_prompts}"
        )
    left = float("inf") if max_prompts is None else int(max_prompts)
    models = Models(predictor, detector)
    if chosen.needs and getattr(models, chosen.needs) is None:
        raise ValueError(
            f"method {chosen.name!r} needs a {chosen.needs}: pass {chosen.needs}=load_{chosen.needs}(...)"
        )
    spec = spec_of(sam)
    watch = Stopwatch(encoded.embedding.device)
    if decode is decode_and_filter:  # a run that shares nothing makes its own, and takes its time
        encoded.made.clear()
    rounds: list[list[tuple[torch.Tensor, Found]]] = []
    with watch("infer"):
        proposal = chosen.start(encoded, models, params)
        index = proposal.next_round()
    while index is not None and left:
        with watch("mask"):
            index = strongest(proposal.prompts.confidence, index, left)
            left -= len(index)
        rounds.append([])
        for part in index.split(DECODED_AT_A_TIME.get(index.device.type, len(index))):
            with watch("mask"):
                found = decode(sam, encoded, proposal.prompts, part, spec)
                rounds[-1].append((part, found))
            with watch("infer"):
                proposal.observe(found, sam.mask_threshold)
            with watch("mask"):
                encode_early(sam, encoded, [found for parts in rounds for _, found in parts])
        with watch("infer"):
            index = proposal.next_round()
    with watch("mask"):
        result = remove_duplicates(sam, encoded, [found for parts in rounds for _, found in parts])
    seconds = {
        "encode": encoded.seconds,
        "infer": watch.seconds["infer"],
        "mask": watch.seconds["mask"],
    }
    seconds["total"] = sum(seconds.values())
    table = _prompt_table(proposal, rounds, result["mask_prompt"], spec.pred_iou_thresh)
    eliminated = proposal.eliminated_by >= 0
    return Segmentation(
        image=encoded.image,
        **result,
        prompts=table,
        pcm=None if proposal.pcm is None else proposal.pcm.float().cpu().numpy(),
        pems=torch.stack(proposal.pems).float().cpu().numpy() if proposal.pems else None,
        references=pd.DataFrame(proposal.references, columns=["prompt", "threshold"]),
        seconds=seconds,
        method=chosen.name,
        params={name: getattr(params, name) for name in chosen.uses},
        n_decoded=sum(len(index) for parts in rounds for index, _ in parts),
        n_sampled=len(proposal.prompts),
        n_eliminated=int(eliminated.sum()),
        input_size=tuple(encoded.input_size),
        model_size=encoded.model_image.shape[-1],
    )


def strongest(confidence: torch.Tensor, index: torch.Tensor, limit: float) -> torch.Tensor:
    """At most ``limit`` of the prompts ``index`` (long, into ``confidence``), the most confident ones, in their order.

    Where equals compete for the last places a draw decides, always the same: a part of a grid still covers the whole
    picture.
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
    proposal: Proposal,
    rounds: list[list[tuple[torch.Tensor, Found]]],
    mask_prompt: np.ndarray,
    pred_iou_thresh: float,
) -> pd.DataFrame:
    """One row a prompt: where, how sure, in which round, and what became of it."""
    prompts = proposal.prompts
    m = len(prompts)
    table = pd.DataFrame(prompts.points.cpu().numpy().astype(np.float64), columns=["x", "y"])
    table["confidence"] = prompts.confidence.cpu().numpy()
    table["by"] = proposal.eliminated_by.cpu().numpy()
    table["pem"] = proposal.pem_value.cpu().numpy()
    round_of = np.full(m, -1)
    status = np.where(table["by"] >= 0, "eliminated", "not_reached").astype(object)
    for i, index, found in ((i, *part) for i, parts in enumerate(rounds) for part in parts):
        rows = index.cpu().numpy()
        round_of[rows] = i
        passed = found.best_iou > pred_iou_thresh
        status[rows] = np.where(passed.cpu().numpy(), "unstable", "low_iou")
        status[found.prompt.cpu().numpy()] = "duplicate"
    status[mask_prompt] = "kept"
    table["round"], table["status"] = round_of, status
    boxes = np.full((m, 4), np.nan) if prompts.boxes is None else prompts.boxes.cpu().numpy()
    table[["x0", "y0", "x1", "y1"]] = boxes
    return table


def segment(
    image,
    method: str = "aop",
    sam: str | Sam = "mobile_sam",
    predictor: PromptPredictor | None = None,
    detector: Detector | None = None,
    params: AsfParams = AsfParams(),
    device: str = "auto",
    max_prompts: int | None = None,
) -> Segmentation:
    """Segment everything in a picture.

    image:      numpy array, PIL image or path; see :func:`aopsam_lab.data.images.read_image` for the formats.
    method:     a name in :data:`aopsam_lab.pipeline.methods.METHODS`.
    sam:        a name for :func:`load_sam`, or a ``Sam``.
    predictor, detector: what the method needs; the bundled ones where not given.
    max_prompts: how many prompts may be decoded at most, strongest first; None: all that the method proposes.
    Models loaded here are kept for the next call.
    """
    picture = read_image(image)
    needs = method_named(method).needs
    sam = loaded_sam(sam, device)
    if needs == "predictor" and predictor is None:
        predictor = loaded_model(needs, sam)
    if needs == "detector" and detector is None:
        detector = loaded_model(needs, sam)
    return run_method(
        sam, encode(sam, picture), method, predictor, detector, params, max_prompts=max_prompts
    )


def loaded_sam(sam: str | Sam, device: str = "auto") -> Sam:
    """A SAM by name, loaded once in this process; a ``Sam`` as it is."""
    return _cached("sam", load_sam, sam, device) if isinstance(sam, str) else sam


def loaded_model(kind: str, sam: Sam) -> PromptPredictor | Detector:
    """The bundled "predictor" or "detector" for a SAM, loaded once in this process."""
    if kind == "predictor":
        from aopsam_lab.predictor import load_predictor

        return _cached(kind, load_predictor, spec_of(sam).name, sam.device)
    from aopsam_lab.detector import load_detector

    return _cached(kind, lambda _, device: load_detector(device=device), "bundled", sam.device)


_LOADED: dict[tuple[str, str, str], object] = {}


def _cached(kind: str, load, name: str, device):
    device = resolve_device(device)  # "auto" and its name are one model
    key = (kind, name, str(device))
    if key not in _LOADED:
        _LOADED[key] = load(name, device=device)
    return _LOADED[key]
