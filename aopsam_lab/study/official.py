"""The official models and data sets: `python -m aopsam_lab.study.official budget | bench | exactness | loading | masks`.

*budget* counts products (torch's own counter, on tensors without content) and bytes and prints the table of
`reports/official.md`. *bench* measures here, with random weights: MobileSAM's encoder against its definition written
out, and a training step of its Prompt Predictor against the time that the machine's own matrix products take for as
much arithmetic. Ways of doing a thing take turns, and medians are compared. *exactness* compares the models' numbers
with their originals' (see `exactness`), *loading* COCO's loader with pycocotools (see `loading`). *masks* needs an
official file: its masks and tiny's from the same boxes and clicks, on the same pictures.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from aopsam_lab.data import open_dataset
from aopsam_lab.download import OFFICIAL
from aopsam_lab.predictor import PromptPredictor
from aopsam_lab.sam.mobile_reference import reference_embedding
from aopsam_lab.sam.zoo import MODELS, load_sam
from aopsam_lab.study import exactness, loading, quality
from aopsam_lab.training.embedding_cache import EmbeddingCache
from aopsam_lab.training.predictor import loss_of

GRID_PROMPTS = 16**2 + 32**2  # amg_s, amg_d
OTHER_PROMPTS = 2 * 100 + 4 * 110  # at most 100 boxes twice; four kinds of AoP-SAM with about the paper's 110 points


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations (two for a multiply-add) of the matrix products and convolutions that `run` makes."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def budget(pictures: int, epochs: int, images: int, tflops: float) -> str:
    """Disk and GPU hours of training on `pictures` and of a study of `images`, as Markdown.

    tflops: what the GPU sustains, in 10^12 operations a second.
    """
    lines = [
        "| SAM | weights | encoder | embeddings | cache in all | filling it | training | study |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in [name for name in MODELS if name in OFFICIAL]:
        with torch.device("cpu" if name == "mobile_sam" else "meta"):
            sam = MODELS[name]().eval()
        sam = sam.to("meta")
        side = sam.image_encoder.img_size
        image = torch.empty(1, 3, side, side, device="meta")
        embedding = torch.empty(1, sam.prompt_encoder.embed_dim, 64, 64, device="meta")
        predictor = PromptPredictor(sam.prompt_encoder.embed_dim, side // 64).to("meta").eval()
        with torch.inference_mode():
            encoder = flops(lambda: sam.image_encoder(image))
            forward = flops(lambda: predictor.cells(image, embedding))
            prompt = flops(lambda: _decode_one(sam, embedding))
        parts = EmbeddingCache(Path(), sam, pictures, {}).megabytes()
        study = images * (encoder + (GRID_PROMPTS + OTHER_PROMPTS) * prompt)
        hours = [work / (tflops * 1e12) / 3600 for work in (pictures * encoder, 3 * forward * pictures * epochs, study)]
        lines.append(
            f"| `{name}` | {OFFICIAL[name].size / 1e6:,.0f} MB | {encoder / 1e12:.2f} TFLOP | "
            f"{parts['embeddings'] / 1e3:.1f} GB | {sum(parts.values()) / 1e3:.1f} GB | "
            + " | ".join(f"{hour:.1f} h" for hour in hours)
            + " |"
        )
    return "\n".join(lines)


def _decode_one(sam, embedding: torch.Tensor) -> object:
    """One prompt through the stock mask decoder, three masks drawn."""
    width = embedding.shape[1]
    return sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=embedding,
        sparse_prompt_embeddings=torch.empty(1, 2, width, device="meta"),
        dense_prompt_embeddings=embedding,
        multimask_output=True,
    )


def encoder_seconds(rounds: int) -> dict[str, float]:
    """Medians of MobileSAM's encoder and of its definition written out, seconds a picture, taking turns."""
    torch.manual_seed(0)
    sam = MODELS["mobile_sam"]().eval()
    state, image = sam.state_dict(), torch.randn(1, 3, 1024, 1024)
    with torch.inference_mode():
        return _medians(
            {"ours": lambda: sam.image_encoder(image), "reference": lambda: reference_embedding(state, image)}, rounds
        )


