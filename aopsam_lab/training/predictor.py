"""Train the Prompt Predictor of a SAM on embeddings cached once.

    python -m aopsam_lab train-predictor --pools POOLS/scenes:0.5 POOLS/photos:0.5 --workdir runs/predictor --minutes 8
    python -m aopsam_lab train-predictor --sam vit_h --data sa1b:DIR --limit 10000

Presets. ``paper`` (with ``--data``, if not said otherwise): one Gaussian bump of height 1 a mask, at the data set's own prompt
point where it has one, else at the pole of inaccessibility, the maximum where bumps meet; mean squared error of the PCM, Adam,
1000 epochs (the paper's recipe). ``bundled`` (ours, with ``--pools``): the pole is worth 1 and further points inside the mask
less, each the pole of what discs about the earlier ones leave, since one click seldom gives an object's best mask; binary
cross-entropy of each cell's worth, in which one that is worth 1 weighs ``1 + PEAK_WEIGHT`` times an empty one, and cross-entropy
of the place in it; Adam with a cosine schedule. As in SA-1B, whose ``point_coords`` are points of SAM's own grid, a point moves
to the middle of the embedding's cell that it lies in where the mask still covers that. SAM is frozen.

Early stopping is ours: after ``--patience`` evaluations without a lower loss on the held-out pictures the best weights are kept.
Writes ``workdir/predictor.safetensors``, ``curve.csv`` and ``curve.png`` (drawn anew at each evaluation), the weights to
``--out`` as well.
Killed and started again, it takes up the cache and the training where they were.
"""

from __future__ import annotations

import argparse
import csv
import io
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from segment_anything.modeling import Sam
from torch import Tensor
from tqdm.auto import tqdm

from aopsam_lab.asf import sample_prompts, valid_cells
from aopsam_lab.data import open_dataset
from aopsam_lab.files import write_atomically
from aopsam_lab.predictor import CELL, SIGMA, PromptPredictor, draw_pcm
from aopsam_lab.sam.zoo import MODELS, load_sam, spec_of
from aopsam_lab.training.card import write_card
from aopsam_lab.training.embedding_cache import EmbeddingCache
from aopsam_lab.training.examples import DatasetExamples, Draw, PoolExamples
from aopsam_lab.training.pool import parse_pools
from aopsam_lab.training.tiny_sam import learning_rate, quick_at_bf16, save_atomically

PEAK_WEIGHT = 5.0
POINTS = 8  # bumps a mask
HEIGHT_DECAY = 0.2  # of each bump to the one before: a likely small object comes before a second try on a large one
DISC, LEAST_DISC = 0.6, 3.0  # a point's disc, in which no further one lies: of its inradius, and at least, in PCM cells
PLACE_WEIGHT = 0.1  # of the places' loss to the worths'
CANDIDATES = 280  # a picture at the default settings: of scenes, which give fewer, elimination leaves less than a fifth of AMG-D's 1,024
# Calibration's, of the worths' logits. Steeper, bumps are near 1 where the surest lie side by side, and smoothing prefers those to
# one by itself
SLOPE = 0.35
MIDDLE = 4.0  # calibration's, added to the logit of a cell's middle, where the points are that the bundled preset learns
PATIENCE = 20  # evaluations


