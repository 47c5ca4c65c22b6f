"""The policy of chapter 13: five tokens, completions of three, so all it can say can be listed."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from cpugrpo_edu.fisher import Example

VOCABULARY = 5
LENGTH = 3
"""Tokens of every completion."""
PROMPT = [1, 3, 2]


def tiny_policy(seed: int) -> Any:
    """A Qwen2 with one layer and random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        initializer_range=0.4,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


def all_examples() -> list[Example]:
    """Every completion of the prompt, in the order of ``itertools.product``."""
    completions = itertools.product(range(VOCABULARY), repeat=LENGTH)
    return [Example(PROMPT, list(completion)) for completion in completions]
