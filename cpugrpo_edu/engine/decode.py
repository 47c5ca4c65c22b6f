"""The CPU decode engine: G completions for each prompt, with their log-probabilities.

Generic generation prefills a prompt G times, copies the whole key/value cache at every token, and
computes finished rows to the end. Here

1. every prompt is prefilled once, and its keys and values are expanded to G rows,
2. the cache is allocated once and written in place,
3. finished rows are retired, so the batch shrinks as completions end,
4. the log-probability of every sampled token is kept: GRPO needs it anyway.

Models built like Qwen2 and Llama go through ``blocks``; other architectures go through
``model.generate``, which is slower and draws from the same distribution.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from cpugrpo_edu.data import Episode, Group
from cpugrpo_edu.engine import c_kernel
from cpugrpo_edu.engine.architectures import require_context
from cpugrpo_edu.engine.blocks import Block, Projection, causal_lm, is_supported, norm_of, rotary
from cpugrpo_edu.engine.int8_matrix import BlockInt8Linear, unpacked
from cpugrpo_edu.engine.memory import free_memory, retry_smaller, trim_heap
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.sizes import Architecture, rows_that_fit
from cpugrpo_edu.engine.workers import side_by_side
from cpugrpo_edu.sample import Sampling, draw, left_pad, regroup

DEFAULTS = EngineOptions()

WORKER_ROWS = 64
"""Fewest rows for which a thread of its own pays: about these keep it busy between two calls."""

MOST_BYTES = 2**30
"""Most memory of the rows decoded together; beyond it, more of them are hardly faster."""

PREFILL_TOKENS = 2048
"""Prompt tokens in one pass: more would leave the processor's cache between two layers."""

RETIRE_SHARE = 0.75
"""Compact the batch when fewer than this share of its rows is still running."""


@dataclass
class Cache:
    """Keys and values of all layers, (rows, kv heads, capacity, head dim) each, in place.

    ``mask`` is (rows, capacity), True where a real token stands; the first ``length`` positions
    are filled.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    length: int = 0

    @classmethod
    def empty(cls, lm: Any, rows: int, capacity: int) -> Cache:
        head_dim = lm.model.layers[0].self_attn.head_dim
        shape = (rows, lm.config.num_key_value_heads, capacity, head_dim)
        dtype = lm.model.norm.weight.dtype
        keys, values = ([torch.empty(shape, dtype=dtype) for _ in lm.model.layers] for _ in "kv")
        return cls(keys, values, torch.zeros(rows, capacity, dtype=torch.bool))

    def part(self, rows: slice) -> Cache:
        """These rows of an empty cache, in the same memory."""
        keys, values = ([x[rows] for x in xs] for xs in (self.keys, self.values))
        return Cache(keys, values, self.mask[rows])

    def select(self, rows: Tensor, capacity: int | None = None) -> Cache:
        """The given rows (repeats allowed), with room for ``capacity`` positions.

        This cache gives up its layers one by one, so that the two never exist side by side.
        """
        capacity = capacity or self.mask.shape[1]

        def pick(old: Tensor) -> Tensor:
            new = old.new_empty(len(rows), old.shape[1], capacity, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length].index_select(0, rows)
            return new

        keys, values = (
            [pick(old.pop(0)) for _ in range(len(old))] for old in (self.keys, self.values)
        )
        mask = self.mask.new_zeros(len(rows), capacity)
        mask[:, : self.length] = self.mask[:, : self.length].index_select(0, rows)
        return Cache(keys, values, mask, self.length)


class Decoder:
    """The live model's layers as functions, for one generation."""

    def __init__(self, lm: Any):
        self.lm = lm
        self.blocks = [Block.of(layer) for layer in lm.model.layers]
        self.norm = norm_of(lm.model.norm)
        self.head = Projection.of(lm.lm_head)

    def forward(self, ids: Tensor, positions: Tensor, valid: Tensor, cache: Cache) -> Tensor:
        """Run ``ids`` (rows, T) through the layers, appending to the cache.

        ``positions`` (rows, T) are the rotary positions, ``valid`` (rows, T) is False on padding.
        Returns the last position's hidden state (rows, hidden), after the final norm.
        """
        start, end = cache.length, cache.length + ids.shape[1]
        cache.mask[:, start:end] = valid
        cache.length = end
        hidden = self.lm.model.embed_tokens(ids)
        cos, sin = rotary(self.lm, hidden, positions)
        bias = attention_bias(cache.mask[:, :end], ids.shape[1], hidden.dtype)
        for index, block in enumerate(self.blocks):
            normed = block.before_attention(hidden)
            keys, values = cache.keys[index], cache.values[index]
            hidden = hidden + attend(block, normed, cos, sin, bias, keys, values, start)
            hidden = hidden + block.mlp(block.before_mlp(hidden))
        return self.norm(hidden[:, -1])


