"""One option for each field of a configuration: its flag, type, default and help."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer import Option

from cpugrpo_edu.engine.memory import parse_bytes
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.machine import GIB
from cpugrpo_edu.run.config import CHAT_MODEL, RunConfig, flag_of

Command = Callable[..., None]


def settings_of(kind: Any) -> Callable[[Command], Command]:
    """Replace a command's ``**settings`` by one option for each field of ``kind``.

    The default of every option is None, "not given", so that a profile or the kind of model can
    set it; --help shows the field's own, and that of a run on a chat model where it is another.
    """
    hints, others = get_type_hints(kind), CHAT_MODEL if kind is RunConfig else {}
    options = [option(field, hints[field.name], others) for field in fields(kind)]

    def replace(function: Command) -> Command:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*own, *options]
        )
        return function

    return replace


def option(field: Field[Any], hint: Any, others: Mapping[str, Any]) -> inspect.Parameter:
    """The option for one field, as a parameter that typer reads."""
    flag = flag_of(field.name)
    kind, convert = reading(field.name, hint)
    default = shown(field.default)
    if field.name in others:
        other = f"chat model: {shown(others[field.name])}"
        default = f"{default}; {other}" if default else other
    shape = Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        help=field.metadata["help"],
        show_default=default,
        callback=convert,
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, shape],
    )


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
    if default in (None, ()):
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


with_settings = settings_of(RunConfig)
"""The options of a run."""
