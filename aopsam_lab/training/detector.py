"""Trains the bundled detector of the OAS baselines: Ultralytics YOLOv8n from scratch, one class, boxes of masks (ours).

    python -m aopsam_lab.training.detector --pools POOLS/scenes:1 POOLS/bsds:1 --minutes 45

Pictures come from the same pools as the other trainings (aopsam_lab.training.pool); every mask's bounding box is a
label, whatever it shows. A run that was stopped goes on where its last epoch ended; a finished one
only writes the weights and the card again. Ultralytics is AGPL-3.0 software, and so is what it trains.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from tqdm.auto import tqdm

from aopsam_lab.detector import ARCHITECTURE, CLASS_NAMES, DEFAULTS, import_ultralytics, process_left_alone
from aopsam_lab.files import write_atomically
from aopsam_lab.training.pool import parse_pools, read_entry

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "detector.safetensors"
IMAGE_SIDE = 320
VALIDATION_EVERY = 20
MAX_COVER = 0.9  # a box over this share of the picture says nothing


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Bounding boxes of masks, N x H x W bool -> n x 4 float64 (x0, y0, x1, y1), as shares of the picture's sides.

    The far edges are exclusive. Left out are empty masks and boxes over 90% of the picture.
    """
    n, height, width = masks.shape
    across, down = masks.any(1), masks.any(2)
    kept = np.flatnonzero(across.any(1))
    across, down = across[kept], down[kept]
    x0, x1 = across.argmax(1) / width, 1 - across[:, ::-1].argmax(1) / width
    y0, y1 = down.argmax(1) / height, 1 - down[:, ::-1].argmax(1) / height
    boxes = np.stack([x0, y0, x1, y1], 1)
    return boxes[(x1 - x0) * (y1 - y0) <= MAX_COVER]


def write_example(folder: Path, split: str, name: str, image: np.ndarray, boxes: np.ndarray) -> None:
    """One picture (H x W x 3 RGB) and its boxes in YOLO's layout; the picture comes last: then both are whole."""
    lines = [f"0 {(a + c) / 2:.6f} {(b + d) / 2:.6f} {c - a:.6f} {d - b:.6f}" for a, b, c, d in boxes]
    write_atomically(folder / "labels" / split / f"{name}.txt", "\n".join(lines) + "\n")
    ok, data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 95])
    if not ok:
        raise ValueError(f"{name}: OpenCV could not encode the picture")
    write_atomically(folder / "images" / split / f"{name}.jpg", data.tobytes())


def _written(folder: Path, split: str, name: str) -> bool:
    return (folder / "images" / split / f"{name}.jpg").exists()


def write_pool(folder: Path, paths: list[Path], side: int) -> None:
    """The pictures of a pool, longest side `side`; every twentieth is for validation."""
    for i, path in enumerate(tqdm(paths, desc=path_name(paths), unit="picture")):
        name, split = f"{path.parent.name}-{path.stem}", "val" if i % VALIDATION_EVERY == 0 else "train"
        if not _written(folder, split, name):
            image, masks = read_entry(path)
            scale = side / max(image.shape[:2])
            size = round(image.shape[1] * scale), round(image.shape[0] * scale)
            write_example(folder, split, name, cv2.resize(image, size, interpolation=cv2.INTER_AREA), boxes_of(masks))


def path_name(paths: list[Path]) -> str:
    """The pool that the entries are of."""
    return paths[0].parent.name


def write_data(folder: Path, pools: list[tuple[float, list[Path]]], side: int) -> Path:
    """Everything of a training, in YOLO's layout; what is there already stays. Returns the path of its data.yaml.

    pools: of each the share of its entries to take, spread over the pool, and all its entries.
    """
    for share, paths in pools:
        if not 0 < share <= 1:
            raise ValueError(f"{path_name(paths)}: the share of a pool to take must lie in (0, 1], not {share:g}")
        taken = np.unique(np.linspace(0, len(paths) - 1, round(share * len(paths))).round().astype(int))
        write_pool(folder, [paths[i] for i in taken], side)
    names = "\n".join(f"  {k}: {name}" for k, name in CLASS_NAMES.items())
    return write_atomically(
        folder / "data.yaml", f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames:\n{names}\n"
    )


