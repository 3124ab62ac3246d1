from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from small import write_coco

from aopsam_lab.data import open_dataset
from aopsam_lab.detector import (
    ARCHITECTURE,
    Detector,
    import_ultralytics,
    load_detector,
    read_weights,
)
from aopsam_lab.masks.rle import encode_rle
from aopsam_lab.training import detector as training

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
    state = {
        k: v.half() if v.is_floating_point() and v.ndim > 1 else v
        for k, v in _untrained_state().items()
    }
    save_file(
        state, path, metadata={"detector": '{"imgsz": 128, "confidence": 1e-06, "overlap": 0.9}'}
    )
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
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()
    assert (boxes[:, 2] > boxes[:, 0]).all() and (boxes[:, 3] > boxes[:, 1]).all()
    assert len(detector.boxes(image, max_boxes=3)[0]) <= 3


def test_same_picture_same_boxes(detector):
    image = np.random.default_rng(5).integers(0, 256, (128, 128, 3), np.uint8)
    first, second = detector.boxes(image), detector.boxes(image)
    assert len(first[0]) > 0
    np.testing.assert_array_equal(first[0], second[0])


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8)],
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
    after = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("YOLO_", "ULTRALYTICS_"))
    }
    assert torch.get_num_threads() == before[0]
    assert after == {
        name: value
        for name, value in before[1].items()
        if not name.startswith(("YOLO_", "ULTRALYTICS_"))
    }


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
    done = subprocess.run(
        command, env=environment, cwd=work, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stdout and f"sync False False config {temporary}" in done.stdout
    assert [list(folder.rglob("*")) for folder in (home, work)] == [[], []]
    assert not list(temporary.glob("aopsam_lab_ultralytics_*"))  # gone with the process


@needs_weights
def test_the_bundled_weights_find_objects():
    image, wanted = np.full((300, 400, 3), 225, np.uint8), []
    red, blue, green = (200, 30, 30), (30, 60, 190), (20, 120, 40)
    for x, y, colour in ((40, 50, red), (180, 60, blue), (260, 180, green)):
        image[y : y + 80, x : x + 90] = colour
        wanted.append([x, y, x + 90, y + 80])
    found, _ = load_detector(device="cpu").boxes(image)
    assert training.box_recall(np.array(wanted), found)[0] == 1


@needs_weights
def test_the_bundled_weights_are_small_and_have_a_card():
    assert BUNDLED.stat().st_size < 15e6
    assert "AGPL-3.0" in BUNDLED.with_suffix(".md").read_text()


def test_boxes_of_masks_by_hand():
    masks = np.zeros((5, 10, 20), bool)
    masks[0, 2:5, 4:10] = True
    masks[1, 9, 19] = True  # the last pixel
    masks[2] = True  # all of the photograph
    masks[3, 2:5, 4:9] = True  # 5 of the 6 columns of the first: IoU 0.83, the same object
    masks[4, 2:5, 4:8] = True  # 4 of them: IoU 0.67, another, though 0.8 of the fourth
    wanted = [[4, 2, 10, 5], [19, 9, 20, 10], [0, 0, 20, 10], [4, 2, 8, 5]]
    np.testing.assert_array_equal(training.boxes_of(encode_rle(masks)), wanted)
    assert training.boxes_of([]).shape == (0, 4)


def test_of_near_duplicates_the_first_stays():
    boxes = np.array([[0, 0, 10, 8], [0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 10, 6]], float)
    # IoU with the first: 0.8, 0 and 0.75; the second overlaps the fourth by 0.6
    np.testing.assert_array_equal(training.distinct_boxes(boxes), boxes[[0, 2]])
    np.testing.assert_array_equal(training.distinct_boxes(boxes[1:]), boxes[1:])


def test_recall_of_boxes_by_hand():
    wanted = np.array([[0, 0, 10, 10], [0, 0, 10, 7], [50, 50, 60, 60], [80, 80, 90, 90]], float)
    found = np.array([[0, 0, 10, 10], [50, 50, 60, 56], [0, 40, 5, 45]], float)
    # The first is found at IoU 1; its box overlaps the second by 0.7, but is used once; the third
    # is found at IoU 0.6, the fourth not at all.
    np.testing.assert_allclose(training.box_recall(wanted, found), [2 / 4, 1 / 4])
    np.testing.assert_array_equal(training.box_recall(wanted, found[:0]), [0, 0])
    np.testing.assert_array_equal(training.box_recall(wanted, wanted), [1, 1])


class _Known:
    """A detector that finds what it is given."""

    def __init__(self, boxes, scores, least):
        self._found, self.options = (np.array(boxes), np.array(scores)), {"confidence": least}

    def boxes(self, image):
        return self._found


def test_a_measurement_counts_the_boxes_of_each_confidence():
    image, wanted = np.zeros((20, 20, 3), np.uint8), np.array([[0, 0, 10, 10], [10, 10, 20, 20]])
    detector = _Known([[0, 0, 10, 10], [10, 10, 20, 16], [5, 5, 9, 9]], [0.9, 0.07, 0.02], 0.01)
    rows = training.measure(detector, [(image, wanted), (image, np.zeros((0, 4)))])
    columns = ("confidence", "recall_50", "recall_75", "boxes")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        (0.01, 1, 0.5, 3), (0.05, 1, 0.5, 2), (0.1, 0.5, 0.5, 1),
    ]  # fmt: skip
    assert all(row["milliseconds"] > 0 for row in rows)


