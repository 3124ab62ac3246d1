"""Figures, pages, the README's table and the notebook."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import METHODS, parameters, part, row, stored
from papermill import inspect_notebook

from aopsam_lab.files import write_atomically
from aopsam_lab.study import PACKAGE_ROOT, figures, machine, report, settings, sweeps, tables
from aopsam_lab.study.__main__ import main as study_command
from aopsam_lab.study.runner import STORE_NAME

NOTEBOOKS = sorted((PACKAGE_ROOT / "notebooks").glob("*.ipynb"))
STUDIES = [file for file in NOTEBOOKS if file.stem != "explore_pcm_pem"]
FACTS = {
    "parameters": {"sam": "mobile_sam", "methods": ["amg_s", "aop"], "seed": 0, "smoothing": 2.0,
                   "confidence": 0.2, "spacing": 6.0, "elimination": 1.3},
    "dataset": {"name": "holiday", "images": 24},
    "weights": {"SAM (mobile_sam)": "abc123"},
    "uncommitted_changes": False,
    "commit": "0123456789abcdef",
    "processor": "A <fast> CPU, 2 cores",
}  # fmt: skip


def made(methods: list[str]) -> list[pd.DataFrame]:
    """Summary and differences of three images: each method is 0.01 better than the one before."""
    per_image = tables.per_image_table(
        row(f"i{i}", method, 0.5 + 0.01 * k + 0.1 * i, n_decoded=60 + k)
        for k, method in enumerate(methods)
        for i in range(3)
    )
    return [tables.summary_table(per_image, {}), tables.difference_table(per_image)]


@pytest.fixture
def reports(tmp_path):
    folder = tmp_path / "reports" / "main_comparison"
    summary, differences = made(["amg_s", "aop"])
    contents = {
        "main_comparison.csv": summary,
        "main_comparison_differences.csv": differences,
        "main_comparison.png": figures.tradeoff_figure(summary),
        "provenance.json": FACTS,
    }
    report.write_all(folder, contents)
    return folder.parent


# --- figures ---


def test_all_methods_are_drawn_and_one_without_an_interval():
    figure = figures.tradeoff_figure(made(list(tables.TITLES))[0])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(names) == sorted(tables.TITLES.values())
    alone = made(["mine"])[0].assign(miou_lo=np.nan, miou_hi=np.nan, n_decoded=0)
    for drawn in (figure, figures.tradeoff_figure(alone)):
        data = figures.png(drawn)
        assert data.startswith(b"\x89PNG") and len(data) > 5000


# --- pages ---


def test_index_shows_all_and_loads_nothing_from_outside(reports):
    text = report.write_index(reports).read_text(encoding="utf-8")
    for wanted in (
        "AMG-S",
        "60.0 [",
        "abc123",
        "none of its figures",
        "A &lt;fast&gt; CPU",
        'src="main_comparison/main_comparison.png"',
        "main_comparison/main_comparison.csv",
    ):
        assert wanted in text, wanted
    assert "main_comparison.html" not in text  # it is not there, so there is no link to it
    assert "<tr class=own><td>AoP-SAM</td>" in text
    assert not re.search(r'(src|href)="(https?:)?//|@import|<script', text)


def test_the_index_of_no_report_says_how_to_make_one_and_others_follow(reports, tmp_path):
    assert "make study" in report.write_index(tmp_path / "none").read_text(encoding="utf-8")
    report.write_all(reports / "ablation", {"provenance.json": FACTS})
    text = report.write_index(reports).read_text(encoding="utf-8")
    assert text.index("<h2>Main comparison") < text.index("<h2>Ablation")


def test_a_table_is_escaped_and_a_row_of_it_set_off():
    text = part("table", pd.DataFrame({"a": ["x", "<b>"], "%": ["1", "2"]}), "<b>")
    row = '<tr class=own><td>&lt;b&gt;</td><td data-of="%">2</td></tr>'
    assert f'<tr><td>x</td><td data-of="%">1</td></tr> {row}' in text


def test_provenance_is_folded_and_leaves_out_empty_lists():
    text = part("provenance", {"parameters": {"sam": "x", "thresholds": [], "seed": 0}})
    assert text.startswith("<details><summary>") and "<dd>sam x, seed 0</dd>" in text
    shown = part("provenance", {"parameters": {"methods": ["amg_s", "mine"], "crop": None}})
    assert "<dd>methods AMG-S, mine" in shown and "crop" not in shown


def test_findings_are_three_sentences_of_the_tables_before_the_figure(reports):
    text = report.write_index(reports).read_text(encoding="utf-8")
    at = text.index('<p class="findings">')
    said = " ".join(text[at : text.index("</p>", at)].split())
    assert "On 24 images of holiday, AoP-SAM reaches 61.0% mIoU with 61 prompts" in said
    assert "AMG-S reaches 60.0% with 60. Image by image the difference is +1.0 [" in said
    assert "above zero, so AoP-SAM is better. AoP-SAM takes" in said and said.count(". ") == 2
    assert at < text.index("main_comparison.png") < text.index("<table")


def test_findings_of_the_other_reports_by_hand():
    facts = {"dataset": {"images": 3, "name": "x"}}
    names = ("parameter", "column", "first", "last", "trend", "change", "change_lo", "change_hi")
    rows = [("spacing", "miou", 4, 7, "falls", -0.04, -0.06, -0.02)]
    rows += [("smoothing", "miou", 1, 4, "undecided", 0.01, -0.01, 0.02)]
    rows += [(name, "n_decoded", 1, 4, "falls", n, n, n) for name, n in (("a", 9), ("b", -50))]
    best = {"budget": [9], "miou": [0.5], "miou_diff": [0.0], "miou_diff_lo": [0.0]}
    budgets = pd.DataFrame(best | {"miou_diff_hi": [0.01]})
    said = part("swept_headline", pd.DataFrame(rows, columns=names), budgets, facts)
    assert "spacing from 4 to 7 changes mIoU by -4.0 [-6.0, -2.0] points. The number" in said
    assert "depends most on b: -50 from 1 to 4. With at most 9 prompts" in said
    names = ("sampling", "limit", "grid", "prompts", "miou", "miou_grid", "miou_diff", "miou_lo")
    rows = [("aop, chosen", n, "grid_8", n, 0.5, 0.4, d, d - 0.1) for n, d in ((64, 0.2), (99, 0))]
    limits = pd.DataFrame(rows, columns=names).assign(miou_hi=0.3)
    said = part("limits_headline", limits, facts)
    assert "at 1 of 2 numbers of prompts" in said and "largest at 64 prompts: +20.0 [+10.0" in said
    names = ("seconds", "times_faster", "peak_mib", "lowest_iou")
    rows = pd.DataFrame([(9.0, 1, 70, 1), (3.0, 3.0, 20, 0.99)], columns=names)
    said = part("benchmark_headline", rows, facts)
    assert "the masks take 3.0 s an image in place of 9.0 s: 3.0 times less." in said


def test_no_table_is_cut_off_at_any_width(reports):
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    page_file = report.write_index(reports)
    cut = "[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width in (360, 600, 1000, 1200, 1400, 1600):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.goto(page_file.resolve().as_uri())
            assert page.locator("table").count() and page.evaluate(f"{cut}.length") == 0, width
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()


# --- the README ---


def test_readme_table_is_replaced_and_nothing_else(reports, tmp_path):
    file = tmp_path / "README.md"
    file.write_text(f"# Title\n\n{report.START}\nold\n{report.END}\n\nThe end.\n")
    report.update_readme(file, reports)
    first = file.read_text(encoding="utf-8")
    assert "old" not in first and first.startswith("# Title\n")
    assert first.endswith(f"{report.END}\n\nThe end.\n")
    assert "| **AoP-SAM** | **61.0 [" in first and "24 images of holiday" in first
    report.update_readme(file, reports)
    assert file.read_text(encoding="utf-8") == first


def test_a_readme_without_marks_or_results_is_refused(reports, tmp_path):
    file = tmp_path / "README.md"
    file.write_text("# Title\n")
    with pytest.raises(ValueError, match="must have the line"):
        report.update_readme(file, reports)
    with pytest.raises(FileNotFoundError, match="make study"):
        report.update_readme(file, tmp_path)
    assert study_command(["readme", "--readme", str(file), "--reports", str(reports)]) == 1


def test_a_name_is_never_markup(reports, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    facts = FACTS | {"dataset": {"name": f"{name}{report.END}", "images": 24}}
    write_atomically(reports / "main_comparison" / "provenance.json", json.dumps(facts))
    (reports / "main_comparison").rename(reports / name)
    assert "<img src=x" not in report.write_index(reports).read_text(encoding="utf-8")
    (reports / name).rename(reports / "main_comparison")
    file = write_atomically(tmp_path / "README.md", f"{report.START}\n{report.END}\n")
    text = report.update_readme(file, reports).read_text(encoding="utf-8")
    assert "<img" not in text and text.count(report.END) == 1
    # Markdown would take what a name holds as HTML
    assert not [path for path in NOTEBOOKS if "Markdown(" in path.read_text(encoding="utf-8")]


# --- provenance ---


def test_provenance_tells_the_commit_and_uncommitted_code(tmp_path):
    root, result = tmp_path.resolve(), tmp_path / "reports" / "index.html"
    assert machine.git_state(root) == ("unknown", "unknown")

    def git(*arguments):
        person = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", root, *person, *arguments], check=True, capture_output=True)

    git("init")
    (root / "code.py").write_text("1")
    write_atomically(result, "1")
    git("add", ".")
    git("commit", "-m", "first")
    commit, dirty = machine.git_state(root)
    assert re.fullmatch("[0-9a-f]{40}", commit) and dirty is False
    result.write_text("2")  # not code
    assert machine.git_state(root)[1] is False
    (root / "code.py").write_text("2")
    assert machine.git_state(root)[1] is True
    assert machine.git_state(root / "reports") == ("unknown", "unknown")  # not a checkout's root


# --- the notebooks ---


def test_a_report_that_is_not_there_is_said(tmp_path, capsys):
    assert study_command(["report", "nonsense", "--reports", str(tmp_path)]) == 1
    assert "no notebook" in capsys.readouterr().err


def test_whatever_stops_a_report_is_one_line(reports, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for command in (["report"], ["index"], ["readme", "--readme", str(tmp_path)]):
        where = str(reports if command[0] == "readme" else file)
        assert study_command([*command, "--reports", where]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


def test_ctrl_c_ends_a_report_in_one_line(folder, tmp_path):
    command = [sys.executable, "-m", "aopsam_lab.study", "report", "--dataset", str(folder)]
    command += ["--n-images", "14", "--methods", "amg_s,aop", "--timed-images", "0"]
    run = subprocess.Popen(
        [*command, "--reports", str(tmp_path)],
        env=settings.package_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not stored(tmp_path / "main_comparison" / STORE_NAME):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and said.endswith("goes on from there.\n")
    assert "Traceback" not in said and said.count("interrupted") == 1


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_a_wrong_parameter_of_a_notebook_is_refused(file):
    cells = [cell.source for cell in nbformat.read(file, as_version=4).cells]
    assert any("report.check_parameters(globals())" in cell for cell in cells)
    cells, values = [cell for cell in cells if cell.startswith("sam: ")], parameters(file.stem)
    report.check_parameters({**values, "In": ["", *cells, "# Parameters\nseed = 1\n"]})
    with pytest.raises(ValueError, match="no parameter 'sed'. Choose from sam, "):
        report.check_parameters({**values, "In": ["", *cells, "# Parameters\nsed = 1\n"]})
    for name, value in (("out", 202406), ("n_images", "ten"), ("seed", 1.5), ("n_images", True)):
        with pytest.raises(ValueError, match=f"{name} is {value!r}, but its type is"):
            report.check_parameters({**values, "In": cells, name: value})


def test_an_unknown_parameter_stops_a_notebook_at_once(tmp_path):
    with pytest.raises(RuntimeError, match="ValueError: There is no parameter 'n_imges'"):
        report.run_report("benchmark", {"n_imges": 1}, tmp_path / "a {folder}")


def test_a_failing_cell_is_named_and_kept(tmp_path):
    with pytest.raises(RuntimeError, match="no method 'best'"):
        report.run_report("main_comparison", {"methods": ["best"]}, tmp_path / "reports")
    assert (tmp_path / "reports" / "main_comparison" / "main_comparison.failed.ipynb").exists()
    assert not list((tmp_path / "reports" / "main_comparison").glob(".*"))


def test_reports_are_made_from_any_folder(folder, tmp_path, monkeypatch):
    """The notebooks through papermill with all that they write, and the page that lists them."""
    monkeypatch.chdir(tmp_path)
    few = {"dataset": str(folder), "n_images": 2, "timed_images": 1}
    few |= {"confidence": 0.0, "spacing": 60.0}
    grids = {"smoothings": [2], "confidences": [0.0], "spacings": [40, 60], "eliminations": [1.3]}
    report.run_report("main_comparison", {**few, "methods": METHODS}, "reports")
    few["memory"] = False
    report.run_report("ablation", {**few, "methods": METHODS}, "reports")
    report.run_report("parameter_sweeps", {**few, **grids, "budgets": [3]}, "reports")
    quick = {"dataset": str(folder), "n_images": 1, "side": 3}
    index = report.run_report("benchmark", quick, "reports").read_text(encoding="utf-8")
    study = "NAME.ipynb NAME.html NAME.csv NAME_differences.csv NAME.png per_image.csv examples.png"
    thresholds = " thresholds.png thresholds.csv thresholds_per_image.csv"
    swept = "NAME.csv trends.csv budgets.csv paper_signs.csv NAME.png joint.png"
    wanted = {"main_comparison": study + thresholds, "ablation": study, "parameter_sweeps": swept}
    for name, files in {**wanted, "benchmark": "NAME.png provenance.json"}.items():
        for file in (f"{name}/{file.replace('NAME', name)}" for file in files.split()):
            assert (tmp_path / "reports" / file).stat().st_size > 50 and file in index, file
    assert "on the first 1 of these images" in index and "Spacing from 40 to 60" in index
    assert "grid 3 x 3." in index

    def read(file: str) -> pd.DataFrame:
        return pd.read_csv(tmp_path / "reports" / file)

    summary = read("main_comparison/main_comparison.csv")
    assert list(summary) == list(tables.SUMMARY_COLUMNS) and summary["peak_mem_mb"].gt(0).all()
    table = read("parameter_sweeps/parameter_sweeps.csv")
    assert list(table) == list(sweeps.SWEEP_COLUMNS) and table["miou"].gt(0).all()
    facts = json.loads((tmp_path / "reports/parameter_sweeps/provenance.json").read_text())
    assert facts["parameters"]["budgets"] == [3]
    table = read("benchmark/benchmark.csv")
    assert table["lowest_iou"].gt(0.9).all() and table["peak_mib"].max() > 10 and len(table) == 4
    goes = read("benchmark/where_time_goes.csv").set_index("stage")
    assert 30 < goes.loc["encoder", "giga_multiply_adds"] < 45  # those of the convolutions are 9
    assert goes["seconds"].gt(0).all() and len(goes) == 4
    made = tmp_path / "reports" / "main_comparison" / "main_comparison"
    page = made.with_suffix(".html").read_text(encoding="utf-8")
    assert "4 rows scored now, 0 found" in page and "AoP-SAM without AF" in page
    assert not re.search(r'<(script|link)[^>]+(src|href)="https?:', page)
    assert str(PACKAGE_ROOT) not in made.with_suffix(".ipynb").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", [*PACKAGE_ROOT.glob("notebooks/*.ipynb")], ids=lambda f: f.stem)
def test_papermill_knows_type_and_text_of_each_parameter(file):
    known = inspect_notebook(str(file)).values()
    assert len(known) > 7
    assert all(one["inferred_type_name"] != "None" and one["help"] for one in known), known
