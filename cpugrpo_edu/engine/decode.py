"""The CPU decode engine: G completions for each prompt, with their log-probabilities.

Generic generation prefills a prompt G times, copies the whole key/value cache at
every token, and computes finished rows to the end. Here

1. every prompt is prefilled once and its keys and values are expanded to G rows,
2. the cache is allocated once and written in place,
3. finished rows are retired, so that the batch shrinks as completions end,
4. the log-probability of every sampled token is kept: GRPO needs it anyway.

The layers are those of the live Hugging Face model (Qwen2, Llama and others of
the same build), so LoRA and INT8 linear layers work as they are. Other
architectures go through ``model.generate``, which is slower and means the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cpugrpo_edu.data import Episode, Group
from cpugrpo_edu.engine import c_kernel
from cpugrpo_edu.engine.bf16 import product_of
from cpugrpo_edu.engine.int8_base import is_frozen
from cpugrpo_edu.engine.memory import free_memory, retry_smaller, rows_that_fit, trim_heap
from cpugrpo_edu.errors import UserError

ENGINES = ("fast", "generate")

RETIRE_SHARE = 0.75
"""Compact the batch when fewer than this share of its rows is still running."""


TRIM_LAYERS = 12
"""Where memory counts, holes that short-lived tensors left are given back this often."""


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. ``temperature`` 0 means greedy."""

    max_new_tokens: int = 96
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    max_rows: int = 256

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; give a number above 0 and at most 1")


def causal_lm(model: Any) -> Any:
    """The bare causal language model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_supported(model: Any) -> bool:
    """Whether the fast engine knows this architecture's layers."""
    lm = causal_lm(model)
    config = lm.config
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return config.model_type in {"qwen2", "llama"} and not sliding


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


Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Projection:
    """A linear layer as plain tensors: base(x) + x A^T B^T, A and B of LoRA, or only the base."""

    base: Layer
    down: Tensor | None = None  # A, (rank, in)
    up: Tensor | None = None  # (s B)^T, (rank, out): for few rows twice as fast as (out, rank)

    @classmethod
    def of(cls, layer: Any, bfloat16: bool = False) -> Projection:
        """Without the module's bookkeeping at each call; whatever is no plain layer stays whole."""
        if type(layer) is nn.Linear:
            return cls(product_of(layer, bfloat16))
        adapters = getattr(layer, "active_adapters", None)
        plain = (
            adapters is not None
            and type(layer).__module__ == "peft.tuners.lora.layer"
            and type(layer).__name__ == "Linear"
            and not layer.merged
            # PEFT keeps adapters in float32 and casts for a base in bfloat16
            and all(a.weight.dtype == layer.base_layer.weight.dtype for a in layer.lora_A.values())
            and not getattr(layer, "lora_variant", None)
            and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
        )
        if not plain:
            return cls(layer.forward)
        base = cls.of(layer.base_layer, bfloat16).base
        active = [name for name in adapters or () if name in layer.lora_A]
        if layer.disable_adapters or not active:
            return cls(base)
        downs = [layer.lora_A[name].weight for name in active]
        ups = [layer.lora_B[name].weight * layer.scaling[name] for name in active]
        up = torch.cat(ups, 1).t().contiguous()
        return cls(base, downs[0] if len(active) == 1 else torch.cat(downs), up)

    def finish(self, x: Tensor, low: Tensor) -> Tensor:
        """base(x) + low (s B)^T for ``low`` = x A^T."""
        assert self.up is not None
        y = self.base(x)
        if torch.is_grad_enabled():
            return y.baddbmm_(low, self.up.expand(len(y), -1, -1))
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.up).view(y.shape)

    def __call__(self, x: Tensor) -> Tensor:
        if self.down is None:
            return self.base(x)
        low = F.linear(x, self.down)
        if not torch.is_grad_enabled():
            return self.finish(x, low)
        # The adapter first: when activations are computed again in the backward pass, that
        # ends at the last tensor that it needs, and a frozen base needs none.
        assert self.up is not None
        return (low @ self.up).add_(self.base(x))


class Projections:
    """Linear layers of the same input: their A go through one product."""

    def __init__(self, *layers: Any, bfloat16: bool = False):
        self.each = [Projection.of(layer, bfloat16) for layer in layers]
        downs = [projection.down for projection in self.each if projection.down is not None]
        self.down = torch.cat(downs) if len(downs) == len(self.each) else None
        self.ranks = [len(down) for down in downs]

    def __call__(self, x: Tensor) -> list[Tensor]:
        if self.down is None:
            return [projection(x) for projection in self.each]
        lows = F.linear(x, self.down).split(self.ranks, -1)
        return [p.finish(x, low) for p, low in zip(self.each, lows, strict=True)]


