"""Mixed precision: weights in float32, their products in bfloat16.

A processor with bfloat16 instructions multiplies in them several times as fast as in float32.
Weights, optimizer and the sums inside a product stay in float32, and only factors and
results are rounded, to 8 bits: a relative error of at most 2**-9 each (Micikevicius et al. 2018,
arXiv:1710.03740). ``torch.autocast`` does the same, but keeps a bfloat16 copy of every
weight until the backward pass is over; here the copy is made for each product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Bfloat16Linear(torch.autograd.Function):
    """y = x W^T + b, all of them float32 to the caller."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = F.linear(x.bfloat16(), weight.bfloat16()).float()
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rounded = gradient.bfloat16()
        return (
            (rounded @ weight.bfloat16()).float() if for_x else None,
            (rounded.flatten(0, -2).t() @ x.bfloat16().flatten(0, -2)).float()
            if for_weight
            else None,
            gradient.flatten(0, -2).sum(0) if for_bias else None,
        )


def bfloat16_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of x (..., in), W (out, in) and b (out), all of them float32, rounded inside."""
    result: Tensor = _Bfloat16Linear.apply(x, weight, bias)
    return result


def product_of(layer: nn.Linear, bfloat16: bool = False) -> Callable[[Tensor], Tensor]:
    """x W^T + b of a plain linear layer; with ``bfloat16`` in it, if the weights are float32."""
    rounds = bfloat16 and layer.weight.dtype == torch.float32
    linear = bfloat16_linear if rounds else F.linear
    return functools.partial(linear, weight=layer.weight, bias=layer.bias)


class Bf16Linear(nn.Module):
    """``x @ W.T + b`` with W kept in bfloat16 and x rounded to it; for inference only.

    ``x`` is (..., in_features), the result (..., out_features) of the same dtype; the sums inside
    are float32.
    Rounding a number to bfloat16 costs a relative error of at most 2**-9 whatever its
    neighbours are, so the outlier activations of real models do no harm (in INT8, one scale
    for a row makes the small numbers of that row vanish).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.pack(weight, bias)

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take these float weights in place of the present ones."""
        self.out_features, self.in_features = weight.shape
        self.q = weight.detach().bfloat16()
        self.bias = None if bias is None else bias.detach().float().clone()
        self.nbytes = self.q.nbytes + (0 if bias is None else 4 * bias.numel())

    def dequantized(self) -> Tensor:
        """The weights it computes with, float32 (out_features, in_features)."""
        return self.q.float()

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a rollout copy has no gradient; train the live model")
        y = F.linear(x.bfloat16(), self.q).float()
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)
