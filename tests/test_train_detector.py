"""The detector's labels and measurements, hand-worked, and its training on a few small images."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small import rle_text, write_coco

from aopsam_lab.data import open_dataset
from aopsam_lab.detector import ARCHITECTURE, import_ultralytics, load_detector, read_weights
from aopsam_lab.masks.rle import encode_rle
from aopsam_lab.training import detector as training
from aopsam_lab.training import split

NAMES = ["0.png", "1.png", "2.png", "3.png", "4.png", "10.png"]  # by its name 10.png is held out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A COCO-style folder of images, 60 x 40 pixels; of each two masks, one of them twice."""
    images, annotations, rng = {}, {}, np.random.default_rng(0)
    masks = np.zeros((3, 40, 60), bool)
    masks[0, 4:24, 6:36], masks[1, 4:24, 6:35], masks[2, 20:38, 40:58] = True, True, True
    for name in NAMES:
        pixels = rng.integers(0, 80, (40, 60, 3), np.uint8)
        pixels[masks[0]], pixels[masks[2]] = (220, 40, 40), (40, 40, 220)
        images[name] = pixels
        annotations[name] = [{"segmentation": rle_text(mask)} for mask in masks]
    return write_coco(tmp_path_factory.mktemp("data") / "found", images, annotations)


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


def test_recall_of_boxes_by_hand():
    wanted = np.array([[0, 0, 10, 10], [0, 0, 10, 7], [50, 50, 60, 60], [80, 80, 90, 90]], float)
    found = np.array([[0, 0, 10, 10], [50, 50, 60, 56], [0, 40, 5, 45]], np.float32)
    # The first is found at IoU 1; its box overlaps the second by 0.7, but is used once; the third
    # is found at IoU 0.6, the fourth not at all.
    ground_truth = torch.from_numpy(wanted)
    np.testing.assert_allclose(training.box_recall(ground_truth, found), [2 / 4, 1 / 4])
    np.testing.assert_array_equal(training.box_recall(ground_truth, found[:0]), [0, 0])
    np.testing.assert_array_equal(training.box_recall(ground_truth, wanted), [1, 1])
    # the mean over photographs that have boxes
    known = SimpleNamespace(boxes=lambda image: (found, None))
    photos = [(None, ground_truth), (None, ground_truth[:1]), (None, ground_truth[:0])]
    measured = training.measure(known, photos)
    assert [measured[x] for x in ("recall_50", "recall_75", "boxes")] == [0.75, 0.625, 3]


def test_photographs_are_written_as_yolo_reads_them(tmp_path, folder):
    data, listing = open_dataset(folder), tmp_path / "data.yaml"
    rows, held = split(data)
    assert [data.ids[i] for i in held] == ["10.png"]
    training.write_data(data, {"train": rows, "val": held}, listing)
    assert json.loads(listing.read_text())["names"] == {"0": "object"}
    written = sorted((tmp_path / "images").glob("*/*"))
    assert [path.parent.name for path in written] == 5 * ["train"] + ["val"]
    assert written[-1].stem == f"{held[0]:06d}"
    label = np.loadtxt(tmp_path / f"labels/val/{written[-1].stem}.txt", ndmin=2)
    wanted = [[0, 21 / 60, 14 / 40, 30 / 60, 20 / 40], [0, 49 / 60, 29 / 40, 18 / 60, 18 / 40]]
    np.testing.assert_allclose(label, wanted, atol=1e-6)


def test_weights_of_eighty_classes_are_a_start_and_those_of_another_size_are_not(tmp_path):
    import_ultralytics()
    from ultralytics import YOLO

    eighty = YOLO(ARCHITECTURE)
    eighty.save(tmp_path / "eighty.pt")
    loaded = load_detector(tmp_path / "eighty.pt", "cpu")
    assert loaded.imgsz == 640 and len(loaded.boxes(np.zeros((40, 60, 3), np.uint8))[0]) <= 100
    made = training.starting_model(tmp_path / "eighty.pt").state_dict()
    first = "model.0.conv.weight"
    assert torch.equal(made[first], eighty.model.state_dict()[first].half().float())
    YOLO(ARCHITECTURE.replace("n", "s")).save(tmp_path / "small.pt")
    with pytest.raises(ValueError, match="small.pt"):
        training.starting_model(tmp_path / "small.pt")


def test_a_training_stops_goes_on_and_exports(tmp_path, folder, monkeypatch):
    out = tmp_path / "out/detector.safetensors"
    command = [
        "--data", str(folder), "--minutes", "0.02", "--imgsz", "64", "--batch", "2",
        "--device", "cpu", "--workdir", str(tmp_path / "work"), "--out", str(out),
        "--licence", "for research",
    ]  # fmt: skip
    before = torch.get_num_threads()

    def killed(path, data):
        result = write(path, data)
        if path.name == "last.pt":
            raise KeyboardInterrupt
        return result

    write = training.write_atomically
    monkeypatch.setattr(training, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        training.main(command)
    monkeypatch.setattr(training, "write_atomically", write)
    run = next((tmp_path / "work").glob("*/last.pt")).parent
    spent = training.learning_curve(run)["time"].max()
    before_stop = torch.load(run / "last.pt", weights_only=False)
    training.main(command)
    assert torch.get_num_threads() == before, "the process is left as it was"
    curve = training.learning_curve(run)
    assert list(curve["epoch"]) == list(range(1, len(curve) + 1)) and len(curve) > 1
    assert curve["time"].iloc[1] > spent, "the time before is counted"
    last = torch.load(run / "last.pt", weights_only=False)
    assert last["epoch"] == len(curve) - 1 and last["optimizer"]["state"]
    assert before_stop["updates"] < last["updates"] <= 3 * len(curve), "the running mean goes on"
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["license"] == "AGPL-3.0"
        assert file.get_tensor("model.0.conv.weight").dtype == torch.float16
        assert file.get_tensor("model.0.bn.running_var").dtype == torch.float32
    assert read_weights(out)[1] == {"imgsz": 64, "confidence": 0.001, "overlap": 0.7}
    card = out.with_suffix(".md").read_text()
    for text in ("AGPL-3.0", "for research", "5 photographs of found", "| 1 |", "from scratch"):
        assert text in card
    assert str(tmp_path) not in card
    written = (run / "last.pt").stat().st_mtime_ns
    training.main(command)
    assert (run / "last.pt").stat().st_mtime_ns == written, "finished"
    training.main([*command, "--start", str(out)])
    assert f"from `{out.name}`" in out.with_suffix(".md").read_text()
