"""The whole run: evaluate, then three stages of GRPO, each consolidated and evaluated.

    record = run(RunConfig(seed=1), "runs/first")

Everything that was measured is in the returned record and in ``record.json``. The
state after every stage is on disk, so an interrupted run goes on with ``resume``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from cpugrpo_edu.curriculum import Stage, select_problems, stage_problems
from cpugrpo_edu.data import Evaluation, Problem
from cpugrpo_edu.engine import c_kernel, int8_base, ranks
from cpugrpo_edu.engine.fisher import estimate_fisher
from cpugrpo_edu.engine.hardware import configure_threads
from cpugrpo_edu.record.machine import GIB
from cpugrpo_edu.record.run_record import new_record
from cpugrpo_edu.engine.int8 import quantization_report, quantize_for_rollout, usable_kernel
from cpugrpo_edu.engine.memory import (
    PeakMemory,
    available_memory,
    checkpointing_policy,
    ensure_fits,
    estimate_training_memory,
    fits,
    free_memory,
    memory_alarm,
    release_memory,
    retry_smaller,
)
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.trl_data import message_text, to_dataset, trl_rewards
from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer, Guard, RolloutTally
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.evaluate import evaluate, working_share
from cpugrpo_edu.ewc import (
    Anchor,
    merge_anchors,
    normalize_fisher,
    take_anchor,
)
from cpugrpo_edu.fisher import Example, examples_from_groups
from cpugrpo_edu.models.load import (
    FROZEN,
    check_policy,
    fingerprint,
    load_policy,
    relative_change,
    resolve_source,
    save_policy,
    snapshot,
)
from cpugrpo_edu.record.evaluations import evaluation_path, load_evaluation, save_evaluation
from cpugrpo_edu.record.files import (
    check_output_folder,
    flush,
    is_temporary,
    replacing,
    write_failure,
    write_text,
)
from cpugrpo_edu.record.metrics import MetricsLog, read_metrics
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.record.stats import accuracy_table, compare, forgetting_matrix
from cpugrpo_edu.rewards import parse_rewards
from cpugrpo_edu.run.anchors import load_anchor, save_anchor
from cpugrpo_edu.run.checkpoints import MARK
from cpugrpo_edu.run.config import RunConfig, check_settings, check_tracker, grpo_arguments, plain
from cpugrpo_edu.run.data import load_data
from cpugrpo_edu.run.pause import Control
from cpugrpo_edu.sample import Sampling, rollout
from cpugrpo_edu.show.progress import ProgressDisplay
from cpugrpo_edu.show.report import write_report

STEP_METRICS = {
    # our name: TRL's
    "reward": "reward",
    "reward_std": "reward_std",
    "accuracy": "rewards/correct_answer/mean",
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


CURVE = ("stage", "step", "reward", "reward_std", "accuracy", "completion_length", "entropy")
"""What a record keeps of every step; ``metrics.jsonl`` has all of it."""


class Interrupted(Exception):
    """The run was stopped on request; its state is saved."""


def run(
    config: RunConfig,
    output: str | Path,
    *,
    resume: bool = False,
    display: ProgressDisplay | None = None,
    started: float | None = None,
    control: Control | None = None,
    report_to: str = "none",
) -> RunRecord:
    """Do the whole run in the folder ``output`` and return its record.

    ``started`` is when the clock began (Unix time), if imports shall count; ``control``
    pauses and stops from another thread; ``report_to`` is one of ``TRACKERS``. Raises
    UserError for bad input, and Interrupted after Ctrl-C or a stop, when ``resume=True`` with
    the same configuration goes on. Started as several processes (``distributed``), they share
    the work, the first one writes, and each returns the record.
    """
    started = started or time.time()
    ranks.join()
    with writing_to(output):
        with PeakMemory() as peak, display or ProgressDisplay(quiet=True) as shown:
            work = Run(config, Path(output), shown, started, control, report_to, peak)
            work.prepare(resume)
            work.load()
            work.measure("before")
            for index in range(len(config.stages)):
                work.do_stage(index)
            record = ranks.on_main(work.finish)
        record.results["peak_rss_bytes"] = work.peak_rss_bytes()
        record.results["cpu_percent"] = peak.cpu_percent
        if ranks.size() > 1:
            record.results["distributed"] = work.processes(work.peak_rss_bytes())

        def write() -> None:
            seconds = record.results["seconds"]
            seconds["total"] = work.seconds()  # as the report shows it: without its own writing
            start = time.perf_counter()
            write_report(record, work.output)
            seconds["report"] = time.perf_counter() - start
            seconds["total"] = work.seconds()
            record.save(work.output / "record.json")
            work.metrics.close()
            shutil.rmtree(work.output / "checkpoints", ignore_errors=True)

        ranks.on_main(write)
    return record


@contextmanager
def writing_to(output: str | Path) -> Iterator[None]:
    """A full or read-only disk ends with one sentence; the last good state stays as it was."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = write_failure(error)
        if reason is None:
            raise
        raise UserError(
            f"cannot write in {output}: {reason}; what was saved before is intact: make room or "
            "make it writable, then go on with the same command and --resume"
        ) from error


