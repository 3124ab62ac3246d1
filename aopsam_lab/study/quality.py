"""How good the models themselves are: masks from given prompts, and prompts on the truths (ours).

Everything is measured at the picture's own resolution, on every truth of every picture.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from segment_anything.modeling import Sam
from segment_anything.utils.amg import build_point_grid

from aopsam_lab.asf import AsfParams
from aopsam_lab.batching import in_batches
from aopsam_lab.clicks import next_click
from aopsam_lab.data import Dataset
from aopsam_lab.data.points import pole
from aopsam_lab.data.sample import Sample
from aopsam_lab.decode_cache import DecodeCache
from aopsam_lab.decoding import Encoded, decode_batch, encode, full_resolution, image_decoder
from aopsam_lab.evaluator import evaluate, mean_interval
from aopsam_lab.methods import METHODS, Models
from aopsam_lab.pipeline import run_method

CLICKS = 5
SIZES = (0, 0.002, 0.01, 0.05, 1)  # of a truth's area in its picture's: edges of the classes that recall is given for
SIZE_NAMES = ("below 0.2%", "0.2% to 1%", "1% to 5%", "above 5%")
TOP = 64  # candidates of the Prompt Predictor that recall counts
WEAK = AsfParams(confidence=0.02)  # the default settings, but weak candidates too: for where a number of prompts is to be spent
BUDGET = 1024 // 5  # prompts that AoP-SAM may decode where it is compared with the 32 x 32 grid: a fifth of the grid's
LIMITS = (32, 64, 128, BUDGET, 2 * BUDGET)  # prompts that it may decode where its mIoU is shown by their number


@torch.inference_mode()
def decode_prompts(
    sam: Sam, encoded: Encoded, points: np.ndarray | None, labels: np.ndarray | None, boxes: np.ndarray | None, masks: slice
) -> tuple[np.ndarray, np.ndarray]:
    """Masks (P, M, H, W) bool and predicted IoUs (P, M) of P prompts, each with K points or one box.

    points (P, K, 2) with labels (P, K), 1 foreground, 0 background; or boxes (P, 4). Image frame. masks: which of SAM's four.
    """
    device = encoded.embedding.device
    decoder, batch = image_decoder(sam, encoded), decode_batch(encoded)

    def found_of(index: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        part = index.cpu().numpy()
        if boxes is None:
            at = encoded.to_model(torch.as_tensor(points[part], dtype=torch.float32, device=device))
            prompt = dict(points=(at, torch.as_tensor(labels[part], device=device)), boxes=None)
        else:
            corners = torch.as_tensor(boxes[part], dtype=torch.float32, device=device).unflatten(1, (2, 2))
            prompt = dict(points=None, boxes=encoded.to_model(corners).flatten(1))
        sparse = sam.prompt_encoder(**prompt, masks=None)[0]
        decoded = decoder.decode(sparse)
        scores = decoded.iou[:, masks]
        wanted = torch.zeros_like(decoded.iou, dtype=torch.bool)
        wanted[:, masks] = True
        full = full_resolution(sam, encoded, decoded.draw(wanted)) > sam.mask_threshold
        return full.unflatten(0, scores.shape).cpu().numpy(), scores.cpu().numpy()

    index = torch.arange(len(points if boxes is None else boxes), device=device)
    found, iou = zip(*in_batches(index, batch, found_of))
    return np.concatenate(found), np.concatenate(iou)


def ious(found: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """(P, M, H, W) bool against (P, H, W) bool -> (P, M)."""
    found, truth = np.packbits(found.reshape(*found.shape[:2], -1), -1), np.packbits(truths.reshape(len(truths), 1, -1), -1)
    both, either = (np.bitwise_count(x).sum(-1, dtype=np.int64) for x in (found & truth, found | truth))
    return both / np.maximum(either, 1)


def prompted_truths(sam: Sam, sample: Sample, clicks: int = CLICKS) -> tuple[pd.DataFrame, np.ndarray]:
    """Each truth of a picture prompted with its box, and with one to ``clicks`` clicks.

    One click: three masks, the best counts. From the second on SAM's single mask, the next click where the last mask is most
    wrong. Returns a row a truth (area as a share of the picture; box; click_1 ...) and (T, 3, 2), the predicted and the true
    IoU of each first click's three masks.
    """
    truths = sample.masks
    encoded = encode(sam, sample.image)
    ys, xs = truths.any(2), truths.any(1)
    high, wide = truths.shape[1:]
    boxes = np.stack([xs.argmax(1), ys.argmax(1), wide - xs[:, ::-1].argmax(1), high - ys[:, ::-1].argmax(1)], 1)
    table = pd.DataFrame({"area": truths.mean((1, 2))})
    table["box"] = ious(decode_prompts(sam, encoded, None, None, boxes, slice(0, 1))[0], truths)[:, 0]
    points = np.array([pole(truth)[:2] for truth in truths])[:, None]
    labels = np.ones(points.shape[:2], int)
    found, predicted = decode_prompts(sam, encoded, points, labels, None, slice(1, None))
    true = ious(found, truths)
    table["click_1"] = true.max(1)
    current = found[np.arange(len(truths)), true.argmax(1)]
    for k in range(2, clicks + 1):
        more = [next_click(mask, truth) for mask, truth in zip(current, truths)]
        points = np.concatenate([points, np.array([p[:2] for p in more])[:, None]], 1)
        labels = np.concatenate([labels, np.array([p[2] for p in more])[:, None]], 1)
        found, _ = decode_prompts(sam, encoded, points, labels, None, slice(0, 1))
        table[f"click_{k}"] = ious(found, truths)[:, 0]
        current = found[:, 0]
    return table, np.stack([predicted, true], -1)


def hit(truths: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(T, H, W) bool and (P, 2) points, image frame -> (T,) bool: is any point on the truth?"""
    if not len(points):
        return np.zeros(len(truths), bool)
    x = np.clip(points[:, 0].astype(int), 0, truths.shape[2] - 1)
    y = np.clip(points[:, 1].astype(int), 0, truths.shape[1] - 1)
    return truths[:, y, x].any(1)


