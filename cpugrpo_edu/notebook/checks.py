"""Checks of what the reader builds in chapters 1 to 3, against the package.

A chapter leaves a function for the reader to write. Its check calls it on small cases, compares
it with the package, and prints in words what is wrong: a known mistake is called by its name. Each
check returns whether the function is right, so that a chapter can go on with it, or with the
solution. What there is to build is in `build_policy`, `build_gradient` and `build_grpo`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]

CLOSE = 1e-4  # float32, and positions counted from another place


@dataclass(frozen=True)
class Build:
    """A function for the reader to write: what is right, and the usual mistakes.

    ``right`` and the mistakes get each of the ``cases`` and return a tensor or a tuple of them.
    With each mistake comes the sentence that the reader gets.
    """

    right: Function
    cases: Callable[[], Sequence[tuple[Any, ...]]]
    mistakes: Sequence[tuple[str, Function]]
    names: Sequence[str] = ("result",)

    def check(self, mine: Function) -> bool:
        """Print what is wrong with the reader's function, if anything; True if it is right."""
        return report(mine, fault(self, mine))


def report(mine: Function, wrong: str) -> bool:
    name = getattr(mine, "__name__", "your function")
    print(f"{name}: {wrong}" if wrong else f"{name}: right, the same as the package")
    return not wrong


EMPTY = "not filled in yet. The chapter goes on with the solution."


def fault(build: Build, mine: Function) -> str:
    """What is wrong with the reader's function, in words; empty if nothing is."""
    found = []
    for case in build.cases():
        values, wrong = called(mine, case)
        if not wrong:
            wrong = misshapen(values, as_tuple(build.right(*case)), build.names)
        if wrong:
            return wrong
        found.append(values)
    if agree(found, build.right, build.cases()):
        return ""
    for sentence, mistaken in build.mistakes:
        if agree(found, mistaken, build.cases()):
            return sentence
    return first_difference(found, build)


def called(mine: Function, case: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], str]:
    """What the function returns, as a tuple, and what is wrong with that."""
    try:
        value = mine(*case)
    except NotImplementedError:
        return (), EMPTY
    except Exception as error:  # whatever the reader's code does
        return (), raised(mine, error)
    if value is None:
        return (), EMPTY
    if not all(isinstance(part, Tensor) for part in as_tuple(value)):
        kinds = ", ".join(type(part).__name__ for part in as_tuple(value))
        return (), f"it returns {kinds}; a tensor is needed."
    return as_tuple(value), ""


def raised(mine: Function, error: Exception) -> str:
    """An error of the reader's code, with the line of the function where it happened."""
    text = f"it raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    code = getattr(mine, "__code__", None)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if code and frame.name == code.co_name and frame.lineno:
            line = frame.lineno - code.co_firstlineno + 1
            return f"{text}\n  in its line {line}: {frame.line}"
    return text


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def misshapen(values: Sequence[Tensor], right: Sequence[Tensor], names: Sequence[str]) -> str:
    if len(values) != len(right):
        return f"it returns {len(values)} tensors; {len(right)} are needed: {', '.join(names)}."
    for name, mine, wanted in zip(names, values, right, strict=True):
        if mine.shape != wanted.shape:
            return f"its {name} has shape {tuple(mine.shape)}; expected {tuple(wanted.shape)}."
    return ""


def agree(found: Sequence[Sequence[Tensor]], function: Function, cases: Any) -> bool:
    """Whether the function gives what was found, in all cases."""
    return all(
        torch.allclose(mine.double(), other.double(), atol=CLOSE, rtol=CLOSE, equal_nan=True)
        for values, case in zip(found, cases, strict=True)
        for mine, other in zip(values, as_tuple(function(*case)), strict=True)
    )


def first_difference(found: Sequence[Sequence[Tensor]], build: Build) -> str:
    for number, (values, case) in enumerate(zip(found, build.cases(), strict=True), 1):
        for name, mine, right in zip(
            build.names, values, as_tuple(build.right(*case)), strict=True
        ):
            far = ~torch.isclose(mine.double(), right.double(), atol=CLOSE, rtol=CLOSE)
            if far.any():
                at = tuple(far.nonzero()[0].tolist())
                place = f" at {list(at)}" if at else ""
                return (
                    f"not right yet. In case {number}, its {name}{place} is "
                    f"{mine[at].item():.4f}; the package gives {right[at].item():.4f}."
                )
    raise ValueError("there is no difference")
