"""The whole way from data to weights, in the order the models need each other.

    python -m aopsam_lab.training.chain --workdir runs --photos PHOTOS/train
    python -m aopsam_lab.training.chain --workdir runs/quick --quick

Pools of training pictures, the tiny SAM, its IoU head, its thresholds and weights, its Prompt Predictor, the detector, and the
page that measures them. Every step is a command of its own, printed before it runs, and takes up where it was stopped; one that
is done passes at once. ``--photos`` is a folder of COCO-style folders; without it all is trained on rendered scenes alone.

``--quick`` shows in about ten minutes that the chain holds: a few scenes, a minute of training each, and everything, weights
too, stays in the working folder. Without it the weights go where the package looks for them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from aopsam_lab.predictor import WEIGHTS

PHOTO_SHARES = {"bsds": 0.33, "coco": 0.27, "facade": 0.05}  # of the draws; scenes have the rest
OTHER_PHOTOS = 0.3  # for all folders of other names together
DETECTOR_FACADE = 0.35  # of the street pictures; of the other pools all


@dataclass(frozen=True)
class Budget:
    """Scenes to render and minutes to train, on two cores."""

    scenes: int
    tiny: float
    head_crops: int
    threshold_pictures: int
    crops: int
    predictor: float
    detector: float
    evaluation: int


FULL = Budget(scenes=6000, tiny=570, head_crops=4000, threshold_pictures=16, crops=16000, predictor=9, detector=70, evaluation=200)
QUICK = Budget(scenes=48, tiny=2.5, head_crops=40, threshold_pictures=2, crops=48, predictor=1, detector=1, evaluation=2)


def shares(pools: Path, photos: list[str]) -> list[str]:
    """``FOLDER:SHARE`` of the scenes' pool and of each folder of photographs."""
    others = [name for name in photos if name not in PHOTO_SHARES]
    share = {name: PHOTO_SHARES.get(name, OTHER_PHOTOS / max(1, len(others))) for name in photos}
    total = sum(share.values())
    specs = [f"{pools / 'scenes'}:{1 - total:.3g}"]
    return specs + [f"{pools / name}:{part:.3g}" for name, part in share.items()]


def commands(workdir: Path, photos: list[Path], budget: Budget, weights: Path, evaluate_on: list[Path]) -> list[list[str]]:
    """The arguments of ``python -m`` for each step, in order."""
    pools = workdir / "pools"
    specs = shares(pools, [folder.name for folder in photos])
    every = [f"{pools / folder.name}:{DETECTOR_FACADE if folder.name == 'facade' else 1}" for folder in photos]
    tiny, package = weights / "tiny_sam.safetensors", "aopsam_lab.training"
    pool = [f"{package}.pool", "--out", str(pools), "--scenes", str(budget.scenes)]
    return [
        pool + (["--photos", *map(str, photos)] if photos else []),
        [f"{package}.tiny_sam", "--pools", *specs, "--workdir", str(workdir / "tiny"), "--minutes", str(budget.tiny)]
        + ["--train-backbone"],
        [f"{package}.iou_head", "--pools", *specs, "--workdir", str(workdir / "tiny"), "--crops", str(budget.head_crops)],
        [f"{package}.export_tiny", "--pools", *specs, "--workdir", str(workdir / "tiny"), "--out", str(tiny)]
        + ["--pictures", str(budget.threshold_pictures)],
        [f"{package}.predictor", "--sam", "tiny", "--checkpoint", str(tiny), "--pools", *specs, "--workdir"]
        + [str(workdir / "predictor"), "--crops", str(budget.crops), "--minutes", str(budget.predictor)]
        + ["--out", str(weights / "predictor_tiny.safetensors")],
        [f"{package}.detector", "--pools", f"{pools / 'scenes'}:1", *every, "--workdir", str(workdir / "detector")]
        + ["--minutes", str(budget.detector), "--out", str(weights / "detector.safetensors")],
        ["aopsam_lab.study", "models", "--weights", str(weights), "--reports", str(workdir / "reports")]
        + ["--n-images", str(budget.evaluation), "--n-compared", str(min(30, budget.evaluation)), "--photos", *map(str, evaluate_on)],
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs"))
    parser.add_argument("--photos", type=Path, help="a folder of COCO-style folders to train on")
    parser.add_argument("--evaluate-on", type=Path, nargs="*", default=[], help="COCO-style folders never trained on")
    parser.add_argument("--quick", action="store_true", help="ten minutes, to see that the chain holds")
    args = parser.parse_args(argv)
    photos = []
    if args.photos is not None:
        photos = sorted(path.parent for path in args.photos.glob("*/annotations.json"))
        if not photos:
            print(f"error: no folder in {args.photos} holds an annotations.json", file=sys.stderr)
            return 1
    else:
        print("No photographs were given (--photos): training on rendered scenes alone.")
    weights = args.workdir / "weights" if args.quick else WEIGHTS
    weights.mkdir(parents=True, exist_ok=True)
    for step in commands(args.workdir, photos, QUICK if args.quick else FULL, weights, args.evaluate_on):
        print("\n$ python -m " + " ".join(step), flush=True)
        code = subprocess.run([sys.executable, "-m", *step]).returncode
        if code:
            print(f"error: that step failed with exit code {code}; mend it and run the same command again", file=sys.stderr)
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
