"""Choose by measuring, on the training photographs that `train-predictor` holds out; every trial is
a row of a CSV.

    python -m aopsam_lab.training.trials recipes --data FOUND --embeddings FOLDER
    python -m aopsam_lab.training.trials prompts --data FOUND --predictor FILE
    python -m aopsam_lab.training.trials filtering --data FOUND

``recipes``: how the Prompt Predictor is trained (targets, loss, image branch, width), by recall.
``prompts``: regular grids, and the candidates of a Prompt Predictor at several samplings, with at
most so many prompts decoded. ``filtering``: adaptive filtering in both readings of the paper, by
the share of prompts that is decoded before the first elimination, the number of rounds, and the
threshold; beside them, as many prompts of the same candidates without it.

Columns: ``recall_K``, see `training.predictor.recall`; ``miou`` against the masks that people drew,
``coverage`` of the masks that the SAM found (IoU of 0.75 or more), both as means over the
photographs that have any; prompts sampled and decoded, masks kept, a photograph.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from aopsam_lab.asf import AsfParams
from aopsam_lab.data import open_dataset
from aopsam_lab.data.sample import Sample
from aopsam_lab.pipeline.decode_cache import DecodeCache, PcmCache
from aopsam_lab.pipeline.decode import encode
from aopsam_lab.evaluator import evaluate, iou_matrix
from aopsam_lab.pipeline.methods import METHODS, Aop, Grid, Method
from aopsam_lab.pipeline.run import run_method
from aopsam_lab.predictor import load_predictor
from aopsam_lab.sam.zoo import load_sam
from aopsam_lab.training import predictor as training

FOUND_IOU = 0.75
BUDGETS = (64, 100, 144, 196, 256, 409, 1024)
GRIDS = (8, 10, 12, 14, 16, 32)
SAMPLINGS = (  # smoothing, confidence, spacing
    (4.0, 0.01, 8.0),
    (3.0, 0.01, 8.0),
    (3.0, 0.01, 6.0),
    (2.0, 0.2, 6.0),
    (2.0, 0.02, 6.0),
    (1.5, 0.02, 5.0),
    (1.0, 0.01, 4.0),
    (0.5, 0.01, 2.0),
    (0.0, 0.005, 2.0),
)
RECIPES = {
    "paper": ["--preset", "paper"],
    "paper, block loss": ["--preset", "paper", "--loss", "blocks"],
    "bundled, the paper's targets": ["--place", "own"],
    "bundled, mean squared error": ["--loss", "mse"],
    "bundled, without the image": ["--no-image"],
    "bundled, 32 channels": ["--width", "32"],
    "bundled, 128 channels": ["--width", "128"],
    "bundled": [],
}
FIRSTS, ROUNDS = (0.2, 0.3, 0.5), (2, 4, 8)
ELIMINATIONS = (1.25, 1.3, 1.35, 1.4)


@dataclass(frozen=True)
class Trial:
    """One way to prompt: a method, its parameters, and how many prompts it may decode (None:
    all)."""

    method: Method
    params: AsfParams
    limit: int | None = None

    def describe(self) -> dict[str, object]:
        """What the row says of it."""
        ours = isinstance(self.method, Aop) and self.method.filtering
        return {
            "method": self.method.name,
            "limit": self.limit,
            "smoothing": self.params.smoothing,
            "confidence": self.params.confidence,
            "spacing": self.params.spacing,
            "elimination": self.params.elimination if ours else None,
            "first": self.method.first if ours else None,
            "rounds": self.method.rounds if ours else None,
        }


def prompt_trials(params: AsfParams) -> Iterator[Trial]:
    """Grids, and AoP-SAM at each of SAMPLINGS, with and without filtering, at each of BUDGETS."""
    for side in GRIDS:
        yield Trial(Grid("grid", side), params)
    for values, name, budget in itertools.product(SAMPLINGS, ("aop", "aop_no_af"), BUDGETS):
        sampling = AsfParams(*values, params.elimination)
        yield Trial(METHODS[name], sampling, budget)


def filtering_trials(params: AsfParams) -> Iterator[Trial]:
    """Both readings of adaptive filtering with each of FIRSTS, ROUNDS and ELIMINATIONS; and
    none."""
    yield Trial(METHODS["aop_no_af"], params)
    for share in (
        0.4,
        0.5,
        0.6,
        0.7,
        0.8,
        0.9,
    ):  # fewer prompts without filtering: what it has to be better than
        yield Trial(METHODS["aop_no_af"], params, -round(100 * share))
    for literal, first, rounds, elimination in itertools.product(
        (False, True), FIRSTS, ROUNDS, ELIMINATIONS
    ):
        method = Aop("aop_raw" if literal else "aop", literal=literal, first=first, rounds=rounds)
        changed = AsfParams(params.smoothing, params.confidence, params.spacing, elimination)
        yield Trial(method, changed)


def measure(sam, predictor, sample: Sample, trials: Iterable[Trial]) -> list[dict[str, float]]:
    """What each trial gives on one photograph; every point is decoded once.

    A negative limit is a share, in percent, of the candidates.
    """
    encoded = encode(sam, sample.image)
    cache, pcm = DecodeCache(sam, encoded), PcmCache(predictor, encoded)
    by_people = [rle for rle, clicks in zip(sample.rles, sample.clicks or []) if not clicks]
    by_sam = [rle for rle, clicks in zip(sample.rles, sample.clicks or []) if clicks]
    rows, sampled = [], 0
    for trial in trials:
        limit = trial.limit
        if limit is not None and limit < 0:
            limit = max(1, round(-limit / 100 * sampled))
        found = run_method(
            sam, encoded, trial.method, pcm, params=trial.params, decode=cache, max_prompts=limit
        )
        sampled = max(sampled, found.n_sampled)
        overlap = iou_matrix(by_sam, found.masks)
        rows.append(
            {
                "miou": evaluate(by_people, found.masks).miou if by_people else np.nan,
                "coverage": float((overlap.max(1, initial=0) >= FOUND_IOU).mean())
                if by_sam
                else np.nan,
                "sampled": found.n_sampled,
                "decoded": found.n_decoded,
                "eliminated": found.n_eliminated / max(1, found.n_sampled),
                "masks": len(found.masks),
            }
        )
    return rows


def recipes(args: argparse.Namespace) -> list[dict]:
    """Train with each of RECIPES; a row each."""
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    rows = []
    for name, changes in RECIPES.items():
        work = args.workdir / name.replace(" ", "_").replace(",", "").replace("'", "")
        options = ["--data", args.data, "--out", work / "predictor.safetensors", "--workdir", work]
        options += ["--embeddings", args.embeddings or args.workdir / "embeddings"]
        options += ["--sam", args.sam, "--device", args.device, "--epochs", args.epochs]
        trained = training.Training(parser.parse_args([*map(str, options), *changes]))
        trained.run()
        about = {"recipe": name, "photographs": len(trained.examples), "held": len(trained.held)}
        rows.append({**about, **trained.curve[-1]})
        rows[-1] = {k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}
    return rows


def decodes(args: argparse.Namespace) -> list[dict]:
    """Measure the trials of a kind on held-out photographs; a row each."""
    sam = load_sam(args.sam, device=args.device)
    predictor = load_predictor(args.sam, args.predictor, sam.device)
    data = open_dataset(args.data)
    held = training.split(data)[1]
    held = held[:: max(1, len(held) // args.photos)][: args.photos]
    trials = list({"prompts": prompt_trials, "filtering": filtering_trials}[args.kind](AsfParams()))
    measured = [measure(sam, predictor, data[i], trials) for i in tqdm(held, unit="photo")]
    rows = []
    for k, trial in enumerate(trials):
        means = {
            name: round(float(np.nanmean([m[k][name] for m in measured])), 4)
            for name in measured[0][k]
        }
        about = {"predictor": predictor.sha256[:12], "photographs": len(held)}
        rows.append({**about, **trial.describe(), **means})
    return rows


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a CSV, with its header where it is new."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("recipes", "prompts", "filtering"))
    parser.add_argument("--data", required=True, type=Path, help="a folder of `find-masks`")
    parser.add_argument("--predictor", type=Path, help="weights other than the bundled ones")
    parser.add_argument("--sam", default="mobile_sam")
    parser.add_argument("--photos", type=int, default=24, help="held-out photographs to measure on")
    parser.add_argument("--embeddings", type=Path, help="folder of the embeddings (recipes)")
    parser.add_argument("--epochs", type=int, default=10, help="of each recipe")
    parser.add_argument("--workdir", type=Path, default="runs/recipes", help="of the trainings")
    parser.add_argument("--out", type=Path, help="the CSV to add to; reports/training/KIND.csv")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    rows = recipes(args) if args.kind == "recipes" else decodes(args)
    append(args.out or Path("reports/training") / f"{args.kind}.csv", rows)


if __name__ == "__main__":
    main()
