"""Picture in, :class:`Segmentation` out: encode, propose, decode and filter in rounds, remove duplicates.

Filtering is ``SamAutomaticMaskGenerator``'s, in its order and with its meaning, for every method: predicted IoU, stability
score at the picture's resolution (offset 1.0), box NMS at 0.7 by predicted IoU. Its crops, small-region clean-up and edge
filter are off by default there and have no effect on a single full-picture crop.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torchvision.ops import nms

from aopsam_lab.asf import AsfParams
from aopsam_lab.imaging import read_image
from aopsam_lab.methods import Models, Prompts, Proposal, method_named
from aopsam_lab.rle import encode_rle
from aopsam_lab.sam.decoder import decode_tokens, draw_masks
from aopsam_lab.sam.zoo import SamSpec, load_sam, spec_of
from aopsam_lab.segmentation import Segmentation

if TYPE_CHECKING:
    from aopsam_lab.detector import Detector
    from aopsam_lab.predictor import PromptPredictor

STABILITY_OFFSET = 1.0
BOX_NMS_THRESH = 0.7
DECODE_BATCH = {"cpu": 16, "cuda": 256}  # prompts at a time: what stays in cache, what fills the device
MASK_PIXELS = {"cpu": 1 << 22, "cuda": 1 << 26}  # full-resolution pixels held at a time


class Stopwatch:
    """Seconds by stage, synchronised with the device so that GPU work counts where it was asked for."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._sync = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)

    @contextmanager
    def __call__(self, stage: str):
        self._sync()
        start = time.perf_counter()
        yield
        self._sync()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass
class Encoded:
    """A picture with its SAM embedding: all that a method needs, computed once.

    image:        H x W x 3 uint8.
    model_image:  (1, 3, S, S), normalised and zero-padded.
    embedding:    (1, C, h, w). image_pe: (1, C, h, w), SAM's dense positional encoding.
    input_size:   (height, width) of the scaled picture in the model frame.
    seconds:      what encoding took.
    """

    image: np.ndarray
    model_image: Tensor
    embedding: Tensor
    image_pe: Tensor
    input_size: tuple[int, int]
    seconds: float

    def _scale(self, like: Tensor) -> Tensor:
        (h, w), (new_h, new_w) = self.image.shape[:2], self.input_size
        return torch.tensor([new_w / w, new_h / h], dtype=like.dtype, device=like.device)

    def to_model(self, points: Tensor) -> Tensor:
        """(..., 2) points (x, y), image frame -> model frame."""
        return points * self._scale(points)

    def to_image(self, points: Tensor) -> Tensor:
        """(..., 2) points (x, y), model frame -> image frame."""
        return points / self._scale(points)


@torch.inference_mode()
def encode(sam: Sam, image: np.ndarray) -> Encoded:
    """H x W x 3 uint8 -> Encoded, scaled and padded exactly as ``SamPredictor.set_image`` does."""
    watch = Stopwatch(sam.device)
    with watch("encode"):
        scaled = ResizeLongestSide(sam.image_encoder.img_size).apply_image(image)
        pixels = torch.as_tensor(scaled, device=sam.device).permute(2, 0, 1)[None].contiguous()
        model_image = sam.preprocess(pixels)
        embedding = sam.image_encoder(model_image)
    return Encoded(image, model_image, embedding, sam.prompt_encoder.get_dense_pe(), scaled.shape[:2], watch.seconds["encode"])


@dataclass
class Found:
    """Masks that passed both thresholds, before duplicates are removed.

    low_res: (n, 4h, 4w) logits, model frame. iou, stability: (n,). boxes: (n, 4) long, image frame, inclusive. prompt: (n,)
    long, index into the prompts. passed_iou: (m,) bool, prompts of which at least one mask passed the IoU threshold.
    """

    low_res: Tensor
    iou: Tensor
    stability: Tensor
    boxes: Tensor
    prompt: Tensor
    passed_iou: Tensor = field(repr=False)


def _sparse_tokens(sam: Sam, encoded: Encoded, prompts: Prompts, index: Tensor) -> Tensor:
    """The prompt encoder's tokens (n, t, C) of the prompts ``index``."""
    if prompts.boxes is not None:
        boxes = encoded.to_model(prompts.boxes[index].unflatten(1, (2, 2))).flatten(1)
        return sam.prompt_encoder(points=None, boxes=boxes, masks=None)[0]
    points = encoded.to_model(prompts.points[index])[:, None]
    labels = torch.ones(len(index), 1, dtype=torch.int, device=points.device)
    return sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)[0]


