"""What the studies share: finished pieces kept on disk, runs that resume, records.

A loop over the cells of a grid, each kept when it is done, is all the sweep runner there is.
Optuna's grid sampler would choose the same cells in the same order; runs resume within a cell
here, which a trial does not, and the analysis is paired by seed, which it does not know.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpugrpo_edu.data import Evaluation
from cpugrpo_edu.engine.hardware import describe_machine
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import check_output_folder, replacing
from cpugrpo_edu.record.run_record import RunRecord

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Progress for who asked for none."""


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
    """One factor of the ablations."""


@dataclass(frozen=True)
class Outcome:
    """A study's record, and its results item by item, which go into a file beside it."""

    record: RunRecord
    items: dict[str, Any] | None = None

    def save(self, path: str | Path) -> list[Path]:
        """Write ``NAME.json`` and, where there are items, ``NAME.items.json.gz``."""
        path = Path(path)
        check_output_folder(path.parent)
        saved = []
        if self.items is not None:
            saved.append(write_packed(path.with_name(f"{path.stem}.items.json.gz"), self.items))
        return [self.record.save(path), *saved]


def write_packed(path: Path, data: Any) -> Path:
    """JSON, compressed; without a time stamp, so that equal data give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, separators=(",", ":"), sort_keys=True)
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


def read_packed(path: str | Path) -> Any:
    """What ``write_packed`` wrote. UserError where it cannot be read."""
    try:
        return json.loads(gzip.decompress(Path(path).read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read {path} ({error}); run the study again") from error


class Pieces:
    """The finished pieces of a study, so that an interrupted one goes on where it was.

    They lie in a folder named after everything that decides them: other code, another
    processor or other settings have a folder of their own, and nothing is mixed.
    """

    def __init__(self, work: Path, name: str, decides: Mapping[str, Any]):
        text = json.dumps(decides, sort_keys=True, default=str)
        self.folder = work / name / hashlib.sha256(text.encode()).hexdigest()[:12]
        check_output_folder(self.folder)

    def once(self, name: str, call: Callable[[], Any]) -> Any:
        """``call()``, or what it gave before; its result must be plain JSON."""
        path = self.folder / "pieces" / f"{name.replace('/', '_').replace(' ', '_')}.json.gz"
        if path.exists():
            try:
                return read_packed(path)
            except UserError:
                path.unlink()  # half a file: measured again
        result = json.loads(json.dumps(call()))
        write_packed(path, result)
        return result


def decided_by(setting: Setting, **more: Any) -> dict[str, Any]:
    """What a piece of a study hangs on: processor, size, and ``more``."""
    machine = describe_machine()
    return {
        "machine": f"{machine.cpu}, {machine.usable_cores} usable cores",
        "reduced": setting.reduced,
        **more,
    }


def recorded_runs() -> list[RunRecord]:
    """The default runs in the records' folder."""
    from cpugrpo_edu.show.text import records_folder

    return [RunRecord.load(path) for path in sorted(records_folder().glob("run-seed*.json"))]


def expected(runs: int, per_cell: int) -> str:
    """``, about 40 min at the recorded speed``, from the recorded default runs; else nothing."""
    seconds = []
    for record in recorded_runs():
        took, share = record.results["seconds"], per_cell / record.config["per_cell"]
        seconds.append(took["load"] + took["train"] + share * took["evaluate"])
    if not seconds:
        return ""
    return f", about {runs * sum(seconds) / len(seconds) / 60:.0f} min at the recorded speed"


def run_or_resume(
    config: Any, folder: Path, say: Say, keep: tuple[str, ...] = (), apart: bool = False
) -> RunRecord:
    """``pipeline.run`` in ``folder``, or the record of the run that is there, or its rest.

    Of a finished run only the record, the metrics, the evaluations and ``keep`` stay. ``apart``
    gives it a process of its own, so that its peak memory is its own.
    """
    if (folder / "record.json").exists():
        return RunRecord.load(folder / "record.json")
    if not (folder / "state.json").exists():  # broken off before there was anything to go on from
        shutil.rmtree(folder, ignore_errors=True)
    if apart:
        run_in_process(asdict(config), folder)
        record = RunRecord.load(folder / "record.json")
    else:
        record = run_here(config, folder)
    for path in folder.iterdir():
        if path.is_dir() and path.name not in ("evaluations", *keep):
            shutil.rmtree(path, ignore_errors=True)
    for name in ("report.html", "report.md"):
        (folder / name).unlink(missing_ok=True)
    say(f"  {record.results['seconds']['total']:.0f} s")
    return record


