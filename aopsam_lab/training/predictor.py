"""Train the Prompt Predictor of a SAM on photographs with ground truth.

    python -m aopsam_lab train-predictor --data FOUND --out predictor.safetensors --minutes 15
    python -m aopsam_lab train-predictor --sam vit_h --data sa1b:DIR --preset paper --out OUT

Presets. ``paper``: one Gaussian a mask, at the prompt point that the data set gives or else at the
point deepest inside the mask; mean squared error of the PCM, Adam, 1000 epochs: the paper's recipe.
``bundled`` (ours): the prompts that together give all masks (`find-masks` writes which clicks give
a mask) and, lower, the other clicks; cross-entropy of each block of the PCM, Adam with a cosine
schedule. SAM is frozen; its embeddings are computed once and kept. Every eighth photograph or so is
held out: the curve is measured on these.

A stopped training goes on from its last evaluation.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import Tensor
from tqdm import tqdm

from aopsam_lab.asf import sample_prompts
from aopsam_lab.data import Dataset, open_dataset
from aopsam_lab.files import write_atomically
from aopsam_lab.predictor import BLOCK, SIGMA, PromptPredictor, blurred, draw_pcm
from aopsam_lab.sam.zoo import MODELS, load_sam, spec_of
from aopsam_lab.training.card import write_card
from aopsam_lab.training.examples import PLACES, Example, Examples, cache_embeddings

TOP = (64, 128, 256)  # candidates that recall is measured for
FINE = {"smoothing": 1.0, "confidence": 0.0, "spacing": 4.0}  # sampling that recall is measured for
HELD_OUT = 8  # one photograph in so many is held out
WARMUP = 50  # steps
PEAK_WEIGHT = 4.0
MIDDLE = 1.5  # of the calibration: added to the logit of a block's middle
PLACE_WEIGHT = 0.05  # of the places' loss to the confidences'


@dataclass(frozen=True)
class Recipe:
    """How a predictor is trained.

    place: where the prompts lie that it learns, see `examples.PLACES`. loss: "mse" or "blocks".
    cosine: whether the learning rate falls along a cosine; else it stays.
    """

    place: str
    loss: str
    cosine: bool


PRESETS = {
    "paper": Recipe("own", "mse", cosine=False),
    "bundled": Recipe("covering", "blocks", cosine=True),
}
Loss = Callable[[tuple[Tensor, Tensor], Tensor, Tensor], Tensor]


def pcm_loss(blocks: tuple[Tensor, Tensor], target: Tensor, valid: Tensor) -> Tensor:
    """Mean squared error of the PCM, over the cells on the image (the paper's loss).

    Args:
        blocks: logits of confidence and place, see `PromptPredictor.blocks`.
        target: (B, 4h, 4w), the prompts' heights in their cells.
        valid: (B, 4h, 4w), 1 on the image and 0 on padding.
    """
    wanted = blurred(target[:, None], SIGMA)[:, 0].clamp(0, 1)
    return ((draw_pcm(*blocks, soft=True)[:, 0] - wanted).square() * valid).sum() / valid.sum()


def block_loss(blocks: tuple[Tensor, Tensor], target: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy of each block's confidence with the highest prompt in it, and of the place in
    the block.

    A block of height t counts 1 + PEAK_WEIGHT t. Arguments as `pcm_loss`.
    """
    confidence, place = blocks
    height, at = F.pixel_unshuffle(target[:, None], BLOCK).max(1)
    on = F.max_pool2d(valid[:, None], BLOCK)[:, 0]
    entropy = (
        F.binary_cross_entropy_with_logits(confidence, height, reduction="none")
        * (1 + PEAK_WEIGHT * height)
        * on
    )
    places = F.cross_entropy(place, at, reduction="none") * height * on
    return entropy.sum() / on.sum() + PLACE_WEIGHT * places.sum() / (height * on).sum().clamp(min=1)


LOSSES: dict[str, Loss] = {"mse": pcm_loss, "blocks": block_loss}


def split(data: Dataset) -> tuple[list[int], list[int]]:
    """(training, held-out) rows of a data set; which is decided by a hash of the image's name, so
    that more photographs change nothing for those that are there."""
    held = [
        i
        for i, name in enumerate(data.ids)
        if int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0
    ]
    return [i for i in range(len(data)) if i not in set(held)], held


@torch.inference_mode()
def recall(
    predictor: PromptPredictor, held: Examples, top: tuple[int, ...] = TOP
) -> dict[str, float]:
    """Share of the held-out ground-truth masks that one of the strongest candidates lies on.

    Args:
        predictor: in evaluation mode.
        held: the held-out photographs.
        top: how many candidates, for each number one share.

    Returns:
        ``recall_K`` for each K, and ``candidates``: their mean number at the default settings.
    """
    hits, masks_seen, candidates = dict.fromkeys(top, 0), 0, []
    for i in range(len(held)):
        pcm = predicted(predictor, held, i)
        candidates.append(len(sample_prompts(pcm)[0]))
        cells = sample_prompts(pcm, **FINE)[0].cpu().numpy()
        masks = held.masks(i)
        inside = (cells < masks.shape[1:]).all(1)
        masks_seen += len(masks)
        for k in top:
            row, column = cells[:k][inside[:k]].T
            hits[k] += int(masks[:, row, column].any(1).sum())
    found = {f"recall_{k}": hits[k] / max(1, masks_seen) for k in top}
    return {**found, "candidates": float(np.mean(candidates)) if candidates else 0.0}


@torch.inference_mode()
def predicted(predictor: PromptPredictor, held: Examples, i: int) -> Tensor:
    """The PCM of example i, (4h, 4w)."""
    image, embedding, _, valid = held.batch([i])
    return draw_pcm(*predictor.blocks(image, embedding, valid))[0, 0] * valid[0]


@torch.inference_mode()
def calibrate(predictor: PromptPredictor, held: Examples, wanted: float, slope: float) -> float:
    """Scale the confidences' logits and shift them so that the held-out photographs give ``wanted``
    candidates on average at the default settings.

    What a trained network calls 0.2 depends on its loss: this gives the default confidence a
    meaning. The flatter the PCM (the smaller ``slope``), the more weak peaks stay apart from strong
    neighbours when it is smoothed. The place in the middle of a block is preferred, so that
    neighbours keep their distance.

    Returns:
        The shift.
    """
    head, parts = predictor.head, len(predictor.head.bias) // (1 + BLOCK**2)
    head.weight[:parts] *= slope
    head.bias[:parts] *= slope
    middle = 1 + BLOCK**2 // 2 + BLOCK // 2
    head.bias[parts * middle : parts * (middle + 1)] += MIDDLE
    blocks = []
    for i in range(len(held)):
        image, embedding, _, valid = held.batch([i])
        blocks.append((*predictor.blocks(image, embedding, valid), valid[0]))

    def candidates(shift: float) -> float:
        pcms = (
            draw_pcm(confidence + shift, place)[0, 0] * valid for confidence, place, valid in blocks
        )
        return float(np.mean([len(sample_prompts(pcm)[0]) for pcm in pcms]))

    low, high = -8.0, 8.0
    wanted = min(wanted, candidates(high))  # where there are not as many, the shift stays small
    for _ in range(16):
        shift = (low + high) / 2
        low, high = (shift, high) if candidates(shift) < wanted else (low, shift)
    head.bias[:parts] += high
    return high


def batches(examples: Examples, size: int, seed: int, start: int) -> Iterator[Example]:
    """Random batches without end, from number ``start`` on; each is drawn without repetition."""
    for step in itertools.count(start):
        rng = np.random.default_rng([seed, step])
        yield examples.batch(rng.choice(len(examples), min(size, len(examples)), replace=False))


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
            raise ValueError(
                f"{data.name} has {len(data)} photographs: too few to train on some and hold "
                "some out."
            )
        embeddings = args.embeddings or self.work / "embeddings"
        cache_embeddings(self.sam, data, embeddings)
        place = PLACES[self.recipe.place]
        self.examples = Examples(data, rows, embeddings, self.sam, place)
        self.held = Examples(data, held, embeddings, self.sam, place)
        self.data = data
        side, (h, _) = self.sam.image_encoder.img_size, self.sam.prompt_encoder.image_embedding_size
        self.predictor = PromptPredictor(
            self.sam.prompt_encoder.embed_dim, side // h, args.width, not args.no_image
        )
        self.predictor.to(self.sam.device)
        self.optimizer = torch.optim.Adam(self.predictor.parameters(), lr=args.lr)
        self.step, self.seconds, self.curve = 0, 0.0, []
        self.steps = 0 if args.minutes else math.ceil(args.epochs * len(rows) / args.batch)

    def run(self) -> None:
        """Train, from where an earlier run stopped, and write the weights and the card."""
        self._restore()
        if self._progress() < 1:
            self._learn_on()
        self._finish()

    def _learn_on(self) -> None:
        """Steps until the end; every so many, and after the last, an evaluation that is kept."""
        started = time.perf_counter() - self.seconds
        loss_of, losses = LOSSES[self.recipe.loss], []
        with tqdm(total=self.steps or None, initial=self.step, desc="training", unit="step") as bar:
            for batch in batches(self.examples, self.args.batch, self.args.seed, self.step):
                losses.append(self._learn(batch, loss_of, self._progress()))
                bar.update()
                self.seconds = time.perf_counter() - started
                ended = self._progress() >= 1
                if ended or self.step % self.args.log_every == 0:
                    self._evaluate(float(np.mean(losses)))
                    losses.clear()
                if ended:
                    break

    def _progress(self) -> float:
        return self.step / self.steps if self.steps else self.seconds / (60 * self.args.minutes)

    def _learn(self, batch: Example, loss_of, done: float) -> float:
        rate = 0.5 * (1 + math.cos(math.pi * done)) if self.recipe.cosine else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * rate * min(1, (self.step + 1) / WARMUP)
        self.predictor.train()
        blocks = self.predictor.blocks(batch.image, batch.embedding, batch.valid)
        loss = loss_of(blocks, batch.target, batch.valid)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def _evaluate(self, loss: float) -> None:
        found = recall(self.predictor.eval(), self.held)
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
        writer.writerows({k: f"{v:.4g}" for k, v in row.items()} for row in self.curve)
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
        shift = (
            calibrate(predictor, self.held, args.candidates, args.slope) if args.candidates else 0.0
        )
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
        weights = {
            k: v.cpu().half() if v.is_floating_point() else v.cpu()
            for k, v in predictor.state_dict().items()
        }
        write_atomically(args.out, to_safetensors(weights, metadata=about))
        size = sum(p.numel() for p in predictor.parameters()) / 1e6
        recipe = self.recipe
        facts = {
            "Model": f"{size:.2f} M parameters, {predictor.width} channels"
            + (", without the image" if args.no_image else ""),
            "For": f"embeddings of {spec.name} (sha256 {spec.sha256[:12]})",
            "Data": f"{len(self.examples)} photographs, {len(self.held)} more held out; "
            f"{self.data.describe()['masks']} masks",
            "Training": f"preset {args.preset} (prompts: {recipe.place}, loss: {recipe.loss}), "
            f"{self.step} steps of {args.batch}, {self.seconds / 60:.0f} minutes, by "
            "`python -m aopsam_lab train-predictor`",
            "Calibration": f"confidences' logits times {args.slope:g} and shifted by {shift:+.2f}, "
            f"so that the held-out photographs give {args.candidates:g} candidates on average at "
            "the default settings",
            "Licence": args.licence,
        }
        about_curve = (
            "recall_K: share of the held-out photographs' masks with one of the K strongest "
            f"candidates on them (smoothing {FINE['smoothing']:g}, spacing {FINE['spacing']:g}); "
            "candidates: at the default settings, before the calibration"
        )
        summary = f"Prompt Predictor of {spec.name}."
        write_card(args.out, summary, facts, self.work / "curve.csv", about_curve)
        print(f"Prompt Predictor: {args.out}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train-predictor`."""
    parser.add_argument(
        "--data", required=True, help="a folder of `find-masks`, or another data set with masks"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="the weights, safetensors; the card lies beside them",
    )
    parser.add_argument("--sam", default="mobile_sam", choices=list(MODELS))
    parser.add_argument(
        "--checkpoint", help="weights of the SAM other than the bundled or official ones"
    )
    parser.add_argument("--preset", default="bundled", choices=list(PRESETS))
    parser.add_argument(
        "--place",
        choices=list(PLACES),
        help="where the prompts lie that are learnt, as the preset says",
    )
    parser.add_argument("--no-image", action="store_true", help="without the branch on the image")
    parser.add_argument("--loss", choices=list(LOSSES), help="as the preset says")
    parser.add_argument(
        "--workdir",
        default="runs/predictor",
        help="where embeddings, curve and last state are kept",
    )
    parser.add_argument(
        "--embeddings", type=Path, help="the folder of the embeddings, if it is another"
    )
    parser.add_argument(
        "--limit", type=int, help="how many images of the data set; all if not given"
    )
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--minutes", type=float, help="length of the training, in place of epochs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--width", type=int, default=64, help="channels in which the two branches meet"
    )
    parser.add_argument(
        "--candidates", type=float, default=250, help="at the default settings; 0: not calibrated"
    )
    parser.add_argument(
        "--slope", type=float, default=0.5, help="of the calibration: smaller gives more candidates"
    )
    parser.add_argument("--log-every", type=int, default=100, help="steps between evaluations")
    parser.add_argument(
        "--licence", default="the terms of the training data hold", help="a line of the card"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)


def train(args: argparse.Namespace) -> None:
    """The command `train-predictor`."""
    Training(args).run()
