"""A step's gradient in parts: which completions go together, and how many fit into memory.

The loss of a step is a weighted sum over its completions, so its gradient can be added up over
micro-batches of any size. Only memory and speed depend on the size, never the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cpugrpo_edu.engine.shared_prefix import group_rows
from cpugrpo_edu.engine.sizes import plan_micro_batch

CACHE_BYTES = 96 * 2**20
"""Activations that a micro-batch may take even where memory abounds: a few times a processor's
last cache. Larger ones were slower (128 completions of the bundled model: by half)."""

MIN_TOKENS = 512
"""With fewer tokens in a micro-batch the weights would be read too often."""

SHARED_TOKENS = 256
"""Tokens of completions behind one prompt from which on products are as fast as longer ones."""

RECOMPUTED_TOKENS = 1024
"""The same where whole layers are computed again, so that more tokens take little memory: those of
several groups."""

WORKING_SPACE = 4
"""The peak of a micro-batch over the activations that it keeps: their derivatives, short-lived
copies and holes in the heap (measured: 2.5, and 4 in the first step of a process). It decides
only where memory is short."""

MEAN_OVER_ROWS = {"grpo", "sapo", "dr_grpo", "luspo"}
"""TRL's losses that average over completions."""


def size_that_fits(
    rows: int, length: int, sequence_bytes: int, free: int, least: int = 1
) -> tuple[int, int]:
    """Completions per micro-batch in ``free`` bytes, and how many it would be in any number.

    ``rows`` completions of ``length`` tokens, prompt included, keep ``sequence_bytes`` of
    activations each. Up to ``least`` go together even if they take more than ``CACHE_BYTES``.
    Where not even one completion seems to fit, the size is 1: an estimate must never end a run.
    """
    best = max(least, CACHE_BYTES // sequence_bytes, MIN_TOKENS // length)
    wanted = plan_micro_batch(2**62, sequence_bytes, rows, maximum=best)
    need = WORKING_SPACE * sequence_bytes
    return plan_micro_batch(max(free, 2 * need), need, rows, maximum=best), wanted


def split_by_length(
    inputs: dict[str, Any], keep: Tensor, size: int, groups_together: bool = False
) -> Iterator[dict[str, Any]]:
    """Micro-batches of at most ``size`` of the kept rows, like lengths together, trimmed.

    ``inputs`` is TRL's batch of B rows: ``prompt_ids`` and ``prompt_mask`` (B, P), padded on the
    left, ``completion_ids`` and everything else with a row for each completion (B,) or (B, C),
    padded on the right; the rest is passed on as it is. ``keep`` holds row numbers. Padding that
    no row of a micro-batch needs is cut off on both sides. With ``groups_together`` completions
    of a prompt stay neighbours instead.
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
        prompt = int(prompt_lengths[chosen].max())
        completion = max(1, int(completion_lengths[chosen].max()))
        micro = dict(inputs)
        for key, value in inputs.items():
            if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != rows:
                continue
            value = value[chosen]
            if key in ("prompt_ids", "prompt_mask"):
                value = value[:, value.shape[1] - prompt :]
            elif value.dim() == 2:
                value = value[:, :completion]
            micro[key] = value
        yield micro


def share_of_loss(
    loss_type: str, micro: dict[str, Any], rows: int, tokens: Tensor | float
) -> Tensor | float:
    """The weight of a micro-batch's loss in the loss of the whole batch.

    A mean over completions weighs by completions (``rows`` in the batch); "bnpo", a mean over
    tokens, by tokens (``tokens`` in the batch). The other losses are divided by the tokens of the
    whole generation batch already, whatever the micro-batch, and simply add up.
    """
    if loss_type in MEAN_OVER_ROWS:
        return len(micro["completion_ids"]) / rows
    if loss_type == "bnpo":
        share: Tensor = micro["completion_mask"].sum() / (tokens or 1)  # 0: all were masked out
        return share
    return 1.0
