"""Exercises of the lessons: `check(name, function)` tells what is wrong with a function.

A function is compared with the library's own on random inputs. Each exercise also knows usual
mistakes, as functions: where an answer equals one of them, the message names the mistake.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import numpy as np
import torch
from exercises import EXERCISES, Exercise

ROUNDS = 20  # random inputs of each exercise
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def check(name: str, function: Callable) -> bool:
    """Compare a function with the library's; print what is wrong with it, or that it is right.

    Args:
        name: of the exercise, a key of `EXERCISES`.
        function: the answer.

    Returns:
        Whether it is right.

    Raises:
        ValueError: no exercise has this name.
    """
    if name not in EXERCISES:
        raise ValueError(f"No exercise {name!r}: choose one of {', '.join(EXERCISES)}.")
    message = verdict(EXERCISES[name], function)
    print(f"{name}: {message or 'right.'}")
    return message is None


def yours(name: str, function: Callable) -> Callable:
    """The student's function where it is right; else the library's, so that the lesson goes on.

    Args:
        name: of the exercise, a key of `EXERCISES`.
        function: the answer.

    Returns:
        A function that takes NumPy arrays and returns a NumPy array or a number.
    """
    is_right = verdict(EXERCISES[name], function) is None
    print(f"{name}: {'your function' if is_right else 'the library, until yours is right'}.")
    chosen = function if is_right else EXERCISES[name].right
    return lambda *arguments: _array(chosen(*_copies(arguments)))


def hint(name: str, number: int = 1) -> None:
    """Print a hint; 1 is the vaguest."""
    hints = EXERCISES[name].hints
    print(hints[min(number, len(hints)) - 1])


def verdict(exercise: Exercise, function: Callable) -> str | None:
    """What is wrong with an answer, or None."""
    if not callable(function):
        return "give check the function itself, without parentheses behind its name"
    cases = list(_cases(exercise))
    answers = [_answer(function, arguments) for arguments, _ in cases]
    wrong = [i for i, (_, expected) in enumerate(cases) if not _equal(answers[i], expected)]
    if not wrong:
        return None
    for mistake, message in exercise.mistakes:
        made = (_answer(mistake, arguments) for arguments, _ in cases)
        if all(_equal(given, other) for given, other in zip(answers, made, strict=True)):
            return message
    arguments, expected = cases[wrong[0]]
    given, inputs = answers[wrong[0]], _shown(exercise, arguments)
    if isinstance(given, Exception):
        return f"your function stopped with {type(given).__name__}: {given}, for {inputs}"
    if given is None and all(answer is None for answer in answers):
        return "your function returns nothing: end it with `return ...`"
    if given is None:
        return f"your function returns nothing for {inputs}: does each branch have a `return`?"
    return _difference(given, expected, inputs)


def _cases(exercise: Exercise) -> Iterator[tuple[tuple, np.ndarray]]:
    for seed in range(ROUNDS):
        arguments = exercise.inputs(np.random.default_rng(seed))
        yield arguments, _array(exercise.right(*_copies(arguments)))


def _answer(function: Callable, arguments: tuple):
    """What a function returns, or the exception that it raises: both are part of an answer."""
    try:
        with np.errstate(all="ignore"):
            return function(*_copies(arguments))
    except Exception as error:
        return error


def _difference(given, expected: np.ndarray, inputs: str) -> str:
    try:
        got = _array(given).astype(float)
    except (TypeError, ValueError):
        return (
            f"your answer is no array of numbers, but a {type(given).__name__} that NumPy "
            f"cannot read as one: have all its rows the same length? (for {inputs})"
        )
    if got.shape != expected.shape:
        return (
            f"the answer should have the shape {expected.shape}, yours has {got.shape}, "
            f"for {inputs}"
        )
    if not np.isfinite(got).all():
        return "your answer holds NaN or infinity: is there a division by zero?"
    if got.size <= 12:
        return f"for {inputs} the answer is {_short(expected)}, yours is {_short(got)}"
    differ = ~np.isclose(got, expected.astype(float), **CLOSE)
    first = tuple(int(i) for i in np.argwhere(differ)[0])
    place = ", ".join(map(str, first))
    return (
        f"for {inputs}, {differ.sum()} of {got.size} numbers differ; at [{place}] "
        f"the answer is {_short(expected[first])}, yours is {_short(got[first])}"
    )


def _array(value) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    return np.asarray(value)


def _copies(arguments: tuple) -> tuple:
    return tuple(x.copy() if isinstance(x, np.ndarray) else x for x in arguments)


def _equal(given, expected) -> bool:
    if given is None:  # which NumPy reads as NaN
        return expected is None
    try:
        given, expected = _array(given), _array(expected)
        return given.shape == expected.shape and bool(
            np.allclose(given.astype(float), expected.astype(float), equal_nan=True, **CLOSE)
        )
    except (TypeError, ValueError):  # no numbers, ragged rows, an exception
        return False


def _shown(exercise: Exercise, arguments: tuple) -> str:
    names = list(inspect.signature(exercise.right).parameters)
    return ", ".join(
        f"{name} = {_short(value)}" for name, value in zip(names, arguments, strict=True)
    )


def _short(value) -> str:
    array = _array(value)
    if array.size > 12:
        return f"an array of shape {array.shape}"
    return str(np.round(array.astype(float), 3).tolist())
