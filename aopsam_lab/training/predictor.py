"""Train the Prompt Predictor of a SAM on photographs with ground truth.

    python -m aopsam_lab train-predictor --data FOUND --out predictor.safetensors --minutes 15
    python -m aopsam_lab train-predictor --sam vit_h --data sa1b:DIR --preset paper --out predictor.safetensors

Presets. ``paper``: one Gaussian a mask, at the prompt point that the data set gives or else at the pole of
inaccessibility; mean squared error of the PCM, Adam, 1000 epochs: the paper's recipe. ``bundled`` (ours): a Gaussian at
each of the prompts that together give all masks (`find-masks` writes which clicks give a mask), the focal loss of
heatmaps, Adam with a cosine schedule. SAM is frozen; its embeddings are computed once and kept. Every eighth photograph
or so is held out: the curve is measured on these.

A stopped training goes on from its last evaluation.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from segment_anything.modeling import Sam
from torch import Tensor
from tqdm import tqdm

from aopsam_lab.asf import sample_prompts
from aopsam_lab.data import Dataset, open_dataset
from aopsam_lab.files import write_atomically
from aopsam_lab.predictor import PromptPredictor
from aopsam_lab.sam.zoo import MODELS, load_sam, spec_of
from aopsam_lab.training.examples import PLACES, Example, Examples, cache_embeddings

TOP = (64, 128, 256)  # candidates that recall is measured for
HELD_OUT = 8  # one photograph in so many is held out
WARMUP = 50  # steps


@dataclass(frozen=True)
class Recipe:
    """How a predictor is trained.

    place: where the prompts lie that it learns, see `examples.PLACES`. loss: "mse" or "focal".
    cosine: whether the learning rate falls along a cosine; else it stays.
    """

    place: str
    loss: str
    cosine: bool


PRESETS = {"paper": Recipe("own", "mse", cosine=False), "bundled": Recipe("covering", "focal", cosine=True)}


def mean_squared_error(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Of the PCM, over the cells on the image: logits, target, valid (B, 4h, 4w)."""
    return ((logits.sigmoid() - target).square() * valid).sum() / valid.sum()


