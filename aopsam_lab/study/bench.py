"""`make bench`: what each technique of fast decoding gives, switched on one after the other, against segment_anything's
own code.

Three parts. *Decoder*: prompts in, logits out, at tiny SAM's shape (bundled weights) and at MobileSAM's (random
weights: speed and exactness do not depend on them). *Everything*: a 32 x 32 grid on pictures, prompts in, filtered RLE
masks out, encoder outside, as they are and enlarged to 1500 x 2250. *Memory*: the second part's first and last row in a
process of its own.

Rows of a part take turns, each round beginning with another one, so that whatever slows the machine meets all alike;
what counts is the ratio of medians. A row's masks are compared with the stock ones of the same picture.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from pycocotools import mask as coco_mask
from segment_anything.modeling import Sam
from segment_anything.utils.amg import (
    batched_mask_to_box,
    build_point_grid,
    calculate_stability_score,
    coco_encode_rle,
    mask_to_rle_pytorch,
)
from torchvision.ops import nms

from aopsam_lab import decoding, pipeline
from aopsam_lab.batching import halving
from aopsam_lab.data import open_dataset
from aopsam_lab.decoding import BOX_NMS_THRESH, STABILITY_OFFSET, Encoded, encode, full_resolution
from aopsam_lab.evaluator import evaluate
from aopsam_lab.files import write_atomically
from aopsam_lab.fullsize import FullSize
from aopsam_lab.predictor import load_predictor
from aopsam_lab.rle import encode_rle
from aopsam_lab.sam.zoo import load_sam
from aopsam_lab.study import memory
from aopsam_lab.study.bench_decoder import BF16, MULTIMASK, alternate, bench_decoder, decoder_rows, random_modules, some_tokens
from aopsam_lab.study.bench_page import PROMPTS, bars_table, figure, page, with_ratios
from aopsam_lab.study.figures import png
from aopsam_lab.study.output import to_csv
from aopsam_lab.study.page import BENCH, write_index
from aopsam_lab.study.provenance import provenance
from aopsam_lab.study.settings import package_environment
from aopsam_lab.study.stock import stock_records

LARGE = (1500, 2250)  # (height, width)
ALL = "batches side by side"  # every technique: what the package does
MEMORY_ROWS = ("stock generator", ALL)


# --- everything -------------------------------------------------------------------------------------------------------


def stock_generator(sam: Sam, encoded: Encoded) -> list[dict]:
    return [record["segmentation"] for record in stock_records(sam, encoded)]


def composed(sam: Sam, encoded: Encoded, gate: bool, outlines: bool) -> list[dict]:
    """The generator's steps with ours put in one by one: the decoder, then undrawn masks below the IoU threshold, then
    stability and
    boxes from the outlines. What is not ours is segment_anything's: whole masks at full size, RLE of all that are
    stable."""
    spec, decoder = sam.spec, decoding.image_decoder(sam, encoded)
    grid = torch.from_numpy(build_point_grid(32) * encoded.image.shape[1::-1]).float()
    prompts = decoding.Prompts(grid, torch.ones(len(grid)))
    iou, boxes, rles = [], [], []
    for part in torch.arange(len(grid)).split(decoding.decode_batch(encoded)):
        decoded = decoder.decode(decoding._sparse_tokens(sam, encoded, prompts, part))
        good = torch.zeros_like(decoded.iou, dtype=torch.bool)
        good[:, MULTIMASK] = decoded.iou[:, MULTIMASK] > spec.pred_iou_thresh
        drawn = good.clone()
        if not gate:
            drawn[:, MULTIMASK] = True
        low = decoded.draw(drawn)[good[drawn]]
        if not len(low):
            continue
        if outlines:
            stability, box = decoding.full_size(sam, encoded).measure(low, sam.mask_threshold, STABILITY_OFFSET)
            stable = stability >= spec.stability_score_thresh
            full = full_resolution(sam, encoded, low[stable]) > sam.mask_threshold
            box = box[stable]
        else:
            full = full_resolution(sam, encoded, low)
            stability = calculate_stability_score(full, sam.mask_threshold, STABILITY_OFFSET)
            stable = stability >= spec.stability_score_thresh
            full = full[stable] > sam.mask_threshold
            box = batched_mask_to_box(full)
        iou.append(decoded.iou[good][stable])
        boxes.append(box)
        rles += mask_to_rle_pytorch(full)
    keep = nms(torch.cat(boxes).float(), torch.cat(iou), BOX_NMS_THRESH)
    return [coco_encode_rle(rles[i]) for i in keep.tolist()]


def ours(sam: Sam, encoded: Encoded, method: str, predictor=None, precision: str = "float32") -> list[dict]:
    decode = functools.partial(decoding.decode_and_filter, precision=precision)
    return pipeline.run_method(sam, encoded, method, predictor, decode=decode).masks


def one_by_one(sam: Sam, encoded: Encoded, method: str) -> list[dict]:
    """As `ours`, one batch after the other, all threads at work on each."""
    side_by_side = decoding.in_batches
    decoding.in_batches = lambda items, size, work, least=1: halving(items, size, work)
    try:
        return ours(sam, encoded, method)
    finally:
        decoding.in_batches = side_by_side


def everything_rows(sam: Sam, predictor, encoded: Encoded) -> dict[str, Callable[[], list[dict]]]:
    """The techniques of the whole way from prompts to RLE by name; each includes those before it."""

    def fresh(function, *arguments):
        encoded.made.clear()
        return function(sam, encoded, *arguments)

    return {
        "stock generator": functools.partial(fresh, stock_generator),
        "pixels stay with the image": functools.partial(fresh, composed, False, False),
        "IoU before pixels": functools.partial(fresh, composed, True, False),
        "stability and boxes by outline": functools.partial(fresh, composed, True, True),
        "RLE of survivors, by outline": functools.partial(fresh, one_by_one, "amg_d"),
        ALL: functools.partial(fresh, ours, "amg_d"),
        BF16: functools.partial(fresh, ours, "amg_d", None, "bf16"),
        "aop": functools.partial(fresh, ours, "aop", predictor),
    }


def agreement(masks: list[dict], stock: list[dict]) -> tuple[bool, float]:
    """Whether there are as many, and the lowest IoU of any mask with its best partner, both ways."""
    if not masks or not stock:
        return len(masks) == len(stock), 1.0 if len(masks) == len(stock) else 0.0
    masks = [{"size": list(map(int, m["size"])), "counts": m["counts"]} for m in masks]
    iou = coco_mask.iou(masks, stock, [0] * len(stock))
    return len(masks) == len(stock), float(min(iou.max(0).min(), iou.max(1).min()))


def bench_everything(
    name: str, sam: Sam, predictor, samples: list, size: tuple[int, int] | None, rows: list[str]
) -> Iterator[dict]:
    """Rows of the second part on each sample once, enlarged to `size` where given; medians over the samples."""
    seconds, scores, counts = defaultdict(list), defaultdict(list), defaultdict(list)
    same, lowest = defaultdict(lambda: True), defaultdict(lambda: 1.0)
    for n, sample in enumerate(samples):
        encoded, truths = prepared(sam, sample, size)
        chosen = everything_rows(sam, predictor, encoded)
        chosen = {row: run for row, run in chosen.items() if row in rows and (row != BF16 or n == 0)}
        if n == 0:
            chosen["aop" if "aop" in chosen else next(iter(chosen))]()  # whatever is loaded at first use
        names = list(chosen)
        order = names[n % len(names) :] + names[: n % len(names)]
        times, masks = alternate({row: chosen[row] for row in order}, 1)
        for row in names:
            seconds[row] += times[row]
            counts[row].append(len(masks[row]))
            scores[row].append(evaluate(truths, [_bytes(m) for m in masks[row]]).miou)
            if row != "aop" and "stock generator" in masks:
                equal, iou = agreement(masks[row], masks["stock generator"])
                same[row], lowest[row] = same[row] and equal, min(lowest[row], iou)
    for row in seconds:
        yield {
            "part": f"everything, {name}",
            "row": row,
            "seconds": float(np.median(seconds[row])),
            "rounds": 1,
            "images": len(seconds[row]),
            "prompts": PROMPTS,
            "masks": float(np.mean(counts[row])),
            "as_many_masks": "" if row == "aop" else same[row],
            "lowest_match_iou": float("nan") if row == "aop" else lowest[row],
            "miou": float(np.nanmean(scores[row])),
        }


def prepared(sam: Sam, sample, size: tuple[int, int] | None) -> tuple[Encoded, list[dict]]:
    """A sample encoded, and its truths as RLE; enlarged to `size` (H, W), turned where the picture stands upright."""
    image, masks = sample.image, sample.masks
    if size is not None:
        height, width = size if image.shape[1] >= image.shape[0] else size[::-1]
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
        masks = [cv2.resize(m.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0 for m in masks]
        masks = np.array(masks).reshape(-1, height, width)
    return encode(sam, image), encode_rle(masks)


def _bytes(rle: dict) -> dict:
    counts = rle["counts"]
    return {"size": list(map(int, rle["size"])), "counts": counts.encode() if isinstance(counts, str) else counts}


# --- memory, profile --------------------------------------------------------------------------------------------------


def peak_memory(row: str, image: np.ndarray) -> float:
    """MiB that a row of the second part takes beyond models and embedding, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="aopsam_bench_") as folder:
        path = Path(folder, "image.npy")
        np.save(path, image)
        command = [sys.executable, "-m", "aopsam_lab.study.bench", "--measure-memory", row, str(path)]
        run = subprocess.run(command, capture_output=True, text=True, env=package_environment())
    if run.returncode:
        raise RuntimeError(f"Measuring the memory of {row} failed: {run.stderr.strip()[-800:]}")
    return float(json.loads(run.stdout.splitlines()[-1]))


