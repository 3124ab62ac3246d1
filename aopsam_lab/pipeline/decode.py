"""One image through SAM: encode it, decode prompts, keep the masks that pass, remove duplicates.

Masks are filtered as by `SamAutomaticMaskGenerator`: predicted IoU, stability score at the image's
size, edges of a crop, box NMS, small regions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from segment_anything.modeling import Sam
from segment_anything.utils.amg import is_box_near_crop_edge, remove_small_regions
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torchvision.ops import nms

from aopsam_lab.masks.fullsize import FullSize
from aopsam_lab.masks.rle import encode_rle
from aopsam_lab.pipeline.batching import in_batches
from aopsam_lab.pipeline.types import BOX_NMS_THRESH, Encoded, Found, MaskParams, Prompts
from aopsam_lab.sam.mask_decoder import ImageDecoder
from aopsam_lab.sam.mobile import embed
from aopsam_lab.sam.zoo import SamSpec

STABILITY_OFFSET = 1.0
CROP_NMS_THRESH = 0.7  # for masks of several crops, and for those without their small regions
# Pixels of the embedding times prompts decoded at a time: fits a CPU's cache, fills a GPU.
DECODE_PIXELS = {"cpu": 1 << 14, "cuda": 1 << 20}
MIN_DECODE_BATCH = 4  # fewer would read the decoder's weights too often
# Masks stay logits until duplicates are removed. Above the larger of two limits they are encoded
# first: this many bytes, and the bytes of this many float masks at the image's size.
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
        resize = ResizeLongestSide(sam.image_encoder.img_size)
        sizes = *image.shape[:2], resize.target_length
        if 0 in resize.get_preprocess_shape(*sizes):
            thin = f"An image of {image.shape[1]} x {image.shape[0]} pixels is too thin"
            raise ValueError(f"{thin}: SAM sees {sizes[2]} along its long side. Cut it in parts.")
        scaled = resize.apply_image(image)
        pixels = torch.as_tensor(scaled, device=sam.device).permute(2, 0, 1)[None].contiguous()
        model_image = sam.preprocess(pixels)
        embedding = embed(sam.image_encoder, model_image).contiguous()
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
    decoder = sam.mask_decoder
    if decoder not in encoded.made:
        no_mask = sam.prompt_encoder.no_mask_embed.weight[0]
        grid, model = encoded.embedding.shape[-2:], sam.image_encoder.img_size
        used = []
        for part, side in zip(encoded.input_size, grid, strict=True):
            # a pixel at the edge is made of the logit on it and of the next one beyond
            logits = math.ceil(part * 4 * side / model) + 1
            used.append(min(side, math.ceil(logits / 4)))
        inputs = encoded.embedding, encoded.image_pe, no_mask
        encoded.made[decoder] = ImageDecoder(decoder, *inputs, tuple(used))
    return encoded.made[decoder]


def full_size(encoded: Encoded) -> FullSize:
    """What resizes the masks of an encoded image."""
    return FullSize(encoded.model_image.shape[-1], encoded.input_size, encoded.image.shape[:2])


def nothing(encoded: Encoded) -> Found:
    """A Found without masks."""
    none, side = encoded.embedding.new_zeros(0), 4 * encoded.embedding.shape[-1]
    boxes, prompt = none.view(0, 4).long(), none.long()
    return Found(none.view(0, side, side), none, none, boxes, prompt, best_iou=none, masks=[])


def joined(parts: Sequence[Found]) -> Found:
    """What several batches of prompts found, as one."""
    names = ("low_res", "iou", "stability", "boxes", "prompt", "best_iou")
    fields = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    are_encoded = all(part.masks is not None for part in parts)
    masks = [rle for part in parts for rle in part.masks or ()] if are_encoded else None
    return Found(**fields, masks=masks)


def decode_and_filter(
    sam: Sam, encoded: Encoded, prompts: Prompts, index: Tensor, spec: SamSpec
) -> Found:
    """Decode the prompts `index` (n,) long; keep the masks that pass both thresholds of `spec`.

    Masks below the predicted IoU are never drawn, and those below the stability score are forgotten
    batch by batch: memory grows only with the masks kept.
    """
    decoder, sizes = image_decoder(sam, encoded), full_size(encoded)
    masks = slice(1, None) if prompts.multimask else slice(0, 1)

    def found_of(part: Tensor) -> Found:
        decoded = decoder.decode(prompt_tokens(sam, encoded, prompts, part))
        wanted = torch.zeros_like(decoded.iou, dtype=torch.bool)
        wanted[:, masks] = decoded.iou[:, masks] > spec.pred_iou_thresh
        low_res = decoded.draw(wanted)
        stability, boxes = sizes.measure(low_res, sam.mask_threshold, STABILITY_OFFSET)
        owner = part.repeat_interleave(wanted.sum(1))
        stable = stability >= spec.stability_score_thresh
        stable &= boxes.any(1)  # an empty mask has no box
        if encoded.crop is not None:
            stable &= ~is_box_near_crop_edge(boxes, encoded.crop[0], [0, 0, *encoded.crop[1][::-1]])
        fields = (low_res, decoded.iou[wanted], stability, boxes, owner)
        return Found(*(x[stable] for x in fields), best_iou=decoded.iou[:, masks].amax(1))

    pixels = DECODE_PIXELS.get(index.device.type, DECODE_PIXELS["cpu"])
    size = max(MIN_DECODE_BATCH, pixels // encoded.embedding[0, 0].numel())
    return joined([nothing(encoded), *in_batches(index, size, found_of, MIN_DECODE_BATCH)])


def encode_early(sam: Sam, encoded: Encoded, found: list[Found]) -> None:
    """Bound the memory of the masks found so far: encode them and let their logits go.

    Most will be duplicates, encoded for nothing; so this waits until they take more than
    KEPT_LOGITS and KEPT_MASKS allow. The logits of masks that are encoded already always go.
    """
    waiting = sum(part.low_res.nbytes for part in found if part.masks is None)
    kept = max(KEPT_LOGITS, KEPT_MASKS * 4 * math.prod(encoded.image.shape[:2]))
    for part in found:
        if waiting > kept or part.masks is not None:
            part.masks = encoded_masks(sam, encoded, part)
            part.low_res = part.low_res[:0].clone()


def encoded_masks(
    sam: Sam, encoded: Encoded, found: Found, index: Tensor | None = None
) -> list[dict]:
    """COCO RLE of the masks `index` of those found, in its order; None: of all."""
    if index is None:
        index = torch.arange(len(found.iou), device=found.iou.device)
    if found.masks is not None:
        return [found.masks[i] for i in index.tolist()]
    sizes = full_size(encoded)

    def encode_part(part: Tensor) -> list[dict]:
        return sizes.encode(found.low_res[part], sam.mask_threshold)

    return [rle for part in in_batches(index, max(1, len(index)), encode_part) for rle in part]


def distinct(boxes: Tensor, scores: Tensor, most: float = BOX_NMS_THRESH) -> Tensor:
    """The rows of inclusive boxes (n, 4) that box NMS keeps, best first; `most`: IoU of two."""
    # the box of one pixel or of a line has no area so, and would be nobody's duplicate
    low, high = boxes[:, :2], boxes[:, 2:]
    return nms(torch.hstack([low, high + (low == high)]).float(), scores, most)


def remove_duplicates(
    sam: Sam, encoded: Encoded, found: list[Found], quality: MaskParams = MaskParams()
) -> dict[str, Any]:
    """Box NMS over all rounds, then RLE of what is left: the mask fields of a Segmentation."""
    iou, stability, boxes, prompt = (
        torch.cat([getattr(part, name) for part in (nothing(encoded), *found)])
        for name in ("iou", "stability", "boxes", "prompt")
    )
    keep = distinct(boxes, iou, quality.box_nms_thresh)
    masks: dict[int, dict] = {}
    first = 0
    for part in found:  # one by one: all logits in one tensor would be there twice
        own = keep[(keep >= first) & (keep < first + len(part.iou))]
        masks |= zip(own.tolist(), encoded_masks(sam, encoded, part, own - first), strict=True)
        first += len(part.iou)
    about = {"scores": iou, "stability": stability, "boxes": boxes.float(), "mask_prompt": prompt}
    kept = {name: values[keep].cpu().numpy() for name, values in about.items()}
    kept["masks"] = np.array([masks[i] for i in keep.tolist()], object)
    return cleaned(kept, quality)


def cleaned(kept: dict[str, np.ndarray], quality: MaskParams) -> dict[str, Any]:
    """The mask fields of a Segmentation, best first: without small holes, islands, and duplicates.

    Of masks that are duplicates then, one that did not change stays.
    """
    rows, least = np.arange(len(kept["masks"])), quality.min_mask_region_area
    same = np.ones(len(rows), np.float32)
    for i, rle in enumerate(kept["masks"] if least else ()):
        pixels = coco_mask.decode(rle).astype(bool)
        for mode in ("holes", "islands"):
            pixels, is_new = remove_small_regions(pixels, least, mode)
            same[i] *= not is_new
        if not same[i]:
            kept["masks"][i] = encode_rle(pixels[None])[0]
            x, y, width, height = coco_mask.toBbox(kept["masks"][i])
            kept["boxes"][i] = x, y, x + width - 1, y + height - 1
    if least:
        most = max(quality.box_nms_thresh, CROP_NMS_THRESH)
        keep = distinct(torch.from_numpy(kept["boxes"]), torch.from_numpy(same), most)
        rows = keep.sort().values.numpy()
    rows = rows[np.argsort(-kept["scores"][rows], kind="stable")]
    fields = {name: values[rows] for name, values in kept.items()}
    return {**fields, "masks": fields["masks"].tolist()}
