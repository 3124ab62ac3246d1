"""Train the bundled tiny SAM.

    python -m aopsam_lab.training.tiny_sam --pools POOLS/scenes:0.4 POOLS/photos:0.6 --workdir runs/tiny --minutes 90

A step takes some pictures and, for each, some masks with one prompt each: a click (three masks out, the best one learns,
as in SAM) or a box (one mask out). A share of the clicks goes on: the next click falls where the best mask is most wrong, and
the two together ask for one mask; then a third. Binary cross-entropy with Dice, because SAM's focal weights give empty masks for a long
time when nothing is pretrained; the IoU head learns the IoU that its masks really have. Masks are compared with the truth at the
picture's size, as they will be used: enlarged from the decoder's, of which a cell is two pixels wide, so that its logits learn where
in a cell an edge runs. Cosine schedule over the steps or
the minutes asked for, weights averaged (EMA), bf16 where the device is quick at it. ``workdir/last.pt`` holds all that a resumed run needs,
``workdir/curve.csv`` the learning curve. ``--hold-out`` leaves a tenth of each pool out of the training, and ``workdir/held_out.csv``
then says after each tenth of it what the averaged weights reach there.

On a GPU the pictures are what runs short. The GPU renders 60 scenes a second while nothing else runs on it, and makes the
training a third as quick while both do: so render some thousand first, and the rest meanwhile on three cores; the training
takes up what a pool holds by then. Twelve of the bundled weights' minutes, on an H200 with 16 processor cores, were

    python -m aopsam_lab.training.pool --out POOLS --scenes 4700 --first-scene 70000 --processes 5 --device cuda
    python -m aopsam_lab.training.pool --out POOLS --scenes 20000 --first-scene 74700 --processes 3 &
    python -m aopsam_lab.training.tiny_sam --pools POOLS/scenes:0.66 POOLS/bsds:0.15 POOLS/coco:0.15 POOLS/facade:0.04 \\
      --workdir runs/tiny --init WEIGHTS --train-backbone --minutes 11.95 --batch 96 --prompts 16 --lr 1.2e-3 --warmup 100 \\
      --ema 0.997 --workers 12

at 0.25 s a step, about what the GPU alone takes (its first minute shared the GPU with the renderers, at a third of that pace).
Photographs are few, and drawn so often they are known by heart: a longer training should draw them less.

All that was with pictures of 256 pixels. Crops show things at many scales, so the weights take larger pictures as they are, only
the position embedding is interpolated (``--init`` does it). On 32 scenes that no training saw (seeds 30040 to 30071, side 384) box
prompts' mean IoU is 0.838 at 256 pixels, 0.850 at 288, 0.855 at 320, 0.860 at 352 and 0.865 at 384, for a cost that grows with
the pixels. 320 was taken, and half an hour on two cores, at a twentieth of the learning rate, made it 0.858 (one click: 0.828 at
256, 0.851 at 320, 0.855 then):

    python -m aopsam_lab.training.tiny_sam --pools POOLS/scenes:0.8 POOLS/bsds:0.08 POOLS/coco:0.08 POOLS/facade:0.04 \\
      --workdir runs/tiny --init WEIGHTS --optimizer adamw --lr 6e-5 --warmup 30 --minutes 31 --batch 8 --prompts 8 --ema 0.98 --distorted 0

Then the photographs, known by heart, were made strange (``--distorted``), on the GPU again, 2,620 steps at 0.26 s:

    python -m aopsam_lab.training.tiny_sam --pools POOLS/scenes:0.58 POOLS/bsds:0.18 POOLS/coco:0.2 POOLS/facade:0.04 \\
      --workdir runs/tiny --init WEIGHTS --train-backbone --minutes 11.5 --batch 64 --prompts 16 --lr 9e-4 --warmup 80 \\
      --ema 0.997 --workers 12 --distorted 0.65 --hold-out

which gave one click 0.005 to 0.01 more IoU on the photographs drawn least, and 0.004 on scenes. Of photographs that it does not
know it still predicts too high an IoU: its IoU head is fitted anew after it, see `aopsam_lab.training.iou_head`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from aopsam_lab.clicks import next_clicks
from aopsam_lab.files import write_atomically
from aopsam_lab.sam.decoder import decode_tokens, draw_masks
from aopsam_lab.sam.tiny import IMG_SIZE, build_tiny_sam
from aopsam_lab.training.backbone import BACKBONE, installed_file, load_backbone
from aopsam_lab.training.card import licence, pool_counts
from aopsam_lab.training.muon import Muon
from aopsam_lab.training.pool import parse_pools
from aopsam_lab.training.prompted import BOX_SHARE, Keep, PromptedPictures, is_for_training, is_held_out

CORRECTED_SHARE = 0.25  # of a picture's clicks: these are corrected
FURTHER_CLICKS = 2
JOIN_RATE = 10.0  # times the learning rate, for what joins the backbone's features: it starts at zero
BACKBONE_RATE = 0.2  # and for the backbone itself, which has long been trained
COLUMNS = ("loss", "box", "click", "clicks", "iou_mse")  # of the learning curve
HELD_OUT_PICTURES = 48  # of each pool, or crops of what is held out, the same every time


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """3 BCE + 2 Dice of (..., H, W), one value a mask."""
    bce = F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none").mean((-1, -2))
    p = logits.sigmoid()
    overlap = (p * target).sum((-1, -2))
    dice = 1 - (2 * overlap + 1) / (p.sum((-1, -2)) + target.sum((-1, -2)) + 1)
    return 3 * bce + 2 * dice


def enlarged(logits: Tensor) -> Tensor:
    """(B, P, M, S/2, S/2) -> (B, P, M, S, S), as ``Sam.postprocess_masks`` does."""
    return F.interpolate(logits.flatten(0, 1), (IMG_SIZE, IMG_SIZE), mode="bilinear", align_corners=False).unflatten(0, logits.shape[:2])


def mask_iou(logits: Tensor, target: Tensor) -> Tensor:
    """IoU of ``logits > 0`` and ``target > 0.5`` over the last two axes."""
    on, true = logits > 0, target > 0.5
    return (on & true).sum((-1, -2)) / (on | true).sum((-1, -2)).clamp(min=1)


def click_tokens(encoder: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
    """``PromptEncoder``'s tokens for prompts of K clicks (B, P, K, 2), labels (B, P, K) 1 or 0 -> (B, P, K + 1, C).

    The same numbers as its ``forward`` gives (a test says so), without the indexed writes that ``torch.compile`` cannot trace.
    """
    types = encoder.point_embeddings  # background, foreground, top left, bottom right
    at = encoder.pe_layer.forward_with_coords(points.flatten(1, 2) + 0.5, encoder.input_image_size).view(*points.shape[:3], -1)
    at = at + torch.where(labels[..., None] > 0.5, types[1].weight[0], types[0].weight[0])
    return torch.cat([at, encoder.not_a_point_embed.weight.expand_as(at[:, :, :1])], 2)


def prompt_tokens(encoder: nn.Module, points: Tensor, boxes: Tensor) -> Tensor:
    """Tokens of single foreground clicks (B, K, 2) and of boxes (B, L, 4), model frame -> (B, K + L, 2, C); see click_tokens."""
    types = encoder.point_embeddings
    clicks = click_tokens(encoder, points[:, :, None], torch.ones_like(points[:, :, :1]))
    corners = boxes.unflatten(-1, (2, 2)) + 0.5
    corners = encoder.pe_layer.forward_with_coords(corners.flatten(1, 2), encoder.input_image_size).unflatten(1, (-1, 2))
    corners = corners + torch.cat([types[2].weight, types[3].weight])
    return torch.cat([clicks, corners], 1)


def preprocessed(sam: nn.Module, image: Tensor, size: Tensor) -> Tensor:
    """Padded pictures (B, 3, S, S) uint8 of which ``size`` (B, 2) is the unpadded (h, w), normalised: what ``Sam.preprocess`` gives."""
    x = (image.float() - sam.pixel_mean) / sam.pixel_std
    ys, xs = torch.arange(IMG_SIZE, device=x.device)[:, None], torch.arange(IMG_SIZE, device=x.device)[None]
    inside = (ys < size[:, 0, None, None]) & (xs < size[:, 1, None, None])
    return x * inside[:, None]  # padding is zero after normalisation


class TrainingStep(nn.Module):
    """Pictures and prompts in, loss and mean IoUs out; a module of its own so that it can be compiled."""

    def __init__(self, sam: nn.Module, bf16: bool = False):
        super().__init__()
        self.sam, self.bf16 = sam, bf16

    def forward(self, image: Tensor, size: Tensor, masks: Tensor, points: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        sam, device_type = self.sam, image.device.type
        b, p = points.shape[:2]
        n_boxes = round(p * BOX_SHARE)
        clicks = p - n_boxes
        x = preprocessed(sam, image, size)
        # in float32: bfloat16 coordinates would be half a pixel off
        image_pe = sam.prompt_encoder.get_dense_pe()
        sparse = prompt_tokens(sam.prompt_encoder, points[:, :clicks], boxes[:, clicks:])
        dense = sam.prompt_encoder.no_mask_embed.weight[0]
        with torch.autocast(device_type, torch.bfloat16, enabled=self.bf16):
            embedding = sam.image_encoder(x).float()
            decoded = decode_tokens(sam.mask_decoder, embedding, image_pe, sparse, dense)
            logits = draw_masks(sam.mask_decoder, decoded, slice(None)).float().unflatten(0, (b, p))  # (B, P, 4, 2h, 2w)
        predicted = decoded.iou.float().unflatten(0, (b, p))
        target = masks[:, :, None].float()
        covered = F.avg_pool2d(target[:, :clicks, 0], 2)  # of each of the decoder's cells
        single, three = enlarged(logits[:, clicks:, :1]), logits[:, :clicks, 1:]
        loss_three = mask_loss(three, covered[:, :, None])
        best = loss_three.argmin(2, keepdim=True)
        shown = three.gather(2, best[..., None, None].expand(-1, -1, -1, *three.shape[-2:]))
        iou_box = mask_iou(single, target[:, clicks:])
        iou_three = mask_iou(enlarged(three.detach()), target[:, :clicks])
        # 0.05 of the others keeps a mask token alive that never wins
        loss = mask_loss(single, target[:, clicks:]).sum() + mask_loss(enlarged(shown), target[:, :clicks]).sum()
        loss = loss + 0.05 * loss_three.mean(2).sum()
        loss_iou = ((predicted[:, clicks:, :1] - iou_box) ** 2).sum() + ((predicted[:, :clicks, 1:] - iou_three) ** 2).mean(2).sum()
        corrected = max(1, round(clicks * CORRECTED_SHARE))
        at, labels = points[:, :corrected, None], torch.ones_like(points[:, :corrected, :1])
        wanted = target[:, :corrected]
        shown = shown[:, :corrected]
        for _ in range(FURTHER_CLICKS):
            cell, label = next_clicks(shown[:, :, 0] > 0, covered[:, :corrected] >= 0.5)
            at = torch.cat([at, 2 * cell[:, :, None]], 2)  # a cell is two model-frame pixels wide
            labels = torch.cat([labels, label[:, :, None]], 2)
            sparse = click_tokens(sam.prompt_encoder, at, labels)
            with torch.autocast(device_type, torch.bfloat16, enabled=self.bf16):
                decoded = decode_tokens(sam.mask_decoder, embedding, image_pe, sparse, dense)
                shown = draw_masks(sam.mask_decoder, decoded, slice(0, 1)).float().unflatten(0, (b, corrected))
            large = enlarged(shown)
            iou_corrected = mask_iou(large, wanted)
            loss = loss + mask_loss(large, wanted).sum()
            loss_iou = loss_iou + ((decoded.iou[:, :1].float().view(b, corrected, 1) - iou_corrected) ** 2).sum()
        return dict(
            loss=(loss + 2 * loss_iou) / (b * p),
            box=iou_box.mean().detach(),
            click=iou_three.gather(2, best).mean().detach(),
            clicks=iou_corrected.mean().detach(),
            iou_mse=((predicted[:, :clicks, 1:] - iou_three) ** 2).mean().detach(),
        )


def quick_at_bf16(device: torch.device) -> bool:
    """Whether bf16 pays: on CUDA, and on processors with AVX-512. With AVX2 alone it is emulated, eight times slower than float32."""
    return device.type == "cuda" or (device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512"))


def learning_rate(progress: float, step: int, peak: float, warmup: int = 300) -> float:
    """Linear warm-up, then a cosine down to 1% at progress 1."""
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_optimizer(name: str, sam: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """``adamw``, or ``muon``: Muon for the matrices inside, AdamW for embeddings, vectors and the first convolution."""
    joins, seen, muon, decay, rest = [], [], [], [], []
    for key, p in sam.named_parameters():
        if not p.requires_grad:
            continue
        if ".backbone." in key:
            seen.append(p)
            continue
        inside = p.ndim > 1 and min(p.shape[0], p[0].numel()) >= 16 and "embed" not in key and "token.weight" not in key and "tokens" not in key
        inside = name == "muon" and inside and p.shape[1] > 3
        (joins if inside and ".more" in key else muon if inside else decay if p.ndim > 1 else rest).append(p)
    groups = [dict(params=muon, weight_decay=weight_decay, muon=True)] if muon else []
    groups += [dict(params=joins, weight_decay=weight_decay, muon=True, rate=JOIN_RATE)] if joins else []
    groups += [dict(params=seen, weight_decay=0.0, rate=BACKBONE_RATE)] if seen else []
    groups += [dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
    return (Muon if muon else torch.optim.AdamW)(groups, lr=lr, betas=(0.9, 0.98))


def save_atomically(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def averaged_weights(state: dict) -> dict[str, Tensor]:
    """The averaged weights (EMA) in what a training's ``last.pt`` holds, by the SAM's own names."""
    prefix = "module."
    return {key[len(prefix) :]: value for key, value in state["ema"].items() if key.startswith(prefix)}


def held_out_batches(pools: list[tuple[float, list[Path]]], prompts: int, batch: int) -> dict[str, list[dict[str, Tensor]]]:
    """Of each pool's held-out pictures the same crops and prompts every time, in batches, by the pool's name."""
    drawn = {}
    for share, paths in pools:
        crops = list(itertools.islice(PromptedPictures([(share, paths)], prompts, seed=0, keep=is_held_out), HELD_OUT_PICTURES))
        drawn[paths[0].parent.name] = [default_collate(crops[at : at + batch]) for at in range(0, len(crops), batch)]
    return drawn


@torch.no_grad()
def held_out_quality(forward: TrainingStep, batches: dict[str, list[dict[str, Tensor]]], device: torch.device) -> dict[str, list[float]]:
    """The learning curve's ``COLUMNS`` on what is held out, by pool."""
    quality = {}
    for name, some in batches.items():
        out = [forward(**{k: v.to(device) for k, v in batch.items()}) for batch in some]
        weights = torch.tensor([len(batch["image"]) for batch in some], dtype=torch.float32)
        values = torch.stack([torch.stack([x[k].float().cpu() for k in COLUMNS]) for x in out])
        quality[name] = (weights @ values / weights.sum()).tolist()
    return quality


