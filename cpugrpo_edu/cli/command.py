"""The app, and what every command has: ``--json``, ``--quiet``, and where its words go."""

from __future__ import annotations

import functools
import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cpugrpo_edu.errors import UserError

# Commands import torch and transformers themselves: --help must answer at once, and the number
# of threads must be set before torch is loaded.


def group(help: str) -> typer.Typer:
    return typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        help=help,
    )


app = group("Learn GRPO by running it: reinforcement learning for language models on a CPU.")

Json = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def within(least: float, most: float = math.inf) -> Callable[..., Any]:
    """A check of an option's value, for ``typer.Option(callback=...)``."""

    def check(option: typer.CallbackParam, value: float | None) -> float | None:
        if value is not None and not (least <= value <= most and value < math.inf):
            allowed = f"at least {least}" + (f" and at most {most}" if most < math.inf else "")
            raise UserError(f"{option.opts[0]} is {value}; give {allowed}")
        return value

    return check


Model = Annotated[str, typer.Option(help="bundled, smollm2, a model folder, or a hub id.")]
PerCell = Annotated[
    int, typer.Option(help="Problems per domain and difficulty.", callback=within(1))
]


@dataclass(frozen=True)
class Call:
    """How a command was called. It prints results to stdout and progress to stderr."""

    as_json: bool
    quiet: bool

    def give(self, data: Any, *shown: str | Table) -> None:
        """Print ``data`` as JSON where the user asked for it, otherwise what is ``shown``."""
        if self.as_json:
            print(json.dumps(data))
            return
        for part in shown:
            if isinstance(part, Table):
                Console().print(part)
            else:
                print(part)

    def say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    filled = Table(*headings, title=title)
    for row in rows:
        filled.add_row(*row)
    return filled


def command(
    parent: typer.Typer, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command of ``parent`` that knows ``--json`` and ``--quiet``.

    They become its first parameter, a :class:`Call`; typer makes the options from the others.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def called(as_json: bool, quiet: bool, **options: Any) -> None:
            function(Call(as_json, quiet), **options)

        _, *own = inspect.signature(function, eval_str=True).parameters.values()
        shared = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for key, kind in (("as_json", Json), ("quiet", Quiet))
        ]
        called.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        parent.command(name)(called)
        return function

    return register
