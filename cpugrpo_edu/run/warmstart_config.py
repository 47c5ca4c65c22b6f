"""The settings of a supervised warm start; like those of a run they import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cpugrpo_edu.run.config import (
    ANSWER_FORMATS,
    RunConfig,
    check_bounds,
    check_settings,
    config_for,
    setting,
)

METHODS = ("sft", "rft")


@dataclass(frozen=True)
class WarmstartConfig:
    """Every setting of a warm start, see `cpugrpo_edu.run.warmstart`."""

    model: str = setting("bundled", "bundled, smollm2, a model folder, or a hub id.")
    method: str = setting(
        "sft",
        "Imitate worked solutions (sft), or the model's own right answers (rft).",
        METHODS,
    )
    seed: int = setting(0, "Seed of problems, adapters and sampling.", least=0, most=2**31 - 1)
    # Data
    data: str = setting("generated", "generated, or data as for run.")
    prompt_column: str | None = setting(None, "Column of your data with the prompts.")
    answer_column: str | None = setting(None, "Column of your data with the answers.")
    verifier: str | None = setting(None, "path/to/file.py:function; the file is executed.")
    domains: tuple[str, ...] = setting((), "Generated domains; by default those of run.")
    system: str | None = setting(None, "System prompt; by default the model's own.")
    answer_format: str | None = setting(
        None, "How the answer is stated, as for run.", ANSWER_FORMATS
    )
    problems: int = setting(512, "Training problems.", least=1, most=100_000)
    # Training
    steps: int = setting(200, "Optimizer steps.", least=1, most=1_000_000)
    batch_size: int = setting(8, "Examples in one step.", least=1, most=4096)
    learning_rate: float | None = setting(
        None,
        "Learning rate, which falls to 0; by default 2e-4 for LoRA, 2e-5 for all weights.",
        above=0,
    )
    lora_rank: int = setting(16, "LoRA rank; 0 trains all weights.", least=0)
    dtype: str = setting(
        "float32",
        "Type of the weights: float32, auto, or with LoRA also bfloat16.",
        ("auto", "float32", "bfloat16"),
    )
    threads: int | None = setting(None, "Threads; by default all cores.", least=1, most=1024)
    # The model's own answers
    samples: int = setting(8, "Completions of each problem (rft).", least=1, most=1024)
    keep: int = setting(4, "Most right answers to keep of one problem (rft).", least=1)
    temperature: float = setting(0.8, "Sampling temperature (rft).", above=0)
    max_completion: int = setting(128, "Longest completion, in tokens (rft).", least=1)

    @property
    def rate(self) -> float:
        """The learning rate: TRL's default for all weights, ten times as much for adapters."""
        return self.learning_rate or (2e-4 if self.lora_rank else 2e-5)

    @property
    def run(self) -> RunConfig:
        """A run of one mixed stage of as many problems, which knows how to check and draw them."""
        same = (
            *("seed", "data", "prompt_column", "answer_column", "verifier", "system"),
            *("answer_format", "lora_rank", "dtype"),
        )
        given: dict[str, Any] = {name: getattr(self, name) for name in same}
        if self.domains:
            given["domains"] = self.domains
        return config_for(
            self.model,
            **given,
            order="mixed",
            steps=(self.problems, 0, 0),
            prompts_per_step=1,
            per_cell=1,
        )


def check_warmstart(config: WarmstartConfig) -> None:
    """UserError, naming the flag, for a setting that cannot work."""
    check_bounds(config)
    check_settings(config.run)
