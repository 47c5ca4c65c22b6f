"""One option for each field of ``RunConfig``: its flag, type, default and help."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer import Option

from cpugrpo_edu.engine.memory import parse_bytes
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.machine import GIB
from cpugrpo_edu.run.config import RunConfig, flag_of


def with_settings(function: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's ``**settings`` by one option for each field.

    The default of every option is None, "not given", so that a profile can set it; --help shows
    the field's own.
    """
    signature = inspect.signature(function, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    hints = get_type_hints(RunConfig)
    for field in fields(RunConfig):
        flag = flag_of(field.name)
        kind, convert = reading(field.name, hints[field.name])
        option = Option(
            f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
            help=field.metadata["help"],
            show_default=shown(field.default),
            callback=convert,
        )
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, option],
            )
        )
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


def reading(name: str, hint: Any) -> tuple[type, Callable[[str | None], Any] | None]:
    """The type that typer reads, and what makes the field's value of the text it reads."""
    if name == "memory_budget_gib":
        return str, reader(name, lambda text: parse_bytes(text) / GIB)
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        return str, reader(
            name, comma_names if kind is str else lambda text: three_numbers(text, kind)
        )
    for kind in (bool, int, float):
        if kind in (hint, *get_args(hint)):
            return kind, None
    return str, None


def reader(name: str, read: Callable[[str], Any]) -> Callable[[str | None], Any]:
    """Read what is given; a mistake in it names the flag."""

    def given(text: str | None) -> Any:
        try:
            return None if text is None else read(text)
        except UserError as error:
            raise UserError(f"{flag_of(name)}: {error}") from error

    return given


def shown(default: Any) -> str | bool:
    """A default as the user would type it; False where there is none to show."""
    if default is None:
        return False
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def comma_names(text: str) -> tuple[str, ...]:
    """Read ``lists, parity``; an empty name stays, for the check of the names to refuse."""
    return tuple(name.strip() for name in text.split(","))


def three_numbers(text: str, kind: type) -> tuple[Any, Any, Any]:
    """Read ``16`` or ``16,16,16`` into three numbers."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise UserError(f"cannot read {text!r}; give one number or three, such as 16,16,16")
    return values[0], values[1], values[2]