def prompt_points(mask: np.ndarray, most: int = POINTS) -> list[tuple[int, int, float]]:
    """(row, column, inradius) of the cell deepest inside a mask, then of those deepest inside what is left of it when a disc
    about each point is cut out, until nothing is left or there are ``most``; the outside of the grid counts as outside."""
    left, points = mask.astype(np.uint8), []
    while len(points) < most and left.any():
        distance = cv2.distanceTransform(np.pad(left, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
        row, column = divmod(int(distance.argmax()), mask.shape[1])
        inradius = float(distance[row, column])
        points.append((row, column, inradius))
        cv2.circle(left, (column, row), int(max(DISC * inradius, LEAST_DISC)), 0, -1)
    return points


def snapped(row: int, column: int, mask: np.ndarray) -> tuple[int, int]:
    """The cell nearest the middle of the embedding's cell about (row, column) if the mask covers it, else (row, column)."""
    middle = row // CELL * CELL + CELL // 2, column // CELL * CELL + CELL // 2
    inside = middle[0] < mask.shape[0] and middle[1] < mask.shape[1] and mask[middle]
    return middle if inside else (row, column)


def confidence_target(
    masks: np.ndarray, points: np.ndarray | None, grid: tuple[int, int], most: int = POINTS, bumps: bool = False
) -> np.ndarray:
    """Masks (N, h', w') on the PCM's grid, top left of it -> target (H, W) float32 in [0, 1]: each point's worth where it lies.

    points: N x 2 (x, y) in PCM cells; where a data set has them, each is its mask's one point. most: else, points a mask.
    bumps: whether a point is drawn as a Gaussian bump of that height, not as one cell.
    """
    target = np.zeros(grid, np.float32)
    rows, columns = np.arange(grid[0], dtype=np.float32), np.arange(grid[1], dtype=np.float32)
    if points is not None:
        wanted = [[(min(int(y), grid[0] - 1), min(int(x), grid[1] - 1))] for x, y in points]
    else:
        wanted = [[snapped(row, column, mask) for row, column, _ in prompt_points(mask, most)] for mask in masks]
    for places in wanted:
        for i, (row, column) in enumerate(places):
            if bumps:
                bump = np.outer(np.exp(-0.5 * ((rows - row) / SIGMA) ** 2), np.exp(-0.5 * ((columns - column) / SIGMA) ** 2))
                np.maximum(target, HEIGHT_DECAY**i * bump, out=target)
            else:
                target[row, column] = max(target[row, column], HEIGHT_DECAY**i)
    return target


def target_of(preset: str, grid: tuple[int, int]) -> Draw:
    """What a preset learns: (masks, the data set's prompt points or None) -> target on the PCM's grid."""
    paper = preset == "paper"
    return partial(confidence_target, grid=grid, most=1 if paper else POINTS, bumps=paper)


@dataclass(frozen=True)
class Held:
    """A held-out picture: its pixels (h', w', 3) uint8 in the model frame, its embedding (1, C, h, w) float16, masks (N, ., .) bool
    on the PCM's grid, top left of it, its target and valid cells (H, W)."""

    image: np.ndarray
    embedding: Tensor
    masks: np.ndarray
    target: Tensor
    valid: Tensor

    def inputs(self, sam: Sam) -> tuple[Tensor, Tensor]:
        """What the predictor reads, as float32 on the SAM's device."""
        return _model_image(sam, self.image), self.embedding.float()


@torch.inference_mode()
def hold_out(sam: Sam, pictures: list[tuple[np.ndarray, np.ndarray]], draw: Draw) -> list[Held]:
    """Encode pictures once, with their masks on the PCM's grid, for the evaluations to come. draw: their target."""
    s, grid = sam.image_encoder.img_size, sam.prompt_encoder.mask_input_size
    held = []
    for image, masks in tqdm(pictures, desc="held out", unit="picture", dynamic_ncols=True):
        embedding = sam.image_encoder(_model_image(sam, image)).half()
        target = torch.from_numpy(draw(masks, None)).to(sam.device)
        held.append(Held(image, embedding, masks, target, valid_cells(image.shape[:2], s, grid, sam.device)))
    return held


def _model_image(sam: Sam, image: np.ndarray) -> Tensor:
    return sam.preprocess(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(sam.device)[None])


@torch.inference_mode()
def recall(sam: Sam, predictor: PromptPredictor, held: list[Held], top: tuple[int, ...] = (32, 64, 128, 256)) -> dict[str, float]:
    """Share of truths with one of the strongest ``top`` candidates on them, over whole pictures; candidates at confidence 0.2."""
    hits, truths, candidates = dict.fromkeys(top, 0), 0, []
    for one in held:
        pcm = predictor.pcm(*one.inputs(sam), one.valid)
        cells = sample_prompts(pcm, confidence=0.02)[0].cpu().numpy()
        candidates.append(len(sample_prompts(pcm)[0]))
        masks = one.masks
        cells = cells[(cells[:, 0] < masks.shape[1]) & (cells[:, 1] < masks.shape[2])]
        truths += len(masks)
        for k in top:
            on = masks[:, cells[:k, 0], cells[:k, 1]]
            hits[k] += int(on.any(1).sum())
    return {**{f"recall_{k}": hits[k] / max(1, truths) for k in top}, "candidates": float(np.mean(candidates)) if held else 0.0}


@torch.inference_mode()
def held_loss(sam: Sam, predictor: PromptPredictor, held: list[Held], preset: str, peak_weight: float) -> float:
    """The mean loss of the held-out pictures; NaN without any."""
    losses = [
        loss_of(preset, predictor.cells(*one.inputs(sam)), one.target[None], one.valid[None].float(), peak_weight).item()
        for one in held
    ]
    return float(np.mean(losses)) if losses else float("nan")


@torch.inference_mode()
def calibrate(sam: Sam, predictor: PromptPredictor, held: list[Held], wanted: float) -> tuple[float, float]:
    """Bring the worths' logits to ``SLOPE`` times their size and shift them so that the pictures give ``wanted`` candidates on
    average at the default settings. The shift, and the candidates that it gives: fewer where peaks are too few, as early in a
    training.

    What a network trained on sparse bumps calls 0.2 depends on the loss's weights. This gives the default confidence a meaning.
    Shifted alone, the surest would all be near 1 where the bumps of neighbours meet, and their order lost.
    """
    for parameter in (predictor.fuse[-1].weight, predictor.fuse[-1].bias):
        parameter[0] *= SLOPE
    cells = [(*predictor.cells(*one.inputs(sam)), one.valid) for one in held]

    def candidates(shift: float) -> float:
        pcms = (draw_pcm(worth + shift, place)[0, 0] * valid for worth, place, valid in cells)
        return float(np.mean([len(sample_prompts(pcm)[0]) for pcm in pcms]))

    low, high = -8.0, 8.0
    wanted = min(wanted, candidates(high))  # where that is all there are, no further than they need: near 1 their order is lost
    for _ in range(24):
        shift = (low + high) / 2
        low, high = (shift, high) if candidates(shift) < wanted else (low, shift)
    predictor.fuse[-1].bias[0] += high
    return high, candidates(high)


def prefer_middles(predictor: PromptPredictor) -> None:
    """Move a cell's prompt off its middle only where the place is sure.

    Prompts of neighbouring cells then lie a cell apart, which is just outside the window of the default spacing; where their
    places stray towards each other, the weaker one is lost.
    """
    predictor.fuse[-1].bias[1 + CELL // 2 * CELL + CELL // 2] += MIDDLE


def loss_of(preset: str, cells: tuple[Tensor, Tensor], target: Tensor, valid: Tensor, peak_weight: float) -> Tensor:
    """Mean over the cells on the picture. cells: (B, h, w) and (B, 16, h, w) logits. target, valid: (B, 4h, 4w)."""
    worth, place = cells
    if preset == "paper":
        return ((draw_pcm(worth, place, soft=True)[:, 0] - target) ** 2 * valid).sum() / valid.sum()
    inside = F.pixel_unshuffle(target[:, None], CELL)  # (B, 16, h, w)
    true, at = inside.max(1)
    on = F.max_pool2d(valid, CELL)
    bce = F.binary_cross_entropy_with_logits(worth, true, reduction="none")
    places = F.cross_entropy(place, at, reduction="none") * true
    return (bce * (1 + peak_weight * true) * on).sum() / on.sum() + PLACE_WEIGHT * places.sum() / true.sum().clamp(min=1)


def export(predictor: PromptPredictor, path: Path, about: dict[str, str]) -> None:
    """float16 safetensors with what a loader must know in the metadata; written beside, then renamed."""
    weights = {k: v.detach().cpu().half() if v.is_floating_point() else v.cpu() for k, v in predictor.state_dict().items()}
    about = dict(about, embed_dim=str(predictor.embed_dim), stride=str(predictor.stride))
    write_atomically(path, to_safetensors(weights, metadata=about))


def train(args: argparse.Namespace) -> None:
    """Train as the arguments say. Raises ValueError and OSError for what cannot be: data, models, room on the disk."""
    torch.manual_seed(args.seed)
    preset = args.preset or ("bundled" if args.pools else "paper")
    minutes = (8.0 if preset == "bundled" else 0.0) if args.minutes is None else args.minutes
    patience = (0 if args.pools else PATIENCE) if args.patience is None else args.patience
    work = Path(args.workdir or f"runs/predictor_{args.sam}")
    sam = load_sam(args.sam, args.checkpoint, args.device)
    draw = target_of(preset, sam.prompt_encoder.mask_input_size)
    if args.pools:
        held_out = 80 if args.held_out is None else args.held_out
        examples = PoolExamples(parse_pools(args.pools), sam, args.limit or 3000, held_out, args.seed)
    else:
        held_out = 20 if args.held_out is None else args.held_out
        examples = DatasetExamples(open_dataset(args.data, args.limit, args.seed), sam, held_out)
    made_from = {"target": preset, **({"worths": [POINTS, HEIGHT_DECAY]} if preset == "bundled" else {})}
    cache = EmbeddingCache(work / "cache", sam, examples.count, {**made_from, **examples.key})
    cache.fill(sam, lambda row: examples.entry(row, draw), args.max_gb)
    held = hold_out(sam, examples.held_out(), draw)
    side, (h, _) = sam.image_encoder.img_size, sam.prompt_encoder.image_embedding_size
    predictor = PromptPredictor(sam.prompt_encoder.embed_dim, side // h).to(sam.device)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=args.lr)
    step, seconds, best, stale = 0, 0.0, float("inf"), 0
    if (work / "last.pt").exists():
        state = torch.load(work / "last.pt", map_location=sam.device, weights_only=True)
        predictor.load_state_dict(state["predictor"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        best, stale = state["best"], state["stale"]
    forward = torch.compile(predictor.cells, dynamic=False) if args.compile else predictor.cells
    started = time.perf_counter() - seconds
    batch = min(args.batch or (8 if side <= 512 else 4), examples.count)
    steps = max(1, args.epochs * examples.count // batch) if preset == "paper" and not minutes else 0
    recent = []

    def progress() -> float:
        return step / steps if steps else (time.perf_counter() - started) / (60 * minutes)

    def save() -> None:
        state = dict(predictor=predictor.state_dict(), optimizer=optimizer.state_dict(), step=step, best=best, stale=stale)
        save_atomically(dict(state, seconds=time.perf_counter() - started), work / "last.pt")

    def draws():
        rng = np.random.default_rng([args.seed, step])
        while True:
            yield np.sort(rng.choice(examples.count, batch, replace=False))

    batches = cache.batches(sam, draws())
    bar = tqdm(total=steps or None, initial=step, desc="training", unit="step", dynamic_ncols=True)
    with open(work / "curve.csv", "a", newline="") as curve, closing(batches), bar:
        writer = csv.writer(curve)
        while progress() < 1 and not (patience and stale >= patience):
            predictor.train()
            for group in optimizer.param_groups:
                group["lr"] = args.lr if preset == "paper" else learning_rate(progress(), step, args.lr, warmup=100)
            image, embedding, target, valid = next(batches)
            with torch.autocast(sam.device.type, torch.bfloat16, enabled=quick_at_bf16(sam.device)):
                cells = forward(image, embedding)
            loss = loss_of(preset, tuple(x.float() for x in cells), target, valid, args.peak_weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            recent.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{recent[-1]:.4f}", refresh=False)
            if step % args.log_every == 0 or progress() >= 1:  # a curve says where its training ended
                found = {"held_loss": held_loss(sam, predictor.eval(), held, preset, args.peak_weight)}
                found.update(recall(sam, predictor, held))
                if found["held_loss"] < best:
                    best, stale = found["held_loss"], 0
                    save_atomically(predictor.state_dict(), work / "best.pt")
                else:
                    stale += 1
                passed = (time.perf_counter() - started) / 60
                if curve.tell() == 0:
                    writer.writerow(["step", "minutes", "loss", *found])
                writer.writerow([step, f"{passed:.2f}", f"{np.mean(recent):.5f}", *(f"{v:.4f}" for v in found.values())])
                curve.flush()
                draw_curve(work / "curve.csv", work / "curve.png")
                bar.write(f"step {step}  {passed:.2f} min  loss {np.mean(recent):.4f}  {found}")
                recent.clear()
                save()
    save()
    if patience and (work / "best.pt").exists():
        predictor.load_state_dict(torch.load(work / "best.pt", map_location=sam.device, weights_only=True))
    predictor.eval().requires_grad_(False)
    if preset == "bundled":
        prefer_middles(predictor)
    shift, found = calibrate(sam, predictor, held, args.candidates) if args.candidates and held else (0.0, 0.0)
    about = dict(sam=spec_of(sam).name, sam_sha256=spec_of(sam).sha256, preset=preset, steps=str(step))
    stopped = f"; stopped after {patience} evaluations without a lower held-out loss" if patience and stale >= patience else ""
    kept = "; the weights of the lowest held-out loss kept" if patience else ""
    few = f" ({args.candidates:g} were asked for: its peaks are too few, a longer training finds more)" if found < 0.9 * args.candidates else ""
    data = examples.facts()
    facts = {
        "Model": f"{sum(p.numel() for p in predictor.parameters()) / 1e6:.2f} M parameters, for embeddings of {about['sam']} "
        f"(sha256 {about['sam_sha256'][:12]})",
        "Data": data["Data"],
        "Training": f"preset {preset}, {step} steps of {batch}, {(time.perf_counter() - started) / 60:.0f} minutes, peak "
        f"weight {args.peak_weight:g}, by `python -m aopsam_lab train-predictor`{stopped}{kept}",
        "Calibration": f"logits of worths times {SLOPE:g} and moved by {shift:+.2f}, so that {len(held)} held-out training pictures give {found:.0f} candidates "
        f"each at the default settings{few}{f'; a middle that is {MIDDLE:g} likelier' if preset == 'bundled' else ''}" if shift else "none",
        "Licence": data["Licence"],
    }
    about_curve = f"recall_k: share of truths with one of the k strongest candidates on them, {len(held)} held-out training pictures"
    for path in [work / "predictor.safetensors"] + ([args.out] if args.out else []):
        export(predictor, path, about)
        write_card(path, f"Prompt Predictor of the {about['sam']} SAM.", facts, work / "curve.csv", about_curve)
    if shift and few:
        print(f"The predictor gives {found:.0f} candidates a picture{few}.")
    print(f"Prompt Predictor: {work / 'predictor.safetensors'}")


def draw_curve(table: Path, picture: Path) -> None:
    """The learning curve of a CSV as a PNG."""
    from matplotlib.figure import Figure

    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: [float(row[name]) for row in rows] for name in rows[0]}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in columns:
        if name in ("step", "minutes", "candidates"):
            continue
        axes = left if "loss" in name else right
        axes.plot(columns["step"], columns[name], label=name.replace("_", " "))
    for axes, title in ((left, "loss"), (right, "recall on held-out pictures")):
        axes.set(title=title, xlabel="step")
        axes.legend()
        axes.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    write_atomically(picture, drawn.getvalue())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a training, for this module and for the package's command line."""
    parser.add_argument("--sam", default="tiny", choices=list(MODELS))
    parser.add_argument("--checkpoint", help="weights of the SAM other than the bundled or official ones")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", help="sa1b:PATH, coco:PATH, lvis:PATH or a COCO-style folder")
    data.add_argument("--pools", nargs="+", help="FOLDER:SHARE of each pool (see aopsam_lab.training.pool); tiny only")
    parser.add_argument("--limit", "--crops", type=int, help="how many pictures of --data (all) or crops of --pools (3000)")
    parser.add_argument("--max-gb", type=float, help="most disk that the cache may take; what is free if not given")
    parser.add_argument("--workdir", help="where the cache, the curve and the weights go (runs/predictor_SAM)")
    parser.add_argument("--preset", choices=("bundled", "paper"), help="bundled with --pools, else paper")
    parser.add_argument("--epochs", type=int, default=1000, help="of preset paper")
    parser.add_argument("--minutes", type=float, help="in place of epochs (preset bundled: 8; longer, it knows 12,000 crops by heart)")
    parser.add_argument("--patience", type=int, help=f"evaluations without a lower held-out loss; 0: never stop early ({PATIENCE} with --data)")
    parser.add_argument("--batch", type=int, help="pictures a step (8; 4 of 1024 pixels, which train in less than 2 GB)")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--peak-weight", type=float, default=PEAK_WEIGHT)
    parser.add_argument("--candidates", type=float, default=CANDIDATES, help="mean of a held-out picture; 0: leave the level as trained")
    parser.add_argument("--held-out", type=int, help="pictures that loss and recall are measured on (20 of --data, 80 of --pools)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--out", type=Path, help="where the weights go as well, and the card beside them")
    parser.add_argument("--seed", type=int, default=0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
