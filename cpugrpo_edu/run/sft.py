"""Supervised training with TRL's ``SFTTrainer``, on the CPU.

It trains on tokens: the very prompt of a rollout, then the completion with the token that ends it.
Only the completion has labels. Text in the chat template would not do: templates add tokens after
the end of an answer, or none at all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from cpugrpo_edu.engine.architectures import require_context
from cpugrpo_edu.engine.memory import free_memory
from cpugrpo_edu.engine.sizes import ensure_fits, estimate_training_memory, fits
from cpugrpo_edu.engine.trl_internals import without_notices
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.fisher import Example
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.metrics import MetricsLog
from cpugrpo_edu.run.pause import Control, stop_on_interrupt
from cpugrpo_edu.run.warmstart_config import WarmstartConfig
from cpugrpo_edu.show.progress import ProgressDisplay


def plan_micro_batch(policy: Policy, examples: list[Example], config: WarmstartConfig) -> int:
    """Examples in one pass: the most that fit and divide the batch. UserError if not even one."""
    prompt, completion = (
        max(len(ids) for ids in part)
        for part in zip(*((e.prompt_ids, e.completion_ids) for e in examples), strict=True)
    )
    require_context(policy.model.config, prompt, completion)

    def need(size: int) -> int:
        parts = estimate_training_memory(
            policy.model.config,
            mode="lora" if config.lora_rank else "full",
            lora_rank=config.lora_rank or 16,
            dtype_bytes=policy.model.dtype.itemsize,
            tokens_per_sequence=prompt + completion,
            micro_batch=size,
            checkpointing=True,
        )
        return parts["total"] - parts["weights"]

    free = free_memory()
    ensure_fits(f"training {config.model}", need(1), free)
    sizes = range(config.batch_size, 0, -1)
    return next(n for n in sizes if config.batch_size % n == 0 and fits(need(n), free))


class Reporter(TrainerCallback):
    """Logs and shows every step, and stops the training where it was asked for or went wrong."""

    def __init__(
        self, config: WarmstartConfig, log: MetricsLog, display: ProgressDisplay, control: Control
    ):
        self.log, self.display, self.control = log, display, control
        self.losses: list[float] = []
        display.start_stage(config.method, config.steps)

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        step, metrics = state.global_step, more["logs"]
        if "loss" not in metrics:  # the summary at the end
            return
        loss = metrics["loss"]
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of step {step} is {loss}, so no model was saved; give a smaller --lr"
            )
        self.losses.append(loss)
        self.log.write({"step": step, **metrics})
        self.display.update(step, **metrics)
        if step % max(1, state.max_steps // 10) == 0:
            self.display.message(f"step {step}: loss {loss:.3f}")

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.control.should_stop():
            control.should_training_stop = True


def train(
    policy: Policy,
    examples: list[Example],
    config: WarmstartConfig,
    micro_batch: int,
    reporter: Reporter,
) -> None:
    """Train the policy in place with TRL."""
    with without_notices(), stop_on_interrupt(reporter.control):
        trainer = make_trainer(policy, examples, config, micro_batch, reporter)
        trainer.train()


def make_trainer(
    policy: Policy,
    examples: list[Example],
    config: WarmstartConfig,
    micro_batch: int,
    reporter: Reporter,
) -> SFTTrainer:
    """TRL's trainer on the CPU, on examples whose prompts have no labels."""
    rows = [
        {
            "input_ids": [*example.prompt_ids, *example.completion_ids],
            "labels": [*[-100] * len(example.prompt_ids), *example.completion_ids],
        }
        for example in examples
    ]
    args = SFTConfig(
        output_dir=str(reporter.log.path.parent),
        max_steps=config.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=config.batch_size // micro_batch,
        learning_rate=config.rate,
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length",  # little padding
        max_length=None,  # never cut an example: it would not learn to end
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=config.seed,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,  # else a NaN loss would be logged as an old number
    )
    trainer = SFTTrainer(
        policy.model,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=policy.tokenizer,
        callbacks=[reporter],
    )
    trainer.remove_callback(PrinterCallback)
    check_loss(trainer, policy, rows[0])
    return trainer


def check_loss(trainer: SFTTrainer, policy: Policy, row: dict[str, list[int]]) -> None:
    """UserError if TRL's loss is not that of a plain forward pass.

    TRL multiplies hidden states with the head itself, and so must know what else an architecture
    does to its logits.
    """
    model, ids = policy.model, torch.tensor([row["input_ids"]])
    training = model.training
    model.eval()
    with torch.no_grad():
        found = float(trainer.compute_loss(model, trainer.data_collator([row])))
        logits = model(input_ids=ids).logits[0, :-1].float()
    model.train(training)
    plain = float(cross_entropy(logits, torch.tensor(row["labels"][1:])))
    if not abs(found - plain) < (0.01 if model.dtype == torch.float32 else 0.3):  # by rounding
        raise UserError(
            f"TRL computes another loss for a {model.config.model_type!r} model than the model "
            "itself; choose another model, such as one built like Qwen2 or Llama"
        )
