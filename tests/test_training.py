import csv
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

from aopsam_lab.asf import sample_prompts
from aopsam_lab.data.sample import Sample
from aopsam_lab.predictor import SIGMA, PromptPredictor, draw_pcm
from aopsam_lab.sam.tiny import build_tiny_sam
from aopsam_lab.training import export_tiny, iou_head
from aopsam_lab.training import predictor as predictor_training
from aopsam_lab.training import prompted, teacher
from aopsam_lab.training import tiny_sam as training
from aopsam_lab.training.distortions import deform, distort
from aopsam_lab.training.elimination import try_settings
from aopsam_lab.training.examples import PoolExamples, whole_picture
from aopsam_lab.training.muon import orthogonalise
from aopsam_lab.training.pool import fill_pool, fill_scenes, half_size, parse_pools, read_entry


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools") / "scenes"
    fill_scenes(folder, 4)
    return folder


def test_pool_entries_hold_the_picture_and_its_masks(tmp_path):
    image = np.arange(96 * 192 * 3, dtype=np.uint32).reshape(96, 192, 3).astype(np.uint8)
    masks = np.zeros((2, 96, 192), bool)
    masks[0, 16:48, 32:64] = True
    masks[1, 0, 0] = True  # four pixels in the pool: nothing to learn from
    fill_pool(tmp_path, ["a"], lambda name: Sample(name, image, masks))
    read, found = read_entry(tmp_path / "a.npz")
    assert read.shape == (192, 384, 3) and found.shape == (1, 192, 384)
    assert np.array_equal(found[0], masks[0].repeat(2, 0).repeat(2, 1))
    assert np.array_equal(half_size(found)[0], masks[0])
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"], "no half-written file stays"


def test_half_a_cell_is_enough_at_half_the_size():
    masks = np.zeros((1, 2, 6), bool)
    masks[0, 0, 0] = masks[0, :, 2] = masks[0, :, 4:] = True  # one, two and four of the cells' pixels
    assert half_size(masks).tolist() == [[[False, True, True]]]


def test_pool_entries_of_another_layout_say_what_to_do(tmp_path):
    np.savez(tmp_path / "a.npz", image=np.zeros((8, 16, 3), np.uint8), masks=np.zeros((1, 4, 1), np.uint8), width=8)
    with pytest.raises(ValueError, match="make the pool again"):
        read_entry(tmp_path / "a.npz")


def test_training_scenes_are_never_those_of_evaluation(tmp_path):
    with pytest.raises(ValueError, match="9999 is for evaluation"):
        fill_scenes(tmp_path, 1, first=9999)
    fill_scenes(tmp_path, 1, first=10007)
    assert [path.name for path in tmp_path.iterdir()] == ["scene-10007.npz"]


def test_pools_are_resumed_and_their_specs_checked(pool):
    before = {p: p.stat().st_mtime_ns for p in pool.iterdir()}
    fill_scenes(pool, 4)
    assert {p: p.stat().st_mtime_ns for p in pool.iterdir()} == before
    assert [(share, len(paths)) for share, paths in parse_pools([f"{pool}:0.4"])] == [(0.4, 4)]
    with pytest.raises(ValueError, match="FOLDER:SHARE"):
        parse_pools([str(pool)])
    with pytest.raises(FileNotFoundError, match="training.pool"):
        parse_pools([f"{pool.parent / 'none'}:1"])