class Run:
    """One run's state, step by step. ``state`` is what ``state.json`` holds."""

    def __init__(
        self,
        config: RunConfig,
        output: Path,
        display: ProgressDisplay,
        started: float,
        control: Control | None = None,
        report_to: str = "none",
        peak: PeakMemory | None = None,
    ):
        self.config = config
        self.control = control or Control()
        self.report_to = report_to
        self.output = output
        self.display = display
        self.started = started
        self.peak = peak or PeakMemory()
        self.state: dict[str, Any] = {
            "config": plain(config),
            "stages": [],
            "seconds": {"load": 0.0, "train": 0.0, "evaluate": 0.0, "report": 0.0},
            "seconds_before": 0.0,
        }
        self.anchor: Anchor | None = None
        self.released = 0

    @property
    def frozen(self) -> bool:
        """Whether LoRA trains on a frozen INT8 base."""
        return self.config.dtype == FROZEN

    @property
    def memory_limit(self) -> int | None:
        """Bytes that this process may hold in all; processes of a machine share its budget."""
        budget = self.config.memory_budget_gib
        return None if budget is None else int(budget * GIB) // ranks.local_size()

    # Beginning

    def prepare(self, resume: bool) -> None:
        """Check everything that can be checked before the model is loaded."""
        check_settings(self.config)
        check_tracker(self.report_to)
        if ranks.size() > 1 and self.frozen:
            raise UserError(
                "an int8 base cannot be trained by several processes yet; "
                "choose --dtype float32 or bfloat16 with --lora, or one process"
            )
        self.rewards = parse_rewards(self.config.rewards, self.config.max_completion)
        stages = self.config.stages
        self.train_problems, self.eval_problems = load_data(self.config)
        check_output_folder(self.output)
        if resume:
            self.restore()
        elif self.output.is_dir() and not all(map(is_temporary, self.output.iterdir())):
            raise UserError(
                f"{self.output} already exists and is not empty; give another --output, "
                "or --resume to go on with the run in it"
            )
        # now: too few problems shall show before hours of work
        self.problems = [self.problems_for(stage, index) for index, stage in enumerate(stages)]
        self.threads = configure_threads(self.config.threads)
        self.display.message(
            f"{len(stages)} stages of {', '.join(str(s.steps) for s in stages)} GRPO steps "
            f"on {self.config.model}, {self.threads['threads']} threads, in {self.output}"
            + (f", {ranks.size()} processes" if ranks.size() > 1 else "")
        )
        ranks.barrier()  # nobody writes before everybody has looked

    def restore(self) -> None:
        path = self.output / "state.json"
        if not path.exists():
            raise UserError(
                f"{self.output} holds no run to resume (no state.json); "
                "give the output folder of an interrupted run"
            )
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            begun, done = dict(state["config"]), [str(stage["name"]) for stage in state["stages"]]
            if not self.state.keys() <= state.keys() or done != self.names()[: len(done)]:
                raise ValueError("parts are missing")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is no state of a run ({type(error).__name__}: {error}); "
                "begin again with another --output"
            ) from error
        wanted = plain(self.config)
        different = sorted(k for k in wanted if begun.get(k) != wanted[k])
        if different:
            raise UserError(
                f"{self.output} was begun with other settings ({', '.join(different)}); "
                "resume with the same ones, or give another --output"
            )
        if (self.output / "record.json").exists():
            raise UserError(f"the run in {self.output} is complete; there is nothing to resume")
        if done and not self.stage_folder(len(done) - 1).is_dir():
            raise UserError(
                f"{self.stage_folder(len(done) - 1)}, with the model after stage {done[-1]!r}, is "
                "missing; begin again with another --output"
            )
        self.state = state
        anchor = self.stage_folder(len(done) - 1) / "anchor.safetensors"
        if done and anchor.exists():
            self.anchor = load_anchor(anchor)

    def names(self) -> list[str]:
        return [stage.name for stage in self.config.stages]

    def seconds(self) -> float:
        """Since the run began, without the pauses between an interruption and its resumption."""
        return time.time() - self.started + float(self.state["seconds_before"])

    def peak_rss_bytes(self) -> int:
        """The largest so far, before an interruption as well."""
        return max(self.peak.peak_rss_bytes, int(self.state.get("peak_rss_before", 0)))

    def save_state(self) -> None:
        self.state["seconds_before"] = self.seconds()
        self.state["peak_rss_before"] = self.peak_rss_bytes()
        self.started = time.time()
        if ranks.is_main():
            write_text(self.output / "state.json", json.dumps(self.state, indent=1))

    def load(self) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        config = self.config
        done = len(self.state["stages"])
        source = str(self.stage_folder(done - 1)) if done and not config.lora_rank else config.model
        self.available = available_memory()
        if config.memory_budget_gib is not None:
            self.available = min(self.available, self.memory_limit or 0)
        self.policy = load_policy(
            source,
            dtype=config.dtype,
            kernel=config.kernel,
            lora_rank=config.lora_rank,
            system=config.system,
            seed=config.seed,
            options=EngineOptions(config.engine, memory_limit=self.memory_limit),
        )
        if not config.lora_rank:  # TRL loads the reference of a KL term from here
            self.policy.model.config._name_or_path = resolve_source(config.model)
        if config.kernel == "compiled" and not c_kernel.available():
            self.display.message(f"no compiled kernel here: {c_kernel.library()[1]}; torch's it is")
        check_policy(self.policy)
        self.first = self.starting_point(done)
        if done and config.lora_rank:
            load_trainable(self.policy.model, self.stage_folder(done - 1) / "adapter")
        self.checkpointing = self.plan_memory()
        if "fingerprint" not in self.state:
            self.state["fingerprint"] = self.state["fingerprint_first"] = fingerprint(
                self.policy.model
            )
        self.state["seconds"]["load"] += time.time() - self.started
        self.save_state()  # the first thing written: nothing is left behind by what was refused
        mine = self.output / "metrics.jsonl" if ranks.is_main() else os.devnull
        self.metrics = MetricsLog(mine)

    def starting_point(self, done: int) -> dict[str, torch.Tensor]:
        """The trainable weights before any stage, to measure how far training moved them."""
        if done and not self.config.lora_rank:
            return snapshot(load_policy(self.config.model, dtype=self.config.dtype).model)
        return snapshot(self.policy.model)

    def plan_memory(self) -> bool:
        """Whether to checkpoint; refuses a run that cannot fit one completion at a time."""
        config = self.config

        def need(checkpointing: bool) -> int:
            """Bytes on top of what the process holds now, with the model loaded."""
            parts = estimate_training_memory(
                self.policy.model.config,
                mode="lora" if config.lora_rank else "full",
                lora_rank=config.lora_rank or 16,
                dtype_bytes=self.policy.model.dtype.itemsize,
                tokens_per_sequence=config.max_completion + 64,
                micro_batch=config.micro_batch or 1,
                checkpointing=checkpointing,
                reference=config.beta > 0,
            )
            consolidation = 4 if config.fisher_examples else 0  # anchor, Fisher, one gradient
            int8 = parts["weights"] // 4 if config.int8_rollouts and not self.frozen else 0
            extra = consolidation * parts["gradients"] + int8
            return parts["total"] - parts["weights"] + extra

        free = free_memory(self.memory_limit)
        on = checkpointing_policy(config.checkpointing, need(False), free)
        if self.memory_limit is not None and not fits(need(on), free):
            held = psutil.Process().memory_info().rss
            raise UserError(
                f"training {config.model} needs about {(held + need(on) / 0.8) / GIB:.2f} GiB, "
                f"{held / GIB:.2f} of them for the program and the weights, but the memory budget "
                f"is {config.memory_budget_gib:.4g} GiB; raise it, or choose a smaller model, LoRA "
                "or shorter completions"
            )
        ensure_fits(f"training {config.model}", need(on), free)
        return on

    # Stages

    def stage_folder(self, index: int) -> Path:
        return self.output / "stages" / f"{index + 1}-{self.config.stages[index].name}"

    def do_stage(self, index: int) -> None:
        done = len(self.state["stages"])
        if index < done:
            if index == done - 1:  # the run may have ended before this was measured
                self.measure(f"after {self.names()[index]}")
            return
        stage = self.config.stages[index]
        begun = time.perf_counter()
        problems = self.problems[index]
        trainer = self.train(stage, index, problems)
        trained = time.perf_counter() - begun
        now = fingerprint(self.policy.model)
        if now == self.state["fingerprint"] and stage.steps:
            raise UserError(
                f"the weights did not change in stage {stage.name!r}; check that the learning rate "
                f"({stage.learning_rate}) is above 0 and that rewards differ within groups"
            )
        self.state["fingerprint"] = now
        consolidating = time.perf_counter()
        detail = self.consolidate(problems, index)
        fisher_seconds = time.perf_counter() - consolidating
        tally = RolloutTally.of_all(ranks.gather(trainer.tally))
        history = [row for row in trainer.state.log_history if "reward" in row]
        self.state["stages"].append(
            {
                "name": stage.name,
                "steps": stage.steps,
                "learning_rate": stage.learning_rate,
                "seconds": trained,
                "fisher_seconds": fisher_seconds,
                "tokens_generated": tally.tokens,
                "rollout_seconds": tally.seconds,
                "completions": tally.rows,
                "completions_skipped": tally.skipped,
                "reward_first": history[0]["reward"] if history else None,
                "reward_last": history[-1]["reward"] if history else None,
                "ewc_penalty_last": history[-1].get("ewc_penalty") if history else None,
                "micro_batch_smallest": min(tally.micro_batches, default=None),
                "micro_batch_largest": max(tally.micro_batches, default=None),
                "steps_short_of_memory": tally.shrunk,
                "memory_refusals": tally.refusals,
                "fisher": detail,
            }
        )
        if ranks.size() > 1:
            self.state["stages"][-1] |= {
                "gradient_bytes_per_step": self.traffic.bytes_per_step,
                "same_weights": len(set(ranks.gather(now))) == 1,
            }

        def save() -> None:
            with replacing(self.stage_folder(index)) as folder:
                save_policy(self.policy, folder)
                if self.anchor is not None:
                    save_anchor(self.anchor, folder / "anchor.safetensors")
            shutil.rmtree(self.checkpoints(index), ignore_errors=True)

        ranks.on_main(save)
        del trainer
        if self.config.cleanup:
            self.released += release_memory()
        self.state["seconds"]["train"] += time.perf_counter() - begun
        self.save_state()
        if ranks.agree(self.control.stopping):  # asked for in the stage's last step
            raise Interrupted(f"stopped after stage {stage.name!r}")
        self.measure(f"after {stage.name}")

    def problems_for(self, stage: Stage, index: int) -> list[Problem]:
        count = max(1, stage.steps) * self.config.prompts_per_step
        if self.train_problems is None:
            return stage_problems(
                stage, self.config.domains, count, seed=1000 * self.config.seed + index
            )
        offset = count * index + 7919 * self.config.seed  # other problems in each stage and seed
        return select_problems(stage, self.train_problems, count, offset)

    def checkpoints(self, index: int) -> Path:
        return self.output / "checkpoints" / f"{index + 1}"

    def train(self, stage: Stage, index: int, problems: Sequence[Problem]) -> CPUGRPOTrainer:
        config = self.config
        begun = time.perf_counter()
        args = grpo_arguments(
            config,
            self.checkpoints(index),
            stage,
            gradient_checkpointing=self.checkpointing,
            reward_weights=[reward.weight for reward in self.rewards],
            seed=config.seed + 7919 * index,
            report_to=self.report_to,
            run_name=f"{self.output.name}-{stage.name}",
        )
        options = EngineOptions(
            int8_rollouts=config.int8_rollouts,
            kernel=config.kernel,
            importance_correction=config.importance_correction,
            engine=config.engine,
            micro_batch=config.micro_batch,
            memory_limit=self.memory_limit,
            share_prefix=self.frozen if config.share_prefix is None else config.share_prefix,
            recompute=int8_base.spares_memory(self.policy.model),
            ewc_strength=config.ewc_strength,
            patience=config.patience,
        )

        def on_step(metrics: dict[str, Any]) -> None:
            row = {ours: metrics[trl] for ours, trl in STEP_METRICS.items() if trl in metrics}
            row["rss_bytes"] = self.display.rss_bytes()
            row["cpu_percent"] = self.display.cpu_percent()
            row["sample"] = sample_of(trainer)
            step = metrics["step"]
            done = sum(s.steps for s in config.stages[:index]) + step
            self.metrics.write({"stage": stage.name, "step": step, "global_step": done, **row})
            self.display.update(step, **row)

        with tracking_in(self.output / "tensorboard" / stage.name):
            trainer = CPUGRPOTrainer(
                self.policy,
                args,
                trl_rewards(self.rewards, problems),
                to_dataset(problems, self.policy.system),
                options,
                self.anchor,
                on_step,
                self.display.message,
                self.control,
            )
        saver = Checkpoints(trainer, self.checkpoints(index), config.save_minutes)
        last = saver.restore()
        self.traffic = saver.traffic
        done = int(last.name.split("-")[1]) if last else 0
        # Steps after the checkpoint are done again: their rows go.
        self.metrics.forget_after(sum(s.steps for s in config.stages[:index]) + done)
        self.display.start_stage(stage.name, stage.steps, done)
        if stage.steps:
            with stop_on_interrupt(self.control):
                trainer.train(resume_from_checkpoint=str(last) if last else None)
            stopping = ranks.agree(self.control.stopping)
            if stopping and trainer.state.global_step < stage.steps:
                self.state["seconds"]["train"] += time.perf_counter() - begun
                self.save_state()
                raise Interrupted(
                    f"stopped after step {trainer.state.global_step} of stage {stage.name!r}"
                )
        return trainer

    def consolidate(self, problems: Sequence[Problem], index: int) -> dict[str, Any]:
        """Fisher information on this stage's problems, kept for EWC in the next one."""
        config = self.config
        if config.fisher_examples == 0 or not self.config.stages[index].steps:
            return {}  # nothing learnt since the last anchor: it would only count twice
        chosen = ranks.share(list(problems)[-config.fisher_examples :])
        mine = config.seed + 101 * ranks.rank()
        if config.fisher in ("empirical", "batched"):
            prompts = [self.policy.encode_problem(problem) for problem in chosen]
            solutions = [self.policy.tokenizer(p.solution or p.answer)["input_ids"] for p in chosen]
            examples = [Example(p, s) for p, s in zip(prompts, solutions, strict=True)]
        elif config.fisher == "lightning":
            examples = []  # it looks at weights alone
        else:
            sampling = Sampling(config.max_completion, 1.0, seed=mine + index)
            examples = examples_from_groups(rollout(self.policy, chosen, 1, sampling))

        def estimate(batch_size: int) -> dict[str, torch.Tensor]:
            return estimate_fisher(
                self.policy.model,
                examples,
                config.fisher,  # type: ignore[arg-type]
                batch_size=batch_size,
                seed=mine,
                memory_limit=self.memory_limit,
            )

        fisher = retry_smaller(estimate, 8, self.display.message)
        fisher = ranks.average(fisher, len(chosen))
        values = torch.cat([f.flatten() for f in fisher.values()])
        mean = float(values.mean())
        if mean > 0:
            latest = take_anchor(self.policy.model, normalize_fisher(fisher))
            self.anchor = merge_anchors(self.anchor, latest, config.ewc_decay)
        return {
            "variant": config.fisher,
            "examples": config.fisher_examples if ranks.size() > 1 else len(chosen),
            "mean": mean,
            "largest": float(values.max()),
            "parameters": values.numel(),
        }

    # Measuring

    def measure(self, label: str) -> None:
        """Evaluate, on the first process while others wait."""
        if self.config.per_cell:
            ranks.on_main(lambda: self.evaluation(label) and None)

    def evaluation(self, label: str, model: Any = None) -> Evaluation | None:
        """Evaluate on the held-out problems, unless that was done before an interruption."""
        if self.config.per_cell == 0:
            return None
        path = evaluation_path(self.output, label)
        if path.exists():
            return load_evaluation(path)
        begun = time.perf_counter()
        bar = self.display.counter(f"evaluate {label}", len(self.eval_problems))

        def on_done(more: int) -> None:
            bar(more)
            if self.control.checkpoint():
                raise Interrupted(f"stopped while evaluating {label!r}")

        policy = self.policy if model is None else replace(self.policy, model=model)
        greedy = Sampling(self.config.max_completion, temperature=0.0)
        evaluation = evaluate(policy, self.eval_problems, label, greedy, on_done)
        save_evaluation(evaluation, path)
        self.state["seconds"]["evaluate"] += time.perf_counter() - begun
        self.save_state()
        return evaluation

    def finish(self) -> RunRecord:
        """The INT8 evaluation, the final model, and the record."""
        config, state = self.config, self.state
        labels = ["before", *(f"after {stage.name}" for stage in config.stages)]
        evaluations = [e for e in (self.evaluation(label) for label in labels) if e is not None]
        int8 = None
        quantization: dict[str, Any] = {}
        if config.int8_evaluation and not self.frozen:
            served = quantize_for_rollout(self.policy.model)
            ids = torch.tensor([self.policy.encode_problem(self.eval_problems[0])])
            quantization = quantization_report(self.policy.model, served, ids)
            quantization.pop("layer_error")
            int8 = self.evaluation("after, INT8", model=served)
            del served
        with replacing(self.output / "model") as folder:
            save_policy(self.policy, folder)
        results: dict[str, Any] = {
            "stages": state["stages"],
            "steps": curve(read_metrics(self.output / "metrics.jsonl")),
            "seconds": dict(state["seconds"]),
            "weights_changed": {
                "changed": state["fingerprint"] != state["fingerprint_first"],
                "relative_l2": relative_change(self.policy.model, self.first),
            },
            "components": self.components(quantization),
            "tokens_per_second": self.tokens_per_second(),
        }
        if evaluations:
            results |= self.results_of(evaluations, int8)
        return new_record("run", plain(config), results, config.seed)

    def processes(self, peak_rss_bytes: int) -> dict[str, Any]:
        """How many processes shared the work, and what crossed the wire between them."""
        # Stages done before by one process alone, then resumed by several, have no such entries.
        stages = [s for s in self.state["stages"] if "same_weights" in s]
        count = ranks.size()
        gradient = max((stage["gradient_bytes_per_step"] for stage in stages), default=0.0)
        return {
            "processes": count,
            "hosts": ranks.hosts(),
            "gradient_bytes_per_step": gradient,
            "ring_bytes_per_process": ranks.ring_bytes(gradient, count),
            "same_weights": all(stage["same_weights"] for stage in stages),
            "peak_rss_bytes": ranks.gather(peak_rss_bytes),
        }

    def tokens_per_second(self) -> dict[str, float]:
        tokens = sum(stage["tokens_generated"] for stage in self.state["stages"])
        seconds = sum(stage["rollout_seconds"] for stage in self.state["stages"])
        return {"rollout": tokens / seconds if seconds else 0.0}

    def results_of(self, evaluations: list[Evaluation], int8: Evaluation | None) -> dict[str, Any]:
        before, after = evaluations[0], evaluations[-1]
        trained = [[], *(stage.trained for stage in self.config.stages)]
        tables = [{"label": e.label, "table": accuracy_table(e)} for e in evaluations]
        comparisons = {"after vs before": compare(before, after)}
        if int8 is not None:
            tables.append({"label": int8.label, "table": accuracy_table(int8)})
            comparisons["INT8 vs fp32"] = compare(after, int8)
        firsts = {
            (p.domain, p.difficulty): i for i, p in reversed(list(enumerate(self.eval_problems)))
        }
        samples = [
            {
                "question": self.eval_problems[i].question,
                "answer": self.eval_problems[i].answer,
                "domain": domain,
                "difficulty": difficulty,
                "before": before.completions[i],
                "after": after.completions[i],
                "before_correct": before.correct[i],
                "after_correct": after.correct[i],
            }
            for (domain, difficulty), i in sorted(firsts.items(), key=lambda item: item[1])
        ]
        return {
            "evaluations": tables,
            "comparisons": comparisons,
            "forgetting": forgetting_matrix(evaluations, trained),
            "working": {"before": working_share(before), "after": working_share(after)},
            "samples": samples,
        }

    def components(self, quantization: dict[str, Any]) -> dict[str, Any]:
        """What of the pipeline really acted in this run, each with its evidence."""
        config, stages = self.config, self.state["stages"]
        penalties = [s["ewc_penalty_last"] for s in stages if s["ewc_penalty_last"] is not None]
        sizes = [s["micro_batch_smallest"] for s in stages if s["micro_batch_smallest"]]
        return {
            "curriculum": {"on": config.order != "mixed", "detail": {"order": config.order}},
            "ewc": {
                "on": bool(config.ewc_strength) and bool(penalties),
                "detail": {"strength": config.ewc_strength, "penalty_last": penalties},
            },
            "fisher": {
                "on": config.fisher_examples > 0,
                "detail": {"variant": config.fisher, "examples": config.fisher_examples},
            },
            "int8_rollouts": {
                "on": config.int8_rollouts or self.frozen,
                "detail": {
                    "importance_correction": config.importance_correction,
                    "kernel": usable_kernel(config.kernel),
                },
            },
            "int8_evaluation": {
                "on": config.int8_evaluation or self.frozen,
                "detail": quantization or {"base": "int8"},
            },
            "gradient_checkpointing": {
                "on": self.checkpointing,
                "detail": {"asked": config.checkpointing},
            },
            "adaptive_micro_batch": {
                "on": config.micro_batch is None,
                "detail": {"sizes": sizes, "available_bytes": self.available},
            },
            "memory_cleanup": {"on": config.cleanup, "detail": {"bytes_released": self.released}},
            "memory_efficient_loading": {
                "on": True,
                "detail": {"format": "safetensors, memory-mapped", "dtype": config.dtype},
            },
            "threads": {"on": True, "detail": self.threads},
        }


