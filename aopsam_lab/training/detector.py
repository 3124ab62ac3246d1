"""Train the detector of the object-aware baselines: Ultralytics YOLOv8n, one class, boxes of masks.

    python -m aopsam_lab.training.detector --data FOUND --out detector.safetensors --minutes 20

The photographs held out are those of `train-predictor`. A stopped run goes on after its last whole
epoch. Ultralytics is AGPL-3.0 software, and so is what it trains.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import save as to_safetensors
from torchvision.ops import box_convert, box_iou, nms
from tqdm import tqdm

from aopsam_lab import detector as loading
from aopsam_lab.command import in_one_line
from aopsam_lab.data import Dataset, open_dataset
from aopsam_lab.evaluator import recall_matches
from aopsam_lab.files import write_atomically
from aopsam_lab.sam.zoo import resolve_device
from aopsam_lab.training import split, write_card

SAME_BOX = 0.7  # IoU above which two boxes are one object's
CONFIDENCE = 0.001  # the least of a box: more boxes found more objects in every trial


def boxes_of(rles: list[dict]) -> torch.Tensor:
    """Boxes (n, 4) float64 x0 y0 x1 y1 of COCO RLE, image frame; of almost equal ones the first."""
    found = torch.as_tensor(coco_mask.toBbox(rles), dtype=torch.float64).reshape(-1, 4)
    boxes = box_convert(found, "xywh", "xyxy")
    return boxes[nms(boxes, -torch.arange(len(boxes)).double(), SAME_BOX)]


def write_data(data: Dataset, rows: dict[str, list[int]], listing: Path) -> None:
    """Write the rows for "train" and "val" in YOLO's layout, and last the listing, a data.yaml."""
    for part, own in rows.items():
        images, labels = (listing.parent / kind / part for kind in ("images", "labels"))
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for i in tqdm(own, desc=f"writing {part}", unit="photo"):
            sample = data[i]
            photo = Image.fromarray(sample.image)
            photo.save(images / f"{i:06d}.jpg", quality=95)
            boxes = box_convert(boxes_of(sample.rles), "xyxy", "cxcywh").numpy()
            lines = np.insert(boxes / (photo.size * 2), 0, 0, axis=1)  # class 0
            np.savetxt(labels / f"{i:06d}.txt", lines, ["%d"] + 4 * ["%.6f"])
    content = {"path": str(listing.parent), "names": {0: "object"}}
    content |= {part: f"images/{part}" for part in rows}
    write_atomically(listing, json.dumps(content))  # JSON is YAML


def learning_curve(run: Path) -> pd.DataFrame:
    """Ultralytics' table, a row an epoch; a stopped run may have written one twice."""
    table = pd.read_csv(run / "results.csv").drop_duplicates("epoch", keep="last")
    return table.filter(regex="epoch|time|train/(box|cls)|mAP")


def starting_model(start: str) -> torch.nn.Module:
    """A one-class YOLOv8n with those tensors of other weights whose name and shape agree."""
    given = loading.read_weights(start)[0]
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel(loading.ARCHITECTURE, nc=1, verbose=False)
    own, others = model.state_dict(), given.state_dict()
    fits = [name in others and others[name].shape == own[name].shape for name in own]
    if np.mean(fits) < 0.8:  # of a YOLOv8n of other classes the head differs
        raise ValueError(f"{start} does not hold YOLOv8n weights to start from")
    model.load(given, verbose=False)
    return model


def train(run: Path, listing: Path, args: argparse.Namespace) -> Path:
    """Train in the folder of a run, from where it stopped; the checkpoint of the last epoch."""
    last, finished = run / "last.pt", run / "finished"
    if finished.exists():
        return last
    device = resolve_device(args.device)
    cuda, going_on = device.type == "cuda", last.exists()
    # no mosaic, which would cut the large boxes at its seams
    options = {
        "model": loading.ARCHITECTURE, "data": str(listing), "save_dir": str(run),
        "resume": str(last) if going_on else False, "time": args.minutes / 60, "imgsz": args.imgsz,
        "batch": args.batch, "nbs": args.batch, "mosaic": 0.0, "close_mosaic": 0,
        "optimizer": "AdamW", "momentum": 0.9, "lr0": 0.001 if args.start else 0.002,
        "cos_lr": True, "warmup_epochs": 0.5, "warmup_bias_lr": 0.0, "patience": 10_000,
        "device": str(device.index or 0) if cuda else "cpu", "workers": 8 if cuda else 0,
        "amp": "bf16" if cuda else False, "pretrained": False, "plots": False, "verbose": False,
    }  # fmt: skip

    def count_before(trainer: Any) -> None:
        """The time and the epochs before a stop count as this run's."""
        if trainer.start_epoch:
            trainer.train_time_start -= learning_curve(run)["time"].max()
            trainer.start_epoch = 0

    def save(trainer: Any) -> None:
        """Keep the epoch; Ultralytics' own file is not written atomically."""
        write_atomically(last, trainer.last.read_bytes())
        tqdm.write(learning_curve(run).tail(1).to_string(index=False))

    threads = torch.get_num_threads()
    loading.import_ultralytics()
    with loading.process_left_alone():
        os.environ.setdefault("MPLCONFIGDIR", str(run / "matplotlib"))  # not in the user's home
        from ultralytics.models.yolo.detect import DetectionTrainer

        trainer: Any = DetectionTrainer(overrides=options)
        torch.set_num_threads(threads)  # Ultralytics leaves one core idle
        if going_on:
            trainer.epochs += 2  # with a time limit their number is only an estimate
        elif args.start:
            trainer.model = starting_model(args.start)
        trainer.add_callback("on_train_epoch_start", count_before)
        trainer.add_callback("on_model_save", save)
        trainer.final_eval = lambda: None  # what is exported is measured
        trainer.train()
    finished.touch()
    return last