def described(pools: list[tuple[float, list[Path]]], keep: Keep | None = None) -> str:
    """What a model card says of the data; keep: which of the entries are trained on."""
    return pool_counts([(share, list(filter(keep, paths))) for share, paths in pools]) + "; scenes with training seeds only"


def read_start(path: str, sam: nn.Module) -> tuple[dict[str, Tensor], int]:
    """Weights to start a training from, float32, and the steps that they have seen.

    Those of a smaller or larger picture fit as well: the position embedding, all that depends on the size, is interpolated.
    """
    with safe_open(path, "pt") as file:
        weights = {key: file.get_tensor(key).float() for key in file.keys()}
        steps = int((file.metadata() or {}).get("steps", 0))
    key, wanted = "image_encoder.pos_embed", sam.image_encoder.pos_embed.shape[1]
    if weights[key].shape[1] != wanted:
        had, side = math.isqrt(weights[key].shape[1]), math.isqrt(wanted)
        grid = weights[key].unflatten(1, (had, had)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
        weights[key] = grid.flatten(2).transpose(1, 2).contiguous()
    return weights, steps


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    work = Path(args.workdir)
    work.mkdir(parents=True, exist_ok=True)
    sam = build_tiny_sam().to(device).train()
    if not args.init:
        load_backbone(sam.image_encoder.backbone, installed_file())
    sam.image_encoder.backbone.requires_grad_(args.train_backbone)
    ema = torch.optim.swa_utils.AveragedModel(sam, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema), use_buffers=True)
    optimizer = make_optimizer(args.optimizer, sam, args.lr, args.weight_decay)
    step, seconds = 0, 0.0
    start, earlier_steps = read_start(args.init, sam) if args.init else ({}, 0)
    if (work / "last.pt").exists():
        state = torch.load(work / "last.pt", map_location=device, weights_only=True)
        sam.load_state_dict(state["sam"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    elif start:
        sam.load_state_dict(start)
        ema.module.load_state_dict(start)
    pools = parse_pools(args.pools)
    keep = is_for_training if args.hold_out else None
    about = {"Data": described(pools, keep), "Licence": licence(pools)}
    about["Backbone"] = f"{BACKBONE}; {'trained further' if args.train_backbone else 'not trained'} in this run"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} cores"
    about["Batches"] = f"{args.batch} pictures with {args.prompts} prompts each a step, on {where}; {args.distorted:.0%} of the photographs distorted"
    if start:
        about["earlier_steps"] = earlier_steps
        about["Start"] = f"weights after {earlier_steps} steps"
    if (work / "about.json").exists():  # what was said of the start holds for the whole run
        about = json.loads((work / "about.json").read_text()) | {key: about[key] for key in ("Data", "Licence", "Batches")}
    write_atomically(work / "about.json", json.dumps(about))
    # a resumed run, and one that goes on from earlier weights, draw what was not drawn before
    data = PromptedPictures(pools, args.prompts, seed=args.seed + step + about.get("earlier_steps", 0), keep=keep, distorted=args.distorted)
    held_out = held_out_batches(pools, args.prompts, args.batch) if args.hold_out else {}
    loader = iter(DataLoader(data, args.batch, num_workers=args.workers, prefetch_factor=4 if args.workers else None,
                             pin_memory=device.type == "cuda", persistent_workers=args.workers > 0))
    forward = TrainingStep(sam, quick_at_bf16(device))
    if args.compile:
        forward = torch.compile(forward)
    curve = open(work / "curve.csv", "a", newline="")
    writer = csv.writer(curve)
    if step == 0:
        writer.writerow(["step", "minutes", "lr", *COLUMNS])
    started, recent, saved = time.perf_counter() - seconds, [], time.perf_counter()

    def progress() -> float:
        return step / args.steps if args.steps else (time.perf_counter() - started) / (60 * args.minutes)

    def save() -> None:
        state = dict(sam=sam.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step)
        save_atomically(dict(state, seconds=time.perf_counter() - started), work / "last.pt")

    def compare() -> None:
        forward = TrainingStep(ema.module, quick_at_bf16(device))
        new = not (work / "held_out.csv").exists()
        with open(work / "held_out.csv", "a", newline="") as file:
            rows = csv.writer(file)
            if new:
                rows.writerow(["step", "pool", *COLUMNS])
            for name, values in held_out_quality(forward, held_out, device).items():
                rows.writerow([step, name, *(f"{value:.4f}" for value in values)])
                print(f"step {step}  held out of {name}:  box {values[1]:.3f}  click {values[2]:.3f}", flush=True)

    began, compared = step, progress()
    while progress() < 1:
        lr = learning_rate(progress(), step, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("rate", 1.0)
        batch = {k: v.to(device, non_blocking=True) for k, v in next(loader).items()}
        out = forward(**batch)
        optimizer.zero_grad(set_to_none=True)
        out["loss"].backward()
        nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(sam)
        step += 1
        recent.append(torch.stack([out[k].detach() for k in COLUMNS]))
        if step % args.log_every == 0:
            means = torch.stack(recent).mean(0).tolist()
            recent.clear()
            minutes = (time.perf_counter() - started) / 60
            writer.writerow([step, f"{minutes:.2f}", f"{lr:.2e}", *(f"{m:.4f}" for m in means)])
            curve.flush()
            print(f"step {step}  {minutes:.2f} min  loss {means[0]:.3f}  box {means[1]:.3f}  click {means[2]:.3f}  "
                  f"three clicks {means[3]:.3f}", flush=True)
        if time.perf_counter() - saved > args.save_every:
            save()
            saved = time.perf_counter()
        if held_out and progress() >= compared + 0.1:
            compared = progress()
            compare()
    save()
    if held_out and step > began:  # a finished training, run again, has its last rows
        compare()
    about["Data"] = described(parse_pools(args.pools), keep)  # pools may have grown
    write_atomically(work / "about.json", json.dumps(about))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", nargs="+", required=True, help="FOLDER:SHARE of each pool")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--minutes", type=float, default=90, help="training time in all, resumed runs counted together")
    parser.add_argument("--steps", type=int, default=0, help="if given, the schedule follows steps in place of minutes")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=300, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.03)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--train-backbone", action="store_true", help="ImageNet's features as well, which else stay as they are")
    parser.add_argument("--init", help="start from these safetensors weights (a fresh optimiser)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--distorted", type=float, default=0.6, help="share of the photographs to distort")
    parser.add_argument("--hold-out", action="store_true", help="a tenth of each pool, and say what is reached there")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=float, default=120, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
