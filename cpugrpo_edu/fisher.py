"""Diagonal Fisher information of a policy: four ways to estimate it, one interface.

The policy is pi(o | q), a distribution over whole completions, so its diagonal Fisher is

    F_i = E_q E_{o ~ pi(.|q)} [ (d log pi(o|q) / d theta_i)^2 ].

The score of a completion is the sum of the scores of its tokens. Given its prefix a
token's score has mean zero, so in expectation the cross terms vanish and

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
"""Most backward passes that EXACT may take (vocabulary x completion tokens)."""


@dataclass(frozen=True)
class Example:
    """One prompt with one completion."""

    prompt_ids: list[int]
    completion_ids: list[int]


def examples_from_groups(groups: Sequence[Group]) -> list[Example]:
    """The rollouts of a GRPO step as examples; rewards play no part in the Fisher."""
    return [Example(g.prompt_ids, e.completion_ids) for g in groups for e in g.episodes]


def trainable_parameters(model: Any) -> dict[str, Tensor]:
    """Name to parameter, of those with ``requires_grad``; with LoRA, the adapter only."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "the model has 0 trainable parameters; at least 1 is needed: "
            "set requires_grad on what you train"
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

    Returns name to fp32 tensor of the parameter's shape. What the variants do with a
    completion o, and what they need:

    - "exact": at each position all V labels, weighted by their probability. No label
      noise; V x tokens backward passes, so for tiny vocabularies only.
    - "sample": at each position a label drawn from the model; the score of these labels,
      squared. Unbiased for "exact", one backward pass a sequence.
    - "rollout_score": the score of o itself, squared. If o is a **rollout of this model at
      this temperature** (no top-k or top-p), o is its own sampled label: unbiased, and free
      of extra sampling. The natural choice after GRPO.
    - "empirical": the same formula with **given** completions, such as reference solutions.
      It measures fit to that data and vanishes where the data is fitted perfectly, however
      sure the policy's other behaviour is.

    ``engine.fisher`` has two more, for comparison, and limits memory. ``n_examples`` takes a
    random subset, chosen by ``seed``, which also drives the sampled labels. ``batch_size``
    sequences are differentiated at a time; that changes speed and memory, not the result.
    ``scores`` replaces ``per_sequence_scores``. The model runs in eval mode (no dropout) and gets
    its mode back; ``.grad`` is not touched. Raises ``ValueError`` on an unknown variant, empty
    examples or completions, or an "exact" that is too large.
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
    """A random ``n_examples`` of the examples, or all; ``ValueError`` if one has no tokens."""
    if not examples or not all(e.prompt_ids and e.completion_ids for e in examples):
        raise ValueError(
            f"one of the {len(examples)} examples has no tokens, or there are none; each prompt "
            "and completion needs at least 1 token: drop the empty ones"
        )
    if n_examples is not None and n_examples < 1:
        raise ValueError(f"n_examples is {n_examples}; it must be at least 1, or leave it out")
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


# --- One row: a score to compute, and its weight in the sum --------------------


@dataclass(frozen=True)
class Row:
    """``labels[-k]`` is predicted at position -k of ``input_ids``; ``weight`` is of its square."""

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
        # Independent labels with zero-mean scores: the square of the summed score has the
        # expectation of the sum of the squares, so one backward pass serves all positions.
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
    """Gradient of the log-probability of each row's labels: name to (B, parameter shape).

    ``backward()`` only gives the sum over the batch, and the square of a sum is not the sum
    of the squares. Here ``vmap`` carries the batch dimension through ``grad``. Memory is
    B x trainable parameters. A single row needs no ``vmap``, so it has the fused attention, in a
    fraction of the memory.
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
    # The fused CPU attention kernel has no batching rule; the plain one does.
    with sdpa_kernel(SDPBackend.MATH):
        return vmap(grad(log_prob), in_dims=(None, 0, 0, 0))(parameters, input_ids, labels, mask)
