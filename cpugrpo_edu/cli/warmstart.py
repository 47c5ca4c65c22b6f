"""``cpugrpo warmstart``: its options are the fields of ``WarmstartConfig``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from cpugrpo_edu.cli.command import Call, app, command
from cpugrpo_edu.cli.settings import settings_of
from cpugrpo_edu.engine import hardware
from cpugrpo_edu.run.warmstart_config import WarmstartConfig, check_warmstart


@command(app)
@settings_of(WarmstartConfig)
def warmstart(
    call: Call,
    output: Annotated[Path, Option(help="New folder for the model.")] = Path("runs/warm"),
    **settings: Any,
) -> None:
    """Fine-tune a model on worked solutions or on its own right answers, a baseline for GRPO.

    Examples:

    `cpugrpo warmstart --model smollm2 --domains small_stories --steps 200 --output runs/warm`, then
    `cpugrpo run --model runs/warm` or `cpugrpo evaluate --model runs/warm --domains small_stories`

    `cpugrpo warmstart --model smollm2 --domains small_stories --method rft --output runs/own`
    """
    given = {name: value for name, value in settings.items() if value is not None}
    config = WarmstartConfig(**given)
    check_warmstart(config)
    hardware.configure_threads(config.threads)
    from cpugrpo_edu.run.warmstart import warmstart as fine_tune
    from cpugrpo_edu.show.progress import ProgressDisplay

    with ProgressDisplay(quiet=call.quiet) as display:
        record = fine_tune(config, output, display)
    found = record.results
    loss = found["loss"]
    stopped = f", stopped after {found['steps']}" if found["steps"] < config.steps else ""
    call.give(
        {"model": str(output), "record": str(output / "record.json"), **found},
        f"Loss {loss['first']:.3f} in the first step, {loss['last']:.3f} in the last{stopped}\n"
        f"Model: {output}\nRecord: {output / 'record.json'}",
    )
    if stopped:
        raise SystemExit(130)
