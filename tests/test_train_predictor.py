"""What the Prompt Predictor learns, hand-worked, and its training on a small SAM."""

import csv
import json

import numpy as np
import pytest
import torch
from small import corners, write_coco

from aopsam_lab import __main__ as cli
from aopsam_lab.asf import AsfParams
from aopsam_lab.data import open_dataset
from aopsam_lab.data.sample import Sample
from aopsam_lab.masks.rle import encode_rle
from aopsam_lab.pipeline.methods import METHODS
from aopsam_lab.pipeline.run import LoadedModels, ModelFiles
from aopsam_lab.predictor import BLOCK, SIGMA, PromptPredictor, draw_pcm, load_predictor
from aopsam_lab.training import append_rows, examples, predictor, split, trials
from aopsam_lab.training.examples import Examples, covering_prompts, own_prompts, target_map


def square(x, y, side, size=64):
    mask = np.zeros((size, size), bool)
    mask[y : y + side, x : x + side] = True
    return mask


def sample(masks, points=None, clicks=None):
    return Sample("a", np.zeros((64, 64, 3), np.uint8), encode_rle(np.stack(masks)), points, clicks)


def spots(prompts):
    return [(*points.mean(0).tolist(), height) for points, height in prompts]


def test_own_prompts_are_the_data_sets_or_the_deepest_points():
    masks = [square(0, 0, 9), square(20, 30, 5)]
    assert spots(own_prompts(sample(masks))) == [(4.5, 4.5, 1), (22.5, 32.5, 1)]
    given = np.float32([[1, 2], [21, 33]])
    assert spots(own_prompts(sample(masks, given))) == [(1, 2, 1), (21, 33, 1)]


def test_covering_prompts_prefer_a_click_that_gives_two_masks():
    whole, part, far = square(0, 0, 40), square(4, 4, 10), square(50, 50, 9)
    # so near to each other that a prompt lies on its click
    clicks = [[[30, 30], [6, 6]], [[6, 6], [7, 7]], [[50, 50], [54, 54]]]
    found = spots(covering_prompts(sample([whole, part, far], clicks=clicks)))
    # one click gives whole and part, the deepest gives the far one; each of the others gives one
    # mask that two clicks give
    needed, others = {(6, 6): 1, (54, 54): 1}, {(30, 30): 0.25, (7, 7): 0.25, (50, 50): 0.25}
    assert {(x - 0.5, y - 0.5): height for x, y, height in found} == needed | others


def test_masks_that_people_drew_are_covered_at_their_deepest_points():
    whole, drawn, covered = square(0, 0, 20), square(40, 40, 9), square(8, 8, 6)
    found = covering_prompts(sample([whole, drawn, covered], clicks=[[[10, 10]], [], []]))
    expected = [(10.5, 10.5, 1), (44.5, 44.5, 1)]
    assert sorted(spots(found)) == expected, "the covered one has a prompt on it"
    assert spots(covering_prompts(sample([drawn]))) == [(44.5, 44.5, 1)]


def test_a_prompt_may_lie_anywhere_about_its_click():
    mask = square(8, 8, 30)
    clicks = [[[10, 10], [26, 10], [10, 34], [26, 34]]]  # a grid of 16 by 24 pixels
    found = [points for points, _ in covering_prompts(sample([mask], clicks=clicks))]
    assert all(1 < len(points) <= 64 for points in found)
    for points, (x, y) in zip(found, clicks[0], strict=True):
        assert (np.abs(points - 0.5 - (x, y)) <= (8, 12)).all(), "within its own cell of the grid"
        column, row = points.T.astype(int)
        assert mask[row, column].all() and not {8, 37} & {*column, *row}, "not at the mask's edge"
    rng = np.random.default_rng(0)
    prompts = covering_prompts(sample([mask], clicks=clicks))
    first, second = (target_map(prompts, 1, (64, 64), rng) for _ in range(2))
    assert (first != second).any(), "drawn anew"


def test_the_target_map_holds_each_prompts_height_by_hand():
    rng = np.random.default_rng(0)
    first, second = np.float32([[5.4, 2.4]]), np.float32([[4.2, 3.8]])
    prompts = [(first, 0.5), (second, 1), (np.float32([[15, 17]]), 0.25)]
    target = target_map(prompts, 0.5, (8, 8), rng)
    assert target[1, 2] == 1 and target[7, 7] == 0.25 and np.count_nonzero(target) == 2
    assert target.dtype == np.float32 and not target_map([], 0.5, (8, 8), rng).any()


