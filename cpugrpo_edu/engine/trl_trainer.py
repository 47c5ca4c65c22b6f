"""GRPO through TRL, made for CPUs: ``CPUGRPOTrainer(GRPOTrainer)``.

TRL computes rewards, advantages and the loss. This subclass changes only what a CPU needs:

* rollouts come from our decode engine, from an INT8 copy of the policy if asked;
* the batch is trained in micro-batches, sorted by length, trimmed, as large as memory allows;
* completions whose advantage is zero are skipped where that is exact;
* the EWC gradient is added once per optimizer step;
* where memory is refused, micro-batches are halved and the step is done again;
* every step is reported, and a run that cannot learn is stopped with a sentence.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback
from trl import GRPOConfig

from cpugrpo_edu.data import Group
from cpugrpo_edu.engine import ranks
from cpugrpo_edu.engine.architectures import require, supports
from cpugrpo_edu.engine.decode import sample
from cpugrpo_edu.engine.guard import Guard, RolloutTally
from cpugrpo_edu.engine.int8 import (
    KL_LIMIT,
    OUTSIDE_LIMIT,
    Drift,
    measure_drift,
    quantize_for_rollout,
    refresh,
)
from cpugrpo_edu.engine.int8_base import is_frozen
from cpugrpo_edu.engine.int8_matrix import usable
from cpugrpo_edu.engine.memory import free_memory, release_memory, retry_smaller, trim_heap
from cpugrpo_edu.engine.micro_batches import (
    RECOMPUTED_TOKENS,
    SHARED_TOKENS,
    WORKING_SPACE,
    share_of_loss,
    size_that_fits,
    split_by_length,
)
from cpugrpo_edu.engine.options import IMPORTANCE_LEVELS, LOSS_TYPES, EngineOptions
from cpugrpo_edu.engine.shared_prefix import packed_log_probs
from cpugrpo_edu.engine.sizes import Architecture, estimate_training_memory
from cpugrpo_edu.engine.trl_internals import GRPOInternals, LogProbs, Offloaded, without_notices
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.ewc import Anchor, add_ewc_gradient
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.machine import native_bfloat16
from cpugrpo_edu.sample import Sampling

DRIFT_PROMPTS, DRIFT_TOKENS = 8, 32
"""What the drift of an INT8 copy is measured on, once a stage."""

UNSUPPORTED: dict[str, Any] = {
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "top_entropy_quantile": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "generation_kwargs": None,
    "chat_template_kwargs": None,
    "router_aux_loss_coef": 0.0,
}
"""Fields of TRL's config that must keep their default: a bonus or a quantile of each micro-batch
differs from that of the batch, and our engine samples by temperature and top-p only."""


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

    One optimizer step trains ``prompts_per_step`` groups of ``num_generations`` completions.
    Other fields of TRL's config can be given as well, except those that our rollouts and
    micro-batches would ignore or change (``UNSUPPORTED``). Raises ``UserError`` for them and for
    values that are not allowed.
    """
    if num_generations < 2:
        raise UserError(
            f"num_generations is {num_generations}; give at least 2, since the advantage "
            "compares the completions of a group with each other"
        )
    if prompts_per_step < 1:
        raise UserError(f"prompts_per_step is {prompts_per_step}; give at least 1")
    for name, what, allowed in (
        ("loss_type", "loss type", LOSS_TYPES),
        ("importance_sampling_level", "importance level", IMPORTANCE_LEVELS),
    ):
        if overrides.get(name, allowed[0]) not in allowed:
            raise UserError(f"unknown {what} {overrides[name]!r}; allowed are {', '.join(allowed)}")
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
        "router_aux_loss_coef": 0.0,  # else that of the model, which weighs other micro-batches
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    if overrides.get("loss_type") == "cispo":  # it bounds the ratio itself; TRL's default is 0.2
        defaults["epsilon_high"] = 5.0
    with without_notices():
        return GRPOConfig(
            output_dir=str(output_dir),
            per_device_train_batch_size=prompts_per_step * num_generations,
            num_generations=num_generations,
            max_completion_length=max_completion_length,
            gradient_checkpointing=gradient_checkpointing,
            **{**defaults, **overrides},
        )


