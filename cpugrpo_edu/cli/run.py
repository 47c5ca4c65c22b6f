"""``cpugrpo run``: its options are the fields of ``RunConfig``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from typer import Option

from cpugrpo_edu.cli.command import Call, app, command, within
from cpugrpo_edu.cli.settings import with_settings
from cpugrpo_edu.engine import hardware
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.machine import usable_cores
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.run.config import RunConfig, check_settings, config_for

PROFILES: dict[str, dict[str, Any]] = {
    "balanced": {},
    # recompute activations only where they would not fit
    "fast": {"checkpointing": "auto"},
    # leave the machine to others: one thread, little memory at a time, checkpoints more often
    "frugal": {"threads": 1, "checkpointing": "on", "micro_batch": 4, "save_minutes": 0.5},
}
"""Settings of ``cpugrpo run --profile``; an option given beside it takes precedence."""


@command(app)
@with_settings
def run(
    call: Call,
    context: typer.Context,
    output: Annotated[Path | None, Option(help="New folder; default: runs/TIME-seedN.")] = None,
    resume: Annotated[bool, Option(help="Resume the run in --output.")] = False,
    rejudge: Annotated[
        bool, Option("--rejudge", help="Resume with a changed verifier: judge all again by it.")
    ] = False,
    profile: Annotated[
        str, Option(help="balanced, fast (more memory) or frugal (less, one thread).")
    ] = "balanced",
    nproc: Annotated[
        int, Option(help="Processes that share each step's prompts.", callback=within(1, 1024))
    ] = 1,
    report_to: Annotated[str, Option(help="none, tensorboard, wandb or mlflow.")] = "none",
    **settings: Any,
) -> None:
    """Train a model with GRPO in three stages and measure what changed.

    Examples:

    `cpugrpo run` trains and evaluates the bundled model in a minute or two.

    `cpugrpo run --scenario letters` shows in seconds how training on five letters erases three and
    four, and what EWC keeps; with `--ewc 0`, what is lost without it.

    `cpugrpo run --scenario sums` teaches a real chat model, SmolLM2-135M, to add, in a minute or
    two; it is downloaded first.

    `cpugrpo run --seed 1 --ewc 0.1 --output runs/ewc`

    `cpugrpo run --model smollm2 --steps 5 --per-cell 20` tries a chat model. All models but ours
    have other defaults, marked *chat model* below, with which training takes half an hour or more.

    `cpugrpo run --model Qwen/Qwen2-0.5B-Instruct --data openai/gsm8k --max-completion 200`
    """
    if profile not in PROFILES:
        raise UserError(f"unknown --profile {profile!r}; allowed are {', '.join(PROFILES)}")
    if resume and output is None:
        raise UserError("--resume needs the --output folder of the interrupted run")
    if rejudge and not resume:
        raise UserError("--rejudge is for a run whose verifier changed; give it with --resume")
    given = {name: value for name, value in settings.items() if value is not None}
    config = with_threads({**PROFILES[profile], **given}, output if resume else None, nproc)

    from cpugrpo_edu.engine import ranks

    launching = nproc > 1 and not ranks.joined()
    ranks.join()
    default = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-seed{config.seed}"
    folder = ranks.gather(output or default)[0]
    if ranks.is_main() and ranks.LAUNCHED not in os.environ and not call.quiet:
        from cpugrpo_edu.lab.estimate import estimate_text

        call.say(estimate_text(config))
    go_on = f"resume with the same command and --resume --output {folder}"
    if launching:
        ranks.prompts_per_process(config.prompts_per_step, nproc)
        same_folder = [] if output else ["--output", str(folder)]
        raise SystemExit(ranks.launch(nproc, [*context.obj, *same_folder], go_on))
    from cpugrpo_edu.run import pipeline
    from cpugrpo_edu.show.progress import ProgressDisplay

    with stopping_clearly(go_on):
        record = pipeline.run(
            config,
            folder,
            resume=resume,
            display=ProgressDisplay(quiet=call.quiet or not ranks.is_main()),
            started=psutil.Process().create_time(),
            report_to=report_to,
            rejudge=rejudge,
        )
    if ranks.is_main():
        give_results(call, record, folder)


def with_threads(settings: dict[str, Any], resumed: Path | None, nproc: int) -> RunConfig:
    """The run's configuration, with torch given its threads.

    A resumed run keeps the settings that it was begun with, its threads included, whatever the
    defaults are now; a new one takes the number of threads that is fastest here.
    """
    if "memory_budget_gib" in settings:  # pages of 2 MiB would round every tensor up
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "0")
    begun = recorded_config(resumed) if resumed else None
    config = replace(begun, **settings) if begun else config_for(**settings)
    check_settings(config)
    hardware.configure_threads(config.threads)  # loads torch, which reads the environment
    from cpugrpo_edu.engine import ranks

    if config.threads is not None or resumed or nproc > 1 or ranks.joined():
        return config
    return replace(config, threads=fewer_threads(config.model))


def fewer_threads(model: str) -> int | None:
    """Threads to use where fewer than all cores are faster, measured once; else None."""
    from cpugrpo_edu.engine.threads import fastest_threads

    try:
        threads = fastest_threads(model)
    except UserError:  # no model at all: the run itself will complain
        return None
    return threads if threads < usable_cores() else None


def recorded_config(folder: Path) -> RunConfig | None:
    """The settings that the run in a folder was begun with; None if they cannot be read."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        settings = dict(state["config"])
        for name, value in settings.items():
            settings[name] = tuple(value) if isinstance(value, list) else value
        config = RunConfig(**settings)
        check_settings(config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError):
        return None  # the run itself will say why it cannot be resumed
    return config


@contextmanager
def stopping_clearly(go_on: str) -> Iterator[None]:
    """A run that was stopped says how to resume it, and exits."""
    from cpugrpo_edu.engine import ranks
    from cpugrpo_edu.run.pause import Interrupted

    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        if ranks.is_main():
            reason = str(error) or "interrupted"
            print(f"cpugrpo: {reason}; saved. {go_on[0].upper()}{go_on[1:]}", file=sys.stderr)
        raise SystemExit(130) from error
    except RuntimeError as error:
        if not ranks.lost_peer(error):
            raise
        if ranks.LAUNCHED not in os.environ:
            print(
                "cpugrpo: another process of this run has disappeared, so this one stops too; "
                f"what was complete is saved, {go_on}",
                file=sys.stderr,
            )
        raise SystemExit(1) from error


def give_results(call: Call, record: RunRecord, folder: Path) -> None:
    from cpugrpo_edu.show.report import acted, headline

    data = {
        "record": str(folder / "record.json"),
        "report": str(folder / "report.html"),
        "model": str(folder / "model"),
        "seconds": record.results["seconds"],
        "headline": headline(record),
        "acted": acted(record),
    }
    text = (
        f"{data['headline']}\n{data['acted']}\nReport: {data['report']}\nRecord: {data['record']}"
    )
    call.give(data, text)
