"""A transformer's layers as plain functions, for models built like Qwen2 and Llama.

The layers are those of the live Hugging Face model, so LoRA and INT8 linear layers work as
they are. Both the decoder and the packed training pass are made of these blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cpugrpo_edu.engine.architectures import supports
from cpugrpo_edu.engine.bf16 import product_of


def causal_lm(model: Any) -> Any:
    """The bare causal language model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_supported(model: Any) -> bool:
    """Whether the fast engine knows this architecture's layers."""
    return supports(causal_lm(model).config, "fast engine") is None


TensorMap = Callable[[Tensor], Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries, keys and values, (rows, heads, T, dim) each, to the mixed values, of queries'
shape."""


@dataclass(frozen=True)
class Projection:
    """A linear layer as plain tensors: base(x) + x A^T (s B)^T, with LoRA's A, B and scale s, or
    the base alone."""

    base: TensorMap  # (..., in) to (..., out)
    down: Tensor | None = None  # A, (rank, in)
    up: Tensor | None = None  # (s B)^T, (rank, out): for few rows twice as fast as (out, rank)

    @classmethod
    def of(cls, layer: Any, bfloat16: bool = False) -> Projection:
        """The projection of a module, without its bookkeeping at each call.

        Valid until the weights change. A module that is neither a plain linear layer nor plain
        LoRA on one is called as it is. ``bfloat16``: see :mod:`cpugrpo_edu.engine.bf16`.
        """
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
        """base(x) + low (s B)^T, (rows, T, out), for ``low`` = x A^T, (rows, T, rank)."""
        assert self.up is not None
        y = self.base(x)
        if torch.is_grad_enabled():
            # In place: the product and its sum with y never exist beside y, which is as large as
            # the layer's output. Nothing needs the old y for its gradient.
            return y.baddbmm_(low, self.up.expand(len(y), -1, -1))
        # One product of all rows: decoding has one token a row, and a batch of such tiny
        # products costs a call for each.
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.up).view(y.shape)

    def __call__(self, x: Tensor) -> Tensor:
        if self.down is None:
            return self.base(x)
        low = F.linear(x, self.down)
        if not torch.is_grad_enabled():
            return self.finish(x, low)
        # The adapter first. Where activations are computed again in the backward pass, that stops
        # at the last tensor it needs. The base needs none, and so its product is left out.
        assert self.up is not None
        return (low @ self.up).add_(self.base(x))


class Projections:
    """Linear layers of the same input (rows, T, in): their A go through one product."""

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


def norm_of(norm: Any) -> TensorMap:
    """An RMS norm as one fused call in float32; other norms and dtypes as they are."""
    epsilon = getattr(norm, "variance_epsilon", None)
    if epsilon is None or norm.weight.dtype != torch.float32:
        return norm.forward  # type: ignore[no-any-return]
    if torch.is_grad_enabled():
        return lambda x: _RMSNorm.apply(x, norm.weight, epsilon)  # type: ignore[no-untyped-call]
    return lambda x: F.rms_norm(x, norm.weight.shape, norm.weight, epsilon)


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = (mean(x^2) + epsilon)^(-1/2); torch's own takes it apart and keeps more.

    With h = g w of the incoming gradient g, dL/dx = r h - x r^3 mean(h x).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = (torch.linalg.vecdot(x, x) / x.shape[-1] + epsilon).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        for_weight = None
        if ctx.needs_input_grad[1]:
            for_weight = (gradient * x).mul_(scale).flatten(0, -2).sum(0)
        h = gradient * weight
        share = torch.linalg.vecdot(h, x)[..., None] * scale**3 / x.shape[-1]
        return h.mul_(scale).addcmul_(x, share, value=-1), for_weight, None


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

    before_attention: TensorMap
    query_key_value: Projections
    output: Projection
    before_mlp: TensorMap
    gate_up: Projections
    down: Projection
    activation: TensorMap | None  # None: silu
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

    def through(
        self, cos: Tensor, sin: Tensor, attend: Attention, recompute: bool, hidden: Tensor
    ) -> Tensor:
        """The layer's output, (rows, T, hidden) like its input; with ``recompute`` the inside of
        the MLP is computed again in the backward pass."""
        mixed = attend(*self.heads(self.before_attention(hidden), cos, sin))
        hidden = hidden + self.output(mixed.transpose(1, 2).flatten(2))
        normed = self.before_mlp(hidden)
        return hidden + (compute_again(self.mlp, normed) if recompute else self.mlp(normed))

    def mlp(self, x: Tensor) -> Tensor:
        """The gated feed-forward layer, (rows, T, hidden) to the same."""
        gate, up = self.gate_up(x)
        if self.activation is not None:
            return self.down(self.activation(gate) * up)
        if not torch.is_grad_enabled():
            return self.down(F.silu(gate, inplace=True).mul_(up))
        if self.down.down is None:
            return self.gated(gate, up)
        # The gated unit's result is the layer's largest tensor, and only the adapter's gradient
        # needs it. Computing it again takes no matrix product.
        return compute_again(self.gated, gate, up)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down(_GatedUnit.apply(gate, up))  # type: ignore[no-untyped-call]


def compute_again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, computed again in the backward pass instead of keeping activations."""
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


def hidden_states(
    lm: Any,
    ids: Tensor,
    positions: Tensor,
    attend: Attention,
    recompute: bool = False,
    bfloat16: bool = False,
) -> Tensor:
    """Last hidden states (rows, T, hidden) of whole sequences, differentiable, without a cache.

    ``ids`` and rotary ``positions`` are (rows, T). With ``recompute`` the inside of each MLP, most
    of a layer's activations, is computed again in the backward pass; of a model with checkpointing
    switched on, each whole layer. With ``bfloat16`` float32 weights are multiplied in bfloat16
    (:mod:`cpugrpo_edu.engine.bf16`).
    """
    hidden = lm.model.embed_tokens(ids)
    cos, sin = rotary(lm, hidden, positions)
    whole_layers = torch.is_grad_enabled() and lm.model.is_activation_checkpointing
    mlps = torch.is_grad_enabled() and recompute and not whole_layers
    for layer in lm.model.layers:
        through = partial(Block.of(layer, bfloat16).through, cos, sin, attend, mlps)
        hidden = compute_again(through, hidden) if whole_layers else through(hidden)
    result: Tensor = norm_of(lm.model.norm)(hidden)
    return result


def rotary(lm: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """What ``rotate`` takes for ``positions`` (rows, T): cosines and sines, (rows, 1, T, dim) each,
    the sines of the first half negative."""
    cos, sin = lm.model.rotary_emb(hidden, positions)
    first, second = sin.chunk(2, dim=-1)
    return cos.unsqueeze(1), torch.cat((-first, second), dim=-1).unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of x (rows, heads, T, dim), with
    ``cos`` and ``sin`` of :func:`rotary`: each number is mixed with that half a head away."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
