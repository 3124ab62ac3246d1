import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from aopsam_lab import __main__ as cli


@pytest.fixture
def untrained(weights):
    """Arguments that make a run quick and independent of the bundled weights."""
    own = ["--sam", "small", "--checkpoint", weights["checkpoint"]]
    return [*own, "--method", "amg_s", "--device", "cpu"]


def picture(path, side=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(side).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_command_segments_with_the_bundled_models(tmp_path):
    photo, out = picture(tmp_path / "photo.png", 64), tmp_path / "out"
    command = [sys.executable, "-m", "aopsam_lab", "segment", str(photo), "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "1 of 1 images segmented" in run.stdout and "segmenting" in run.stderr
    assert names(out) == ["photo.json", "photo_labels.png", "photo_overlay.png"]


def test_good_images_are_written_and_bad_ones_reported(tmp_path, capsys, untrained):
    good, bad, out = picture(tmp_path / "good.jpg"), tmp_path / "bad.png", tmp_path / "new/out"
    bad.write_text("no picture")
    images = [str(bad), str(tmp_path / "absent.png"), str(good)]
    assert cli.main(["segment", *images, "--out", str(out), *untrained]) == 1
    captured = capsys.readouterr()
    assert "1 of 3 images segmented" in captured.out
    assert "bad.png: " in captured.err and "absent.png" in captured.err
    assert names(out) == ["good.json", "good_labels.png", "good_overlay.png"]
    coco = json.loads((out / "good.json").read_text())
    assert coco["images"][0]["file_name"] == good.as_posix() and coco["annotations"]


def test_images_of_one_name_are_written_to_different_files(tmp_path, untrained):
    files = (("a/x.png", 30), ("b/x.png", 34), ("b/X.jpg", 38))
    pictures, out = [picture(tmp_path / name, side) for name, side in files], tmp_path / "out"
    assert cli.main(["segment", *map(str, pictures), "--out", str(out), *untrained]) == 0
    for stem, path in zip(("x", "x_2", "X_3"), pictures, strict=True):
        image = json.loads((out / f"{stem}.json").read_text())["images"][0]
        assert image["file_name"] == path.as_posix()
        assert Image.open(out / f"{stem}_labels.png").size == Image.open(path).size
    paths = map(cli.Path, ["a.png", "a_2.png", "d/a.png", "a.jpg"])
    assert cli.unique_stems([*paths]) == ["a", "a_2", "a_3", "a_4"]


def test_folders_and_patterns_stand_for_their_images(tmp_path, monkeypatch):
    for name in ("b.png", "a.JPG", "deep/c.tif", "[odd].png", "done_labels.png", "keep_labels.png"):
        picture(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("text")
    (tmp_path / "in" / "done.json").write_text("{}")
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path)

    def found(*arguments):
        paths, bad = cli.find_images(arguments)
        return [path.as_posix() for path in paths], [name for name, _ in bad]

    assert found("in") == (["in/[odd].png", "in/a.JPG", "in/b.png", "in/keep_labels.png"], [])
    assert found("in/**/*.tif", "in/b.png", "in/b*") == (["in/deep/c.tif", "in/b.png"], [])
    assert found("in/[odd].png", "in/[ab].png") == (["in/[odd].png", "in/b.png"], [])
    assert found("none", "in/*.bmp", "in/notes.txt") == (["in/notes.txt"], ["none", "in/*.bmp"])


def test_what_stops_everything_is_said_in_one_line(tmp_path, capsys, untrained):
    image = str(picture(tmp_path / "a.png"))
    out = ["--out", str(tmp_path / "out")]
    for arguments in (
        ["--sam", "vit_b", *out],
        ["--checkpoint", str(tmp_path / "absent"), *out],
        ["--confidence", "3", *out],
        ["--device", "nowhere", *out],
        [*untrained, "--out", image],
    ):
        assert cli.main(["segment", image, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("aopsam_lab: ") and error.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        cli.main(["segment", image, *out, "--method", "guess"])
    assert stop.value.code == 2 and "guess" in capsys.readouterr().err


def test_an_interrupted_run_leaves_whole_files_only(tmp_path, monkeypatch, capsys, untrained):
    pictures = [str(picture(tmp_path / f"{i}.png")) for i in range(2)]
    real = cli.segment

    def interrupted(path, *arguments, **more):
        if path.stem == "1":
            raise KeyboardInterrupt
        return real(path, *arguments, **more)

    monkeypatch.setattr(cli, "segment", interrupted)
    assert cli.main(["segment", *pictures, "--out", str(tmp_path / "out"), *untrained]) == 130
    assert names(tmp_path / "out") == ["0.json", "0_labels.png", "0_overlay.png"]