def training_seconds(folder: Path, pictures: int, batch: int, steps: int) -> dict[str, float]:
    """The Prompt Predictor's training at MobileSAM's shape from a cache of random embeddings.

    step, floor: medians of a step's seconds, and of matrix products with as many operations, taking turns.
    peak_gb: the largest resident size of this process. epoch_s: what an epoch takes at that pace.
    """
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    sam = MODELS["mobile_sam"]().eval()
    sam.image_encoder.forward = lambda images: torch.randn(len(images), 256, 64, 64)  # the encoder is not what is timed
    cache = EmbeddingCache(folder, sam, pictures, {})
    cache.fill(sam, lambda row: (rng.integers(0, 256, (683, 1024, 3), dtype=np.uint8), rng.random((256, 256))))
    sam.image_encoder = torch.nn.Identity()
    predictor = PromptPredictor(256, 16).train()
    optimizer = torch.optim.Adam(predictor.parameters())
    batches = cache.batches(sam, (np.sort(rng.choice(pictures, batch, replace=False)) for _ in range(steps + 3)))

    def step() -> None:
        image, embedding, target, valid = next(batches)
        loss = loss_of("paper", predictor.cells(image, embedding), target, valid, 0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    operations = flops(step)
    side = 1024
    left, right = torch.randn(side, side), torch.randn(side, side)
    products = max(1, round(operations / (2 * side**3)))
    found = _medians({"step": step, "floor": lambda: [left @ right for _ in range(products)]}, steps)
    batches.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {**found, "peak_gb": peak / 1e9, "epoch_s": found["step"] * pictures / batch, "gflop": operations / 1e9}


def masks_table(name: str, checkpoint: str | None, folders: list[str], n_images: int | None, progress=iter) -> str:
    """Mean IoU of boxes and of one click, and Spearman's correlation of predicted and true IoU, of an official SAM and of
    tiny on the pictures of COCO-style folders, as Markdown (see `quality.prompted_truths`).

    Raises what `load_sam` and `open_dataset` raise.
    """
    sams = {name: load_sam(name, checkpoint, "auto"), "tiny": load_sam("tiny", device="auto")}
    parts = [quality.compare_masks(sams, Path(folder).resolve().name, open_dataset(folder, n_images), progress) for folder in folders]
    table = pd.concat(parts)
    lines = ["| pictures | n | truths | SAM | box | one click, best of 3 | Spearman |", "|:--|--:|--:|:--|--:|--:|--:|"]
    for row in table.to_dict("records"):
        measured = " | ".join(f"{row[key]:.3f}" for key in ("box", "click_1", "spearman"))
        lines.append(f"| {row['dataset']} | {row['n_images']} | {row['n_truth']} | `{row['sam']}` | {measured} |")
    return "\n".join(lines)


def _medians(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way, after one run unmeasured; each round begins with another one."""
    for run in ways.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    official = [name for name in MODELS if name in OFFICIAL]
    plan = commands.add_parser("budget", help="disk and GPU hours, by arithmetic")
    plan.add_argument("--pictures", type=int, default=10_000, help="trained on")
    plan.add_argument("--epochs", type=int, default=1000)
    plan.add_argument("--images", type=int, default=5000, help="of the study")
    plan.add_argument("--tflops", type=float, default=10.0, help="10^12 operations a second that the GPU sustains")
    measure = commands.add_parser("bench", help="measure on this machine")
    measure.add_argument("--rounds", type=int, default=7)
    measure.add_argument("--pictures", type=int, default=500, help="in the cache")
    measure.add_argument("--batch", type=int, default=4)
    measure.add_argument("--steps", type=int, default=7)
    exact = commands.add_parser("exactness", help="compare with the originals, at full size on random weights")
    exact.add_argument("names", nargs="*", metavar="SAM", help="mobile_sam, vit_b, vit_l, vit_h (all if none is named)")
    exact.add_argument("--checkpoint", type=Path, help="the .pt or .pth file of the one SAM named, in place of random weights")
    load = commands.add_parser("loading", help="compare COCO's loader with pycocotools, and measure it at COCO's size")
    load.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="COCO-style folders to compare on as well")
    load.add_argument("--pictures", type=int, default=5000, help="of the made-up COCO, 0.17 MB each in the temporary folder")
    masks = commands.add_parser("masks", help="masks of the same boxes and clicks, an official SAM's and tiny's")
    masks.add_argument("name", metavar="SAM", choices=official, help="mobile_sam, vit_b, vit_l or vit_h")
    masks.add_argument("--checkpoint", help="its weights, where they are not in the cache folder")
    masks.add_argument("--photos", nargs="+", required=True, metavar="FOLDER", help="COCO-style folders")
    masks.add_argument("--n-images", type=int, help="of each (default: all)")
    args = parser.parse_args(argv)
    if args.command == "budget":
        print(budget(args.pictures, args.epochs, args.images, args.tflops))
        return 0
    if args.command == "exactness":
        if unknown := set(args.names) - set(official):
            parser.error(f"no official SAM is called {', '.join(sorted(unknown))}: choose of {', '.join(official)}")
        if args.checkpoint is not None and len(args.names) != 1:
            parser.error("--checkpoint is the file of one SAM: name that one")
    try:
        if args.command == "exactness":
            return 0 if exactness.report(args.names or official, args.checkpoint) else 1
        if args.command == "masks":
            print(masks_table(args.name, args.checkpoint, args.photos, args.n_images, tqdm))
            return 0
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.command == "loading":
        with tempfile.TemporaryDirectory(prefix="aopsam_loading_") as folder:
            return 0 if loading.report(args.folders, args.pictures, Path(folder)) else 1
    with tempfile.TemporaryDirectory(prefix="aopsam_bench_") as folder:
        found = training_seconds(Path(folder), args.pictures, args.batch, args.steps)
    print(
        f"Predictor at MobileSAM's shape, {args.pictures} cached pictures, batch {args.batch}: {found['step']:.2f} s a "
        f"step of {found['gflop']:.0f} GFLOP; matrix products with as many take {found['floor']:.2f} s "
        f"({found['step'] / found['floor']:.2f} times that). An epoch: {found['epoch_s']:.0f} s. Peak of the process: "
        f"{found['peak_gb']:.2f} GB."
    )
    encoder = encoder_seconds(args.rounds)
    print(
        f"MobileSAM's encoder: {encoder['ours']:.2f} s, written out {encoder['reference']:.2f} s: ratio "
        f"{encoder['ours'] / encoder['reference']:.3f} ({torch.get_num_threads()} threads)."
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
