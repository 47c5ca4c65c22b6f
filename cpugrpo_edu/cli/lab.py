"""``cpugrpo lab``: the chapters in a folder of the learner's own, opened in JupyterLab."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cpugrpo_edu.cli.command import Call, app, command
from cpugrpo_edu.errors import UserError


@command(app)
def lab(
    call: Call,
    folder: Annotated[Path, typer.Argument(help="Your folder.")] = Path("cpugrpo-lab"),
    options: Annotated[
        list[str] | None, typer.Argument(help="Options for JupyterLab, after --.")
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open no browser.")] = False,
    no_start: Annotated[bool, typer.Option("--no-start", help="Only copy.")] = False,
) -> None:
    """Copy the chapters and records into a folder of your own and open JupyterLab there.

    Files that you changed stay as they are; when a new version of the package brings another
    one, you are asked. To get an original back, delete yours and repeat the command.

    Example: `cpugrpo lab my-work`, or `cpugrpo lab my-work --no-browser -- --port 9000`
    """
    from cpugrpo_edu.course import learner_folder

    if str(folder).startswith("-"):
        raise UserError(f"name the folder before JupyterLab's options: cpugrpo lab DIR -- {folder}")

    if not no_start:
        learner_folder.check_jupyterlab()
    filled = learner_folder.fill(folder, ask if sys.stdin.isatty() else None)
    lines = [f"Copied {len(filled.written)} files to {folder}"]
    if filled.kept:
        lines.append(f"Kept yours, which you changed: {', '.join(filled.kept)}")
    if filled.waiting:
        lines.append(
            "Kept yours, though there are new versions (run this in a terminal to be asked): "
            + ", ".join(filled.waiting)
        )
    call.give({"folder": str(folder), **asdict(filled)}, *lines)
    if not no_start:
        given = [*(["--no-browser"] if no_browser else []), *(options or [])]
        if code := learner_folder.open_jupyterlab(folder, given):
            raise SystemExit(code)


def ask(name: str) -> bool:
    """Whether a new version may replace the learner's file; Enter says no."""
    return typer.confirm(f"You changed {name}. Replace yours by the new version?", err=True)
