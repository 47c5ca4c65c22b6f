"""Diagonal Fisher information of a policy: four ways to estimate it, one interface.

The policy is pi(o | q), a distribution over whole completions, so its diagonal Fisher is

    F_i = E_q E_{o ~ pi(.|q)} [ (d log pi(o|q) / d theta_i)^2 ].

The score of a completion is the sum of the scores of its tokens. Given its prefix, a
token's score has mean zero, so the cross terms vanish in expectation and

    F_i = E_q E_{o ~ pi} sum_t E_{v ~ pi(.|q, o_<t)} [ (d log pi(v|q, o_<t) / d theta_i)^2 ].

All estimators below use this **one normalisation: summed over the tokens of a completion,
averaged over completions**, so one EWC strength means the same for each of them.

Terms as in van de Ven 2025, "On the computation of the Fisher information in continual
learning" (arXiv 2502.11756); Kirkpatrick et al. 2017 (arXiv 1612.00796) use F in EWC.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cpugrpo_edu.data import Group
from cpugrpo_edu.policy import completion_logits, gather_log_probs

Variant = Literal["exact", "sample", "rollout_score", "empirical"]

EXACT_LIMIT = 20_000
"""Maximum number of backward passes (vocabulary x completion tokens) for "exact"."""


@dataclass(frozen=True)
class Example:
    """One prompt with one completion."""

    prompt_ids: list[int]
    completion_ids: list[int]


def examples_from_groups(groups: Sequence[Group]) -> list[Example]:
    """The rollouts of a GRPO step as examples; the Fisher does not depend on rewards."""
    return [Example(g.prompt_ids, e.completion_ids) for g in groups for e in g.episodes]


def trainable_parameters(model: Any) -> dict[str, Tensor]:
    """The parameters with ``requires_grad``, by name; with LoRA, only those of the adapter."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "the model has 0 trainable parameters; at least 1 is needed: "
            "set requires_grad on the parameters that you train"
        )
    return parameters


Scores = Callable[[Any, "Sequence[Row]", float], dict[str, Tensor]]