def test_several_processes_render_the_same_scenes(pool, tmp_path):
    fill_scenes(tmp_path, 4, batch=2, processes=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [path.name for path in sorted(pool.iterdir())]
    for ours, theirs in zip(sorted(tmp_path.iterdir()), sorted(pool.iterdir())):
        (image, masks), (image_2, masks_2) = read_entry(ours), read_entry(theirs)
        assert np.abs(image.astype(int) - image_2).max() <= 1 and np.array_equal(masks, masks_2)


def test_prompts_lie_where_they_should(pool):
    data = prompted.PromptedPictures(parse_pools([f"{pool}:1"]), prompts=7, seed=0)
    for _, sample in zip(range(12), data):
        h, w = sample["size"]
        assert max(h, w) == prompted.IMG_SIZE and sample["masks"].shape == (7, prompted.IMG_SIZE, prompted.IMG_SIZE)
        assert not sample["image"][:, h:].any() and not sample["image"][:, :, w:].any()
        for mask, (x, y), box in zip(sample["masks"], sample["points"], sample["boxes"]):
            assert mask[int(y), int(x)], "a click lies on its mask"
            assert half_size(mask[None]).any()
            ys, xs = np.nonzero(mask)
            near = 20 + 1e-3
            assert abs(box[0] - xs.min()) <= near and abs(box[3] - (ys.max() + 1)) <= near


def test_pasted_pieces_cover_what_lies_under_them():
    image, other = np.full((40, 60, 3), 10, np.uint8), np.full((60, 40, 3), 200, np.uint8)
    masks, pieces = np.zeros((1, 40, 60), bool), np.zeros((3, 60, 40), bool)
    masks[0, 4:36, 4:56] = True
    pieces[0, 8:20, 8:20] = True
    pieces[1, 50, 6] = True  # below the picture
    pieces[2] = True  # all of it: no piece
    made, found = prompted.paste(np.random.default_rng(0), image, masks, other, pieces)
    assert len(found) == 2 and np.array_equal(found[1][:, :40], pieces[0][:40]) and not found[1][:, 40:].any()
    assert np.array_equal(found[0], masks[0] & ~found[1])
    assert (made[11:17, 11:17] == 200).all() and (made[:6] == 10).all() and (made[22:] == 10).all()
    assert (image == 10).all() and masks.sum() == 32 * 52, "what it was given stays"
    assert np.array_equal(prompted.paste(np.random.default_rng(0), image, masks, other, pieces[:0])[1], masks)


def test_a_distorted_picture_keeps_its_masks_on_what_they_show():
    image, masks = np.full((160, 200, 3), 20, np.uint8), np.zeros((2, 160, 200), bool)
    masks[0, 70:90, 85:115] = True
    masks[1, 0, 0] = True  # a corner, one pixel: most turns lose it
    image[masks[0]] = 220
    rng, lost = np.random.default_rng(0), 0
    for _ in range(20):
        made, found = distort(rng, image, masks)
        assert made.shape == image.shape and made.dtype == np.uint8 and found.shape[1:] == (160, 200)
        bright = made.min(2) > (int(made.max()) + int(made.min())) // 2
        assert (bright & found[0]).sum() >= 0.8 * (bright | found[0]).sum(), "blurred or enlarged, but its mask lies on it"
        assert found.any((1, 2)).all()
        lost += len(found) == 1
    assert lost
    assert (image[masks[0]] == 220).all() and masks.sum() == 601, "what it was given stays"
    assert distort(rng, image, masks[:0])[1].shape == (0, 160, 200)


def test_a_deformed_picture_keeps_its_masks_on_what_they_show():
    image, masks = np.full((160, 200, 3), 60, np.uint8), np.zeros((2, 160, 200), bool)
    masks[0, 65:95, 80:120] = True
    masks[1, 0, 0] = True
    image[masks[0]] = 200
    rng, lost, dark, areas = np.random.default_rng(0), 0, 0, set()
    for _ in range(20):
        made, found = deform(rng, image, masks)
        assert made.shape == image.shape and made.dtype == np.uint8 and found.shape[1:] == (160, 200)
        assert abs(np.corrcoef(made[..., 0].ravel(), found[0].ravel())[0, 1]) > 0.7, "negative or coarse, but its mask lies on it"
        assert found.any((1, 2)).all()
        lost += len(found) == 1
        dark += made[found[0]].mean() < made[~found[0]].mean()
        areas.add(int(found[0].sum()))
    assert lost and 0 < dark < 20 and len(areas) > 10
    assert (image[masks[0]] == 200).all() and masks.sum() == 1201, "what it was given stays"
    assert deform(rng, image, masks[:0])[1].shape == (0, 160, 200)


def test_only_photographs_are_distorted(pool, tmp_path):
    shutil.copytree(pool, tmp_path / "photos")
    distorted = []

    def noted(rng, image, masks):
        distorted.append(1)
        return distort(rng, image, masks)

    for folder, share in ((pool, 1.0), (tmp_path / "photos", 0.0), (tmp_path / "photos", 1.0)):
        assert not distorted
        drawn = iter(prompted.PromptedPictures(parse_pools([f"{folder}:1"]), 2, seed=0, distorted=share, distortion=noted))
        for _ in range(4):
            next(drawn)
    assert len(distorted) >= 4


def test_pools_may_grow_while_they_are_drawn_from(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(prompted, "LOOK_AGAIN", 2)
    first, second = sorted(pool.iterdir())[:2]
    shutil.copy(first, tmp_path)
    read, real = [], prompted.read_entry
    monkeypatch.setattr(prompted, "read_entry", lambda path: read.append(path.name) or real(path))
    drawn = iter(prompted.PromptedPictures(parse_pools([f"{tmp_path}:1"]), prompts=1, seed=0))
    next(drawn)
    shutil.copy(second, tmp_path)
    for _ in range(30):
        next(drawn)
    assert set(read) == {first.name, second.name}


def test_what_is_held_out_is_never_trained_on(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(prompted, "HELD_OUT", 3)
    monkeypatch.setattr(training, "HELD_OUT_PICTURES", 3)
    monkeypatch.setattr(prompted, "LOOK_AGAIN", 2)
    held = {path.name for path in pool.iterdir() if prompted.is_held_out(path)}
    assert 0 < len(held) < 4, "the names of these four scenes fall on either side"
    reads, real = [], prompted.read_entry
    monkeypatch.setattr(prompted, "read_entry", lambda path: reads.append(path.name) or real(path))
    drawn = iter(prompted.PromptedPictures(parse_pools([f"{pool}:1"]), 2, seed=0, keep=prompted.is_for_training))
    for _ in range(12):
        next(drawn)
    assert reads and not held & set(reads)
    command = ["--pools", f"{pool}:1", "--workdir", str(tmp_path), "--batch", "2", "--prompts", "4", "--workers", "0", "--device", "cpu"]
    training.main([*command, "--steps", "2", "--hold-out"])
    with open(tmp_path / "held_out.csv") as file:
        rows = list(csv.DictReader(file))
    training.main([*command, "--steps", "2", "--hold-out"])
    with open(tmp_path / "held_out.csv") as file:
        assert list(csv.DictReader(file)) == rows, "a finished training adds nothing"
    assert rows[-1]["step"] == "2" and {row["pool"] for row in rows} == {pool.name} and 0 <= float(rows[-1]["box"]) <= 1
    assert json.loads((tmp_path / "about.json").read_text())["Data"].startswith(f"{4 - len(held)} of ")
    monkeypatch.setattr(prompted, "HELD_OUT", 10**9)
    with pytest.raises(ValueError, match="too few pictures"):
        training.main([*command, "--steps", "3", "--hold-out"])


def test_held_out_crops_are_the_same_every_time_and_weigh_alike(pool, monkeypatch):
    monkeypatch.setattr(prompted, "HELD_OUT", 3)
    monkeypatch.setattr(training, "HELD_OUT_PICTURES", 3)
    batches = training.held_out_batches(parse_pools([f"{pool}:1"]), 2, batch=2)[pool.name]
    again = training.held_out_batches(parse_pools([f"{pool}:1"]), 2, batch=3)[pool.name]
    assert [len(batch["image"]) for batch in batches] == [2, 1] and torch.equal(torch.cat([b["masks"] for b in batches]), again[0]["masks"])

    def forward(image, masks, **_):  # a mean over pictures, as the step gives
        return dict.fromkeys(training.COLUMNS, masks.float().mean())

    one, all_at_once = (training.held_out_quality(forward, {"": b}, torch.device("cpu"))[""] for b in (batches, again))
    assert one == pytest.approx(all_at_once)


def test_prompt_tokens_equal_the_prompt_encoder():
    torch.manual_seed(0)
    encoder = build_tiny_sam().prompt_encoder
    points, boxes = torch.rand(2, 5, 2) * prompted.IMG_SIZE, torch.rand(2, 3, 4) * prompted.IMG_SIZE
    with torch.no_grad():
        ours = training.prompt_tokens(encoder, points, boxes)
        for i in range(2):
            clicks, _ = encoder(points=(points[i][:, None], torch.ones(5, 1)), boxes=None, masks=None)
            corners, _ = encoder(points=None, boxes=boxes[i], masks=None)
            assert torch.equal(ours[i], torch.cat([clicks, corners]))


        several, labels = torch.rand(2, 4, 3, 2) * prompted.IMG_SIZE, torch.randint(0, 2, (2, 4, 3))
        ours = training.click_tokens(encoder, several, labels)
        for i in range(2):
            assert torch.equal(ours[i], encoder(points=(several[i], labels[i]), boxes=None, masks=None)[0])


def test_weights_of_another_size_begin_with_their_positions_stretched(tmp_path):
    sam = build_tiny_sam()
    weights = {key: value.half().contiguous() if value.is_floating_point() else value for key, value in sam.state_dict().items()}
    save_file(weights, tmp_path / "same.safetensors", metadata={"steps": "7"})
    same, steps = training.read_start(str(tmp_path / "same.safetensors"), sam)
    assert steps == 7 and all(torch.equal(same[key], value.float()) for key, value in weights.items())
    key, side = "image_encoder.pos_embed", prompted.IMG_SIZE // 16
    small = torch.zeros(1, 8, 8, weights[key].shape[2])
    small[..., 0], small[..., 1] = torch.arange(8)[:, None], torch.arange(8)  # a cell's row and column
    save_file({**weights, key: small.flatten(1, 2)}, tmp_path / "small.safetensors")
    start, steps = training.read_start(str(tmp_path / "small.safetensors"), sam)
    found = start[key].unflatten(1, (side, side))[0]
    sam.load_state_dict(start)
    at = (torch.arange(side) + 0.5) * 8 / side - 0.5  # the same place, in cells of the small grid
    inside = (at > 1) & (at < 6)
    assert steps == 0 and torch.allclose(found[inside][:, :, 0], at[inside][:, None].expand(-1, side), atol=0.05)
    assert torch.allclose(found[:, inside, 1], at[inside].expand(side, -1), atol=0.05) and not found[..., 2:].any()


def test_mask_loss_and_iou_by_hand():
    target = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    logits = torch.tensor([[50.0, -50.0], [50.0, -50.0]])
    assert training.mask_iou(logits, target).item() == pytest.approx(1 / 3)
    # BCE is 50 on two of four cells; Dice: overlap 1, sums 2 and 2, each smoothed by 1
    assert training.mask_loss(logits, target).item() == pytest.approx(3 * 25 + 2 * (1 - 3 / 5), rel=1e-4)
    assert training.mask_loss(50 * (2 * target - 1), target).item() == pytest.approx(0, abs=1e-4)


def test_masks_are_enlarged_as_sam_does_it():
    side = (prompted.IMG_SIZE, prompted.IMG_SIZE)
    logits = torch.randn(2, 3, 2, side[0] // 2, side[1] // 2)
    theirs = build_tiny_sam().postprocess_masks(logits.flatten(0, 1), side, side)
    assert torch.allclose(training.enlarged(logits).flatten(0, 1), theirs, atol=1e-6)


def test_learning_rate_warms_up_and_comes_down():
    assert training.learning_rate(0.0, 0, 1.0, warmup=10) == pytest.approx(0.1)
    assert training.learning_rate(0.0, 20, 1.0, warmup=10) == pytest.approx(1.0)
    assert training.learning_rate(1.0, 99, 1.0, warmup=10) == pytest.approx(0.01)


def test_tiny_training_learns_something_and_resumes(pool, tmp_path):
    command = ["--pools", f"{pool}:1", "--workdir", str(tmp_path), "--batch", "1", "--prompts", "4", "--workers", "0"]
    command += ["--device", "cpu", "--log-every", "1"]
    training.main([*command, "--steps", "2"])
    first = torch.load(tmp_path / "last.pt", weights_only=True)
    training.main([*command, "--steps", "3"])
    second = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (first["step"], second["step"]) == (2, 3)
    with open(tmp_path / "curve.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"] and float(rows[-1]["loss"]) > 0
    moved = [k for k, v in second["sam"].items() if not torch.equal(v, first["sam"][k])]
    assert any(k.startswith("image_encoder") for k in moved) and any(k.startswith("mask_decoder") for k in moved)


def test_predictor_target_by_hand():
    masks = np.zeros((2, 20, 20), bool)
    masks[0, 2:11, 2:11] = True  # pole at (6, 6), the middle of an embedding's cell; its disc, of radius 3, leaves a frame
    masks[1, 15, 15] = True  # its cell's middle, (14, 14), is off the mask: the point stays where it is
    target = predictor_training.confidence_target(masks, None, (24, 20))
    assert target.shape == (24, 20) and target[6, 6] == 1 and target[15, 15] == 1
    assert {(y, x) for y, x in np.argwhere(target == 1)} == {(6, 6), (15, 15)}
    bumps = predictor_training.confidence_target(masks, None, (24, 20), most=1, bumps=True)
    assert bumps[6, 6] == 1 and bumps[6, 8] == pytest.approx(np.exp(-0.5 * (2 / SIGMA) ** 2), rel=1e-4)
    assert bumps[15, 16] == pytest.approx(np.exp(-0.5 / SIGMA**2), rel=1e-4) and bumps[23, 0] < 1e-3


def test_target_points_move_to_the_middle_of_their_cell_but_never_off_the_mask():
    mask = np.zeros((16, 16), bool)
    mask[1:4, 9:12] = True
    assert predictor_training.snapped(1, 9, mask) == (2, 10)
    mask[2, 10] = False
    assert predictor_training.snapped(1, 9, mask) == (1, 9)
    assert predictor_training.snapped(14, 14, np.ones((14, 15), bool)) == (14, 14)  # the middle is beyond the picture


def test_a_long_mask_gets_several_points_the_pole_first():
    mask = np.zeros((16, 60), bool)
    mask[4:13, 3:57] = True
    mask[2:15, 20:33] = True  # the widest place
    points = predictor_training.prompt_points(mask)
    row, column, inradius = points[0]
    assert 20 <= column < 33 and 3 <= len(points) <= predictor_training.POINTS
    assert all(mask[r, c] for r, c, _ in points)
    assert inradius == max(radius for _, _, radius in points)
    target = predictor_training.confidence_target(mask[None], None, (16, 60))
    at = predictor_training.snapped(*points[1][:2], mask)
    assert target[at] == pytest.approx(predictor_training.HEIGHT_DECAY)
    assert predictor_training.prompt_points(np.zeros((4, 4), bool)) == []


def test_a_small_mask_gets_one_point_a_larger_one_until_it_is_full():
    mask = np.zeros((16, 16), bool)
    mask[5:8, 5:8] = True
    assert [point[:2] for point in predictor_training.prompt_points(mask)] == [(6, 6)], "its disc covers it"
    mask[2:11, 2:11] = True
    points = predictor_training.prompt_points(mask, most=100)
    assert points[0][:2] == (6, 6) and len(points) > 3
    at = np.array([point[:2] for point in points])
    near = np.abs(at[:, None] - at[None]).sum(-1) + 99 * np.eye(len(at), dtype=int)
    assert near.min() > 2, "none in another's disc"
    cells = np.argwhere(mask)
    assert np.linalg.norm(cells[:, None] - at[None], axis=-1).min(1).max() < 3.7, "and no cell far from all"


def test_a_run_from_earlier_weights_draws_new_crops(pool, tmp_path, monkeypatch):
    seeds, real = [], training.PromptedPictures
    monkeypatch.setattr(training, "PromptedPictures", lambda *args, seed, **more: seeds.append(seed) or real(*args, seed=seed, **more))
    save_file({k: v.contiguous() for k, v in build_tiny_sam().state_dict().items()}, tmp_path / "w.safetensors", {"steps": "7"})
    command = ["--pools", f"{pool}:1", "--workdir", str(tmp_path / "run"), "--batch", "1", "--prompts", "4", "--workers", "0"]
    training.main([*command, "--device", "cpu", "--steps", "1", "--init", str(tmp_path / "w.safetensors")])
    assert seeds == [7]
    about = json.loads((tmp_path / "run" / "about.json").read_text())
    assert "not trained in this run" in about["Backbone"] and about["Data"].startswith("4 of ")
    grown = tmp_path / "grown"
    shutil.copytree(pool, grown)
    (grown / "scene-1.npz").write_bytes(next(pool.iterdir()).read_bytes())
    command[1] = f"{grown}:1"  # a pool that holds one more by the end of the run
    training.main([*command, "--device", "cpu", "--steps", "1", "--init", str(tmp_path / "w.safetensors")])
    assert json.loads((tmp_path / "run" / "about.json").read_text())["Data"].startswith("5 of ")


def test_predictor_trains_from_its_cache_and_loads(pool, tmp_path, monkeypatch):
    from aopsam_lab.predictor import load_predictor

    command = ["--pools", f"{pool}:1", "--workdir", str(tmp_path), "--crops", "4", "--batch", "2"]
    command += ["--minutes", "0.02", "--device", "cpu", "--held-out", "1"]
    predictor_training.main(command)
    with open(tmp_path / "curve.csv") as file:
        assert len(list(csv.DictReader(file))) == 1, "the end of a run is in its curve, however short it was"
    caches = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("shard-*")}
    assert len(caches) == 1
    predictor_training.main(command)
    assert {p: p.stat().st_mtime_ns for p in caches} == caches, "embeddings are computed once"
    monkeypatch.setattr(predictor_training, "HEIGHT_DECAY", 0.9)
    predictor_training.main(command)
    assert {p: p.stat().st_mtime_ns for p in caches} != caches, "but not kept where the targets would be others"
    predictor = load_predictor(path=tmp_path / "predictor.safetensors", device="cpu")
    pcm = predictor(torch.zeros(1, 3, 320, 320), torch.zeros(1, 128, 40, 40))
    assert pcm.shape == (1, 1, 160, 160) and 0 <= pcm.min() and pcm.max() <= 1
    with open(tmp_path / "curve.csv") as file:
        assert {"loss", "recall_64", "candidates"} <= set(next(csv.DictReader(file)))


def test_held_out_pictures_come_from_each_pool_by_its_share(pool, tmp_path):
    for i in range(60):
        shutil.copy(sorted(pool.iterdir())[i % 4], tmp_path / f"{i:02}.npz")
    pools = parse_pools([f"{tmp_path}:0.75", f"{pool}:0.25"])
    crops = PoolExamples(pools, build_tiny_sam(), 4, 4, seed=0)
    assert [path.parent for path in crops._held] == [tmp_path] * 3 + [pool]
    assert not set(crops._held) & {path for _, paths in crops._pools for path in paths}
    assert not PoolExamples(pools, build_tiny_sam(), 4, 0, seed=0).held_out()


def test_the_two_presets_lose_differently():
    """Two cells of the embedding, the right one beyond the picture; a point at the left one's place 5."""
    target, valid = torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)
    target[0, 1, 1], valid[0, :, :4] = 1.0, 1.0
    sure = torch.zeros(1, 16, 1, 2)
    sure[0, 5] = 100.0
    worth = torch.zeros(1, 1, 2)
    bundled = predictor_training.loss_of("bundled", (worth, sure), target, valid, 8)
    assert bundled.item() == pytest.approx(9 * np.log(2))
    unsure = predictor_training.loss_of("bundled", (worth, 0 * sure), target, valid, 8) - bundled
    assert unsure.item() == pytest.approx(predictor_training.PLACE_WEIGHT * np.log(16))
    # one half everywhere, drawn as a bump at (1, 1), against a target of one cell
    bump = [0.5 * np.exp(-0.5 * ((y - 1) ** 2 + (x - 1) ** 2)) - (y == x == 1) for y in range(4) for x in range(4)]
    paper = predictor_training.loss_of("paper", (worth - torch.tensor([0.0, 100.0]), sure), target, valid, 8)
    assert paper.item() == pytest.approx(np.mean(np.square(bump)), rel=1e-4)


def test_a_pcm_shows_one_bump_a_cell_where_its_place_is():
    worth, place = torch.full((1, 2, 3), -100.0), torch.zeros(1, 16, 2, 3)
    worth[0, 1, 2], place[0, 7, 1, 2] = 0.0, 100.0  # place 7: row 1, column 3 of the cell
    pcm = draw_pcm(worth, place)[0, 0]
    assert pcm.shape == (8, 12) and pcm[5, 11] == pytest.approx(0.5) and pcm.argmax() == 5 * 12 + 11
    assert pcm[4, 11] == pytest.approx(0.5 * np.exp(-0.5 / SIGMA**2)) and pcm[0, 0] < 1e-6
    place[0, 7, 1, 2] = 0.1  # hardly likelier than the others: as high a bump, lower and broader only where a loss is to learn
    assert torch.equal(draw_pcm(worth, place)[0, 0], pcm)
    assert 0.1 < draw_pcm(worth, place, soft=True).max() < 0.3
    worth[:], place[0, 7] = 100.0, 100.0  # neighbours stay apart, and can be told apart when smoothed
    cells, confidence = sample_prompts(draw_pcm(worth, place)[0, 0], smoothing=256 / 12 * SIGMA, spacing=256 / 12 * 3)
    assert pcm.max() <= 1 and len(cells) == 6 and confidence.min() > 0.2


def test_orthogonalised_matrices_keep_their_directions():
    torch.manual_seed(0)
    for shape in ((16, 40), (40, 16)):
        matrix = torch.randn(shape)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ orthogonalise(matrix) @ v.T
        assert 0.5 < inner.diagonal().min() and inner.diagonal().max() < 1.3
        assert (inner - inner.diagonal().diag()).abs().max() < 1e-3


def test_the_iou_heads_examples_are_what_sam_predicts_and_what_its_masks_are(pool):
    torch.manual_seed(0)
    sam = build_tiny_sam().eval().requires_grad_(False)
    one = next(iter(prompted.PromptedPictures(parse_pools([f"{pool}:1"]), 5, seed=3)))
    tokens, ious = iou_head.tokens_and_ious(sam, default_collate([one]))
    assert tokens.shape == (5, sam.mask_decoder.transformer_dim) and ious.shape == (5, 4)
    assert ious.isnan().tolist() == [[True, False, False, False]] * 3 + [[False, True, True, True]] * 2, "three clicks, two boxes"
    high, wide = one["size"]
    image = sam.preprocess(torch.from_numpy(one["image"][:, :high, :wide])[None])
    for i, asked in ((0, True), (2, True), (4, False)):
        click = (torch.from_numpy(one["points"][i]).view(1, 1, 2), torch.ones(1, 1))
        prompt = dict(points=click, boxes=None) if asked else dict(points=None, boxes=torch.from_numpy(one["boxes"][i])[None])
        sparse, dense = sam.prompt_encoder(**prompt, masks=None)
        low, predicted = sam.mask_decoder(sam.image_encoder(image), sam.prompt_encoder.get_dense_pe(), sparse, dense, asked)
        columns = slice(1, None) if asked else slice(0, 1)
        assert torch.allclose(sam.mask_decoder.iou_prediction_head(tokens[i])[columns], predicted[0], atol=1e-4)
        found = (sam.postprocess_masks(low, (high, wide), (high, wide)) > 0)[0].numpy()
        truth = one["masks"][i, :high, :wide]
        true = (found & truth).sum((1, 2)) / (found | truth).sum((1, 2))
        assert np.allclose(ious[i, columns], true, atol=0.01), "padding, where masks may lie too, counts little"


def test_an_iou_head_learns_what_is_measured_and_keeps_the_rest():
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).requires_grad_(False)
    tokens = torch.randn(4000, 8)
    before = head(tokens)
    ious = torch.full((4000, 4), float("nan"))
    ious[:, 1:] = before[:, 1:] + 0.5
    after = iou_head.fit(head, tokens, ious, steps=400)(tokens)
    assert (after - before)[:, 1:].mean() > 0.1 and (after - before)[:, 0].mean().abs() < 0.02
    assert torch.equal(head(tokens), before), "the head it was given stays"
    assert iou_head.error(head, tokens, ious) == pytest.approx(0.5, abs=1e-4)


def test_the_iou_head_goes_on_where_it_was_stopped_and_is_exported(pool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(iou_head, "SHARD", 2)
    fit = iou_head.fit
    monkeypatch.setattr(iou_head, "fit", lambda *given: fit(*given, steps=3))
    torch.manual_seed(0)
    ema = {f"module.{key}": value for key, value in build_tiny_sam().state_dict().items()}
    torch.save(dict(ema=ema, step=5, seconds=60.0), tmp_path / "last.pt")
    (tmp_path / "about.json").write_text("{}")
    (tmp_path / "curve.csv").write_text("step,loss\n5,1.0\n")
    command = ["--workdir", str(tmp_path), "--pools", f"{pool}:1", "--crops", "3"]
    iou_head.main(command)
    shards = sorted((tmp_path / "iou_head").glob("*/*.pt"))
    first = torch.load(tmp_path / "iou_head.pt", weights_only=True)
    assert [len(torch.load(path, weights_only=True)["tokens"]) for path in shards] == [24, 12]
    kept = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    iou_head.main(command)
    again = torch.load(tmp_path / "iou_head.pt", weights_only=True)
    assert shards[0].stat().st_mtime_ns == kept and shards[1].exists()
    assert all(torch.equal(first["head"][key], again["head"][key]) for key in first["head"])
    export = ["--workdir", str(tmp_path), "--pools", f"{pool}:1", "--pictures", "1", "--out", str(tmp_path / "tiny.safetensors")]
    export_tiny.main(export)
    weights = load_file(tmp_path / "tiny.safetensors")
    name = "mask_decoder.iou_prediction_head."
    assert all(torch.equal(weights[name + key], value.half()) for key, value in first["head"].items())
    assert any(not torch.equal(weights[name + key], ema[f"module.{name}{key}"].half()) for key in first["head"])
    assert "- **IoU head**: fitted anew on 36 prompts of 3 crops" in (tmp_path / "tiny.md").read_text()
    torch.save(dict(ema=ema, step=6, seconds=60.0), tmp_path / "last.pt")
    with pytest.raises(SystemExit):
        export_tiny.main(export)
    assert "fitted after 5 steps, there are 6 now" in capsys.readouterr().err


def test_thresholds_keep_the_fewest_masks_within_a_standard_error():
    kept = np.array([[100.0, 50.0, 10.0]])
    miou = np.array([[[0.50, 0.49, 0.30]], [[0.60, 0.61, 0.40]], [[0.55, 0.53, 0.35]]])
    assert export_tiny.choose_pair(miou, kept) == (0, 1)  # loses 0.0067 +- 0.0088; the third loses 0.2
    assert export_tiny.choose_pair(miou[:1], kept) == (0, 0)


def test_calibration_gives_the_candidates_asked_for(pool):
    sam, paths = build_tiny_sam().eval(), parse_pools([f"{pool}:1"])[0][1][:2]
    draw = predictor_training.target_of("bundled", (prompted.IMG_SIZE // 2, prompted.IMG_SIZE // 2))
    held = predictor_training.hold_out(sam, [whole_picture(*read_entry(path)) for path in paths], draw)
    torch.manual_seed(1)
    predictor = PromptPredictor().eval()
    before = [part.clone() for part in predictor.cells(*held[0].inputs(sam))]
    shift, given = predictor_training.calibrate(sam, predictor, held, wanted=20)
    worth, place = predictor.cells(*held[0].inputs(sam))
    assert torch.allclose(worth, predictor_training.SLOPE * before[0] + shift, atol=1e-4), "the cells' order stays"
    assert torch.equal(place, before[1])
    found = predictor_training.recall(sam, predictor, held)["candidates"]
    assert abs(found - 20) <= 5 and given == pytest.approx(found, abs=2)


def test_what_elimination_loses_is_tried_on_a_training_picture(pool):
    entry = parse_pools([f"{pool}:1"])[0][1][0]
    rows = try_settings(entry, quantiles=(0.1, 0.95), ious=(0.0, 1.1), firsts=(0.2, 0.5, 1.0), confidences=(0.5,))
    plain, fewer, *tried = rows
    assert plain["first"] == fewer["first"] == 1 and plain["removed"] == 0 and 0 < plain["miou"] <= 1
    assert 0 < fewer["removed"] <= 1, "a higher confidence removes candidates"
    removed = {(row["first"], row["iou"], row["floor"]): row["removed"] for row in tried}
    assert len(removed) == 12 and all(row["decoded"] <= plain["decoded"] for row in rows)
    assert removed[0.2, 0.0, 0.1] > removed[0.2, 0.0, 0.95], "a low floor removes more"
    assert removed[0.2, 0.0, 0.1] > removed[0.5, 0.0, 0.1], "what is decoded at first cannot be eliminated"
    assert removed[1.0, 0.0, 0.1] == 0
    assert removed[0.2, 1.1, 0.1] == 0, "no mask is that sure, so none explains"


def test_the_chain_names_its_steps_and_goes_without_photographs(tmp_path):
    from aopsam_lab.training.chain import QUICK, commands, shares

    assert shares(tmp_path, []) == [f"{tmp_path / 'scenes'}:1"]
    assert [spec.rsplit(":")[-1] for spec in shares(tmp_path, ["bsds", "coco", "mine"])] == ["0.1", "0.33", "0.27", "0.3"]
    steps = commands(tmp_path, [], QUICK, tmp_path / "weights", [])
    assert [step[0].rsplit(".")[-1] for step in steps] == ["pool", "tiny_sam", "iou_head", "export_tiny", "predictor", "detector", "study"]
    assert "--photos" not in steps[0]


def test_a_teacher_adds_what_nobody_labelled(pool, tmp_path, monkeypatch, capsys):
    """Tiny teaches itself here: of a scene of which one object is labelled it finds others, and not that one again."""
    image, masks = read_entry(sorted(pool.iterdir())[0])
    largest = masks[[masks.sum((1, 2)).argmax()]]
    fill_pool(tmp_path / "photos", ["a", "b"], lambda name: Sample(name, image, largest if name == "a" else masks[:0]))
    command = ["--pool", str(tmp_path / "photos"), "--out", str(tmp_path / "found"), "--sam", "tiny", "--device", "cpu"]
    assert teacher.main(command) == 0
    (seen, of_a), (_, of_b) = (read_entry(tmp_path / "found" / f"{name}.npz") for name in "ab")
    assert np.array_equal(seen, image) and np.array_equal(of_a[0], largest[0])

    def ious(masks):
        flat = masks.reshape(len(masks), -1).astype(float)
        both = flat @ flat.T
        return both / (flat.sum(1)[:, None] + flat.sum(1) - both)

    assert len(of_b) >= len(of_a) > 5 and ious(of_a)[0, 1:].max() < 0.5
    others = ious(np.concatenate([masks, of_b]))[: len(masks), len(masks) :]
    assert (others.max(1) > 0.7).mean() > 0.5, "most of what was labelled is found where nothing is"
    monkeypatch.setattr(teacher, "found_objects", None)  # nothing is left to find
    assert teacher.main(command) == 0
    assert teacher.main(["--pool", str(tmp_path), "--out", str(tmp_path / "none")]) == 1
    assert "training.pool" in capsys.readouterr().err
    assert teacher.main([*command[:4], "--checkpoint", str(tmp_path / "none.pt")]) == 1
    assert "There is no checkpoint" in capsys.readouterr().err
