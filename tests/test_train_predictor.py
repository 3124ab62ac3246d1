"""Training a Prompt Predictor on whole pictures of a data set, from the cache of embeddings."""

from __future__ import annotations

import csv
import io
import json
import re

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors import safe_open

from aopsam_lab import cli
from aopsam_lab.data import open_dataset
from aopsam_lab.decoding import encode
from aopsam_lab.predictor import load_predictor
from aopsam_lab.sam.mobile import build_mobile_sam
from aopsam_lab.sam.tiny import IMG_SIZE, build_tiny_sam
from aopsam_lab.training import embedding_cache
from aopsam_lab.training.embedding_cache import EmbeddingCache
from aopsam_lab.training.examples import DatasetExamples, PoolExamples
from aopsam_lab.training.predictor import draw_curve, target_of

HEIGHT, WIDTH = 60, 90


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve pictures in SA-1B's format, each with two discs that can be seen and their centres as prompt points."""
    folder = tmp_path_factory.mktemp("sa1b")
    rng = np.random.default_rng(0)
    for i in range(12):
        image = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
        annotations = []
        for x, y in ((20 + i, 18), (65 - i, 42)):
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            cv2.circle(mask, (x, y), 9, 1, -1)
            image[mask > 0] = rng.integers(90, 255, 3)
            rle = coco_mask.encode(np.asfortranarray(mask))
            segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
            annotations.append({"id": x, "segmentation": segmentation, "point_coords": [[x + 0.5, y + 0.5]]})
        Image.fromarray(image).save(folder / f"sa_{i}.jpg", quality=95)
        note = {"image": {"image_id": i, "width": WIDTH, "height": HEIGHT}, "annotations": annotations}
        (folder / f"sa_{i}.json").write_text(json.dumps(note))
    return folder


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return build_tiny_sam().eval().requires_grad_(False)


