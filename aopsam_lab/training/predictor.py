"""Train the Prompt Predictor of a SAM on photographs with ground truth.

    python -m aopsam_lab train-predictor --data FOUND --out predictor.safetensors --minutes 15
    python -m aopsam_lab train-predictor --sam vit_h --data sa1b:DIR --preset paper --out OUT

The preset "paper" is the paper's recipe: one Gaussian a mask, mean squared error of the PCM, Adam,
1000 epochs. The preset "bundled" is ours: the prompts that together give all masks and, lower, the
other clicks that `find-masks` found; cross-entropy of each block of the PCM; a cosine schedule. An
eighth of the photographs is held out. A stopped training goes on from its last evaluation.
"""

import argparse
import io
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import Tensor
from tqdm import tqdm

from aopsam_lab.asf import sample_prompts
from aopsam_lab.data import open_dataset
from aopsam_lab.files import write_atomically
from aopsam_lab.predictor import BLOCK, SIGMA, PromptPredictor, blurred, draw_pcm
from aopsam_lab.sam.zoo import MODELS, load_sam, spec_of
from aopsam_lab.training import append_rows, split, write_card
from aopsam_lab.training.examples import PLACES, Examples, cache_embeddings

TOP = (64, 128, 256)  # numbers of candidates that recall is measured for
FINE = {"smoothing": 1.0, "confidence": 0.0, "spacing": 4.0}  # sampling that recall is measured for
WARMUP = 50  # steps
PEAK_WEIGHT = 4.0  # of a block with a prompt, beside 1 for every block
PLACE_WEIGHT = 0.05  # of the places' loss to the confidences'
ABOUT_CURVE = "recall_K: share of held-out masks that the K strongest candidates hit; uncalibrated"
PRESETS = {"paper": ("own", "mse"), "bundled": ("covering", "blocks")}  # where prompts lie, loss


def pcm_loss(blocks: tuple[Tensor, Tensor], target: Tensor, valid: Tensor) -> Tensor:
    """Mean squared error of the PCM over the cells on the image: the paper's loss."""
    wanted = blurred(target[:, None], SIGMA)[:, 0].clamp(0, 1)
    return ((draw_pcm(*blocks, soft=True)[:, 0] - wanted).square() * valid).sum() / valid.sum()


