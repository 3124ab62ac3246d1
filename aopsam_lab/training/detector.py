"""Train the detector of the object-aware baselines: Ultralytics YOLOv8n, one class, boxes of masks.

    python -m aopsam_lab.training.detector --data FOUND --minutes 20

The data are COCO-style folders such as `find-masks` writes, with the masks that people drew and
those that a SAM found. Every mask's bounding box is a label, whatever the mask shows. A run that
was stopped goes on after its last whole epoch; a finished one only chooses its settings and writes
the weights and the model card again. Ultralytics is AGPL-3.0 software, and so is what it trains.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask
from safetensors.torch import save as to_safetensors
from torchvision.ops import box_iou, nms
from tqdm.auto import tqdm

from aopsam_lab.data import Dataset, open_dataset
from aopsam_lab.detector import (
    ARCHITECTURE,
    CLASS_NAMES,
    DEFAULTS,
    Detector,
    import_ultralytics,
    process_left_alone,
    read_weights,
)
from aopsam_lab.evaluator import score_matrix
from aopsam_lab.files import write_atomically
from aopsam_lab.training.card import write_card

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "detector.safetensors"
IMAGE_SIDE = 640
HOLD_OUT_EVERY = 20
SAME_BOX = 0.7  # IoU above which two boxes are one object's
STORED_SIDE = 1024  # larger photographs are stored smaller: training shrinks them anyway
RECALL_IOUS = (0.5, 0.75)
LEAST_FIT = 0.8  # share of a YOLOv8n's tensors that weights to start from must have
CURVE = ("epoch", "minutes", "box_loss", "class_loss", "recall_50", "recall_75")

# Settings that are tried on the held-out photographs.
SIDES = (320, 480, 640, 800)
OVERLAPS = (0.5, 0.6, 0.7, 0.8)
CONFIDENCES = (0.001, 0.01, 0.05, 0.1)
AS_GOOD = 0.005  # recall within half a point of the best is as good

# The labels are all masks of a photograph at its own scale, which is what the detector is asked for
# later. So no mosaic, which would cut the large boxes at its seams, and no mixing of photographs.
AUGMENTATION = {"mosaic": 0.0, "close_mosaic": 0, "scale": 0.5, "translate": 0.1, "fliplr": 0.5}


def distinct_boxes(boxes: np.ndarray) -> np.ndarray:
    """Merge near-duplicates: of two boxes that overlap by more than IoU 0.7 the first stays.

    Args:
        boxes: n x 4 (x0, y0, x1, y1), people's before a SAM's where both saw one object.

    Returns:
        The m x 4 boxes that stay, in their order.
    """
    order = -torch.arange(len(boxes), dtype=torch.float64)
    kept = nms(torch.as_tensor(boxes, dtype=torch.float64), order, SAME_BOX)
    return boxes[np.sort(kept.numpy())]


def boxes_of(rles: Sequence[dict]) -> np.ndarray:
    """The bounding boxes of masks.

    Args:
        rles: COCO RLE of one photograph's masks, none of them empty.

    Returns:
        n x 4 float64 (x0, y0, x1, y1) in the image frame, the far edges exclusive, near-duplicates
        merged.
    """
    boxes = np.asarray(coco_mask.toBbox(list(rles)), np.float64).reshape(-1, 4)
    return distinct_boxes(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))


def box_recall(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The share of the ground-truth boxes of one photograph that are found, at IoU 0.5 and 0.75.

    Boxes are matched as masks are (`evaluator.greedy_matching`): each is used once.

    Args:
        wanted: n x 4 (x0, y0, x1, y1), the ground truth, n > 0.
        found: m x 4, the detector's boxes in the same frame.

    Returns:
        Two floats from 0 to 1.
    """
    iou = box_iou(torch.as_tensor(wanted).double(), torch.as_tensor(found).double()).numpy()
    return (score_matrix(iou).ious >= np.array(RECALL_IOUS)[:, None]).mean(1)


