"""How a study is asked for, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpugrpo_edu.lab.pieces import write_packed
from cpugrpo_edu.lab.worker import silent
from cpugrpo_edu.record.files import check_output_folder
from cpugrpo_edu.record.run_record import RunRecord

Say = Callable[[str], None]

Table = tuple[str, list[str], list[list[str]]]
"""Title, header, rows."""


@dataclass(frozen=True)
class Setting:
    """How a study is run. ``work`` keeps finished pieces, ``cache`` models that others reuse."""

    reduced: bool = False
    work: Path = Path("runs/studies")
    cache: Path | None = None
    say: Say = silent
    models: tuple[str, ...] = ()
    """Folders or hub ids of further models, for the studies that take them."""
    seeds: int | None = None
    """Training seeds, instead of the study's own number."""
    only: str | None = None
    """One factor of the ablations, or one arm of the real model's study."""


@dataclass(frozen=True)
class StudyResult:
    """A study's record, and its results item by item, which go into a file beside it."""

    record: RunRecord
    items: dict[str, Any] | None = None

    def save(self, path: str | Path) -> list[Path]:
        """Write ``NAME.json`` and, if there are items, ``NAME.items.json.gz``."""
        path = Path(path)
        check_output_folder(path.parent)
        saved = []
        if self.items is not None:
            saved.append(write_packed(path.with_name(f"{path.stem}.items.json.gz"), self.items))
        return [self.record.save(path), *saved]
