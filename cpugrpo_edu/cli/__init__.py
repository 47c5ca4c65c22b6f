"""The command line: ``cpugrpo doctor | run | evaluate | generate | report | pretrain | models |
bench``.

Results go to stdout, progress to stderr. A mistake in the input ends with one
sentence and exit code 2, an interrupted run with 130.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from typer.exceptions import TyperException

from cpugrpo_edu.cli.assign import app as assign_app
from cpugrpo_edu.data import DIFFICULTIES, Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import check_output_folder, write_failure

# Heavy imports (torch, transformers, trl) stand inside the commands: --help answers at
# once, and threads are set before torch is loaded.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Learn GRPO by running it: reinforcement learning for language models on a CPU.",
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Model = Annotated[
    str, typer.Option(help="bundled, a model folder, or a hub id such as Qwen/Qwen2-0.5B-Instruct.")
]


def main(arguments: list[str] | None = None) -> None:
    """Entry point: turns known mistakes into one sentence on stderr."""
    with failing_clearly():
        arguments = sys.argv[1:] if arguments is None else arguments
        code = app(arguments, prog_name="cpugrpo", standalone_mode=False, obj=arguments)
        if code == 130:  # how typer reports Ctrl-C
            raise KeyboardInterrupt
    raise SystemExit(code or 0)


@contextmanager
def failing_clearly() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if "LOCAL_RANK" in os.environ:  # one of several processes
            from cpugrpo_edu.engine.ranks import leave_word

            if leave_word(error):
                raise SystemExit(2) from error
        print(f"cpugrpo: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
    except TyperException as error:  # an unknown command or option, or a value it cannot read
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "cpugrpo"
        message = " ".join(error.format_message().split()).rstrip(".")
        if message:
            print(f"cpugrpo: {message}; see {command} --help", file=sys.stderr)
        raise SystemExit(2) from error
    except OSError as error:
        reason = write_failure(error)
        if reason is None:
            raise
        print(
            f"cpugrpo: cannot write {error.filename or 'the output'}: {reason}; make room or make "
            "it writable, or give another --output",
            file=sys.stderr,
        )
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        print("cpugrpo: interrupted; what was complete is saved", file=sys.stderr)
        raise SystemExit(130) from error
    except MemoryError as error:
        print(
            "cpugrpo: out of memory; choose a smaller model, --lora, a smaller --micro-batch "
            "or --checkpointing on",
            file=sys.stderr,
        )
        raise SystemExit(2) from error


PROFILES: dict[str, dict[str, Any]] = {
    "balanced": {},
    # recompute activations only where they would not fit
    "fast": {"checkpointing": "auto"},
    # leave the machine to others: one thread, little memory at a time, checkpoints more often
    "frugal": {"threads": 1, "checkpointing": "on", "micro_batch": 4, "save_minutes": 0.5},
}
"""Settings of ``cpugrpo run --profile``; a setting given beside it counts more."""


def say(data: Any, as_json: bool, text: str) -> None:
    print(json.dumps(data) if as_json else text)


def check_temperature(value: float) -> float:
    if not 0 <= value < float("inf"):
        raise UserError(f"temperature is {value}; give 0 (greedy) or more, and a finite number")
    return value


def check_seed(value: int) -> int:
    if not 0 <= value < 2**31:
        raise UserError(f"seed is {value}; give a whole number from 0 to {2**31 - 1}")
    return value


def fewer_threads(model: str) -> int | None:
    """Threads to use where fewer than all cores are faster, measured once; else None."""
    from cpugrpo_edu.record.machine import usable_cores
    from cpugrpo_edu.engine.threads import fastest_threads

    try:
        threads = fastest_threads(model)
    except UserError:  # no model at all: the run itself will complain
        return None
    return threads if threads < usable_cores() else None


def begun_with(output: Path | None) -> int | None:
    """The threads that the interrupted run in a folder was begun with; None: all cores."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        state = json.loads(((output or Path()) / "state.json").read_text(encoding="utf-8"))
        found = state["config"]["threads"]
        return found if isinstance(found, int) else None
    return None


