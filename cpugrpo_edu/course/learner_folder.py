"""Give learners a folder of their own, with chapters and records, and open JupyterLab there."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cpugrpo_edu.course.learner_files import learner_files
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import replacing, write_text

COPIED = ".cpugrpo-lab.json"
"""The learner's folder keeps here, for each file, the SHA-256 of ours that it was last offered."""

JUPYTERLAB = [sys.executable, "-m", "jupyterlab"]


@dataclass
class Filled:
    """What was done with each file that is not already the same, by its name."""

    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    """The learner's own: changed, or refused to have replaced."""
    waiting: list[str] = field(default_factory=list)
    """The learner's own, with a newer one of ours that nobody could be asked about."""


def fill(folder: Path, ask: Callable[[str], bool] | None) -> Filled:
    """Copy the learners' files into ``folder``; what the learner changed stays.

    Where we bring another version of a changed file than before, ``ask`` says whether it may
    replace the learner's; None keeps the learner's and asks the next time. Raises UserError if
    the folder cannot be written.
    """
    source, filled = project_files(), Filled()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        offered = read_offered(folder / COPIED)
        for name in learner_files(source):
            ours, here, before = digest(source / name), digest(folder / name), offered.get(name)
            changed = here not in (None, ours, before)
            if changed and ours != before:
                if ask is None:
                    filled.waiting.append(name)
                    continue
                changed = not ask(name)
            if changed:
                filled.kept.append(name)
            elif here != ours:
                with replacing(folder / name) as temporary:
                    temporary.write_bytes((source / name).read_bytes())
                filled.written.append(name)
            offered[name] = str(ours)
        write_text(folder / COPIED, json.dumps(offered, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot copy the chapters to {folder} ({error.strerror or error}: {error.filename}); "
            "give another folder: cpugrpo lab DIR"
        ) from error
    return filled


def project_files() -> Path:
    """The folder that holds the learners' files: inside an installed wheel, or the checkout."""
    package = Path(__file__).resolve().parents[1]
    for place in (package / "_lab", package.parent):
        if learner_files(place):
            return place
    raise UserError(
        f"no chapters are installed with {package}; install the wheel of a release, "
        "or work in a copy of the repository"
    )


def read_offered(path: Path) -> dict[str, str]:
    """What was offered before; nothing if that is unknown, and then any change is asked about."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def digest(path: Path) -> str | None:
    """SHA-256 of a file, None where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def check_jupyterlab() -> None:
    if importlib.util.find_spec("jupyterlab") is None:
        raise UserError(
            "JupyterLab is not installed; install it with: pip install 'cpugrpo-edu[notebooks]', "
            "or add --no-start to copy the chapters only"
        )


def open_jupyterlab(folder: Path, options: list[str]) -> int:
    """Run JupyterLab in ``folder``, its file list at the chapters; returns its exit code.

    Ctrl-C is JupyterLab's to answer: it asks whether to stop, and we wait for it.
    """
    chapters = folder.resolve() / "notebooks"
    command = [*JUPYTERLAB, f"--FileContentsManager.preferred_dir={chapters}", *options]
    server = subprocess.Popen(command, cwd=folder)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return server.wait()
    finally:
        signal.signal(signal.SIGINT, previous)
