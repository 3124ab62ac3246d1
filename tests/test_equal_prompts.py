"""Comparison at equal prompts: a table worked by hand, and one run on a small image."""

import pandas as pd
import pytest
from conftest import row

from aopsam_lab.study import equal_prompts
from aopsam_lab.study.report import part


def made(ours: float, theirs: float) -> pd.DataFrame:
    """Two images: the grids score `theirs` and a tenth more, AoP-SAM `ours` and a tenth more."""
    rows = []
    for setting in equal_prompts.settings():
        score, decoded = ours if setting.method == "aop" else theirs, setting.max_prompts or 64
        for image, extra in (("a", 0.0), ("b", 0.1)):
            rows.append(row(image, setting.label, score + extra, n_decoded=decoded))
    return pd.DataFrame(rows)


def test_methods_at_equal_prompts_worked_by_hand():
    table = equal_prompts.comparison(made(0.5, 0.3)).set_index(["sampling", "limit"])
    assert table["grid"].loc["aop"].tolist()[:2] == ["grid_8", "grid_10"]
    assert table["grid"].loc["aop"].tolist()[-2:] == ["amg_d"] * 2
    columns = ["miou", *(f"miou_{end}" for end in ("grid", "diff", "lo", "hi"))]
    found = table.loc[("aop, chosen", 100), columns].tolist()
    assert found == pytest.approx([0.55, 0.35, 0.2, 0.2, 0.2])
    shown = part("limits", table.reset_index())
    assert "<td>AoP-SAM, chosen</td><td>100 prompts, grid of side 10</td>" in shown
    assert "<td>55.0</td><td>35.0</td>\n<td>+20.0 [+20.0,\u00a0+20.0]</td>" in shown
    figure = equal_prompts.figure(made(0.5, 0.3).assign(coverage=0.5))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["mIoU %", "coverage %"]
    lines = {line.get_label() for line in figure.axes[0].lines}
    assert lines == {"regular grids", "AoP-SAM", "AoP-SAM, chosen"}


def test_a_comparison_is_drawn_and_its_scores_kept(folder, weights, tmp_path):
    asked = {"dataset": folder, "out": tmp_path, "n_images": 1, "progress": False, **weights}
    result, table = equal_prompts.compare(**asked)
    assert (table["prompts"] <= table["limit"]).all()
    assert len(table) == 2 * len(equal_prompts.LIMITS)
    files = equal_prompts.save(result, table)
    again, table = equal_prompts.compare(**asked)
    assert again.n_scored == 0
    pd.testing.assert_frame_equal(
        pd.read_csv(files["equal_prompts.csv"]), table, rtol=1e-5, check_dtype=False
    )
