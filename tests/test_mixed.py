"""Products in bfloat16 stay within its rounding, and nothing else is rounded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from cpugrpo_edu import trainer as trainer_module
from cpugrpo_edu.mixed import bfloat16_linear
from cpugrpo_edu.models import load_policy
from cpugrpo_edu.packing import packed_log_probs
from cpugrpo_edu.trainer import CPUGRPOTrainer, CPUOptions, cpu_config

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


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_packed_log_probs_are_nearly_the_same(tiny_folder, lora_rank):
    model = load_policy(tiny_folder, lora_rank=lora_rank).model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (4, 9), generator=generator)
    ids[:, :4] = ids[0, :4]
    ones = torch.ones_like(ids)
    inputs = (ids[:, :4], ones[:, :4], ids[:, 4:], ones[:, 4:])
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for bfloat16 in (False, True):
        log_probs, _ = packed_log_probs(model, *inputs, bfloat16=bfloat16)
        parts = torch.autograd.grad(log_probs[0].sum(), parameters)
        found.append((log_probs, torch.cat([part.flatten() for part in parts])))
    (exact, slope), (rounded, rounded_slope) = found
    assert 0 < (exact - rounded).abs().max() < 0.05
    assert relative(rounded_slope, slope) < 0.1


@pytest.mark.parametrize("bf16", [False, True])
def test_packed_passes_of_a_trainer_follow_trls_option(tiny_folder, tmp_path, monkeypatch, bf16):
    real, asked = trainer_module.packed_log_probs, []

    def spy(*arguments):
        asked.append(arguments[7])
        return real(*arguments)

    monkeypatch.setattr(trainer_module, "packed_log_probs", spy)
    policy = load_policy(tiny_folder)
    before = [p.detach().clone() for p in policy.model.parameters()]
    config = cpu_config(
        tmp_path, prompts_per_step=1, num_generations=4, max_completion_length=4,
        max_steps=1, beta=0.1, learning_rate=1e-3, bf16=bf16,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["1 + 1 ="]})
    options = CPUOptions(share_prefix=True, patience=0)

    def reward(completion_ids, **_):
        return [float(i) for i in range(len(completion_ids))]

    CPUGRPOTrainer(policy, config, [reward], data, options=options).train()
    assert asked and set(asked) == {bf16}
    after = list(policy.model.parameters())
    assert all(p.dtype == torch.float32 for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(after, before))
