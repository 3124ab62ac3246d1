"""Choose prompting by measuring, on the photographs that `train-predictor` holds out.

    python -m aopsam_lab.training.trials prompts --data FOUND --predictor FILE
    python -m aopsam_lab.training.trials filtering --data FOUND

"prompts" compares grids with the candidates of a Prompt Predictor, by sampling and prompt limit.
"filtering" compares both readings of adaptive filtering with as many prompts without it. Each trial
is a row of a CSV, with means a photograph: `miou` is against the masks that people drew, `coverage`
the share of the masks that the SAM found, `hit` the share of these that a decoded prompt lies on. A
limit below 1 is a share of the candidates.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pandas as pd
from segment_anything.modeling import Sam
from tqdm import tqdm

from aopsam_lab.asf import AsfParams
from aopsam_lab.command import in_one_line
from aopsam_lab.data import open_dataset
from aopsam_lab.data.sample import Sample
from aopsam_lab.evaluator import covered, evaluate, iou_matrix
from aopsam_lab.masks.rle import decode_rle
from aopsam_lab.pipeline.decode import encode
from aopsam_lab.pipeline.decode_cache import DecodeCache, PcmCache
from aopsam_lab.pipeline.methods import METHODS, Aop, Grid, Method
from aopsam_lab.pipeline.run import run_method
from aopsam_lab.predictor import PromptPredictor, load_predictor
from aopsam_lab.sam.zoo import MODELS, load_sam
from aopsam_lab.training import append_rows, split

LIMITS = (64, 100, 128, 144, 196, 256, 409, 1024)
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
GRIDS = (8, 10, 12, 14, 16, 32)
SAMPLINGS = (  # smoothing, confidence, spacing
    (3.0, 0.01, 8.0), (3.0, 0.01, 6.0), (2.0, 0.2, 6.0), (2.0, 0.02, 6.0), (1.0, 0.01, 4.0),
    (0.5, 0.01, 3.0), (0.25, 0.005, 2.0), (0.0, 0.005, 2.0), (0.0, 0.005, 1.0),
)  # fmt: skip
FIRSTS, ROUNDS, ELIMINATIONS = (0.2, 0.3, 0.5), (2, 4, 8), (1.25, 1.3, 1.35, 1.4)
# a method, its parameters, and how many prompts it may decode: a number, a share, or all
Trial = tuple[Method, AsfParams, float | None]

TRIALS: dict[str, list[Trial]] = {
    "prompts": [(Grid("grid", side), AsfParams(), None) for side in GRIDS],
    "filtering": [(METHODS["aop_no_af"], AsfParams(), share) for share in (None, *SHARES)],
}
for values, name, limit in product(SAMPLINGS, ("aop", "aop_no_af"), LIMITS):
    TRIALS["prompts"].append((METHODS[name], AsfParams(*values), limit))
for name, first, rounds, elimination in product(("aop", "aop_raw"), FIRSTS, ROUNDS, ELIMINATIONS):
    method = Aop(name, literal=name == "aop_raw", first=first, rounds=rounds)
    TRIALS["filtering"].append((method, AsfParams(elimination=elimination), None))


def measure(
    sam: Sam, predictor: PromptPredictor, sample: Sample, trials: list[Trial]
) -> pd.DataFrame:
    """What each trial gives on a photograph, a row each; every point is decoded once."""
    encoded = encode(sam, sample.image)
    cache, pcm = DecodeCache(sam, encoded), PcmCache(predictor, encoded)
    pairs = list(zip(sample.rles, sample.clicks or [[]] * len(sample.rles), strict=True))
    by_people = [rle for rle, clicks in pairs if not clicks]
    by_sam = [rle for rle, clicks in pairs if clicks]
    drawn = decode_rle(by_sam, sample.image.shape[:2])
    rows, sampled = [], 0
    for method, params, limit in trials:
        most = None if limit is None else round(limit if limit >= 1 else max(1, limit * sampled))
        found = run_method(sam, encoded, method, pcm, params=params, decode=cache, max_prompts=most)
        sampled = max(sampled, found.n_sampled)
        decoded = found.prompts[~found.prompts["status"].isin(("eliminated", "not_reached"))]
        x, y = decoded[["x", "y"]].to_numpy().astype(int).T
        n_covered = covered(iou_matrix(by_sam, found.masks))
        row = {
            "miou": evaluate(by_people, found.masks).miou,
            "coverage": n_covered / len(by_sam) if by_sam else None,
            "hit": drawn[:, y, x].any(1).mean() if by_sam else None,
            "sampled": found.n_sampled,
            "decoded": found.n_decoded,
            "eliminated": found.n_eliminated / max(1, found.n_sampled),
            "masks": len(found.masks),
        }
        rows.append(row)
    return pd.DataFrame(rows, dtype=float)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the trials of a kind and add their rows to the CSV."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("kind", choices=list(TRIALS))
    add("--data", required=True, type=Path, help="a folder of `find-masks`")
    add("--predictor", type=Path, help="weights other than the bundled ones")
    add("--sam", default="mobile_sam", choices=list(MODELS))
    add("--photos", type=int, default=24, help="held-out photographs to measure on, at most")
    add("--whole", action="store_true", help="the training saw none: hold out all of DATA")
    add("--out", type=Path, help="the CSV to add to; reports/training/KIND.csv")
    add("--device", default="auto")
    args = parser.parse_args(arguments)
    sam = load_sam(args.sam, device=args.device)
    predictor = load_predictor(args.sam, args.predictor, sam.device)
    data, trials = open_dataset(args.data), TRIALS[args.kind]
    held = list(range(len(data))) if args.whole else split(data)[1]
    held = held[:: max(1, len(held) // args.photos)][: args.photos]
    tables = [measure(sam, predictor, data[i], trials) for i in tqdm(held, unit="photo")]
    means = pd.concat(tables).groupby(level=0).mean().to_dict("records")
    rows = []
    for (method, params, limit), row in zip(trials, means, strict=True):
        about = {"predictor": predictor.sha256[:12], "photographs": len(held)}
        about |= {"method": method.name, "limit": limit, **asdict(params)}
        about |= {name: getattr(method, name, None) for name in ("first", "rounds")}
        if not getattr(method, "filtering", False):
            about |= dict.fromkeys(("elimination", "first", "rounds"))
        rows.append({**about, **row})
    append_rows(args.out or Path("reports/training") / f"{args.kind}.csv", rows)


if __name__ == "__main__":
    raise SystemExit(in_one_line("trials", main, "nothing was written."))
