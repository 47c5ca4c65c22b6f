"""The work that the benchmarks measure: GRPO on a random model of 494 million parameters.

The workload B1 is three stages of GRPO on a randomly initialised model of Qwen2-0.5B's shape:
each stage 5 optimizer steps of 1 prompt (80 to 128 tokens) with 2 completions of exactly 64
tokens, KL to the base with beta 0.1, the Fisher information after each stage, EWC in the next,
and the adapter saved. B2 has 10 steps a stage, B3 groups of 8. A random model learns nothing
useful; what is measured is the work.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpugrpo_edu.engine.sizes import CATALOGUE, Architecture
from cpugrpo_edu.lab.pieces import made_once
from cpugrpo_edu.lab.worker import run_worker
from cpugrpo_edu.record.files import cache_folder

QWEN = next(shape for shape in CATALOGUE if shape.name == "Qwen2-0.5B-Instruct")


@dataclass(frozen=True)
class Workload:
    """``stages`` of ``steps`` GRPO steps: 1 prompt, ``group`` completions of ``tokens``."""

    name: str = "b1"
    steps: int = 5
    group: int = 2
    tokens: int = 64
    shortest_prompt: int = 80
    longest_prompt: int = 128
    stages: int = 3
    architecture: Architecture = QWEN

    @property
    def prompt_tokens(self) -> float:
        """Mean length of a prompt."""
        return (self.shortest_prompt + self.longest_prompt) / 2

    def prompts(self, seed: int = 0) -> list[str]:
        """Random words, one token each, for all steps of all stages."""
        rng = random.Random(seed)
        return [
            " ".join(
                f"w{rng.randrange(3, self.architecture.vocab)}"
                for _ in range(rng.randint(self.shortest_prompt, self.longest_prompt))
            )
            for _ in range(self.steps * self.stages)
        ]


WORKLOADS = {
    "b1": Workload(),
    "b2": Workload("b2", steps=10),
    "b3": Workload("b3", group=8),
}


def workload_model(shape: Architecture, folder: Path | None = None) -> Path:
    """The folder of a random model, made on first use: ``bf16`` and ``fp32`` in it, the same
    values, with a tokenizer of one token a word."""
    place = (folder or cache_folder()) / f"workload-{shape.layers}x{shape.hidden}"
    return made_once(place, lambda target: run_worker(make_model, shape, target))


def make_model(shape: Architecture, folder: Path) -> None:
    """Write a random model of Qwen2's build and its tokenizer; in a process of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from torch import manual_seed
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    # Names of special tokens must not begin a word: they would be cut out of it.
    ids = {"<unknown>": 0, "<end>": 1, "<pad>": 2}
    ids |= {f"w{i}": i for i in range(3, shape.vocab)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", padding_side="left"
    )
    manual_seed(0)
    model = Qwen2ForCausalLM(config).bfloat16()
    for dtype in ("bf16", "fp32"):
        (model if dtype == "bf16" else model.float()).save_pretrained(folder / dtype)
        wrapped.save_pretrained(folder / dtype)


def even_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The reward, share of even token ids: whatever they say, some completions are better."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]