def box_recall(wanted: torch.Tensor, found: np.ndarray) -> np.ndarray:
    """The shares of ground-truth boxes found at IoU 0.5 and 0.75, from boxes by falling score."""
    iou = box_iou(wanted, torch.from_numpy(found).double()).numpy()
    return recall_matches(iou, [len(found)])[0, [0, 5]] / len(wanted)


def measure(detector: loading.Detector, photos: list[tuple]) -> dict[str, float]:
    """Recall, boxes and milliseconds a photograph; photos are images and ground-truth boxes."""
    started = time.perf_counter()
    found = [detector.boxes(image)[0] for image, _ in photos]
    milliseconds = 1000 * (time.perf_counter() - started) / len(photos)
    pairs = zip((wanted for _, wanted in photos), found, strict=True)
    recalls = [box_recall(wanted, own) for wanted, own in pairs if len(wanted)]
    row = dict(zip(("recall_50", "recall_75"), np.mean(recalls, 0), strict=True))
    return {**row, "boxes": np.mean([len(own) for own in found]), "milliseconds": milliseconds}


def export(model: torch.nn.Module, out: Path, options: dict) -> None:
    """Write a one-class YOLOv8n with its options: float16, vectors (so BatchNorm too) float32."""
    state = model.state_dict().items()
    weights = {k: (v.half() if v.ndim > 1 else v).contiguous() for k, v in state}
    metadata = {"detector": json.dumps(options), "license": "AGPL-3.0"}
    write_atomically(out, to_safetensors(weights, metadata=metadata))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, write the weights and their model card."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--data", required=True, help="a folder of `find-masks`, or another data set with masks")
    add("--out", required=True, type=Path, help="the weights (safetensors); the card lies beside")
    add("--start", help="weights to begin with; from scratch if not given")
    add("--minutes", type=float, default=20, help="of training, all resumed runs together")
    add("--workdir", type=Path, default=Path("runs/detector"), help="where runs are kept")
    add("--imgsz", type=int, default=640, help="longest side of the images, in pixels")
    add("--batch", type=int, default=16, help="photographs a step")
    add("--licence", default="the terms of the training data hold", help="a line of the card")
    add("--device", default="auto")
    args = parser.parse_args(arguments)
    data = open_dataset(args.data)
    rows, held = split(data)
    # a run with other data or settings has a folder of its own
    settings = [data.fingerprint, args.start, args.minutes, args.imgsz, args.batch]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    folder = (args.workdir / name).resolve()
    listing = folder / "data" / "data.yaml"
    if not listing.exists():
        write_data(data, {"train": rows, "val": held}, listing)
    options = {**loading.DEFAULTS, "imgsz": args.imgsz, "confidence": CONFIDENCE}
    export(loading.read_weights(train(folder, listing, args))[0], args.out, options)
    photos = [(sample.image, boxes_of(sample.rles)) for sample in (data[i] for i in held)]
    found = measure(loading.load_detector(args.out, args.device), photos)
    start = f"from `{Path(args.start).name}`" if args.start else "from scratch"
    facts = {
        "Input": f"longest side scaled to {args.imgsz} pixels; boxes from confidence "
        f"{CONFIDENCE:g}, NMS at IoU {options['overlap']:g}, at most 100 boxes",
        "Recall": f"{found['recall_50']:.1%} of the boxes of held-out photographs at IoU 0.5 and "
        f"{found['recall_75']:.1%} at 0.75, by {found['boxes']:.0f} boxes in "
        f"{found['milliseconds']:.0f} ms",
        "Data": f"{len(rows)} photographs of {data.name}, {len(held)} more held out; labels are "
        "the boxes of all masks, whatever they show, near-duplicates merged",
        "Training": f"{start}, {args.minutes:g} minutes at {args.imgsz} pixels, {args.batch} "
        "photographs a step, by `python -m aopsam_lab.training.detector`",
        "Licence": f"Ultralytics YOLOv8 is AGPL-3.0, and so are these weights; {args.licence}",
    }
    summary = "YOLOv8n (Ultralytics), one class `object`: the boxes of `oas_box` and `oas_point`."
    about_curve = "time in seconds; mAP: COCO's, of the held-out photographs' boxes"
    write_card(args.out, summary, facts, learning_curve(folder).to_dict("records"), about_curve)
    print(f"Detector: {args.out}")


if __name__ == "__main__":
    raise SystemExit(
        in_one_line("detector", main, "the same command goes on after the last whole epoch.")
    )
