"""The CPU decode engine: G completions for each prompt, with their log-probabilities.

Generic generation prefills a prompt G times, copies the whole key/value cache at
every token, and computes finished rows to the end. Here

1. every prompt is prefilled once and its keys and values are expanded to G rows,
2. the cache is allocated once and written in place,
3. finished rows are retired, so that the batch shrinks as completions end,
4. the log-probability of every sampled token is kept: GRPO needs it anyway.

Models built like Qwen2 and Llama go through ``blocks``; other architectures go through
``model.generate``, which is slower and draws from the same distribution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpugrpo_edu.data import Episode, Group
from cpugrpo_edu.engine import c_kernel
from cpugrpo_edu.engine.blocks import (
    Block,
    Projection,
    base_layer,
    causal_lm,
    is_supported,
    norm_of,
    products,
)
from cpugrpo_edu.engine.memory import free_memory, retry_smaller
from cpugrpo_edu.engine.options import ENGINES, EngineOptions
from cpugrpo_edu.engine.sizes import rows_that_fit
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.sample import Sampling, draw, left_pad, regroup

DEFAULTS = EngineOptions()

RETIRE_SHARE = 0.75
"""Compact the batch when fewer than this share of its rows is still running."""


class Cache:
    """Keys and values of all layers, (rows, kv heads, positions, head dim) each, in place."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], mask: Tensor, length: int):
        self.keys, self.values = keys, values
        self.mask = mask  # (rows, capacity), True where a real token stands
        self.length = length

    @classmethod
    def empty(cls, lm: Any, rows: int, capacity: int) -> Cache:
        attention = lm.model.layers[0].self_attn
        shape = (rows, lm.config.num_key_value_heads, capacity, attention.head_dim)
        dtype = lm.model.norm.weight.dtype
        layers = range(len(lm.model.layers))
        return cls(
            [torch.empty(shape, dtype=dtype) for _ in layers],
            [torch.empty(shape, dtype=dtype) for _ in layers],
            torch.zeros(rows, capacity, dtype=torch.bool),
            0,
        )

    def select(self, rows: Tensor, capacity: int | None = None) -> Cache:
        """A cache with the given rows (repeats allowed) and room for ``capacity`` positions."""
        capacity = capacity or self.mask.shape[1]

        def pick(old: Tensor) -> Tensor:
            new = old.new_empty(len(rows), old.shape[1], capacity, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length].index_select(0, rows)
            return new

        mask = self.mask.new_zeros(len(rows), capacity)
        mask[:, : self.length] = self.mask[:, : self.length].index_select(0, rows)
        return Cache(
            [pick(k) for k in self.keys], [pick(v) for v in self.values], mask, self.length
        )


class Decoder:
    """The live model's layers as functions, for one generation."""

    def __init__(self, lm: Any):
        self.lm = lm
        self.blocks = [Block.of(layer) for layer in lm.model.layers]
        self.norm = norm_of(lm.model.norm)
        self.head = Projection.of(lm.lm_head)

    def forward(self, ids: Tensor, positions: Tensor, valid: Tensor, cache: Cache) -> Tensor:
        """Run ``ids`` (rows, T) through the layers, appending to the cache.

        ``positions`` are the rotary positions, ``valid`` is False on padding.
        Returns the last position's hidden state (rows, hidden), after the final norm.
        """
        start, end = cache.length, cache.length + ids.shape[1]
        cache.mask[:, start:end] = valid
        cache.length = end
        hidden = self.lm.model.embed_tokens(ids)
        cos, sin = self.lm.model.rotary_emb(hidden, positions)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        bias = None
        if not (ids.shape[1] == 1 and bool(cache.mask[:, :end].all())):
            visible = cache.mask[:, None, None, :end]  # (rows, 1, 1, end)
            if ids.shape[1] > 1:
                causal = torch.ones(ids.shape[1], end, dtype=torch.bool).tril(start)
                visible = visible & causal
                # A padded query sees nothing; let it see itself, so that no softmax is empty.
                visible = visible | torch.eye(ids.shape[1], end, dtype=torch.bool)
            bias = torch.zeros(visible.shape, dtype=hidden.dtype)
            bias.masked_fill_(~visible, -torch.inf)
        for index, block in enumerate(self.blocks):
            normed = block.before_attention(hidden)
            keys, values = cache.keys[index], cache.values[index]
            hidden = hidden + attend(block, normed, cos, sin, bias, keys, values, start)
            hidden = hidden + block.mlp(block.before_mlp(hidden))
        return self.norm(hidden[:, -1])


