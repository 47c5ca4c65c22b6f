"""Fisher estimates that fit into memory, on INT8 bases too, and three that are no Fisher.

``estimate_fisher`` adds to the root's ``fisher_diagonal`` what a run needs. The variants "batched"
and "lightning" are kept to be compared with the truth, not to be used; "uniform" is the control.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from cpugrpo_edu import fisher
from cpugrpo_edu.engine.architectures import supports
from cpugrpo_edu.engine.int8_base import is_frozen
from cpugrpo_edu.engine.memory import drop_input_grad_hooks, free_memory, trim_heap
from cpugrpo_edu.engine.options import FISHER_VARIANTS
from cpugrpo_edu.engine.options import FisherVariant as Variant
from cpugrpo_edu.engine.shared_prefix import packed_log_probs
from cpugrpo_edu.engine.sizes import Architecture
from cpugrpo_edu.fisher import Example, Row, per_sequence_scores, trainable_parameters
from cpugrpo_edu.policy import gather_log_probs

GRADIENT_MEMORY = 256 * 2**20
"""Bytes that the per-sequence gradients of one batch may take."""


def estimate_fisher(
    model: Any,
    examples: Sequence[Example],
    variant: Variant = "rollout_score",
    *,
    temperature: float = 1.0,
    n_examples: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    memory_limit: int | None = None,
) -> dict[str, Tensor]:
    """As ``cpugrpo_edu.fisher.fisher_diagonal``, errors included, with these differences.

    - ``batch_size`` is a maximum: fewer sequences go together where memory is short or the
      process would hold more than ``memory_limit`` bytes (except for "batched", whose result
      depends on it).
    - Rows go one by one where ``vmap`` cannot enter: on a frozen INT8 base, and in
      architectures with data-dependent layers.
    - "batched" is the square of the batch-mean gradient of the given completions, a common bug:
      E[(mean g)^2] = (E g)^2 + Var(g) / B, about B times too small, and with given labels biased
      towards the squared mean gradient. (With *sampled* labels E g = 0, and B times it is
      unbiased: the Gauss-Newton-Bartlett estimator of Sophia, arXiv 2305.14342.)
    - "lightning" is ``lightning_fisher``; it looks at no data, ``examples`` may be empty.
    - "uniform" is 1 everywhere: equal springs, as in L2-SP (arXiv 1802.01483).
    """
    if variant not in FISHER_VARIANTS:
        raise ValueError(f"variant is {variant!r}; allowed are {FISHER_VARIANTS}: choose one")
    if variant == "lightning":
        return lightning_fisher(model)
    if variant == "uniform":
        return {
            n: torch.ones_like(p.detach().float()) for n, p in trainable_parameters(model).items()
        }
    drop_input_grad_hooks(model)  # vmap rejects them
    together = not is_frozen(model) and supports(model.config, "vmap") is None
    scores = per_sequence_scores if together else scores_one_by_one
    if variant == "batched":
        chosen = fisher.choose_examples(examples, n_examples, seed)
        return squared_batch_means(model, chosen, temperature, batch_size, scores)
    if examples:
        longest = max(len(e.prompt_ids) + len(e.completion_ids) - 1 for e in examples)
        batch_size = min(batch_size, rows_at_a_time(model, longest, memory_limit))
    return fisher.fisher_diagonal(
        model,
        examples,
        cast(fisher.Variant, variant),
        temperature=temperature,
        n_examples=n_examples,
        batch_size=batch_size,
        seed=seed,
        scores=scores,
        after_batch=trim_heap if memory_limit is not None else lambda: None,
    )


def squared_batch_means(
    model: Any,
    examples: Sequence[Example],
    temperature: float,
    batch_size: int,
    scores: fisher.Scores,
) -> dict[str, Tensor]:
    """Mean over batches of (mean score of the batch) squared: the variant "batched"."""
    rows = [Row(e.prompt_ids + e.completion_ids[:-1], e.completion_ids) for e in examples]
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    parameters = trainable_parameters(model)
    total = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            for name, score in scores(model, batch, temperature).items():
                total[name] += score.float().mean(dim=0).square() / len(batches)
    finally:
        model.train(was_training)
    return total


def rows_at_a_time(model: Any, length: int, memory_limit: int | None = None) -> int:
    """Rows of ``length`` tokens whose gradients are taken together, at least 1.

    A row has gradients of its own for every parameter, in float32. They may take
    ``GRADIENT_MEMORY`` bytes, and with everything else no more than is free (and no more than
    keeps the process below ``memory_limit`` bytes).
    """
    parameters = sum(4 * p.numel() for p in trainable_parameters(model).values())
    a = Architecture.roughly(model.config)
    scores = 3 * a.heads * length**2  # plain attention, which vmap needs, keeps them
    layer = length * a.layer_activations + scores
    activations = 4 * (a.layers * layer + 3 * a.vocab * length)
    # The sums take a copy of the parameters. A row takes two, and its activations with their
    # derivatives and the copies that vmap makes.
    free = int(0.8 * free_memory(memory_limit)) - parameters
    return max(1, min(GRADIENT_MEMORY // parameters, free // (2 * parameters + 6 * activations)))


def scores_one_by_one(
    model: Any, rows: Sequence[Row], temperature: float = 1.0
) -> dict[str, Tensor]:
    """As ``per_sequence_scores``, name to (rows, parameter shape), a backward pass for each row."""
    parameters = trainable_parameters(model)
    found = []
    for row in rows:
        log_probs = (frozen_log_probs if is_frozen(model) else plain_log_probs)(
            model, row, temperature
        )
        found.append(
            torch.autograd.grad(
                log_probs.sum(),
                list(parameters.values()),
                allow_unused=True,
                materialize_grads=True,
            )
        )
    return {name: torch.stack(g) for name, g in zip(parameters, zip(*found), strict=True)}


def frozen_log_probs(model: Any, row: Row, temperature: float) -> Tensor:
    """Log-probs of the row's labels, (1, labels), without the logits of the whole vocabulary."""
    start = len(row.input_ids) - len(row.labels) + 1  # the inputs end before the last label
    prompt, labels = torch.tensor([row.input_ids[:start]]), torch.tensor([row.labels])
    log_probs, _ = packed_log_probs(
        model,
        prompt,
        torch.ones_like(prompt),
        labels,
        torch.ones_like(labels),
        temperature,
        recompute=is_frozen(model),
    )
    return log_probs