class CPUGRPOTrainer(GRPOInternals):
    """GRPO (Shao et al. 2024, arXiv:2402.03300) on a CPU.

    ``policy.model`` is trained in place; ``anchor`` holds what EWC protects. The entropy, KL and
    clip fraction that TRL logs are means over micro-batches, of the rows that were trained on.
    ``on_step`` receives every optimizer step's metrics, ``on_part`` how far the present one has
    come (what, how many done, of how many), ``say`` a sentence when memory is short.
    ``should_stop`` is asked between two steps; True saves a checkpoint and ends the training.
    Raises ``UserError`` for empty data, and while it trains for whatever ``Guard`` stops.
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
        on_part: Callable[[str, int, int], None] = lambda what, done, total: None,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        if len(dataset) == 0:
            raise UserError("the training data is empty; give at least one problem")
        if any(p.requires_grad and p.dtype is torch.bfloat16 for p in policy.model.parameters()):
            raise UserError(
                "training bfloat16 weights loses most updates, since a step is smaller than their "
                "rounding; load the model in float32, or train LoRA, whose adapters are float32"
            )
        self.options = options or EngineOptions()
        if args.top_p < 1 and self.options.int8_rollouts and self.options.importance_correction:
            raise UserError(
                f"top_p is {args.top_p}, but importance correction needs the log-probs of a whole "
                "policy, and top-p renormalizes them over the tokens it keeps; "
                "give top_p 1, or importance_correction=False"
            )
        self.policy, self.anchor = policy, anchor
        self.on_step, self.say, self.on_part = on_step, say, on_part
        self.should_stop = should_stop
        self.guard, self.tally = Guard(self.options.patience), RolloutTally()
        self.micro_batch_limit: int | None = None  # set once memory was refused
        # What rolls out: an INT8 copy by this kernel, a "bf16" copy, or None: the live policy.
        self.copy_kind = usable(self.options.kernel) if self.options.int8_rollouts else None
        self.choose_ways()
        self.rollout_copy: Any = None
        self.drift: Drift | None = None
        self.last_groups: list[Group] = []
        # Freed memory goes back to the system between the phases of a step: they need it in turn.
        self.spares_memory = self.options.spare_memory or is_frozen(policy.model)
        self.sampler: dict[str, Any] = {
            "eos_ids": policy.eos_ids,
            "pad_id": policy.pad_id,
            "options": self.options,
        }
        with without_notices():
            super().__init__(
                model=policy.model,
                args=args,
                reward_funcs=reward_functions,
                train_dataset=dataset,
                processing_class=policy.tokenizer,
                rollout_func=self.rollout,
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
        if supports(policy.model.config, "rollouts"):
            self.check_log_probs()

    def choose_ways(self) -> None:
        """Leave out the short cuts that this architecture does not allow, and say so."""
        config = self.policy.model.config
        if is_frozen(self.policy.model):
            require(config, "frozen base")
        elif self.copy_kind and (reason := supports(config, "INT8 copy")):
            self.say(f"rollouts use the float weights, not an INT8 copy: {reason}")
            self.copy_kind = None
        if self.options.share_prefix and (reason := supports(config, "packed pass")):
            self.say(f"a prompt is scored again for each of its completions: {reason}")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with without_notices():
            return super().train(*args, **kwargs)

    # Rollouts

    def rollout(self, prompts: list[Any], trainer: Any = None) -> dict[str, Any]:
        """TRL's ``rollout_func``: complete every prompt, a conversation or a text.

        Returns a list for each prompt of ``prompt_ids``, ``completion_ids`` and ``logprobs``, in
        nats under the policy that sampled. TRL passes this trainer as ``trainer``.
        """
        # Prompts arrive repeated, G times in a row; undo that, so that each is prefilled once.
        runs = [(prompt, len(list(same))) for prompt, same in itertools.groupby(prompts)]
        copies = runs[0][1]
        if any(count != copies for _, count in runs):  # a group is cut between two processes
            runs, copies = [(prompt, 1) for prompt in prompts], 1
        prompt_ids = [self.encode(prompt) for prompt, _ in runs]
        sampling = Sampling(
            max_new_tokens=int(self.max_completion_length or 0),
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.rollout_seed(),
            stop_at_eos=self.options.stop_at_eos,
        )
        if self.drift is None and self.copy_kind is not None:
            self.choose_copy(prompt_ids[:DRIFT_PROMPTS], sampling)
        start = time.perf_counter()
        on_done = self.counter("rollouts", len(prompt_ids))
        groups = sample(
            self.sampling_model(), prompt_ids, copies, sampling, on_done=on_done, **self.sampler
        )
        if self.options.spare_memory:
            self.rollout_copy = None
        if self.spares_memory:
            trim_heap()  # of keys and values, before the backward pass takes as much
        seconds = time.perf_counter() - start
        self.last_groups = groups
        rows = [(group.prompt_ids, episode) for group in groups for episode in group.episodes]
        tokens = sum(len(episode.completion_ids) for _, episode in rows)
        self.tally.tokens += tokens
        self.tally.seconds += seconds
        # The mean over processes, which is what gets logged, is then the sum of their speeds.
        rate = tokens * self.accelerator.num_processes / seconds
        self.metrics["rollout/tokens_per_second"].append(rate)
        return {
            "prompt_ids": [ids for ids, _ in rows],
            "completion_ids": [episode.completion_ids for _, episode in rows],
            "logprobs": [episode.logprobs for _, episode in rows],
        }

    def counter(self, what: str, total: int) -> Callable[[int], None]:
        """Call the result with how many more of ``total`` are done; ``on_part`` gets the sum."""
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            self.on_part(what, done, total)

        return count

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a conversation, through the chat template, or of a text."""
        if isinstance(prompt, str):
            return list(self.policy.tokenizer(prompt)["input_ids"])
        return self.policy.encode_chat(prompt)

    def rollout_seed(self) -> int:
        """Another one for each generation and process; the same after a resume."""
        return self.args.seed * 1_000_003 + self.generations * 101 + self.accelerator.process_index

    def sampling_model(self) -> Any:
        """The model that rolls out: the live policy, or its copy with fresh weights."""
        live = self.accelerator.unwrap_model(self.model)
        if self.copy_kind is None or is_frozen(live):
            return live  # a frozen base is INT8 already
        if self.rollout_copy is None:
            self.rollout_copy = quantize_for_rollout(
                live, quantize_head=self.options.int8_head, kernel=self.copy_kind
            )
        else:
            refresh(self.rollout_copy, live)
        return self.rollout_copy

    def choose_copy(self, prompts: list[list[int]], sampling: Sampling) -> None:
        """Roll out from the INT8 copy if it is close enough to the policy, measured on a few
        prompts; else from a bfloat16 copy, where the processor multiplies in bfloat16; else from
        the policy itself."""
        live = self.accelerator.unwrap_model(self.model)
        if is_frozen(live):
            return
        short = replace(sampling, max_new_tokens=min(DRIFT_TOKENS, sampling.max_new_tokens))
        groups = sample(live, prompts, 1, short, **self.sampler)
        others = ["bf16", None] if native_bfloat16() else [None]
        for next_kind in others:
            copy = self.sampling_model()
            self.drift = measure_drift(live, copy, groups, self.temperature)
            name = "bfloat16 copy" if self.copy_kind == "bf16" else "INT8 copy"
            # Several processes measure on prompts of their own, and must decide alike.
            if all(ranks.gather(self.drift.acceptable)):
                self.say(f"rollouts use the {name}: {self.drift}")
                return
            using = "a bfloat16 copy" if next_kind else "the float weights"
            self.say(
                f"the {name} differs too much from this policy ({self.drift}; allowed are a KL of "
                f"{KL_LIMIT} and {OUTSIDE_LIMIT:.0%} of the ratios), so rollouts use {using}"
            )
            self.copy_kind, self.rollout_copy = next_kind, None

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """In float64: in float32 the mean of 8 equal rewards of 0.7 is another number, and their
        advantages are not zero."""
        return super()._calculate_rewards(*args, **kwargs).double()

    # The loss and its gradient

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
        inputs = self.with_old_log_probs(inputs)
        rows = len(inputs["completion_ids"])
        keep = self.rows_with_signal(inputs)
        self.tally.rows += rows
        self.tally.skipped += rows - len(keep)
        if len(keep) == 0:  # a zero gradient, so that momentum still acts and other ranks are met
            keep = torch.arange(1)
        planned = min(self.micro_batch_size(inputs), len(keep))
        if self.accelerator.num_processes > 1:
            # No retry: DDP all-reduces in the last backward pass, where all ranks must meet.
            with self.metrics_of_this_rank():
                return self.accumulate(model, inputs, keep, planned)
        undo = self.remember()

        def attempt(size: int) -> Tensor:
            if size < planned:  # refused before: the next step will need as much memory
                undo()
                self.micro_batch_limit = size
                self.tally.refusals += 1
            return self.accumulate(model, inputs, keep, size)

        return retry_smaller(attempt, planned, self.say)

    def with_old_log_probs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with the log-probs of the policy that sampled, where they are to count.

        The clipped surrogate's ratio is pi / pi_old, where pi_old is the policy that sampled: for
        rollouts from a copy, the copy. Without these log-probs TRL takes a ratio of 1.
        """
        inputs = {**inputs, "advantages": inputs["advantages"].float()}
        sampled = inputs.pop("sampling_per_token_logps", None)
        if self.copy_kind and self.options.importance_correction and sampled is not None:
            inputs["old_per_token_logps"] = sampled
        return inputs

    def rows_with_signal(self, inputs: dict[str, Any]) -> Tensor:
        """Numbers of the rows to train on, (K,).

        A zero advantage has a zero policy gradient, so where the loss holds nothing else (no KL
        term, no entropy bonus) skipping is exact.
        """
        everything = torch.arange(len(inputs["completion_ids"]))
        bonus = self.entropy_coef != 0 or self.use_adaptive_entropy
        if self.beta != 0 or bonus or not self.options.skip_zero_advantage:
            return everything
        advantages = inputs["advantages"]
        nonzero = advantages != 0 if advantages.dim() == 1 else (advantages != 0).any(1)
        return everything[nonzero.cpu()]

    def accumulate(self, model: Any, inputs: dict[str, Any], keep: Tensor, size: int) -> Tensor:
        """The loss of the batch, its gradient already in the parameters.

        Goes through the rows ``keep`` (K,) in micro-batches of ``size``. Several processes leave
        the last backward pass, in which they meet, to the caller.
        """
        rows, tokens = len(inputs["completion_ids"]), inputs["completion_mask"].sum()
        alone = self.accelerator.num_processes == 1
        if not alone and self.loss_type == "bnpo":  # DDP averages over ranks: divide by their mean
            tokens = torch.tensor(ranks.gather(float(tokens))).mean()
        total = torch.zeros(())
        micro_batches = list(split_by_length(inputs, keep, size, self.options.share_prefix))
        count = self.counter("micro-batches", len(micro_batches))
        for index, micro in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            # DDP would all-reduce in every backward pass; one exchange of the sum is enough.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                share = share_of_loss(self.loss_type, micro, rows, tokens)
                loss = share * super().compute_loss(model, micro)
                if alone or not last:
                    self.accelerator.backward(loss)
                    loss = loss.detach()
                if self.options.memory_limit is not None:
                    trim_heap()  # else each micro-batch leaves holes that the next cannot use
            total = total + loss
            count(1)
        # The caller runs another backward pass. From a leaf it adds nothing to the gradients,
        # which are complete.
        return total.requires_grad_() if alone else total

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> LogProbs:
        """TRL's, or the same values from packed groups: (B, C) each. Several processes need
        TRL's, since DDP exchanges gradients only through the model that it wraps."""
        if isinstance(model, Offloaded):
            loaded = model.load(self.temperature)
            result = self._get_per_token_logps_and_entropies(
                loaded, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
            del loaded
            release_memory()  # TRL's forward pass refers to its model: only a collection frees it
            return result
        live = self.accelerator.unwrap_model(model)
        if not torch.is_grad_enabled():  # log-probs of the whole batch, before it is split
            one = WORKING_SPACE * self.sequence_bytes(input_ids.shape[1], True)
            rows = self.free_memory() // one
            kwargs["batch_size"] = max(1, min(kwargs.get("batch_size") or 2**20, rows))
        if not self.packs(live) or self.accelerator.num_processes > 1:
            return self.log_probs_of_completions(
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

    def packs(self, live: Any) -> bool:
        """Whether the completions of a prompt are scored in one packed pass."""
        asked = self.options.share_prefix or is_frozen(live)
        return asked and supports(live.config, "packed pass") is None

    # Memory

    def micro_batch_size(self, inputs: dict[str, Any]) -> int:
        """Completions per micro-batch: as given, or what the memory now available allows."""
        size = self.options.micro_batch or self.planned_size(inputs)
        size = min(size, self.micro_batch_limit or size)
        self.tally.micro_batches.append(size)
        return size

    def planned_size(self, inputs: dict[str, Any]) -> int:
        """What ``size_that_fits`` says of this batch; tells the user if memory makes it small."""
        length = inputs["prompt_ids"].shape[1] + inputs["completion_ids"].shape[1]
        free = self.free_memory()
        size, wanted = size_that_fits(
            len(inputs["completion_ids"]),
            length,
            self.sequence_bytes(length, bool(self.args.gradient_checkpointing)),
            free,
            self.least_together(inputs["completion_ids"].shape[1]),
        )
        if size < wanted:
            self.tally.shrunk += 1
            if self.tally.micro_batches[-1:] != [size]:  # say it when it changes, not every step
                self.say(
                    f"memory is short ({free / 2**20:.0f} MiB left): micro-batches of {size} "
                    f"instead of {wanted} completions; the gradient stays the same"
                )
        return size

    def least_together(self, length: int) -> int:
        """Completions that should share a pass: a whole group, which shares its prompt, or several,
        but not more than make long products, since they take memory."""
        if not self.options.share_prefix:
            return 1
        group = int(self.num_generations or 1)
        if self.args.gradient_checkpointing:
            return max(1, RECOMPUTED_TOKENS // (group * length)) * group
        return min(group, max(1, SHARED_TOKENS // length))

    def free_memory(self) -> int:
        """Bytes left for activations: without the gradients and optimizer states still to come."""
        trained = [p for p in self.policy.model.parameters() if p.requires_grad]
        gradients = sum(p.nbytes for p in trained if p.grad is None)
        moments = 0 if self.state.global_step else 2 * sum(p.nbytes for p in trained)
        return max(0, free_memory(self.options.memory_limit) - gradients - moments)

    def sequence_bytes(self, tokens: int, checkpointing: bool) -> int:
        """Estimated bytes of one sequence's activations and logits."""
        parts = estimate_training_memory(
            Architecture.roughly(self.policy.model.config),
            tokens_per_sequence=tokens,
            checkpointing=checkpointing,
            dtype_bytes=self.policy.model.dtype.itemsize,
        )
        # The head of a frozen base works in tiles.
        logits = 0 if is_frozen(self.policy.model) else parts["logits"]
        return parts["activations"] + logits

    # Steps

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's, and the pull of EWC once per optimizer step: after the gradients of all
        processes were averaged and before they are clipped."""
        loss = super().training_step(*args, **kwargs)
        if self.spares_memory:
            trim_heap()  # what the backward pass freed, before the optimizer takes as much
        strength = self.options.ewc_strength
        if self.anchor is not None and strength and self.accelerator.sync_gradients:
            model = self.accelerator.unwrap_model(self.model)
            penalty = add_ewc_gradient(model, self.anchor, strength)
            self.metrics["ewc_penalty"].append(float(penalty))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, and then report the step, check it, and ask whether to go on."""
        if self.accelerator.num_processes > 1:
            self.average_metrics()
        super().log(logs, start_time)
        if "loss" in logs:
            self.on_step({**logs, "step": self.state.global_step})
            self.guard.check(logs)
            if warning := self.guard.warning():
                self.say(warning)
            if ranks.agree(self.should_stop()):
                self.control.should_save = self.control.should_training_stop = True