class CompiledDecoder(Decoder):
    """The same for a frozen INT8 model; single tokens of few rows are one call of C."""

    def __init__(self, plain: Decoder):
        self.lm, self.blocks, self.norm, self.head = plain.lm, plain.blocks, plain.norm, plain.head
        self.layers = (c_kernel.Layer * len(self.blocks))()
        for ours, layer, block in zip(self.layers, self.lm.model.layers, self.blocks, strict=True):
            ours.before_attention = c_kernel.address(layer.input_layernorm.weight)
            ours.before_mlp = c_kernel.address(layer.post_attention_layernorm.weight)
            for name, (module, projection) in products(layer, block).items():
                linear = c_kernel.describe(base_layer(module), projection.down, projection.up)
                setattr(ours, name, linear)
        self.epsilon = self.lm.model.layers[0].input_layernorm.variance_epsilon
        self.cache: Cache | None = None

    @classmethod
    def serves(cls, plain: Decoder) -> bool:
        """Whether C knows every layer: compiled INT8 products, float32 norms, silu."""
        for layer, block in zip(plain.lm.model.layers, plain.blocks, strict=True):
            norms = (layer.input_layernorm, layer.post_attention_layernorm)
            if block.activation is not None or any(n.weight.dtype != torch.float32 for n in norms):
                return False
            for module, projection in products(layer, block).values():
                base = base_layer(module)
                if getattr(base, "kernel", "") != "compiled" or projection.base != base.forward:
                    return False
        return True

    def attach(self, cache: Cache) -> None:
        """Tell C where this cache lies, and make room for it to work in."""
        for ours, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            ours.keys, ours.values = c_kernel.address(keys), c_kernel.address(values)
        self.room = c_kernel.Room.make(self.layers, *cache.keys[0].shape)
        self.cache = cache

    def forward(self, ids: Tensor, positions: Tensor, valid: Tensor, cache: Cache) -> Tensor:
        if ids.shape[1] > 1 or len(ids) > c_kernel.FEW_ROWS:
            return super().forward(ids, positions, valid, cache)
        if cache is not self.cache:
            self.attach(cache)
        start = cache.length
        cache.length = start + 1
        cache.mask[:, start : cache.length] = valid
        hidden = self.lm.model.embed_tokens(ids)
        cos, sin = self.lm.model.rotary_emb(hidden, positions)
        visible, bias = cache.mask[:, : cache.length], None
        if not bool(visible.all()):
            bias = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        shape = cache.keys[0].shape
        c_kernel.decode(self.layers, self.room, hidden, shape, start, cos, sin, bias, self.epsilon)
        return self.norm(hidden[:, -1])


def attend(
    block: Block,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    bias: Tensor | None,
    keys: Tensor,
    values: Tensor,
    start: int,
) -> Tensor:
    """One attention layer over the cache. Query heads that share keys go as one block."""
    rows, length, _ = hidden.shape
    end = start + length
    query, keys[:, :, start:end], values[:, :, start:end] = block.heads(hidden, cos, sin)
    keys, values = keys[:, :, :end], values[:, :, :end]
    if length == 1:  # (rows, kv heads, queries of that head, dim): no copy of the cache
        query = query.reshape(rows, keys.shape[1], -1, block.head_dim)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias)
        mixed = mixed.reshape(rows, 1, -1)
    else:
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, enable_gqa=True)
        mixed = mixed.transpose(1, 2).reshape(rows, length, -1)
    return block.output(mixed)


def prefill(
    decoder: Decoder, prompts: Sequence[Sequence[int]], pad_id: int
) -> tuple[Tensor, Tensor, Cache]:
    """Left-pad and run the prompts once.

    Returns the last hidden states (prompts, hidden), the lengths, and the cache.
    """
    ids, mask = left_pad(prompts, pad_id)
    valid = mask.bool()
    positions = (valid.cumsum(-1) - 1).clamp(min=0)
    cache = Cache.empty(decoder.lm, *ids.shape)
    return decoder.forward(ids, positions, valid, cache), valid.sum(-1), cache


def decode(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    copies: int,
    sampling: Sampling,
    eos_ids: set[int],
    pad_id: int,
    generator: torch.Generator,
) -> list[Group]:
    """Complete each prompt ``copies`` times, all rows in one batch."""
    decoder = Decoder(lm)
    if CompiledDecoder.serves(decoder):
        decoder = CompiledDecoder(decoder)
    hidden, lengths, prompt_cache = prefill(decoder, prompts, pad_id)
    rows = torch.arange(len(prompts)).repeat_interleave(copies)
    cache = prompt_cache.select(rows, prompt_cache.length + sampling.max_new_tokens)
    del prompt_cache
    hidden, position = hidden[rows], lengths[rows]
    total = len(rows)
    tokens = torch.full((total, sampling.max_new_tokens), pad_id)
    logprobs = torch.zeros(total, sampling.max_new_tokens)
    counts = torch.zeros(total, dtype=torch.long)
    ended = torch.zeros(total, dtype=torch.bool)
    stop = torch.tensor(sorted(eos_ids), dtype=torch.long)
    active = torch.arange(total)  # which original row each batch row is
    running = torch.ones(total, dtype=torch.bool)
    for t in range(sampling.max_new_tokens):
        token, logprob = draw(decoder.head(hidden), sampling, generator)
        live = active[running]
        tokens[live, t], logprobs[live, t] = token[running], logprob[running]
        counts[live] = t + 1
        finished = running & torch.isin(token, stop)
        ended[active[finished]] = True
        running = running & ~finished
        alive = int(running.sum())
        if alive == 0 or t + 1 == sampling.max_new_tokens:
            break
        if alive < RETIRE_SHARE * len(active):
            keep = running.nonzero().squeeze(1)
            cache, active, token = cache.select(keep), active[keep], token[keep]
            position, running = position[keep], running[keep]
        hidden = decoder.forward(
            token[:, None],
            position[:, None],
            torch.ones(len(active), 1, dtype=torch.bool),
            cache,
        )
        position = position + 1
    episodes = [
        Episode(ids[:n].tolist(), logps[:n].tolist(), bool(end))
        for ids, logps, n, end in zip(tokens, logprobs, counts.tolist(), ended, strict=True)
    ]
    return regroup(prompts, copies, episodes)