def _read_curve(run: Path) -> list[dict[str, float]]:
    if not (run / "results.csv").exists():
        return []
    with open(run / "results.csv", newline="") as file:
        return [{key.strip(): float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _floats(x):
    if isinstance(x, torch.Tensor):
        return x.float()
    if isinstance(x, dict):
        return {name: _floats(value) for name, value in x.items()}
    return type(x)(_floats(value) for value in x) if isinstance(x, (list, tuple)) else x


def _compute_in_bfloat16(model: torch.nn.Module) -> None:
    """Twice as fast on a CPU, where Ultralytics itself trains in float32 only; the loss stays in float32."""
    predict = model.predict

    def mixed(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return _floats(predict(*args, **kwargs))

    model.predict = mixed


def train(data: Path, run: Path, minutes: float, side: int, batch: int, threads: int, device: str) -> Path:
    """Trains for `minutes` in all, resumed runs counted together. Returns the path of Ultralytics' best checkpoint."""
    run = run.resolve()
    best, finished, safe = run / "weights/best.pt", run / "finished.json", run / "weights/resume.pt"
    if finished.exists():
        print(f"{run} is finished; remove it to train anew")
        return best
    import_ultralytics()
    from ultralytics import YOLO

    os.environ.setdefault("MPLCONFIGDIR", str(run / "matplotlib"))  # the validator imports it: not into the user's home
    clock = [max((row["time"] for row in _read_curve(run)), default=0.0)]
    cuda = device.startswith("cuda")

    def start(trainer) -> None:
        torch.set_num_threads(threads)  # Ultralytics leaves one core idle
        if not cuda:
            _compute_in_bfloat16(trainer.model)

    def start_epoch(trainer) -> None:
        if clock:  # the time and the epochs before a resume count as this run's
            trainer.train_time_start -= clock.pop()
            trainer.start_epoch = 0

    def saved(trainer) -> None:
        write_atomically(safe, trainer.last.read_bytes())  # its own last.pt is not written atomically
        losses = " ".join(f"{k} {float(v):.3f}" for k, v in (trainer.tloss or {}).items())
        scores = " ".join(f"{k.split('/')[-1]} {v:.3f}" for k, v in trainer.metrics.items() if "metrics" in k)
        minutes_spent = (time.time() - trainer.train_time_start) / 60
        print(f"epoch {trainer.epoch + 1}/{trainer.epochs} {minutes_spent:.1f} min | {losses} | {scores}", flush=True)

    model = YOLO(str(safe) if safe.exists() else ARCHITECTURE)
    for event, call in (("on_train_start", start), ("on_train_epoch_start", start_epoch), ("on_model_save", saved)):
        model.add_callback(event, call)
    with process_left_alone():
        model.train(
            data=str(data), time=minutes / 60, imgsz=side, batch=batch, device=device.removeprefix("cuda:"),
            resume=safe.exists(), pretrained=False, amp="bf16" if cuda else False, project=str(run.parent), name=run.name,
            exist_ok=True, workers=8 if cuda else 0, plots=False, verbose=False, seed=0, patience=10_000,
            optimizer="AdamW", lr0=0.002, momentum=0.9, weight_decay=0.0005, cos_lr=True, warmup_epochs=0.5,
            warmup_bias_lr=0.0, nbs=batch, mosaic=0.0, close_mosaic=0, scale=0.4, max_det=300,
        )  # fmt: skip
    write_atomically(finished, json.dumps({"minutes": minutes}))
    return best


def export(checkpoint: Path, out: Path, side: int) -> dict:
    """Ultralytics' checkpoint -> float16 safetensors (vectors, so BatchNorm too, in float32); returns its options."""
    import_ultralytics()
    from ultralytics.nn.tasks import load_checkpoint

    state = load_checkpoint(str(checkpoint))[0].state_dict()
    state = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in state.items()}
    options = {**DEFAULTS, "imgsz": side, "architecture": ARCHITECTURE}
    metadata = {"detector": json.dumps(options), "license": "AGPL-3.0"}
    write_atomically(out, to_safetensors({k: v.contiguous() for k, v in state.items()}, metadata=metadata))
    return options


def card(command: str, options: dict, counts: dict[str, int], curve: list[dict[str, float]], bytes_: int) -> str:
    """The model card, Markdown."""
    rows = curve if len(curve) <= 12 else [curve[round(i * (len(curve) - 1) / 11)] for i in range(12)]
    table = [
        f"| {row['epoch']:.0f} | {row['time'] / 60:.0f} | {row['train/box_loss']:.2f} | {row['train/cls_loss']:.2f} | "
        f"{row['metrics/precision(B)']:.3f} | {row['metrics/recall(B)']:.3f} | {row['metrics/mAP50(B)']:.3f} | "
        f"{row['metrics/mAP50-95(B)']:.3f} |"
        for row in rows
    ]
    pictures = ", ".join(f"{n:,} {name}" for name, n in counts.items())
    return "\n".join([
        "# detector.safetensors",
        "",
        "YOLOv8n (Ultralytics), one class `object`, trained from scratch: the box source of the object-aware baselines",
        f"`oas_box` and `oas_point`. {bytes_ / 1e6:.1f} MB, float16; BatchNorm and biases float32.",
        "",
        f"- **Input**: longest side scaled to {options['imgsz']} pixels; confidence from {options['confidence']},",
        f"  NMS at IoU {options['overlap']}, at most 100 boxes.",
        f"- **Data**: {pictures}.",
        "  Labels are the boxes of all masks (objects, their parts, background regions), except boxes over",
        f"  {MAX_COVER:.0%} of the picture. In COCO's photographs much is unlabelled and counts as background.",
        f"- **Command**: `{command}`",
        "- **Licence**: Ultralytics YOLOv8 is AGPL-3.0, and so are these weights. Where photographs (BSDS500,",
        "  LabelMeFacade, COCO) were among the data: for research and education.",
        "- **Limits**: a small model after a short training, on rendered scenes and few photographs; no class names.",
        "",
        "Curve (validation: every twentieth picture of each pool, held out):",
        "",
        "| epoch | minutes | box loss | class loss | precision | recall | mAP50 | mAP50-95 |",
        "|---|---|---|---|---|---|---|---|",
        *table,
        "",
    ])  # fmt: skip


def _counts(data: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path in sorted((data / "images/train").iterdir()):
        source = path.name.split("-")[0]
        label = "scenes" if source == "scenes" else f"photographs of {source}"
        counts[label] = counts.get(label, 0) + 1
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m aopsam_lab.training.detector", description=__doc__.split("\n")[0])
    parser.add_argument("--pools", nargs="+", required=True, help="FOLDER:SHARE of each pool, the share of its pictures to take")
    parser.add_argument("--minutes", type=float, default=45, help="time of training, all resumed runs together")
    parser.add_argument("--workdir", type=Path, default=Path("runs/detector"))
    parser.add_argument("--imgsz", type=int, default=IMAGE_SIDE, help="longest side of the pictures, in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the weights go, and the card beside them")
    args = parser.parse_args(arguments)
    pools = parse_pools(args.pools)
    folder = args.workdir / f"data{args.imgsz}"
    data = write_data(folder, pools, args.imgsz)
    run = args.workdir / f"run{args.imgsz}"
    best = train(data, run, args.minutes, args.imgsz, args.batch, args.threads, args.device)
    options = export(best, args.out, args.imgsz)
    shown = " ".join(f"POOLS/{path_name(paths)}:{share:g}" for share, paths in pools)
    command = f"python -m aopsam_lab.training.detector --pools {shown} --minutes {args.minutes:g}"
    command += f" --imgsz {args.imgsz} --batch {args.batch}"
    write_atomically(
        args.out.with_suffix(".md"), card(command, options, _counts(folder), _read_curve(run), args.out.stat().st_size)
    )
    print(f"Wrote {args.out} and its card.")


if __name__ == "__main__":
    main()