def focal_loss(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """The penalty-reduced focal loss of heatmaps, a prompt's mean.

    Cells near a prompt count less as empty ones, and cells that are told right already count little.

    Args:
        logits: (B, 4h, 4w), the PCM before the Sigmoid.
        target: (B, 4h, 4w) in [0, 1], 1 in the cell of a prompt.
        valid: (B, 4h, 4w), 1 on the image and 0 on padding.

    Source: Law and Deng, CornerNet, ECCV 2018, equation 1, alpha 2 and beta 4.
    """
    peak = (target > 0.99).to(logits.dtype)
    p = logits.sigmoid()
    hit = peak * (1 - p).square() * F.logsigmoid(logits)
    miss = (1 - peak) * (1 - target) ** 4 * p.square() * F.logsigmoid(-logits)
    return -((hit + miss) * valid).sum() / peak.sum().clamp(min=1)


LOSSES = {"mse": mean_squared_error, "focal": focal_loss}


def split(data: Dataset) -> tuple[list[int], list[int]]:
    """(training, held-out) rows of a data set; which is decided by a hash of the image's name, so that more photographs
    change nothing for those that are there."""
    held = [i for i, name in enumerate(data.ids) if int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0]
    return [i for i in range(len(data)) if i not in set(held)], held


def model_image(sam: Sam, images: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> normalised float32 on the SAM's device; padding gets 0 only approximately as in training
    and use alike it is masked out."""
    return (images.to(sam.device).float() - sam.pixel_mean) / sam.pixel_std


@torch.inference_mode()
def recall(predictor: PromptPredictor, held: Examples, sam: Sam, top: tuple[int, ...] = TOP) -> dict[str, float]:
    """Share of the held-out ground-truth masks that one of the strongest candidates lies on.

    Args:
        predictor: in evaluation mode.
        held: the held-out photographs.
        sam: their SAM.
        top: how many candidates, for each number one share.

    Returns:
        ``recall_K`` for each K, and ``candidates``: their mean number at the default settings.
    """
    hits, masks_seen, candidates = dict.fromkeys(top, 0), 0, []
    for i in range(len(held)):
        pcm = predicted(predictor, held[i], sam)
        candidates.append(len(sample_prompts(pcm)[0]))
        cells = sample_prompts(pcm, confidence=0.0)[0].cpu().numpy()
        masks = held.masks(i)
        inside = (cells < masks.shape[1:]).all(1)
        masks_seen += len(masks)
        for k in top:
            row, column = cells[:k][inside[:k]].T
            hits[k] += int(masks[:, row, column].any(1).sum())
    found = {f"recall_{k}": hits[k] / max(1, masks_seen) for k in top}
    return {**found, "candidates": float(np.mean(candidates)) if candidates else 0.0}


@torch.inference_mode()
def predicted(predictor: PromptPredictor, example: Example, sam: Sam) -> Tensor:
    """The PCM of one example, (4h, 4w)."""
    image, embedding = model_image(sam, example.image[None]), example.embedding[None].to(sam.device).float()
    return predictor.pcm(image, embedding, example.valid.to(sam.device))


@torch.inference_mode()
def calibrate(predictor: PromptPredictor, held: Examples, sam: Sam, wanted: float) -> float:
    """Shift the logits so that the held-out photographs give ``wanted`` candidates on average at the default settings.

    What a network that was trained on sparse peaks calls 0.2 depends on the loss. This gives the default confidence a
    meaning. The order of candidates changes little.

    Returns:
        The shift.
    """
    logits = []
    for i in range(len(held)):
        example = held[i]
        image, embedding = model_image(sam, example.image[None]), example.embedding[None].to(sam.device).float()
        logits.append((predictor.logits(image, embedding)[0, 0], example.valid.to(sam.device)))
    low, high = -8.0, 8.0
    for _ in range(16):
        shift = (low + high) / 2
        count = np.mean([len(sample_prompts((one + shift).sigmoid() * valid)[0]) for one, valid in logits])
        low, high = (shift, high) if count < wanted else (low, shift)
    predictor.fuse[-1].bias += high
    return high


def batches(examples: Examples, size: int, seed: int, start: int) -> Iterator[Example]:
    """Random batches without end, from number ``start`` on; each is drawn without repetition."""

    def draws() -> Iterator[list[int]]:
        step = start
        while True:
            rng = np.random.default_rng([seed, step])
            yield rng.choice(len(examples), min(size, len(examples)), replace=False).tolist()
            step += 1

    loader = torch.utils.data.DataLoader(examples, batch_sampler=draws(), num_workers=1, prefetch_factor=2)
    for batch in loader:
        yield Example(*batch)


class Training:
    """One training: its models, its data, and where it stands.

    Raises ValueError and OSError for data, models and settings that cannot be used.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.work = args, Path(args.workdir)
        recipe = PRESETS[args.preset]
        self.recipe = Recipe(args.place or recipe.place, args.loss or recipe.loss, recipe.cosine)
        self.sam = load_sam(args.sam, args.checkpoint, args.device)
        data = open_dataset(args.data, args.limit, args.seed)
        rows, held = split(data)
        if not rows or not held:
            raise ValueError(f"{data.name} has {len(data)} photographs: too few to train on some and hold some out.")
        embeddings = args.embeddings or self.work / "embeddings"
        cache_embeddings(self.sam, data, embeddings)
        place = PLACES[self.recipe.place]
        self.examples = Examples(data, rows, embeddings, self.sam, place)
        self.held = Examples(data, held, embeddings, self.sam, place)
        self.data = data
        side, (h, _) = self.sam.image_encoder.img_size, self.sam.prompt_encoder.image_embedding_size
        self.predictor = PromptPredictor(self.sam.prompt_encoder.embed_dim, side // h, args.width)
        self.predictor.to(self.sam.device)
        self.optimizer = torch.optim.Adam(self.predictor.parameters(), lr=args.lr)
        self.step, self.seconds, self.curve = 0, 0.0, []
        self.steps = 0 if args.minutes else math.ceil(args.epochs * len(rows) / args.batch)

    def run(self) -> None:
        """Train, from where an earlier run stopped, and write the weights, the curve and the card."""
        self._restore()
        started = time.perf_counter() - self.seconds
        loss_of, losses = LOSSES[self.recipe.loss], []
        with tqdm(total=self.steps or None, initial=self.step, desc="training", unit="step") as bar:
            for batch in batches(self.examples, self.args.batch, self.args.seed, self.step):
                self.seconds = time.perf_counter() - started
                done = self._progress()
                if done < 1:
                    losses.append(self._learn(batch, loss_of, done))
                    bar.update()
                if done >= 1 or self.step % self.args.log_every == 0:
                    self._evaluate(float(np.mean(losses or [math.nan])))
                    losses.clear()
                if done >= 1:
                    break
        self._finish()

    def _progress(self) -> float:
        return self.step / self.steps if self.steps else self.seconds / (60 * self.args.minutes)

    def _learn(self, batch: Example, loss_of, done: float) -> float:
        device = self.sam.device
        rate = 0.5 * (1 + math.cos(math.pi * done)) if self.recipe.cosine else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * rate * min(1, (self.step + 1) / WARMUP)
        self.predictor.train()
        logits = self.predictor.logits(model_image(self.sam, batch.image), batch.embedding.to(device).float())[:, 0]
        loss = loss_of(logits, batch.target.to(device), batch.valid.to(device).float())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def _evaluate(self, loss: float) -> None:
        found = recall(self.predictor.eval(), self.held, self.sam)
        self.curve.append({"step": self.step, "minutes": self.seconds / 60, "loss": loss, **found})
        tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in self.curve[-1].items()))
        state = {
            "predictor": self.predictor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curve": self.curve,
            "step": self.step,
            "seconds": self.seconds,
        }
        file = io.BytesIO()
        torch.save(state, file)
        write_atomically(self.work / "last.pt", file.getvalue())
        rows = io.StringIO()
        writer = csv.DictWriter(rows, self.curve[0])
        writer.writeheader()
        writer.writerows(self.curve)
        write_atomically(self.work / "curve.csv", rows.getvalue())

    def _restore(self) -> None:
        if not (self.work / "last.pt").exists():
            return
        state = torch.load(self.work / "last.pt", map_location=self.sam.device, weights_only=True)
        self.predictor.load_state_dict(state["predictor"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]

    def _finish(self) -> None:
        args, predictor = self.args, self.predictor.eval().requires_grad_(False)
        shift = calibrate(predictor, self.held, self.sam, args.candidates) if args.candidates else 0.0
        spec = spec_of(self.sam)
        about = {
            "embed_dim": str(predictor.embed_dim),
            "stride": str(predictor.stride),
            "width": str(predictor.width),
            "sam": spec.name,
            "sam_sha256": spec.sha256,
            "preset": args.preset,
            "steps": str(self.step),
        }
        weights = {k: v.cpu().half() if v.is_floating_point() else v.cpu() for k, v in predictor.state_dict().items()}
        write_atomically(args.out, to_safetensors(weights, metadata=about))
        write_atomically(args.out.with_suffix(".md"), self._card(shift))
        print(f"Prompt Predictor: {args.out}")

    def _card(self, shift: float) -> str:
        """The model card, Markdown."""
        args, spec = self.args, spec_of(self.sam)
        size = sum(p.numel() for p in self.predictor.parameters()) / 1e6
        rows = self.curve if len(self.curve) <= 10 else [self.curve[round(i * (len(self.curve) - 1) / 9)] for i in range(10)]
        table = [" | ".join(f"{value:.4g}" for value in row.values()) for row in rows]
        described = self.data.describe()
        return "\n".join([
            f"# {args.out.name}",
            "",
            f"Prompt Predictor of {spec.name}.",
            "",
            f"- **Model**: {size:.2f} M parameters, {self.predictor.width} channels; float16",
            f"- **For**: embeddings of {spec.name} (sha256 {spec.sha256[:12]})",
            f"- **Data**: {len(self.examples)} photographs of {self.data.name}, {len(self.held)} more held out; "
            f"{described['masks']} masks",
            f"- **Training**: preset {args.preset} (prompts: {self.recipe.place}, loss: {self.recipe.loss}), {self.step} "
            f"steps of {args.batch}, {self.seconds / 60:.0f} minutes, by `python -m aopsam_lab train-predictor`",
            f"- **Calibration**: logits shifted by {shift:+.2f}, so that the held-out photographs give "
            f"{args.candidates:g} candidates on average at the default settings",
            f"- **Licence**: {args.licence}",
            "",
            "Curve on the held-out photographs; recall_K: share of the ground-truth masks with one of the K strongest "
            "candidates on them.",
            "",
            "| " + " | ".join(self.curve[0]) + " |",
            "|" + " --: |" * len(self.curve[0]),
            *(f"| {row} |" for row in table),
            "",
        ])  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train-predictor`."""
    parser.add_argument("--data", required=True, help="a folder of `find-masks`, or another data set with masks")
    parser.add_argument("--out", required=True, type=Path, help="the weights, safetensors; the card lies beside them")
    parser.add_argument("--sam", default="mobile_sam", choices=list(MODELS))
    parser.add_argument("--checkpoint", help="weights of the SAM other than the bundled or official ones")
    parser.add_argument("--preset", default="bundled", choices=list(PRESETS))
    parser.add_argument("--place", choices=list(PLACES), help="where the prompts lie that are learnt, as the preset says")
    parser.add_argument("--loss", choices=list(LOSSES), help="as the preset says")
    parser.add_argument("--workdir", default="runs/predictor", help="where embeddings, curve and last state are kept")
    parser.add_argument("--embeddings", type=Path, help="the folder of the embeddings, if it is another")
    parser.add_argument("--limit", type=int, help="how many images of the data set; all if not given")
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--minutes", type=float, help="length of the training, in place of epochs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=64, help="channels in which the two branches meet")
    parser.add_argument("--candidates", type=float, default=250, help="at the default settings; 0: not calibrated")
    parser.add_argument("--log-every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--licence", default="the terms of the training data hold", help="a line of the card")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)


def train(args: argparse.Namespace) -> None:
    """The command `train-predictor`."""
    Training(args).run()
