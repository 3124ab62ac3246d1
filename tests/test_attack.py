"""Hostile or unlucky input: one clear error, or the right answer; never a crash, never a hang."""

import json
import os
from collections import Counter

import attack
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from small import corners, rle_text, write_coco

from aopsam_lab import __main__ as cli
from aopsam_lab.data import open_dataset
from aopsam_lab.data.image_set import ground_truth
from aopsam_lab.pipeline.decode import distinct
from aopsam_lab.pipeline.run import segment
from aopsam_lab.predictor import PromptPredictor

SIZE = (12, 20)
numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.floats(-30, 30), st.sampled_from([1e8, -3e9])
)
junk = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)
outlines = st.lists(st.lists(numbers, max_size=10), max_size=3)
# the characters of COCO's text, and others
texts = st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=14)
rles = st.fixed_dictionaries(
    {"size": st.just(list(SIZE)) | junk, "counts": st.lists(st.integers(-3, 300)) | texts | junk}
)


def read(annotation: object) -> list[dict]:
    return ground_truth([annotation], SIZE, "a.png of set", Counter())[0]


@settings(max_examples=400, deadline=2000)
@given(outlines | rles | junk, junk, st.sampled_from(["clicks", "point_coords", "iscrowd", "id"]))
@example([[1.0, 1.0, float("nan"), 1.0, 20.0, 20.0]], None, "id")
@example([[-150.0, -200.0, 2.1e8, 3.5e8, 220.0, 230.0]], None, "id")
def test_any_annotation_is_a_mask_of_its_image_or_one_error_that_names_it(segmentation, more, key):
    try:
        found = read({"segmentation": segmentation, key: more})
    except ValueError as error:
        assert "of a.png of set" in str(error) and len(str(error)) < 600
    else:
        assert all(coco_mask.decode(rle).shape == SIZE for rle in found)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_counts_as_list_and_as_text_give_the_mask_that_they_tell(runs):
    runs = [*runs, 240 - sum(runs)] if sum(runs) <= 240 else [240]
    pixels = np.repeat(np.arange(len(runs)) % 2, runs).astype(bool).reshape(SIZE[::-1]).T
    as_list = {"size": list(SIZE), "counts": runs}
    text = coco_mask.frPyObjects(as_list, *SIZE)["counts"].decode()
    for counts in (runs, text):
        found = read({"segmentation": {"size": list(SIZE), "counts": counts}})
        assert len(found) == pixels.any()
        for rle in found:  # written as pycocotools writes it: runs of no pixels end its loops early
            assert rle["counts"].decode() == rle_text(pixels)["counts"]


@pytest.mark.parametrize("counts", ["", "1", "`", "PPYo1", "e0e0e0", [240, 1], [-1, 241], [1.5], 7])
def test_counts_that_do_not_add_up_are_refused(counts):
    with pytest.raises(ValueError, match="annotation 7 of a.png of set do not add up"):
        read({"id": 7, "segmentation": {"size": list(SIZE), "counts": counts}})


def broken_folder(tmp_path, change):
    images = {"a.png": np.zeros((*SIZE, 3), np.uint8)}
    folder = write_coco(tmp_path, images, {"a.png": [{"segmentation": corners(2, 2, 6)}]})
    content = json.loads((folder / "annotations.json").read_text())
    change(content)
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("size", [[10**9, 10**9], [-12, 20], ["12", 20], [12.0, 20], [None, 20]])
def test_an_image_of_an_impossible_size_is_refused(tmp_path, size):
    def change(content):
        content["images"][0] |= dict(zip(("height", "width"), size, strict=True))

    with pytest.raises(ValueError, match="The size of a.png.*178,956,970 .*reduce or cut"):
        open_dataset(broken_folder(tmp_path, change))


@settings(max_examples=60, deadline=None)
@given(junk, st.sampled_from(["images", "annotations", "file_name", "image_id", "id", "height"]))
def test_a_malformed_file_gives_one_error_or_opens(tmp_path_factory, value, key):
    def change(content):
        for place in (content, content["images"][0], content["annotations"][0]):
            if key in place:
                place[key] = value
                break

    folder = broken_folder(tmp_path_factory.mktemp("set"), change)
    try:
        open_dataset(folder).describe()
    except (ValueError, OSError) as error:
        assert str(folder) in str(error)


def test_a_deeply_nested_file_is_refused(tmp_path):
    folder = broken_folder(tmp_path, lambda content: None)
    (folder / "annotations.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="not in COCO's instances format: RecursionError"):
        open_dataset(folder)


# --- images ---


def test_a_batch_goes_on_whatever_one_image_does(tmp_path, capsys, weights, monkeypatch):
    good, loop, pipe = (tmp_path / name for name in ("good.png", "loop.png", "pipe.png"))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)).save(good)
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    Image.new("RGB", (2000, 1)).save(tmp_path / "thin.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "odd.png")

    def fails(path, *arguments, **more):
        if str(path).endswith("odd.png"):
            raise RuntimeError("a fault of ours")
        return segment(path, *arguments, **more)

    monkeypatch.setattr(cli, "segment", fails)
    bad = [loop, pipe, "/dev/zero", "x" * 300, tmp_path / "thin.png", tmp_path / "odd.png"]
    options = ["--sam", "small", "--checkpoint", weights["checkpoint"], "--method", "amg_s"]
    command = ["segment", *map(str, bad), str(good), "--out", str(tmp_path / "out"), *options]
    assert cli.main([*command, "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "1 of 7 images segmented" in captured.out and (tmp_path / "out/good.json").exists()
    assert captured.err.count("failed: ") == 6 and "odd.png: RuntimeError: a fault" in captured.err
    assert "pipe or device" in captured.err and "too thin" in captured.err


@pytest.mark.parametrize("shape", [(2, 128), (128, 1), (3, 64), (1, 1)])
@pytest.mark.parametrize("method", ["aop", "aop_raw", "aop_no_af", "amg_s"])
def test_a_strip_is_segmented(small_sam, small_predictor, shape, method):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    found = segment(image, method, small_sam, small_predictor)
    assert all(rle["size"] == list(shape) for rle in found.masks)


def test_a_predictor_for_another_sam_is_refused_with_both_shapes(small_sam):
    image = np.zeros((40, 48, 3), np.uint8)
    with pytest.raises(ValueError, match="of 7 channels and cells of 16 pixels; this one has"):
        segment(image, "aop", small_sam, PromptPredictor(embed_dim=7).eval())


def test_masks_of_one_pixel_or_a_line_are_duplicates_of_themselves():
    pixel, line, square = [5, 5, 5, 5], [2, 8, 9, 8], [0, 0, 9, 9]
    boxes = torch.tensor([pixel, line, pixel, square, line])
    assert distinct(boxes, torch.tensor([0.5, 0.6, 0.9, 0.7, 0.8])).tolist() == [2, 4, 3]


# --- a few of the attacks of attack.py ---


@pytest.fixture(scope="module")
def worker():
    worker = attack.Worker()
    yield worker
    worker.close()


@pytest.mark.parametrize("kind", attack.COUNTS)
def test_attacks_are_refused_or_answered_right(worker, kind):
    found = attack.attack(worker, kind, range(2 if kind == "kills" else 20))
    assert not found.keys() - attack.FINE, found
    assert found.get("right") and (kind in ("kills", "messages") or found.get("refused"))
