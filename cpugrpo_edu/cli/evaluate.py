"""``cpugrpo evaluate`` and ``cpugrpo generate``: ask a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Argument, Option

from cpugrpo_edu.cli.command import Call, Model, PerCell, app, command, table, within
from cpugrpo_edu.cli.settings import comma_names
from cpugrpo_edu.data import DIFFICULTIES, Problem
from cpugrpo_edu.engine import hardware
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.evaluations import Evaluation, SampledEvaluation
from cpugrpo_edu.record.files import check_output_folder
from cpugrpo_edu.run.config import RunConfig, config_for, help_of

if TYPE_CHECKING:
    from cpugrpo_edu.policy import Policy

MOST = 10_000
"""Problems of each difficulty that `RunConfig` can hold out."""

Temperature = Annotated[float, Option(help="0 is greedy.", callback=within(0))]
Longest = Annotated[int, Option(help="Longest completion, in tokens.", callback=within(1))]
System = Annotated[str | None, Option(help=help_of("system"))]
AnswerFormat = Annotated[str | None, Option(help=help_of("answer_format"))]
Seed = Annotated[int, Option(help="Seed of the sampling.", callback=within(0, 2**31 - 1))]


@command(app)
def evaluate(
    call: Call,
    model: Model = "bundled",
    per_cell: PerCell = 100,
    temperature: Temperature = 0.0,
    samples: Annotated[
        int,
        Option(
            help="Completions of each problem; several give pass@k and majority vote.",
            callback=within(1, 1024),
        ),
    ] = 1,
    seed: Seed = 0,
    data: Annotated[str, Option(help="generated, or data as for run.")] = "generated",
    whole: Annotated[
        bool, Option("--all", help="All problems of your data, also those to train on.")
    ] = False,
    prompt_column: Annotated[str | None, Option(help=help_of("prompt_column"))] = None,
    answer_column: Annotated[str | None, Option(help=help_of("answer_column"))] = None,
    domains: Annotated[
        str | None, Option(help="Generated domains, separated by commas; default: those of run.")
    ] = None,
    verifier: Annotated[str | None, Option(help="path/to/file.py:function.")] = None,
    system: System = None,
    answer_format: AnswerFormat = None,
    int8: Annotated[bool, Option(help="Evaluate an INT8 copy.")] = False,
    max_completion: Annotated[
        int | None,
        Option(help="Longest completion, in tokens; default: that of run.", callback=within(1)),
    ] = None,
    output: Annotated[Path | None, Option(help="Save every item (.json.gz).")] = None,
) -> None:
    """Measure a model on held-out problems, with 95 % Wilson intervals.

    Examples:

    `cpugrpo evaluate --model runs/first/model --per-cell 300`

    `cpugrpo evaluate --model smollm2 --per-cell 20`

    `cpugrpo evaluate --model smollm2 --samples 8 --temperature 0.8`

    `cpugrpo evaluate --model smollm2 --data my-test.jsonl --all`
    """
    hardware.configure_threads()
    from cpugrpo_edu.evaluate import evaluate as measure
    from cpugrpo_edu.record.evaluations import save_evaluation
    from cpugrpo_edu.run.vote import check_samples, evaluate_samples
    from cpugrpo_edu.sample import Sampling
    from cpugrpo_edu.show.progress import ProgressDisplay
    from cpugrpo_edu.tasks.reasoning_gym import PREFIX

    if whole and (data == "generated" or data.startswith(PREFIX)):
        raise UserError("--all is for your own data; name them with --data")
    given: dict[str, Any] = {
        "max_completion": max_completion,
        "domains": None if domains is None else comma_names(domains),
        "system": system,
        "answer_format": answer_format,
    }
    config = config_for(
        model,
        data=data,
        verifier=verifier,
        prompt_column=prompt_column,
        answer_column=answer_column,
        per_cell=MOST if whole else per_cell,
        **{name: value for name, value in given.items() if value is not None},
    )
    sampling = Sampling(config.max_completion, temperature, seed=seed)
    check_samples(samples, sampling)
    if output is not None:
        check_output_folder(output.parent)
        if output.exists():
            raise UserError(f"{output} already exists; give another --output")
    policy, problems, left = load_asked(config, int8, whole)
    if left:
        call.say(
            f"evaluating {len(problems)} of {len(problems) + left} problems of {data}, those that "
            "a run holds out by the hash of their text; --all evaluates every one"
        )
    label = f"{model}, INT8" if int8 else model
    with ProgressDisplay(quiet=call.quiet) as display:
        bar = display.counter("evaluate", len(problems))
        if samples > 1:
            several = evaluate_samples(policy, problems, label, samples, sampling, bar)
        else:
            one = measure(policy, problems, label, sampling, bar)
    if output is not None:
        save_evaluation(several if samples > 1 else one, output)
    if samples > 1:
        give_samples(call, several)
    else:
        give_accuracy(call, one)


def load_asked(config: RunConfig, int8: bool, whole: bool) -> tuple[Policy, list[Problem], int]:
    """The policy, or its INT8 copy, and the held-out problems, or all of the user's own, read in
    its answer format; also how many of the user's problems are left out."""
    from cpugrpo_edu.engine.architectures import require
    from cpugrpo_edu.engine.int8 import quantize_for_rollout
    from cpugrpo_edu.models.load import check_policy, default_answer_format, load_policy
    from cpugrpo_edu.run.data import load_data
    from cpugrpo_edu.tasks.answers import check_answer_format, with_answer_format

    if config.answer_format is not None:
        check_answer_format(config.answer_format)
    training, problems = load_data(config, to_train=False)
    training = list(training or ())
    if whole:
        problems, training = [*training, *problems], []
    policy = load_policy(config.model, system=config.system, answer_format=config.answer_format)
    check_policy(policy)
    chosen = config.answer_format or default_answer_format(policy.model.config)
    if int8:
        require(policy.model.config, "INT8 copy")
        policy = replace(policy, model=quantize_for_rollout(policy.model))
    return policy, with_answer_format(problems, chosen), len(training)