def fisher_diagonal(
    model: Any,
    examples: Sequence[Example],
    variant: Variant = "rollout_score",
    *,
    temperature: float = 1.0,
    n_examples: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    scores: Scores | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Estimate the diagonal Fisher of a causal LM over its trainable parameters.

    Returns an fp32 tensor of the parameter's shape for each parameter name. The variants use a
    completion o in different ways:

    - "exact": all V labels at each position, weighted by their probability. It has no label
      noise but takes V x tokens backward passes, so use it only for tiny vocabularies.
    - "sample": one label drawn from the model at each position; the score of these labels,
      squared. Its expectation is "exact"; it takes one backward pass per sequence.
    - "rollout_score": the score of o itself, squared. If o is a **rollout of this model at
      this temperature** (no top-k or top-p), its tokens are the sampled labels: unbiased, without
      extra sampling. The natural choice after GRPO.
    - "empirical": the same formula with **given** completions, such as reference solutions.
      It measures the fit to that data and vanishes where the data is fitted perfectly, no matter
      how certain the policy is elsewhere.

    ``engine.fisher`` has two more variants, for comparison, and limits memory. ``n_examples``
    takes a random subset chosen by ``seed``, which also determines the sampled labels.
    ``batch_size`` sequences are differentiated at a time; this changes speed and memory, not the
    result. ``scores`` replaces ``per_sequence_scores``. The model runs in eval mode (no dropout),
    then its mode is restored; ``.grad`` does not change. Raises ``ValueError`` if the variant is
    unknown, if there are no examples or empty ones, or if "exact" needs too many backward passes.
    """
    if variant not in get_args(Variant):
        raise ValueError(f"variant is {variant!r}; allowed are {get_args(Variant)}: choose one")
    examples = choose_examples(examples, n_examples, seed)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if variant == "exact":
        _check_exact_is_affordable(model, examples)
    parameters = trainable_parameters(model)
    generator = torch.Generator().manual_seed(seed)
    fisher = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
    was_training = model.training
    model.eval()
    try:
        rows = [r for e in examples for r in rows_of(model, e, variant, temperature, generator)]
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            weights = torch.tensor([row.weight for row in batch])
            found = (scores or per_sequence_scores)(model, batch, temperature)
            for name, score in found.items():
                fisher[name] += torch.tensordot(weights, score.float().square(), dims=1)
            del found
            after_batch()
    finally:
        model.train(was_training)
    return {name: total.div_(len(examples)) for name, total in fisher.items()}


def choose_examples(
    examples: Sequence[Example], n_examples: int | None, seed: int
) -> list[Example]:
    """``n_examples`` random examples, or all. Raises ``ValueError`` if one has no tokens."""
    if not examples or not all(e.prompt_ids and e.completion_ids for e in examples):
        raise ValueError(
            f"there are {len(examples)} examples, or one is empty; give at least one example, with "
            "at least 1 token in each prompt and completion: drop the empty ones"
        )
    if n_examples is not None and n_examples < 1:
        raise ValueError(f"n_examples is {n_examples}; give at least 1, or None for all")
    if n_examples is not None and n_examples < len(examples):
        return random.Random(seed).sample(list(examples), n_examples)
    return list(examples)


def _check_exact_is_affordable(model: Any, examples: Sequence[Example]) -> None:
    passes = model.config.vocab_size * sum(len(e.completion_ids) for e in examples)
    if passes > EXACT_LIMIT:
        raise ValueError(
            f"'exact' needs {passes} backward passes (vocabulary x completion tokens); allowed are "
            f"{EXACT_LIMIT}: lower n_examples, or use 'sample', which has the same expectation"
        )


# --- Rows: the scores to compute and their weights in the sum ------------------


@dataclass(frozen=True)
class Row:
    """Position -k of ``input_ids`` predicts ``labels[-k]``; ``weight`` multiplies the square."""

    input_ids: list[int]
    labels: list[int]
    weight: float = 1.0


def rows_of(
    model: Any, example: Example, variant: Variant, temperature: float, generator: torch.Generator
) -> Iterator[Row]:
    prompt, completion = list(example.prompt_ids), list(example.completion_ids)
    input_ids = prompt + completion[:-1]  # the last token predicts nothing
    if variant in ("empirical", "rollout_score"):
        yield Row(input_ids, completion)
        return
    probabilities = _label_probabilities(model, prompt, completion, temperature)
    if variant == "sample":
        # The labels are independent and their scores have mean zero, so the squared sum of scores
        # has the same expectation as the sum of squares: one backward pass for all positions.
        labels = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        yield Row(input_ids, labels.tolist())
    else:  # exact
        for t, p in enumerate(probabilities.tolist()):
            for label, weight in enumerate(p):
                yield Row(prompt + completion[:t], [label], weight)


@torch.no_grad()
def _label_probabilities(
    model: Any, prompt: list[int], completion: list[int], temperature: float
) -> Tensor:
    """pi(. | q, o_<t) at every completion position, (C, V)."""
    mask = torch.ones(1, len(prompt) + len(completion), dtype=torch.long)
    prompt_ids, completion_ids = torch.tensor([prompt]), torch.tensor([completion])
    logits = completion_logits(model, prompt_ids, completion_ids, mask, temperature)
    return logits[0].softmax(dim=-1)


def per_sequence_scores(
    model: Any, rows: Sequence[Row], temperature: float = 1.0
) -> dict[str, Tensor]:
    """Gradients of each row's log-probability, by parameter name, of shape (B, parameter shape).

    ``backward()`` gives only the sum over the batch, and the square of a sum is not the sum
    of the squares. Here ``vmap`` carries the batch dimension through ``grad``. Memory is
    B x trainable parameters. A single row needs no ``vmap``, so it can use fused attention, which
    takes a fraction of the memory.
    """
    parameters = {n: p.detach() for n, p in trainable_parameters(model).items()}
    length = max(len(row.input_ids) for row in rows)
    scored = max(length - len(row.input_ids) + len(row.labels) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.zeros(len(rows), scored, dtype=torch.long)
    mask = torch.zeros(len(rows), scored)
    for i, row in enumerate(rows):
        # Padding on the right needs no attention mask: attention is causal.
        end = scored - (length - len(row.input_ids))
        input_ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[i, end - len(row.labels) : end] = torch.tensor(row.labels)
        mask[i, end - len(row.labels) : end] = 1.0

    def log_prob(parameters: Any, input_ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        inputs = {"input_ids": input_ids[None], "logits_to_keep": scored, "use_cache": False}
        logits = functional_call(model, parameters, args=(), kwargs=inputs).logits[0]
        return (gather_log_probs(logits.float() / temperature, labels) * mask).sum()

    if len(rows) == 1:
        return {
            n: g[None]
            for n, g in grad(log_prob)(parameters, input_ids[0], labels[0], mask[0]).items()
        }
    # The fused CPU attention kernel has no batching rule for vmap; the plain one does.
    with sdpa_kernel(SDPBackend.MATH):
        return vmap(grad(log_prob), in_dims=(None, 0, 0, 0))(parameters, input_ids, labels, mask)