def block_loss(blocks: tuple[Tensor, Tensor], target: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy of each block's confidence with its highest prompt, and of the place in it."""
    confidence, place = blocks
    height, at = F.pixel_unshuffle(target[:, None], BLOCK).max(1)
    on = F.max_pool2d(valid[:, None], BLOCK)[:, 0]
    entropy = F.binary_cross_entropy_with_logits(confidence, height, reduction="none")
    entropy = entropy * (1 + PEAK_WEIGHT * height) * on
    places = F.cross_entropy(place, at, reduction="none") * height * on
    return entropy.sum() / on.sum() + PLACE_WEIGHT * places.sum() / (height * on).sum().clamp(min=1)


LOSSES = {"mse": pcm_loss, "blocks": block_loss}


@torch.inference_mode()
def predicted(predictor: PromptPredictor, held: Examples) -> Iterator[tuple[Tensor, ...]]:
    """Confidences, places and valid cells (4h, 4w) of each photograph; see `pcm_loss`."""
    for i in range(len(held)):
        image, embedding, _, valid = held.batch([i])
        yield *predictor.blocks(image, embedding, valid), valid[0]


@torch.inference_mode()
def recall(predictor: PromptPredictor, held: Examples) -> dict[str, float]:
    """Measure a predictor in evaluation mode on the held-out photographs; see ABOUT_CURVE."""
    hits, n_masks = dict.fromkeys(TOP, 0), 0
    candidates = []
    for i, (confidence, place, valid) in enumerate(predicted(predictor, held)):
        pcm = draw_pcm(confidence, place)[0, 0] * valid
        candidates.append(len(sample_prompts(pcm)[0]))
        row, column = sample_prompts(pcm, **FINE)[0].cpu().numpy().T
        on_mask = held.masks(i)[:, row, column]
        n_masks += len(on_mask)
        for k in TOP:
            hits[k] += int(on_mask[:, :k].any(1).sum())
    found = {f"recall_{k}": n / max(1, n_masks) for k, n in hits.items()}
    return {**found, "candidates": float(np.mean(candidates))}


@torch.inference_mode()
def calibrate(predictor: PromptPredictor, held: Examples, wanted: float, slope: float) -> float:
    """Multiply confidences' logits by the slope, then shift them; return the shift.

    With it the held-out photographs give as many candidates as wanted on average at the default
    settings. A small slope keeps weak peaks apart from strong neighbours in the smoothed PCM.
    """
    weight, bias = predictor.head.parameters()
    parts = len(bias) // (1 + BLOCK**2)
    weight[:parts] *= slope
    bias[:parts] *= slope
    blocks = list(predicted(predictor, held))

    def candidates(shift: float) -> float:
        pcms = (draw_pcm(logits + shift, place)[0, 0] * valid for logits, place, valid in blocks)
        return float(np.mean([len(sample_prompts(pcm)[0]) for pcm in pcms]))

    low, high = -8.0, 8.0
    wanted = min(wanted, candidates(high))  # where there are not as many, the shift stays small
    for _ in range(16):
        shift = (low + high) / 2
        low, high = (shift, high) if candidates(shift) < wanted else (low, shift)
    bias[:parts] += high
    return high


class Training:
    """One training with the options of `train-predictor`: its data, its models, where it stands."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        place, loss = PRESETS[args.preset]
        self.place, self.loss = args.place or place, args.loss or loss
        self.sam = load_sam(args.sam, args.checkpoint, args.device)
        torch.manual_seed(args.seed)  # after the SAM, which draws numbers when it is made
        self.data = open_dataset(args.data, args.limit, args.seed)
        parts, embeddings = split(self.data), args.embeddings or args.workdir / "embeddings"
        cache_embeddings(self.sam, self.data, embeddings)
        self.examples, self.held = (
            Examples(self.data, part, embeddings, self.sam, PLACES[self.place]) for part in parts
        )
        prompts = self.sam.prompt_encoder
        stride = self.sam.image_encoder.img_size // prompts.image_embedding_size[0]
        network = PromptPredictor(prompts.embed_dim, stride, args.width, not args.no_image)
        self.predictor = network.to(self.sam.device)
        self.optimizer = torch.optim.Adam(self.predictor.parameters(), lr=args.lr)
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []
        self.steps = 0 if args.minutes else math.ceil(args.epochs * len(self.examples) / args.batch)

    def run(self) -> None:
        """Train, from where an earlier run stopped, and write the weights and the card."""
        self._restore()
        started, losses = time.perf_counter() - self.seconds, []
        with tqdm(total=self.steps or None, initial=self.step, desc="training", unit="step") as bar:
            while self._progress() < 1:
                losses.append(self._learn())
                bar.update()
                self.seconds = time.perf_counter() - started
                if self._progress() >= 1 or self.step % self.args.log_every == 0:
                    self._evaluate(float(np.mean(losses)))
                    losses.clear()
        self._finish()

    def _progress(self) -> float:
        return self.step / self.steps if self.steps else self.seconds / (60 * self.args.minutes)

    def _learn(self) -> float:
        """Take a step on random examples without repetition; the step's number decides which."""
        rng, n = np.random.default_rng([self.args.seed, self.step]), len(self.examples)
        chosen = rng.choice(n, min(self.args.batch, n), replace=False)
        image, embedding, target, valid = self.examples.batch(chosen.tolist(), self.step)
        cosine = 0.5 * (1 + math.cos(math.pi * self._progress()))
        rate = 1.0 if self.args.preset == "paper" else cosine
        warm = min(1, (self.step + 1) / WARMUP)
        self.optimizer.param_groups[0]["lr"] = self.args.lr * rate * warm
        blocks = self.predictor.train().blocks(image, embedding, valid)
        loss = LOSSES[self.loss](blocks, target, valid)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def _evaluate(self, loss: float) -> None:
        found = recall(self.predictor.eval(), self.held)
        self.curve.append({"step": self.step, "minutes": self.seconds / 60, "loss": loss, **found})
        tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in self.curve[-1].items()))
        state = {"predictor": self.predictor.state_dict(), "curve": self.curve}
        file = io.BytesIO()
        torch.save({**state, "optimizer": self.optimizer.state_dict()}, file)
        write_atomically(self.args.workdir / "last.pt", file.getvalue())
        table = pd.DataFrame(self.curve).to_csv(index=False, float_format="%.4g")
        write_atomically(self.args.workdir / "curve.csv", table)

    def _restore(self) -> None:
        last = self.args.workdir / "last.pt"
        if last.exists():
            state = torch.load(last, map_location=self.sam.device, weights_only=True)
            self.predictor.load_state_dict(state["predictor"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.curve = state["curve"]
            self.step, self.seconds = int(self.curve[-1]["step"]), 60 * self.curve[-1]["minutes"]

    def _finish(self) -> None:
        """Calibrate the predictor; write it as float16, and its card."""
        args, spec, calibration = self.args, spec_of(self.sam), "none"
        predictor = self.predictor.eval().requires_grad_(False)
        if args.candidates:
            shift = calibrate(predictor, self.held, args.candidates, args.slope)
            changed = f"confidences' logits times {args.slope:g} and shifted by {shift:+.2f}"
            calibration = f"{changed}, for {args.candidates:g} candidates a held-out photograph"
        about = {name: str(getattr(predictor, name)) for name in ("embed_dim", "stride", "width")}
        about |= {"sam": spec.name, "sam_sha256": spec.sha256}
        state = predictor.cpu().state_dict()
        weights = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        write_atomically(args.out, to_safetensors(weights, metadata=about))
        size = sum(p.numel() for p in predictor.parameters()) / 1e6
        no_image = ", without the image" if args.no_image else ""
        facts = {
            "Model": f"{size:.2f} M parameters, {args.width} channels{no_image}; for embeddings of "
            f"{spec.name} (sha256 {spec.sha256[:12]})",
            "Data": f"{len(self.examples)} photographs, {len(self.held)} more held out; "
            f"{self.data.describe()['masks']} masks",
            "Training": f"preset {args.preset} (prompts: {self.place}, loss: {self.loss}), "
            f"{self.step} steps of {args.batch}, {self.seconds / 60:.0f} minutes, by "
            "`python -m aopsam_lab train-predictor`",
            "Calibration": calibration,
            "Licence": args.licence,
        }
        write_card(args.out, f"Prompt Predictor of {spec.name}.", facts, self.curve, ABOUT_CURVE)
        if args.trials:
            trial = {"preset": args.preset, "place": self.place, "objective": self.loss}
            trial |= {"width": args.width, "image": not args.no_image, "lr": args.lr}
            append_rows(args.trials, [{**trial, "examples": len(self.examples), **self.curve[-1]}])
        print(f"Prompt Predictor: {args.out}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train-predictor`."""
    add = parser.add_argument
    add("--data", required=True, help="a folder of `find-masks`, or another data set with masks")
    add("--out", required=True, type=Path, help="the weights (safetensors); the card lies beside")
    add("--sam", default="mobile_sam", choices=list(MODELS))
    add("--checkpoint", help="weights of the SAM other than the bundled or official ones")
    add("--preset", default="bundled", choices=list(PRESETS))
    add("--place", choices=list(PLACES), help="where the prompts to learn lie; as the preset says")
    add("--no-image", action="store_true", help="without the branch on the image")
    add("--loss", choices=list(LOSSES), help="as the preset says")
    add("--workdir", type=Path, default="runs/predictor", help="embeddings, curve, last state")
    add("--embeddings", type=Path, help="the folder of the embeddings, if it is another")
    add("--limit", type=int, help="how many images of the data set; all if not given")
    add("--epochs", type=int, default=1000)
    add("--minutes", type=float, help="length of the training, in place of epochs")
    add("--batch", type=int, default=8)
    add("--lr", type=float, default=2e-3)
    add("--width", type=int, default=64, help="channels in which the two branches meet")
    add("--candidates", type=float, default=180, help="of the calibration; 0: not calibrated")
    add("--slope", type=float, default=0.5, help="of the calibration; smaller: more candidates")
    add("--trials", type=Path, help="a CSV to add this training's options and last recall to")
    add("--log-every", type=int, default=100, help="steps between evaluations")
    add("--licence", default="the terms of the training data hold", help="a line of the card")
    add("--device", default="auto")
    add("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """The command `train-predictor`; 0."""
    Training(args).run()
    return 0
