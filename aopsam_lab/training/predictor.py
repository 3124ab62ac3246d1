"""Train the Prompt Predictor of a SAM on embeddings cached once.

    python -m aopsam_lab.training.predictor --sam tiny --pools POOLS/scenes:0.5 POOLS/photos:0.5 --workdir runs/predictor --minutes 20

Target (ours): for each mask a Gaussian bump of height 1 at its pole of inaccessibility and lower ones at further points inside
it, each the pole of what discs about the earlier ones leave; sigma a third of the inradius within bounds; the maximum where
bumps meet. One click seldom gives a large object's best mask; on eight training scenes, AMG-style decoding at true poles alone
reached an mIoU of 0.549, with up to eight points a mask 0.572, on the 32 x 32 grid 0.584. SAM is frozen.

Presets. ``paper``: mean squared error, Adam, 1000 epochs (the paper's recipe). ``bundled`` (ours): binary cross-entropy in
which a cell at a peak weighs ``1 + PEAK_WEIGHT`` times an empty one, since peaks are a hundredth of all cells; Adam with a
cosine schedule. PEAK_WEIGHT is what sets how many candidates pass the default confidence of 0.2.

Writes ``workdir/predictor.safetensors`` and ``workdir/curve.csv``; ``--bundle`` copies the weights beside the package's own.
Killed and started again, it takes up the cache and the training where they were.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from dataclasses import dataclass
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
from aopsam_lab.files import write_atomically
from aopsam_lab.predictor import BUNDLED, PromptPredictor
from aopsam_lab.sam.zoo import load_sam, spec_of
from aopsam_lab.training.card import licence, pool_counts, write_card
from aopsam_lab.training.pool import parse_pools, read_entry
from aopsam_lab.training.tiny_sam import learning_rate, random_crop, save_atomically

PEAK_WEIGHT = 8.0
POINTS = 8  # bumps a mask
HEIGHT_DECAY = 0.85  # of each bump to the one before: the pole comes first
LEAST_RADIUS = 2.0  # in PCM cells: where less is left, one point more is one too many
SIGMA_BOUNDS = (1.2, 2.5)  # in PCM cells
HELD_OUT = 20  # every 20th picture of a pool is for choosing, not for training


def prompt_points(mask: np.ndarray, most: int = POINTS) -> list[tuple[int, int, float]]:
    """(row, column, inradius) of the cell deepest inside a mask, then of those deepest inside what is left of it when a disc
    of that radius is cut out, while its inradius is at least LEAST_RADIUS; the outside of the grid counts as outside."""
    left, points = mask.astype(np.uint8), []
    while len(points) < most:
        distance = cv2.distanceTransform(np.pad(left, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
        row, column = divmod(int(distance.argmax()), mask.shape[1])
        inradius = float(distance[row, column])
        if inradius < (LEAST_RADIUS if points else 1e-6):
            break
        points.append((row, column, inradius))
        cv2.circle(left, (column, row), int(max(inradius, 2 * LEAST_RADIUS)), 0, -1)
    return points


def confidence_target(masks: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Masks (N, h', w') on the PCM's grid, top left of it -> target (H, W) float32 in [0, 1]."""
    target = np.zeros(grid, np.float32)
    rows, columns = np.arange(grid[0], dtype=np.float32), np.arange(grid[1], dtype=np.float32)
    for mask in masks:
        for i, (row, column, inradius) in enumerate(prompt_points(mask)):
            sigma = float(np.clip(inradius / 3, *SIGMA_BOUNDS))
            bump = np.outer(np.exp(-0.5 * ((rows - row) / sigma) ** 2), np.exp(-0.5 * ((columns - column) / sigma) ** 2))
            np.maximum(target, HEIGHT_DECAY**i * bump, out=target)
    return target