def attention_bias(mask: Tensor, new: int, dtype: torch.dtype) -> Tensor | None:
    """What to add to the scores of the last ``new`` positions, (rows, 1, new, end), 0 or -inf.

    ``mask`` (rows, end) is True on tokens. None if every query sees everything.
    """
    if new == 1 and bool(mask.all()):
        return None
    visible, end = mask[:, None, None], mask.shape[1]
    if new > 1:
        visible = visible & torch.ones(new, end, dtype=torch.bool).tril(end - new)
        # A padded query sees nothing, and the softmax of nothing is NaN: let it see itself.
        visible = visible | torch.eye(new, end, dtype=torch.bool)
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)


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
    """One attention layer (rows, T, hidden) over the cache, which gets the new keys and values.

    ``hidden`` is normalized; ``cos`` and ``sin`` are (rows, 1, T, head dim), ``bias`` is of
    ``attention_bias``, ``keys`` and ``values`` are the layer's cache, filled up to ``start``.
    """
    rows, length, _ = hidden.shape
    end = start + length
    query, keys[:, :, start:end], values[:, :, start:end] = block.heads(hidden, cos, sin)
    keys, values = keys[:, :, :end], values[:, :, :end]
    if length == 1:
        # Query heads that share keys take the place of positions: (rows, kv heads, heads of
        # each, head dim). With ``enable_gqa`` torch would copy the whole cache for them.
        query = query.reshape(rows, keys.shape[1], -1, block.head_dim)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias)
        mixed = mixed.reshape(rows, 1, -1)
    else:
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, enable_gqa=True)
        mixed = mixed.transpose(1, 2).reshape(rows, length, -1)
    return block.output(mixed)


