"""One forward pass for a whole group: the prompt once, its G completions behind it.

The G completions of a prompt are usually scored as G sequences, so the prompt goes through
the network G times. Here one sequence holds

    prompt | completion 1 | completion 2 | ... | completion G

and the attention mask lets every completion see the prompt and itself, but no other
completion. Rotary positions go on from the prompt's end in each of them, so all hidden
states, log-probabilities and gradients are those of the separate sequences: G (P + C) tokens
become P + G C. (Prefix Grouper, arXiv:2506.05433, does the same by other means.)

With our own layers (:mod:`.blocks`) no score is computed that the mask would hide. With the model's
own, attention costs (P + G C)^2 instead of G (P + C)^2 products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpugrpo_edu.engine.architectures import require
from cpugrpo_edu.engine.blocks import Attention, causal_lm, hidden_states, is_supported
from cpugrpo_edu.engine.int8_base import token_log_probs


def group_rows(prompt_ids: Tensor, prompt_mask: Tensor) -> list[list[int]]:
    """Numbers of the rows with the same prompt, in order of appearance.

    ``prompt_ids`` and ``prompt_mask`` are (rows, P), whatever the side of the padding.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, (ids, mask) in enumerate(zip(prompt_ids, prompt_mask.bool(), strict=True)):
        groups.setdefault(tuple(ids[mask].tolist()), []).append(row)
    return list(groups.values())


def pack_group(prompt: Tensor, completions: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and rotary positions of one group, (L,) each.

    ``prompt`` is (P,), each of the completions (C_k,), so L = P + sum of C_k.
    """
    start = len(prompt)
    ids = torch.cat([prompt, *completions])
    positions = torch.cat(
        [torch.arange(start), *(torch.arange(start, start + len(c)) for c in completions)]
    )
    return ids, positions


def group_bias(prompt: int, lengths: list[int], dtype: torch.dtype) -> Tensor:
    """What to add to the scores, (L, L): 0 where a token sees another, else the least number."""
    # Segment 0 is the prompt, k the k-th completion.
    sizes = torch.tensor([prompt, *lengths])
    segment = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    visible = (segment[None, :] == 0) | (segment[None, :] == segment[:, None])
    visible &= torch.ones(len(segment), len(segment), dtype=torch.bool).tril()
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


def group_attention(prompt: int, lengths: list[int]) -> Attention:
    """The same attention without the scores that the mask would hide: the prompt by itself, then
    each completion, filled up to the longest, over the prompt and itself."""
    sizes, longest = torch.tensor(lengths), max(lengths)
    starts = prompt + sizes.cumsum(0) - sizes
    step = torch.arange(longest)
    # Where the token of each place stands. A place without one repeats another token, which comes
    # after all real tokens of its row, so that none of them sees it.
    where = (starts[:, None] + step).clamp(max=prompt + sum(lengths) - 1).flatten()
    real = (step < sizes[:, None]).flatten().nonzero().squeeze(1)
    visible = torch.ones(longest, prompt + longest, dtype=torch.bool).tril(prompt)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        states = (query, key, value)
        q, k, v = (x[:, :, :prompt] for x in states)
        first = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        own_q, own_k, own_v = (
            x[0].index_select(1, where).unflatten(1, (len(lengths), longest)).transpose(0, 1)
            for x in states
        )
        k, v = (
            torch.cat([x.expand(len(lengths), -1, -1, -1), own], 2)
            for x, own in ((k, own_k), (v, own_v))
        )
        rest = F.scaled_dot_product_attention(own_q, k, v, attn_mask=visible, enable_gqa=True)
        return torch.cat([first, rest.transpose(0, 1).flatten(1, 2).index_select(1, real)[None]], 2)

    return attend


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
    groups = group_rows(prompt_ids, prompt_mask)
    prompts = [prompt_ids[rows[0]][prompt_mask[rows[0]].bool()] for rows in groups]
    completions = [
        [completion_ids[row][completion_mask[row].bool()] for row in rows] for rows in groups
    ]
    hidden = states_of(lm, prompts, completions, recompute, bfloat16)
    before = [
        states[predecessors(len(prompt), own)]
        for states, prompt, own in zip(hidden, prompts, completions, strict=True)
    ]
    tokens = [tokens for own in completions for tokens in own]
    log_probs, entropies = token_log_probs(
        torch.cat(before), torch.cat(tokens), lm.lm_head, temperature, bfloat16
    )
    # From one after the other, in the order of the groups, to rows in the caller's order.
    order = torch.tensor([row for rows in groups for row in rows]).argsort()
    lengths, width = list(map(len, tokens)), completion_ids.shape[1]
    padded_log_probs, padded_entropies = (
        torch.stack([F.pad(own, (0, width - len(own))) for own in values.split(lengths)])[order]
        for values in (log_probs, entropies)
    )
    return padded_log_probs, padded_entropies


def predecessors(prompt: int, completions: list[Tensor]) -> Tensor:
    """Where in a packed group the state stands that predicts each token of the completions: before
    it, and for the first one of each at the prompt's end, which is not its neighbour."""
    lengths = torch.tensor([len(completion) for completion in completions])
    before = torch.arange(prompt - 1, prompt + int(lengths.sum()) - 1)
    before[(lengths.cumsum(0) - lengths)[lengths > 0]] = prompt - 1
    return before


def states_of(
    lm: Any,
    prompts: list[Tensor],
    completions: list[list[Tensor]],
    recompute: bool,
    bfloat16: bool,
) -> list[Tensor]:
    """Last hidden states (L, hidden) of each packed group.

    Our own layers run all groups in one pass: only attention looks beyond a token, and it is told
    where a group ends.
    """
    packed = [pack_group(*group) for group in zip(prompts, completions, strict=True)]
    lengths = [[len(completion) for completion in own] for own in completions]
    if is_supported(lm):
        ids, positions = (torch.cat(parts) for parts in zip(*packed, strict=True))
        sizes = [len(ids) for ids, _ in packed]
        attentions = [group_attention(len(p), own) for p, own in zip(prompts, lengths, strict=True)]
        attend = one_after_the_other(attentions, sizes)
        states = hidden_states(lm, ids[None], positions[None], attend, recompute, bfloat16)
        return list(states[0].split(sizes))
    found = []
    for (ids, positions), prompt, own in zip(packed, prompts, lengths, strict=True):
        bias = group_bias(len(prompt), own, lm.dtype)
        output = lm.model(
            input_ids=ids[None],
            attention_mask=bias[None, None],
            position_ids=positions[None],
            use_cache=False,
        )
        found.append(output.last_hidden_state[0])
    return found


def one_after_the_other(attentions: list[Attention], sizes: list[int]) -> Attention:
    """The attention of sequences of these sizes that lie behind each other, each with its own."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(*(x.split(sizes, 2) for x in (query, key, value)), strict=True)
        return torch.cat([own(*part) for own, part in zip(attentions, parts, strict=True)], 2)

    return attend
