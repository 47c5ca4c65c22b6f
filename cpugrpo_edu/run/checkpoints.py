"""List the checkpoints of a run, and delete old ones, but never the last good one."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cpugrpo_edu.errors import UserError

MARK = "complete.json"
"""Written last into a checkpoint within a stage, so where it is, everything else is too."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder to resume from; ``kind`` is "stage" (after one) or "step" (within one)."""

    kind: str
    name: str
    path: Path
    size: int
    fault: str
    """Why it cannot be used; empty when it is good."""

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "path": str(self.path),
            "bytes": self.size,
            "fault": self.fault,
        }


def list_checkpoints(run: str | Path) -> list[Checkpoint]:
    """Every checkpoint of a run, oldest first. The final ``model`` is not a checkpoint."""
    run = Path(run)
    if not (run / "state.json").exists():
        raise UserError(f"{run} holds no run (no state.json); give the output folder of a run")
    # Only folders with names that we give: links are not followed, other files not touched.
    stages = sorted(_numbered(run / "stages", "*-*", 0))
    steps = sorted(
        (stage, step, path)
        for stage, inner in _numbered(run / "checkpoints", "*", 0)
        for step, path in _numbered(inner, "checkpoint-*", 1)
    )
    found = [_look("stage", path.name, path) for _, path in stages]
    found += [_look("step", f"stage {stage}, step {step}", path) for stage, step, path in steps]
    return found


def prune(run: str | Path, keep: int = 1, *, dry_run: bool = False) -> list[Checkpoint]:
    """Delete all but the newest ``keep`` good checkpoints of each kind; return those deleted.

    Damaged ones go as well. The newest good one of each kind always stays, because a run
    resumes from the end of a stage and a step within the next. ``dry_run`` deletes nothing.
    Do not use it while the run is running.
    """
    if keep < 1:
        raise UserError(f"keep is {keep}; give at least 1: the last good checkpoint always stays")
    found = list_checkpoints(run)
    kept: list[Checkpoint] = []
    for kind in ("stage", "step"):
        kept += [c for c in found if c.kind == kind and not c.fault][-keep:]
    if not kept and found:
        raise UserError(
            f"no checkpoint of {run} is good ({found[-1].name}: {found[-1].fault}); "
            "nothing was deleted"
        )
    doomed = [c for c in found if c not in kept]
    if not dry_run:
        for checkpoint in doomed:
            shutil.rmtree(checkpoint.path)
    return doomed


def _numbered(folder: Path, pattern: str, part: int) -> list[tuple[int, Path]]:
    """Folders named with a number, such as ``1-basic`` (part 0) or ``checkpoint-12`` (part 1)."""
    return [
        (int(path.name.split("-")[part]), path)
        for path in folder.glob(pattern)
        if path.is_dir() and not path.is_symlink() and path.name.split("-")[part].isdecimal()
    ]


def _look(kind: str, name: str, path: Path) -> Checkpoint:
    files = [file for file in path.rglob("*") if file.is_file()]
    return Checkpoint(kind, name, path, sum(f.stat().st_size for f in files), _fault(path, kind))


def _fault(path: Path, kind: str) -> str:
    """What is wrong with a checkpoint: no weights, a damaged file, or not complete; else ""."""
    weights = list(path.rglob("*.safetensors"))
    if not weights:
        return "no weights"
    if kind == "step" and not (path / MARK).exists():
        return "not complete"
    for file in weights:
        try:
            with safe_open(file, "pt") as opened:  # checks the header against the file's length
                opened.keys()
        except (OSError, SafetensorError) as error:
            return f"{file.name} is damaged ({error})"
    for file in path.rglob("*.json"):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{file.name} is damaged ({error})"
    return ""
