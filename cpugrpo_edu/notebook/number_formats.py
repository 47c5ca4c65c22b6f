"""What chapter 11 measures: weights and activations rounded to the values of a number format.

The products stay in float32, so this shows a format's error and not its speed. The weight formats
are those of GGUF files (Q8_0, Q4_0, Q4_1, as llama.cpp stores them) and NF4 of QLoRA (Dettmers et
al. 2023, arXiv 2305.14314).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cpugrpo_edu.data import Group

BLOCK = 32
"""Weights that share a scale in a GGUF file."""
NF4_BLOCK = 64
"""Weights that share a scale in NF4."""
TINY = torch.finfo(torch.float32).tiny

NF4_VALUES = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
"""The sixteen numbers of NF4: quantiles of a normal distribution, scaled to [-1, 1]."""


def blocks_of(w: Tensor, size: int = BLOCK) -> Tensor:
    """w (..., n) as (..., n / size, size). ValueError if n is no multiple of ``size``."""
    if w.shape[-1] % size:
        raise ValueError(f"{w.shape[-1]} weights do not divide into blocks of {size}")
    return w.float().unflatten(-1, (-1, size))


def q8_0(w: Tensor) -> Tensor:
    """Eight bits: round(w / d) * d with d = max|w| / 127 in each block, d stored as float16."""
    blocks = blocks_of(w)
    d = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=TINY)
    return ((blocks / d).round() * d.half().float()).flatten(-2)


def q4_0(w: Tensor) -> Tensor:
    """Four bits around zero: q * d, q from -8 to 7; the largest weight of a block becomes -8 d."""
    blocks = blocks_of(w)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    d = torch.where(largest == 0, torch.ones_like(largest), largest / -8)
    q = (blocks / d + 8.5).trunc().clamp(0, 15) - 8
    return (q * d.half().float()).flatten(-2)


def q4_1(w: Tensor) -> Tensor:
    """Four bits from the smallest to the largest weight of a block: q * d + m, q from 0 to 15."""
    blocks = blocks_of(w)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    d = ((high - low) / 15).clamp(min=TINY)
    q = ((blocks - low) / d + 0.5).trunc().clamp(0, 15)
    return (q * d.half().float() + low.half().float()).flatten(-2)


def nf4(w: Tensor) -> Tensor:
    """Four bits, the nearest of ``NF4_VALUES`` times the largest magnitude of each block of 64.

    As in QLoRA, a block may reach into the next row.
    """
    blocks = blocks_of(w.flatten(), NF4_BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=TINY)
    between = (NF4_VALUES[1:] + NF4_VALUES[:-1]) / 2
    return (NF4_VALUES[torch.bucketize(blocks / scale, between)] * scale).view(w.shape)


FORMATS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "Q8_0": (8 + 16 / BLOCK, q8_0),
    "Q4_1": (4 + 32 / BLOCK, q4_1),
    "NF4": (4 + 32 / NF4_BLOCK, nf4),
    "Q4_0": (4 + 16 / BLOCK, q4_0),
}
"""Name: (bits a weight takes, its scales included; the rounding of a (rows, n) matrix)."""


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """The linear layers by name, without the output head."""
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }


@contextmanager
def rounded_weights(model: Any, rounding: Callable[[Tensor], Tensor]) -> Iterator[Any]:
    """The model with the weights of its linear layers rounded, for a while, and then as it was."""
    layers = linear_layers(model).values()
    kept = [layer.weight.data for layer in layers]
    try:
        for layer in layers:
            layer.weight.data = rounding(layer.weight.data).to(layer.weight.dtype)
        yield model
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.data = weight


SHARED_BY = ("batch", "row", "block")
"""What an activation may share its scale with."""


def round_activations(x: Tensor, shared_by: str, bits: int = 8) -> Tensor:
    """x (..., n) rounded to ``bits`` with a zero point, one scale for the whole batch, for each
    row, or for each block of 32 numbers of a row."""
    if shared_by not in SHARED_BY:
        raise ValueError(f"{shared_by!r} is no sharing; allowed are {', '.join(SHARED_BY)}")
    parts = {"batch": x.reshape(1, -1), "row": x, "block": x}[shared_by]
    parts = blocks_of(parts) if shared_by == "block" else parts
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=TINY)
    zero = (-low / scale).round()
    q = ((parts / scale).round() + zero).clamp(0, 2**bits - 1)
    return ((q - zero) * scale).reshape(x.shape)


@contextmanager
def rounded_activations(model: Any, shared_by: str, bits: int = 8) -> Iterator[Any]:
    """The model with what comes into its linear layers rounded, for a while."""
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, given: (round_activations(given[0], shared_by, bits), *given[1:])
        )
        for layer in linear_layers(model).values()
    ]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def completion_log_probs(model: Any, groups: Sequence[Group], temperature: float = 1.0) -> Tensor:
    """Log-probs of the whole vocabulary at every token of the completions, (tokens, V)."""
    found = []
    for group in groups:
        start = len(group.prompt_ids) - 1
        for episode in group.episodes:
            ids = torch.tensor([group.prompt_ids + episode.completion_ids])
            logits = model(input_ids=ids).logits[0, start:-1].float()
            found.append((logits / temperature).log_softmax(-1))
    return torch.cat(found)


@torch.inference_mode()
def layer_inputs(
    model: Any, ids: Tensor, attention_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """What comes into each linear layer for ``ids`` (B, T), real tokens only: (tokens, n)."""
    real = torch.ones_like(ids).bool() if attention_mask is None else attention_mask.bool()
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_: Any, given: tuple[Tensor, ...]) -> None:
            found[name] = given[0][real]

        return hook

    hooks = [
        layer.register_forward_pre_hook(keep(name)) for name, layer in linear_layers(model).items()
    ]
    try:
        model(input_ids=ids, attention_mask=attention_mask)
    finally:
        for hook in hooks:
            hook.remove()
    return found
