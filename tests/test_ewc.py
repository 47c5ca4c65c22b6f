"""EWC: its gradient, its bookkeeping over stages, and that it really reduces forgetting."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.ewc import (
    Anchor,
    add_ewc_gradient,
    ewc_penalty,
    merge_anchors,
    normalize_fisher,
    take_anchor,
)
from cpugrpo_edu.fisher import Example, fisher_diagonal
from cpugrpo_edu.run.anchors import load_anchor, save_anchor


def small_model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def random_fisher(model) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {n: torch.rand(p.shape) for n, p in model.named_parameters()}


def drift(model, size: float = 0.3) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn_like(p)


# --- penalty and gradient -------------------------------------------------------


def test_zero_at_the_anchor_and_the_anchor_is_a_copy():
    model = small_model()
    anchor = take_anchor(model, random_fisher(model))
    assert ewc_penalty(model, anchor, 10.0).item() == 0
    assert add_ewc_gradient(model, anchor, 10.0) == 0
    assert all((p.grad == 0).all() for p in model.parameters())
    drift(model)
    assert ewc_penalty(model, anchor, 10.0).item() > 0


def test_penalty_by_hand():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0]])
    anchor = take_anchor(model, {"weight": torch.tensor([[3.0, 0.5]])})
    model.weight.data = torch.tensor([[2.0, 0.0]])
    expected = 10 / 2 * (3 * 1 + 0.5 * 4)
    assert ewc_penalty(model, anchor, 10.0).item() == pytest.approx(expected)
    assert add_ewc_gradient(model, anchor, 10.0) == pytest.approx(expected)
    assert model.weight.grad.tolist() == [[30.0, -10.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_grad", [False, True])
def test_gradient_equals_autograd_of_the_penalty(dtype, has_grad):
    model = small_model(dtype)
    anchor = take_anchor(model, random_fisher(model))
    drift(model)
    expected = torch.autograd.grad(ewc_penalty(model, anchor, 7.0), list(model.parameters()))
    before = 0.0
    if has_grad:
        before = 0.5
        for p in model.parameters():
            p.grad = torch.full_like(p, before)
    penalty = add_ewc_gradient(model, anchor, 7.0)
    assert penalty == pytest.approx(ewc_penalty(model, anchor, 7.0).item(), rel=1e-5)
    for p, g in zip(model.parameters(), expected):
        assert p.grad.dtype == dtype and not p.grad.requires_grad
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert torch.allclose(p.grad.float(), g.float() + before, atol=tolerance, rtol=tolerance)


def test_small_bf16_drift_is_measured_in_fp32():
    """1 + 2^-7 is bf16's next number after 1; its square difference would vanish in bf16 sums."""
    model = nn.Linear(1000, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    anchor = take_anchor(model, {"weight": torch.ones(1, 1000)})
    model.weight.data += 2**-7
    assert ewc_penalty(model, anchor, 2.0).item() == pytest.approx(1000 * 2**-14, rel=1e-5)


def test_frozen_parameters_and_zero_strength_get_no_gradient():
    model = small_model()
    anchor = take_anchor(model, random_fisher(model))
    drift(model)
    add_ewc_gradient(model, anchor, 0.0)
    assert all(p.grad is None for p in model.parameters())
    model[0].weight.requires_grad_(False)
    add_ewc_gradient(model, anchor, 1.0)
    assert model[0].weight.grad is None and model[0].bias.grad is not None


# --- several stages -------------------------------------------------------------


def test_merged_anchor_adds_fishers_and_keeps_the_latest_parameters():
    model = small_model()
    first = take_anchor(model, random_fisher(model))
    drift(model)
    second = take_anchor(model, {n: 2 * f for n, f in first.fisher.items()})
    merged = merge_anchors(first, second, decay=0.5)
    name = "0.weight"
    assert torch.allclose(merged.fisher[name], 2.5 * first.fisher[name])
    assert torch.equal(merged.params[name], second.params[name])
    assert not torch.equal(merged.params[name], first.params[name])
    assert merge_anchors(None, first) is first


def test_running_anchor_is_the_exact_posterior_for_quadratic_tasks():
    """Three quadratic tasks learned one after the other end where joint training ends.

    Loss of task k: h_k / 2 (theta - c_k)^2 by entry; its Fisher is h_k. With the running
    anchor, each stage's minimum is the minimum of all tasks so far (Huszar 2018).
    """
    torch.manual_seed(0)
    curvature, centre = torch.rand(3, 4) + 0.1, torch.randn(3, 4)
    model = nn.ParameterDict({"theta": nn.Parameter(torch.zeros(4))})
    anchor = None
    for h, c in zip(curvature, centre):
        for _ in range(400):
            model.zero_grad()
            (h * (model["theta"] - c).square()).sum().div(2).backward()
            if anchor:
                add_ewc_gradient(model, anchor, 1.0)
            with torch.no_grad():
                model["theta"] -= 0.3 * model["theta"].grad
        anchor = merge_anchors(anchor, take_anchor(model, {"theta": h}))
    joint = (curvature * centre).sum(0) / curvature.sum(0)
    assert torch.allclose(model["theta"], joint, atol=1e-4)
    assert not torch.allclose(joint, centre[-1], atol=0.1)


# --- scaling and files ----------------------------------------------------------


def test_normalize_fisher():
    fisher = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[8.0]])}
    assert normalize_fisher(fisher)["a"].tolist() == [0.25, 0.75]
    assert normalize_fisher(normalize_fisher(fisher))["b"].item() == pytest.approx(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, dtype):
    model = small_model(dtype)
    anchor = take_anchor(model, random_fisher(model))
    loaded = load_anchor(save_anchor(anchor, tmp_path / "new" / "anchor.safetensors"))
    assert loaded.params.keys() == anchor.params.keys()
    for name in anchor.params:
        assert torch.equal(loaded.params[name], anchor.params[name])
        assert loaded.params[name].dtype == dtype
        assert torch.equal(loaded.fisher[name], anchor.fisher[name])


