"""Files written whole, and the code that scores depend on."""

import sys
import threading
from unittest import mock

import numpy as np
import pytest

from aopsam_lab import files
from aopsam_lab.asf import AsfParams
from aopsam_lab.data.sample import Sample
from aopsam_lab.masks.rle import encode_rle
from aopsam_lab.study import score
from aopsam_lab.study.settings import SCORING_MODULES, LoadedModels, Setting


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = files.write_atomically(tmp_path / "a.txt", "old")
    monkeypatch.setattr(files.os, "replace", mock.Mock(side_effect=OSError(28, "no space")))
    with pytest.raises(OSError, match="no space: .*a.txt"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_code_fingerprints_ignore_comments_and_docstrings(tmp_path, monkeypatch):
    known = {"a": tmp_path / "a.py", "b": tmp_path / "b.py", "c": tmp_path / "c.py"}
    monkeypatch.setattr(files, "modules", lambda: known)

    def of(source: str, behind: str = "y = 1", unrelated: str = "z = 1") -> str:
        for path, text in zip(known.values(), (source, behind, unrelated), strict=True):
            path.write_text(text)
        return files.code_fingerprint(["a"])

    plain = of("import b\n\ndef f(x):\n    return x + 1\n")
    documented = "'About.'\nimport b\n\n\ndef f(x):\n    'Adds one.'\n    return x + 1  # one\n"
    assert of(documented) == plain == of(documented, unrelated="z = 2")
    assert of(documented.replace("1  #", "2  #")) != plain != of(documented, behind="y = 2")


def test_what_runs_while_scoring_is_in_the_fingerprint(small_sam, small_predictor):
    """Scores made with other code are scored anew only if that code is known to matter."""
    known = {str(path): name for name, path in files.modules().items()}
    ran = set()

    def note(frame, event, argument):
        if event == "call":
            ran.add(frame.f_code.co_filename)

    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    sample = Sample("a", image, encode_rle(np.ones((1, 60, 80), bool)))
    models = LoadedModels(small_sam, small_predictor)
    setting = Setting("aop", "aop", AsfParams(confidence=0.0, spacing=60.0))
    sys.setprofile(note)
    threading.setprofile(note)
    try:
        alone = score.score(models, sample, setting)
        together = list(score.score_together(models, sample, [setting], [(0.1, 0.1)], sample.rles))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    names = {known[path] for path in ran if path in known}
    assert {"aopsam_lab.asf", "aopsam_lab.masks.fullsize", "aopsam_lab.evaluator"} <= names
    behind = files.modules_behind(SCORING_MODULES)
    assert names <= behind and alone["n_masks"] == together[0][1]["n_masks"] > 0
    above = {"widgets", "training", "__main__", "show", "drawing"}
    assert not [name for name in behind if above & set(name.split("."))]
