"""One image through SAM: encode it, decode prompts, keep the masks that pass, remove duplicates.

Every method's masks are filtered as `SamAutomaticMaskGenerator` does it: predicted IoU, stability
score at the image's size, box NMS at 0.7. Its crops, clean-up of small regions and edge filter
change nothing on a whole image.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torchvision.ops import nms

from aopsam_lab.masks.fullsize import FullSize
from aopsam_lab.pipeline.batching import in_batches
from aopsam_lab.pipeline.types import BOX_NMS_THRESH, Encoded, Found, Prompts
from aopsam_lab.sam.mask_decoder import ImageDecoder
from aopsam_lab.sam.zoo import SamSpec

STABILITY_OFFSET = 1.0
# Pixels of the embedding times prompts decoded at a time: fits a CPU's cache, fills a GPU.
DECODE_PIXELS = {"cpu": 1 << 14, "cuda": 1 << 20}
MIN_DECODE_BATCH = 4  # fewer would read the decoder's weights too often
# Masks that wait for duplicates to be removed are kept as logits up to the larger of these: bytes,
# and as many as float masks at the image's size. Beyond it they are encoded first.
KEPT_LOGITS, KEPT_MASKS = 32 << 20, 24


class Stopwatch:
    """Seconds by stage; it waits for the device, so that work counts where it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
        self._sync = waits.get(device.type, lambda: None)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the seconds of a `with` block for a stage."""
        self._sync()
        start = time.perf_counter()
        yield
        self._sync()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@torch.inference_mode()
def encode(sam: Sam, image: np.ndarray) -> Encoded:
    """Encode an image (H, W, 3) uint8, scaled and padded as `SamPredictor.set_image` does it."""
    watch = Stopwatch(sam.device)
    with watch("encode"):
        scaled = ResizeLongestSide(sam.image_encoder.img_size).apply_image(image)
        pixels = torch.as_tensor(scaled, device=sam.device).permute(2, 0, 1)[None].contiguous()
        model_image = sam.preprocess(pixels)
        embedding = sam.image_encoder(model_image).contiguous()
    image_pe, seconds = sam.prompt_encoder.get_dense_pe(), watch.seconds["encode"]
    return Encoded(image, model_image, embedding, image_pe, scaled.shape[:2], seconds)


def prompt_tokens(sam: Sam, encoded: Encoded, prompts: Prompts, index: Tensor) -> Tensor:
    """The prompt encoder's tokens (n, t, C) of the prompts `index`."""
    if prompts.boxes is not None:
        boxes = encoded.to_model(prompts.boxes[index].unflatten(1, (2, 2))).flatten(1)
        return sam.prompt_encoder(points=None, boxes=boxes, masks=None)[0]
    points = encoded.to_model(prompts.points[index])[:, None]
    labels = torch.ones(len(index), 1, dtype=torch.int, device=points.device)
    return sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)[0]


def full_resolution(sam: Sam, encoded: Encoded, low_res: Tensor) -> Tensor:
    """Logits (n, 4h, 4w), model frame -> (n, H, W), image frame, by `Sam.postprocess_masks`."""
    size = encoded.image.shape[:2]
    return sam.postprocess_masks(low_res[:, None], encoded.input_size, size)[:, 0]


def image_decoder(sam: Sam, encoded: Encoded) -> ImageDecoder:
    """The mask decoder of an encoded image, made once; it draws on the image, not on padding."""
    key = sam.mask_decoder
    if key not in encoded.made:
        no_mask = sam.prompt_encoder.no_mask_embed.weight[0]
        grid, model = encoded.embedding.shape[-2:], sam.image_encoder.img_size
        used = []
        for part, side in zip(encoded.input_size, grid, strict=True):
            # a pixel at the edge is made of the logit on it and of the next one beyond
            logits = math.ceil(part * 4 * side / model) + 1
            used.append(min(side, math.ceil(logits / 4)))
        inputs = encoded.embedding, encoded.image_pe, no_mask
        encoded.made[key] = ImageDecoder(sam.mask_decoder, *inputs, tuple(used))
    return encoded.made[key]


def full_size(sam: Sam, encoded: Encoded) -> FullSize:
    """What resizes the masks of an encoded image."""
    sizes = tuple(encoded.input_size), encoded.image.shape[:2]
    return FullSize(sam.image_encoder.img_size, *sizes)


