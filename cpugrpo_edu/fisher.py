"""Diagonal Fisher information of a policy: six ways to estimate it, one interface.

The policy is pi(o | q), a distribution over whole completions, so its diagonal Fisher is

    F_i = E_q E_{o ~ pi(.|q)} [ (d log pi(o|q) / d theta_i)^2 ].

The score of a completion is the sum of the scores of its tokens. Given its prefix a
token's score has mean zero, so in expectation the cross terms vanish and

    F_i = E_q E_{o ~ pi} sum_t E_{v ~ pi(.|q, o_<t)} [ (d log pi(v|q, o_<t) / d theta_i)^2 ].

All estimators below use this **one normalisation: summed over the tokens of a
completion, averaged over completions** (natural logarithm). One strength lambda
therefore means the same for each of them, except LIGHTNING, which is not a Fisher.

Terms as in van de Ven 2025, "On the computation of the Fisher information in continual
learning" (arXiv 2502.11756); Kirkpatrick et al. 2017 (arXiv 1612.00796) use F in EWC.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cpugrpo_edu.data import Group
from cpugrpo_edu.engine.int8_base import is_frozen, spares_memory
from cpugrpo_edu.engine.memory import drop_input_grad_hooks, free_memory, trim_heap
from cpugrpo_edu.engine.shared_prefix import packed_log_probs
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.policy import completion_logits, gather_log_probs

Variant = Literal["exact", "sample", "empirical", "batched", "rollout_score", "lightning"]

EXACT_LIMIT = 20_000
"""Most backward passes that EXACT may take (vocabulary x completion tokens)."""

GRADIENT_MEMORY = 256 * 2**20
"""Bytes that the per-sequence gradients of one batch may take."""


@dataclass(frozen=True)
class Example:
    """One prompt with one completion."""

    prompt_ids: list[int]
    completion_ids: list[int]


def examples_from_groups(groups: Sequence[Group]) -> list[Example]:
    """The rollouts of a GRPO step as examples; rewards play no part in the Fisher."""
    return [
        Example(group.prompt_ids, episode.completion_ids)
        for group in groups
        for episode in group.episodes
    ]


def trainable_parameters(model: Any) -> dict[str, Tensor]:
    """Name to parameter, of those with ``requires_grad``; with LoRA, the adapter only."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UserError(
            "the model has 0 trainable parameters; at least 1 is needed: "
            "set requires_grad on what you train"
        )
    return parameters


