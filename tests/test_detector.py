import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small import RunsCode
from torchvision.ops import box_iou

from aopsam_lab.detector import ARCHITECTURE, Detector, import_ultralytics, load_detector
from aopsam_lab.training.detector import export
from aopsam_lab.weights import WEIGHTS


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    """Weights that know nothing but let every box through."""
    import_ultralytics()
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel(ARCHITECTURE, nc=1, verbose=False)
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    export(model, path, {"imgsz": 128, "confidence": 1e-06, "overlap": 0.9})
    return path


@pytest.fixture(scope="module")
def detector(untrained) -> Detector:
    return load_detector(untrained, "cpu")


@settings(max_examples=10, deadline=None)
@given(st.integers(8, 160), st.integers(8, 160), st.integers(0, 2**32 - 1))
def test_boxes_are_sorted_inside_the_picture_and_at_most_a_hundred(detector, height, width, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    boxes, scores = detector.boxes(image)
    assert boxes.shape == (len(scores), 4) and len(scores) <= 100
    assert boxes.dtype == np.float32 and scores.dtype == np.float32
    assert (np.diff(scores) <= 0).all() and (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    assert (boxes[:, 2] > boxes[:, 0]).all() and (boxes[:, 3] > boxes[:, 1]).all()
    assert len(detector.boxes(image, max_boxes=3)[0]) <= 3
    np.testing.assert_array_equal(detector.boxes(image)[0], boxes)


def test_what_is_no_detector_gives_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="training.detector"):
        load_detector(tmp_path / "none.safetensors")
    for name in ("broken.safetensors", "broken.pt", "weights.onnx"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(ValueError, match=name):
            load_detector(tmp_path / name, "cpu")
    save_file({"image_encoder.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no one-class YOLOv8n"):
        load_detector(tmp_path / "other.safetensors", "cpu")


def alone(folder, code, *arguments, **more) -> str:
    """What code prints in a process of its own."""
    hidden = ("XDG_", "YOLO_", "ULTRALYTICS_", "MPL", "PYTEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {"PYTHONPATH": str(WEIGHTS.parents[1]), **more}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    options = {"env": environment, "cwd": folder, "text": True, "timeout": 300}
    done = subprocess.run(command, capture_output=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


_LOADS = """
import sys
import ultralytics  # before the kit: its own safe mode is off
from aopsam_lab.detector import load_detector

try:
    load_detector(sys.argv[1], "cpu")
except ValueError as error:
    print("refused", error)
"""


def test_a_checkpoint_that_runs_code_is_refused_whoever_imported_ultralytics(tmp_path):
    path, made = tmp_path / "evil.pt", tmp_path / "made"
    torch.save({"model": RunsCode(made), "ema": RunsCode(made)}, path)
    own = {"YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "true"}
    printed = alone(tmp_path, _LOADS, path, **own)
    assert not made.exists(), "its code did not run"
    assert "refused" in printed and "evil.pt" in printed


_ALONE = """
import socket, sys
def refuse(*args, **kwargs):
    print("NETWORK", args, flush=True)
    raise OSError("no network in this test")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
import os
import numpy as np
import torch
from aopsam_lab.detector import load_detector
def around():
    environment = {name: value for name, value in os.environ.items() if "YOLO_" not in name}
    return torch.get_num_threads(), environment
before = around()
found = load_detector(sys.argv[1], "cpu").boxes(np.zeros((64, 64, 3), np.uint8))
assert around() == before, "threads and environment are left alone"
import ultralytics
from ultralytics.utils import SETTINGS, USER_CONFIG_DIR
from ultralytics.utils.events import events
from PIL import Image
assert Image.open.__module__ == "PIL.Image"
print("sync", SETTINGS["sync"], events.enabled, "config", USER_CONFIG_DIR)
"""


def test_neither_home_nor_network_nor_the_process_is_touched(tmp_path, untrained):
    home, temporary, work = tmp_path / "home", tmp_path / "tmp", tmp_path / "work"
    for folder in (home, temporary, work):
        folder.mkdir()
    printed = alone(work, _ALONE, untrained, HOME=str(home), TMPDIR=str(temporary))
    assert "NETWORK" not in printed and f"sync False False config {temporary}" in printed
    assert [list(folder.rglob("*")) for folder in (home, work)] == [[], []]
    assert not list(temporary.glob("aopsam_lab_ultralytics_*"))  # gone with the process


def test_the_bundled_weights_find_objects_and_have_their_licence():
    image, wanted = np.full((300, 400, 3), 225, np.uint8), []
    red, blue, green = (200, 30, 30), (30, 60, 190), (20, 120, 40)
    for x, y, colour in ((40, 50, red), (180, 60, blue), (260, 180, green)):
        image[y : y + 80, x : x + 90] = colour
        wanted.append([x, y, x + 90, y + 80])
    found, _ = load_detector(device="cpu").boxes(image)
    overlap = box_iou(torch.tensor(wanted).float(), torch.from_numpy(found))
    assert (overlap.amax(1) > 0.5).all()
    assert "AGPL-3.0" in (WEIGHTS / "detector.md").read_text()
