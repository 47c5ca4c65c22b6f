"""How far a run has come (``state.json``), and what the parts of a run share."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cpugrpo_edu.data import Problem
from cpugrpo_edu.engine import ranks
from cpugrpo_edu.engine.memory import PeakMemory
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.ewc import Anchor
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.files import write_text
from cpugrpo_edu.record.machine import GIB
from cpugrpo_edu.record.metrics import MetricsLog
from cpugrpo_edu.rewards import Reward
from cpugrpo_edu.run.config import RunConfig, plain
from cpugrpo_edu.run.pause import Control, Interrupted
from cpugrpo_edu.show.progress import ProgressDisplay


@dataclass
class RunState:
    """What ``state.json`` holds. With the folder of the last stage, a run resumes from it."""

    config: dict[str, Any]
    stages: list[dict[str, Any]]
    """A row for each complete stage, as the record shows it."""
    seconds: dict[str, float]
    """Spent on "load", "train", "evaluate" and "report"."""
    seconds_before: float
    """From the run's start to the last save, not counting the time between two processes."""
    peak_rss_before: int = 0
    fingerprint: str = ""
    """Of the weights after the last complete stage."""
    fingerprint_first: str = ""
    """Of the weights before any training."""
    signals: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By stage, what was sampled before it, see `signal_check.Signal`."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Fingerprints of the data, the verifier and the prompt, see `run.inputs`."""
    guard: dict[str, int] = field(default_factory=dict)
    """Steps in a row that `engine.guard.Guard` had counted when the last stage ended."""
    rejudged: list[str] = field(default_factory=list)
    """When the verifier was replaced, and the evaluations judged again."""

    @classmethod
    def new(cls, config: RunConfig) -> RunState:
        seconds = dict.fromkeys(("load", "train", "evaluate", "report"), 0.0)
        return cls(plain(config), stages=[], seconds=seconds, seconds_before=0.0)


@dataclass
class Session:
    """One run in this process: everything that was known before the model was loaded."""

    config: RunConfig
    output: Path
    state: RunState
    rewards: list[Reward]
    problems: list[list[Problem]]
    """The training problems of each stage."""
    protected: list[Problem]
    """What the Fisher information of the untrained model is estimated on."""
    held_out: list[Problem]
    threads: dict[str, Any]
    display: ProgressDisplay
    control: Control
    peak: PeakMemory
    started: float
    """When this process began, or last saved the state (Unix time)."""
    report_to: str
    rejudge: bool = False
    """Whether the verifier changed, and the evaluations so far are to be judged by the new one."""

    @property
    def memory_limit(self) -> int | None:
        """Bytes this process may hold in all: the processes of a machine share the budget."""
        budget = self.config.memory_budget_gib
        return None if budget is None else int(budget * GIB) // ranks.local_size()

    def stage_folder(self, index: int) -> Path:
        return stage_folder(self.output, self.config, index)

    def checkpoints_folder(self, index: int) -> Path:
        return self.output / "checkpoints" / f"{index + 1}"

    def seconds(self) -> float:
        """Since the run began, not counting the time between an interruption and the resume."""
        return time.time() - self.started + self.state.seconds_before

    def peak_rss_bytes(self) -> int:
        """The largest so far, in earlier processes of this run too."""
        return max(self.peak.peak_rss_bytes, self.state.peak_rss_before)

    def save_state(self) -> None:
        self.state.seconds_before = self.seconds()
        self.state.peak_rss_before = self.peak_rss_bytes()
        self.started = time.time()
        if ranks.is_main():
            write_text(self.output / "state.json", json.dumps(asdict(self.state), indent=1))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block as ``state.seconds[name]`` and save the state, also if it was stopped."""
        begun = time.perf_counter()

        def save() -> None:
            self.state.seconds[name] += time.perf_counter() - begun
            self.save_state()

        try:
            yield
        except Interrupted:
            save()
            raise
        save()


@dataclass
class Learner:
    """The model in training, and what belongs to it."""

    policy: Policy
    anchor: Anchor | None
    """What EWC protects; None before the first stage is consolidated."""
    first: dict[str, Tensor]
    """A snapshot of the trainable weights before any stage."""
    checkpointing: bool
    """Whether activations are recomputed in the backward pass."""
    available: int
    """Bytes of memory that were free before loading."""
    metrics: MetricsLog
    released: int = 0
    """Bytes given back to the system after stages."""


def stage_folder(output: Path, config: RunConfig, index: int) -> Path:
    """Where the model after a stage is kept."""
    return output / "stages" / f"{index + 1}-{config.stages[index].name}"


def load_state(output: Path, config: RunConfig) -> RunState:
    """The state to resume from. UserError if the run in ``output`` cannot be resumed."""
    path = output / "state.json"
    if not path.exists():
        raise UserError(
            f"{output} holds no run to resume (no state.json); "
            "give the output folder of an interrupted run"
        )
    try:
        state = RunState(**json.loads(path.read_text(encoding="utf-8")))
        begun, done = dict(state.config), [str(stage["name"]) for stage in state.stages]
        if done != [stage.name for stage in config.stages][: len(done)]:
            raise ValueError("its stages are not those of this run")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not the state of a run ({type(error).__name__}: {error}); "
            "begin again with another --output"
        ) from error
    wanted = plain(config)
    different = sorted(name for name in wanted if begun.get(name) != wanted[name])
    if different:
        raise UserError(
            f"{output} was begun with other settings ({', '.join(different)}); "
            "resume with the same ones, or give another --output"
        )
    if (output / "record.json").exists():
        raise UserError(f"the run in {output} is complete; there is nothing to resume")
    if done and not (folder := stage_folder(output, config, len(done) - 1)).is_dir():
        raise UserError(
            f"{folder}, with the model after stage {done[-1]!r}, is missing; "
            "begin again with another --output"
        )
    return state