def fisher_diagonal(
    model: Any,
    examples: Sequence[Example],
    variant: Variant = "rollout_score",
    *,
    temperature: float = 1.0,
    n_examples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    memory_limit: int | None = None,
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
    - "batched": square of the batch-mean gradient of the given completions. A common bug,
      here to be looked at: E[(mean g)^2] = (E g)^2 + Var(g) / B, about B times too small,
      and with given labels biased towards the squared mean gradient. (With *sampled* labels
      E g = 0, and B times it is unbiased: the Gauss-Newton-Bartlett estimator of Sophia,
      arXiv 2305.14342.)
    - "lightning": see ``lightning_fisher``; looks at no data, ``examples`` may be empty.

    ``n_examples`` takes a random subset, chosen by ``seed``, which also drives the sampled
    labels. ``batch_size`` sequences (default 8) are differentiated at a time. For "batched"
    that changes the result; otherwise only speed and memory, and they are fewer where
    memory is short or the process would hold more than ``memory_limit`` bytes. The model
    runs in eval mode (no dropout) and gets its mode back; ``.grad`` is not touched. Raises
    ``UserError`` on an unknown variant, empty examples or completions, or an "exact" that is
    too large.
    """
    if variant not in get_args(Variant):
        raise UserError(f"variant is {variant!r}; allowed are {get_args(Variant)}: choose one")
    if variant == "lightning":
        return lightning_fisher(model)
    if not examples or not all(e.prompt_ids and e.completion_ids for e in examples):
        raise UserError(
            f"one of the {len(examples)} examples has no tokens, or there are none; each prompt "
            "and completion needs at least 1 token: drop the empty ones"
        )
    for name, value in {"n_examples": n_examples, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1: leave it out or raise it")
    if n_examples is not None and n_examples < len(examples):
        examples = random.Random(seed).sample(list(examples), n_examples)
    if variant == "exact":
        _check_exact_is_affordable(model, examples)

    parameters = trainable_parameters(model)
    generator = torch.Generator().manual_seed(seed)
    fisher = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}

    was_training = model.training
    model.eval()
    drop_input_grad_hooks(model)  # vmap rejects them
    try:
        rows = [r for e in examples for r in _rows(model, e, variant, temperature, generator)]
        size = batch_size or 8
        if variant != "batched":
            size = min(size, rows_at_a_time(model, rows, memory_limit))
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        for batch in batches:
            scores = per_sequence_scores(model, batch, temperature)
            weights = torch.tensor([row.weight for row in batch])
            for name, score in scores.items():
                if variant == "batched":
                    fisher[name] += score.float().mean(dim=0).square()
                else:
                    fisher[name] += torch.tensordot(weights, score.float().square(), dims=1)
            if memory_limit is not None:
                del scores
                trim_heap()
    finally:
        model.train(was_training)

    count = len(batches) if variant == "batched" else len(examples)
    return {name: total.div_(count) for name, total in fisher.items()}


def rows_at_a_time(model: Any, rows: Sequence[Row], memory_limit: int | None = None) -> int:
    """Rows whose gradients are taken together: each has its own copy of the parameters."""
    parameters = sum(4 * p.numel() for p in trainable_parameters(model).values())
    length, config = max(len(row.input_ids) for row in rows), model.config
    layer = length * (10 * config.hidden_size + 4 * config.intermediate_size)
    scores = 3 * config.num_attention_heads * length**2  # the plain attention keeps them
    activations = 4 * (config.num_hidden_layers * (layer + scores) + 3 * config.vocab_size * length)
    # the sums take a copy of the parameters, and each row two, and its activations with their
    # derivatives and the copies that vmap makes
    free = int(0.8 * free_memory(memory_limit)) - parameters
    return max(1, min(GRADIENT_MEMORY // parameters, free // (2 * parameters + 6 * activations)))


def _check_exact_is_affordable(model: Any, examples: Sequence[Example]) -> None:
    passes = model.config.vocab_size * sum(len(e.completion_ids) for e in examples)
    if passes > EXACT_LIMIT:
        raise UserError(
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


def _rows(
    model: Any, example: Example, variant: Variant, temperature: float, generator: torch.Generator
) -> Iterator[Row]:
    prompt, completion = list(example.prompt_ids), list(example.completion_ids)
    input_ids = prompt + completion[:-1]  # the last token predicts nothing
    if variant in ("empirical", "batched", "rollout_score"):
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
    B x trainable parameters. A frozen INT8 base, which ``vmap`` cannot enter, goes row by row.
    A single row needs no ``vmap``, so it has the fused attention, in a fraction of the memory.
    """
    if is_frozen(model):
        one_by_one = [frozen_scores(model, row, temperature) for row in rows]
        return {name: torch.stack([s[name] for s in one_by_one]) for name in one_by_one[0]}
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


def frozen_scores(model: Any, row: Row, temperature: float) -> dict[str, Tensor]:
    """Gradient of the log-probability of one row's labels on a frozen INT8 base."""
    parameters = trainable_parameters(model)
    start = len(row.input_ids) - len(row.labels) + 1  # the inputs end before the last label
    prompt, labels = torch.tensor([row.input_ids[:start]]), torch.tensor([row.labels])
    log_probs, _ = packed_log_probs(
        model,
        prompt,
        torch.ones_like(prompt),
        labels,
        torch.ones_like(labels),
        temperature,
        recompute=spares_memory(model),
    )
    gradients = torch.autograd.grad(log_probs.sum(), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


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
    It has no units of its own; lambda does not transfer to it. See ``compare_fishers``.
    """
    fisher = {}
    for name, parameter in trainable_parameters(model).items():
        theta = parameter.float()
        matches = (m for keys, m in _LIGHTNING_MULTIPLIERS if any(k in name.lower() for k in keys))
        variance = theta.var(correction=1).item() if theta.numel() > 1 else 0.0
        fisher[name] = max(0.1 * next(matches, 1.5) * variance, 1e-8) + 0.01 * theta.abs()
    return fisher


# --- How alike are two Fishers? -------------------------------------------------


def parameter_kind(name: str) -> str:
    """ "embedding", "head", "norm", "attention", "mlp" or "other", from a parameter's name."""
    kinds = {
        "embedding": ("embed", "wte", "wpe"),
        "head": ("lm_head",),
        "norm": ("norm", "ln_"),
        "attention": ("attn", "attention"),
        "mlp": ("mlp",),
    }
    return next((kind for kind, keys in kinds.items() if any(k in name for k in keys)), "other")


def compare_fishers(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Compare two Fishers of the same parameters, in all and by kind of parameter.

    Each entry ("all", "attention", ...) holds: ``pearson_log`` and ``spearman``, the
    correlations of log values over entries that are positive in both (NaN if one is
    constant); ``cosine`` of the raw vectors; ``scale_ratio`` = mean(a) / mean(b);
    ``share_positive`` of the entries; ``entries``, their number. EWC depends on all of
    them: ranks decide *which* parameters are held, the scale decides *how hard*.
    """
    if a.keys() != b.keys() or any(a[n].shape != b[n].shape for n in a) or not a:
        raise UserError(
            f"the two Fishers cover {len(a)} and {len(b)} parameters with different names or "
            "shapes, or none; they must be the same: compute both on the same model"
        )
    names: dict[str, list[str]] = {"all": list(a)}
    for name in a:
        names.setdefault(parameter_kind(name), []).append(name)
    return {
        kind: _compare(*(torch.cat([f[n].flatten().double() for n in ns]) for f in (a, b)))
        for kind, ns in names.items()
    }


def _compare(x: Tensor, y: Tensor) -> dict[str, float]:
    from scipy.stats import rankdata  # here, so that training does not import scipy

    positive = (x > 0) & (y > 0)
    log_x, log_y = x[positive].log(), y[positive].log()
    ranks = [torch.from_numpy(rankdata(v.numpy())) for v in (log_x, log_y)]
    return {
        "pearson_log": _pearson(log_x, log_y),
        "spearman": _pearson(*ranks),
        "cosine": (x @ y / (x.norm() * y.norm())).item(),
        "scale_ratio": (x.mean() / y.mean()).item(),
        "share_positive": positive.double().mean().item(),
        "entries": float(len(x)),
    }


def _pearson(x: Tensor, y: Tensor) -> float:
    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():
        return float("nan")
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()
