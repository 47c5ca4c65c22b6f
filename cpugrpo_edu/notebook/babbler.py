"""The babbler of chapters 1 to 3: a language model of five words, small enough to enumerate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WORDS = ("END", "the", "cat", "sat", "mat")
END = 0
LIMIT = 3
"""A completion has at most this many words, END included."""

PROMPT = (WORDS.index("the"), WORDS.index("cat"))


def babbler(seed: int = 2) -> Any:
    """A tiny Qwen2 with random weights, as in chapter 1; the seed says which."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.4,  # far from uniform: a babbler with taste
        )
        return Qwen2ForCausalLM(config).eval()


def everything(limit: int = LIMIT) -> list[tuple[int, ...]]:
    """All completions that end with END or are cut off at the limit."""
    running: list[tuple[int, ...]] = [()]
    done: list[tuple[int, ...]] = []
    for _ in range(limit):
        grown = [(*o, word) for o in running for word in range(len(WORDS))]
        done += [o for o in grown if o[-1] == END]
        running = [o for o in grown if o[-1] != END]
    return done + running


def enumerated(limit: int = LIMIT) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt (N, 2), token ids (N, limit) and mask (N, limit) of ``everything``."""
    completions = everything(limit)
    ids = torch.tensor([[*o, *[END] * (limit - len(o))] for o in completions])
    mask = torch.tensor([[int(i < len(o)) for i in range(limit)] for o in completions])
    return torch.tensor([PROMPT]).repeat(len(ids), 1), ids, mask