def comma_numbers(text: str, kind: type, what: str) -> tuple[Any, Any, Any]:
    """Read ``16`` or ``16,16,16`` into three numbers."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise UserError(f"cannot read {what} {text!r}; give one number or three, such as 16,16,16")
    return values[0], values[1], values[2]


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: Python, packages, cores, limits, BLAS, memory, disk, the bundled model.

    Exit code 1 if something is missing that a run needs.

    Example: `cpugrpo doctor`
    """
    from rich.console import Console
    from rich.table import Table

    from cpugrpo_edu.engine.doctor import examine

    checks = examine()
    if as_json:
        print(json.dumps([asdict(check) for check in checks]))
    else:
        table = Table(title="cpugrpo doctor")
        for heading in ("Check", "", "Found", "What to do"):
            table.add_column(heading)
        marks = {"ok": "[green]ok[/]", "warn": "[yellow]note[/]", "fail": "[red]FAIL[/]"}
        for check in checks:
            table.add_row(check.name, marks[check.ok], check.detail, check.mend)
        Console().print(table)
    if any(check.ok == "fail" for check in checks):
        raise SystemExit(1)


@app.command()
def run(
    context: typer.Context,
    model: Model = "bundled",
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results; default runs/<time>-seed<n>.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of data order and rollouts.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --output.")] = False,
    data: Annotated[
        str,
        typer.Option(help="generated, a GSM8K-format file, folder or hub id, or prompts.jsonl."),
    ] = "generated",
    verifier: Annotated[
        str | None, typer.Option(help="Your verifier, path/to/file.py:function (it is executed).")
    ] = None,
    domains: Annotated[str | None, typer.Option(help="Some domains, by comma.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    order: Annotated[str, typer.Option(help="curriculum, mixed or reversed.")] = "curriculum",
    steps: Annotated[str | None, typer.Option(help="GRPO steps, one number or three.")] = None,
    lr: Annotated[str | None, typer.Option(help="Learning rate, one number or three.")] = None,
    replay: Annotated[float | None, typer.Option(help="Share of other difficulties.")] = None,
    prompts_per_step: Annotated[int | None, typer.Option(help="Groups in one step.")] = None,
    num_generations: Annotated[int | None, typer.Option(help="G, completions a group.")] = None,
    max_completion: Annotated[int | None, typer.Option(help="Longest completion, tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the rollouts.")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the KL term.")] = None,
    loss_type: Annotated[str | None, typer.Option(help="Any of TRL's, such as dapo, grpo.")] = None,
    importance_level: Annotated[str | None, typer.Option(help="token, or sequence (GSPO).")] = None,
    rewards: Annotated[
        str | None, typer.Option(help="Such as correct_answer=1,valid_steps=0.5")
    ] = None,
    lora: Annotated[int | None, typer.Option(help="LoRA rank; 0 trains all weights.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, auto, or int8 with LoRA.")
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(help="For an int8 base: packed, or compiled (decodes in C; needs gcc)."),
    ] = None,
    checkpointing: Annotated[str | None, typer.Option(help="auto, on or off.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Completions a backward pass; default from memory.")
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option("--memory-budget", help="Most memory to take in all, such as 4GB."),
    ] = None,
    cleanup: Annotated[bool, typer.Option(help="Give memory back after each stage.")] = True,
    threads: Annotated[
        int | None, typer.Option(help="Default: all cores, or fewer if those are faster here.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Rollouts: fast, or generate.")] = None,
    int8_rollouts: Annotated[bool | None, typer.Option(help="Sample from an INT8 copy.")] = None,
    share_prefix: Annotated[
        bool | None, typer.Option(help="Score a prompt's completions behind one copy of it.")
    ] = None,
    int8_evaluation: Annotated[bool, typer.Option(help="Evaluate an INT8 copy as well.")] = True,
    fisher: Annotated[str | None, typer.Option(help="Fisher variant for EWC.")] = None,
    fisher_examples: Annotated[int | None, typer.Option(help="0 switches Fisher off.")] = None,
    ewc: Annotated[float | None, typer.Option(help="EWC strength; 0 switches it off.")] = None,
    per_cell: Annotated[
        int | None, typer.Option(help="Held-out problems a domain and difficulty; 0: none.")
    ] = None,
    patience: Annotated[int | None, typer.Option(help="Steps without signal allowed.")] = None,
    save_minutes: Annotated[
        float | None, typer.Option(help="Between two checkpoints within a stage; 0: every step.")
    ] = None,
    report_to: Annotated[
        str, typer.Option(help="none, tensorboard or wandb, besides metrics.jsonl.")
    ] = "none",
    nproc: Annotated[
        int, typer.Option(help="Processes on this machine that share each step's prompts.")
    ] = 1,
    profile: Annotated[
        str, typer.Option(help="balanced, fast (more memory) or frugal (less, one thread).")
    ] = "balanced",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model with GRPO in three stages and prove what changed.

    Examples:

    `cpugrpo run` trains the bundled model in about a minute and evaluates it in another.

    `cpugrpo run --seed 1 --ewc 0 --output runs/no-ewc`

    `cpugrpo run --model Qwen/Qwen2-0.5B-Instruct --lora 16 --dtype int8 --data openai/gsm8k`
    """
    from cpugrpo_edu.engine.hardware import configure_threads
    from cpugrpo_edu.record.machine import GIB

    if profile not in PROFILES:
        raise UserError(f"unknown profile {profile!r}; allowed are {', '.join(PROFILES)}")
    if threads is None:
        threads = PROFILES[profile].get("threads")
    if memory_budget is not None:  # pages of 2 MiB would round every tensor up
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "0")
    configure_threads(threads)
    from cpugrpo_edu.engine import ranks
    from cpugrpo_edu.engine.memory import parse_bytes
    from cpugrpo_edu.lab.estimate import estimate_text
    from cpugrpo_edu.run.config import RunConfig, check_settings
    from cpugrpo_edu.run.pipeline import Interrupted
    from cpugrpo_edu.run.pipeline import run as run_pipeline
    from cpugrpo_edu.show.progress import ProgressDisplay

    if threads is None and nproc == 1 and not ranks.joined():
        threads = begun_with(output) if resume else fewer_threads(model)

    given: dict[str, Any] = {
        "threads": threads,
        "micro_batch": micro_batch,
        "steps": None if steps is None else comma_numbers(steps, int, "--steps"),
        "learning_rates": None if lr is None else comma_numbers(lr, float, "--lr"),
        "domains": None if domains is None else tuple(part.strip() for part in domains.split(",")),
        "replay": replay,
        "prompts_per_step": prompts_per_step,
        "num_generations": num_generations,
        "max_completion": max_completion,
        "temperature": temperature,
        "beta": beta,
        "loss_type": loss_type,
        "importance_level": importance_level,
        "rewards": rewards,
        "lora_rank": lora,
        "dtype": dtype,
        "kernel": kernel,
        "checkpointing": checkpointing,
        "engine": engine,
        "int8_rollouts": int8_rollouts,
        "share_prefix": share_prefix,
        "fisher": fisher,
        "fisher_examples": fisher_examples,
        "ewc_strength": ewc,
        "per_cell": per_cell,
        "patience": patience,
        "save_minutes": save_minutes,
    }
    given = {k: v for k, v in given.items() if v is not None}
    config = RunConfig(
        model=model,
        seed=seed,
        data=data,
        verifier=verifier,
        system=system,
        order=order,
        memory_budget_gib=None if memory_budget is None else parse_bytes(memory_budget) / GIB,
        cleanup=cleanup,
        int8_evaluation=int8_evaluation,
        **{**PROFILES[profile], **given},
    )
    if resume and output is None:
        raise UserError("--resume needs the --output folder of the interrupted run")
    folder = output or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-seed{seed}"
    started = psutil.Process().create_time()
    go_on = f"go on with the same command and: --resume --output {folder}"
    if not 1 <= nproc <= 1024:
        raise UserError(f"nproc is {nproc}; give a number of processes from 1 to 1024")
    launching = nproc > 1 and not ranks.joined()
    ranks.join()
    first = ranks.is_main()
    folder = ranks.gather(folder)[0]
    display = ProgressDisplay(quiet=quiet or not first)
    if launching or not quiet:
        check_settings(config)
    if not quiet and ranks.LAUNCHED not in os.environ:
        display.message(estimate_text(config))
    if launching:
        ranks.prompts_per_process(config.prompts_per_step, nproc)
        with_output = [] if output else ["--output", str(folder)]
        code = ranks.launch(nproc, [*context.obj, *with_output], go_on)
        raise SystemExit(code)
    try:
        record = run_pipeline(
            config,
            folder,
            resume=resume,
            display=display,
            started=started,
            report_to=report_to,
        )
    except (Interrupted, KeyboardInterrupt) as error:
        reason = str(error) or "interrupted"
        if first:
            print(f"cpugrpo: {reason}; saved. {go_on[0].upper()}{go_on[1:]}", file=sys.stderr)
        raise SystemExit(130) from error
    except RuntimeError as error:
        if not ranks.lost_peer(error):
            raise
        if ranks.LAUNCHED not in os.environ:
            print(
                "cpugrpo: another process or machine of this run has gone, so this one stops too; "
                f"what was complete is saved, {go_on}",
                file=sys.stderr,
            )
        raise SystemExit(1) from error
    if not first:
        return
    from cpugrpo_edu.show.report import headline

    path = folder / "record.json"
    data_out = {
        "record": str(path),
        "report": str(folder / "report.html"),
        "model": str(folder / "model"),
        "seconds": record.results["seconds"],
        "headline": headline(record),
    }
    say(data_out, as_json, f"{headline(record)}\nReport: {folder / 'report.html'}\nRecord: {path}")


@app.command()
def evaluate(
    model: Model = "bundled",
    per_cell: Annotated[int, typer.Option(help="Problems a domain and difficulty.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling, if the temperature is not 0.")] = 0,
    data: Annotated[str, typer.Option(help="generated, or data as for run.")] = "generated",
    verifier: Annotated[str | None, typer.Option(help="path/to/file.py:function.")] = None,
    int8: Annotated[bool, typer.Option(help="Evaluate an INT8 copy.")] = False,
    max_completion: Annotated[int, typer.Option(help="Longest completion, tokens.")] = 128,
    output: Annotated[Path | None, typer.Option(help="Keep every item (.json.gz).")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model on held-out problems, with 95 % Wilson intervals.

    Example: `cpugrpo evaluate --model runs/first/model --per-cell 300`
    """
    from cpugrpo_edu.engine.hardware import configure_threads

    configure_threads()
    from rich.console import Console
    from rich.table import Table

    from cpugrpo_edu.engine.int8 import quantize_for_rollout
    from cpugrpo_edu.evaluate import evaluate as evaluate_policy
    from cpugrpo_edu.models.load import check_policy, load_policy
    from cpugrpo_edu.record.evaluations import save_evaluation
    from cpugrpo_edu.record.stats import accuracy_table
    from cpugrpo_edu.run.config import RunConfig
    from cpugrpo_edu.run.data import load_data
    from cpugrpo_edu.sample import Sampling
    from cpugrpo_edu.show.progress import ProgressDisplay

    if per_cell < 1:
        raise UserError(f"--per-cell is {per_cell}; give at least 1")
    sampling = Sampling(max_completion, check_temperature(temperature), seed=check_seed(seed))
    if output is not None:
        check_output_folder(output.parent)
    if output is not None and output.exists():
        raise UserError(f"{output} already exists; give another --output")
    _, problems = load_data(RunConfig(data=data, verifier=verifier, per_cell=per_cell))
    policy = load_policy(model)
    check_policy(policy)
    if int8:
        policy = replace(policy, model=quantize_for_rollout(policy.model))
    with ProgressDisplay(quiet=quiet) as display:
        bar = display.counter("evaluate", len(problems))
        label = f"{model}, INT8" if int8 else model
        result = evaluate_policy(policy, problems, label, sampling, bar)
    table = accuracy_table(result)
    if output is not None:
        save_evaluation(result, output)
    if as_json:
        print(json.dumps(table))
        return
    shown = Table(title=f"{result.label}: exact match in % (95 % Wilson interval), n a cell")
    names = [name for name in DIFFICULTIES if name in table["by_difficulty"]]
    for heading in ("Domain", *names):
        shown.add_column(heading)

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return "–"
        low, high = 100 * row["low"], 100 * row["high"]
        return f"{100 * row['accuracy']:.1f} ({low:.1f}–{high:.1f}), {row['n']}"

    for domain, cells in table["cells"].items():
        shown.add_row(domain, *(cell(cells.get(name)) for name in names))
    shown.add_row("all", *(cell(table["by_difficulty"][name]) for name in names))
    Console().print(shown)
    print(f"Overall {cell(table['overall'])}; {result.seconds:.1f} s")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The question to put to the model.")],
    model: Model = "bundled",
    n: Annotated[int, typer.Option(help="How many completions.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_completion: Annotated[int, typer.Option(help="Longest completion, tokens.")] = 128,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Try a prompt.

    Example: `cpugrpo generate "Compute 12+7-5." --n 4 --temperature 1`
    """
    from cpugrpo_edu.engine.hardware import configure_threads

    configure_threads()
    from cpugrpo_edu.models.load import check_policy, load_policy
    from cpugrpo_edu.sample import Sampling, rollout

    if n < 1:
        raise UserError(f"--n is {n}; give at least 1")
    if not prompt.strip():
        raise UserError("the prompt is empty; give a question in quotes")
    sampling = Sampling(max_completion, check_temperature(temperature), seed=check_seed(seed))
    policy = load_policy(model)
    check_policy(policy)
    [group] = rollout(policy, [Problem("prompt", "", "", prompt, answer="")], n, sampling)
    found = [
        {
            "text": episode.text,
            "log_prob": sum(episode.logprobs),
            "tokens": len(episode.completion_ids),
            "finished": episode.finished,
        }
        for episode in group.episodes
    ]
    say(found, as_json, "\n\n".join(str(item["text"]) for item in found))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run's output folder.")],
    as_json: Json = False,
) -> None:
    """Write report.md and report.html of a run again, from its record.

    Example: `cpugrpo report runs/first`
    """
    from cpugrpo_edu.record.run_record import RunRecord
    from cpugrpo_edu.show.report import headline, write_report

    record = RunRecord.load(folder / "record.json")
    markdown, page = write_report(record, folder)
    data = {"markdown": str(markdown), "html": str(page), "headline": headline(record)}
    say(data, as_json, f"{headline(record)}\nReport: {page}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The output folder of a complete run.")],
    to: Annotated[str, typer.Option(help="merged, adapter, int8 or gguf.")] = "merged",
    output: Annotated[
        Path | None, typer.Option(help="New folder; default <run>/export-<to>.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hand a trained model over, loaded back and compared, with a model card and the record.

    Example: `cpugrpo export runs/first --to gguf`
    """
    from cpugrpo_edu.engine.hardware import configure_threads

    configure_threads()
    from transformers.utils import logging

    from cpugrpo_edu.run.export import export as export_run

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    done = export_run(run, to, output or run / f"export-{to}")
    text = (
        f"Exported to {done['folder']} ({done['bytes'] / 1e6:.1f} MB); loaded back, "
        f"{done['agree']} of {done['compared']} greedy answers are those of the trained model"
    )
    say(done, as_json, text)


checkpoints = typer.Typer(no_args_is_help=True, help="The checkpoints of a run.")
app.add_typer(checkpoints, name="checkpoints")
RunFolder = Annotated[Path, typer.Argument(help="The output folder of a run.")]


@checkpoints.command("list")
def checkpoints_list(run: RunFolder, as_json: Json = False) -> None:
    """What a run can go on from, oldest first.

    Example: `cpugrpo checkpoints list runs/first`
    """
    from cpugrpo_edu.run.checkpoints import list_checkpoints

    found = list_checkpoints(run)
    lines = [f"{c.kind:5} {c.name:24} {c.size / 1e6:8.1f} MB  {c.fault or 'good'}" for c in found]
    say([c.to_json() for c in found], as_json, "\n".join(lines) or "no checkpoints")


@checkpoints.command("prune")
def checkpoints_prune(
    run: RunFolder,
    keep: Annotated[int, typer.Option(help="Newest good ones of each kind that stay.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Delete older checkpoints of a run that is not going on; the last good one always stays.

    Example: `cpugrpo checkpoints prune runs/first --dry-run`
    """
    from cpugrpo_edu.run.checkpoints import prune

    gone = prune(run, keep, dry_run=dry_run)
    size = sum(c.size for c in gone) / 1e6
    verb = "Would delete" if dry_run else "Deleted"
    lines = [f"{verb} {len(gone)} checkpoints, {size:.1f} MB", *(f"  {c.path}" for c in gone)]
    say([c.to_json() for c in gone], as_json, "\n".join(lines))


@app.command()
def pretrain(
    output: Annotated[Path, typer.Option(help="Folder for the new model.")] = Path(
        "runs/pretrained"
    ),
    steps: Annotated[int | None, typer.Option(help="Supervised steps.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and the corpus.")] = 0,
    hidden: Annotated[int | None, typer.Option(help="Hidden size.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of layers.")] = None,
    per_cell: Annotated[int, typer.Option(help="Problems a cell for the model card.")] = 300,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the bundled model again: tokenizer, supervised training, model card.

    Example: `cpugrpo pretrain --output runs/my-base`
    """
    from cpugrpo_edu.engine.hardware import configure_threads

    configure_threads()
    from cpugrpo_edu.models.pretrain import PretrainConfig, make_model
    from cpugrpo_edu.show.progress import ProgressDisplay

    sizes: dict[str, Any] = {"steps": steps, "hidden": hidden, "layers": layers}
    config = PretrainConfig(seed=seed, **{k: v for k, v in sizes.items() if v is not None})
    with ProgressDisplay(quiet=quiet) as display:
        display.start_stage("pretrain", config.steps)
        summary = make_model(
            config, output, per_cell, lambda step, metrics: display.update(step, **metrics)
        )
    say(summary, as_json, f"Saved a model of {summary['parameters']:,} parameters in {output}")


@app.command()
def models(
    memory_gib: Annotated[
        float | None, typer.Option(help="Instead of this machine's available memory.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Which well-known small models fit into memory, for what.

    Example: `cpugrpo models --memory-gib 8`
    """
    from rich.console import Console
    from rich.table import Table

    from cpugrpo_edu.engine.memory import available_memory, models_that_fit
    from cpugrpo_edu.lab.estimate import catalogue_steps

    if memory_gib is not None and not 0 < memory_gib < 2**20:
        raise UserError(f"--memory-gib is {memory_gib}; give more than 0, and a finite number")
    available = available_memory() if memory_gib is None else int(memory_gib * 2**30)
    rows = models_that_fit(available)
    steps, about = catalogue_steps()
    for row in rows:
        row |= steps.get(row["name"], {})
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(title=f"With {available / 2**30:.1f} GiB of memory (estimates in GiB, float32)")
    for heading in ("Model", "Parameters", "Evaluate", "LoRA", "Full", "Most that fits"):
        table.add_column(heading)
    if steps:
        table.add_column("LoRA on INT8")
    for row in rows:
        sizes = [f"{row[f'{kind}_bytes'] / 2**30:.2f}" for kind in ("evaluate", "lora", "full")]
        cells = [row["name"], f"{row['parameters']:,}", *sizes, row["verdict"]]
        if steps:
            memory = row["int8_peak_bytes"] / 2**30
            cells.append(f"{row['int8_step_seconds']:.1f} s, {memory:.1f} GiB")
        table.add_row(*cells)
    Console().print(table)
    print(about)


# Benchmarks

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Time and memory on a 494M-parameter model, beside peers and the machine's floors.",
)
app.add_typer(bench, name="bench")
app.add_typer(assign_app, name="assign")

Record = Annotated[Path | None, typer.Option("--output", help="Where to write the record.")]
Cache = Annotated[
    Path | None, typer.Option(help="Where the random model (3 GB) is kept; made on first use.")
]
Steps = Annotated[int | None, typer.Option(help="Steps a stage, instead of the workload's.")]


def workload_of(name: str, steps: int | None) -> Any:
    from dataclasses import replace

    from cpugrpo_edu.lab.bench import WORKLOADS

    if name not in WORKLOADS:
        raise UserError(f"unknown workload {name!r}; allowed are {', '.join(WORKLOADS)}")
    if steps is not None and steps < 1:
        raise UserError(f"--steps is {steps}; give at least 1")
    workload = WORKLOADS[name]
    return workload if steps is None else replace(workload, steps=steps)


def comma_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def show_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def silent(line: str) -> None:
    """Progress for who asked for none."""


def give(
    record: Any, path: Path | None, header: list[str], rows: list[list[str]], as_json: bool
) -> None:
    """Write a benchmark's record; print it, or its table."""
    from cpugrpo_edu.show.text import markdown_table

    if path is not None:
        record.save(path)
        print(f"record: {path}", file=sys.stderr)
    print(json.dumps(asdict(record)) if as_json else markdown_table(header, rows))


@bench.command("machine")
def bench_machine(output: Record = None, as_json: Json = False) -> None:
    """What this machine could at best do: arithmetic and memory."""
    from cpugrpo_edu.record.run_record import new_record
    from cpugrpo_edu.lab.bench import run_worker

    record = new_record("bench-machine", {}, {"floors": run_worker("floors")})
    rows = [[name, f"{value:.1f}"] for name, value in record.results["floors"].items()]
    give(record, output, ["Floor", "Value"], rows, as_json)


@bench.command("b1")
def bench_b1_command(
    peers: Annotated[
        str,
        typer.Option(
            help="stock, stock-lora, ours-full, by comma; ours-compiled comes by itself "
            "where it can be compiled."
        ),
    ] = "",
    workload: Annotated[str, typer.Option(help="b1, b2 (10 steps a stage) or b3 (G = 8).")] = "b1",
    steps: Steps = None,
    peer_steps: Annotated[int, typer.Option(help="Steps that each peer does.")] = 3,
    cache: Cache = None,
    output: Record = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Three stages of GRPO on the 494M-parameter shape: seconds, memory, ratios, floor.

    Example: `cpugrpo bench b1 --peers stock,stock-lora`
    """
    from cpugrpo_edu.engine import c_kernel
    from cpugrpo_edu.lab.bench import bench_b1

    names = comma_names(peers)
    if peer_steps < 1:
        raise UserError(f"--peer-steps is {peer_steps}; give at least 1")
    say = silent if quiet else show_progress
    shape = workload_of(workload, steps)
    if "ours-compiled" not in names:
        if c_kernel.available():
            names = (*names, "ours-compiled")
        else:
            say(f"no compiled kernel here: {c_kernel.library()[1]}")
    give_b1(bench_b1(shape, names, peer_steps, folder=cache, say=say), output, as_json)


def give_b1(record: Any, output: Path | None, as_json: bool) -> None:
    """Print and keep the record; exit 1 where one of ours did not train."""
    from cpugrpo_edu.lab.bench import B1_HEADER, b1_rows, fallback_note

    give(record, output, B1_HEADER, b1_rows(record), as_json)
    if note := fallback_note(record):
        print(note, file=sys.stderr)
    everyone = {"ours": record.results["ours"], **record.results["peers"]}
    for name, result in everyone.items():
        if not result.get("weights_changed", {"changed": True})["changed"]:
            print(
                f"cpugrpo: the weights of {name} did not change: no training took place",
                file=sys.stderr,
            )
            raise SystemExit(1)


@bench.command("peers")
def bench_peers(
    cache: Cache = None, output: Record = None, as_json: Json = False, quiet: Quiet = False
) -> None:
    """`bench b1` with every peer."""
    from cpugrpo_edu.lab.bench import PEERS, bench_b1

    say = silent if quiet else show_progress
    give_b1(bench_b1(workload_of("b1", None), tuple(PEERS), folder=cache, say=say), output, as_json)


@bench.command("ablate")
def bench_ablate_command(
    steps: Steps = 3,
    cache: Cache = None,
    output: Record = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What each fast path is worth: one stage of B1 with one of them off at a time."""
    from cpugrpo_edu.lab.bench import ABLATE_HEADER, ablate_rows, bench_ablate

    say = silent if quiet else show_progress
    record = bench_ablate(workload_of("b1", steps), folder=cache, say=say)
    give(record, output, ABLATE_HEADER, ablate_rows(record), as_json)


@bench.command("rollout")
def bench_rollout_command(
    peers: Annotated[
        str, typer.Option(help="llama.cpp and continuous, by comma; none by default.")
    ] = "",
    cache: Cache = None,
    output: Record = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tokens a second of the rollout engines on the 494M-parameter shape, for G = 2 and 8.

    Example: `cpugrpo bench rollout --peers llama.cpp,continuous`
    """
    from cpugrpo_edu.lab.bench import ROLLOUT_HEADER, bench_rollout, rollout_rows

    say = silent if quiet else show_progress
    record = bench_rollout(workload_of("b1", None), comma_names(peers), folder=cache, say=say)
    give(record, output, ROLLOUT_HEADER, rollout_rows(record), as_json)


@bench.command("sweep")
def bench_sweep_command(
    cache: Cache = None, output: Record = None, as_json: Json = False, quiet: Quiet = False
) -> None:
    """GRPO steps over G, completion length, layers and models, and the cost model fitted to them.

    Some minutes; an interrupted sweep goes on where it was. `cpugrpo models` and `cpugrpo run`
    predict from the record.

    Example: `cpugrpo bench sweep --output records/bench-sweep.json`
    """
    from cpugrpo_edu.lab import sweep
    from cpugrpo_edu.record.files import cache_folder
    from cpugrpo_edu.show.text import markdown_table

    partial = (cache or cache_folder()) / "sweep.partial.json"
    say = silent if quiet else show_progress
    record = sweep.bench_sweep(folder=cache, say=say, partial=partial)
    give(record, output, sweep.SWEEP_HEADER, sweep.sweep_rows(record), as_json)
    if not as_json:
        print("\n" + markdown_table(sweep.COEFFICIENT_HEADER, sweep.coefficient_rows(record)))
        print("\n" + sweep.sweep_summary(record))


@bench.command("train")
def bench_train(output: Record = None, as_json: Json = False) -> None:
    """Steps of the bundled model's default run with each rollout engine."""
    from cpugrpo_edu.record.run_record import new_record
    from cpugrpo_edu.lab.bench import TRAIN_HEADER, run_worker, train_rows

    record = new_record("bench-train", {}, {"engines": run_worker("bundled", show_progress)})
    give(record, output, TRAIN_HEADER, train_rows(record), as_json)


@bench.command("plot")
def bench_plot(
    record: Annotated[Path, typer.Argument(help="A record that a bench command wrote.")],
    output: Annotated[
        Path | None, typer.Option(help="The picture (.png); default: beside the record.")
    ] = None,
) -> None:
    """Draw a benchmark's record, and print what the picture shows in words.

    Example: `cpugrpo bench plot records/bench-b1.json`
    """
    from cpugrpo_edu.lab.bench_plots import plot_record
    from cpugrpo_edu.record.run_record import RunRecord

    plot = plot_record(RunRecord.load(record))
    path = output or record.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plot.png())
    print(f"picture: {path}", file=sys.stderr)
    print(plot.alt)


# Studies

study = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Questions that one run cannot answer: run them here, read them in the book.",
)
app.add_typer(study, name="study")


@study.command("list")
def study_list(as_json: Json = False) -> None:
    """The studies, and whether each has a record.

    Example: `cpugrpo study list`
    """
    from cpugrpo_edu.lab.studies.registry import STUDIES
    from cpugrpo_edu.show.text import markdown_table, records_folder

    rows = []
    for item in STUDIES.values():
        path = records_folder() / f"study-{item.name}.json"
        recorded = str(path) if path.exists() else None
        rows.append({"name": item.name, "question": item.question, "record": recorded})
    if as_json:
        print(json.dumps(rows))
        return
    header = ["Study", "Question", "Record"]
    lines = [[str(r["name"]), str(r["question"]), str(r["record"] or "not run yet")] for r in rows]
    print(markdown_table(header, lines))


@study.command("run")
def study_run(
    name: Annotated[str, typer.Argument(help="One of cpugrpo study list.")],
    reduced: Annotated[
        bool, typer.Option("--reduced", help="A minute instead of hours: shows that it works.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="The record; default runs/studies/study-<name>.json."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A further model, folder or hub id; may be repeated.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Training seeds, where it trains.")] = None,
    only: Annotated[str | None, typer.Option(help="One factor of the ablations.")] = None,
    work: Annotated[
        Path, typer.Option(help="Where finished pieces wait if it is interrupted.")
    ] = Path("runs/studies"),
    cache: Annotated[
        Path | None, typer.Option(help="Where models that it trains are kept for the next time.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a study and write its record. Given again after Ctrl-C, it goes on where it was.

    Example: `cpugrpo study run quantization --reduced`
    """
    from cpugrpo_edu.lab.studies.common import Setting
    from cpugrpo_edu.lab.studies.registry import study_named

    chosen = study_named(name)
    if seeds is not None and seeds < 1:
        raise UserError(f"--seeds is {seeds}; give at least 1")
    path = output or work / f"study-{name}{'-reduced' if reduced else ''}.json"
    check_output_folder(path.parent)
    from cpugrpo_edu.engine.hardware import configure_threads

    configure_threads()
    from transformers.utils import logging

    from cpugrpo_edu.show.text import markdown_table

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    setting = Setting(
        reduced=reduced,
        work=work,
        cache=cache,
        say=silent if quiet else show_progress,
        models=tuple(model or ()),
        seeds=seeds,
        only=only,
    )
    outcome = chosen.run(setting)
    for saved in outcome.save(path):
        print(f"saved: {saved}", file=sys.stderr)
    if as_json:
        print(json.dumps(asdict(outcome.record)))
        return
    for title, header, rows in chosen.tables(outcome.record):
        print(f"\n{title}\n\n{markdown_table(header, rows)}")
    print("\n" + "\n".join(f"- {line}" for line in chosen.load().findings(outcome.record)))


@app.command()
def calculator(
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="An assumption, such as gpu_speed=20; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """What a class needs in time, energy and money on laptops, cloud CPUs and cloud GPUs.

    Every assumption is shown and can be set. No GPU was measured: without its speed you get the
    speed from which it would pay.

    Example: `cpugrpo calculator --set students=120 --set gpu_price=0.6`
    """
    from cpugrpo_edu.lab.studies import cpu_or_gpu as study_module
    from cpugrpo_edu.show.text import markdown_table

    given = {}
    for text in change or ():
        key, _, number = text.partition("=")
        try:
            given[key.strip()] = float(number)
        except ValueError:
            raise UserError(
                f"cannot read --set {text!r}; give a name and a number, such as gpu_speed=20"
            ) from None
    inputs = study_module.assumptions(given)
    found = study_module.calculate(study_module.values_of(inputs))
    listed = [asdict(each) for each in inputs]
    if as_json:
        print(json.dumps({"assumptions": listed, "class": found}))
        return
    rows = [[each.key, *row] for each, row in zip(inputs, study_module.assumption_rows(listed))]
    print(markdown_table(["Name", "Assumption", "Value", "Unit", "Source"], rows))
    print(f"\n{markdown_table(study_module.CLASS_HEADER, study_module.class_rows(found))}")
    print(f"\n{study_module.pays_text(found)}")
