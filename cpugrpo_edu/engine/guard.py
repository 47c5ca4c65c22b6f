"""What the trainer watches over a stage: whether anything can be learned, and what it did.

Both survive a resume: checkpoints keep them beside TRL's own state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cpugrpo_edu.errors import UserError

SAID_AFTER = 3
"""Steps in a row whose completions were all cut, after which the run says so."""


@dataclass
class Guard:
    """Ends a run that learns nothing, with a sentence that says what to change. It counts on from
    one stage to the next.

    ``patience`` is the number of steps in a row that it accepts; 0 accepts any number, but never
    a NaN loss.
    """

    patience: int
    without_signal: int = 0
    truncated: int = 0

    def check(self, metrics: dict[str, Any]) -> None:
        """Look at one step's metrics, by TRL's names. Raises ``UserError`` to end the run."""
        loss = metrics.get("loss")
        if loss is not None and loss != loss:
            raise UserError(
                "the loss is NaN; lower the learning rate, or train in float32 instead of bfloat16"
            )
        equal = metrics.get("frac_reward_zero_std", 0.0) == 1.0
        self.without_signal = self.without_signal + 1 if equal else 0
        cut = metrics.get("completions/clipped_ratio", 0.0) == 1.0
        self.truncated = self.truncated + 1 if cut else 0
        if not self.patience:
            return
        if self.truncated >= self.patience:
            raise UserError(
                f"all completions were cut at the length limit in {self.truncated} steps in a row; "
                "raise --max-completion, or check that the chat template and the end-of-text "
                "token are those the model was trained with"
            )
        if self.without_signal >= self.patience:
            raise UserError(
                f"in {self.without_signal} steps in a row every group's rewards were all equal, so "
                "nothing can be learned; choose easier problems, a denser reward such as "
                "valid_steps, more generations or a higher temperature"
            )

    def counts(self) -> dict[str, int]:
        """What the next stage goes on counting from."""
        return {"without_signal": self.without_signal, "truncated": self.truncated}

    def warning(self) -> str | None:
        """What to say now of the last steps, once each time that it begins to be true."""
        if self.truncated == SAID_AFTER:
            return (
                f"all completions of the last {SAID_AFTER} steps were cut at the length limit, "
                "before their end: raise --max-completion, or check the chat template and the "
                "end-of-text token"
            )
        return None


@dataclass
class RolloutTally:
    """Counts over a stage: of rollouts, of completions trained on, and of memory shortages."""

    tokens: int = 0
    seconds: float = 0.0
    """Spent in rollouts."""
    skipped: int = 0
    """Completions without an advantage, so without a gradient."""
    rows: int = 0
    """Completions, the skipped ones included."""
    micro_batches: list[int] = field(default_factory=list)
    """The size in each step."""
    shrunk: int = 0
    """Steps whose micro-batches were smaller than they would have been with more memory."""
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