def measure(detector: Detector, photos: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[dict]:
    """Run a detector on photographs with known boxes, once for all confidences.

    Args:
        detector: it should let boxes of low confidence through.
        photos: images (H x W x 3 uint8) with their ground-truth boxes (n x 4, image frame).

    Returns:
        A row for each of `CONFIDENCES` that the detector lets through: confidence, recall_50 and
        recall_75 by the 100 best boxes (mean over the photographs that have ground truth), boxes
        (the mean) and milliseconds (the median) a photograph.
    """
    least = detector.options["confidence"]
    confidences = [c for c in CONFIDENCES if c >= least] or [least]
    recalls, counts, seconds = {c: [] for c in confidences}, {c: [] for c in confidences}, []
    for image, wanted in photos:
        started = time.perf_counter()
        boxes, scores = detector.boxes(image)
        seconds.append(time.perf_counter() - started)
        for confidence in confidences:  # NMS goes by falling score, so a filter may follow it
            found = boxes[scores >= confidence]
            counts[confidence].append(len(found))
            if len(wanted):
                recalls[confidence].append(box_recall(wanted, found))
    return [
        {
            "confidence": confidence,
            "recall_50": float(np.mean(recalls[confidence], 0)[0]),
            "recall_75": float(np.mean(recalls[confidence], 0)[1]),
            "boxes": float(np.mean(counts[confidence])),
            "milliseconds": float(np.median(seconds) * 1000),
        }
        for confidence in confidences
    ]


def try_settings(
    model: torch.nn.Module, photos: Sequence[tuple[np.ndarray, np.ndarray]], device: str
) -> list[dict]:
    """Measure a model with every image side, NMS overlap and confidence that is tried.

    Args:
        model: a YOLOv8 model.
        photos: as `measure` takes them.
        device: where the model runs.

    Returns:
        The rows of `measure`, each with its imgsz and overlap.
    """
    rows = []
    settings = [(side, overlap) for side in SIDES for overlap in OVERLAPS]
    for side, overlap in tqdm(settings, desc="trying settings", unit="setting"):
        options = {"imgsz": side, "confidence": min(CONFIDENCES), "overlap": overlap}
        detector = Detector(deepcopy(model), "trial", "", options, torch.device(device))
        found = measure(detector, photos)
        rows += [{"imgsz": side, "overlap": overlap, **row} for row in found]
    return rows


def choose_settings(rows: Sequence[dict]) -> dict:
    """The row to use: of those within half a point of the best recall the cheapest.

    Args:
        rows: what `try_settings` gives.

    Returns:
        The row with the smallest image side, then the fewest boxes. Recall: the mean of both IoUs.
    """
    recall = [(row["recall_50"] + row["recall_75"]) / 2 for row in rows]
    good = [row for row, value in zip(rows, recall) if value >= max(recall) - AS_GOOD]
    return min(good, key=lambda row: (row["imgsz"], row["boxes"]))


def append_rows(path: Path, rows: Sequence[dict]) -> None:
    """Add rows to a CSV file, which is made where it is missing.

    Raises ValueError where the file has other columns.
    """
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            columns = next(csv.reader(file), [])
        if columns != list(rows[0]):
            raise ValueError(f"{path} has other columns than {', '.join(rows[0])}; name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def write_example(
    folder: Path, split: str, name: str, image: np.ndarray, boxes: np.ndarray
) -> None:
    """Write one photograph and its boxes in YOLO's layout, the photograph last.

    Args:
        folder: of the data.
        split: "train" or "val".
        name: of the photograph, without an ending.
        image: H x W x 3 uint8, RGB.
        boxes: n x 4 (x0, y0, x1, y1) in the image frame.
    """
    height, width = image.shape[:2]
    lines = [
        f"0 {(a + c) / 2:.6f} {(b + d) / 2:.6f} {c - a:.6f} {d - b:.6f}\n"
        for a, b, c, d in boxes / [width, height, width, height]
    ]
    write_atomically(folder / "labels" / split / f"{name}.txt", "".join(lines))
    scale = STORED_SIDE / max(height, width)
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    bgr = np.ascontiguousarray(image[..., ::-1])
    ok, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])
    if not ok:
        raise ValueError(f"{name}: OpenCV could not encode the image")
    write_atomically(folder / "images" / split / f"{name}.jpg", data.tobytes())