def give_accuracy(call: Call, result: Evaluation) -> None:
    from cpugrpo_edu.record.stats import accuracy_table, is_graded

    found = accuracy_table(result)
    overall = f"Overall {accuracy_text(found['overall'])}"
    if is_graded(found["overall"]):
        overall += f" with full marks; mean grade {found['overall']['grade']:.3f}"
    overall += f"; {result.seconds:.1f} s"
    call.give(found, accuracies(result.label, found), overall)


def give_samples(call: Call, result: SampledEvaluation) -> None:
    """A row for each pass@k and one for the majority vote, by difficulty."""
    from cpugrpo_edu.record.pass_at_k import sampled_table

    found = sampled_table(result)
    parts = {**found["by_difficulty"], "all": found["overall"]}
    rows = [
        [f"pass@{k}", *(estimate_text(part["pass_at_k"][k]) for part in parts.values())]
        for k in found["overall"]["pass_at_k"]
    ]
    rows.append(
        [f"majority of {result.n}", *(estimate_text(part["majority"]) for part in parts.values())]
    )
    shown = table(
        f"{result.label}: exact match in % (95 % Wilson interval), {result.n} completions of each "
        f"problem at temperature {result.temperature:g}",
        ["", *(f"{name}, {part['n']}" for name, part in parts.items())],
        rows,
    )
    call.give(found, shown)


def estimate_text(row: dict[str, float]) -> str:
    """An estimate and its interval in percent."""
    return f"{100 * row['estimate']:.1f} ({100 * row['low']:.1f}–{100 * row['high']:.1f})"


def accuracy_text(row: dict[str, Any] | None) -> str:
    """Accuracy and interval in percent, and the number of problems."""
    if row is None:
        return "–"
    return f"{estimate_text({**row, 'estimate': row['accuracy']})}, {row['n']}"


def accuracies(label: str, found: dict[str, Any]) -> Table:
    from cpugrpo_edu.record.stats import is_graded

    what = "full marks" if is_graded(found["overall"]) else "exact match"
    names = [name for name in DIFFICULTIES if name in found["by_difficulty"]]
    cells = {**found["cells"], "all": found["by_difficulty"]}
    return table(
        f"{label}: {what} in % (95 % Wilson interval), n per cell",
        ["Domain", *names],
        [[domain, *(accuracy_text(row.get(n)) for n in names)] for domain, row in cells.items()],
    )


@command(app)
def generate(
    call: Call,
    prompt: Annotated[str, Argument(help="The question for the model.")],
    model: Model = "bundled",
    n: Annotated[int, Option(help="How many completions.", callback=within(1))] = 1,
    temperature: Temperature = 0.0,
    max_completion: Longest = 128,
    system: System = None,
    seed: Seed = 0,
) -> None:
    """Try a prompt.

    Example: `cpugrpo generate "Compute 12+7-5." --n 4 --temperature 1`
    """
    hardware.configure_threads()
    from cpugrpo_edu.models.load import check_policy, load_policy
    from cpugrpo_edu.sample import Sampling, rollout

    if not prompt.strip():
        raise UserError("the prompt is empty; give a question in quotes")
    sampling = Sampling(max_completion, temperature, seed=seed)
    policy = load_policy(model, system=system)
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
    call.give(found, "\n\n".join(episode.text for episode in group.episodes))
