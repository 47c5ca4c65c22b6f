"""Before training: check everything that can fail, then load the model and plan its memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from cpugrpo_edu.curriculum import Stage, stage_problems
from cpugrpo_edu.data import Problem
from cpugrpo_edu.engine import c_kernel, ranks
from cpugrpo_edu.engine.architectures import context_length, require_context
from cpugrpo_edu.engine.hardware import configure_threads
from cpugrpo_edu.engine.memory import PeakMemory, free_memory
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.sizes import (
    checkpointing_policy,
    ensure_fits,
    estimate_training_memory,
    fits,
)
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.adapters import adapter_in
from cpugrpo_edu.models.load import (
    check_policy,
    default_answer_format,
    fingerprint,
    load_policy,
    resolve_source,
    snapshot,
)
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.files import check_output_folder, is_temporary
from cpugrpo_edu.record.machine import GIB, available_memory
from cpugrpo_edu.record.metrics import MetricsLog
from cpugrpo_edu.rewards import parse_rewards
from cpugrpo_edu.run.anchors import load_anchor
from cpugrpo_edu.run.config import RunConfig, check_settings, check_tracker
from cpugrpo_edu.run.consolidate import check_solutions
from cpugrpo_edu.run.data import load_data, select_problems
from cpugrpo_edu.run.inputs import check_inputs, check_prompt, judge_again
from cpugrpo_edu.run.pause import Control
from cpugrpo_edu.run.references import check_references
from cpugrpo_edu.run.stage import grpo_arguments
from cpugrpo_edu.run.state import Learner, RunState, Session, load_state
from cpugrpo_edu.show.progress import ProgressDisplay
from cpugrpo_edu.tasks.answers import with_answer_format


def prepare(
    config: RunConfig,
    output: Path,
    resume: bool,
    *,
    display: ProgressDisplay,
    control: Control,
    peak: PeakMemory,
    started: float,
    report_to: str,
    rejudge: bool = False,
) -> Session:
    """Check all that can be checked before the model is loaded; nothing is written yet."""
    check_settings(config)
    check_tracker(report_to)
    grpo_arguments(config, "unused", config.stages[0])  # TRL's own checks
    if ranks.size() > 1 and config.frozen:
        raise UserError(
            "an int8 base cannot be trained by several processes yet; "
            "choose --dtype float32 or bfloat16 with --lora, or one process"
        )
    training, held_out = load_data(config)
    check_output_folder(output)
    if not resume and output.is_dir() and not all(map(is_temporary, output.iterdir())):
        raise UserError(
            f"{output} already exists and is not empty; give another --output, "
            "or --resume to continue the run in it"
        )
    problems = [problems_of_stage(config, i, training) for i in range(len(config.stages))]
    protected = protected_problems(config, training)
    check_solutions(config, problems)
    session = Session(
        config=config,
        output=output,
        state=load_state(output, config) if resume else RunState.new(config),
        rewards=parse_rewards(config.rewards, config.max_completion),
        problems=problems,
        protected=protected,
        held_out=held_out,
        threads=configure_threads(config.threads),
        display=display,
        control=control,
        peak=peak,
        started=started,
        report_to=report_to,
    )
    check_inputs(session, rejudge)
    steps = ", ".join(str(stage.steps) for stage in config.stages)
    processes = f", {ranks.size()} processes" if ranks.size() > 1 else ""
    display.message(
        f"{len(config.stages)} stages of {steps} GRPO steps on {config.model}, "
        f"{session.threads['threads']} threads, in {output}{processes}"
    )
    ranks.barrier()  # no rank writes until all have checked the folder
    return session


def problems_of_stage(
    config: RunConfig, index: int, training: list[Problem] | None
) -> list[Problem]:
    """The training problems of a stage: generated, or chosen from the user's own."""
    stage = config.stages[index]
    count = max(1, stage.steps) * config.prompts_per_step
    return draw(config, stage, count, index, training)


def protected_problems(config: RunConfig, training: list[Problem] | None) -> list[Problem]:
    """Problems of the difficulties that the model must not forget, the same number of each."""
    if not (config.protect and config.consolidates):
        return []
    mixture = dict.fromkeys(config.protect, 1 / len(config.protect))
    stage = Stage("protected", mixture, steps=0, learning_rate=0.0)
    return draw(config, stage, config.fisher_examples, len(config.stages), training)


def draw(
    config: RunConfig, stage: Stage, count: int, number: int, training: list[Problem] | None
) -> list[Problem]:
    """``count`` problems in a stage's mixture; another ``number`` gives others."""
    if training is None:
        return stage_problems(stage, config.domains, count, seed=1000 * config.seed + number)
    offset = count * number + 7919 * config.seed  # other problems in each stage and seed
    return select_problems(stage, training, count, offset)