@contextmanager
def tracking_in(folder: Path) -> Iterator[None]:
    """TensorBoard's files in ``folder``: beside the checkpoints they would go with them."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:  # the user's own choice
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(name, None)


def sample_of(trainer: CPUGRPOTrainer) -> dict[str, Any] | None:
    """One completion of the step just done, another place in the batch each step."""
    logs: Any = trainer._logs
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


def curve(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The learning curve for the record: a few numbers a step, to five digits."""
    return [
        {
            key: float(f"{row[key]:.5g}") if isinstance(row[key], float) else row[key]
            for key in CURVE
            if key in row
        }
        for row in steps
    ]


def load_trainable(model: Any, adapter: Path) -> None:
    """Read a saved LoRA adapter back into the model's own adapter."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))


class Checkpoints(TrainerCallback):
    """Checkpoints within a stage: one every few minutes, and only complete ones count.

    Optimizer, scheduler and random states are TRL's; ``complete.json``, written last,
    says that all of it is on disk, and keeps what TRL does not. Then older ones go.
    When memory is about to run out one is written at once. Several processes decide
    together, the first one writes the mark, and ``traffic`` counts their gradients.
    """

    def __init__(self, trainer: CPUGRPOTrainer, folder: Path, minutes: float):
        self.trainer, self.folder, self.minutes = trainer, folder, minutes
        self.saved = time.monotonic()
        self.alarmed = False
        self.traffic = ranks.Traffic()
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if ranks.size() > 1:
            self.traffic.watch(self.trainer.model_wrapped)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self.saved >= 60 * self.minutes:
            control.should_save = True
        alarm = memory_alarm()
        if alarm and not self.alarmed:
            self.trainer.say(f"{alarm}; saving a checkpoint now")
            control.should_save = True
        self.alarmed = alarm is not None
        control.should_save = ranks.agree(control.should_save)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tally = RolloutTally.of_all(ranks.gather(self.trainer.tally))
        ranks.on_main(lambda: self.complete(state.global_step, tally))
        self.saved = time.monotonic()

    def complete(self, step: int, tally: RolloutTally) -> None:
        """Everything is written: mark it, and delete the older ones."""
        checkpoint = self.folder / f"checkpoint-{step}"
        # TRL's settings, pickled: resuming reads ours, and nothing here shall need a pickle
        (checkpoint / "training_args.bin").unlink(missing_ok=True)
        flush(checkpoint)
        kept = {"tally": asdict(tally), "guard": asdict(self.trainer.guard)}
        write_text(checkpoint / MARK, json.dumps(kept))
        for other in self.folder.glob("checkpoint-*"):
            if other != checkpoint:
                shutil.rmtree(other, ignore_errors=True)

    def restore(self) -> Path | None:
        """The last complete checkpoint, its tallies back in the trainer; half ones are deleted."""
        found = list(self.folder.glob("checkpoint-*"))
        complete = [checkpoint for checkpoint in found if (checkpoint / MARK).exists()]
        last = max(complete, key=lambda p: int(p.name.split("-")[1]), default=None)
        if len(set(ranks.gather(last and last.name))) > 1:
            raise UserError(
                f"the processes see different checkpoints in {self.folder}; "
                "--output must be a folder that all machines share"
            )
        for checkpoint in found:
            if checkpoint not in complete and ranks.is_main():
                shutil.rmtree(checkpoint, ignore_errors=True)
        if last is not None:
            kept = json.loads((last / MARK).read_text(encoding="utf-8"))
            if ranks.is_main():  # the sum over all
                self.trainer.tally = RolloutTally(**kept["tally"])
            self.trainer.guard = Guard(**kept["guard"])
        return last


@contextmanager
def stop_on_interrupt(control: Control) -> Iterator[None]:
    """The first Ctrl-C ends the current step, saves and stops; the second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        control.stop()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
