"""One stage of training: its trainer and its settings, and what the record says of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpugrpo_edu.curriculum import Stage
from cpugrpo_edu.engine import int8_base, ranks
from cpugrpo_edu.engine.guard import Guard, RolloutTally
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.trl_data import message_text, to_dataset, trl_rewards
from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer, cpu_config
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.load import fingerprint
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.run.pause import Interrupted
from cpugrpo_edu.run.saver import CheckpointSaver, step_of
from cpugrpo_edu.run.state import Learner, Session

STEP_METRICS = {
    # our name: TRL's
    "reward": "reward",
    "reward_std": "reward_std",
    "grade": "rewards/correct_answer/mean",
    "loss": "loss",
    "entropy": "entropy",
    "kl": "kl",
    "clip_fraction": "clip_ratio/region_mean",
    "grad_norm": "grad_norm",
    "completion_length": "completions/mean_length",
    "clipped_ratio": "completions/clipped_ratio",
    "frac_zero_std": "frac_reward_zero_std",
    "tokens_per_second": "rollout/tokens_per_second",
    "ewc_penalty": "ewc_penalty",
    "learning_rate": "learning_rate",
}


@dataclass(frozen=True)
class StageTraining:
    """A stage whose training is about to begin, or to continue from ``checkpoint``."""

    stage: Stage
    trainer: CPUGRPOTrainer
    saver: CheckpointSaver
    checkpoint: str | None
    begun: float
    """By ``time.perf_counter``."""


def begin_stage(session: Session, learner: Learner, index: int) -> StageTraining:
    """Make the trainer of a stage and find the last checkpoint within it, if there is one."""
    stage = session.config.stages[index]
    begun = time.perf_counter()
    trainer = make_trainer(session, learner, index)
    folder = session.checkpoints_folder(index)
    saver = CheckpointSaver(trainer, folder, session.config.save_minutes)
    checkpoint = saver.restore()
    done = step_of(checkpoint) if checkpoint else 0
    # Steps after the checkpoint are repeated, so their rows go.
    learner.metrics.forget_after(steps_before(session.config, index) + done)
    session.display.start_stage(stage.name, stage.steps, done)
    return StageTraining(stage, trainer, saver, str(checkpoint) if checkpoint else None, begun)


def end_stage(session: Session, learner: Learner, training: StageTraining) -> dict[str, Any]:
    """The stage's row for the record.

    Raises Interrupted if training was stopped before its last step, and UserError if it left
    every weight as it was.
    """
    stage, step = training.stage, training.trainer.state.global_step
    if ranks.agree(session.control.stopping) and step < stage.steps:
        raise Interrupted(f"stopped after step {step} of stage {stage.name!r}")
    row = row_of(stage, time.perf_counter() - training.begun, training.trainer)
    row["signal"] = session.state.signals.get(stage.name)
    weights = fingerprint(learner.policy.model)
    if weights == session.state.fingerprint and stage.steps:
        raise UserError(
            f"the weights did not change in stage {stage.name!r}; check that the learning rate "
            f"({stage.learning_rate}) is above 0 and that rewards differ within groups"
        )
    session.state.fingerprint = weights
    session.state.guard = training.trainer.guard.counts()
    if ranks.size() > 1:
        row["gradient_bytes_per_step"] = training.saver.traffic.bytes_per_step
        row["same_weights"] = len(set(ranks.gather(weights))) == 1
    return row


def make_trainer(session: Session, learner: Learner, index: int) -> CPUGRPOTrainer:
    config, problems = session.config, session.problems[index]
    stage = config.stages[index]
    args = grpo_arguments(
        config,
        session.checkpoints_folder(index),
        stage,
        gradient_checkpointing=learner.checkpointing,
        reward_weights=[reward.weight for reward in session.rewards],
        seed=config.seed + 7919 * index,
        report_to=session.report_to,
        run_name=f"{session.output.name}-{stage.name}",
    )

    def on_step(metrics: dict[str, Any]) -> None:
        write_step(session, learner, index, metrics, trainer)

    with tensorboard_in(session.output / "tensorboard" / stage.name):
        trainer = CPUGRPOTrainer(
            learner.policy,
            args,
            trl_rewards(session.rewards, problems),
            to_dataset(problems, learner.policy.system),
            engine_options(session, learner),
            learner.anchor,
            on_step,
            session.display.message,
            session.display.part,
            session.control.should_stop,
        )
    trainer.guard = Guard(config.patience, **session.state.guard)
    return trainer


def grpo_arguments(config: RunConfig, folder: str | Path, stage: Stage, **more: Any) -> Any:
    """TRL's configuration for one stage, with this process's share of the prompts."""
    processes = ranks.size()
    if processes > 1:
        # Buffers are constant and ranks run the model different numbers of times.
        more |= {"ddp_broadcast_buffers": False, "ddp_find_unused_parameters": False}
    return cpu_config(
        folder,
        prompts_per_step=ranks.prompts_per_process(config.prompts_per_step, processes),
        num_generations=config.num_generations,
        max_completion_length=config.max_completion,
        max_steps=stage.steps,
        learning_rate=stage.learning_rate,
        temperature=config.temperature,
        beta=config.beta,
        loss_type=config.loss_type,
        importance_sampling_level=config.importance_level,
        epsilon=config.epsilon,
        **more,
    )


def engine_options(session: Session, learner: Learner) -> EngineOptions:
    config = session.config
    return EngineOptions(
        int8_rollouts=config.int8_rollouts,
        kernel=config.kernel,
        importance_correction=config.importance_correction,
        engine=config.engine,
        micro_batch=config.micro_batch,
        memory_limit=session.memory_limit,
        share_prefix=config.frozen if config.share_prefix is None else config.share_prefix,
        recompute=int8_base.is_frozen(learner.policy.model),
        ewc_strength=config.ewc_strength,
        patience=config.patience,
    )


def steps_before(config: RunConfig, index: int) -> int:
    """Optimizer steps of all stages before this one."""
    return sum(stage.steps for stage in config.stages[:index])


def write_step(
    session: Session,
    learner: Learner,
    index: int,
    metrics: dict[str, Any],
    trainer: CPUGRPOTrainer,
) -> None:
    """Log and show one optimizer step. ``metrics`` have TRL's names, and "step"."""
    row = {ours: metrics[trl] for ours, trl in STEP_METRICS.items() if trl in metrics}
    row |= full_marks(trainer)
    row["rss_bytes"] = session.display.rss_bytes()
    row["cpu_percent"] = session.display.cpu_percent()
    row["sample"] = sample_of(trainer)
    step = metrics["step"]
    place = {
        "stage": session.config.stages[index].name,
        "step": step,
        "global_step": steps_before(session.config, index) + step,
    }
    learner.metrics.write(place | row)
    session.display.update(step, **row)