class Photographs:
    """The photographs of several data sets, every k-th of each held out.

    Args:
        datasets: COCO-style folders and others, as `open_dataset` gives them.
        every: k.

    Raises ValueError where nothing is left to train on or is held out.
    """

    def __init__(self, datasets: Sequence[Dataset], every: int = HOLD_OUT_EVERY) -> None:
        self._datasets, self.every = datasets, every
        places = [(k, i) for k, data in enumerate(datasets) for i in range(len(data))]
        self.held_out = [place for place in places if place[1] % every == 0]
        self.training = [place for place in places if place[1] % every]
        if not self.training or not self.held_out:
            raise ValueError(
                f"Every {every}th of {len(places)} photographs held out leaves none to train on or "
                "to measure on; give more of them, or another --every"
            )
        contents = [*(data.fingerprint for data in datasets), every]
        self.fingerprint = hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    def read(self, place: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """One photograph (H x W x 3 uint8) and its boxes (n x 4, image frame)."""
        sample = self._datasets[place[0]][place[1]]
        return sample.image, boxes_of(sample.rles)

    def write(self, folder: Path) -> Path:
        """Write all in YOLO's layout; what is there already stays.

        Args:
            folder: of the data.

        Returns:
            The path of data.yaml in it.
        """
        for split, places in (("val", self.held_out), ("train", self.training)):
            for k, i in tqdm(places, desc=f"writing {split}", unit="photo"):
                name = f"{k}-{i:06d}"  # a data set always has the same order, a shuffled one
                if not (folder / "images" / split / f"{name}.jpg").exists():
                    write_example(folder, split, name, *self.read((k, i)))
        names = "\n".join(f"  {k}: {name}" for k, name in CLASS_NAMES.items())
        return write_atomically(
            folder / "data.yaml",
            f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames:\n{names}\n",
        )

    def facts(self) -> str:
        """What the model card says of the data."""
        parts = [f"{len(data):,} photographs of {data.name}" for data in self._datasets]
        held = f"every {self.every}th ({len(self.held_out)} photographs) was held out"
        labels = "Labels are the boxes of all masks, near-duplicates merged"
        return f"{', '.join(parts)}; {held}. {labels}"


def fitting(state: dict, wanted: dict, where: str) -> dict[str, torch.Tensor]:
    """The tensors of a state that another model can begin with: those of the same name and shape.

    Args:
        state: what there is, such as the weights of a YOLOv8n for 80 classes.
        wanted: the state of the model that begins.
        where: the source of the state, for the error.

    Returns:
        The tensors, in the types of `wanted`.

    Raises:
        ValueError: fewer than 80% of the wanted tensors are there.
    """
    fits = {
        name: state[name].to(tensor.dtype)
        for name, tensor in wanted.items()
        if name in state and state[name].shape == tensor.shape
    }
    if len(fits) < LEAST_FIT * len(wanted):
        raise ValueError(f"{where} does not hold YOLOv8n weights to start from")
    return fits


def _read_curve(run: Path) -> list[dict[str, float]]:
    """The rows of Ultralytics' results.csv; a stopped run may have written an epoch twice."""
    if not (run / "results.csv").exists():
        return []
    with open(run / "results.csv", newline="") as file:
        rows = [{k.strip(): float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return list({row["epoch"]: row for row in rows}.values())


def _write_curve(run: Path) -> Path:
    lines = [",".join(CURVE)]
    for row in _read_curve(run):
        values = [row[f"train/{name}_loss"] for name in ("box", "cls")]
        values += [row[name] for name in ("recall_50", "recall_75")]
        cells = [f"{row['epoch']:.0f}", f"{row['time'] / 60:.1f}", *(f"{x:.3f}" for x in values)]
        lines.append(",".join(cells))
    return write_atomically(run / "curve.csv", "\n".join(lines) + "\n")


def _floats(x):
    if isinstance(x, torch.Tensor):
        return x.float()
    if isinstance(x, dict):
        return {name: _floats(value) for name, value in x.items()}
    return type(x)(_floats(value) for value in x) if isinstance(x, (list, tuple)) else x


def _compute_in_bfloat16(model: torch.nn.Module) -> None:
    """Compute all but the loss in bfloat16: Ultralytics does not on a CPU, where it is faster."""
    predict = model.predict

    def mixed(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return _floats(predict(*args, **kwargs))

    model.predict = mixed


def _trainer(run: Path, held_out: Sequence, state: dict | None, threads: int, device: str) -> type:
    """A class of Ultralytics' trainer that starts from given weights and validates by recall.

    It keeps two files that are always whole: `resume.pt` of the last epoch, `best.pt` of the epoch
    with the best recall.
    """
    from ultralytics.models.yolo.detect import DetectionTrainer

    cuda = device.startswith("cuda")
    clock = [max((row["time"] for row in _read_curve(run)), default=0.0)]

    class Trainer(DetectionTrainer):
        def __init__(self, overrides: dict):
            super().__init__(overrides=overrides)
            self.add_callback("on_train_start", start)
            self.add_callback("on_train_epoch_start", start_epoch)
            self.add_callback("on_model_save", saved)

        def get_model(self, cfg=None, weights=None, verbose=True):
            model = super().get_model(cfg, weights, verbose)
            if weights is None and state is not None:
                model.load_state_dict(fitting(state, model.state_dict(), "--start"), strict=False)
            return model

        def resume_training(self, ckpt):
            if ckpt is not None:  # with a time limit the number of epochs is only an estimate
                self.epochs = max(self.epochs, ckpt["epoch"] + 2)
            super().resume_training(ckpt)

        def validate(self):
            options = {**DEFAULTS, "imgsz": self.args.imgsz, "confidence": min(CONFIDENCES)}
            detector = Detector(deepcopy(self.ema.ema), "training", "", options, self.device)
            row = measure(detector, held_out)[0]
            fitness = (row["recall_50"] + row["recall_75"]) / 2
            if self.best_fitness is None or self.best_fitness < fitness:
                self.best_fitness = fitness
            return {name: row[name] for name in ("recall_50", "recall_75")}, fitness

        def final_eval(self):
            """Nothing: the settings are measured afterwards."""

    def start(trainer) -> None:
        torch.set_num_threads(threads)  # Ultralytics leaves one core idle
        if not cuda:
            _compute_in_bfloat16(trainer.model)

    def start_epoch(trainer) -> None:
        if clock:  # the time and the epochs before a resume count as this run's
            trainer.train_time_start -= clock.pop()
            trainer.start_epoch = 0

    def saved(trainer) -> None:
        data = trainer.last.read_bytes()  # its own files are not written atomically
        if trainer.fitness == trainer.best_fitness:
            write_atomically(run / "best.pt", data)
        write_atomically(run / "resume.pt", data)
        _write_curve(run)
        losses = " ".join(f"{k} {float(v):.3f}" for k, v in (trainer.tloss or {}).items())
        recall = " ".join(f"{k} {v:.3f}" for k, v in trainer.metrics.items())
        spent = (time.time() - trainer.train_time_start) / 60
        print(
            f"epoch {trainer.epoch + 1}/{trainer.epochs} {spent:.1f} min | {losses} | {recall}",
            flush=True,
        )

    return Trainer


def train(
    photos: Photographs,
    workdir: Path,
    minutes: float,
    imgsz: int,
    batch: int,
    start: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> Path:
    """Train for some minutes in all, resumed runs counted together.

    Args:
        photos: to train on, and to hold out.
        workdir: the folder of the run; a run that was stopped goes on there.
        minutes: of training and validation.
        imgsz: the longest side of the images, in pixels.
        batch: photographs a step.
        start: weights to begin with, as `read_weights` takes them, or None to begin from scratch.
        threads: of a CPU, or None for one a core.
        device: "cpu", "cuda:0", ...

    Returns:
        The checkpoint of the epoch with the best recall on the held-out photographs.

    Raises:
        ValueError: the run in this folder had other data, image side, batch or start; or `start`
            holds no YOLOv8n weights.
    """
    run = (workdir / "run").resolve()
    model, _, path = read_weights(start) if start is not None else (None, None, None)
    state = None if model is None else model.state_dict()
    settings = {
        "data": photos.fingerprint,
        "imgsz": imgsz,
        "batch": batch,
        "start": path and hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    noted, finished, resume = run / "settings.json", run / "finished.json", run / "resume.pt"
    before = json.loads(noted.read_text()) if noted.exists() else settings
    if others := [name for name in settings if before[name] != settings[name]]:
        raise ValueError(f"{run} was begun with other {', '.join(others)}; give another --workdir")
    write_atomically(noted, json.dumps(settings))
    if finished.exists() and json.loads(finished.read_text())["minutes"] >= minutes:
        print(f"{run} is finished; give more --minutes, or another --workdir to train anew")
        return run / "best.pt"
    data = photos.write(workdir / "data")
    held_out = [photos.read(place) for place in photos.held_out]
    import_ultralytics()
    os.environ.setdefault("MPLCONFIGDIR", str(run / "matplotlib"))  # not into the user's home
    cuda = device.startswith("cuda")
    going_on = {"resume": str(resume)} if resume.exists() else {"model": ARCHITECTURE}
    with process_left_alone():
        trainer = _trainer(run, held_out, state, threads or os.cpu_count() or 1, device)
        trainer({
            **going_on, **AUGMENTATION, "task": "detect", "mode": "train", "data": str(data),
            "time": minutes / 60, "imgsz": imgsz, "batch": batch, "nbs": batch,
            "device": device.removeprefix("cuda:"), "workers": 8 if cuda else 0,
            "amp": "bf16" if cuda else False, "pretrained": False, "project": str(run.parent),
            "name": run.name, "save_dir": str(run), "exist_ok": True, "plots": False,
            "verbose": False, "seed": 0, "patience": 10_000, "optimizer": "AdamW",
            "lr0": 0.002 if start is None else 0.001, "momentum": 0.9, "weight_decay": 0.0005,
            "cos_lr": True, "warmup_epochs": 0.5, "warmup_bias_lr": 0.0, "max_det": 300,
        }).train()  # fmt: skip
    write_atomically(finished, json.dumps({"minutes": minutes}))
    return run / "best.pt"


def export(model: torch.nn.Module, out: Path, settings: dict) -> Path:
    """Write a model as safetensors: float16, vectors (so BatchNorm too) float32.

    Args:
        model: a one-class YOLOv8n.
        out: the file.
        settings: imgsz, confidence and overlap (NMS's IoU) that the detector is used with.

    Returns:
        The path of the file.
    """
    state = model.state_dict()
    large = [k for k, tensor in state.items() if tensor.is_floating_point() and tensor.ndim > 1]
    state = {k: (v.half() if k in large else v).contiguous() for k, v in state.items()}
    options = {name: settings[name] for name in ("imgsz", "confidence", "overlap")}
    options["architecture"] = ARCHITECTURE
    metadata = {"detector": json.dumps(options), "license": "AGPL-3.0"}
    return write_atomically(out, to_safetensors(state, metadata=metadata))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m aopsam_lab.training.detector", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    add("--data", nargs="+", required=True, help="COCO-style folders")
    add("--start", metavar="FILE", help="weights to begin with (default: from scratch)")
    add("--minutes", type=float, default=20, help="of training, all resumed runs together")
    add("--workdir", type=Path, default=Path("runs/detector"), help="where a run goes on")
    add("--imgsz", type=int, default=IMAGE_SIDE, help="longest side of the images, in pixels")
    add("--batch", type=int, default=16, help="photographs a step")
    add("--every", type=int, default=HOLD_OUT_EVERY, help="every k-th photograph is held out")
    add("--trials", type=Path, metavar="FILE", help="CSV to which the settings tried are added")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--device", default=device)
    add("--out", type=Path, default=WEIGHTS, help="the weights; their model card lies beside them")
    add("--terms", help="a sentence for the model card: the terms of the photographs")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train, choose the settings, write the weights and their model card."""
    args = parse(arguments)
    photos = Photographs([open_dataset(folder) for folder in args.data], args.every)
    about_start, command = "from scratch", "python -m aopsam_lab.training.detector --data"
    command = " ".join([command, *(Path(folder).name for folder in args.data)])
    if args.start is not None:
        path = read_weights(args.start)[2]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        about_start = f"from `{path.name}` (sha256 {digest[:12]})"
        command += f" --start {path.name}"
    command += f" --minutes {args.minutes:g} --imgsz {args.imgsz} --batch {args.batch}"
    best = train(
        photos, args.workdir, args.minutes, args.imgsz, args.batch,
        args.start, args.threads, args.device,
    )  # fmt: skip
    model = read_weights(best)[0]
    rows = try_settings(model, [photos.read(place) for place in photos.held_out], args.device)
    if args.trials:
        append_rows(args.trials, [{"weights": args.out.stem, **row} for row in rows])
    chosen = choose_settings(rows)
    export(model, args.out, chosen)
    terms = args.terms or "The terms of the photographs hold for weights trained on them."
    write_card(
        args.out,
        "YOLOv8n (Ultralytics), one class `object`: the box source of the object-aware baselines\n"
        f"`oas_box` and `oas_point`. Trained {about_start}.",
        {
            "Input": f"longest side scaled to {chosen['imgsz']} pixels; boxes from confidence "
            f"{chosen['confidence']:g}, NMS at IoU {chosen['overlap']:g}, at most 100 boxes",
            "Recall": "of the boxes of held-out photographs by the 100 best, "
            f"{chosen['recall_50']:.1%} at IoU 0.5 and {chosen['recall_75']:.1%} at 0.75 "
            f"({chosen['boxes']:.0f} boxes and {chosen['milliseconds']:.0f} ms a photograph); "
            "the settings were chosen on the same photographs",
            "Data": photos.facts(),
            "Command": f"`{command}`",
            "Licence": f"Ultralytics YOLOv8 is AGPL-3.0, and so are these weights. {terms}",
            "Limits": "a small model after a short training; no class names",
        },
        args.workdir / "run" / "curve.csv",
        "recall of the held-out photographs' boxes by the 100 best",
    )
    print(f"Wrote {args.out} and its card.")


if __name__ == "__main__":
    main()
