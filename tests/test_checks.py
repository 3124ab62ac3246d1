"""The lessons' exercises: right answers pass, and each usual mistake is named."""

import sys

import numpy as np
import pytest

from aopsam_lab.study import PACKAGE_ROOT

sys.path.insert(0, str(PACKAGE_ROOT / "notebooks" / "lessons"))
import checks  # noqa: E402

MISTAKES = [(name, *pair) for name, task in checks.EXERCISES.items() for pair in task.mistakes]


@pytest.mark.parametrize("name", checks.EXERCISES)
def test_the_right_answer_passes(name, capsys):
    exercise = checks.EXERCISES[name]
    assert checks.check(name, exercise.right)
    assert capsys.readouterr().out == f"{name}: right.\n"
    assert len(exercise.mistakes) >= 3 and len(exercise.hints) == 3


@pytest.mark.parametrize(("name", "mistake", "message"), MISTAKES)
def test_a_mistake_is_named(name, mistake, message):
    assert checks.verdict(checks.EXERCISES[name], mistake) == message


@pytest.mark.parametrize("name", checks.EXERCISES)
def test_any_other_wrong_answer_is_told_what_is_wrong_with_it(name):
    exercise = checks.EXERCISES[name]
    assert "returns nothing" in checks.verdict(exercise, lambda *_: None)
    assert "ZeroDivisionError" in checks.verdict(exercise, lambda *_: 1 / 0)
    wrong = checks.verdict(exercise, lambda *a: np.asarray(exercise.right(*a), float) + 0.25)
    assert "yours is" in wrong
    assert "shape" in checks.verdict(exercise, lambda *_: np.zeros((2, 3, 4, 5)))
    nan = checks.verdict(exercise, lambda *a: np.asarray(exercise.right(*a), float) * np.nan)
    assert "NaN" in nan


def test_an_answer_may_change_its_arguments():
    """A student may strike out rows in place; the comparison must not see it."""

    def greedy(iou):
        total, objects = 0.0, len(iou)
        while iou.size and iou.max() > 0:
            row, column = np.unravel_index(iou.argmax(), iou.shape)
            total += iou[row, column]
            iou[row], iou[:, column] = -1, -1
        return total / objects

    assert checks.verdict(checks.EXERCISES["greedy_miou"], greedy) is None


def test_hints_are_shown_one_by_one_and_the_last_again(capsys):
    for number in (1, 3, 9):
        checks.hint("iou", number)
    first, last, beyond = capsys.readouterr().out.splitlines()
    assert first != last == beyond
