"""Fit the tiny SAM's IoU head anew on pictures that the SAM does not know.

    python -m aopsam_lab.training.iou_head --workdir runs/tiny --pools POOLS/scenes:0.3 POOLS/photos:0.7

Of photographs known by heart, as of their distortions, a SAM predicts its masks' IoUs partly by remembering; of a new photograph
it then predicts too much, and in a wrong order. Here all of it stays as trained but the IoU head, the small network that reads a
prompt's IoU token. It learns the IoUs that the masks of scenes and of deformed photographs (`training.distortions.deform`, a kind
the training has not seen) really have, its input blurred by noise, so that what only the training's own pictures show counts for
little.

The tokens are computed once, in shards under ``workdir/iou_head``: killed and started again, it goes on at the first missing one.
Writes ``workdir/iou_head.pt``, which `training.export_tiny` puts in the place of the head of the same ``last.pt``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from aopsam_lab.sam.decoder import decode_tokens, draw_masks
from aopsam_lab.sam.tiny import build_tiny_sam
from aopsam_lab.training.card import pool_counts
from aopsam_lab.training.distortions import deform
from aopsam_lab.training.pool import parse_pools
from aopsam_lab.training.prompted import BOX_SHARE, PromptedPictures
from aopsam_lab.training.tiny_sam import averaged_weights, enlarged, mask_iou, preprocessed, prompt_tokens, save_atomically

PROMPTS = 12  # a picture
SHARD = 100  # pictures
NOISE = 0.5  # added to each channel of a token, of its standard deviation
STEPS, BATCH, RATE = 3000, 1024, 1e-4


def averaged_sam(workdir: Path) -> tuple[Sam, int]:
    """The averaged weights of a training's ``last.pt`` in eval mode, and its steps."""
    state = torch.load(workdir / "last.pt", map_location="cpu", weights_only=True)
    sam = build_tiny_sam()
    sam.load_state_dict(averaged_weights(state))
    return sam.eval().requires_grad_(False), state["step"]


@torch.inference_mode()
def tokens_and_ious(sam: Sam, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """IoU tokens (N, C) of a batch of `PromptedPictures`' prompts, and the IoU of each one's four masks (N, 4), NaN where not asked for.

    Clicks ask for the last three, boxes for the first, as in the SAM's training; compared at the picture's size.
    """
    b, p = batch["points"].shape[:2]
    clicks = p - round(p * BOX_SHARE)
    embedding = sam.image_encoder(preprocessed(sam, batch["image"], batch["size"]))
    sparse = prompt_tokens(sam.prompt_encoder, batch["points"][:, :clicks], batch["boxes"][:, clicks:])
    tokens = []
    hook = sam.mask_decoder.iou_prediction_head.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0]))
    decoded = decode_tokens(sam.mask_decoder, embedding, sam.prompt_encoder.get_dense_pe(), sparse, sam.prompt_encoder.no_mask_embed.weight[0])
    hook.remove()
    ious = torch.full((b, p, 4), float("nan"))
    logits = draw_masks(sam.mask_decoder, decoded, slice(None)).unflatten(0, (b, p))
    ious[:, :clicks, 1:] = mask_iou(enlarged(logits[:, :clicks, 1:]), batch["masks"][:, :clicks, None])
    ious[:, clicks:, :1] = mask_iou(enlarged(logits[:, clicks:, :1]), batch["masks"][:, clicks:, None])
    return tokens[0].reshape(b * p, -1).clone(), ious.flatten(0, 1)


def gather(sam: Sam, pools: list[tuple[float, list[Path]]], crops: int, folder: Path, seed: int) -> tuple[Tensor, Tensor]:
    """`tokens_and_ious` of ``crops`` pictures, scenes as they are and photographs deformed; what ``folder`` holds is not made again."""
    made = []
    for shard in tqdm(range(-(-crops // SHARD)), desc="tokens", unit=f"{SHARD} pictures"):
        path = folder / f"{shard:05d}.pt"
        if not path.exists():
            pictures = PromptedPictures(pools, PROMPTS, [seed, shard], distorted=1.0, distortion=deform)
            drawn = itertools.islice(pictures, min(SHARD, crops - shard * SHARD))
            parts = [tokens_and_ious(sam, default_collate([one])) for one in drawn]
            save_atomically(dict(zip(("tokens", "ious"), map(torch.cat, zip(*parts)))), path)
        made.append(torch.load(path, weights_only=True))
    return torch.cat([part["tokens"] for part in made]), torch.cat([part["ious"] for part in made])


def fit(head: nn.Module, tokens: Tensor, ious: Tensor, steps: int = STEPS, seed: int = 0) -> nn.Module:
    """A copy of an IoU head, trained further: tokens (N, C) -> ious (N, 4); of masks without one it goes on saying what ``head`` says."""
    generator = torch.Generator().manual_seed(seed)
    new = copy.deepcopy(head).requires_grad_(True)
    wanted = torch.where(ious.isnan(), head(tokens), ious)
    spread = tokens.std(0)
    optimizer = torch.optim.AdamW(new.parameters(), lr=RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        some = torch.randint(len(tokens), (BATCH,), generator=generator)
        blurred = tokens[some] + NOISE * spread * torch.randn(BATCH, tokens.shape[1], generator=generator)
        loss = F.mse_loss(new(blurred), wanted[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return new.requires_grad_(False)


def error(head: nn.Module, tokens: Tensor, ious: Tensor) -> float:
    """Root mean square of what a head predicts against the IoUs that there are."""
    return float((head(tokens) - ious)[~ious.isnan()].square().mean().sqrt())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="of the SAM's training: its last.pt")
    parser.add_argument("--pools", nargs="+", required=True, help="FOLDER:SHARE of each pool")
    parser.add_argument("--crops", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sam, step = averaged_sam(args.workdir)
    pools = parse_pools(args.pools)
    made_from = repr((step, args.seed, args.crops, args.pools, PROMPTS, SHARD, [len(paths) for _, paths in pools])).encode()
    folder = args.workdir / "iou_head" / hashlib.sha256(made_from).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    tokens, ious = gather(sam, pools, args.crops, folder, args.seed)
    old = sam.mask_decoder.iou_prediction_head
    new = fit(old, tokens, ious)
    about = (
        f"fitted anew on {len(tokens)} prompts of {args.crops} crops, photographs deformed ({pool_counts(pools)}), by "
        f"`python -m aopsam_lab.training.iou_head`: root mean square error there {error(old, tokens, ious):.3f} before, {error(new, tokens, ious):.3f} after"
    )
    save_atomically(dict(head=new.state_dict(), step=step, about=about), args.workdir / "iou_head.pt")
    print(f"IoU head: {about}")


if __name__ == "__main__":
    main()