def decode_and_filter(
    sam: Sam, encoded: Encoded, prompts: Prompts, index: Tensor, spec: SamSpec
) -> Found:
    """Decode the prompts `index` (n,) long; keep the masks that pass both thresholds of `spec`.

    Masks below the predicted IoU are never drawn, and those below the stability score are forgotten
    batch by batch: memory grows with the masks kept.
    """
    decoder, sizes = image_decoder(sam, encoded), full_size(sam, encoded)
    masks = slice(1, None) if prompts.multimask else slice(0, 1)
    empty = encoded.embedding.new_zeros(0)
    side = 4 * encoded.embedding.shape[-1]
    none = (empty.view(0, side, side), empty, empty, empty.view(0, 4).long(), empty.long())

    def found_of(part: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        decoded = decoder.decode(prompt_tokens(sam, encoded, prompts, part))
        wanted = torch.zeros_like(decoded.iou, dtype=torch.bool)
        wanted[:, masks] = decoded.iou[:, masks] > spec.pred_iou_thresh
        best = decoded.iou[:, masks].amax(1)
        if not wanted.any():
            return best, none
        low_res = decoded.draw(wanted)
        least = spec.stability_score_thresh
        stability, boxes = sizes.measure(low_res, sam.mask_threshold, STABILITY_OFFSET, least)
        owner = part.repeat_interleave(wanted.sum(1))
        stable = stability >= least  # an empty mask has NaN and fails
        fields = (low_res, decoded.iou[wanted], stability, boxes, owner)
        return best, tuple(x[stable] for x in fields)

    pixels = DECODE_PIXELS.get(index.device.type, DECODE_PIXELS["cpu"])
    size = max(MIN_DECODE_BATCH, pixels // encoded.embedding[0, 0].numel())
    parts = in_batches(index, size, found_of, MIN_DECODE_BATCH)
    best, kept = zip((empty, none), *parts, strict=True)
    return Found(*(torch.cat(x) for x in zip(*kept, strict=True)), torch.cat(best))


def encode_early(sam: Sam, encoded: Encoded, found: list[Found]) -> None:
    """Bound the memory of the masks found so far: encode them and let their logits go.

    Most will be duplicates, encoded for nothing; so this waits until they take more than
    KEPT_LOGITS and KEPT_MASKS allow. The logits of masks that are encoded already always go.
    """
    waiting = [part for part in found if part.masks is None]
    kept = max(KEPT_LOGITS, KEPT_MASKS * 4 * math.prod(encoded.image.shape[:2]))
    if sum(part.low_res.nbytes for part in waiting) > kept:
        for part in waiting:
            part.masks = encoded_masks(sam, encoded, part.low_res)
    for part in found:
        if part.masks is not None:
            part.low_res = part.low_res.new_zeros(0, *part.low_res.shape[1:])


def encoded_masks(
    sam: Sam, encoded: Encoded, low_res: Tensor, index: Tensor | None = None
) -> list[dict]:
    """COCO RLE of the masks `index`, in its order; None: of all."""
    sizes = full_size(sam, encoded)
    if index is None:
        index = torch.arange(len(low_res), device=low_res.device)

    def encode_part(part: Tensor) -> list[dict]:
        return sizes.encode(low_res[part], sam.mask_threshold)

    return [rle for part in in_batches(index, max(1, len(index)), encode_part) for rle in part]


def remove_duplicates(sam: Sam, encoded: Encoded, found: list[Found]) -> dict[str, Any]:
    """Box NMS over all rounds, then RLE of what is left: the mask fields of a Segmentation."""
    if not any(len(part.iou) for part in found):
        none = np.zeros(0, np.float32)
        boxes, prompt = none.reshape(0, 4), none.astype(int)
        return dict(masks=[], scores=none, stability=none, boxes=boxes, mask_prompt=prompt)
    iou, stability, boxes, prompt = (
        torch.cat([getattr(part, name) for part in found])
        for name in ("iou", "stability", "boxes", "prompt")
    )
    keep = nms(boxes.float(), iou, BOX_NMS_THRESH)  # best first
    masks, first = {}, 0
    for part in found:  # one by one: all logits in one tensor would be there twice
        own = keep[(keep >= first) & (keep < first + len(part.iou))] - first
        if part.masks is None:
            rles = encoded_masks(sam, encoded, part.low_res, own)
        else:
            rles = [part.masks[i] for i in own.tolist()]
        masks |= dict(zip((own + first).tolist(), rles, strict=True))
        first += len(part.iou)
    scores, stability, boxes, prompt = (
        x[keep].cpu().numpy() for x in (iou.float(), stability.float(), boxes.float(), prompt)
    )
    masks = [masks[i] for i in keep.tolist()]
    return dict(masks=masks, scores=scores, stability=stability, boxes=boxes, mask_prompt=prompt)
