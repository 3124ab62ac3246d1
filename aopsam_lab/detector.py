"""YOLOv8 boxes for the object-aware baselines (OAS): Ultralytics models, kept quiet.

Ultralytics is AGPL-3.0 software; only this module and training/detector.py import it, inside
functions. While it is imported and used here it sends no usage statistics, uses no network,
installs nothing and writes nothing to the user's home. The method is object-aware sampling of
MobileSAMv2 (Zhang et al. 2023), its detector trained on boxes of all masks.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from aopsam_lab.sam.zoo import file_sha256, official_weights, resolve_device
from aopsam_lab.weights import WEIGHTS

ARCHITECTURE = "yolov8n.yaml"
OFFICIAL_NAME = "yolov8n"  # in aopsam_lab.sam.download
CLASS_NAMES = {0: "object"}
# Where the weights do not say. A box more costs the baseline time, not mIoU.
DEFAULTS = {"imgsz": 640, "confidence": 0.05, "overlap": 0.7}
_OFFLINE = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}


@contextmanager
def process_left_alone() -> Iterator[None]:
    """Puts back what Ultralytics changes: threads, environment, others' functions.

    Its `PIL.Image.open` would go and install a package when it meets a file that is no image.
    """
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


def import_ultralytics() -> ModuleType:
    """The ultralytics package, offline and silent, its settings in a temporary folder."""
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
    return ultralytics


class Detector:
    """One loaded YOLOv8 detection model.

    Args:
        options: imgsz, the longest side that images are scaled to, in pixels; confidence, the least
            of a box; overlap, the IoU of NMS.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        name: str,
        sha256: str,
        options: dict[str, float],
        device: torch.device,
    ) -> None:
        with process_left_alone():
            from ultralytics.models.yolo.detect import DetectionPredictor

            self.name, self.sha256, self.options = name, sha256, dict(options)
            self.imgsz = int(options["imgsz"])
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
        """The most confident boxes of an image (H, W, 3) uint8, RGB, and their scores.

        Boxes are (n, 4) float32, x0 y0 x1 y1, within the image and not empty, the surest first.
        """
        height, width = image.shape[:2]
        bgr = np.ascontiguousarray(image[..., ::-1])
        found = self._predictor([bgr])[0].boxes
        boxes = found.xyxy.float().cpu().numpy().clip(0, np.array([width, height] * 2, np.float32))
        scores = found.conf.float().cpu().numpy()
        real = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
        best = real[np.argsort(-scores[real], kind="stable")][:max_boxes]
        return boxes[best].astype(np.float32), scores[best].astype(np.float32)


def _from_safetensors(path: Path) -> tuple[torch.nn.Module, dict[str, float]]:
    from ultralytics.nn.tasks import DetectionModel

    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
        options = json.loads((file.metadata() or {}).get("detector", "{}"))
    model = DetectionModel(ARCHITECTURE, nc=len(CLASS_NAMES), verbose=False)
    model.load_state_dict(state)
    model.names = dict(CLASS_NAMES)
    return model, {**DEFAULTS, **options}


def _from_checkpoint(path: Path) -> tuple[torch.nn.Module, dict[str, float]]:
    from ultralytics.nn.tasks import torch_safe_load

    # ULTRALYTICS_SAFE_LOAD is read when ultralytics is first imported, perhaps long before
    checkpoint, _ = torch_safe_load(str(path), safe_only=True)
    model = (checkpoint.get("ema") or checkpoint["model"]).float()
    if getattr(model, "task", "detect") != "detect":
        raise ValueError(f"it is for '{model.task}'; box prompts need one for 'detect'")
    for module in model.modules():
        if isinstance(module, torch.nn.Upsample):
            module.recompute_scale_factor = None  # files of a PyTorch before 1.11 lack it
    side = (checkpoint.get("train_args") or {}).get("imgsz", DEFAULTS["imgsz"])
    return model, {**DEFAULTS, "imgsz": side}


def read_weights(
    weights: str | os.PathLike | None = None,
) -> tuple[torch.nn.Module, dict[str, float], Path]:
    """Read the weights of `load_detector`, without running code from the file.

    Returns:
        The model on the CPU, its options (`DEFAULTS` where the file does not say), and the file.
    """
    if weights == OFFICIAL_NAME:
        path = official_weights(OFFICIAL_NAME)
    else:
        path = WEIGHTS / "detector.safetensors" if weights is None else Path(weights)
    if not path.is_file():
        advice = "train some with python -m aopsam_lab.training.detector"
        raise FileNotFoundError(f"No detector weights at {path}; {advice}")
    if path.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"{path}: detector weights are .safetensors or .pt files")
    import_ultralytics()
    read = _from_safetensors if path.suffix == ".safetensors" else _from_checkpoint
    try:
        with process_left_alone():
            return *read(path), path
    except Exception as error:  # a broken file shows itself as one of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        wanted = "one-class YOLOv8n of the kit, or a detection checkpoint of Ultralytics"
        raise ValueError(f"{path} is no {wanted} ({reason})") from error


def load_detector(
    weights: str | os.PathLike | None = None, device: str | torch.device = "auto"
) -> Detector:
    """Load a YOLOv8 detector.

    Args:
        weights: None for the bundled one-class YOLOv8n, "yolov8n" for the official one, or a file:
            .safetensors of training/detector.py, or a detection checkpoint (.pt) of Ultralytics.
            Classes are ignored.
        device: "auto", "cpu", "cuda", ...

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no YOLOv8 detection model, or cannot be read safely.
        ImportError: Ultralytics is not installed.
    """
    target = resolve_device(device)
    model, options, path = read_weights(weights)
    return Detector(model, path.stem, file_sha256(path), options, target)
