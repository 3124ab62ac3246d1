"""Choose tiny's two thresholds on training pictures and write its bundled weights.

    python -m aopsam_lab.training.export_tiny --workdir runs/tiny --pools POOLS/scenes:0.5 POOLS/photos:0.5

Thresholds (ours): a grid of predicted-IoU and stability thresholds is tried on AMG-D's masks of the pools' pictures. Greedy
mIoU never punishes a mask more, so its best pair keeps everything; of all pairs within one standard error of the best (of the
difference, picture by picture) the one that keeps the fewest masks wins. AMG-D is the opponent: the thresholds suit it first.
Masks are compared at low resolution, which is near enough for choosing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from segment_anything.modeling import Sam
from segment_anything.utils.amg import batched_mask_to_box, build_point_grid, calculate_stability_score
from torchvision.ops import nms
from tqdm.auto import tqdm

from aopsam_lab.evaluator import score_matrix
from aopsam_lab.files import write_atomically
from aopsam_lab.decoding import BOX_NMS_THRESH, STABILITY_OFFSET
from aopsam_lab.sam.decoder import decode_tokens, draw_masks
from aopsam_lab.sam.tiny import IMG_SIZE, STRIDE, WIDTH, build_tiny_sam
from aopsam_lab.sam.zoo import TINY_WEIGHTS
from aopsam_lab.training.card import write_card
from aopsam_lab.training.examples import whole_picture
from aopsam_lab.training.pool import parse_pools, read_entry
from aopsam_lab.training.tiny_sam import averaged_weights

IOU_GRID = np.arange(0.20, 0.86, 0.05)
STABILITY_GRID = np.arange(0.50, 0.96, 0.10)


@torch.inference_mode()
def grid_masks(sam: Sam, image: np.ndarray, masks: np.ndarray, side: int = 32) -> dict[str, torch.Tensor]:
    """Everything AMG-D decodes on a picture: predicted IoU, stability, box and IoU with each truth (n_truth, n)."""
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy()).to(sam.device)[None]
    embedding = sam.image_encoder(sam.preprocess(pixels))
    h, w = image.shape[:2]
    points = torch.from_numpy(build_point_grid(side) * [w, h]).float().to(sam.device)
    truth = torch.from_numpy(masks).to(sam.device).flatten(1).float()
    columns = dict(iou=[], stability=[], box=[], overlap=[])
    for part in points.split(64):
        labels = torch.ones(len(part), 1, device=sam.device)
        sparse = sam.prompt_encoder(points=(part[:, None], labels), boxes=None, masks=None)[0]
        dense = sam.prompt_encoder.no_mask_embed.weight[0]
        decoded = decode_tokens(sam.mask_decoder, embedding, sam.prompt_encoder.get_dense_pe(), sparse[None], dense)
        low = draw_masks(sam.mask_decoder, decoded, slice(1, None)).flatten(0, 1)[:, : masks.shape[1], : masks.shape[2]]
        on = low > 0
        flat = on.flatten(1).float()
        overlap = truth @ flat.T
        columns["iou"].append(decoded.iou[:, 1:].flatten())
        columns["stability"].append(calculate_stability_score(low, 0.0, STABILITY_OFFSET))
        columns["box"].append(batched_mask_to_box(on).float())
        columns["overlap"].append((overlap / (truth.sum(1)[:, None] + flat.sum(1) - overlap).clamp(min=1)).T)
    found = {name: torch.cat(parts).cpu() for name, parts in columns.items()}
    found["overlap"] = found["overlap"].T
    return found


def choose_thresholds(sam: Sam, paths: list[Path]) -> tuple[float, float, float, float]:
    """(predicted-IoU threshold, stability threshold, mIoU, masks kept a picture) of AMG-D on the pictures."""
    shape = (len(IOU_GRID), len(STABILITY_GRID))
    miou, kept = np.zeros((len(paths), *shape)), np.zeros(shape)
    for n, path in enumerate(tqdm(paths, desc="thresholds")):
        image, masks = whole_picture(*read_entry(path))
        found = grid_masks(sam, image, masks)
        for i, least_iou in enumerate(IOU_GRID):
            for j, least_stability in enumerate(STABILITY_GRID):
                good = (found["iou"] > least_iou) & (found["stability"] >= least_stability)
                index = good.nonzero()[:, 0]
                index = index[nms(found["box"][index], found["iou"][index], BOX_NMS_THRESH)]
                miou[n, i, j] = score_matrix(found["overlap"][:, index].numpy()).miou
                kept[i, j] += len(index) / len(paths)
    i, j = choose_pair(miou, kept)
    return round(float(IOU_GRID[i]), 3), round(float(STABILITY_GRID[j]), 3), float(miou[:, i, j].mean()), float(kept[i, j])


def choose_pair(miou: np.ndarray, kept: np.ndarray) -> tuple[int, int]:
    """mIoU (pictures, I, J) and masks kept (I, J) -> the pair that keeps the fewest within one standard error of the best."""
    best = miou[(slice(None), *np.unravel_index(miou.mean(0).argmax(), kept.shape))]
    loss = best[:, None, None] - miou
    error = loss.std(0, ddof=1) / np.sqrt(len(miou)) if len(miou) > 1 else np.zeros(kept.shape)
    near = loss.mean(0) <= error
    return np.unravel_index(np.where(near, kept, np.inf).argmin(), kept.shape)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="of the training: its last.pt and curve.csv, and its iou_head.pt if there is one")
    parser.add_argument("--pools", nargs="+", required=True, help="FOLDER:SHARE of each pool")
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--out", type=Path, default=TINY_WEIGHTS)
    args = parser.parse_args(argv)
    state = torch.load(args.workdir / "last.pt", map_location="cpu", weights_only=True)
    weights = averaged_weights(state)
    trained = json.loads((args.workdir / "about.json").read_text())
    if (args.workdir / "iou_head.pt").exists():
        fitted = torch.load(args.workdir / "iou_head.pt", map_location="cpu", weights_only=True)
        if fitted["step"] != state["step"]:
            parser.error(f"{args.workdir / 'iou_head.pt'} was fitted after {fitted['step']} steps, there are {state['step']} now: fit it again or remove it")
        weights |= {f"mask_decoder.iou_prediction_head.{k}": v for k, v in fitted["head"].items()}
        trained["IoU head"] = fitted["about"]
    weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    sam = build_tiny_sam()
    sam.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    sam.eval().requires_grad_(False)
    pools = parse_pools(args.pools)
    total = sum(share for share, _ in pools)
    paths = []
    for share, entries in pools:
        step = max(1, len(entries) // max(1, round(args.pictures * share / total)))
        paths += entries[::step][: round(args.pictures * share / total)]
    iou, stability, miou, kept = choose_thresholds(sam, paths)
    steps = trained.pop("earlier_steps", 0) + state["step"]  # those of the weights it began from as well
    about = dict(pred_iou_thresh=str(iou), stability_score_thresh=str(stability), steps=str(steps))
    write_atomically(args.out, to_safetensors({k: v.contiguous() for k, v in weights.items()}, metadata=about))
    thresholds = (
        f"predicted IoU > {iou}, stability >= {stability}: AMG-D's mIoU on {len(paths)} training pictures is {miou:.3f} with "
        f"{kept:.0f} masks a picture"
    )
    facts = {
        "Model": f"image encoder of 6.0 M parameters ({IMG_SIZE} x {IMG_SIZE} pixels in, {WIDTH} x {IMG_SIZE // STRIDE} x "
        f"{IMG_SIZE // STRIDE} out), 0.7 M of them EfficientNet-Lite0's up to stride 16; segment_anything's prompt encoder and mask "
        f"decoder at width {WIDTH}",
        **trained,
        "Training": f"{state['step']} steps, {state['seconds'] / 60:.0f} minutes, by `python -m aopsam_lab.training.tiny_sam`; "
        "weights averaged (EMA); exported by `python -m aopsam_lab.training.export_tiny`",
        "Thresholds": thresholds,
    }
    summary = "The bundled tiny SAM: a plain `segment_anything.modeling.Sam`, trained here, an ImageNet backbone in its encoder."
    about = "`box` and `click` are mean training IoUs of box prompts and of the best of three masks of one click"
    write_card(args.out, summary, facts, args.workdir / "curve.csv", about)
    print(f"{args.out}: {thresholds}")


if __name__ == "__main__":
    main()
