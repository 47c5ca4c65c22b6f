"""Products in bfloat16 stay within its rounding, and nothing else is rounded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cpugrpo_edu.engine.bf16 import bfloat16_linear, product_of

EPSILON = 2**-8
"""Distance of 1 to the next number in bfloat16; rounding errs by half of it."""


def relative(found, expected):
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3)])
def test_the_product_and_its_gradients_are_those_of_float64_but_for_rounding(bias, shape):
    generator = torch.Generator().manual_seed(0)
    sizes = [(*shape, 96), (80, 96), *([(80,)] if bias else [])]
    inputs = [torch.randn(size, generator=generator) for size in sizes]
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    y, expected = bfloat16_linear(*ours), F.linear(*exact)
    assert y.dtype == torch.float32
    assert 1e-5 < relative(y, expected) < EPSILON
    g = torch.randn(y.shape, generator=generator)
    gradients = torch.autograd.grad(y, ours, g)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, exact, g.double())):
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        assert relative(found, wanted) < EPSILON
    if bias:  # a sum, which is not rounded
        torch.testing.assert_close(gradients[2], g.flatten(0, -2).sum(0))


def test_numbers_that_bfloat16_holds_have_the_exact_product():
    x, weight = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[4.0, 1.0, 8.0], [0.25, 3.0, 2.0]])
    assert torch.equal(bfloat16_linear(x, weight), F.linear(x, weight))


def test_what_needs_no_gradient_gets_none():
    x, weight = torch.randn(2, 8), torch.randn(4, 8, requires_grad=True)
    bfloat16_linear(x, weight).sum().backward()
    assert x.grad is None and weight.grad.shape == (4, 8)


def test_only_what_is_asked_for_is_rounded():
    layer, x = nn.Linear(96, 80), torch.randn(3, 96)
    assert torch.equal(product_of(layer)(x), layer(x))
    assert 1e-5 < relative(product_of(layer, bfloat16=True)(x), layer(x)) < EPSILON
    half, x = layer.bfloat16(), x.bfloat16()
    assert torch.equal(product_of(half, bfloat16=True)(x), half(x))
