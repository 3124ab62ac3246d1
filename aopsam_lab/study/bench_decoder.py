"""The benchmark's first part: the mask decoder alone, technique by technique."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor

from aopsam_lab import decoding
from aopsam_lab.sam.decoder import decode_tokens, draw_masks
from aopsam_lab.sam.image_decoder import ImageDecoder
from aopsam_lab.study.bench_page import PROMPTS
from aopsam_lab.study.stock import POINTS_PER_BATCH

PASSING = 0.35  # share of prompts that the IoU gate lets through
BF16 = "bf16, an option"  # ten times slower where a CPU has no such instructions, so measured once only
STOCK_BATCHES = (1, 4, 16, POINTS_PER_BATCH)  # among which its best is looked for
MULTIMASK = slice(1, None)


def alternate(rows: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, list[float]], dict[str, object]]:
    """Run every row `rounds` times in turn: seconds by row, and what each returned last."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    results = {}
    names = list(rows)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            results[name] = rows[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds, results


def random_modules(width: int, side: int, mlp: int) -> tuple[PromptEncoder, MaskDecoder]:
    """Prompt encoder and mask decoder of a shape, random weights."""
    torch.manual_seed(0)
    prompt_encoder = PromptEncoder(width, (side, side), (16 * side, 16 * side), mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=mlp, num_heads=8)
    return prompt_encoder.eval(), MaskDecoder(
        num_multimask_outputs=3, transformer=transformer, transformer_dim=width
    ).eval()


def decoder_rows(
    prompt_encoder: PromptEncoder, decoder: MaskDecoder, embedding: Tensor, sparse: Tensor, batch: int, stock_best: int
) -> dict[str, Callable[[], Tensor]]:
    """The decoder's techniques by name; each returns the logits of the prompts' three masks, 0 where a gate kept them
    undrawn."""
    pe, no_mask = prompt_encoder.get_dense_pe(), prompt_encoder.no_mask_embed.weight[0]
    dense = no_mask.view(1, -1, 1, 1)

    def stock(size: int) -> Tensor:
        return torch.cat([decoder(embedding, pe, part, dense, True)[0] for part in sparse.split(size)])

    def folded() -> Tensor:
        decoded = (decode_tokens(decoder, embedding, pe, part[None], no_mask) for part in sparse.split(batch))
        return torch.cat([draw_masks(decoder, part, MULTIMASK) for part in decoded])

    def shared(gate: float, precision: str = "float32") -> Tensor:
        image = ImageDecoder(decoder, embedding, pe, no_mask, precision)
        drawn = []
        for part in sparse.split(batch):
            decoded = image.decode(part)
            wanted = torch.zeros_like(decoded.iou, dtype=torch.bool)
            wanted[:, MULTIMASK] = (decoded.iou[:, MULTIMASK].amax(1) >= gate)[:, None]
            logits = decoded.iou.new_zeros(len(part), 3, *[4 * side for side in embedding.shape[-2:]])
            logits[wanted[:, MULTIMASK]] = decoded.draw(wanted)
            drawn.append(logits)
        return torch.cat(drawn)

    image = ImageDecoder(decoder, embedding, pe, no_mask)
    iou = torch.cat([image.decode(part).iou[:, MULTIMASK].amax(1) for part in sparse.split(batch)])
    gate = float(iou.quantile(1 - PASSING))
    return {
        "stock, batch 64": functools.partial(stock, POINTS_PER_BATCH),
        "stock, its best batch": functools.partial(stock, stock_best),
        "projections folded": folded,
        "pixels stay with the image": functools.partial(shared, float("-inf")),
        "IoU before pixels, 35% pass": functools.partial(shared, gate),
        BF16: functools.partial(shared, gate, "bf16"),
    }


def bench_decoder(
    name: str, prompt_encoder: PromptEncoder, decoder: MaskDecoder, embedding: Tensor, n: int, rounds: int
) -> Iterator[dict]:
    """Rows of the decoder's part: seconds for PROMPTS prompts, from `n` of them a round."""
    generator = torch.Generator().manual_seed(1)
    size = prompt_encoder.input_image_size[0]
    points = torch.rand(n, 1, 2, generator=generator) * size
    sparse, _ = prompt_encoder(points=(points, torch.ones(n, 1)), boxes=None, masks=None)
    batch = max(decoding.MIN_DECODE_BATCH, decoding.DECODE_PIXELS["cpu"] // embedding[0, 0].numel())
    trials = {}
    for size in STOCK_BATCHES:
        some = sparse[: max(size, 8)]
        row = decoder_rows(prompt_encoder, decoder, embedding, some, batch, size)["stock, its best batch"]
        row()
        seconds, _ = alternate({"": row}, 2)
        trials[size] = min(seconds[""]) / len(some)
    best = min(trials, key=trials.get)
    rows = decoder_rows(prompt_encoder, decoder, embedding, sparse, batch, best)
    once = {BF16: rows.pop(BF16)}
    seconds, logits = alternate(rows, rounds)
    for found, more in zip((seconds, logits), alternate(once, 1)):
        found.update(more)
    stock = logits["stock, batch 64"]
    for row in seconds:
        drawn = logits[row].flatten(2).abs().amax(2) > 0  # (n, 3): gated masks are left out
        difference = (logits[row][drawn] - stock[drawn]).abs()
        yield {
            "part": f"decoder, {name}",
            "row": row,
            "seconds": float(np.median(seconds[row])) * PROMPTS / n,
            "rounds": len(seconds[row]),
            "images": 1,
            "prompts": PROMPTS,
            "largest_logit_difference": float(difference.max()),
            "pixels_that_differ": float(((logits[row][drawn] > 0) != (stock[drawn] > 0)).float().mean()),
            "note": f"batch {best}" if row == "stock, its best batch" else "",
        }


def some_tokens(prompt_encoder: PromptEncoder, n: int) -> Tensor:
    points = torch.rand(n, 1, 2, generator=torch.Generator().manual_seed(3)) * prompt_encoder.input_image_size[0]
    return prompt_encoder(points=(points, torch.ones(n, 1)), boxes=None, masks=None)[0]