# --- errors ---------------------------------------------------------------------


def test_bad_input_is_named(tmp_path):
    model = small_model()
    good = random_fisher(model)
    anchor = take_anchor(model, good)
    with pytest.raises(ValueError, match="nope has shape .* is absent"):
        take_anchor(model, {"nope": torch.ones(1)})
    with pytest.raises(ValueError, match=r"0.bias has shape \(7,\) but the model's is \(4,\)"):
        take_anchor(model, {**good, "0.bias": torch.ones(7)})
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="negative or non-finite"):
            take_anchor(model, {"0.bias": torch.full((4,), bad)})
    with pytest.raises(ValueError, match="0 parameters"):
        ewc_penalty(model, Anchor({}, {}), 1.0)
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength is"):
            ewc_penalty(model, anchor, strength)
        with pytest.raises(ValueError, match="strength is"):
            add_ewc_gradient(model, anchor, strength)
    with pytest.raises(ValueError, match="decay is 1.5"):
        merge_anchors(anchor, anchor, decay=1.5)
    with pytest.raises(ValueError, match="4 and 1 parameters"):
        merge_anchors(anchor, take_anchor(model, {"0.bias": torch.ones(4)}))
    with pytest.raises(ValueError, match="0 everywhere"):
        normalize_fisher({"a": torch.zeros(2)})
    for name, tensors in {"x": {"weight": torch.ones(1)}, "y": {"params/a": torch.ones(1)}}.items():
        save_file(tensors, tmp_path / name)
        with pytest.raises(UserError, match="is not an anchor"):
            load_anchor(tmp_path / name)
    (tmp_path / "text").write_text("hello")
    for name in ("text", "missing"):
        with pytest.raises(UserError, match="cannot read an anchor"):
            load_anchor(tmp_path / name)


# --- does it work? --------------------------------------------------------------

FIRST = [Example([x], [(x + 1) % 4]) for x in range(4)]  # 0 1 2 3 -> the next
SECOND = [Example([x], [(x + 2) % 4 + 4]) for x in range(4, 8)]  # other inputs, other rule


def task_loss(model, task: list[Example]) -> torch.Tensor:
    """Mean negative log-likelihood, in nats a completion."""
    inputs = torch.tensor([e.prompt_ids for e in task])
    labels = torch.tensor([e.completion_ids[0] for e in task])
    return nn.functional.cross_entropy(model(inputs).logits[:, -1], labels)


def train(model, task: list[Example], steps: int, anchor=None, strength: float = 0.0) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        task_loss(model, task).backward()
        if anchor:
            add_ewc_gradient(model, anchor, strength)
        optimizer.step()


@pytest.fixture(scope="module")
def two_tasks() -> dict[float, dict[str, float]]:
    """Learn FIRST, then SECOND under springs of different strength."""
    results = {}
    for strength in (0.0, 10.0, 100.0):
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=8,
        )
        model = Qwen2ForCausalLM(config)
        train(model, FIRST, 40)
        before = task_loss(model, FIRST).item()
        anchor = take_anchor(model, fisher_diagonal(model, FIRST, "exact"))
        train(model, SECOND, 60, anchor, strength)
        results[strength] = {
            "before": before,
            "first": task_loss(model, FIRST).item(),
            "second": task_loss(model, SECOND).item(),
            "penalty": ewc_penalty(model, anchor, 1.0).item(),
        }
    return results


def test_ewc_reduces_forgetting_and_still_learns(two_tasks):
    print(two_tasks)
    without, with_ewc = two_tasks[0.0], two_tasks[100.0]
    assert without["before"] == with_ewc["before"] < 0.3  # the first task was learned
    assert without["first"] > 1.0  # without EWC it is forgotten
    assert with_ewc["first"] < without["first"] / 2
    assert with_ewc["second"] < 0.5  # log 8 = 2.1 nats is chance


def test_a_stronger_spring_drifts_less(two_tasks):
    free, weak, strong = (two_tasks[s]["penalty"] for s in (0.0, 10.0, 100.0))
    assert free > 1.5 * weak and weak > 1.5 * strong > 0