def decode_with_generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    copies: int,
    sampling: Sampling,
    eos_ids: set[int],
    pad_id: int,
    generator: torch.Generator,
) -> list[Group]:
    """The reference: Hugging Face ``generate`` on left-padded prompts, each given G times."""
    ids, mask = left_pad([prompt for prompt in prompts for _ in range(copies)], pad_id)
    greedy = sampling.temperature == 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not greedy,
            temperature=None if greedy else sampling.temperature,
            top_p=None if greedy else sampling.top_p,
            top_k=None if greedy else 0,
            repetition_penalty=1.0,
            eos_token_id=sorted(eos_ids) or None,
            pad_token_id=pad_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
    scores = torch.stack(output.scores, dim=1).float().log_softmax(-1)
    tokens = output.sequences[:, ids.shape[1] :]
    chosen = scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    episodes = []
    for row, logps in zip(tokens.tolist(), chosen.tolist(), strict=True):
        end = next((i for i, token in enumerate(row) if token in eos_ids), None)
        n = len(row) if end is None else end + 1
        episodes.append(Episode(row[:n], logps[:n], end is not None))
    return regroup(prompts, copies, episodes)


@torch.inference_mode()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    n: int,
    sampling: Sampling,
    *,
    eos_ids: set[int],
    pad_id: int,
    options: EngineOptions = DEFAULTS,
    on_done: Callable[[int], None] = lambda prompts: None,
) -> list[Group]:
    """Complete each tokenized prompt ``n`` times, in the order given.

    The engine's counterpart of ``cpugrpo_edu.sample.sample``, with the same contract. Prompts of
    like length are decoded together, at most ``options.max_rows`` rows at a time, or fewer where
    memory is short or the process would come to hold more than ``options.memory_limit`` bytes;
    where memory is refused, half as many are tried. Raises ``UserError`` for an unknown
    ``options.engine`` and ``ValueError`` for an empty prompt or n < 1.
    """
    if options.engine not in ENGINES:
        raise UserError(
            f"unknown rollout engine {options.engine!r}; allowed are {' and '.join(ENGINES)}"
        )
    if n < 1 or not all(prompts):
        raise ValueError(f"{n} completions were asked, or a prompt has no tokens; give at least 1")
    was_training = model.training
    model.eval()  # dropout must not act on rollouts
    generator = torch.Generator().manual_seed(sampling.seed)
    groups: list[Group | None] = [None] * len(prompts)
    fast = options.engine == "fast" and is_supported(model)
    lm, decoding = (causal_lm(model), decode) if fast else (model, decode_with_generate)
    stop = eos_ids if sampling.stop_at_eos else set()
    rows = rows_at_once(model, prompts, sampling, options)

    def complete(texts: Sequence[Sequence[int]], rows: int, state: Tensor) -> list[Group]:
        generator.set_state(state)  # a second try draws what the first one drew
        done = [Group(list(text), []) for text in texts]
        together, times = max(1, rows // n), min(rows, n)
        for start in range(0, len(texts), together):
            part = done[start : start + together]
            for first in range(0, n, times):
                some = min(times, n - first)
                prompt_ids = [group.prompt_ids for group in part]
                more = decoding(lm, prompt_ids, some, sampling, stop, pad_id, generator)
                for group, addition in zip(part, more, strict=True):
                    group.episodes.extend(addition.episodes)
        return done

    try:
        for chunk in chunks_by_length(prompts, max(1, rows // n)):
            texts, state = [prompts[i] for i in chunk], generator.get_state()
            done = retry_smaller(functools.partial(complete, texts, state=state), rows)
            for i, group in zip(chunk, done, strict=True):
                groups[i] = group
            on_done(len(chunk))
    finally:
        model.train(was_training)
    return [group for group in groups if group is not None]


def rows_at_once(
    model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, options: EngineOptions
) -> int:
    """How many completions to decode together: the option, or fewer where memory is short."""
    if not (is_supported(model) and prompts):
        return options.max_rows
    longest = max(len(prompt) for prompt in prompts) + sampling.max_new_tokens
    free = free_memory(options.memory_limit)
    return min(options.max_rows, rows_that_fit(causal_lm(model).config, longest, free))


def chunks_by_length(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Indices of the prompts, sorted by length, ``size`` at a time."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