@dataclass
class Cache:
    """Memory-mapped training data: images (n, 3, S, S) uint8, sizes (n, 2), embeddings (n, C, h, w) float16, targets (n, 4h, 4w)
    uint8 of 255 steps."""

    images: np.ndarray
    sizes: np.ndarray
    embeddings: np.ndarray
    targets: np.ndarray

    def batch(self, sam: Sam, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised pictures, embeddings, targets and weights (0 on padding) of the entries ``index``."""
        device = sam.device
        image = torch.from_numpy(self.images[index]).to(device).float()
        size = self.sizes[index]
        s, grid = image.shape[-1], self.targets.shape[1:]
        inside = torch.stack([valid_cells(tuple(hw), s, (s, s), device) for hw in size])
        valid = torch.stack([valid_cells(tuple(hw), s, grid, device) for hw in size])
        image = (image - sam.pixel_mean) / sam.pixel_std * inside[:, None]
        embedding = torch.from_numpy(self.embeddings[index]).to(device).float()
        target = torch.from_numpy(self.targets[index]).to(device).float() / 255
        return image, embedding, target, valid.float()


@torch.inference_mode()
def build_cache(sam: Sam, pools, count: int, folder: Path, seed: int, batch: int = 16) -> Cache:
    """``count`` random crops of the pools with their embeddings, on disk; resumes where it was stopped."""
    s = sam.image_encoder.img_size
    grid = sam.prompt_encoder.mask_input_size
    c, (h, w) = sam.prompt_encoder.embed_dim, sam.prompt_encoder.image_embedding_size
    key = dict(sam=spec_of(sam).sha256, count=count, seed=seed, points=POINTS, pools=[[share, len(paths)] for share, paths in pools])
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "cache.json"
    state = json.loads(note.read_text()) if note.exists() else {}
    done = state.get("done", 0) if state.get("key") == key else 0
    shapes = dict(images=((3, s, s), np.uint8), sizes=((2,), np.int64), embeddings=((c, h, w), np.float16), targets=(grid, np.uint8))
    mode = "r+" if done else "w+"
    cache = Cache(**{
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode, dtype, (count, *shape)) for name, (shape, dtype) in shapes.items()
    })
    shares = np.array([share for share, _ in pools])
    for first in tqdm(range(done, count, batch), desc="embeddings", initial=done // batch, total=-(-count // batch)):
        rows = range(first, min(first + batch, count))
        for row in rows:
            rng = np.random.default_rng([seed, row])
            paths = pools[rng.choice(len(pools), p=shares / shares.sum())][1]
            masks = np.zeros((0, 1, 1), bool)
            while not len(masks):
                image, masks = random_crop(rng, *read_entry(paths[rng.integers(len(paths))]))
                masks = masks[masks.sum((1, 2)) >= 8]
            cache.images[row] = 0
            cache.images[row, :, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
            cache.sizes[row] = image.shape[:2]
            cache.targets[row] = np.rint(confidence_target(masks, grid) * 255)
        rows = np.array(rows)
        image = cache.batch(sam, rows)[0]
        cache.embeddings[rows] = sam.image_encoder(image).half().cpu().numpy()
        note.write_text(json.dumps(dict(key=key, done=int(rows[-1]) + 1)))
    return cache


@torch.inference_mode()
def recall(sam: Sam, predictor: PromptPredictor, paths: list[Path], top: tuple[int, ...] = (32, 64, 128, 256)) -> dict[str, float]:
    """Share of truths with one of the strongest ``top`` candidates on them, over whole pictures; candidates at confidence 0.2."""
    s, grid = sam.image_encoder.img_size, sam.prompt_encoder.mask_input_size
    hits, truths, candidates = dict.fromkeys(top, 0), 0, []
    for path in paths:
        image, masks = whole_picture(*read_entry(path))
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy()).to(sam.device)[None]
        model_image = sam.preprocess(pixels)
        valid = valid_cells(image.shape[:2], s, grid, sam.device)
        pcm = predictor.pcm(model_image, sam.image_encoder(model_image), valid)
        cells = sample_prompts(pcm, confidence=0.02)[0].cpu().numpy()
        candidates.append(len(sample_prompts(pcm)[0]))
        cells = cells[(cells[:, 0] < masks.shape[1]) & (cells[:, 1] < masks.shape[2])]
        truths += len(masks)
        for k in top:
            on = masks[:, cells[:k, 0], cells[:k, 1]]
            hits[k] += int(on.any(1).sum())
    return {**{f"recall_{k}": hits[k] / max(1, truths) for k in top}, "candidates": float(np.mean(candidates))}


def whole_picture(image: np.ndarray, masks: np.ndarray, side: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Longest side to ``side`` (picture) and ``side / 2`` (masks), nothing cropped or changed."""
    scale = side / max(image.shape[:2])
    half = tuple(max(1, round(x * scale / 2)) for x in image.shape[1::-1])
    image = cv2.resize(image, (2 * half[0], 2 * half[1]), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    small = np.zeros((len(masks), half[1], half[0]), bool)
    for i, mask in enumerate(masks):
        small[i] = cv2.resize(mask.astype(np.uint8) * 255, half, interpolation=cv2.INTER_LINEAR) > 127
    return image, small[small.any((1, 2))]


def loss_of(preset: str, logits: Tensor, target: Tensor, valid: Tensor, peak_weight: float) -> Tensor:
    """Mean over the cells on the picture. logits, target, valid: (B, H, W)."""
    if preset == "paper":
        return ((logits.sigmoid() - target) ** 2 * valid).sum() / valid.sum()
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (bce * (1 + peak_weight * target) * valid).sum() / valid.sum()


def export(predictor: PromptPredictor, path: Path, about: dict[str, str]) -> None:
    """float16 safetensors with what a loader must know in the metadata; written beside, then renamed."""
    weights = {k: v.detach().cpu().half() if v.is_floating_point() else v.cpu() for k, v in predictor.state_dict().items()}
    about = dict(about, embed_dim=str(predictor.embed_dim), stride=str(predictor.stride))
    write_atomically(path, to_safetensors(weights, metadata=about))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    work = Path(args.workdir)
    sam = load_sam(args.sam, args.checkpoint, args.device)
    pools = parse_pools(args.pools)
    held = [path for _, paths in pools for path in paths[::HELD_OUT]][: args.held_out]
    pools = [(share, [path for i, path in enumerate(paths) if i % HELD_OUT]) for share, paths in pools]
    cache = build_cache(sam, pools, args.crops, work / "cache", args.seed)
    side, (h, _) = sam.image_encoder.img_size, sam.prompt_encoder.image_embedding_size
    predictor = PromptPredictor(sam.prompt_encoder.embed_dim, side // h).to(sam.device)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=args.lr)
    step, seconds = 0, 0.0
    if (work / "last.pt").exists():
        state = torch.load(work / "last.pt", map_location=sam.device, weights_only=True)
        predictor.load_state_dict(state["predictor"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    forward = torch.compile(predictor.logits, dynamic=False) if args.compile else predictor.logits
    started = time.perf_counter() - seconds
    rng = np.random.default_rng([args.seed, step])
    steps = 1000 * args.crops // args.batch if args.preset == "paper" and not args.minutes else 0
    recent = []

    def progress() -> float:
        return step / steps if steps else (time.perf_counter() - started) / (60 * args.minutes)

    def save() -> None:
        state = dict(predictor=predictor.state_dict(), optimizer=optimizer.state_dict(), step=step)
        save_atomically(dict(state, seconds=time.perf_counter() - started), work / "last.pt")

    with open(work / "curve.csv", "a", newline="") as curve:
        writer = csv.writer(curve)
        while progress() < 1:
            predictor.train()
            for group in optimizer.param_groups:
                group["lr"] = args.lr if args.preset == "paper" else learning_rate(progress(), step, args.lr, warmup=100)
            index = np.sort(rng.choice(args.crops, args.batch, replace=False))
            image, embedding, target, valid = cache.batch(sam, index)
            with torch.autocast(sam.device.type, torch.bfloat16):
                logits = forward(image, embedding)[:, 0].float()
            loss = loss_of(args.preset, logits, target, valid, args.peak_weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            recent.append(loss.item())
            if step % args.log_every == 0:
                found = recall(sam, predictor.eval(), held)
                minutes = (time.perf_counter() - started) / 60
                if curve.tell() == 0:
                    writer.writerow(["step", "minutes", "loss", *found])
                writer.writerow([step, f"{minutes:.2f}", f"{np.mean(recent):.5f}", *(f"{v:.4f}" for v in found.values())])
                curve.flush()
                print(f"step {step}  {minutes:.2f} min  loss {np.mean(recent):.4f}  {found}", flush=True)
                recent.clear()
                save()
    save()
    predictor.eval()
    about = dict(sam=spec_of(sam).name, sam_sha256=spec_of(sam).sha256, preset=args.preset, steps=str(step))
    facts = {
        "Model": f"{sum(p.numel() for p in predictor.parameters()) / 1e6:.2f} M parameters, for embeddings of {about['sam']} "
        f"(sha256 {about['sam_sha256'][:12]})",
        "Data": f"{args.crops} crops; pictures: {pool_counts(pools)}; scenes with training seeds only",
        "Training": f"preset {args.preset}, {step} steps of {args.batch}, {(time.perf_counter() - started) / 60:.0f} minutes, peak "
        f"weight {args.peak_weight:g}, by `python -m aopsam_lab.training.predictor`",
        "Licence": licence(pools),
    }
    about_curve = f"recall_k: share of truths with one of the k strongest candidates on them, {len(held)} held-out training pictures"
    for path in [work / "predictor.safetensors"] + ([BUNDLED[args.sam]] if args.bundle else []):
        export(predictor, path, about)
        write_card(path, f"Prompt Predictor of the {about['sam']} SAM.", facts, work / "curve.csv", about_curve)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sam", default="tiny")
    parser.add_argument("--checkpoint", help="weights of the SAM, where they are not bundled")
    parser.add_argument("--pools", nargs="+", required=True, help="FOLDER:SHARE of each pool")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--preset", choices=("bundled", "paper"), default="bundled")
    parser.add_argument("--minutes", type=float, default=20, help="0 with --preset paper: 1000 epochs")
    parser.add_argument("--crops", type=int, default=3000, help="cached crops; one of tiny's takes 0.5 MB of disk")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--peak-weight", type=float, default=PEAK_WEIGHT)
    parser.add_argument("--held-out", type=int, default=80, help="held-out pictures that the recall is measured on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--bundle", action="store_true", help="install the result as the bundled weights")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