class CompiledDecoder(Decoder):
    """The same for a model with compiled INT8 layers: a single token is one call of C."""

    def __init__(self, plain: Decoder):
        self.lm, self.blocks, self.norm, self.head = plain.lm, plain.blocks, plain.norm, plain.head
        self.layers = (c_kernel.Layer * len(self.blocks))()
        for ours, layer, block in zip(self.layers, self.lm.model.layers, self.blocks, strict=True):
            ours.before_attention = c_kernel.address(layer.input_layernorm.weight)
            ours.before_mlp = c_kernel.address(layer.post_attention_layernorm.weight)
            for name, module, projection in products(layer, block):
                adapter = (projection.down, projection.up)
                setattr(ours, name, c_kernel.describe(module.matrix, module.bias, *adapter))
        self.epsilon = self.lm.model.layers[0].input_layernorm.variance_epsilon
        self.cache: Cache | None = None

    @classmethod
    def serves(cls, plain: Decoder) -> bool:
        """Whether C knows every layer: compiled INT8 products, float32 norms, silu."""
        for layer, block in zip(plain.lm.model.layers, plain.blocks, strict=True):
            norms = (layer.input_layernorm, layer.post_attention_layernorm)
            if block.activation is not None or any(n.weight.dtype != torch.float32 for n in norms):
                return False
            for _, module, projection in products(layer, block):
                ours = isinstance(module, BlockInt8Linear) and module.kernel == "compiled"
                if not ours or projection.base != module.forward:
                    return False
        return True

    def attach(self, cache: Cache) -> None:
        """Tell C where this cache lies, and make room for it to work in."""
        for ours, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            ours.keys, ours.values = c_kernel.address(keys), c_kernel.address(values)
        self.workspace = c_kernel.Workspace.make(self.layers, *cache.keys[0].shape)
        self.cache = cache

    def forward(self, ids: Tensor, positions: Tensor, valid: Tensor, cache: Cache) -> Tensor:
        if ids.shape[1] > 1:
            return super().forward(ids, positions, valid, cache)
        if cache is not self.cache:
            self.attach(cache)
        start = cache.length
        cache.length = start + 1
        cache.mask[:, start : cache.length] = valid
        hidden = self.lm.model.embed_tokens(ids)
        cos, sin = self.lm.model.rotary_emb(hidden, positions)
        bias = attention_bias(cache.mask[:, : cache.length], 1, torch.float32)
        bias = None if bias is None else bias.flatten(1)
        shape = cache.keys[0].shape
        c_kernel.decode(
            self.layers, self.workspace, hidden, shape, start, cos, sin, bias, self.epsilon
        )
        return self.norm(hidden[:, -1])


def products(layer: Any, block: Block) -> Iterator[tuple[str, Any, Projection]]:
    """Each of a layer's linear maps: C's name, the module inside LoRA, and the plain tensors."""
    projections = (*block.query_key_value.each, block.output, *block.gate_up.each, block.down)
    for (name, path), projection in zip(c_kernel.LINEARS.items(), projections, strict=True):
        module = layer.get_submodule(path)
        yield name, getattr(module, "base_layer", module), projection


