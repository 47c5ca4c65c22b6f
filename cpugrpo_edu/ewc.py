"""Elastic weight consolidation: learn the next stage without forgetting the last.

After a stage we keep an *anchor*: the parameters theta* and the diagonal Fisher F there.
While the next stage trains, each parameter is tied to its anchor by a spring whose
stiffness is its Fisher (Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3):

    penalty = lambda / 2 * sum_i F_i (theta_i - theta*_i)^2

F is the curvature of KL(pi_theta* || pi_theta) at theta*, so the penalty is lambda times a
second-order estimate of how far the policy has moved from the old one, in nats per completion.

**Several stages: one running anchor** (``merge_anchors``), as in online EWC (Schwarz et al.
2018, arXiv 1805.06370, section 3.3): Fisher values are added, and theta* is the latest. It needs
constant memory, and with decay 1 it is the recursive Laplace approximation (Huszar 2018,
arXiv 1712.03847): the latest theta* was already found under the earlier springs, so a
second anchor there would count the earlier tasks twice. For Kirkpatrick's original
with one spring per task, add the penalties of a list of anchors.

Limitations: Adam rescales the gradient of the springs together with that of the loss, so tune
lambda by experiment. With plain gradient descent, the springs are stable only while
learning rate * lambda * max(F) < 2. With LoRA, the springs act on the factors A and B, so the
penalty is not quadratic in their product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Anchor:
    """theta* and its Fisher by parameter name, with equal keys and shapes; the Fisher is fp32."""

    params: dict[str, Tensor]
    fisher: dict[str, Tensor]


def take_anchor(model: Any, fisher: dict[str, Tensor]) -> Anchor:
    """Copy the current values of the parameters that ``fisher`` covers.

    Raises ``ValueError`` if a name or shape does not match the model, or if a Fisher value is
    negative or not finite: a spring with negative stiffness would push the parameter away.
    """
    for name, f in fisher.items():
        if not (f.isfinite().all() and (f >= 0).all()):
            raise ValueError(
                f"the Fisher of {name} has negative or non-finite entries; all must be at least 0: "
                "compute it again with fisher_diagonal"
            )
    return Anchor(
        params={n: p.detach().clone() for n, p, _ in _anchored(model, fisher)},
        fisher={n: f.detach().float() for n, f in fisher.items()},
    )


def merge_anchors(previous: Anchor | None, latest: Anchor, decay: float = 1.0) -> Anchor:
    """The running anchor after a stage: F = decay * F_previous + F_latest, and the latest theta*.

    ``decay`` is Schwarz et al.'s gamma in [0, 1]: below 1, springs of old stages weaken gradually
    instead of getting ever stiffer. ``previous`` is None after the first stage.
    """
    if not 0 <= decay <= 1:
        raise ValueError(
            f"decay is {decay}; it must lie in [0, 1]: 1 keeps every earlier stage at full weight"
        )
    if previous is None:
        return latest
    if previous.fisher.keys() != latest.fisher.keys():
        raise ValueError(
            f"the anchors cover {len(previous.fisher)} and {len(latest.fisher)} parameters with "
            "different names; they must be the same: train the same parameters in every stage"
        )
    fisher = {n: decay * previous.fisher[n] + f for n, f in latest.fisher.items()}
    return Anchor(params=latest.params, fisher=fisher)


def normalize_fisher(fisher: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scale the Fisher of all parameters by one factor so that its overall mean is 1.

    Ratios between parameters do not change. Lambda loses its meaning in nats, but the same value
    suits estimates of different scale. Raises ``ValueError`` if the Fisher is zero everywhere.
    """
    scale = sum(f.sum().item() for f in fisher.values()) / sum(f.numel() for f in fisher.values())
    if scale <= 0:
        raise ValueError(
            "the Fisher is 0 everywhere and cannot be scaled; at least one entry must be positive: "
            "compute it on completions that the policy is not certain of"
        )
    return {n: f / scale for n, f in fisher.items()}


def ewc_penalty(model: Any, anchor: Anchor, strength: float) -> Tensor:
    """strength / 2 * sum F (theta - theta*)^2: an fp32 scalar with gradient, to add to a loss.

    This is the readable form; the trainer uses ``add_ewc_gradient``, which has the same gradient.
    """
    _check_strength(strength)
    energies = [
        (f * (p.float() - anchor.params[name].float()).square()).sum()
        for name, p, f in _anchored(model, anchor.fisher)
    ]
    return strength / 2 * torch.stack(energies).sum()


@torch.no_grad()
def add_ewc_gradient(model: Any, anchor: Anchor, strength: float) -> float:
    """Add strength * F (theta - theta*) to each ``.grad``; returns the penalty.

    Call it **once per optimizer step**, after the last backward pass and before gradient
    clipping; a call per micro-batch would multiply lambda by their number. It builds no autograd
    graph and needs extra memory for only a few copies of the largest parameter. It creates
    ``.grad`` where that is None, and skips frozen parameters, which cannot drift.
    """
    _check_strength(strength)
    penalty = 0.0
    for name, p, f in _anchored(model, anchor.fisher):
        drift = p.float() - anchor.params[name].float()
        force = f * drift
        penalty += strength / 2 * (force * drift).sum().item()
        if not p.requires_grad or strength == 0:
            continue
        if p.grad is None:
            p.grad = force.mul_(strength).to(p.dtype)
        else:
            p.grad.add_(force, alpha=strength)
    return penalty


def _anchored(model: Any, fisher: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, parameter, Fisher) for every parameter that the Fisher covers."""
    parameters = dict(model.named_parameters())
    if not fisher:
        raise ValueError(
            "the anchor covers 0 parameters; at least 1 is needed: "
            "compute the Fisher on a model with trainable parameters"
        )
    for name, f in fisher.items():
        if name not in parameters or parameters[name].shape != f.shape:
            found = tuple(parameters[name].shape) if name in parameters else "absent"
            raise ValueError(
                f"the anchor's parameter {name} has shape {tuple(f.shape)} but the model's is "
                f"{found}; they must be the same: use the model that the anchor was taken from"
            )
        yield name, parameters[name], f


def _check_strength(strength: float) -> None:
    if not 0 <= strength < float("inf"):
        raise ValueError(
            f"strength is {strength}; it must be at least 0 and finite: use 0 to turn EWC off"
        )
