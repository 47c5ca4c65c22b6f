"""GRPO through TRL, made for CPUs: ``CPUGRPOTrainer(GRPOTrainer)``.

TRL computes rewards, advantages and the loss. This subclass changes only what a
CPU needs, by calling ``super()`` and adding to it:

* rollouts come from our decode engine, from an INT8 copy of the policy if asked;
* the batch is trained in micro-batches, sorted by length, trimmed and planned by memory;
* completions whose advantage is zero are skipped where that is exact;
* the EWC gradient is added once per optimizer step;
* where memory is refused, micro-batches are halved and the step is done again;
* every step is reported, and a run that cannot learn is stopped with a sentence.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from cpugrpo_edu.data import Group
from cpugrpo_edu.engine import ranks
from cpugrpo_edu.engine.decode import sample
from cpugrpo_edu.engine.int8 import (
    DRIFT_LIMIT,
    Drift,
    measure_drift,
    quantize_for_rollout,
    refresh,
)
from cpugrpo_edu.engine.int8_base import is_frozen
from cpugrpo_edu.engine.memory import free_memory, release_memory, retry_smaller, trim_heap
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.shared_prefix import group_rows, packed_log_probs
from cpugrpo_edu.engine.sizes import estimate_training_memory, plan_micro_batch
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.ewc import Anchor, add_ewc_gradient
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.sample import Sampling

# TRL 1.16 uses names that transformers renames in version 6: nothing a user can mend.
warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
# Likewise accelerate, which passes the option on to torch by its old name.
warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)

IMPORTANCE_LEVELS = ("token", "sequence")
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")

MEAN_OVER_ROWS = {"grpo", "sapo", "dr_grpo", "luspo"}
"""Losses that average over completions; "bnpo" averages over tokens; the rest divide by
the token count of the whole generation batch, whatever the micro-batch."""


UNSUPPORTED: dict[str, Any] = {
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "top_entropy_quantile": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "generation_kwargs": None,
}
"""Fields of TRL's config that must keep their default: a bonus or a quantile of each micro-batch
is another one than of the batch, and our decode engine samples by temperature and top-p only."""

CACHE_BYTES = 96 * 2**20
"""Activations a micro-batch may take even where memory abounds: a few times a processor's
last cache. Larger ones were slower (128 completions of the bundled model: by half)."""

DRIFT_PROMPTS, DRIFT_TOKENS = 4, 32
"""What the drift of an INT8 copy is measured on, once a stage."""

MIN_TOKENS = 512
"""Fewer tokens than this in a micro-batch would read the weights too often."""


WORKING_SPACE = 4
"""What a micro-batch takes at its peak, over the activations it keeps: their derivatives,
short-lived copies and holes in the heap (measured: 2.5, and 4 in the first step of a process).
Decides only where memory is short."""


def cpu_config(
    output_dir: str | Path,
    *,
    prompts_per_step: int = 16,
    num_generations: int = 8,
    max_completion_length: int = 96,
    gradient_checkpointing: bool = False,
    **overrides: Any,
) -> GRPOConfig:
    """A ``GRPOConfig`` that works on a CPU: the stock defaults ask for bf16 and raise.

    One optimizer step trains ``prompts_per_step`` groups of ``num_generations``
    completions. Other fields of TRL's config can be given as well, but for those that
    our rollouts and micro-batches would ignore or change (``UNSUPPORTED``).
    """
    if num_generations < 2:
        raise UserError(
            f"num_generations is {num_generations}; give at least 2, since the advantage "
            "compares the completions of a group with each other"
        )
    if prompts_per_step < 1:
        raise UserError(f"prompts_per_step is {prompts_per_step}; give at least 1")
    loss_type = overrides.get("loss_type", "dapo")
    if loss_type not in LOSS_TYPES:
        raise UserError(f"unknown loss type {loss_type!r}; allowed are {', '.join(LOSS_TYPES)}")
    level = overrides.get("importance_sampling_level", "token")
    if level not in IMPORTANCE_LEVELS:
        raise UserError(
            f"unknown importance level {level!r}; allowed are {', '.join(IMPORTANCE_LEVELS)}"
        )
    for name, only in UNSUPPORTED.items():
        if overrides.get(name, only) != only:
            raise UserError(
                f"{name} is {overrides[name]!r}; the CPU trainer knows only {only!r}: leave it out"
            )
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # else a NaN loss would be logged as an old number
        "shuffle_dataset": False,
        "optim": "adamw_torch",
        "lr_scheduler_type": "constant",
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    if loss_type == "cispo":  # here the bound cuts the ratio itself; TRL's default is 0.2
        defaults["epsilon_high"] = 5.0
    return GRPOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=prompts_per_step * num_generations,
        num_generations=num_generations,
        max_completion_length=max_completion_length,
        gradient_checkpointing=gradient_checkpointing,
        **{**defaults, **overrides},
    )


@dataclass
class Guard:
    """Stops a run that silently learns nothing, and says what to do."""

    patience: int
    without_signal: int = 0
    truncated: int = 0

    def check(self, metrics: dict[str, Any]) -> None:
        """Look at one step's metrics, with TRL's names."""
        loss = metrics.get("loss")
        if loss is not None and loss != loss:
            raise UserError(
                "the loss is NaN; lower the learning rate, or train in float32 instead of bfloat16"
            )
        if not self.patience:
            return
        zero = metrics.get("frac_reward_zero_std", 0.0) == 1.0
        self.without_signal = self.without_signal + 1 if zero else 0
        cut = metrics.get("completions/clipped_ratio", 0.0) == 1.0
        self.truncated = self.truncated + 1 if cut else 0
        if self.truncated >= self.patience:
            raise UserError(
                f"all completions were cut at the length limit in {self.truncated} steps in a row; "
                "raise --max-completion, or check that the chat template and the end-of-text "
                "token are those the model was trained with"
            )
        if self.without_signal >= self.patience:
            raise UserError(
                f"in {self.without_signal} steps in a row every group's rewards were all equal, so "
                "nothing can be learnt; choose easier problems, a denser reward such as "
                "valid_steps, more generations or a higher temperature"
            )


@dataclass
class RolloutTally:
    """Tokens and seconds that rollouts took, over a stage."""

    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    rows: int = 0
    micro_batches: list[int] = field(default_factory=list)
    shrunk: int = 0
    """Steps whose micro-batches the memory made smaller than they would have been."""
    refusals: int = 0
    """Times the system refused memory, and the step was done again in smaller parts."""

    @classmethod
    def of_all(cls, tallies: list[RolloutTally]) -> RolloutTally:
        """Sums over processes; the seconds are those of the slowest, since they run together."""
        return cls(
            tokens=sum(t.tokens for t in tallies),
            seconds=max(t.seconds for t in tallies),
            skipped=sum(t.skipped for t in tallies),
            rows=sum(t.rows for t in tallies),
            micro_batches=[size for t in tallies for size in t.micro_batches],
            shrunk=sum(t.shrunk for t in tallies),
            refusals=sum(t.refusals for t in tallies),
        )


@dataclass(frozen=True)
class Offloaded:
    """A model that lies in its files until it is needed."""

    config: Any
    dtype: torch.dtype

    def load(self, temperature: float) -> Any:
        """With the forward pass that TRL gives its models: it returns log-probabilities."""
        model = AutoModelForCausalLM.from_pretrained(self.config._name_or_path, dtype=self.dtype)
        add_fused_lm_head(model, temperature=temperature)
        return model.eval().requires_grad_(False)


class CPUGRPOTrainer(GRPOTrainer):
    """GRPO (Shao et al. 2024, arXiv:2402.03300) on a CPU.

    ``policy.model`` is trained in place; ``anchor`` holds what EWC protects. The entropy, KL and
    clip fraction that TRL logs are means over micro-batches, of the rows that were trained on.
    ``on_step`` receives every optimizer step's metrics, ``say`` a sentence when memory is short.
    ``should_stop`` is asked between two steps; True saves a checkpoint and ends the training.
    """

    def __init__(
        self,
        policy: Policy,
        args: GRPOConfig,
        reward_functions: list[Any],
        dataset: Dataset,
        options: EngineOptions | None = None,
        anchor: Anchor | None = None,
        on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
        say: Callable[[str], None] = lambda sentence: None,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        if len(dataset) == 0:
            raise UserError("the training data is empty; give at least one problem")
        # On CPUs TRL projects prompt and padding through the head too; this asks it to
        # project completion positions only. Same values (tested), fewer of them.
        trl.trainer.utils._use_triton = lambda device: True
        self.options = options or EngineOptions()
        if args.top_p < 1 and self.options.int8_rollouts and self.options.importance_correction:
            raise UserError(
                f"top_p is {args.top_p}: log-probs of the tokens kept are no policy's to correct "
                "for; give top_p 1, or importance_correction=False"
            )
        self.policy = policy
        self.anchor = anchor
        self.on_step = on_step
        self.say = say
        self.most: int | None = None  # completions a micro-batch, once memory was refused
        self.guard = Guard(self.options.patience)
        self.should_stop = should_stop
        self.tally = RolloutTally()
        self.int8_copy: Any = None
        self.int8_rollouts = self.options.int8_rollouts
        self.drift: Drift | None = None
        self.last_groups: list[Group] = []
        super().__init__(
            model=policy.model,
            args=args,
            reward_funcs=reward_functions,
            train_dataset=dataset,
            processing_class=policy.tokenizer,
        )
        self.remove_callback(PrinterCallback)
        if self.options.spare_memory and self.ref_model is not None:
            self.ref_model = Offloaded(  # type: ignore[assignment]
                policy.model.config, self.ref_model.dtype
            )
            release_memory()
        if "ref" in getattr(policy.model, "peft_config", {}):
            # TRL would take a copy of the adapter, as it is now, for the reference. Ours is the
            # base model, in every stage: the policy with its adapter switched off.
            policy.model.delete_adapter("ref")

    # Rollouts

    def sampling_model(self) -> Any:
        """The model that rolls out: the live policy, or its INT8 copy with fresh weights."""
        live = self.accelerator.unwrap_model(self.model)
        if not self.int8_rollouts or is_frozen(live):
            return live  # a frozen base is INT8 already
        if self.int8_copy is None:
            self.int8_copy = quantize_for_rollout(
                live, quantize_head=self.options.int8_head, kernel=self.options.kernel
            )
        else:
            refresh(self.int8_copy, live)
        return self.int8_copy

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[list[list[int]], list[list[float]]]:
        # Prompts arrive repeated, G times in a row; undo that, so each is prefilled once.
        # Under several processes a group may be cut, then every prompt counts alone.
        copies = num_generations
        blocks = [prompt_ids[i : i + copies] for i in range(0, len(prompt_ids), copies)]
        if any(len(block) < copies or block != [block[0]] * copies for block in blocks):
            copies, blocks = 1, [[prompt] for prompt in prompt_ids]
        sampling = Sampling(
            max_new_tokens=int(self.max_completion_length or 0),
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.rollout_seed(),
            stop_at_eos=self.options.stop_at_eos,
        )
        start = time.perf_counter()
        if self.drift is None and self.int8_rollouts:
            self.check_drift([block[0] for block in blocks[:DRIFT_PROMPTS]], sampling)
        groups = sample(
            self.sampling_model(),
            [block[0] for block in blocks],
            copies,
            sampling,
            eos_ids=self.policy.eos_ids,
            pad_id=self.policy.pad_id,
            options=self.options,
        )
        if self.options.spare_memory:
            self.int8_copy = None
        seconds = time.perf_counter() - start
        self.last_groups = groups
        episodes = [episode for group in groups for episode in group.episodes]
        tokens = sum(len(episode.completion_ids) for episode in episodes)
        self.tally.tokens += tokens
        self.tally.seconds += seconds
        # The mean over processes, which is what gets logged, is then the sum of their speeds.
        rate = tokens * self.accelerator.num_processes / seconds
        self._metrics["train"]["rollout/tokens_per_second"].append(rate)
        return [e.completion_ids for e in episodes], [e.logprobs for e in episodes]

    def check_drift(self, prompts: list[list[int]], sampling: Sampling) -> None:
        """Measure the INT8 copy on a few prompts; sample from the float policy if it is too far."""
        live, copy = self.accelerator.unwrap_model(self.model), self.sampling_model()
        if copy is live:
            return
        short = replace(sampling, max_new_tokens=min(DRIFT_TOKENS, sampling.max_new_tokens))
        groups = sample(
            live,
            prompts,
            1,
            short,
            eos_ids=self.policy.eos_ids,
            pad_id=self.policy.pad_id,
            options=self.options,
        )
        self.drift = measure_drift(live, copy, groups, self.temperature)
        # Several processes measure on prompts of their own, and must decide alike.
        self.int8_rollouts = all(ranks.gather(self.drift.acceptable))
        if not self.int8_rollouts:
            self.int8_copy = None
            self.say(
                f"the INT8 copy differs too much from this policy ({self.drift}; allowed is a KL "
                f"of {DRIFT_LIMIT} nats a token), so rollouts use the float weights"
            )

    def rollout_seed(self) -> int:
        """Another one each generation and process; the same after a resume (TRL's step is not)."""
        accumulation = self.args.gradient_accumulation_steps
        step = self.state.global_step * accumulation + self._step % accumulation
        return self.args.seed * 1_000_003 + step * 101 + self.accelerator.process_index

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """In float64: in float32 the mean of 8 equal rewards of 0.7 is another number."""
        return super()._calculate_rewards(*args, **kwargs).double()

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        output["advantages"] = output["advantages"].float()
        # The clipped surrogate's ratio is pi / pi_old, where pi_old is whoever sampled. That
        # was the INT8 policy, whose log-probs we have; with delta set, the ratio is truncated.
        sampled = output.pop("sampling_per_token_logps", None)
        if self.int8_rollouts and self.options.importance_correction:
            output["old_per_token_logps"] = sampled
        return output

    # Training

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """TRL's loss, accumulated over micro-batches; halved where memory is refused."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        rows = len(inputs["completion_ids"])
        keep = self.rows_with_signal(inputs)
        self.tally.rows += rows
        self.tally.skipped += rows - len(keep)
        alone = self.accelerator.num_processes == 1
        if len(keep) == 0:  # a zero gradient, so that momentum still acts and other ranks are met
            keep = torch.arange(1)
        planned = min(self.plan(inputs), len(keep))
        if not alone:  # gradients meet in the last backward: no retry
            with self.metrics_alone():
                return self.accumulate(model, inputs, keep, planned)
        undo = self.remember()

        def attempt(size: int) -> Tensor:
            if size < planned:  # refused before: the next step will need as much memory
                undo()
                self.most = size
                self.tally.refusals += 1
            return self.accumulate(model, inputs, keep, size)

        return retry_smaller(attempt, planned, self.say)

    def accumulate(self, model: Any, inputs: dict[str, Any], keep: Tensor, size: int) -> Tensor:
        """The loss and its gradient, in micro-batches of ``size`` of the rows ``keep``.

        Several processes leave the last backward pass, in which they meet, to the caller.
        """
        rows = len(inputs["completion_ids"])
        tokens = inputs["completion_mask"].sum()
        alone = self.accelerator.num_processes == 1
        if not alone and self.loss_type == "bnpo":  # DDP averages over ranks: divide by their mean
            tokens = torch.tensor(ranks.gather(float(tokens))).mean()
        total: Tensor | float = 0.0
        whole = self.options.share_prefix
        micro_batches = list(split_by_length(inputs, keep, size, groups_together=whole))
        for index, micro in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            share: Any = 1.0
            if self.loss_type in MEAN_OVER_ROWS:
                share = len(micro["completion_ids"]) / rows
            elif self.loss_type == "bnpo":
                share = micro["completion_mask"].sum() / tokens
            syncing = contextlib.nullcontext() if last else self.accelerator.no_sync(model)
            with syncing:
                loss = share * super().compute_loss(model, micro)
                if alone or not last:
                    self.accelerator.backward(loss)
                    loss = loss.detach()
                if self.options.memory_limit is not None:
                    trim_heap()  # else each micro-batch leaves holes that the next cannot use
            total = total + loss
        assert isinstance(total, Tensor)
        # A leaf: the caller's backward then adds nothing to the gradients, which are complete.
        return total.requires_grad_() if alone else total

    @contextlib.contextmanager
    def metrics_alone(self) -> Iterator[None]:
        """Keep TRL's metrics of a micro-batch on this rank.

        It would gather them, but ranks differ in the number and the size of their micro-batches.
        """
        accelerator: Any = self.accelerator
        accelerator.gather = lambda tensor: tensor
        accelerator.reduce = lambda tensor, **how: tensor
        try:
            yield
        finally:
            del accelerator.gather, accelerator.reduce

    def remember(self) -> Callable[[], None]:
        """A function that puts gradients and metrics back to what they are now."""
        parameters = [p for p in self.policy.model.parameters() if p.requires_grad]
        # With gradient accumulation only; else they are None, and this costs nothing.
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        metrics = self._metrics["train"]
        lengths = {name: len(values) for name, values in metrics.items()}

        def undo() -> None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is None:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.copy_(gradient)
            for name, values in metrics.items():
                del values[lengths.get(name, 0) :]

        return undo

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's, or the same values from packed groups. Several processes need TRL's, since
        their gradients meet in the wrapped model."""
        if isinstance(model, Offloaded):
            loaded = model.load(self.temperature)
            result = self._get_per_token_logps_and_entropies(
                loaded, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
            del loaded.forward  # TRL's, which refers to its model: else only a collection ends it
            del loaded
            trim_heap()
            return result
        live = self.accelerator.unwrap_model(model)
        frozen = is_frozen(live)
        if not torch.is_grad_enabled():  # log-probs of the whole batch, before it is split
            one = WORKING_SPACE * self.sequence_bytes(input_ids.shape[1], True)
            rows = self.free_memory() // one
            kwargs["batch_size"] = max(1, min(kwargs.get("batch_size") or 2**20, rows))
        if not (self.options.share_prefix or frozen) or self.accelerator.num_processes > 1:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        log_probs, entropies = packed_log_probs(
            live,
            input_ids[:, :-logits_to_keep],
            attention_mask[:, :-logits_to_keep],
            input_ids[:, -logits_to_keep:],
            attention_mask[:, -logits_to_keep:],
            self.temperature,
            self.options.recompute,
            self.args.bf16,
        )
        return log_probs, entropies, None

    def rows_with_signal(self, inputs: dict[str, Any]) -> Tensor:
        """Rows to train on. A zero advantage has a zero policy gradient, so where the loss
        holds nothing else (no KL term, no entropy bonus) skipping is exact."""
        everything = torch.arange(len(inputs["completion_ids"]))
        exact = self.beta == 0.0 and not self._entropy_bonus_enabled
        if not (self.options.skip_zero_advantage and exact):
            return everything
        advantages = inputs["advantages"]
        nonzero = advantages != 0 if advantages.dim() == 1 else (advantages != 0).any(1)
        return everything[nonzero.cpu()]

    def plan(self, inputs: dict[str, Any]) -> int:
        """Completions per micro-batch: as given, or what the memory now available allows.

        The gradient is the same for every size. Where not even one completion seems to fit,
        one is tried: an estimate shall not end a run.
        """
        if self.options.micro_batch is not None:
            size = self.options.micro_batch
        else:
            rows = len(inputs["completion_ids"])
            length = inputs["prompt_ids"].shape[1] + inputs["completion_ids"].shape[1]
            least = self.num_generations if self.options.share_prefix else 1
            per_sequence = self.sequence_bytes(length, bool(self.args.gradient_checkpointing))
            best = max(least, CACHE_BYTES // per_sequence, MIN_TOKENS // length)
            wanted = plan_micro_batch(2**62, per_sequence, rows, maximum=best)
            need = WORKING_SPACE * per_sequence
            free = self.free_memory()
            size = plan_micro_batch(max(free, 2 * need), need, rows, maximum=best)
            if size < wanted:
                self.tally.shrunk += 1
                last = self.tally.micro_batches[-1:]
                if last != [size]:
                    self.say(
                        f"memory is short ({free / 2**20:.0f} MiB left): micro-batches of {size} "
                        f"instead of {wanted} completions; the gradient stays the same"
                    )
        size = min(size, self.most or size)
        self.tally.micro_batches.append(size)
        return size

    def free_memory(self) -> int:
        """Bytes left for activations: gradients and optimizer states still to come are not."""
        trained = [p for p in self.policy.model.parameters() if p.requires_grad]
        gradients = sum(p.nbytes for p in trained if p.grad is None)
        moments = 0 if self.state.global_step else 2 * sum(p.nbytes for p in trained)
        return max(0, free_memory(self.options.memory_limit) - gradients - moments)

    def sequence_bytes(self, tokens: int, checkpointing: bool) -> int:
        """Estimated bytes of one sequence's activations and logits."""
        parts = estimate_training_memory(
            self.policy.model.config,
            tokens_per_sequence=tokens,
            checkpointing=checkpointing,
            dtype_bytes=self.policy.model.dtype.itemsize,
        )
        return parts["activations"] + parts["logits"]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.options.spare_memory:
            trim_heap()  # what the backward pass freed, before the optimizer takes as much
        if (
            self.anchor is not None
            and self.options.ewc_strength
            and self.accelerator.sync_gradients
        ):
            # Once per optimizer step, after the gradients of all processes were averaged and
            # before they are clipped.
            model = self.accelerator.unwrap_model(self.model)
            penalty = add_ewc_gradient(model, self.anchor, self.options.ewc_strength)
            self._metrics["train"]["ewc_penalty"].append(float(penalty))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.accelerator.num_processes > 1:
            self.share_metrics()
        super().log(logs, start_time)
        if "loss" in logs:
            self.on_step({**logs, "step": self.state.global_step})
            self.guard.check(logs)
            if ranks.agree(self.should_stop()):
                self.control.should_save = self.control.should_training_stop = True

    def share_metrics(self) -> None:
        """Average the metrics over ranks: some are of a rank's own rows, see ``metrics_alone``."""
        metrics = self._metrics["train"]
        means = ranks.gather({k: sum(v) / len(v) for k, v in metrics.items() if v})
        for name in means[0]:
            values = [mean[name] for mean in means if name in mean]
            metrics[name][:] = [sum(values) / len(values)]


def split_by_length(
    inputs: dict[str, Any], keep: Tensor, size: int, groups_together: bool = False
) -> Iterator[dict[str, Any]]:
    """Micro-batches of at most ``size`` of the kept rows, like lengths together, trimmed.

    Padding that no row of a micro-batch needs is cut off on both sides. With
    ``groups_together`` the completions of a prompt stay neighbours instead.
    """
    rows = len(inputs["completion_ids"])
    prompt_lengths = inputs["prompt_mask"].sum(1)
    completion_lengths = inputs["completion_mask"].sum(1)
    if groups_together:
        groups = group_rows(inputs["prompt_ids"][keep], inputs["prompt_mask"][keep])
        order = keep[torch.tensor([row for group in groups for row in group])]
    else:
        order = keep[torch.argsort((prompt_lengths + completion_lengths)[keep], stable=True)]
    for chosen in order.split(size):
        micro = {
            key: value[chosen]
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows
            else value
            for key, value in inputs.items()
        }
        prompt = int(prompt_lengths[chosen].max())
        completion = max(1, int(completion_lengths[chosen].max()))
        for key, value in micro.items():
            if key in ("prompt_ids", "prompt_mask"):
                micro[key] = value[:, value.shape[1] - prompt :]
            elif isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] > 1:
                micro[key] = value[:, :completion]
        yield micro