def prefill(
    decoder: Decoder, prompts: Sequence[Sequence[int]], pad_id: int, room: int = 0
) -> tuple[Tensor, Tensor, Cache]:
    """Left-pad and run the prompts once, ``PREFILL_TOKENS`` at a time.

    Returns the last hidden states (prompts, hidden), the lengths (prompts,), and the cache, with
    ``room`` for more positions.
    """
    ids, mask = left_pad(prompts, pad_id)
    valid = mask.bool()
    positions = (valid.cumsum(-1) - 1).clamp(min=0)
    count, width = ids.shape
    cache = Cache.empty(decoder.lm, count, width + room)
    size = max(1, PREFILL_TOKENS // width)
    hidden = []
    for rows in (slice(start, start + size) for start in range(0, count, size)):
        hidden.append(decoder.forward(ids[rows], positions[rows], valid[rows], cache.part(rows)))
    cache.length = width
    return torch.cat(hidden), valid.sum(-1), cache


def decode(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    copies: int,
    sampling: Sampling,
    eos_ids: set[int],
    pad_id: int,
    generator: torch.Generator,
    on_share: Callable[[float], None] = lambda share: None,
) -> list[Group]:
    """Complete each prompt ``copies`` times, all rows in one batch.

    After each token ``on_share`` gets the share that is done if no other row ends early.
    """
    decoder = Decoder(lm)
    pick = draw
    if CompiledDecoder.serves(decoder):
        decoder, pick = CompiledDecoder(decoder), c_kernel.draw
    new = sampling.max_new_tokens
    hidden, position, cache = prefill(decoder, prompts, pad_id, new if copies == 1 else 0)
    if copies > 1:
        rows = torch.arange(len(prompts)).repeat_interleave(copies)
        cache = cache.select(rows, cache.length + new)
        hidden, position = hidden[rows], position[rows]
    episodes = [Episode(finished=False) for _ in range(len(position))]
    stop = torch.tensor(sorted(eos_ids), dtype=torch.long)
    active = torch.arange(len(position))  # the episode of each row of the batch
    running = torch.ones(len(position), dtype=torch.bool)
    for step in range(sampling.max_new_tokens):
        token, logprob = pick(decoder.head(hidden), sampling, generator)
        ended = torch.isin(token, stop)
        live = (active[running], token[running], logprob[running], ended[running])
        for i, drawn, value, end in zip(*(x.tolist() for x in live), strict=True):
            episodes[i].completion_ids.append(drawn)
            episodes[i].logprobs.append(value)
            episodes[i].finished = end
        running &= ~ended
        alive = int(running.sum())
        on_share(1 - alive / len(episodes) * (1 - (step + 1) / sampling.max_new_tokens))
        if alive == 0 or step + 1 == sampling.max_new_tokens:
            break
        # Finished rows are computed like the others, so it pays to drop them. Dropping copies the
        # cache, so not after each.
        if alive < RETIRE_SHARE * len(active):
            keep = running.nonzero().squeeze(1)
            cache, active, token = cache.select(keep), active[keep], token[keep]
            position, running = position[keep], running[keep]
        valid = torch.ones(len(active), 1, dtype=torch.bool)
        hidden = decoder.forward(token[:, None], position[:, None], valid, cache)
        position = position + 1
    return regroup(prompts, copies, episodes)


class DrawInstead(LogitsProcessor):  # type: ignore[no-untyped-call]
    """Draws each token itself, keeps its log-prob, and leaves ``generate`` no other choice.

    So ``generate`` need not keep the scores of all steps, (rows, V) each: a token's log-prob is
    all that is wanted of them.
    """

    def __init__(
        self, sampling: Sampling, generator: torch.Generator, on_share: Callable[[float], None]
    ):
        self.sampling, self.generator, self.on_share = sampling, generator, on_share
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token, logprob = draw(scores, self.sampling, self.generator)
        self.logprobs.append(logprob)
        self.on_share(len(self.logprobs) / self.sampling.max_new_tokens)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def decode_with_generate(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    copies: int,
    sampling: Sampling,
    eos_ids: set[int],
    pad_id: int,
    generator: torch.Generator,
    on_share: Callable[[float], None] = lambda share: None,
) -> list[Group]:
    """The same by Hugging Face's ``generate``, on left-padded prompts, each given ``copies``
    times."""
    ids, mask = left_pad([prompt for prompt in prompts for _ in range(copies)], pad_id)
    drawn = DrawInstead(sampling, generator, on_share)
    # ``generate`` takes whatever it is not told from the model's own generation config, which may
    # hold min_p, beams or suppressed tokens: another distribution than the one asked for.
    with mock.patch.object(lm, "generation_config", GenerationConfig()):
        output = lm.generate(
            input_ids=ids,
            attention_mask=mask,
            logits_processor=LogitsProcessorList([drawn]),
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(eos_ids) or None,
            pad_token_id=pad_id,
        )
    tokens = output[:, ids.shape[1] :].tolist()
    episodes = []
    for row, logprobs in zip(tokens, torch.stack(drawn.logprobs, 1).tolist(), strict=True):
        end = next((i for i, token in enumerate(row) if token in eos_ids), None)
        n = len(row) if end is None else end + 1
        episodes.append(Episode(row[:n], logprobs[:n], end is not None))
    return regroup(prompts, copies, episodes)


@dataclass
class Meter:
    """Reports the share of ``total`` prompts that is done in whole prompts, each once, even where
    a second try begins again."""

    total: int
    report: Callable[[int], None]
    reported: int = 0

    def __call__(self, share: float) -> None:
        more = int(self.total * share) - self.reported
        if more > 0:
            self.reported += more
            self.report(more)

    def within(self, before: int, these: int, total: int) -> Callable[[float], None]:
        """The same for a share of ``these`` completions of ``total``, ``before`` being done."""
        return lambda share: self((before + these * share) / total)


@dataclass
class Batches:
    """What the batches of one call of ``sample`` share, and their groups by number of prompt."""

    draw: Callable[..., list[Group]]  # one batch: prompts, copies, generator, on_share
    prompts: Sequence[Sequence[int]]
    n: int
    generator: torch.Generator
    found: dict[int, Group] = field(default_factory=dict)

    def complete(self, chunk: list[int], meter: Meter, rows: int) -> None:
        """The prompts with these numbers, at most ``rows`` completions at a time."""
        state = self.generator.get_state()
        groups = [Group(list(self.prompts[i]), []) for i in chunk]
        together, copies = max(1, rows // self.n), min(rows, self.n)
        try:
            for start in range(0, len(groups), together):
                part = groups[start : start + together]
                for first in range(0, self.n, copies):
                    count, ids = min(copies, self.n - first), [group.prompt_ids for group in part]
                    before = start * self.n + first * len(part)  # completions
                    on_share = meter.within(before, count * len(part), self.n * len(groups))
                    more = self.draw(ids, count, generator=self.generator, on_share=on_share)
                    for group, addition in zip(part, more, strict=True):
                        group.episodes.extend(addition.episodes)
        except BaseException:
            self.generator.set_state(state)  # a second try draws what this one drew
            raise
        self.found.update(zip(chunk, groups, strict=True))
        meter(1.0)
        if len(self.found) < len(self.prompts):
            trim_heap()  # else the heap grows by the holes that each batch leaves


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
    where memory is refused, half as many are tried. Greedy completions are decoded by several
    threads side by side, which share these rows. ``on_done`` hears of batches under way, too: of
    as many prompts as the share of their tokens that are drawn. Raises ``ValueError`` for an empty
    prompt or n < 1, and ``UserError`` for completions beyond the model's context.
    """
    if n < 1 or not all(prompts):
        raise ValueError(f"{n} completions were asked, or a prompt has no tokens; give at least 1")
    lm, was_training = causal_lm(model), model.training
    require_context(lm.config, max(map(len, prompts), default=0), sampling.max_new_tokens)
    decoding = decode if options.engine == "fast" and is_supported(lm) else decode_with_generate
    stop = eos_ids if sampling.stop_at_eos else set()
    lock = threading.Lock()

    def report(more: int) -> None:
        with lock:
            on_done(more)

    rows = rows_at_once(lm, prompts, sampling, options)
    # Completions that are drawn depend on those before them, greedy ones do not.
    greedy = sampling.temperature == 0 and decoding is decode
    most = min(rows, n * len(prompts)) // WORKER_ROWS if greedy else 1
    workers = max(1, min(torch.get_num_threads(), most))
    rows //= workers
    batches = Batches(
        functools.partial(decoding, lm, sampling=sampling, eos_ids=stop, pad_id=pad_id),
        prompts,
        n,
        torch.Generator().manual_seed(sampling.seed),
    )
    attempts = [
        functools.partial(batches.complete, chunk, Meter(len(chunk), report))
        for chunk in chunks_by_length(prompts, max(1, rows // n))
    ]
    together = functools.partial(side_by_side, workers=workers) if workers > 1 else map
    model.eval()  # dropout must not act on rollouts
    try:
        with unpacked(lm):
            list(together(functools.partial(retry_smaller, size=rows), attempts))
    finally:
        model.train(was_training)
    return [batches.found[i] for i in range(len(prompts))]


def rows_at_once(
    lm: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, options: EngineOptions
) -> int:
    """How many completions to decode together: the option, or fewer where they take much memory."""
    longest = max((len(prompt) for prompt in prompts), default=0) + sampling.max_new_tokens
    free = min(free_memory(options.memory_limit), MOST_BYTES)
    a = Architecture.roughly(lm.config.get_text_config())
    return min(options.max_rows, rows_that_fit(a, longest, free))


def chunks_by_length(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Indices of the prompts, sorted by length, ``size`` at a time."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
