"""What the reader builds in chapter 3: the clipped objective, the KL penalty, loss and loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpugrpo_edu.models.load import load_policy
from cpugrpo_edu.notebook.checks import CLOSE, EMPTY, Build, Function, raised, report
from cpugrpo_edu.policy import clipped_surrogate, grpo_loss, kl_estimates
from cpugrpo_edu.tasks import make_problems
from cpugrpo_edu.train import REWARDS, Settings, train

# --- The clipped objective, the KL penalty and the loss -----------------------


def _surrogate(ratio: Tensor, A: Tensor, eps: float) -> Tensor:
    return clipped_surrogate(ratio.log(), torch.zeros_like(ratio), A, eps, eps)


def _ratios() -> Sequence[tuple[Any, ...]]:
    ratio = torch.tensor([0.4, 0.7, 0.9, 1.0, 1.1, 1.3, 2.0])
    return [(ratio, torch.full_like(ratio, A), eps) for A in (1.0, -0.5) for eps in (0.2, 0.1)]


SURROGATE = Build(
    _surrogate,
    _ratios,
    [
        (
            (
                "it clips on both sides. Take the minimum of the clipped and the unclipped "
                "product, so that a good token that became less likely is still pulled back."
            ),
            lambda ratio, A, eps: ratio.clamp(1 - eps, 1 + eps) * A,
        ),
        (
            "this is the maximum of the two products; the minimum is the careful one.",
            lambda ratio, A, eps: torch.max(ratio * A, ratio.clamp(1 - eps, 1 + eps) * A),
        ),
        (
            (
                "the minimum is of the ratios, before A multiplies them; with A < 0 that is the "
                "wrong one. Multiply first."
            ),
            lambda ratio, A, eps: torch.min(ratio, ratio.clamp(1 - eps, 1 + eps)) * A,
        ),
        ("nothing is clipped.", lambda ratio, A, eps: ratio * A),
    ],
)


def _log_probs_and_reference() -> Sequence[tuple[Tensor, Tensor]]:
    logits = torch.tensor([1.0, 0.2, -0.5, 0.0, 0.6]).double()
    reference = torch.tensor([0.0, 0.9, 0.3, -1.0, 0.5]).double()
    return [(logits.log_softmax(0), reference.log_softmax(0))]


KL = Build(
    lambda lp, ref: kl_estimates(lp, ref).k3,
    _log_probs_and_reference,
    [
        (
            (
                "the sign of d is wrong. It is never negative either, but its mean is not the KL: "
                "d = ref - lp."
            ),
            lambda lp, ref: kl_estimates(ref, lp).k3,
        ),
        (
            "this is k1: its mean is right, but it can be negative, and it varies more.",
            lambda lp, ref: lp - ref,
        ),
        ("this is minus k1: as a penalty it is a bonus for moving away.", lambda lp, ref: ref - lp),
        ("this is k2: its mean is not the KL.", lambda lp, ref: (ref - lp) ** 2 / 2),
        (
            "this is a term of the sum for KL(ref || pi); the samples come from pi.",
            lambda lp, ref: ref.exp() * (ref - lp),
        ),
        (
            ("this is a term of the sum for KL(pi || ref). Sampling weights it with pi already."),
            lambda lp, ref: lp.exp() * (lp - ref),
        ),
    ],
)


def package_loss(
    new: Tensor,
    old: Tensor,
    A: Tensor,
    mask: Tensor,
    eps: float = 0.2,
    beta: float = 0.0,
    ref: Tensor | None = None,
    Z: Any = None,
) -> Tensor:
    """The package's loss as chapter 3 writes it: a sum over tokens, divided by Z."""
    return grpo_loss(
        new,
        old,
        A,
        mask,
        ref_log_probs=ref,
        beta=beta,
        eps_low=eps,
        eps_high=eps,
        total_tokens=mask.sum() if Z is None else Z,
    )


def with_gradient(loss: Function) -> Function:
    """The loss and its gradient by the new log-probabilities; None stays None."""

    def both(new: Tensor, *rest: Any) -> Any:
        live = new.clone().requires_grad_()
        value = loss(live, *rest)
        if not isinstance(value, Tensor):
            return value
        if not value.requires_grad:
            raise ValueError("its result has no gradient; use torch operations on `new` throughout")
        if value.ndim:
            raise ValueError(f"its result has shape {tuple(value.shape)}; a loss is one number")
        return value.detach(), torch.autograd.grad(value, live)[0]

    both.__name__ = getattr(loss, "__name__", "your function")
    return both


def _batch() -> Sequence[tuple[Any, ...]]:
    noise = torch.Generator().manual_seed(0)
    new = -torch.rand(4, 5, generator=noise)
    old, ref = (new + 0.3 * torch.randn(4, 5, generator=noise) for _ in range(2))
    mask = (torch.arange(5) < torch.tensor([[1], [5], [2], [3]])).float()
    A = torch.tensor([1.5, -0.5, -0.5, -0.5])
    return [
        (new, old, A, mask, 0.2, 0.0, None, None),
        (new, old, A, mask, 0.1, 0.0, None, 20.0),
        (new, old, A, mask, 0.2, 0.1, ref, None),
    ]


def _like(change: Function) -> Function:
    """The package's loss with a mistake, made by changing its arguments or its value."""
    return with_gradient(lambda *case: change(*case))


