"""The lessons: each runs from top to bottom, in the box and on a student's own photographs."""

import ast
import inspect
import json
import sys

import nbformat
import numpy as np
import papermill
import pytest
from PIL import Image

from aopsam_lab.data import PHOTOS
from aopsam_lab.study import PACKAGE_ROOT

FOLDER = PACKAGE_ROOT / "notebooks" / "lessons"
sys.path[:0] = [str(FOLDER), str(FOLDER / "solutions")]
import answers  # noqa: E402
import checks  # noqa: E402
import course  # noqa: E402

LESSONS = sorted(FOLDER.glob("*.ipynb"))
FEW = {
    "1_everything_by_a_grid": {"side": 10},
    "3_how_the_predictor_learns": {"n_train": 3, "steps": 8},
    "5_is_it_better": {"n_images": 2, "methods": ["amg_s", "aop"]},
    "6_your_own_ablation": {"n": 2},
}
FIGURES = dict(zip((path.stem for path in LESSONS), (5, 7, 3, 3, 4, 4, 3), strict=True))


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


def printed_by(notebook, path, folder, **parameters) -> str:
    """Run a lesson and compare the number of its figures; what it printed."""
    made = folder / path.name
    nbformat.write(notebook, made)
    for file in ("checks.py", "course.py", "exercises.py", "sam.svg"):
        (folder / file).write_bytes((FOLDER / file).read_bytes())
    parameters = FEW.get(path.stem, {}) | parameters
    done = papermill.execute_notebook(made, made, parameters, progress_bar=False, cwd=folder)
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    drawn = sum("image/png" in output.get("data", {}) for output in outputs)
    assert drawn == FIGURES[path.stem]
    return "".join(output.get("text", "") for output in outputs)


def test_every_exercise_is_in_a_lesson_and_unsolved():
    found = {}
    for path in LESSONS:
        found |= exercises(nbformat.read(path, as_version=4).cells)
    assert set(found) == set(checks.EXERCISES)
    for name, cell in found.items():
        scope = {"check": lambda name, function: None}
        exec(cell.source, scope)
        assert "returns nothing" in checks.verdict(checks.EXERCISES[name], scope[name])
        asked = scope[name].__doc__
        for argument in inspect.signature(checks.EXERCISES[name].right).parameters:
            assert f"        {argument}: " in asked  # with its type and meaning
        assert "Returns:" in asked


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_and_shows_what_it_speaks_of(path, tmp_path):
    printed = printed_by(solved(path), path, tmp_path)
    assert "until yours is right" not in printed


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_on_own_photographs_and_without_answers(path, tmp_path):
    """What no one outlined is enough for lessons 0 to 4; a folder with masks for 5 and 6."""
    own = tmp_path / "own"
    (own / "images").mkdir(parents=True)
    if path.stem < "5":
        own = own / "me.jpg"
        source = next((PHOTOS / "images").iterdir())
        Image.open(source).transpose(Image.Transpose.ROTATE_90).resize((300, 400)).save(own)
    else:
        known = json.loads((PHOTOS / "annotations.json").read_text())
        for image in known["images"][:2]:
            name = image["file_name"]
            (own / "images" / name).write_bytes((PHOTOS / "images" / name).read_bytes())
        (own / "annotations.json").write_text(json.dumps(known))
    notebook = nbformat.read(path, as_version=4)
    printed = printed_by(notebook, path, tmp_path, photo=str(own))
    assert printed.count("returns nothing") == len(exercises(notebook.cells))


def test_each_lesson_tells_its_length_and_asks_before_it_shows():
    for path in LESSONS:
        cells = nbformat.read(path, as_version=4).cells
        text = "".join(cell.source for cell in cells if cell.cell_type == "markdown")
        assert "minutes" in text and "redict" in text, path
        assert any(cell.source.startswith("photo = None  # the path of ") for cell in cells), path


def test_a_large_photograph_is_made_smaller_and_has_no_masks(tmp_path):
    pixels = np.full((1500, 2000, 3), 90, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    sample = course.open_photo(tmp_path / "mine.png")
    assert sample.image.shape == (768, 1024, 3) and sample.rles == []
    assert (sample.image == 90).all()
    assert len(course.open_photo(number=3).masks) > 0