def test_of_settings_as_good_the_cheapest_is_chosen():
    rows = [
        {"imgsz": 800, "boxes": 90.0, "recall_50": 0.60, "recall_75": 0.40},
        {"imgsz": 640, "boxes": 99.0, "recall_50": 0.62, "recall_75": 0.372},  # 0.4 points less
        {"imgsz": 640, "boxes": 70.0, "recall_50": 0.59, "recall_75": 0.402},  # the same
        {"imgsz": 320, "boxes": 50.0, "recall_50": 0.60, "recall_75": 0.38},  # a point less
    ]
    assert training.choose_settings(rows) is rows[2]


def test_trials_are_added_to_a_file_of_the_same_columns(tmp_path):
    path = tmp_path / "trials.csv"
    for value in (1, 2):
        training.append_rows(path, [{"imgsz": value, "recall_50": 0.5}])
    assert path.read_text() == "imgsz,recall_50\n1,0.5\n2,0.5\n"
    with pytest.raises(ValueError, match="other columns"):
        training.append_rows(path, [{"imgsz": 1}])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A COCO-style folder of six images, 60 x 40 pixels; of each two masks, one of them twice."""
    images, annotations, rng = {}, {}, np.random.default_rng(0)
    masks = np.zeros((3, 40, 60), bool)
    masks[0, 4:24, 6:36], masks[1, 4:24, 6:35], masks[2, 20:38, 40:58] = True, True, True
    rles = [{**rle, "counts": rle["counts"].decode()} for rle in encode_rle(masks)]
    for k in range(6):
        pixels = rng.integers(0, 80, (40, 60, 3), np.uint8)
        pixels[masks[0]], pixels[masks[2]] = (220, 40, 40), (40, 40, 220)
        images[f"{k}.png"] = pixels
        annotations[f"{k}.png"] = [{"segmentation": rle} for rle in rles]
    return write_coco(tmp_path_factory.mktemp("data") / "found", images, annotations)


def test_photographs_are_written_in_yolo_layout_and_not_twice(tmp_path, folder):
    photos = training.Photographs([open_dataset(folder)] * 2, every=3)
    text = photos.write(tmp_path).read_text()
    assert "names:\n  0: object" in text
    names = {split: [p.stem for p in sorted((tmp_path / "images" / split).iterdir())]
             for split in ("train", "val")}  # fmt: skip
    assert names["val"] == ["0-000000", "0-000003", "1-000000", "1-000003"]
    assert len(names["train"]) == 8 and not set(names["train"]) & set(names["val"])
    label = np.loadtxt(tmp_path / "labels/train/0-000001.txt", ndmin=2)
    wanted = [[0, 21 / 60, 14 / 40, 30 / 60, 20 / 40], [0, 49 / 60, 29 / 40, 18 / 60, 18 / 40]]
    np.testing.assert_allclose(label, wanted, atol=1e-6)
    written = list((tmp_path / "images").glob("*/*"))
    times = [p.stat().st_mtime_ns for p in written]
    photos.write(tmp_path)
    assert [p.stat().st_mtime_ns for p in written] == times


def test_large_photographs_are_stored_smaller(tmp_path):
    image = np.zeros((600, 2048, 3), np.uint8)
    training.write_example(tmp_path, "val", "a", image, np.array([[0, 0, 1024, 300.0]]))
    assert Image.open(tmp_path / "images/val/a.jpg").size == (1024, 300)
    assert (tmp_path / "labels/val/a.txt").read_text() == "0 0.250000 0.250000 0.500000 0.500000\n"


@pytest.mark.parametrize("every", [1, 7])
def test_some_photographs_must_be_left_to_train_on_and_some_held_out(folder, every):
    photos = open_dataset(folder, 1 if every == 7 else None)
    with pytest.raises(ValueError, match="--every"):
        training.Photographs([photos], every)


def test_weights_of_eighty_classes_are_a_start_and_others_are_not(tmp_path):
    import_ultralytics()
    from ultralytics.nn.tasks import DetectionModel

    eighty = DetectionModel(ARCHITECTURE, nc=80, verbose=False).state_dict()
    one = _untrained_state()
    fits = training.fitting(eighty, one, "eighty.pt")
    assert 0.8 < len(fits) / len(one) < 1
    assert torch.equal(fits["model.0.conv.weight"], eighty["model.0.conv.weight"])
    with pytest.raises(ValueError, match="other.pt"):
        training.fitting({"a": torch.zeros(1)}, one, "other.pt")


def test_an_exported_model_loads_with_its_settings(tmp_path, untrained):
    model = read_weights(untrained)[0]
    out = tmp_path / "out.safetensors"
    training.export(model, out, {"imgsz": 96, "confidence": 0.01, "overlap": 0.6, "boxes": 9.0})
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["license"] == "AGPL-3.0"
        assert file.get_tensor("model.0.conv.weight").dtype == torch.float16
        assert file.get_tensor("model.0.bn.running_var").dtype == torch.float32
    loaded, options, _ = read_weights(out)
    assert (options["imgsz"], options["confidence"], options["overlap"]) == (96, 0.01, 0.6)
    assert load_detector(out, "cpu").imgsz == 96
    state = loaded.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.fixture
def command(tmp_path, folder, monkeypatch):
    """The arguments of a training of a moment."""
    monkeypatch.setattr(training, "SIDES", (32, 64))
    monkeypatch.setattr(training, "OVERLAPS", (0.6,))
    return ["--data", str(folder), "--minutes", "0.01", "--imgsz", "32", "--batch", "2",
            "--every", "3", "--device", "cpu", "--workdir", str(tmp_path / "work"),
            "--out", str(tmp_path / "out/detector.safetensors")]  # fmt: skip


def test_a_training_of_a_moment_runs_and_exports(tmp_path, command, untrained, capsys):
    out, trials = tmp_path / "out/detector.safetensors", tmp_path / "trials.csv"
    before = torch.get_num_threads()
    command += ["--start", str(untrained), "--trials", str(trials)]
    training.main([*command, "--threads", str(before + 1), "--terms", "For research."])
    assert torch.get_num_threads() == before, "the process is left as it was"
    assert load_detector(out, "cpu").imgsz in (32, 64)
    card = out.with_suffix(".md").read_text()
    for text in ("AGPL-3.0", "For research.", "6 photographs of found", "| 1 |", "untrained"):
        assert text in card
    assert str(tmp_path) not in card
    with trials.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(training.CONFIDENCES)
    training.main(command)
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="other batch"):
        training.main([*command, "--batch", "3"])


def test_a_training_that_was_killed_goes_on_where_it_was(tmp_path, command, monkeypatch, capsys):
    work, run = tmp_path / "work", tmp_path / "work/run"
    saved = []

    def killed_after_one(path, data):
        result = write(path, data)
        if Path(path).name == "resume.pt":
            saved.append(path)
            if len(saved) == 1:
                raise KeyboardInterrupt
        return result

    write = training.write_atomically
    monkeypatch.setattr(training, "write_atomically", killed_after_one)
    photos = training.Photographs([open_dataset(command[1])], 3)
    with pytest.raises(KeyboardInterrupt):
        training.train(photos, work, 5, 32, 2)
    assert (run / "resume.pt").exists() and not (run / "finished.json").exists()
    spent = training._read_curve(run)[0]["time"]
    training.train(photos, work, spent / 60 + 0.02, 32, 2)
    curve = training._read_curve(run)
    assert [row["epoch"] for row in curve] == list(range(1, len(curve) + 1)) and len(curve) > 1
    assert curve[1]["time"] > spent, "the time before is counted"
    assert "epoch 2/" in capsys.readouterr().out and (run / "best.pt").exists()
    resumed = torch.load(run / "resume.pt", weights_only=False)
    assert resumed["epoch"] == len(curve) - 1 and resumed["optimizer"]["state"]
    assert 2 < resumed["updates"] <= 2 * len(curve), "the average goes on, two steps an epoch"
