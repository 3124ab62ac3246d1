"""YOLOv8 boxes for the object-aware baselines (OAS): Ultralytics models, kept quiet.

Ultralytics is AGPL-3.0 software; only this module and training/detector.py import it, inside
functions. Here it sends no usage statistics, uses no network, installs nothing and writes nothing
to the user's home. The method is object-aware sampling of MobileSAMv2 (Zhang et al. 2023).
"""

import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from aopsam_lab.sam.zoo import (
    file_sha256,
    first_line,
    load_weights,
    official_weights,
    resolve_device,
)
from aopsam_lab.weights import WEIGHTS

ARCHITECTURE = "yolov8n.yaml"
# For weights that hold no options. More boxes cost the baseline time, not mIoU.
DEFAULTS = {"imgsz": 640, "confidence": 0.05, "overlap": 0.7}
_OFFLINE = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}


@contextmanager
def process_left_alone() -> Iterator[None]:
    """Put back what Ultralytics changes; its `PIL.Image.open` would install packages."""
    image_open, environment = Image.open, dict(os.environ)
    threads, cv_threads = torch.get_num_threads(), cv2.getNumThreads()
    try:
        yield
    finally:
        Image.open = image_open
        torch.set_num_threads(threads)
        cv2.setNumThreads(cv_threads)
        os.environ.clear()
        os.environ.update(environment)


def import_ultralytics() -> None:
    """Import ultralytics, offline and silent, its settings in a temporary folder."""
    if "ultralytics" not in sys.modules:
        folder = tempfile.mkdtemp(prefix="aopsam_lab_ultralytics_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ.update({**_OFFLINE, "YOLO_CONFIG_DIR": folder})
    with process_left_alone():
        try:
            import ultralytics
        except ImportError as error:
            advice = "pip install ultralytics-opencv-headless (AGPL-3.0)"
            raise ImportError(f"The OAS methods need Ultralytics YOLO: {advice}") from error
    # statistics and every integration, in memory only: its own update() would write the file
    settings = ultralytics.settings
    dict.update(settings, {name: False for name, on in settings.items() if on is True})


class Detector:
    """A YOLOv8 detection model.

    Args:
        options: imgsz, the longest side that images are scaled to, in pixels; confidence, the least
            of a box; overlap, the IoU of NMS.
        sha256: of the weights file.
    """

    def __init__(self, model: nn.Module, options: dict, device: torch.device, sha256: str) -> None:
        with process_left_alone():
            from ultralytics.models.yolo.detect import DetectionPredictor

            self.imgsz, self.sha256 = int(options["imgsz"]), sha256
            overrides = {
                "task": "detect", "mode": "predict", "save": False, "verbose": False, "batch": 1,
                "imgsz": self.imgsz, "rect": True, "max_det": 300, "agnostic_nms": True,
                "conf": options["confidence"], "iou": options["overlap"], "device": str(device),
                "project": tempfile.gettempdir(), "name": "aopsam_lab_unused",
            }  # fmt: skip
            self._predictor = DetectionPredictor(overrides=overrides)
            self._predictor.setup_model(model.eval(), verbose=False)
            self._predictor([np.zeros((self.imgsz, self.imgsz, 3), np.uint8)])

    def boxes(self, image: np.ndarray, max_boxes: int = 100) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, 4) float32 x0 y0 x1 y1 in an RGB image (H, W, 3) uint8; falling scores."""
        height, width = image.shape[:2]
        found = self._predictor([np.ascontiguousarray(image[..., ::-1])])[0].boxes  # BGR
        limits = np.array([width, height, width, height], np.float32)
        boxes = found.xyxy.float().cpu().numpy().clip(0, limits)
        scores = found.conf.float().cpu().numpy()
        real = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return boxes[real][:max_boxes], scores[real][:max_boxes]


def read_weights(weights: str | os.PathLike | None = None) -> tuple[nn.Module, dict, Path]:
    """The model of `load_detector` on the CPU, its options, its file; no code in it is run."""
    path = WEIGHTS / "detector.safetensors" if weights is None else Path(weights)
    if weights == "yolov8n":
        path = official_weights("yolov8n")
    if not path.is_file():
        advice = "train some with python -m aopsam_lab.training.detector"
        raise FileNotFoundError(f"No detector weights at {path}; {advice}")
    import_ultralytics()
    read = _from_safetensors if path.suffix == ".safetensors" else _from_checkpoint
    try:
        with process_left_alone():
            model, options = read(path)
    except Exception as error:  # a broken file shows itself as one of many types
        wanted = "one-class YOLOv8n of the kit, or a detection checkpoint of Ultralytics"
        raise ValueError(f"{path} is no {wanted} ({first_line(error)})") from error
    return model, {**DEFAULTS, **options}, path


def _from_safetensors(path: Path) -> tuple[nn.Module, dict[str, float]]:
    from ultralytics.nn.tasks import DetectionModel

    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
        options = json.loads((file.metadata() or {}).get("detector", "{}"))
    model = DetectionModel(ARCHITECTURE, nc=1, verbose=False)
    load_weights(model, state)
    return model, options


def _from_checkpoint(path: Path) -> tuple[nn.Module, dict[str, float]]:
    from ultralytics.nn.tasks import torch_safe_load

    # ULTRALYTICS_SAFE_LOAD is read when ultralytics is first imported, perhaps long before
    checkpoint, _ = torch_safe_load(str(path), safe_only=True)
    model = (checkpoint.get("ema") or checkpoint["model"]).float()
    if getattr(model, "task", "detect") != "detect":
        raise ValueError(f"it is for '{model.task}'; box prompts need one for 'detect'")
    for module in model.modules():
        if isinstance(module, nn.Upsample):
            module.recompute_scale_factor = None  # files of a PyTorch before 1.11 lack it
    load_weights(model, model.state_dict())
    side = (checkpoint.get("train_args") or {}).get("imgsz", DEFAULTS["imgsz"])
    return model, {"imgsz": side}


def load_detector(
    weights: str | os.PathLike | None = None, device: str | torch.device = "auto"
) -> Detector:
    """Load a YOLOv8 detector.

    Args:
        weights: None for the bundled one-class YOLOv8n, "yolov8n" for the official one, or a file:
            .safetensors of training/detector.py, or a detection checkpoint (.pt) of Ultralytics.
            Classes are ignored.
        device: "auto", "cpu", "cuda", ...
    """
    target = resolve_device(device)
    model, options, path = read_weights(weights)
    return Detector(model, options, target, file_sha256(path))
