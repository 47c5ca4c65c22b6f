"""Parts of TRL's trainer that are private, and for each the reason why we need it.

Everything that a release of TRL may change without notice is here, or is one of the three methods
that ``trl_trainer`` overrides. ``tests/test_trl_contract.py`` fails first, and says what moved.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import trl.trainer.utils
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from cpugrpo_edu.engine import ranks
from cpugrpo_edu.engine.blocks import causal_lm
from cpugrpo_edu.errors import UserError

LogProbs = tuple[Tensor, Tensor | None, Tensor | None]
"""Log-probs in nats and entropies, (B, C) each, and a loss that only mixtures of experts have."""


@contextlib.contextmanager
def without_notices() -> Iterator[None]:
    """Hide what TRL, transformers and accelerate tell their developers; no user can act on it."""
    with warnings.catch_warnings():
        # TRL 1.16 uses a name that transformers 6 will drop, accelerate one that torch will.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        # ``rollout_func`` is the public way to bring a sampler; the contract test watches it.
        warnings.filterwarnings("ignore", ".*rollout_func.*experimental", UserWarning)
        yield


@dataclass(frozen=True)
class Offloaded:
    """A reference model that stays in its files until it is needed."""

    config: Any
    dtype: torch.dtype

    def load(self, temperature: float) -> Any:
        """The model, with the forward pass that TRL gives its models: it returns log-probs."""
        model = AutoModelForCausalLM.from_pretrained(self.config._name_or_path, dtype=self.dtype)
        add_fused_lm_head(model, temperature=temperature)
        return model.eval().requires_grad_(False)


class GRPOInternals(GRPOTrainer):
    """TRL's trainer with names of ours for its private parts."""

    @property
    def metrics(self) -> dict[str, list[float]]:
        """The values of each metric since the last log, by TRL's names.

        TRL adds values in every loss and averages them when it logs. There is no public way to
        add one, to take back those of a failed attempt, or to average them over ranks.
        """
        found: dict[str, list[float]] = self._metrics["train"]
        return found

    @property
    def last_completions(self) -> dict[str, Any]:
        """Prompts, completions and rewards of the last step, as TRL keeps them for its own log."""
        logs: dict[str, Any] = self._logs
        return logs

    @property
    def generations(self) -> int:
        """How often completions were generated, or could have been, up to now.

        The same after a resume, where TRL's own count of micro-steps begins at 0 again.
        """
        accumulation: int = self.args.gradient_accumulation_steps
        return self.state.global_step * accumulation + self._step % accumulation

    def remember(self) -> Callable[[], None]:
        """A function that puts gradients and metrics back to what they are now."""
        model: Any = self.model
        parameters = [p for p in model.parameters() if p.requires_grad]
        # With gradient accumulation only; else they are None, and this costs nothing.
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        lengths = {name: len(values) for name, values in self.metrics.items()}

        def undo() -> None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is None:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.copy_(gradient)
            for name, values in self.metrics.items():
                del values[lengths.get(name, 0) :]

        return undo

    @contextlib.contextmanager
    def metrics_of_this_rank(self) -> Iterator[None]:
        """Keep TRL from gathering metrics over ranks in every loss.

        Ranks differ in the number and size of their micro-batches, so they would wait for each
        other forever. ``average_metrics`` does it once a step.
        """
        with mock.patch.multiple(
            self.accelerator, gather=lambda tensor: tensor, reduce=lambda tensor, **how: tensor
        ):
            yield

    def average_metrics(self) -> None:
        """Replace the values of each metric by their mean, over the ranks that have it."""
        means = ranks.gather({k: sum(v) / len(v) for k, v in self.metrics.items() if v})
        for name in means[0]:
            values = [mean[name] for mean in means if name in mean]
            self.metrics[name][:] = [sum(values) / len(values)]

    def log_probs_of_completions(self, model: Any, *args: Any, **kwargs: Any) -> LogProbs:
        """TRL's log-probs, without those of prompt and padding, which it discards.

        TRL leaves them out only on devices with Triton. On a CPU it puts every position through
        the head, the most expensive layer of a model with a large vocabulary. It also names no
        positions, so that learned ones (GPT-2) would count the padding in front of a prompt.
        """
        lm = causal_lm(self.accelerator.unwrap_model(model))
        takes_positions = "position_ids" in inspect.signature(type(lm).forward).parameters

        def forward(**inputs: Any) -> Any:
            if takes_positions:
                positions = inputs["attention_mask"].cumsum(1) - 1
                inputs["position_ids"] = positions.clamp(min=0)
            return model(**inputs)

        with mock.patch.object(trl.trainer.utils, "_use_triton", lambda device: True):
            found: LogProbs = super()._get_per_token_logps_and_entropies(forward, *args, **kwargs)
        return found

    def check_log_probs(self) -> None:
        """UserError if TRL's log-probs are not those of a plain forward pass.

        For architectures on which nobody has compared them: TRL multiplies hidden states with the
        head itself, and so must know what else a model does to its logits.
        """
        model: Any = self.model
        rows = [[5, 6, 7, 8, 9], [7, 8, 9]]  # three tokens of prompt, or one; two of completion
        ids = torch.tensor([rows[0], [0, 0, *rows[1]]])
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
        training = model.training
        model.eval()
        with torch.no_grad():
            found = self.log_probs_of_completions(model, ids, mask, 2)[0]
            plain = [model(input_ids=torch.tensor([row])).logits[0, -3:-1].float() for row in rows]
        model.train(training)
        log_p = (torch.stack(plain) / self.temperature).log_softmax(-1)
        error = (log_p.gather(-1, ids[:, -2:, None]).squeeze(-1) - found).abs().max()
        if not error < (0.01 if plain[0].dtype == model.dtype else 0.3):  # by rounding
            raise UserError(
                f"TRL computes other log-probs for a {model.config.model_type!r} model than the "
                "model itself; choose another model, such as one built like Qwen2 or Llama"
            )
