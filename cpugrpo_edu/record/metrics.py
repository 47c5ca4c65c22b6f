"""The metrics of a run on disk: one JSON object for each optimizer step, one object a line.

A file of lines survives a crash, can be followed while it grows, and is what the report plots
afterwards.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import write_text

Metrics = Mapping[str, Any]
"""One step: "stage", "step", "global_step", "reward", "kl", ...; all of them optional."""


class MetricsLog:
    """Append-only JSON lines; the process may be killed at any moment.

    Every line reaches the operating system as it is written, so a killed process loses at most
    the line in progress, and reopening removes what is left of that one. ``time`` (Unix,
    seconds) is added where it is missing; NaN and infinity, which JSON lacks, become null.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_partial_line()
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def _drop_partial_line(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)

    def write(self, row: Metrics) -> None:
        """Append one step; values are anything JSON, or anything ``float()`` takes."""
        row = {"time": time.time(), **row}
        plain = json.loads(json.dumps(row, default=float), parse_constant=lambda _: None)
        self._file.write(json.dumps(plain) + "\n")

    def forget_after(self, global_step: int) -> None:
        """Keep one row for each step up to ``global_step``: the run repeats the later ones."""
        kept = [row for row in read_metrics(self.path) if row.get("global_step", 0) <= global_step]
        if len(kept) == self.path.read_bytes().count(b"\n"):
            return  # nothing to drop; os.devnull, where ranks after the first write, ends here
        self.close()
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All steps of a metrics file, in order, without a partial last line.

    A resumed run repeats the steps after its checkpoint: of several rows with the same
    (stage, step) the last one counts. Raises UserError if there is no such file, or if a line
    before the last is not a JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read metrics from {path}: {error.strerror}; give a run's metrics.jsonl"
        ) from error
    rows: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(
                f"line {number} of {path} is not a JSON object; delete the line or the file"
            ) from error
        rows[(str(row.get("stage")), str(row["step"])) if "step" in row else number] = row
    return list(rows.values())