def test_the_map_has_one_gaussian_in_each_block():
    confidence, place = torch.full((1, 2, 2), -20.0), torch.zeros(1, BLOCK**2, 2, 2)
    confidence[0, 0, 1], place[0, 3 * BLOCK + 1, 0, 1] = 0.0, 9.0
    pcm = draw_pcm(confidence, place)[0, 0]
    assert divmod(int(pcm.argmax()), 2 * BLOCK) == (3, BLOCK + 1)
    assert pcm.max().item() == pytest.approx(0.5, abs=1e-6)
    side = 0.5 * np.exp(-0.5 * (2 / SIGMA) ** 2)
    assert pcm[3, BLOCK - 1].item() == pytest.approx(side, abs=1e-6)
    assert torch.allclose(draw_pcm(confidence, 9 * place, soft=True)[0, 0], pcm, atol=1e-6)


def test_losses_by_hand():
    confidence, place = torch.zeros(1, 1, 2), torch.zeros(1, BLOCK**2, 1, 2)
    target, valid = torch.zeros(1, BLOCK, 2 * BLOCK), torch.ones(1, BLOCK, 2 * BLOCK)
    target[0, 2, 3] = 1.0
    # both confidences are one half: log 2 each, the block with the prompt weighted 1 + PEAK_WEIGHT;
    # all places alike
    places = predictor.PLACE_WEIGHT * np.log(BLOCK**2)
    loss = predictor.block_loss((confidence, place), target, valid).item()
    assert loss == pytest.approx(np.log(2) * (2 + predictor.PEAK_WEIGHT) / 2 + places, rel=1e-5)
    valid[..., BLOCK:] = 0
    loss = predictor.block_loss((confidence, place), target, valid).item()
    assert loss == pytest.approx(np.log(2) * (1 + predictor.PEAK_WEIGHT) + places, rel=1e-5)
    sure = torch.tensor([[[20.0, -20.0]]])
    place[0, 2 * BLOCK + 3, 0, 0] = 30.0
    assert predictor.pcm_loss((sure, place), target, valid).item() == pytest.approx(0, abs=1e-6)


def test_padding_changes_no_number():
    """What is computed of a part of the model frame is what the whole gives there."""
    torch.manual_seed(0)
    network = PromptPredictor(32, 16, 16).eval()
    image, embedding = torch.randn(1, 3, 256, 256), torch.randn(1, 32, 16, 16)
    valid = torch.zeros(64, 64, dtype=torch.bool)
    valid[:43, :50] = True
    image[..., 4 * 43 :, :] = image[..., 4 * 50 :] = 0
    with torch.inference_mode():
        whole = network(image, embedding, valid[None])[0, 0] * valid
    part = network.pcm(image, embedding, valid)
    assert part.max() > 0 and torch.allclose(part, whole, atol=1e-6)
    assert not part[43:].any() and not part[:, 50:].any()


def squares(folder, n):
    """Images of two bright squares, with the clicks that give each, as `find-masks` writes."""
    images, annotations = {}, {}
    for i in range(n):
        rng = np.random.default_rng(i)
        image = rng.integers(0, 40, (96, 128, 3), dtype=np.uint8)
        name = f"{i:02d}.png"
        images[name], annotations[name] = image, []
        for x, y in rng.integers(4, 70, (2, 2)).tolist():
            image[y : y + 20, x : x + 20] = rng.integers(120, 255, 3)
            click = [x + 10.0, y + 10.0]
            about = {"clicks": [click], "point_coords": [click]}
            annotations[name].append({"segmentation": corners(x, y, 20), **about})
    return write_coco(folder, images, annotations)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return squares(tmp_path_factory.mktemp("photos"), 30)


def test_an_example_lies_in_the_model_frame(small_sam, photos, tmp_path):
    data = open_dataset(photos, 2)
    examples.cache_embeddings(small_sam, data, tmp_path)
    both = Examples(data, [0, 1], tmp_path, small_sam, own_prompts)
    image, embedding, target, valid = both.batch([0])
    assert image.shape == (1, 3, 32, 32) and embedding.shape == (1, 32, 8, 8)
    assert target.shape == (1, 32, 32) and valid[0, :24].all() and not valid[0, 24:].any()
    x, y = (data[0].points[0] / 4).astype(int)
    masks = both.masks(0)
    assert target[0, y, x] == 1 and masks[0, y, x] and not masks[:, 24:].any()


def test_held_out_photographs_stay_held_out(photos):
    few, all_of_them = open_dataset(photos, 20), open_dataset(photos)
    held = {few.ids[i] for i in split(few)[1]}
    more = {all_of_them.ids[i] for i in split(all_of_them)[1]}
    assert 0 < len(held) <= len(more) < 10 and held == more & set(few.ids)


def command(photos, folder, *more):
    out = str(folder / "predictor.safetensors")
    return [
        "train-predictor", "--data", str(photos), "--workdir", str(folder / "work"), "--out", out,
        "--width", "16", "--log-every", "20", "--candidates", "6", *more,
    ]  # fmt: skip


