"""Figures, pages, the README's table and the notebook."""

import json
import re
import subprocess

import numpy as np
import pandas as pd
import pytest
from conftest import part

from aopsam_lab.study import figures, machine, report, tables
from aopsam_lab.study.__main__ import main as study_command
from aopsam_lab.study.report import write_all

FACTS = {
    "parameters": {"sam": "mobile_sam", "methods": ["amg_s", "aop"], "seed": 0, "smoothing": 2.0,
                   "confidence": 0.2, "spacing": 6.0, "elimination": 1.3},
    "dataset": {"name": "holiday", "images": 24},
    "weights": {"SAM (mobile_sam)": "abc123"},
    "uncommitted_changes": False,
    "commit": "0123456789abcdef",
    "processor": "A <fast> CPU, 2 cores",
}  # fmt: skip


def summary(methods: list[str]) -> pd.DataFrame:
    rows = []
    for k, method in enumerate(methods):
        miou = 0.5 + 0.01 * k
        scores = [24, miou, miou - 0.03, miou + 0.03, miou + 0.1, 0.01, 0.2, 0.06, 0.27, 150]
        rows.append([method, *scores, 40, 60 + k, 0.2, 0.3, 0.4])
    return pd.DataFrame(rows, columns=list(tables.SUMMARY_COLUMNS))


def differences(methods: list[str]) -> pd.DataFrame:
    rows = [
        [method, "aop", 24, -0.02, -0.03, -0.01, 4.0, 5.0, 0.1, 3.0]
        for method in methods
        if method != "aop"
    ]
    return pd.DataFrame(rows, columns=list(tables.DIFFERENCE_COLUMNS))


@pytest.fixture
def reports(tmp_path):
    folder = tmp_path / "reports" / "main_comparison"
    methods = ["amg_s", "aop"]
    contents = {
        "main_comparison.csv": summary(methods),
        "main_comparison_differences.csv": differences(methods),
        "main_comparison.png": figures.tradeoff_figure(summary(methods)),
        "provenance.json": FACTS,
    }
    write_all(folder, contents)
    return folder.parent


# --- figures ---


def is_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG") and len(data) > 5000


def test_the_figure_of_all_methods_and_of_one_without_an_interval():
    figure = figures.tradeoff_figure(summary(list(tables.TITLES)))
    assert is_png(figures.png(figure))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(
        tables.TITLES.values()
    )
    alone = summary(["mine"]).assign(miou_lo=np.nan, miou_hi=np.nan, n_decoded=0)
    assert is_png(figures.png(figures.tradeoff_figure(alone)))


# --- pages ---


def test_index_shows_all_and_loads_nothing_from_outside(reports):
    text = report.write_index(reports).read_text(encoding="utf-8")
    numbers = ("AMG-S", "50.0 [47.0, 53.0]", "abc123", "none of its figures", "A &lt;fast&gt; CPU")
    for wanted in (
        *numbers,
        'src="main_comparison/main_comparison.png"',
        "main_comparison/main_comparison.csv",
    ):
        assert wanted in text, wanted
    assert "main_comparison.html" not in text  # it is not there, so there is no link to it
    assert "<tr class=own><td>AoP-SAM</td>" in text
    assert not re.search(r'(src|href)="(https?:)?//', text)
    assert "@import" not in text
    assert "<script" not in text


def test_index_without_reports(tmp_path):
    assert "make study" in report.write_index(tmp_path / "reports").read_text(encoding="utf-8")


def test_a_report_of_another_kind_is_listed_after_the_main_comparison(reports):
    (reports / "ablation").mkdir()
    (reports / "ablation" / "provenance.json").write_text(json.dumps(FACTS))
    text = report.write_index(reports).read_text(encoding="utf-8")
    assert text.index("<h2>Main comparison") < text.index("<h2>Ablation")


def test_a_table_is_escaped_and_a_row_of_it_set_off():
    text = part("table", pd.DataFrame({"a": ["x", "<b>"], "%": ["1", "2"]}), "<b>")
    assert "<tr><td>x</td><td>1</td></tr> <tr class=own><td>&lt;b&gt;</td>" in text


# --- the README ---


def test_readme_table_is_replaced_and_nothing_else(reports, tmp_path):
    file = tmp_path / "README.md"
    file.write_text(f"# Title\n\n{report.START}\nold\n{report.END}\n\nThe end.\n")
    report.update_readme(file, reports)
    first = file.read_text(encoding="utf-8")
    assert "old" not in first
    assert first.startswith("# Title\n")
    assert first.endswith(f"{report.END}\n\nThe end.\n")
    assert "| **AoP-SAM** | **51.0 [48.0, 54.0]** |" in first and "24 images of holiday" in first
    report.update_readme(file, reports)
    assert file.read_text(encoding="utf-8") == first


def test_readme_without_its_marks_or_results(reports, tmp_path):
    file = tmp_path / "README.md"
    file.write_text("# Title\n")
    with pytest.raises(ValueError, match="must have the line"):
        report.update_readme(file, reports)
    with pytest.raises(FileNotFoundError, match="make study"):
        report.update_readme(file, tmp_path)
    assert study_command(["readme", "--readme", str(file), "--reports", str(reports)]) == 1


# --- provenance ---


def test_git_state(tmp_path):
    tmp_path = tmp_path.resolve()
    assert machine.git_state(tmp_path) == ("unknown", "unknown")

    def git(*arguments):
        person = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", tmp_path, *person, *arguments]
        subprocess.run(command, check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "index.html").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    commit, dirty = machine.git_state(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", commit) and dirty is False
    (tmp_path / "reports" / "index.html").write_text("2")  # a result, not code
    assert machine.git_state(tmp_path)[1] is False
    (tmp_path / "code.py").write_text("2")
    assert machine.git_state(tmp_path)[1] is True
    (tmp_path / "below").mkdir()
    # not the root of a checkout
    assert machine.git_state(tmp_path / "below") == ("unknown", "unknown")


# --- the notebook ---


def test_a_report_that_is_not_there(tmp_path, capsys):
    assert study_command(["report", "nonsense", "--reports", str(tmp_path)]) == 1
    assert "no notebook" in capsys.readouterr().err


def test_a_failing_cell_is_named_and_kept(tmp_path):
    with pytest.raises(RuntimeError, match="no method 'best'"):
        report.run_report("main_comparison", {"methods": ["best"]}, tmp_path / "reports")
    assert (tmp_path / "reports" / "main_comparison" / "main_comparison.failed.ipynb").exists()
    assert not list((tmp_path / "reports" / "main_comparison").glob(".*"))
