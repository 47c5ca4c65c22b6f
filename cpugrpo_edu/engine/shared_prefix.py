"""One forward pass for a whole group: the prompt once, its G completions behind it.

The G completions of a prompt are usually scored as G sequences, so the prompt goes through
the network G times. Here one sequence holds

    prompt | completion 1 | completion 2 | ... | completion G

and the attention mask lets every completion see the prompt and itself, but no other
completion. Rotary positions go on from the prompt's end in each of them, so all hidden
states, log-probabilities and gradients are those of the separate sequences: G (P + C) tokens
become P + G C. (Prefix Grouper, arXiv:2506.05433, does the same by other means.)

Attention costs (P + G C)^2 instead of G (P + C)^2 products. That is little where the linear layers
dominate, as in models of some hundred million parameters, but not in tiny ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpugrpo_edu.engine.architectures import require
from cpugrpo_edu.engine.blocks import causal_lm, hidden_states, is_supported
from cpugrpo_edu.engine.int8_base import token_log_probs


def group_rows(prompt_ids: Tensor, prompt_mask: Tensor) -> list[list[int]]:
    """Numbers of the rows with the same prompt, in order of appearance.

    ``prompt_ids`` and ``prompt_mask`` are (rows, P), whatever the side of the padding.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, (ids, mask) in enumerate(zip(prompt_ids, prompt_mask.bool(), strict=True)):
        groups.setdefault(tuple(ids[mask].tolist()), []).append(row)
    return list(groups.values())


def pack_group(
    prompt: Tensor, completions: list[Tensor], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (L,), rotary positions (L,) and additive attention mask (L, L) of one group.

    ``prompt`` is (P,), each of the completions (C_k,), so L = P + sum of C_k.
    """
    start = len(prompt)
    ids = torch.cat([prompt, *completions])
    positions = torch.cat(
        [torch.arange(start), *(torch.arange(start, start + len(c)) for c in completions)]
    )
    # Segment 0 is the prompt, k the k-th completion.
    lengths = torch.tensor([start, *map(len, completions)])
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    visible = (segment[None, :] == 0) | (segment[None, :] == segment[:, None])
    visible &= torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    return ids, positions, bias


def packed_log_probs(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    temperature: float = 1.0,
    recompute: bool = False,
    bfloat16: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities in nats and entropies, (rows, C) each, 0 on padding.

    Prompts (rows, P) are padded on the left, completions (rows, C) on the right. Rows with
    the same prompt share it, wherever they stand. The entropies carry no gradient. With
    ``recompute`` the inside of each MLP is computed again in the backward pass; with ``bfloat16``
    products are computed in it. Both only where ``hidden_states`` does the passes. Raises
    ``UserError`` for an architecture on which the values would be others.
    """
    lm = causal_lm(model)
    require(lm.config, "packed pass")
    width = completion_ids.shape[1]
    log_probs: dict[int, Tensor] = {}
    entropies: dict[int, Tensor] = {}
    for rows in group_rows(prompt_ids, prompt_mask):
        prompt = prompt_ids[rows[0]][prompt_mask[rows[0]].bool()]
        completions = [completion_ids[row][completion_mask[row].bool()] for row in rows]
        packed = pack_group(prompt, completions, lm.dtype)
        hidden = states_of(lm, *packed, recompute, bfloat16)
        # The state before a token predicts it: for the first one of each completion that of the
        # prompt's end, which is not its neighbour.
        lengths = torch.tensor([len(completion) for completion in completions])
        before = torch.arange(len(prompt) - 1, len(hidden) - 1)
        before[(lengths.cumsum(0) - lengths)[lengths > 0]] = len(prompt) - 1
        log_p, entropy = token_log_probs(
            hidden[before], torch.cat(completions), lm.lm_head, temperature, bfloat16
        )
        for found, values in ((log_probs, log_p), (entropies, entropy)):
            for row, own in zip(rows, values.split(lengths.tolist()), strict=True):
                found[row] = F.pad(own, (0, width - len(own)))
    order = range(len(prompt_ids))
    return torch.stack([log_probs[i] for i in order]), torch.stack([entropies[i] for i in order])


def states_of(
    lm: Any, ids: Tensor, positions: Tensor, bias: Tensor, recompute: bool, bfloat16: bool
) -> Tensor:
    """Last hidden states (L, hidden) of a packed group."""
    # With checkpointing switched on, the model's own layers are the ones that do it.
    if is_supported(lm) and not lm.model.is_activation_checkpointing:
        sequence = (ids[None], positions[None], bias[None, None])
        return hidden_states(lm, *sequence, recompute, bfloat16)[0]
    states: Tensor = lm.model(
        input_ids=ids[None],
        attention_mask=bias[None, None],
        position_ids=positions[None],
        use_cache=False,
    ).last_hidden_state[0]
    return states