def test_the_training_learns_stops_and_goes_on(small_sam, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predictor, "load_sam", lambda *_: small_sam)
    assert cli.main(command(photos, tmp_path, "--limit", "1")) == 2
    assert "too few to train on some and hold some out" in capsys.readouterr().err
    assert cli.main(command(photos, tmp_path, "--epochs", "7")) == 0
    first = list(csv.DictReader((tmp_path / "work/curve.csv").open()))
    more = ("--epochs", "30", "--trials", str(tmp_path / "trials.csv"))
    assert cli.main(command(photos, tmp_path, *more)) == 0
    curve = list(csv.DictReader((tmp_path / "work/curve.csv").open()))
    assert curve[: len(first)] == first and int(curve[-1]["step"]) > int(first[-1]["step"])
    assert float(curve[-1]["loss"]) < 0.8 * float(curve[0]["loss"])
    (trial,) = csv.DictReader((tmp_path / "trials.csv").open())
    assert trial["objective"] == "blocks" and trial["step"] == curve[-1]["step"]
    made = load_predictor("mobile_sam", tmp_path / "predictor.safetensors", "cpu")
    assert made.width == 16 and len(made.sha256) == 64
    card = (tmp_path / "predictor.md").read_text()
    assert "preset bundled" in card and "held out" in card
    data = open_dataset(photos)
    held = Examples(data, split(data)[1], tmp_path / "work/embeddings", small_sam, own_prompts)
    assert predictor.recall(made, held)["candidates"] == pytest.approx(6, abs=2), "calibrated"


def test_masks_are_found_once_and_gathered(small_sam, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ModelFiles, "load", lambda _: LoadedModels(small_sam))
    few, out, kept = squares(tmp_path / "few", 2), tmp_path / "found", tmp_path / "embeddings"
    options = ["--out", str(out), "--side", "4", "--embeddings", str(kept)]
    assert cli.main(["find-masks", str(few), *options]) == 0
    written = (out / "records/00.json").stat().st_mtime_ns
    assert cli.main(["find-masks", str(few), *options]) == 0
    assert (out / "records/00.json").stat().st_mtime_ns == written
    annotations = json.loads((out / "annotations.json").read_text())["annotations"]
    assert sum(a["source"] == "people" for a in annotations) == 4
    found = [a for a in annotations if a["source"] == "sam"]
    assert found and all(a["point_coords"][0] in a["clicks"] for a in found)
    grid = {(x, y) for x in (16.0, 48.0, 80.0, 112.0) for y in (12.0, 36.0, 60.0, 84.0)}
    first = [a for a in found if a["image_id"] == 1]
    assert {tuple(click) for a in first for click in a["clicks"]} == grid, "every prompt gives one"
    scores = [a["predicted_iou"] for a in first]
    assert len(scores) < len(grid) and scores == sorted(scores, reverse=True)
    assert np.load(kept / "00.npy").shape == (32, 8, 8)
    data = open_dataset(out)
    assert len(data) == 2 and len(data[0].clicks) == len(data[0].rles)
    (few / "images/01.png").write_bytes(b"no image")
    (out / "records/01.json").unlink()
    assert cli.main(["find-masks", str(few / "images"), *options]) == 1
    assert "01.png" in capsys.readouterr().err
    assert cli.main(["find-masks", str(tmp_path / "none"), *options]) == 2


def test_trials_decode_as_many_prompts_as_they_may(
    small_sam, small_predictor, photos, tmp_path, monkeypatch
):
    sampling, method = AsfParams(0, 0, 20), METHODS["aop_no_af"]
    limits = [(method, sampling, limit) for limit in (None, 0.5, 3)]
    monkeypatch.setitem(trials.TRIALS, "prompts", limits)
    monkeypatch.setattr(trials, "load_sam", lambda *_, **__: small_sam)
    monkeypatch.setattr(trials, "load_predictor", lambda *_: small_predictor)
    out = tmp_path / "trials.csv"
    for _ in range(2):
        trials.main(["prompts", "--data", str(photos), "--photos", "1", "--out", str(out)])
    rows = list(csv.DictReader(out.open()))
    sampled, half, three = (float(row["decoded"]) for row in rows[:3])
    assert sampled == float(rows[0]["sampled"]) > 3 and three == 3 and half == round(sampled / 2)
    assert rows[3:] == rows[:3] and rows[0]["elimination"] == "" and rows[1]["limit"] == "0.5"
    assert all(0 <= float(row["coverage"]) <= 1 and row["miou"] == "" for row in rows)
    assert 0 <= float(rows[2]["hit"]) <= float(rows[0]["hit"]) <= 1
    with pytest.raises(ValueError, match="other columns"):
        append_rows(out, [{"imgsz": 1}])