LOSS = Build(
    with_gradient(package_loss),
    _batch,
    [
        (
            "the sign is wrong: an optimizer goes down, and the objective should go up.",
            _like(lambda *case: -package_loss(*case)),
        ),
        (
            "padding counts; multiply by the mask before you sum.",
            _like(
                lambda new, old, A, mask, eps, beta, ref, Z: package_loss(
                    new,
                    old,
                    A,
                    torch.ones_like(mask),
                    eps,
                    beta,
                    ref,
                    mask.sum() if Z is None else Z,
                )
            ),
        ),
        (
            "it divides by all places, padding included; divide by the number of real tokens.",
            _like(
                lambda new, old, A, mask, eps, beta, ref, Z: package_loss(
                    new, old, A, mask, eps, beta, ref, mask.numel() if Z is None else Z
                )
            ),
        ),
        (
            "it always divides by the number of tokens; use Z if it is given.",
            _like(
                lambda new, old, A, mask, eps, beta, ref, Z: package_loss(
                    new, old, A, mask, eps, beta, ref, None
                )
            ),
        ),
        (
            "the clip is missing, or it does not use eps.",
            _like(
                lambda new, old, A, mask, eps, beta, ref, Z: package_loss(
                    new, old, A, mask, 1e9, beta, ref, Z
                )
            ),
        ),
        (
            "the KL term is missing.",
            _like(
                lambda new, old, A, mask, eps, beta, ref, Z: package_loss(
                    new, old, A, mask, eps, 0.0, None, Z
                )
            ),
        ),
        (
            (
                "the KL term lacks the ratio in front of it; without it the gradient is that of "
                "the other KL divergence."
            ),
            _like(
                lambda new, old, A, mask, eps, beta, ref, Z: grpo_loss(
                    new,
                    old,
                    A,
                    mask,
                    ref_log_probs=ref,
                    beta=beta,
                    correct_kl=False,
                    eps_low=eps,
                    eps_high=eps,
                    total_tokens=Z,
                )
            ),
        ),
        (
            "the KL term is a bonus; it must be subtracted from the objective.",
            _like(
                lambda new, old, A, mask, eps, beta, ref, Z: package_loss(
                    new, old, A, mask, eps, -beta, ref, Z
                )
            ),
        ),
    ],
    ("value", "gradient"),
)


def check_loss(mine: Function) -> bool:
    """Check ``mine(new, old, A, mask, eps, beta, ref, Z)``, its value and its gradient."""
    return LOSS.check(with_gradient(mine))


# --- The training loop --------------------------------------------------------

FEW = Settings(prompts_per_step=4, max_new_tokens=64)
STEPS = 2
APART = 0.02  # of the way that the weights go: rounding may change a token, hardly more


def check_train(mine: Function) -> bool:
    """Check ``mine(policy, problems, rewards, steps, settings, on_step)`` beside the package's.

    Both train the bundled model for two small steps, from the same weights and seed.
    """
    return report(mine, train_fault(mine))


def train_fault(mine: Function) -> str:
    wanted, right = trained(train)
    try:
        history, weights = trained(mine)
    except NotImplementedError:
        return EMPTY
    except Exception as error:  # whatever the reader's code does
        return raised(mine, error)
    if history is None:
        return EMPTY
    if len(weights) != STEPS + 1:
        return f"it called on_step {len(weights) - 1} times in {STEPS} steps; call it once a step."
    if len(history) != STEPS or "reward" not in history[0]:
        return "return a list with the metrics of each step, as grpo.measure(groups) gives them."
    if abs(history[0]["reward"] - wanted[0]["reward"]) > CLOSE:
        return (
            "its first step has another mean reward, so it drew other completions. The seed of "
            "step n is settings.seed * 1_000_003 + n, and problems come from "
            "random.Random(settings.seed)."
        )
    return stray(weights, right)


def trained(loop: Function) -> tuple[Any, list[Tensor]]:
    """What the loop returns, and the weights at the start and after each step."""
    policy = load_policy("bundled")
    problems = make_problems("arithmetic", "basic", "train", 64)

    def flat() -> Tensor:
        return torch.cat([p.detach().flatten().clone() for p in policy.model.parameters()])

    weights = [flat()]
    history = loop(policy, problems, REWARDS, STEPS, FEW, lambda metrics: weights.append(flat()))
    return history, weights


def stray(weights: Sequence[Tensor], right: Sequence[Tensor]) -> str:
    """Where the reader's weights leave those of the package, in words."""
    start, first, last = weights
    if torch.equal(start, last):
        return "the weights have not moved. Is there a backward(), and an optimizer step?"
    along = torch.cosine_similarity(first - start, right[1] - start, dim=0).item()
    if along < 0:
        return "the first step goes the opposite way; is the sign of the loss right?"
    if (first - right[1]).norm() > APART * (right[1] - start).norm():
        return (
            f"the first step goes elsewhere: its cosine with the package's is {along:.2f}. Look at "
            "the advantages (one group each), the mask, and what the loss is divided by."
        )
    if (last - right[2]).norm() > APART * (right[2] - start).norm():
        return (
            "the first step agrees with the package, the second does not. Clear the gradient after "
            "each step, and make the optimizer once, before the loop."
        )
    return ""
