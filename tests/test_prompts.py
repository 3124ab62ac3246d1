"""Comparison at equal prompts: a table worked by hand, and one run on a small image."""

from dataclasses import replace

import pandas as pd
import pytest
from conftest import row

from aopsam_lab.study import prompts
from aopsam_lab.study.figures import png


def made(ours: float, theirs: float) -> pd.DataFrame:
    """Two images: the grids score `theirs` and a tenth more, AoP-SAM `ours` and a tenth more."""
    rows = []
    for setting in prompts.settings():
        score, decoded = ours if setting.method == "aop" else theirs, setting.max_prompts or 64
        for image, extra in (("a", 0.0), ("b", 0.1)):
            rows.append(row(image, setting.label, score + extra, n_decoded=decoded))
    return pd.DataFrame(rows)


def test_methods_at_equal_prompts_worked_by_hand():
    table = prompts.comparison(made(0.5, 0.3)).set_index(["sampling", "limit"])
    assert table["grid"].loc["aop"].tolist()[:2] == ["grid_8", "grid_10"]
    assert table["grid"].loc["aop"].tolist()[-2:] == ["amg_d"] * 2
    columns = ["miou", *(f"miou_{end}" for end in ("grid", "diff", "lo", "hi"))]
    found = table.loc[("aop, chosen", 100), columns].tolist()
    assert found == pytest.approx([0.55, 0.35, 0.2, 0.2, 0.2])
    assert png(prompts.figure(made(0.5, 0.3))).startswith(b"\x89PNG")


def test_a_comparison_is_drawn_and_its_scores_kept(folder, weights, tmp_path):
    asked = {"dataset": folder, "out": tmp_path, "n_images": 1, "progress": False, **weights}
    config = replace(prompts.CONFIG, **asked)
    table = prompts.compare(config)
    assert (table["prompts"] <= table["limit"]).all() and len(table) == 2 * len(prompts.LIMITS)
    written = (tmp_path / "prompts.csv").read_text()
    assert (tmp_path / "miou_by_prompts.png").exists()
    assert not (tmp_path / "coverage_by_prompts.png").exists(), "no found masks are at hand"
    prompts.compare(config)
    assert (tmp_path / "prompts.csv").read_text() == written