draw = target_of("paper", (IMG_SIZE // 2, IMG_SIZE // 2))


def filled(sam, photos, folder, limit=None, **key):
    examples = DatasetExamples(open_dataset(f"sa1b:{photos}", limit), sam, 2)
    cache = EmbeddingCache(folder, sam, examples.count, {**examples.key, **key})
    cache.fill(sam, lambda row: examples.entry(row, draw))
    return examples, cache


def test_a_target_has_its_bumps_at_the_data_sets_own_points(tiny, photos):
    dataset = open_dataset(f"sa1b:{photos}")
    image, target = DatasetExamples(dataset, tiny, 2).entry(0, draw)
    assert image.shape == (round(HEIGHT * IMG_SIZE / WIDTH), IMG_SIZE, 3)
    peaks = {(int(y), int(x)) for y, x in np.argwhere(target == 1)}
    scale = IMG_SIZE / WIDTH / 2  # PCM cells a pixel
    assert peaks == {(int(y * scale), int(x * scale)) for x, y in dataset[0].points}


def test_without_points_the_bumps_are_at_the_poles(tiny, photos, monkeypatch):
    dataset = open_dataset(f"sa1b:{photos}")
    points = dataset[0].points
    examples = DatasetExamples(dataset, tiny, 2)
    with_points = examples.entry(0, draw)[1]
    monkeypatch.setattr(type(dataset), "__getitem__", _without_points(type(dataset).__getitem__))
    target = examples.entry(0, draw)[1]
    peaks = np.argwhere(target == 1)
    assert len(peaks) == len(points) and not np.array_equal(target, with_points)
    for x, y in points * (
        IMG_SIZE / WIDTH / 2
    ):  # of a disc the pole is the centre, moved to a cell of the embedding at most
        assert np.abs(peaks - (y, x)).max(1).min() <= 3


def _without_points(getitem):
    def get(self, i):
        sample = getitem(self, i)
        sample.points = None
        return sample

    return get


def test_the_cache_holds_what_the_encoder_gave(tiny, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_cache, "SHARD", 4)
    examples, cache = filled(tiny, photos, tmp_path)
    assert examples.count == 11 and len(list(tmp_path.glob("shard-*"))) == 3  # of 4, 4 and 3; one picture is held out
    with safe_open(tmp_path / "shard-000001.safetensors", "np") as shard:  # any reader of the format can read it
        kinds = {name: (shard.get_tensor(name).dtype, len(shard.get_tensor(name))) for name in shard.keys()}
    assert kinds["embeddings"] == (np.float16, 4) and kinds["targets"] == (np.uint8, 4) and kinds["ends"] == (np.int64, 4)
    dataset = open_dataset(f"sa1b:{photos}")
    index = np.array([9, 0, 5])
    (batch,) = cache.batches(tiny, [index])
    for i, row in enumerate(index):
        encoded = encode(tiny, dataset[int(row)].image)
        assert torch.allclose(batch.embedding[i], encoded.embedding[0], atol=2e-3)
        high, wide = encoded.input_size
        assert (batch.image[i] - encoded.model_image[0])[:, :high, :wide].abs().mean() < 0.05  # JPEG
        assert not batch.image[i, :, high:].any() and not batch.valid[i, -(-high // 2) :].any()
        target = examples.entry(int(row), draw)[1]
        assert np.abs(batch.target[i].numpy() - target).max() <= 0.5 / 255 + 1e-6


def test_pictures_are_made_ahead_in_order_and_few_at_a_time():
    made = []
    ahead = embedding_cache._made_ahead(lambda row: made.append(row) or row * 2, range(50), 3)
    assert next(ahead) == 0 and len(made) <= 3
    assert [0, *ahead] == list(range(0, 100, 2))


def test_batches_come_in_order_and_their_memory_is_bounded(tiny, photos, tmp_path):
    _, cache = filled(tiny, photos, tmp_path)
    indices = [np.array([i % 11, (i + 1) % 11]) for i in range(7)]
    asked = []
    stream = cache.batches(tiny, (asked.append(0) or index for index in indices))
    first = next(stream)
    assert len(asked) == embedding_cache.AHEAD + 1, "no more is read ahead"
    again = [first, *stream]
    assert len(again) == 7
    for index, batch in zip(indices, again):
        (alone,) = cache.batches(tiny, [index])
        assert torch.equal(batch.embedding, alone.embedding) and torch.equal(batch.target, alone.target)


def test_a_cache_that_was_stopped_goes_on_and_grows(tiny, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedding_cache, "SHARD", 4)
    examples = DatasetExamples(open_dataset(f"sa1b:{photos}"), tiny, 2)
    cache, made, faults = EmbeddingCache(tmp_path, tiny, 6, {"a": 1}), [], [5]

    def entry(row):
        made.append(row)
        if row in faults:
            raise RuntimeError("stopped")
        return examples.entry(row, draw)

    with pytest.raises(RuntimeError, match="stopped"):
        cache.fill(tiny, entry)
    assert [path.name for path in tmp_path.glob("shard-*")] == ["shard-000000.safetensors"]
    made.clear()
    faults.clear()
    cache.fill(tiny, entry)
    assert sorted(made) == [4, 5], "the whole shard stays, the broken one is made anew"
    made.clear()
    EmbeddingCache(tmp_path, tiny, 9, {"a": 1}).fill(tiny, entry)
    assert sorted(made) == [4, 5, 6, 7, 8], "a larger limit keeps the shards that were full"
    made.clear()
    EmbeddingCache(tmp_path, tiny, 4, {"a": 2}).fill(tiny, entry)
    assert sorted(made) == [0, 1, 2, 3] and len(list(tmp_path.glob("shard-*"))) == 1, "of another key everything is new"


def test_the_room_is_told_before_anything_is_made(tiny, tmp_path, capsys):
    cache = EmbeddingCache(tmp_path, tiny, 100_000, {})
    with pytest.raises(OSError, match=r"needs 48.6 GB and may take 3.0 GB.*--limit 61.. would fit"):
        cache.fill(tiny, lambda row: pytest.fail("nothing is read"), most_gb=3)
    assert "100,000 pictures" in capsys.readouterr().out
    assert cache.megabytes()["embeddings"] == 100_000 * 128 * 40 * 40 * 2 / 1e6


def test_ten_thousand_embeddings_of_vit_h_are_21_gb(tmp_path):
    cache = EmbeddingCache(tmp_path, build_mobile_sam(), 10_000, {})  # ViT-H's embedding has the same shape
    assert cache.megabytes()["embeddings"] / 1e3 == pytest.approx(21.0, abs=0.05)


def test_the_command_trains_stops_early_and_its_predictor_loads(photos, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train-predictor", "--data", f"sa1b:{photos}", "--workdir", str(run), "--limit", "8", "--batch", "4"]
    command += ["--epochs", "4", "--log-every", "2", "--device", "cpu", "--candidates", "0", "--out"]
    command += [str(tmp_path / "mine.safetensors")]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "7 pictures in" in out and "GB free" in out
    with open(run / "curve.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4", "6", "7"] and {"held_loss", "recall_64"} <= set(rows[0])
    with Image.open(run / "curve.png") as drawn:
        assert drawn.size[0] > 600
    predictor = load_predictor("tiny", tmp_path / "mine.safetensors", "cpu")
    card = (tmp_path / "mine.md").read_text()
    assert "7 pictures of sa1b" in card and predictor.embed_dim == 128
    assert "stopped after" not in card and "lowest held-out loss kept" in card, "its epochs ended before its patience did"
    shards = {path: path.stat().st_mtime_ns for path in (run / "cache").glob("shard-*")}
    # every later held-out loss is worse than none at all: the training stops after two of them
    state = torch.load(run / "last.pt", weights_only=True)
    torch.save({**state, "best": -1.0, "stale": 0}, run / "last.pt")
    assert cli.main([*command, "--epochs", "100", "--patience", "2"]) == 0
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 7 + 4 - 1
    assert "stopped after 2 evaluations without a lower held-out loss" in (tmp_path / "mine.md").read_text()
    assert {path: path.stat().st_mtime_ns for path in shards} == shards, "embeddings are computed once"


def test_a_predictor_with_too_few_peaks_for_its_calibration_says_so(photos, tmp_path, capsys):
    command = ["train-predictor", "--data", f"sa1b:{photos}", "--workdir", str(tmp_path), "--limit", "3", "--held-out", "1"]
    assert cli.main([*command, "--epochs", "1", "--device", "cpu", "--candidates", "100000"]) == 0
    said = re.search(r"gives (\d+) candidates a picture \(100000 were asked for", capsys.readouterr().out)
    assert said and f"give {said[1]} candidates each at the default settings (100000 were asked for" in (tmp_path / "predictor.md").read_text()


def test_the_chain_holds_for_mobile_sam(photos, tmp_path):
    torch.manual_seed(0)
    torch.save(build_mobile_sam().state_dict(), tmp_path / "mobile_sam.pt")
    command = [
        "train-predictor",
        "--sam",
        "mobile_sam",
        "--checkpoint",
        str(tmp_path / "mobile_sam.pt"),
        "--limit",
        "2",
    ]
    command += [
        "--data",
        f"sa1b:{photos}",
        "--workdir",
        str(tmp_path),
        "--batch",
        "1",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    assert cli.main([*command, "--log-every", "1", "--held-out", "1", "--candidates", "0"]) == 0
    predictor = load_predictor("mobile_sam", tmp_path / "predictor.safetensors", "cpu")
    assert (predictor.embed_dim, predictor.stride) == (256, 16)
    with torch.inference_mode():
        assert predictor(torch.zeros(1, 3, 1024, 1024), torch.zeros(1, 256, 64, 64)).shape == (1, 1, 256, 256)


def test_what_cannot_be_is_said_in_one_line(photos, tmp_path, capsys):
    command = ["train-predictor", "--workdir", str(tmp_path), "--device", "cpu", "--data"]
    for data, message in ((f"sa1b:{tmp_path}", "There is no sa_"), (str(tmp_path / "none"), "There is no folder")):
        assert cli.main([*command, data]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*command, f"sa1b:{photos}", "--limit", "1"]) == 2
    assert "two at least" in capsys.readouterr().err
    assert cli.main([*command, f"sa1b:{photos}", "--max-gb", "0.0001"]) == 2
    assert "Take fewer pictures" in capsys.readouterr().err
    with pytest.raises(ValueError, match="320 pixels, this one has 1024: train it on --data"):
        PoolExamples([(1.0, [])], build_mobile_sam(), 1, 1, 0)


def test_a_curve_is_drawn(tmp_path):
    (tmp_path / "curve.csv").write_text(
        "step,minutes,loss,held_loss,recall_64,candidates\n1,0,2,3,0.1,9\n2,0,1,2,0.2,9\n"
    )
    draw_curve(tmp_path / "curve.csv", tmp_path / "curve.png")
    pixels = np.asarray(Image.open(io.BytesIO((tmp_path / "curve.png").read_bytes())).convert("L"))
    assert pixels.min() < 60 < 250 < pixels.max()