def load(session: Session) -> Learner:
    """Load the model, at the last complete stage of a resumed run, and write the first state."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config, state = session.config, session.state
    last = session.stage_folder(len(state.stages) - 1) if state.stages else None
    available = available_memory()
    if session.memory_limit is not None:
        available = min(available, session.memory_limit)
    if config.kernel != "packed" and (config.int8_rollouts or config.frozen):
        c_kernel.compile_ahead()
    policy = load_policy(
        config.model if last is None or config.lora_rank else last,
        dtype=config.weights,
        kernel=config.kernel,
        lora_rank=config.lora_rank,
        system=config.system,
        answer_format=config.answer_format,
        seed=config.seed,
        options=EngineOptions(config.engine, memory_limit=session.memory_limit),
    )
    if not config.lora_rank:  # TRL loads the reference of a KL term from here
        policy.model.config._name_or_path = resolve_source(config.model)
        if config.beta and adapter_in(resolve_source(config.model)):
            raise UserError(
                f"a KL term (--beta) needs the weights of {config.model}, which is an adapter; "
                "train with --lora, or export the model first (cpugrpo export --to merged)"
            )
    if config.kernel == "compiled" and not c_kernel.available():
        session.display.message(
            f"no compiled kernel here ({c_kernel.library()[1]}); using torch's instead"
        )
    check_policy(policy)
    check_prompt(session, policy)
    read_answers(session, policy)
    check_lengths(session, policy)
    first = snapshot(policy.model)
    anchor = None
    if last is not None:
        if config.lora_rank:
            adapter = load_file(last / "adapter" / "adapter_model.safetensors")
            set_peft_model_state_dict(policy.model, adapter)
        else:
            first = snapshot(load_policy(config.model, dtype=config.weights).model)
        if (last / "anchor.safetensors").exists():
            anchor = load_anchor(last / "anchor.safetensors")
    checkpointing = plan_memory(session, policy)
    if not state.fingerprint:
        state.fingerprint = state.fingerprint_first = fingerprint(policy.model)
    state.seconds["load"] += time.time() - session.started
    if session.rejudge:
        ranks.on_main(lambda: judge_again(session))
    session.save_state()  # the first thing written, so a refused run leaves nothing behind
    log = MetricsLog(session.output / "metrics.jsonl" if ranks.is_main() else os.devnull)
    return Learner(policy, anchor, first, checkpointing, available, log)


def read_answers(session: Session, policy: Policy) -> None:
    """Let every problem's task read answers in the asked format, or in the model's own."""
    chosen = session.config.answer_format or default_answer_format(policy.model.config)
    session.problems = [with_answer_format(problems, chosen) for problems in session.problems]
    session.protected = with_answer_format(session.protected, chosen)
    session.held_out = with_answer_format(session.held_out, chosen)
    training = [
        p for p, stage in zip(session.problems, session.config.stages, strict=True) if stage.steps
    ]
    if warning := check_references([p for part in training for p in part] or session.held_out):
        session.display.message(warning)


def check_lengths(session: Session, policy: Policy) -> None:
    """UserError if a prompt and a completion are longer than the model's context."""
    config, limit = session.config, context_length(policy.model.config)
    if limit is None:
        return
    rest = len(policy.encode_problem(Problem("short", "", "", "1", "")))
    problems = {
        p.question: p
        for part in (*session.problems, session.protected, session.held_out)
        for p in part
    }
    for question, problem in problems.items():
        # No text has more tokens than bytes, so most need not be tokenized.
        whole = getattr(problem, "messages", None)
        if whole or rest + len(question.encode()) + config.max_completion > limit:
            length = len(policy.encode_problem(problem))
            require_context(policy.model.config, length, config.max_completion)


def plan_memory(session: Session, policy: Policy) -> bool:
    """Whether to checkpoint activations. UserError if not even one completion would fit."""
    config, limit = session.config, session.memory_limit

    def need(checkpointing: bool) -> int:
        """Bytes on top of what the process holds now, with the model loaded."""
        parts = estimate_training_memory(
            policy.model.config,
            mode="lora" if config.lora_rank else "full",
            lora_rank=config.lora_rank or 16,
            dtype_bytes=policy.model.dtype.itemsize,
            tokens_per_sequence=config.max_completion + 64,
            micro_batch=config.micro_batch or 1,
            checkpointing=checkpointing,
            reference=config.beta > 0,
        )
        consolidation = 4 if config.consolidates else 0  # anchor, Fisher, one gradient
        int8 = parts["weights"] // 4 if config.int8_rollouts and not config.frozen else 0
        return parts["total"] - parts["weights"] + consolidation * parts["gradients"] + int8

    free = free_memory(limit)
    on = checkpointing_policy(config.checkpointing, need(False), free)
    if limit is not None and not fits(need(on), free):
        held = psutil.Process().memory_info().rss
        raise UserError(
            f"training {config.model} needs about {(held + need(on) / 0.8) / GIB:.2f} GiB, "
            f"{held / GIB:.2f} of them for the program and the weights, but the memory budget "
            f"is {config.memory_budget_gib:.4g} GiB; raise it, or choose a smaller model, LoRA "
            "or shorter completions"
        )
    ensure_fits(f"training {config.model}", need(on), free)
    return on
