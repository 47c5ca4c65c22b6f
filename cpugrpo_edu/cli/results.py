"""``cpugrpo report | export | checkpoints``: what a run has left in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from cpugrpo_edu.cli.command import Call, app, command, group, within
from cpugrpo_edu.engine import hardware

RunFolder = Annotated[Path, Argument(help="The output folder of a run.")]

checkpoints = group("The checkpoints of a run.")
app.add_typer(checkpoints, name="checkpoints")


@command(app)
def report(call: Call, folder: RunFolder) -> None:
    """Write report.md and report.html of a run again, from its record.

    Example: `cpugrpo report runs/first`
    """
    from cpugrpo_edu.record.run_record import RunRecord
    from cpugrpo_edu.show.report import headline, write_report

    record = RunRecord.load(folder / "record.json")
    markdown, page = write_report(record, folder)
    data = {"markdown": str(markdown), "html": str(page), "headline": headline(record)}
    call.give(data, f"{data['headline']}\nReport: {page}")


@command(app)
def export(
    call: Call,
    run: Annotated[Path, Argument(help="The output folder of a complete run.")],
    to: Annotated[str, Option(help="merged, adapter, int8 or gguf.")] = "merged",
    output: Annotated[Path | None, Option(help="New folder; default: RUN/export-TO.")] = None,
) -> None:
    """Write a trained model in another format, with a model card and the record.

    The written model is loaded again and compared with the trained one.

    Example: `cpugrpo export runs/first --to gguf`
    """
    hardware.configure_threads()
    from transformers.utils import logging

    from cpugrpo_edu.run.export import COMPARED
    from cpugrpo_edu.run.export import export as export_run
    from cpugrpo_edu.show.progress import ProgressDisplay

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with ProgressDisplay(quiet=call.quiet) as display:
        count = display.counter("compare", COMPARED)
        folder = output or run / f"export-{to}"
        done = export_run(run, to, folder, problems=COMPARED, on_done=count)
    call.give(
        done,
        f"Exported to {done['folder']} ({done['bytes'] / 1e6:.1f} MB); loaded again, it is "
        f"{done['kl']:.2g} nats a token (KL) from the trained model, with the same most likely "
        f"token in {done['agreement']:.1%} of the places",
    )


@command(checkpoints, "list")
def checkpoints_list(call: Call, run: RunFolder) -> None:
    """List the checkpoints that a run can resume from, oldest first.

    Example: `cpugrpo checkpoints list runs/first`
    """
    from cpugrpo_edu.run.checkpoints import list_checkpoints

    found = list_checkpoints(run)
    lines = [f"{c.kind:5} {c.name:24} {c.size / 1e6:8.1f} MB  {c.fault or 'good'}" for c in found]
    call.give([c.to_json() for c in found], "\n".join(lines) or "no checkpoints")


@command(checkpoints, "prune")
def checkpoints_prune(
    call: Call,
    run: RunFolder,
    keep: Annotated[int, Option(help="Good checkpoints of each kind.", callback=within(1))] = 1,
    dry_run: Annotated[bool, Option("--dry-run", help="Delete nothing, only list.")] = False,
) -> None:
    """Delete older checkpoints of a run that is not running; the last good one always stays.

    Example: `cpugrpo checkpoints prune runs/first --dry-run`
    """
    from cpugrpo_edu.run.checkpoints import prune

    gone = prune(run, keep, dry_run=dry_run)
    size = sum(c.size for c in gone) / 1e6
    verb = "Would delete" if dry_run else "Deleted"
    lines = [f"{verb} {len(gone)} checkpoints, {size:.1f} MB", *(f"  {c.path}" for c in gone)]
    call.give([c.to_json() for c in gone], "\n".join(lines))