def measure_memory(row: str, path: str) -> None:
    """The measuring process. A small picture comes first, so that what libraries load at first use does not count."""
    sam, predictor = load_sam("tiny", device="cpu"), load_predictor("tiny", device="cpu")
    with torch.inference_mode():
        everything_rows(sam, predictor, encode(sam, np.zeros((8, 8, 3), np.uint8)))["aop"]()
        encoded = encode(sam, np.load(path))
        run = everything_rows(sam, predictor, encoded)[row]
        before = memory._start_peak()
        run()
    print(json.dumps(max(memory._peak() - before, 0) / memory.MIB))


@contextmanager
def timed(seconds: dict[str, float], places: dict[str, tuple[object, str]]) -> Iterator[None]:
    """Sum up the time spent in functions: name -> (module or class, attribute)."""
    before = {name: getattr(*place) for name, place in places.items()}

    def wrap(name: str, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

        return call

    try:
        for name, (owner, attribute) in places.items():
            setattr(owner, attribute, wrap(name, before[name]))
        yield
    finally:
        for name, (owner, attribute) in places.items():
            setattr(owner, attribute, before[name])


def profile(name: str, run: Callable[[], object]) -> Iterator[dict]:
    """Where a run's time goes, by step, on one thread: on several, steps of different prompts run side by side."""
    from aopsam_lab.sam.shared import SharedDecoder

    seconds: dict[str, float] = {}
    places = {
        "tables of the image": (SharedDecoder, "__init__"),
        "transformer": (SharedDecoder, "decode"),
        "masks drawn": (SharedDecoder, "draw"),
        "stability and boxes": (FullSize, "measure"),
        "NMS": (decoding, "nms"),
        "RLE": (FullSize, "encode"),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with timed(seconds, places):
            start = time.perf_counter()
            run()
            total = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    seconds["the rest"] = total - sum(seconds.values())
    for step, value in seconds.items():
        yield {"run": name, "step": step, "seconds": value, "share": value / total}


def gemm_speed() -> float:
    """Multiply-adds a second of a large float32 product here: what bounds the decoder from below."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds, _ = alternate({"": lambda: a @ b}, 9)
    return 1024**3 / min(seconds[""])


# --- all of it --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def run_bench(
    dataset: str = "scenes", n_images: int = 3, seed: int = 0, rounds: int = 3, prompts: int = 64, large: int = 1,
    with_memory: bool = True, out: str = "reports/bench", only: str = "",
) -> Path:  # fmt: skip
    """Measure all, write CSV, figure and page to `out`; the page's path.

    dataset, n_images, seed: as open_dataset. rounds, prompts: of the decoder's part. large: how many of the images are
    also enlarged.
    only: parts whose name has this in it.
    """
    warnings.filterwarnings("ignore", message=".*autocast.*")
    sam, predictor = load_sam("tiny", device="cpu"), load_predictor("tiny", device="cpu")
    images = open_dataset(dataset, n_images, seed)
    samples = [images[i] for i in range(len(images))]
    rows, steps = [], []
    tiny = encode(sam, samples[0].image)

    def add(found) -> None:
        for row in found:
            rows.append(row)
            print(f"{row['part']:26} {row['row']:34} {row['seconds']:9.3f} s", flush=True)

    if only in "decoder, tiny":
        add(bench_decoder("tiny", sam.prompt_encoder, sam.mask_decoder, tiny.embedding, prompts, rounds))
    if only in "decoder, MobileSAM":
        prompt_encoder, decoder = random_modules(256, 64, 2048)
        embedding = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(2))
        add(bench_decoder("MobileSAM", prompt_encoder, decoder, embedding, prompts, rounds))
        gated = decoder_rows(prompt_encoder, decoder, embedding, some_tokens(prompt_encoder, 16), 4, 1)
        steps += profile("decoder, MobileSAM, 16 prompts, 35% drawn", gated["IoU before pixels, 35% pass"])
    sizes = [("as they are", None, samples)] + ([("1500 x 2250", LARGE, samples[:large])] if large else [])
    for name, size, chosen in sizes:
        if only not in f"everything, {name}":
            continue
        skipped = [] if size is None else ["pixels stay with the image", "IoU before pixels", "RLE of survivors, by outline", BF16]
        wanted = [row for row in everything_rows(sam, predictor, tiny) if row not in skipped]
        add(bench_everything(name, sam, predictor, chosen, size, wanted))
        encoded, _ = prepared(sam, samples[0], size)
        for row in (ALL, "aop"):
            steps += profile(f"everything, {name}, {row}", everything_rows(sam, predictor, encoded)[row])
        if with_memory:
            for row in rows:
                if row["part"] == f"everything, {name}" and row["row"] in MEMORY_ROWS:
                    row["peak_mib"] = peak_memory(row["row"], encoded.image)
    table = with_ratios(pd.DataFrame(rows))
    if "peak_mib" not in table:
        table["peak_mib"] = float("nan")
    bars, steps = bars_table(table), pd.DataFrame(steps)
    about = {
        "dataset": images.describe(),
        "gemm_gmacs": gemm_speed() / 1e9,
        "rounds": rounds,
        "prompts_a_round": prompts,
        **provenance(torch.device("cpu")),
    }
    folder = Path(out)
    for name, frame in (("bench", table), ("bars", bars), ("profile", steps)):
        write_atomically(folder / f"{name}.csv", to_csv(frame))
    write_atomically(folder / "bench.png", png(figure(table)))
    write_atomically(folder / "bench.json", json.dumps(about, indent=2) + "\n")
    print(bars.to_string(index=False), steps.to_string(index=False), sep="\n\n")
    written = write_atomically(folder / "bench.html", page(table, bars, steps, about))
    if folder.name == BENCH:
        write_index(folder.parent)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m aopsam_lab.study.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="scenes", help="scenes, or a COCO-style folder")
    parser.add_argument("--n-images", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="of the decoder's part")
    parser.add_argument("--prompts", type=int, default=64, help="of the decoder's part, a round")
    parser.add_argument("--large", type=int, default=1, help="how many of the images are also enlarged to 1500 x 2250")
    parser.add_argument("--no-memory", dest="with_memory", action="store_false")
    parser.add_argument("--only", default="", help="parts whose name has this in it")
    parser.add_argument("--out", default="reports/bench")
    parser.add_argument("--measure-memory", nargs=2, metavar=("ROW", "IMAGE"), help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    request = options.pop("measure_memory")
    if request:
        measure_memory(*request)
        return 0
    print(f"Report: {run_bench(**options)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
