"""What a command did and measured, as one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import write_text
from cpugrpo_edu.record.machine import describe_machine, git_commit, versions


@dataclass
class RunRecord:
    """What a command did and measured: the only source of numbers in prose.

    ``kind`` names the command ("run", "bench-b1", ...). ``config`` is what was
    asked, ``results`` what came out, ``machine`` and ``versions`` where.
    """

    kind: str
    created: str
    seed: int
    commit: str
    machine: dict[str, Any]
    versions: dict[str, str]
    config: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write as JSON; a crash leaves the old record or the new one, never half of one."""
        return write_text(path, json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        try:
            record = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
            for name in ("kind", "created", "commit"):
                if not isinstance(getattr(record, name), str):
                    raise TypeError(f"{name!r} is not a text")
            for name in ("machine", "versions", "config", "results"):
                if not isinstance(getattr(record, name), dict):
                    raise TypeError(f"{name!r} is not an object")
            return record
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"cannot read a run record from {path}: {error}; "
                "give the record.json that a cpugrpo command wrote"
            ) from error


def new_record(
    kind: str, config: dict[str, Any], results: dict[str, Any], seed: int = 0
) -> RunRecord:
    """A record of what was just measured: date, commit, versions and machine filled in.

    ``config`` and ``results`` are kept as JSON gives them back.
    """
    return RunRecord(
        kind=kind,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=seed,
        commit=git_commit(),
        machine=describe_machine().to_json(),
        versions=versions(),
        config=json.loads(json.dumps(config)),
        results=json.loads(json.dumps(results)),
    )