def prompts_on_truths(sam: Sam, predictor, detector, sample: Sample) -> pd.DataFrame:
    """For each truth of a picture, whether any prompt of each source lies on it.

    Columns: area; predictor (its TOP strongest candidates, default sampling at a confidence of 0.02), predictor_all (those
    that the default confidence lets through), grid_8, grid_16, grid_32, detector (box centres, at most 100).
    """
    encoded = encode(sam, sample.image)
    models = Models(predictor, detector)

    def points_of(method: str, params: AsfParams = AsfParams()) -> np.ndarray:
        return METHODS[method].start(encoded, models, params).prompts.points.cpu().numpy()

    h, w = sample.image.shape[:2]
    table = pd.DataFrame({"area": sample.masks.mean((1, 2))})
    with torch.inference_mode():
        table["predictor"] = hit(sample.masks, points_of("aop_no_af", WEAK)[:TOP])
        table["predictor_all"] = hit(sample.masks, points_of("aop_no_af"))
        for side in (8, 16, 32):
            table[f"grid_{side}"] = hit(sample.masks, build_point_grid(side) * [w, h])
        table["detector"] = hit(sample.masks, points_of("oas_point"))
    return table


def measure(sam: Sam, predictor, detector, images: Dataset, progress=iter) -> tuple[pd.DataFrame, np.ndarray, pd.DataFrame]:
    """All pictures of a data set that have truths: rows of prompted_truths, its IoU pairs (N, 2), rows of prompts_on_truths."""
    prompted, pairs, prompts = [], [], []
    for i in progress(range(len(images))):
        sample = images[i]
        if not len(sample.masks):
            continue
        table, pair = prompted_truths(sam, sample)
        prompted.append(table.assign(image=sample.id))
        pairs.append(pair.reshape(-1, 2))
        prompts.append(prompts_on_truths(sam, predictor, detector, sample).assign(image=sample.id))
    return pd.concat(prompted, ignore_index=True), np.concatenate(pairs), pd.concat(prompts, ignore_index=True)


def compare_masks(sams: dict[str, Sam], name: str, images: Dataset, progress=iter) -> pd.DataFrame:
    """A row a SAM: its ``masks_row`` on all pictures of a data set that have truths, boxes and first clicks only.

    Raises ValueError where no picture has any.
    """
    found: dict[str, list[tuple[pd.DataFrame, np.ndarray]]] = {of: [] for of in sams}
    for i in progress(range(len(images))):
        sample = images[i]
        if not len(sample.masks):
            continue
        for of, sam in sams.items():
            table, pairs = prompted_truths(sam, sample, clicks=1)
            found[of].append((table.assign(image=sample.id), pairs.reshape(-1, 2)))
    if not all(found.values()):
        raise ValueError(f"no picture of {name} has masks: there is nothing to compare with.")
    rows = []
    for of, parts in found.items():
        tables, pairs = zip(*parts)
        rows.append({"sam": of, **masks_row(name, pd.concat(tables, ignore_index=True), np.concatenate(pairs))})
    return pd.DataFrame(rows)


