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
    assert "without parentheses" in checks.verdict(exercise, 0.5)
    assert "same length" in checks.verdict(exercise, lambda *_: [[1, 2], [3]])
    assert "ZeroDivisionError" in checks.verdict(exercise, lambda *_: 1 / 0)
    wrong = checks.verdict(exercise, lambda *a: np.asarray(exercise.right(*a), float) + 0.25)
    assert "yours is" in wrong
    assert "shape" in checks.verdict(exercise, lambda *_: np.zeros((2, 3, 4, 5)))
    nan = checks.verdict(exercise, lambda *a: np.asarray(exercise.right(*a), float) * np.nan)
    assert "NaN" in nan


def test_a_branch_without_a_return_is_found():
    """A student's function may answer some inputs and forget others."""

    def iou(first, second):
        if (first | second).any():
            return checks.EXERCISES["iou"].right(first, second)

    message = checks.verdict(checks.EXERCISES["iou"], iou)
    assert message.startswith("your function returns nothing for first = ")
    assert "each branch" in message


def test_an_answer_that_stops_on_some_inputs_only_is_told_which():
    def iou(first, second):
        if not (first | second).any():
            raise ValueError("no union")
        return checks.EXERCISES["iou"].right(first, second)

    message = checks.verdict(checks.EXERCISES["iou"], iou)
    assert "ValueError: no union, for first = " in message


def test_the_first_number_that_differs_is_shown_of_a_large_answer():
    exercise = checks.EXERCISES["elimination_map"]

    def one_off(features, mask):
        answer = np.array(exercise.right(features, mask))
        answer[2, 3] += 0.5
        return answer

    assert "1 of 24 numbers differ; at [2, 3]" in checks.verdict(exercise, one_off)


def test_an_unknown_exercise_is_refused_by_name():
    with pytest.raises(ValueError, match="No exercise 'iuo': choose one of to_model_frame, iou"):
        checks.check("iuo", len)


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


def test_a_lesson_goes_on_with_the_library_until_the_answer_is_right(capsys):
    square = np.ones((2, 2), bool)
    wrong = checks.yours("iou", lambda first, second: None)
    assert wrong(square, ~square) == 0 and "library" in capsys.readouterr().out
    calls = []

    def iou(first, second):
        calls.append(1)
        return checks.EXERCISES["iou"].right(first, second)

    right = checks.yours("iou", iou)
    before = len(calls)
    assert right(square, square) == 1 and len(calls) == before + 1
    assert "your function" in capsys.readouterr().out
