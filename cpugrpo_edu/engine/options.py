"""Every choice of the engine, in one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cpugrpo_edu.errors import UserError

ENGINES = ("fast", "generate")
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
IMPORTANCE_LEVELS = ("token", "sequence")
"""What our trainer takes of TRL's losses and importance ratios."""

FisherVariant = Literal[
    "exact", "sample", "empirical", "batched", "rollout_score", "lightning", "uniform"
]
FISHER_VARIANTS: tuple[str, ...] = get_args(FisherVariant)
"""The estimates of :mod:`cpugrpo_edu.engine.fisher`."""


@dataclass(frozen=True)
class EngineOptions:
    """How the engine samples and trains; none of it changes what is learned in expectation."""

    engine: str = "fast"
    """The sampler: "fast" is ours, "generate" is Hugging Face's, the reference."""
    max_rows: int = 256
    """Completions decoded together, at most."""
    stop_at_eos: bool = True
    """False samples every completion to full length, for benchmarks."""

    int8_rollouts: bool = False
    int8_head: bool = False
    """The head in INT8 as well: with a vocabulary of 150,000 a quarter of what decoding reads."""
    kernel: str = "auto"
    """Of the INT8 copy: "compiled", "packed" or "auto", see ``int8.quantize_for_rollout``."""
    importance_correction: bool = True
    """Take the policy ratio against the INT8 policy that sampled, not against the float one."""
    micro_batch: int | None = None
    """Completions per backward pass; None plans it from the available memory."""
    memory_limit: int | None = None
    """Bytes this process may hold in all; None leaves it to what the machine has."""
    skip_zero_advantage: bool = True
    share_prefix: bool = False
    """Score the completions of a prompt behind one copy of it, see :mod:`.shared_prefix`."""
    recompute: bool = False
    """Compute the inside of each MLP again in the backward pass, see ``blocks.hidden_states``."""
    spare_memory: bool = False
    """Hold a second model only while it is needed, so that the backward pass has the memory: the
    INT8 copy is made again for each rollout, and a reference (a KL term with full fine-tuning) is
    read from its files in each step."""
    ewc_strength: float = 0.0
    patience: int = 8
    """Steps without any learning signal before the run is stopped; 0 never stops it."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UserError(
                f"unknown rollout engine {self.engine!r}; allowed are {' and '.join(ENGINES)}"
            )