def against_grid(sam: Sam, predictor, images: Dataset, count: int, progress=iter) -> pd.DataFrame:
    """AoP-SAM with at most each of ``LIMITS`` prompts, and both grids, on those of the first ``count`` pictures that have truths.

    A row a picture and run: image, method, limit (0: none), n_decoded, miou (greedy one-to-one), and missed: how much of
    AMG-D's lead over that run lies in truths on which no prompt was decoded, as a part of the picture's mIoU.
    """
    rows = []
    for i in progress(range(min(count, len(images)))):
        sample = images[i]
        if not len(sample.masks):
            continue
        encoded = encode(sam, sample.image)
        grid = run_method(sam, encoded, "amg_d")
        best = evaluate(sample.rles, grid.masks)
        rows.append((sample.id, "amg_d", 0, grid.n_decoded, best.miou, 0.0))
        cache = DecodeCache(sam, encoded)
        for method, limit in [("amg_s", 0), *(("aop", limit) for limit in LIMITS)]:
            found = run_method(sam, encoded, method, predictor, params=WEAK, decode=cache, max_prompts=limit or None)
            score = evaluate(sample.rles, found.masks)
            decoded = found.prompts.loc[found.prompts["round"] >= 0, ["x", "y"]].to_numpy()
            missed = (best.ious - score.ious)[~hit(sample.masks, decoded)].sum() / score.n_truth
            rows.append((sample.id, method, limit, found.n_decoded, score.miou, missed))
    return pd.DataFrame(rows, columns=["image", "method", "limit", "n_decoded", "miou", "missed"])


def budget_row(name: str, table: pd.DataFrame) -> dict[str, float | str | int]:
    """One row a data set of ``against_grid``: means of AoP-SAM with ``BUDGET`` prompts and of AMG-D, that of the grid's lead with
    its 95% interval over pictures, and the part of the lead that lies in truths without a prompt on them."""
    aop = table[(table["method"] == "aop") & (table["limit"] == BUDGET)].set_index("image")
    grid = table[table["method"] == "amg_d"].set_index("image")["miou"]
    lead, low, high = mean_interval(grid - aop["miou"])
    means = {"aop": aop["miou"].mean(), "amg_d": grid.mean(), "n_decoded": aop["n_decoded"].mean()}
    return {"dataset": name, "n_images": len(grid), **means, "lead": lead, "lead_lo": low, "lead_hi": high, "missed": aop["missed"].mean()}


def miou_by_prompts(table: pd.DataFrame) -> pd.DataFrame:
    """``against_grid`` -> a row a run (method, limit): means of n_decoded, miou and missed over the pictures, fewest prompts first."""
    means = table.drop(columns="image").groupby(["method", "limit"], as_index=False).mean()
    return means.sort_values("n_decoded", ignore_index=True)


def masks_row(name: str, prompted: pd.DataFrame, pairs: np.ndarray) -> dict[str, float | str | int]:
    """One row a data set: means over all truths, Spearman's rank correlation of predicted and true IoU."""
    return {
        "dataset": name,
        "n_images": prompted["image"].nunique(),
        "n_truth": len(prompted),
        **prompted.drop(columns=["area", "image"]).mean().to_dict(),
        "spearman": float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic),
    }


def summary_row(name: str, prompted: pd.DataFrame, pairs: np.ndarray, prompts: pd.DataFrame) -> dict[str, float | str | int]:
    """``masks_row``, and the share of truths with a prompt on them by source."""
    recalls = prompts.drop(columns=["area", "image"]).mean()
    return {**masks_row(name, prompted, pairs), **{f"recall_{k}": v for k, v in recalls.items()}}


def recall_by_size(prompts: pd.DataFrame) -> pd.DataFrame:
    """Share of truths with a prompt on them, a row a size class (with n), a column a source."""
    classes = pd.cut(prompts["area"], SIZES, labels=SIZE_NAMES)
    grouped = prompts.drop(columns=["area", "image"]).groupby(classes, observed=False)
    return grouped.mean().assign(n=grouped.size())


def calibration(pairs: np.ndarray, bins: int = 10) -> pd.DataFrame:
    """Predicted IoU in ``bins`` equal steps of [0, 1] -> mean predicted, mean true, n of each step that holds any."""
    step = np.clip((pairs[:, 0] * bins).astype(int), 0, bins - 1)
    table = pd.DataFrame({"step": step, "predicted": pairs[:, 0], "true": pairs[:, 1]})
    grouped = table.groupby("step")
    return grouped[["predicted", "true"]].mean().assign(n=grouped.size()).reset_index(drop=True)
