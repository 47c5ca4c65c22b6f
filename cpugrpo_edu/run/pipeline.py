"""The whole run: evaluate, then three stages of GRPO, each consolidated and evaluated.

    record = run(RunConfig(seed=1), "runs/first")

Everything that was measured is in the returned record and in ``record.json``. The
state after every stage is on disk, so an interrupted run continues with ``resume``.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cpugrpo_edu.engine import ranks
from cpugrpo_edu.engine.memory import PeakMemory, release_memory
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.load import save_policy
from cpugrpo_edu.record.files import replacing, write_failure, write_text
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.run.anchors import save_anchor
from cpugrpo_edu.run.config import RunConfig, plain
from cpugrpo_edu.run.consolidate import consolidate, protect_start
from cpugrpo_edu.run.model_card import WITH_ITS_BASE, WITH_TRANSFORMERS, model_card
from cpugrpo_edu.run.pause import Control, Interrupted, stop_on_interrupt
from cpugrpo_edu.run.prepare import load, prepare
from cpugrpo_edu.run.results import measure, processes, results_of
from cpugrpo_edu.run.signal_check import check_signal, show_answer
from cpugrpo_edu.run.stage import begin_stage, end_stage
from cpugrpo_edu.run.state import Learner, Session
from cpugrpo_edu.show.progress import ProgressDisplay
from cpugrpo_edu.show.report import write_report


def run(
    config: RunConfig,
    output: str | Path,
    *,
    resume: bool = False,
    display: ProgressDisplay | None = None,
    started: float | None = None,
    control: Control | None = None,
    report_to: str = "none",
    rejudge: bool = False,
) -> RunRecord:
    """Do the whole run in the folder ``output`` and return its record.

    ``started`` is when the clock began (Unix time), if imports are to count; ``control``
    pauses and stops from another thread; ``report_to`` is one of ``TRACKERS``;
    ``rejudge`` lets a resumed run have another verifier, see `run.inputs`. Raises
    UserError for bad input, and Interrupted after Ctrl-C or a stop; then ``resume=True`` with
    the same configuration continues. Several processes (see ``engine.ranks``) share the work;
    rank 0 writes, and each returns the record.
    """
    started = started or time.time()
    ranks.join()
    with writing_to(output):
        with PeakMemory() as peak, display or ProgressDisplay(quiet=True) as shown:
            session = prepare(
                config,
                Path(output),
                resume,
                display=shown,
                control=control or Control(),
                peak=peak,
                started=started,
                report_to=report_to,
                rejudge=rejudge,
            )
            learner = load(session)
            done = len(session.state.stages)
            if not done:  # at once, not after an evaluation that may take minutes
                with session.phase("train"):
                    check_signal(session, learner, 0)
                    protect_start(session, learner)
            measure(session, learner, "before")
            # The process that trained the last one may have ended before measuring it.
            if done and config.stages[done - 1].steps:
                measure(session, learner, f"after {config.stages[done - 1].name}")
            for index in range(done, len(config.stages)):
                stage = config.stages[index]
                with session.phase("train"):
                    check_signal(session, learner, index)
                    show_answer(session, learner, index, "before training")
                    training = begin_stage(session, learner, index)
                    if stage.steps:
                        with stop_on_interrupt(session.control):
                            training.trainer.train(resume_from_checkpoint=training.checkpoint)
                    row = end_stage(session, learner, training)
                    row |= consolidate(session, learner, index)
                    save_stage(session, learner, index, row)
                    show_answer(session, learner, index, "after training")
                if ranks.agree(session.control.stopping):  # asked for in its last step
                    raise Interrupted(f"stopped after stage {stage.name!r}")
                if stage.steps:
                    measure(session, learner, f"after {stage.name}")
            results = ranks.on_main(lambda: finish(session, learner))
        results |= {"peak_rss_bytes": session.peak_rss_bytes(), "cpu_percent": peak.cpu_percent}
        if ranks.size() > 1:
            results["distributed"] = processes(session)
        return ranks.on_main(lambda: write_record(session, learner, results))


@contextmanager
def writing_to(
    output: str | Path, go_on: str = "run the same command with --resume"
) -> Iterator[None]:
    """End with one sentence when a disk is full or read-only; the last good state stays."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = write_failure(error)
        if reason is None:
            raise
        raise UserError(
            f"cannot write in {output}: {reason}; what was saved before is intact: make room or "
            f"make it writable, then {go_on}"
        ) from error


def save_stage(session: Session, learner: Learner, index: int, row: dict[str, Any]) -> None:
    """Save the model and the anchor of a complete stage, whose checkpoints then go."""

    def save() -> None:
        with replacing(session.stage_folder(index)) as folder:
            save_policy(learner.policy, folder)
            if learner.anchor is not None:
                save_anchor(learner.anchor, folder / "anchor.safetensors")
        shutil.rmtree(session.checkpoints_folder(index), ignore_errors=True)

    ranks.on_main(save)
    session.state.stages.append(row)
    if session.config.cleanup:
        learner.released += release_memory()


def finish(session: Session, learner: Learner) -> dict[str, Any]:
    """The last evaluations, and the final model in ``model``."""
    results = results_of(session, learner)
    with replacing(session.output / "model") as folder:
        save_policy(learner.policy, folder)
    return results


def write_record(session: Session, learner: Learner, results: dict[str, Any]) -> RunRecord:
    """The record and the report; from then on the run is complete."""
    record = new_record("run", plain(session.config), results, session.config.seed)
    seconds = record.results["seconds"]
    seconds["total"] = session.seconds()  # as the report shows it: without its own writing
    begun = time.perf_counter()
    write_report(record, session.output)
    seconds["report"] = time.perf_counter() - begun
    seconds["total"] = session.seconds()
    model = session.output / "model"
    load_with = WITH_ITS_BASE if session.config.frozen else WITH_TRANSFORMERS
    write_text(model / "README.md", model_card(record, load_with))
    record.save(session.output / "record.json")
    learner.metrics.close()
    shutil.rmtree(session.output / "checkpoints", ignore_errors=True)
    return record