def plain_log_probs(model: Any, row: Row, temperature: float) -> Tensor:
    """Log-probs of the row's labels, (labels,)."""
    logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0]
    chosen = logits[-len(row.labels) :].float() / temperature
    return gather_log_probs(chosen, torch.tensor(row.labels))


# --- A heuristic, for comparison ------------------------------------------------

_LIGHTNING_MULTIPLIERS = (  # first match on the lower-case name wins
    (("embed",), 10.0),
    (("lm_head", "output"), 8.0),
    (("attention", "attn"), 5.0),
    (("layer.0", "layer.1"), 3.0),  # "model.layers.0..." does not match: kept as defined
    (("mlp", "feedforward"), 2.0),
    (("norm",), 1.0),
)


@torch.no_grad()
def lightning_fisher(model: Any) -> dict[str, Tensor]:
    """ "Lightning Fisher": ``max(0.1 m Var(theta), 1e-8) + 0.01 |theta_i|``. **Not a Fisher.**

    A heuristic of the RL-GRPO project (``src/training/lightning_fisher.py``), kept to be
    compared with the truth: m depends on the parameter's name and Var (ddof = 1) on its
    tensor. No data, prompt or gradient enters, so two policies that do entirely
    different things with equal-sized weights get the same answer, and so do all tasks.
    It has no units of its own; lambda does not transfer to it.
    """
    fisher = {}
    for name, parameter in trainable_parameters(model).items():
        theta = parameter.float()
        matches = (m for keys, m in _LIGHTNING_MULTIPLIERS if any(k in name.lower() for k in keys))
        variance = theta.var(correction=1).item() if theta.numel() > 1 else 0.0
        fisher[name] = max(0.1 * next(matches, 1.5) * variance, 1e-8) + 0.01 * theta.abs()
    return fisher
