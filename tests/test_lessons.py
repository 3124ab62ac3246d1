"""The lessons: each runs from top to bottom, and shows what its text speaks of."""

from __future__ import annotations

import nbformat
import papermill
import pytest

from aopsam_lab.study import PACKAGE_ROOT

LESSONS = sorted((PACKAGE_ROOT / "notebooks" / "lessons").glob("*.ipynb"))
FEW = {"4_measuring_it": {"n_images": 2, "methods": ["amg_s", "aop"]}}
FIGURES = {
    "1_a_click_and_a_grid": 2,
    "2_the_confidence_map": 2,
    "3_the_elimination_map": 2,
    "4_measuring_it": 0,
}
SAYS = {
    "1_a_click_and_a_grid": "of 1,024 points gave the",
    "2_the_confidence_map": "peaks above 0.02",
    "3_the_elimination_map": "aop_gated  mIoU",
    "4_measuring_it": "each object gets the mask [0 1 3]\n"
    "greedy mIoU 0.567, with masks shared 0.600",
}


def test_every_lesson_is_tested():
    assert [path.stem for path in LESSONS] == sorted(FIGURES)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_and_shows_what_it_speaks_of(path, tmp_path):
    parameters = FEW.get(path.stem, {})
    done = papermill.execute_notebook(
        path, tmp_path / path.name, parameters, progress_bar=False, cwd=tmp_path
    )
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES[path.stem]
    assert SAYS[path.stem] in "".join(
        output.text for output in outputs if output.output_type == "stream"
    )
    if path.stem == "4_measuring_it":
        assert "amg_s" in outputs[-1].text and "against aop" in outputs[-1].text


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_asks_and_answers_as_much(path):
    cells = nbformat.read(path, as_version=4).cells
    assert all(len(cell.source.splitlines()) <= 25 for cell in cells if cell.cell_type == "code")
    questions, answers = cells[-1].source.split("<details>")
    assert questions.count("\n1.") + questions.count("\n2.") + questions.count("\n3.") == 3
    assert all(questions.count(f"\n{k}. ") == answers.count(f"\n{k}. ") for k in range(1, 9))
