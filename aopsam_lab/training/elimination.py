"""Choose the floor of the elimination threshold (``asf.OWN_QUANTILE``), which masks explain (``methods.REFERENCE_IOU``) and the
share of the points that is decoded before any is eliminated (``methods.FIRST``) on training pictures (ours).

    python -m aopsam_lab.training.elimination --pools POOLS/scenes POOLS/bsds --pictures 12

For every picture and each of these settings: the mIoU of ``aop``, how many of its candidates elimination removes, and how many
prompts are decoded. Beside them ``aop_no_af``, the same candidates without elimination (``first`` 1), also at higher confidences:
these, too, remove candidates, so elimination should not lose more for as many. Each point is decoded once.
The higher the floor, the IoU or the first share, the less is removed and the less is lost.

Give it pictures that SAM has seldom seen: of photographs that it knows by heart it is surer of its masks than it will be of new ones.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from unittest import mock

import pandas as pd
from tqdm.auto import tqdm

from aopsam_lab import asf, methods
from aopsam_lab.asf import AsfParams
from aopsam_lab.decode_cache import DecodeCache
from aopsam_lab.decoding import encode
from aopsam_lab.evaluator import evaluate
from aopsam_lab.pipeline import loaded_model, loaded_sam, run_method
from aopsam_lab.rle import encode_rle
from aopsam_lab.training.examples import HELD_OUT
from aopsam_lab.training.pool import parse_pools, read_entry

QUANTILES = (0.1, 0.3, 0.5, 0.7)
IOUS = (0.5, 0.6, 0.7)
FIRSTS = (0.3, 0.4, 0.5, 0.6)
CONFIDENCES = (0.25, 0.3, 0.35)


def try_settings(
    path: Path,
    quantiles: tuple[float, ...] = QUANTILES,
    ious: tuple[float, ...] = IOUS,
    firsts: tuple[float, ...] = FIRSTS,
    confidences: tuple[float, ...] = CONFIDENCES,
) -> list[dict]:
    """One pool entry: rows for ``aop_no_af`` at the default and other confidences (floor and iou NaN, first 1), and rows for ``aop``."""
    sam = loaded_sam("tiny")
    predictor = loaded_model("predictor", sam)
    image, masks = read_entry(path)
    truths, encoded = encode_rle(masks), encode(sam, image)
    cache, rows, none = DecodeCache(sam, encoded), [], float("nan")

    def row(method: str, first: float, iou: float, quantile: float, params: AsfParams) -> None:
        found = run_method(sam, encoded, method, predictor, params=params, decode=cache)
        settings = {"first": first, "iou": iou, "floor": quantile, "confidence": params.confidence}
        removed = 1 - found.n_decoded / max(1, rows[0]["decoded"] if rows else found.n_decoded)
        rows.append({**settings, "miou": evaluate(truths, found.masks).miou, "removed": removed, "decoded": found.n_decoded})

    for confidence in (AsfParams().confidence, *confidences):
        row("aop_no_af", 1, none, none, AsfParams(confidence=confidence))
    for first, iou, quantile in product(firsts, ious, quantiles):
        with (
            mock.patch.object(asf, "OWN_QUANTILE", quantile),
            mock.patch.object(methods, "REFERENCE_IOU", iou),
            mock.patch.object(methods, "FIRST", first),
        ):
            row("aop", first, iou, quantile, AsfParams())
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", nargs="+", required=True, help="folders of pools, best of pictures that SAM has seldom seen")
    parser.add_argument("--pictures", type=int, default=12, help="of each pool")
    args = parser.parse_args(argv)
    for folder in args.pools:
        [(_, paths)] = parse_pools([f"{folder}:1"])
        chosen = paths[::HELD_OUT][: args.pictures]  # the pictures that the predictor's training holds out
        rows = [row for path in tqdm(chosen, desc=Path(folder).name) for row in try_settings(path)]
        table = pd.DataFrame(rows).groupby(["first", "iou", "floor", "confidence"], dropna=False, sort=False).mean()
        table["lost"] = table["miou"].iloc[0] - table["miou"]  # of the first row: nothing eliminated
        print(f"\n{folder}, {len(chosen)} pictures\n{table.round(4).to_string()}")


if __name__ == "__main__":
    main()