def norm_of(norm: Any) -> Layer:
    """An RMS norm as one fused call in float32; other norms and dtypes as they stand."""
    epsilon = getattr(norm, "variance_epsilon", None)
    if epsilon is None or norm.weight.dtype != torch.float32:
        return norm.forward  # type: ignore[no-any-return]
    return lambda x: F.rms_norm(x, norm.weight.shape, norm.weight, epsilon)


class _GatedUnit(torch.autograd.Function):
    """silu(gate) * up, keeping only its two inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        share = torch.sigmoid(gate)
        active = gate * share  # silu
        # silu' = share (1 + gate (1 - share)) = share + active (1 - share)
        slope = share.addcmul_(active, 1 - share)
        return slope.mul_(up).mul_(gradient), active.mul_(gradient)


@dataclass(frozen=True)
class Block:
    """One transformer layer as plain functions, valid until the weights change."""

    before_attention: Layer
    query_key_value: Projections
    output: Projection
    before_mlp: Layer
    gate_up: Projections
    down: Projection
    activation: Layer | None  # None: silu
    head_dim: int

    @classmethod
    def of(cls, layer: Any, bfloat16: bool = False) -> Block:
        attention, mlp = layer.self_attn, layer.mlp
        first = (attention.q_proj, attention.k_proj, attention.v_proj)
        silu = type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        return cls(
            before_attention=norm_of(layer.input_layernorm),
            query_key_value=Projections(*first, bfloat16=bfloat16),
            output=Projection.of(attention.o_proj, bfloat16),
            before_mlp=norm_of(layer.post_attention_layernorm),
            gate_up=Projections(mlp.gate_proj, mlp.up_proj, bfloat16=bfloat16),
            down=Projection.of(mlp.down_proj, bfloat16),
            activation=None if silu else mlp.act_fn,
            head_dim=attention.head_dim,
        )

    def heads(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, (rows, heads, T, head dim) each."""
        query, key, value = (
            x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for x in self.query_key_value(hidden)
        )
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)
        if self.activation is not None:
            return self.down(self.activation(gate) * up)
        if not torch.is_grad_enabled():
            return self.down(F.silu(gate, inplace=True).mul_(up))
        if self.down.down is None:
            return self.last(gate, up)
        # Only the adapter needs the unit's result; to compute it again takes no large product.
        return compute_again(self.last, gate, up)

    def last(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down(_GatedUnit.apply(gate, up))  # type: ignore[no-untyped-call]


def compute_again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Its result; what it would keep for the backward pass is computed again there."""
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


def hidden_states(
    lm: Any,
    ids: Tensor,
    positions: Tensor,
    bias: Tensor,
    recompute: bool = False,
    bfloat16: bool = False,
) -> Tensor:
    """Last hidden states (rows, T, hidden) of whole sequences, differentiable, without a cache.

    ``bias`` (rows or 1, 1, T, T) is added to the attention's scores. With ``recompute`` the
    inside of each MLP, most of a layer's activations, is computed again in the backward pass.
    With ``bfloat16`` float32 weights are multiplied in it (:mod:`cpugrpo_edu.engine.bf16`).
    """
    hidden = lm.model.embed_tokens(ids)
    cos, sin = lm.model.rotary_emb(hidden, positions)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    spare = recompute or is_frozen(lm)
    for index, layer in enumerate(lm.model.layers):
        if spare and index % TRIM_LAYERS == 0:
            trim_heap()
        block = Block.of(layer, bfloat16)
        query, key, value = block.heads(block.before_attention(hidden), cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
        hidden = hidden + block.output(mixed.transpose(1, 2).flatten(2))
        normed = block.before_mlp(hidden)
        if recompute and torch.is_grad_enabled():
            hidden = hidden + compute_again(block.mlp, normed)
        else:
            hidden = hidden + block.mlp(normed)
    result: Tensor = norm_of(lm.model.norm)(hidden)
    return result


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


def products(layer: Any, block: Block) -> dict[str, tuple[Any, Projection]]:
    """C's name for each of a layer's products: its module, and the same as plain tensors."""
    projections = (*block.query_key_value.each, block.output, *block.gate_up.each, block.down)
    return {
        name: (layer.get_submodule(path), projection)
        for (name, path), projection in zip(c_kernel.LINEARS.items(), projections, strict=True)
    }


def base_layer(module: Any) -> Any:
    """The layer that LoRA wraps, or the layer itself."""
    return getattr(module, "base_layer", module)


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one token a row from (rows, V) logits; return ids (rows,) and log-probs in nats.

    The log-probs are those of the distribution drawn from, so temperature and
    top-p are included. Greedy decoding reports the model's own log-probs.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, log_prob_of(logits, token)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    # The inverse of the cumulative distribution: one random number a row. (Gumbel-max needs
    # one a token, which for a vocabulary of 151,936 costs more than a layer.)
    log_total = logits.logsumexp(-1, keepdim=True)
    mass = (logits - log_total).exp().cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    point = torch.rand(total.shape, generator=generator, dtype=torch.float64) * total
    token = torch.searchsorted(mass, point, right=True)
    return token.squeeze(-1), (logits.gather(-1, token) - log_total).squeeze(-1)


def log_prob_of(logits: Tensor, token: Tensor) -> Tensor:
    return logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(-1)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Nucleus truncation: the fewest tokens whose mass reaches ``top_p``; the rest -inf."""
    ordered, order = logits.sort(-1, descending=True)
    mass = ordered.softmax(-1).cumsum(-1)
    drop = mass - ordered.softmax(-1) >= top_p
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (prompts, width), padded on the left, and where a real token stands."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, torch.arange(width) >= (width - lengths)[:, None]


def regroup(
    prompts: Sequence[Sequence[int]], copies: int, episodes: Sequence[Episode]
) -> list[Group]:
    """Put the episodes, ``copies`` in a row for each prompt, into one group a prompt."""
    return [
        Group(list(prompt), list(episodes[i * copies : (i + 1) * copies]))
        for i, prompt in enumerate(prompts)
    ]


def prefill(
    decoder: Decoder, prompts: Sequence[Sequence[int]], pad_id: int
) -> tuple[Tensor, Tensor, Cache]:
    """Left-pad and run the prompts once.

    Returns the last hidden states (prompts, hidden), the lengths, and the cache.
    """
    ids, valid = left_pad(prompts, pad_id)
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
    ids, valid = left_pad([prompt for prompt in prompts for _ in range(copies)], pad_id)
    greedy = sampling.temperature == 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        output = model.generate(
            input_ids=ids,
            attention_mask=valid.long(),
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
def rollout(
    model: Any,
    prompts: Sequence[Sequence[int]],
    copies: int,
    sampling: Sampling,
    *,
    eos_ids: set[int],
    pad_id: int,
    engine: str = "fast",
    memory_limit: int | None = None,
    on_done: Callable[[int], None] = lambda rows: None,
) -> list[Group]:
    """Sample ``copies`` completions of each tokenized prompt, in the order given.

    Prompts of like length are decoded together, at most ``sampling.max_rows``
    rows at a time, or fewer where memory is short or the process would come to
    hold more than ``memory_limit`` bytes; where memory is refused, half as many are
    tried. ``engine`` is "fast" or "generate" (the reference); ``eos_ids`` may be
    empty, which forces completions of full length. Completions keep their
    end-of-text token. Raises UserError for an empty prompt or an unknown engine.
    """
    if engine not in ENGINES:
        raise UserError(f"unknown rollout engine {engine!r}; allowed are {' and '.join(ENGINES)}")
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("a prompt has no tokens; give it some text")
    if copies < 1:
        raise UserError(f"copies is {copies}; give at least 1 completion a prompt")
    was_training = model.training
    model.eval()  # dropout must not act on rollouts
    generator = torch.Generator().manual_seed(sampling.seed)
    groups: list[Group | None] = [None] * len(prompts)
    fast = engine == "fast" and is_supported(model)
    lm, decoding = (causal_lm(model), decode) if fast else (model, decode_with_generate)
    rows = sampling.max_rows
    if is_supported(model) and prompts:
        longest = max(len(prompt) for prompt in prompts) + sampling.max_new_tokens
        rows = min(rows, rows_that_fit(lm.config, longest, free_memory(memory_limit)))

    def complete(texts: Sequence[Sequence[int]], rows: int, state: Tensor) -> list[Group]:
        generator.set_state(state)
        done = [Group(list(text), []) for text in texts]
        together, times = max(1, rows // copies), min(rows, copies)
        for start in range(0, len(texts), together):
            part = done[start : start + together]
            for first in range(0, copies, times):
                some = min(times, copies - first)
                prompt_ids = [group.prompt_ids for group in part]
                more = decoding(lm, prompt_ids, some, sampling, eos_ids, pad_id, generator)
                for group, addition in zip(part, more, strict=True):
                    group.episodes.extend(addition.episodes)
        return done

    try:
        for chunk in chunks_by_length(prompts, max(1, rows // copies)):
            texts, state = [prompts[i] for i in chunk], generator.get_state()
            done = retry_smaller(functools.partial(complete, texts, state=state), rows)
            for i, group in zip(chunk, done, strict=True):
                groups[i] = group
            on_done(len(chunk))
    finally:
        model.train(was_training)
    return [group for group in groups if group is not None]


def chunks_by_length(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Indices of the prompts, sorted by length, ``size`` at a time."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
