"""Verifiers as people write them, each as one function of a problem and a completion.

Besides our own signature, ``verify(problem, completion)``, there are two that are known elsewhere:
TRL's reward functions, ``reward(prompts, completions, **columns)``, and verl's
``compute_score(data_source, solution_str, ground_truth, extra_info)``. All may be async.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cpugrpo_edu.data import Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.tasks.time_limit import TookTooLong, limited

Verifier = Callable[[Problem, str], Any]
"""``verify(problem, completion)`` returns a bool, or a grade from 0 to 1."""

IMPORT_LIMIT = 60.0
"""Seconds that importing a verifier's file may take."""


def load_verifier(spec: str) -> Verifier:
    """Import ``function`` from ``path/to/file.py:function``. This executes the file.

    Modules beside the file can be imported in it, as if it were run as a program.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not name:
        raise UserError(f"cannot read the verifier {spec!r}; write it as path/to/file.py:function")
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"no Python file {path} for the verifier {spec!r}; check the path")
    module_name = f"cpugrpo_verifier_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None and module_spec.loader is not None  # true of every .py file
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses in the file look themselves up there
    try:
        with importing_from(path.resolve().parent):
            limited(module_spec.loader.exec_module, module, seconds=IMPORT_LIMIT)
    except TookTooLong:
        raise UserError(
            f"importing {path} did not finish within {IMPORT_LIMIT:g} s; fix the file"
        ) from None
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{path} cannot be imported: {type(error).__name__}: {error}; fix the file"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{path} has no function {name!r}; define it there or correct the name")
    return adapted(function, f"{name} in {path}")


@contextlib.contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Look for modules in ``folder`` first; afterwards last, for imports within functions."""
    place = str(folder)
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
        if place not in sys.path:
            sys.path.append(place)


def source_files(spec: str) -> list[Path]:
    """The file of a verifier, and the modules beside it that have been imported."""
    path = Path(spec.rpartition(":")[0]).resolve()
    loaded = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    beside = {Path(file).resolve() for file in loaded if file}
    return sorted({path} | {file for file in beside if file.parent == path.parent})


def adapted(function: Callable[..., Any], where: str) -> Verifier:
    """The function as a `Verifier`, whichever of the signatures it has; UserError for any other."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a builtin without a signature
        return function
    call = next((way for name, way in ELSEWHERE.items() if name in parameters), None)
    if call is None:
        try:
            inspect.signature(function).bind(None, None)
        except TypeError as error:
            raise UserError(
                f"{where} must take two arguments, problem and completion ({error}), or those of "
                "TRL (prompts, completions, **columns) or of verl (data_source, solution_str, "
                "ground_truth, extra_info); fix it"
            ) from error
        if not inspect.iscoroutinefunction(function):
            return function

    @functools.wraps(function)
    def verify(problem: Problem, completion: str) -> Any:
        if call is None:
            verdict = function(problem, completion)
        else:
            verdict = call(function, problem, completion)
        return finished(verdict) if inspect.iscoroutine(verdict) else verdict

    del verify.__wrapped__  # its signature is ours now
    return verify


def columns_of(problem: Problem) -> Mapping[str, Any]:
    """The row that the problem was read from."""
    row: Mapping[str, Any] = getattr(problem, "columns", {})
    return {"answer": problem.answer, **row}


def as_trl(function: Callable[..., Any], problem: Problem, completion: str) -> Any:
    """A call with lists of one, conversational where the data are."""
    columns = columns_of(problem)
    messages = getattr(problem, "messages", None)
    said = [{"role": "assistant", "content": completion}]
    known = {name: [value] for name, value in columns.items() if name != "prompt"}
    known |= {
        "prompts": [messages or problem.question],
        "completions": [said if messages else completion],
    }
    verdict = called(function, known, columns)
    if inspect.iscoroutine(verdict):
        verdict = finished(verdict)
    if not isinstance(verdict, list | tuple) or len(verdict) != 1:
        raise UserError(
            f"verifier {name_of(function)} returned {verdict!r:.80} for one completion; "
            "return a list with one number for each"
        )
    return verdict[0]


def as_verl(function: Callable[..., Any], problem: Problem, completion: str) -> Any:
    """A call of a ``compute_score``; a score in a dictionary is taken out of it."""
    columns = columns_of(problem)
    known = {
        "data_source": columns.get("data_source", problem.domain),
        "solution_str": completion,
        "ground_truth": problem.answer,
        "extra_info": columns.get("extra_info"),
    }
    verdict = called(function, known, columns)
    if inspect.iscoroutine(verdict):
        verdict = finished(verdict)
    return verdict["score"] if isinstance(verdict, dict) and "score" in verdict else verdict


ELSEWHERE: dict[str, Callable[[Callable[..., Any], Problem, str], Any]] = {
    "completions": as_trl,
    "solution_str": as_verl,
}
"""How to call a function that has a parameter of this name."""


def called(
    function: Callable[..., Any], known: Mapping[str, Any], columns: Mapping[str, Any]
) -> Any:
    """Call with those of the ``known`` arguments that the function takes."""
    parameters = inspect.signature(function).parameters.values()
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in known]
    if missing:
        raise UserError(
            f"verifier {name_of(function)} needs {', '.join(missing)}, which the data do not have; "
            f"their columns are {', '.join(columns)}"
        )
    names = known if everything else [p.name for p in named if p.name in known]
    return function(**{name: known[name] for name in names})


def finished(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What the coroutine returns, also where an event loop is running, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def name_of(verifier: Callable[..., Any]) -> str:
    return getattr(verifier, "__name__", type(verifier).__name__)


def as_grade(verdict: Any) -> float | None:
    """A verdict as a grade from 0 to 1; None if it is none.

    A verifier that abstains by returning None gives nothing, as in TRL. Numbers may be scalars of
    numpy or torch.
    """
    if verdict is None:
        return 0.0
    if hasattr(verdict, "item") and getattr(verdict, "size", 1) != 0:
        with contextlib.suppress(ValueError, RuntimeError, TypeError):  # several numbers
            verdict = verdict.item()
    ok = isinstance(verdict, bool | int | float) and 0 <= verdict <= 1
    return float(verdict) if ok else None  # NaN is no grade either
