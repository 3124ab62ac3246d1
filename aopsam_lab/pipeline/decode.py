"""One picture through SAM: encode it, decode prompts, keep the masks that pass, remove duplicates.

Filtering is ``SamAutomaticMaskGenerator``'s, in its order and with its meaning, for every method: predicted IoU, stability
score at the picture's resolution (offset 1.0), box NMS at 0.7 by predicted IoU. Its crops, small-region clean-up and edge
filter are off by default there and have no effect on a single full-picture crop.
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torchvision.ops import nms

from aopsam_lab.pipeline.batching import fitting_batch, in_batches
from aopsam_lab.masks.fullsize import FullSize
from aopsam_lab.pipeline.methods import BOX_NMS_THRESH, Prompts
from aopsam_lab.sam.image_decoder import ImageDecoder
from aopsam_lab.sam.zoo import SamSpec

STABILITY_OFFSET = 1.0
# Pixels of the embedding, times prompts decoded at a time: what stays in a CPU's cache, what fills a GPU.
DECODE_PIXELS = {"cpu": 1 << 14, "cuda": 1 << 20}
# Bytes of masks that wait for duplicates to be removed, at least, and as masks of the picture's own size, of which the stock
# generator holds 192. Beyond it they are encoded first: the larger the picture, the longer that takes
KEPT_LOGITS, KEPT_MASKS = 32 << 20, 24
MIN_DECODE_BATCH = 4  # fewer would read the decoder's weights too often


class Stopwatch:
    """Seconds by stage, synchronised with the device so that GPU work counts where it was asked for."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
        self._sync = waits.get(device.type, lambda: None)

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
    made:         what decoding prepares of the picture, kept for the next round of prompts.
    """

    image: np.ndarray
    model_image: Tensor
    embedding: Tensor
    image_pe: Tensor
    input_size: tuple[int, int]
    seconds: float
    made: dict = field(default_factory=dict, init=False, repr=False, compare=False)

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
        embedding = sam.image_encoder(model_image).contiguous()
    return Encoded(
        image,
        model_image,
        embedding,
        sam.prompt_encoder.get_dense_pe(),
        scaled.shape[:2],
        watch.seconds["encode"],
    )


@dataclass
class Found:
    """Masks that passed both thresholds, before duplicates are removed.

    low_res: (n, 4h, 4w) logits, model frame; beyond the picture's edge, on padding, they may be 0. iou, stability: (n,).
    boxes: (n, 4) long, image frame, inclusive. prompt: (n,) long, index into the prompts.
    best_iou: (m,) of each prompt decoded, the highest predicted IoU of its masks, those that did
    not pass included.
    masks: n COCO RLE where they are encoded already; :func:`encode_early` then lets go of low_res.
    """

    low_res: Tensor
    iou: Tensor
    stability: Tensor
    boxes: Tensor
    prompt: Tensor
    best_iou: Tensor = field(repr=False)
    masks: list[dict] | None = field(default=None, repr=False)


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
    return sam.postprocess_masks(low_res[:, None], encoded.input_size, encoded.image.shape[:2])[
        :, 0
    ]


def image_decoder(sam: Sam, encoded: Encoded) -> ImageDecoder:
    """The mask decoder of an encoded picture, made at its first use. It draws masks on the picture, not on padding."""
    key = sam.mask_decoder
    if key not in encoded.made:
        no_mask = sam.prompt_encoder.no_mask_embed.weight[0]
        grid, size = encoded.embedding.shape[-2:], sam.image_encoder.img_size
        # a pixel at the picture's edge is resized from the logits on it and from the next beyond
        logits = [
            math.ceil(part * 4 * side / size) + 1 for part, side in zip(encoded.input_size, grid)
        ]
        used = tuple(min(side, math.ceil(n / 4)) for side, n in zip(grid, logits))
        encoded.made[key] = ImageDecoder(
            sam.mask_decoder, encoded.embedding, encoded.image_pe, no_mask, used
        )
    return encoded.made[key]


def full_size(sam: Sam, encoded: Encoded) -> FullSize:
    """What resizes the masks of an encoded picture, made at its first use."""
    if FullSize not in encoded.made:
        low = tuple(4 * side for side in encoded.embedding.shape[-2:])
        sizes = sam.image_encoder.img_size, tuple(encoded.input_size), encoded.image.shape[:2]
        encoded.made[FullSize] = FullSize(low, *sizes, encoded.embedding.device)
    return encoded.made[FullSize]


def decode_batch(encoded: Encoded) -> int:
    """Prompts to decode at a time; on a GPU no more than its free memory holds.

    What a prompt takes is mostly its masks' features, C / 8 channels on four times the embedding's grid, and their copies.
    """
    device, (channels, pixels) = encoded.embedding.device, encoded.embedding[0].flatten(1).shape
    most = max(MIN_DECODE_BATCH, DECODE_PIXELS.get(device.type, DECODE_PIXELS["cpu"]) // pixels)
    return fitting_batch(device, 3 * 4 * channels // 8 * 16 * pixels, most)


def decode_and_filter(
    sam: Sam, encoded: Encoded, prompts: Prompts, index: Tensor, spec: SamSpec
) -> Found:
    """Decode the prompts ``index`` and keep the masks that pass the predicted-IoU and the stability threshold.

    Masks below the IoU threshold are never drawn, none is
    resized as a whole, and those that are not stable are forgotten batch by batch: memory grows with the masks kept.
    Where a GPU's memory runs out, batches are halved.
    """
    decoder, sizes = image_decoder(sam, encoded), full_size(sam, encoded)
    masks = slice(1, None) if prompts.multimask else slice(0, 1)
    side = 4 * encoded.embedding.shape[-1]
    empty = encoded.embedding.new_zeros(0)
    none = (empty.view(0, side, side), empty, empty, empty.view(0, 4).long(), empty.long())

    def found_of(part: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        decoded = decoder.decode(_sparse_tokens(sam, encoded, prompts, part))
        wanted = torch.zeros_like(decoded.iou, dtype=torch.bool)
        wanted[:, masks] = decoded.iou[:, masks] > spec.pred_iou_thresh
        best = decoded.iou[:, masks].amax(1)
        if not wanted.any():
            return best, none
        low_res = decoded.draw(wanted)
        stability, boxes = sizes.measure(
            low_res, sam.mask_threshold, STABILITY_OFFSET, spec.stability_score_thresh
        )
        stable = stability >= spec.stability_score_thresh  # an empty mask has NaN and fails
        owner = part.repeat_interleave(wanted.sum(1))
        fields = (low_res, decoded.iou[wanted], stability, boxes, owner)
        return best, tuple(x[stable] for x in fields)

    parts = in_batches(index, decode_batch(encoded), found_of, MIN_DECODE_BATCH)
    best, kept = zip((empty, none), *parts)
    return Found(*(torch.cat(parts) for parts in zip(*kept)), torch.cat(best))


def encode_early(sam: Sam, encoded: Encoded, found: list[Found]) -> None:
    """Where the logits of all masks found so far take more than KEPT_LOGITS, and more than KEPT_MASKS float masks at the
    picture's size, encode the masks and let the logits go. Of masks that are encoded already they
    always go.

    Most of them will be duplicates, encoded for nothing; so that memory does not grow with the prompts tried beyond that.
    """
    waiting = [part for part in found if part.masks is None]
    height, width = encoded.image.shape[:2]
    if sum(part.low_res.nbytes for part in waiting) > max(
        KEPT_LOGITS, KEPT_MASKS * height * width * 4
    ):
        for part in waiting:
            every = torch.arange(len(part.iou), device=part.iou.device)
            part.masks = encoded_masks(sam, encoded, part.low_res, every)
    for part in found:
        if part.masks is not None:
            part.low_res = part.low_res.new_zeros(0, *part.low_res.shape[1:])


def encoded_masks(sam: Sam, encoded: Encoded, low_res: Tensor, index: Tensor) -> list[dict]:
    """RLE of the masks ``index``, in its order."""
    sizes = full_size(sam, encoded)
    parts = in_batches(
        index, max(1, len(index)), lambda part: sizes.encode(low_res[part], sam.mask_threshold)
    )
    return [rle for part in parts for rle in part]


def remove_duplicates(sam: Sam, encoded: Encoded, found: list[Found]) -> dict:
    """Box NMS over all rounds, then RLE of the survivors only -> the mask fields of a Segmentation."""
    n = sum(len(part.iou) for part in found)
    if not n:
        none = np.zeros(0, np.float32)
        return dict(
            masks=[],
            scores=none,
            stability=none,
            boxes=none.reshape(0, 4),
            mask_prompt=none.astype(int),
        )
    iou, stability, boxes, prompt = (
        torch.cat([getattr(part, name) for part in found])
        for name in ("iou", "stability", "boxes", "prompt")
    )
    keep = nms(boxes.float(), iou, BOX_NMS_THRESH)  # best first
    # round by round: all logits in one tensor would be there twice
    order, masks, first = keep.sort(), [], 0
    for part in found:
        own = order.values[(order.values >= first) & (order.values < first + len(part.iou))] - first
        if part.masks is None:
            masks += encoded_masks(sam, encoded, part.low_res, own)
        else:
            masks += [part.masks[i] for i in own.tolist()]
        first += len(part.iou)
    masks = [masks[i] for i in order.indices.argsort().tolist()]
    scores, stability, boxes, prompt = (
        x[keep].cpu().numpy() for x in (iou.float(), stability.float(), boxes.float(), prompt)
    )
    return dict(masks=masks, scores=scores, stability=stability, boxes=boxes, mask_prompt=prompt)
