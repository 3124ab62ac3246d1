"""The lessons: each runs from top to bottom with its exercises solved, and shows its figures."""

import ast
import inspect
import sys

import nbformat
import papermill
import pytest

from aopsam_lab.study import PACKAGE_ROOT

FOLDER = PACKAGE_ROOT / "notebooks" / "lessons"
sys.path[:0] = [str(FOLDER), str(FOLDER / "solutions")]
import answers  # noqa: E402
import checks  # noqa: E402

LESSONS = sorted(FOLDER.glob("*.ipynb"))
FEW = {
    "1_everything_by_a_grid": {"side": 32},
    "3_how_the_predictor_learns": {"n_train": 3, "steps": 8},
    "5_is_it_better": {"n_images": 2, "methods": ["amg_s", "aop"]},
    "6_your_own_ablation": {"n": 2},
}
FIGURES = dict(zip((path.stem for path in LESSONS), (3, 4, 3, 3, 3, 3, 1), strict=True))


def exercises(cells) -> dict[str, dict]:
    """The exercise cells of a notebook, by the name of the function that a student writes."""
    tagged = [cell for cell in cells if "exercise" in cell.metadata.get("tags", ())]
    return {ast.parse(cell.source).body[0].name: cell for cell in tagged}


def solved(path):
    """The notebook with the answers in its exercises."""
    notebook = nbformat.read(path, as_version=4)
    for name, cell in exercises(notebook.cells).items():
        answer = inspect.getsource(getattr(answers, name))
        head = "import numpy as np\nimport torch\nfrom torchvision.ops import box_iou\n\n\n"
        cell.source = f'{head}{answer}\n\nassert check("{name}", {name})'
    return notebook


def test_every_exercise_is_in_a_lesson_and_unsolved():
    found = {}
    for path in LESSONS:
        found |= exercises(nbformat.read(path, as_version=4).cells)
    assert set(found) == set(checks.EXERCISES)
    for name, cell in found.items():
        scope = {"check": lambda name, function: None}
        exec(cell.source, scope)
        assert "returns nothing" in checks.verdict(checks.EXERCISES[name], scope[name])


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_and_shows_what_it_speaks_of(path, tmp_path):
    made = tmp_path / path.name
    nbformat.write(solved(path), made)
    for file in ("checks.py", "course.py", "exercises.py", "sam.svg"):
        (tmp_path / file).write_bytes((FOLDER / file).read_bytes())
    done = papermill.execute_notebook(
        made, made, FEW.get(path.stem, {}), progress_bar=False, cwd=tmp_path
    )
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    drawn = sum("image/png" in output.get("data", {}) for output in outputs)
    assert drawn == FIGURES[path.stem]
    assert not [output for output in outputs if output.output_type == "error"]


def test_each_lesson_tells_its_length_and_asks_before_it_shows():
    for path in LESSONS:
        cells = nbformat.read(path, as_version=4).cells
        text = "".join(cell.source for cell in cells if cell.cell_type == "markdown")
        assert "minutes" in text and "redict" in text, path
