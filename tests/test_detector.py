from __future__ import annotations

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

from aopsam_lab.data.scenes import scene
from aopsam_lab.detector import ARCHITECTURE, Detector, import_ultralytics, load_detector
from aopsam_lab.training import detector as training
from aopsam_lab.training.pool import fill_scenes

BUNDLED = Path(training.WEIGHTS)
needs_weights = pytest.mark.skipif(not BUNDLED.exists(), reason="the detector is not trained yet")


def _untrained_state() -> dict[str, torch.Tensor]:
    import_ultralytics()
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    return DetectionModel(ARCHITECTURE, nc=1, verbose=False).state_dict()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    """Weights that know nothing but let every box through."""
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    state = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in _untrained_state().items()}
    save_file(state, path, metadata={"detector": '{"imgsz": 128, "confidence": 1e-06, "overlap": 0.9}'})
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
    assert (np.diff(scores) <= 0).all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    assert (boxes[:, 2] > boxes[:, 0]).all() and (boxes[:, 3] > boxes[:, 1]).all()
    assert len(detector.boxes(image, max_boxes=3)[0]) <= 3


def test_same_picture_same_boxes(detector):
    image = scene(5, 128).image
    first, second = detector.boxes(image), detector.boxes(image)
    assert len(first[0]) > 0
    np.testing.assert_array_equal(first[0], second[0])


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8)]
)
def test_other_arrays_are_refused(detector, image):
    with pytest.raises(ValueError, match="uint8"):
        detector.boxes(image)


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="training.detector"):
        load_detector(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pt", "weights.onnx"])
def test_a_broken_file_gives_one_clear_error(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match=name):
        load_detector(path, "cpu")


def test_weights_of_another_model_give_one_clear_error(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"image_encoder.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="one-class YOLOv8n"):
        load_detector(path, "cpu")


def test_an_ultralytics_checkpoint_loads_by_path(tmp_path):
    import_ultralytics()
    from ultralytics import YOLO

    path = tmp_path / "eighty_classes.pt"
    YOLO(ARCHITECTURE).save(str(path))
    loaded = load_detector(path, "cpu")
    assert (loaded.name, loaded.imgsz) == ("eighty_classes", 640)
    boxes, scores = loaded.boxes(np.zeros((40, 60, 3), np.uint8))
    assert len(boxes) == len(scores) <= 100


_EVIL = """
import os, sys
import torch
import ultralytics  # before the kit: its own safe mode is off
from aopsam_lab.detector import load_detector

class Evil:
    def __reduce__(self):
        return os.mkdir, (sys.argv[2],)

torch.save({"model": Evil(), "ema": Evil()}, sys.argv[1])
try:
    load_detector(sys.argv[1], "cpu")
except ValueError as error:
    print("refused", error)
"""


def test_a_checkpoint_that_runs_code_is_refused_whoever_imported_ultralytics(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ULTRALYTICS_")}
    root = str(Path(training.__file__).resolve().parents[2])
    environment |= {"YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "true", "PYTHONPATH": root}
    path, made = tmp_path / "evil.pt", tmp_path / "made"
    command = [sys.executable, "-c", _EVIL, str(path), str(made)]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert path.exists() and not made.exists(), "its code did not run"
    assert "refused" in done.stdout and "evil.pt" in done.stdout


def test_where_no_safe_reading_can_be_had_a_checkpoint_is_refused(tmp_path, monkeypatch):
    import_ultralytics()
    from ultralytics.nn import tasks

    path = tmp_path / "model.pt"
    torch.save({}, path)
    monkeypatch.setattr(tasks, "torch_safe_load", lambda weight: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="without running code"):
        load_detector(path, "cpu")
    monkeypatch.undo()
    monkeypatch.delattr(torch.serialization, "get_unsafe_globals_in_checkpoint")
    with pytest.raises(ValueError, match="without running code"):
        load_detector(path, "cpu")


def test_threads_and_environment_are_left_alone(untrained):
    before = torch.get_num_threads(), dict(os.environ)
    load_detector(untrained, "cpu").boxes(np.zeros((32, 32, 3), np.uint8))
    after = {name: value for name, value in os.environ.items() if not name.startswith(("YOLO_", "ULTRALYTICS_"))}
    assert torch.get_num_threads() == before[0]
    assert after == {name: value for name, value in before[1].items() if not name.startswith(("YOLO_", "ULTRALYTICS_"))}


_ALONE = """
import socket, sys
def refuse(*args, **kwargs):
    print("NETWORK", args, flush=True)
    raise OSError("no network in this test")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
import numpy as np
import torch
torch_save = torch.save
from aopsam_lab.detector import load_detector
found = load_detector(sys.argv[1], "cpu").boxes(np.zeros((64, 64, 3), np.uint8))
import ultralytics
from ultralytics.utils import SETTINGS, USER_CONFIG_DIR
from ultralytics.utils.events import events
from PIL import Image
assert Image.open.__module__ == "PIL.Image" and torch_save is torch.save
print("sync", SETTINGS["sync"], events.enabled, "config", USER_CONFIG_DIR)
"""


def test_neither_home_nor_network_is_touched(tmp_path, untrained):
    home, temporary, work = tmp_path / "home", tmp_path / "tmp", tmp_path / "work"
    for folder in (home, temporary, work):
        folder.mkdir()
    hidden = ("XDG_", "YOLO_", "ULTRALYTICS_", "MPL", "PYTEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    root = str(Path(training.__file__).resolve().parents[2])
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": root}
    command = [sys.executable, "-c", _ALONE, str(untrained)]
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stdout and f"sync False False config {temporary}" in done.stdout
    assert [list(folder.rglob("*")) for folder in (home, work)] == [[], []]
    assert not list(temporary.glob("aopsam_lab_ultralytics_*"))  # gone with the process


@needs_weights
def test_the_bundled_weights_find_objects():
    loaded, hits, objects = load_detector(device="cpu"), 0, 0
    for seed in (0, 1, 2):
        sample = scene(seed)
        boxes, _ = loaded.boxes(sample.image)
        truth = training.boxes_of(sample.masks) * 512
        truth = truth[(truth[:, 2:] - truth[:, :2]).min(1) > 40]
        low, high = (
            np.maximum(boxes[:, None, :2], truth[None, :, :2]),
            np.minimum(boxes[:, None, 2:], truth[None, :, 2:]),
        )
        shared = (high - low).clip(0).prod(2)
        areas = [(b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, truth)]
        overlap = shared / (areas[0][:, None] + areas[1][None] - shared)
        hits, objects = hits + int((overlap.max(0) > 0.5).sum()), objects + len(truth)
    assert hits > 0.4 * objects


@needs_weights
def test_the_bundled_weights_are_small_and_have_a_card():
    assert BUNDLED.stat().st_size < 15e6
    assert "AGPL-3.0" in BUNDLED.with_suffix(".md").read_text()


def test_boxes_of_masks_by_hand():
    masks = np.zeros((4, 10, 20), bool)
    masks[0, 2:5, 4:10] = True
    masks[2, 9, 19] = True  # the last pixel; mask 1 is empty
    masks[3] = True  # all of the picture: no label
    np.testing.assert_allclose(training.boxes_of(masks), [[0.2, 0.2, 0.5, 0.5], [0.95, 0.9, 1, 1]])


@pytest.fixture
def pool(tmp_path):
    """Five scenes of training seeds as a training pool: its path, and its parse."""
    fill_scenes(tmp_path / "scenes", 5)
    return tmp_path / "scenes", sorted((tmp_path / "scenes").glob("*.npz"))


def test_examples_are_written_in_yolo_layout_and_not_twice(tmp_path, pool):
    data = training.write_data(tmp_path, [(0.5, pool[1])], side=64)
    assert "names:\n  0: object" in data.read_text()
    written = [p.name for p in sorted((tmp_path / "images").glob("*/*"))]
    assert written == ["scenes-scene-10004.jpg", "scenes-scene-10000.jpg"]  # train, then val
    label = np.loadtxt(tmp_path / "labels/train/scenes-scene-10004.txt", ndmin=2)
    assert label.shape[1] == 5 and (label[:, 0] == 0).all() and (label[:, 1:] > 0).all() and (label[:, 1:] <= 1).all()
    pictures = list((tmp_path / "images").glob("*/*"))
    times = [p.stat().st_mtime_ns for p in pictures]
    training.write_data(tmp_path, [(0.5, pool[1])], side=64)
    assert [p.stat().st_mtime_ns for p in pictures] == times


def test_a_share_over_one_is_refused(tmp_path, pool):
    with pytest.raises(ValueError, match="share"):
        training.write_data(tmp_path, [(3, pool[1])], side=64)


def test_a_tiny_training_runs_resumes_and_exports(tmp_path, pool, capsys):
    out = tmp_path / "out/detector.safetensors"
    command = ["--pools", f"{pool[0]}:1", "--minutes", "0.01", "--imgsz", "32", "--batch", "2", "--device", "cpu",
               "--workdir", str(tmp_path), "--out", str(out)]  # fmt: skip
    before = torch.get_num_threads()
    training.main([*command, "--threads", str(before + 1)])
    assert torch.get_num_threads() == before, "the process is left as it was"
    training.main(command)
    assert "is finished" in capsys.readouterr().out
    assert load_detector(out, "cpu").imgsz == 32
    card = out.with_suffix(".md").read_text()
    assert "AGPL-3.0" in card and "4 scenes" in card and "| 1 |" in card