def run_here(config: Any, folder: Path) -> RunRecord:
    from cpugrpo_edu.run.pipeline import Interrupted, run
    from cpugrpo_edu.show.progress import ProgressDisplay

    resume = (folder / "state.json").exists()
    try:
        return run(config, folder, resume=resume, display=ProgressDisplay(quiet=True))
    except Interrupted as error:
        raise KeyboardInterrupt(str(error)) from error


def run_in_process(config: dict[str, Any], folder: Path) -> None:
    """The same in a new process. Ctrl-C reaches it as well: it saves, and is waited for."""
    task = json.dumps({"config": config, "folder": str(folder.absolute())})
    command = [sys.executable, "-c", "from cpugrpo_edu.lab.studies.common import serve; serve()"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, errors = process.communicate(task)
    except KeyboardInterrupt:
        process.communicate()
        raise
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode:
        last = [line for line in errors.splitlines() if line.strip()][-1:] or ["no message"]
        raise UserError(f"a run of the study failed in {folder}: {last[0]}")


def serve() -> None:
    """What the new process does: one run, told on stdin."""
    from cpugrpo_edu.run.config import RunConfig

    task = json.loads(sys.stdin.read())
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in task["config"].items()
    }
    try:
        run_here(RunConfig(**given), Path(task["folder"]))
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        sys.exit(str(error))


def last_evaluation(record: RunRecord, folder: Path) -> dict[str, Any]:
    """The last evaluation of a run in ``folder``, packed."""
    from cpugrpo_edu.record.evaluations import evaluation_path, load_evaluation

    label = record.results["evaluations"][-1]["label"]
    return packed_evaluation(load_evaluation(evaluation_path(folder, label)))


def packed_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation without its texts, in which nearly all of its size lies."""
    kept = asdict(evaluation)
    kept.pop("completions")
    return kept


def unpacked_evaluation(data: Mapping[str, Any]) -> Evaluation:
    return Evaluation.from_json({**data, "completions": [""] * len(data["item_ids"])})


def item_table(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Evaluations of the same problems, the problems named once.

    ``{"item_ids", "domains", "difficulties", "answers": {label: {"correct": "0110...",
    "tokens": [...]}}}``.
    """
    if not evaluations:
        return {"item_ids": [], "domains": [], "difficulties": [], "answers": {}}
    first = next(iter(evaluations.values()))
    for label, each in evaluations.items():
        if each["item_ids"] != first["item_ids"]:
            raise ValueError(f"{label} holds other problems than the rest")
    answers = {
        label: {
            "correct": "".join("1" if right else "0" for right in each["correct"]),
            "tokens": each["tokens"],
        }
        for label, each in evaluations.items()
    }
    return {key: first[key] for key in ("item_ids", "domains", "difficulties")} | {
        "answers": answers
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for looking at all of them (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def paired_over_seeds(base: Sequence[float], arm: Sequence[float]) -> dict[str, Any]:
    """Mean of arm - base over seeds with its t interval and p-value; no interval for one seed."""
    from scipy import stats

    from cpugrpo_edu.record.stats import over_seeds

    differences = [b - a for a, b in zip(base, arm, strict=True)]
    found: dict[str, Any] = {
        "n": len(differences),
        "difference": sum(differences) / len(differences),
        "low": None,
        "high": None,
        "p_value": None,
    }
    if len(differences) < 2:
        return found
    summary = over_seeds(differences)
    if summary.sd == 0:  # the t statistic is 0/0, or infinite
        p = 1.0 if summary.mean == 0 else 0.0
    else:
        p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return found | {"low": summary.low, "high": summary.high, "p_value": p}


def signed(row: Mapping[str, Any], scale: float = 100) -> str:
    """``+1.2 (-0.3 to +2.7)``, the interval left out where there is none."""
    text = f"{scale * row['difference']:+.1f}"
    if row.get("low") is None:
        return f"{text} (no interval)"
    return f"{text} ({scale * row['low']:+.1f} to {scale * row['high']:+.1f})"