def full_marks(trainer: CPUGRPOTrainer) -> dict[str, float]:
    """The share of the last step's completions with the grade 1, if they were graded at all."""
    grades = list(trainer.last_completions["rewards"].get("correct_answer", []))
    return {"accuracy": sum(grade == 1 for grade in grades) / len(grades)} if grades else {}


def sample_of(trainer: CPUGRPOTrainer) -> dict[str, Any] | None:
    """One completion of the last step, at another place in the batch each time."""
    logs = trainer.last_completions
    count = len(logs["completion"])
    if not count:
        return None
    at = trainer.state.global_step * 31 % count
    right = logs["rewards"].get("correct_answer")
    return {
        "prompt": message_text(logs["prompt"][at]),
        "completion": message_text(logs["completion"][at]),
        "correct": bool(right[at] == 1) if right else None,
    }


def row_of(stage: Stage, seconds: float, trainer: CPUGRPOTrainer) -> dict[str, Any]:
    """What the record says of a stage's training, summed over all processes."""
    tally = RolloutTally.of_all(ranks.gather(trainer.tally))
    history = [row for row in trainer.state.log_history if "reward" in row]
    return {
        "name": stage.name,
        "steps": stage.steps,
        "learning_rate": stage.learning_rate,
        "seconds": seconds,
        "tokens_generated": tally.tokens,
        "rollout_seconds": tally.seconds,
        "completions": tally.rows,
        "completions_skipped": tally.skipped,
        "reward_first": history[0]["reward"] if history else None,
        "reward_last": history[-1]["reward"] if history else None,
        "ewc_penalty_last": history[-1].get("ewc_penalty") if history else None,
        "micro_batch_smallest": min(tally.micro_batches, default=None),
        "micro_batch_largest": max(tally.micro_batches, default=None),
        "rollouts_from": trainer.copy_kind or "policy",
        "rollout_drift": asdict(trainer.drift) if trainer.drift else None,
        "steps_short_of_memory": tally.shrunk,
        "memory_refusals": tally.refusals,
    }


@contextmanager
def tensorboard_in(folder: Path) -> Iterator[None]:
    """Have TensorBoard write in ``folder``: beside the checkpoints its files would be deleted."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:  # the user's own choice
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(name, None)