def full_resolution(sam: Sam, encoded: Encoded, low_res: Tensor) -> Tensor:
    """Logits (n, 4h, 4w), model frame -> (n, H, W), image frame, as ``Sam.postprocess_masks``."""
    return sam.postprocess_masks(low_res[:, None], encoded.input_size, encoded.image.shape[:2])[:, 0]


def _chunks(encoded: Encoded, count: int) -> list[slice]:
    """Slices of ``count`` masks so few at a time that their full-resolution pixels stay within MASK_PIXELS."""
    pixels = MASK_PIXELS.get(encoded.embedding.device.type, MASK_PIXELS["cuda"])
    step = max(1, pixels // (encoded.image.shape[0] * encoded.image.shape[1]))
    return [slice(i, i + step) for i in range(0, count, step)]


def decode_and_filter(sam: Sam, encoded: Encoded, prompts: Prompts, index: Tensor, spec: SamSpec) -> Found:
    """Decode the prompts ``index`` and keep the masks that pass the predicted-IoU and the stability threshold."""
    masks = slice(1, None) if prompts.multimask else slice(0, 1)
    dense = sam.prompt_encoder.no_mask_embed.weight[0]
    low_res, iou, owner, passed_iou = [], [], [], []
    batch = DECODE_BATCH.get(encoded.embedding.device.type, DECODE_BATCH["cpu"])
    for part in index.split(batch):
        sparse = _sparse_tokens(sam, encoded, prompts, part)
        decoded = decode_tokens(sam.mask_decoder, encoded.embedding, encoded.image_pe, sparse[None], dense)
        scores = decoded.iou[:, masks]
        good = scores > spec.pred_iou_thresh
        rows = good.any(1)
        passed_iou.append(rows)
        if not rows.any():
            continue  # masks nobody will keep are never drawn
        decoded = replace(decoded, pixels=decoded.pixels[rows], tokens=decoded.tokens[rows])
        good = good[rows]
        low_res.append(draw_masks(sam.mask_decoder, decoded, masks)[good])
        iou.append(scores[rows][good])
        owner.append(part[rows].repeat_interleave(good.sum(1)))
    passed = torch.cat(passed_iou)
    if not low_res:
        side = 4 * encoded.embedding.shape[-1]
        empty = encoded.embedding.new_zeros(0)
        return Found(empty.view(0, side, side), empty, empty, empty.view(0, 4).long(), empty.long(), passed)
    low, score, prompt = torch.cat(low_res), torch.cat(iou), torch.cat(owner)
    stability = torch.empty_like(score)
    boxes = torch.empty(len(score), 4, dtype=torch.long, device=score.device)
    for part in _chunks(encoded, len(score)):
        logits = full_resolution(sam, encoded, low[part])
        stability[part] = calculate_stability_score(logits, sam.mask_threshold, STABILITY_OFFSET)
        boxes[part] = batched_mask_to_box(logits > sam.mask_threshold)
    stable = stability >= spec.stability_score_thresh  # an empty mask has NaN and fails
    return Found(low[stable], score[stable], stability[stable], boxes[stable], prompt[stable], passed)


@torch.inference_mode()
def run_method(
    sam: Sam,
    encoded: Encoded,
    method: str,
    predictor: PromptPredictor | None = None,
    detector: Detector | None = None,
    params: AsfParams = AsfParams(),
) -> Segmentation:
    """One method on an encoded picture. Raises ValueError for an unknown method or a missing model of its."""
    chosen = method_named(method)
    models = Models(predictor, detector)
    if chosen.needs and getattr(models, chosen.needs) is None:
        raise ValueError(f"method {method!r} needs a {chosen.needs}: pass {chosen.needs}=load_{chosen.needs}(...)")
    spec = spec_of(sam)
    watch = Stopwatch(encoded.embedding.device)
    rounds: list[tuple[Tensor, Found]] = []
    with watch("infer"):
        proposal = chosen.start(encoded, models, params)
        index = proposal.next_round()
    while index is not None:
        with watch("mask"):
            found = decode_and_filter(sam, encoded, proposal.prompts, index, spec)
            rounds.append((index, found))
        with watch("infer"):
            proposal.observe(found.low_res > sam.mask_threshold, found.iou, found.prompt)
            index = proposal.next_round()
    with watch("mask"):
        result = _remove_duplicates(sam, encoded, [found for _, found in rounds])
    seconds = {"encode": encoded.seconds, "infer": watch.seconds["infer"], "mask": watch.seconds["mask"]}
    seconds["total"] = sum(seconds.values())
    table = _prompt_table(proposal, rounds, result["mask_prompt"])
    eliminated = proposal.eliminated_by >= 0
    return Segmentation(
        image=encoded.image,
        **result,
        prompts=table,
        pcm=None if proposal.pcm is None else proposal.pcm.float().cpu().numpy(),
        pems=torch.stack(proposal.pems).float().cpu().numpy() if proposal.pems else None,
        seconds=seconds,
        method=method,
        params={name: getattr(params, name) for name in chosen.uses},
        n_decoded=sum(len(index) for index, _ in rounds),
        n_sampled=len(proposal.prompts),
        n_eliminated=int(eliminated.sum()),
        input_size=tuple(encoded.input_size),
        model_size=encoded.model_image.shape[-1],
    )


def _remove_duplicates(sam: Sam, encoded: Encoded, found: list[Found]) -> dict:
    """Box NMS over all rounds, then full-resolution masks of the survivors only -> the mask fields of a Segmentation."""
    n = sum(len(part.iou) for part in found)
    if not n:
        none = np.zeros(0, np.float32)
        return dict(masks=[], scores=none, stability=none, boxes=none.reshape(0, 4), mask_prompt=none.astype(int))
    low, iou, stability, boxes, prompt = (
        torch.cat([getattr(part, name) for part in found]) for name in ("low_res", "iou", "stability", "boxes", "prompt")
    )
    keep = nms(boxes.float(), iou, BOX_NMS_THRESH)  # best first
    masks = []
    for part in _chunks(encoded, len(keep)):
        masks += encode_rle(full_resolution(sam, encoded, low[keep[part]]) > sam.mask_threshold)
    scores, stability, boxes, prompt = (x[keep].cpu().numpy() for x in (iou.float(), stability.float(), boxes.float(), prompt))
    return dict(masks=masks, scores=scores, stability=stability, boxes=boxes, mask_prompt=prompt)


def _prompt_table(proposal: Proposal, rounds: list[tuple[Tensor, Found]], mask_prompt: np.ndarray) -> pd.DataFrame:
    """One row a prompt: where, how sure, in which round, and what became of it."""
    prompts = proposal.prompts
    m = len(prompts)
    table = pd.DataFrame(prompts.points.cpu().numpy().astype(np.float64), columns=["x", "y"])
    table["confidence"] = prompts.confidence.cpu().numpy()
    round_of, status = np.full(m, -1), np.full(m, "eliminated", dtype=object)
    for i, (index, found) in enumerate(rounds):
        rows = index.cpu().numpy()
        round_of[rows] = i
        status[rows] = np.where(found.passed_iou.cpu().numpy(), "unstable", "low_iou")
        status[found.prompt.cpu().numpy()] = "duplicate"
    status[mask_prompt] = "kept"
    table["round"], table["status"] = round_of, status
    table["by"] = proposal.eliminated_by.cpu().numpy()
    table["pem"] = proposal.pem_value.cpu().numpy()
    boxes = np.full((m, 4), np.nan) if prompts.boxes is None else prompts.boxes.cpu().numpy()
    table[["x0", "y0", "x1", "y1"]] = boxes
    return table


def segment(
    image,
    method: str = "aop",
    sam: str | Sam = "tiny",
    predictor: PromptPredictor | None = None,
    detector: Detector | None = None,
    params: AsfParams = AsfParams(),
    device: str = "auto",
) -> Segmentation:
    """Segment everything in a picture.

    image:      numpy array, PIL image or path; see :func:`aopsam_lab.imaging.read_image` for the formats.
    method:     a name in :data:`aopsam_lab.methods.METHODS`.
    sam:        a name for :func:`load_sam`, or a ``Sam``.
    predictor, detector: what the method needs; the bundled ones where not given.
    Models loaded here are kept for the next call.
    """
    picture = read_image(image)
    needs = method_named(method).needs
    if isinstance(sam, str):
        sam = _cached("sam", load_sam, sam, device)
    if needs == "predictor" and predictor is None:
        from aopsam_lab.predictor import load_predictor

        predictor = _cached("predictor", load_predictor, spec_of(sam).name, sam.device)
    if needs == "detector" and detector is None:
        from aopsam_lab.detector import load_detector

        detector = _cached("detector", lambda _, device: load_detector(device=device), "bundled", sam.device)
    return run_method(sam, encode(sam, picture), method, predictor, detector, params)


_LOADED: dict[tuple[str, str, str], object] = {}


def _cached(kind: str, load, name: str, device):
    key = (kind, name, str(device))
    if key not in _LOADED:
        _LOADED[key] = load(name, device=device)
    return _LOADED[key]
