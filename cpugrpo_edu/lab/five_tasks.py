"""Tiny policies that learn five tasks one after the other, many of them at once.

A prompt is a mark, which names the task, and three symbols; the answer is one token. Each task has
symbols of its own, so one network must hold all tasks and nothing in a prompt of one task
appears in those of another. A policy has one layer and is trained by GRPO. With so small a policy
the processor mostly waits for Python, so all of them are stacked into one tensor a parameter, and
``vmap`` computes them together. Losses are added, and Adam works element by element, so no policy
feels the others.

Policies with the same seed start from the same weights and draw with the same random numbers,
whatever protects them: they differ only in their arm.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2Config, Qwen2ForCausalLM

from cpugrpo_edu.engine.fisher import estimate_fisher
from cpugrpo_edu.engine.options import FISHER_VARIANTS
from cpugrpo_edu.ewc import normalize_fisher
from cpugrpo_edu.fisher import Example
from cpugrpo_edu.policy import group_advantages, grpo_loss

SYMBOLS = 8
"""Symbols of each task."""
RULES: dict[str, Callable[[Sequence[int]], int]] = {
    "largest": max,
    "smallest": min,
    "first": lambda x: x[0],
    "last": lambda x: x[2],
    "middle": lambda x: x[1],
}
TASKS = tuple(RULES)
VOCABULARY = len(TASKS) * (SYMBOLS + 1)
UNIFORM = "uniform"
"""Equal springs for all weights: a plain L2 penalty towards the anchor."""
EQUAL = {
    UNIFORM: None,
    "uniform, attention tenfold": "self_attn",
    "uniform, MLP tenfold": "mlp",
}
"""Springs without a Fisher. The same network can store some weights ten times as large, divide them
by ten where it uses them and train them with ten times the learning rate: it learns the same, but
springs that are equal in these units hold those weights 100 times as tightly. A Fisher follows the
units (chapter 13)."""

Members = dict[str, Tensor]
"""Parameters of many policies by name, each of shape (members, parameter shape)."""


@dataclass(frozen=True)
class Plan:
    """How every policy is trained, and what its Fisher is estimated from."""

    steps: int = 150
    """Of each task."""
    prompts: int = 16
    """Of each step."""
    group: int = 16
    """Answers to each prompt."""
    rate: float = 6e-3
    fisher_prompts: int = 24


@dataclass(frozen=True)
class Arm:
    """What protects the tasks learned before."""

    name: str
    practice: Literal["current", "replay", "joint"] = "current"
    """"replay" asks a quarter of the prompts from earlier tasks; "joint" asks from all five tasks
    in every step."""
    fisher: str | None = None
    """A Fisher variant, or one of ``EQUAL``; None for no springs."""
    strength: float = 0.0
    """Lambda, for springs whose mean stiffness is 1 after each task."""

    def __post_init__(self) -> None:
        allowed = dict.fromkeys((*EQUAL, *FISHER_VARIANTS))
        if self.fisher is not None and self.fisher not in allowed:
            raise ValueError(
                f"the Fisher of the arm {self.name} is {self.fisher!r}; allowed are None, "
                f"{', '.join(allowed)}: choose one"
            )


# --- the tasks and the policies --------------------------------------------------------------


def problems(part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Half of all triples: prompts (tasks, n, 4) and answers (tasks, n)."""
    triples = list(itertools.product(range(SYMBOLS), repeat=3))
    random.Random(0).shuffle(triples)
    half = len(triples) // 2
    chosen = triples[:half] if part == "train" else triples[half:]
    first_mark = len(TASKS) * SYMBOLS
    prompts = [
        [[first_mark + t, *(t * SYMBOLS + s for s in x)] for x in chosen] for t in range(len(TASKS))
    ]
    answers = [[t * SYMBOLS + rule(x) for x in chosen] for t, rule in enumerate(RULES.values())]
    return torch.tensor(prompts), torch.tensor(answers)


def small_policy(seed: int) -> Any:
    """A Qwen2 with one layer and some ten thousand weights, from random weights."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.15,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


def answer_logits(model: Any, prompts: Tensor) -> Tensor:
    """Logits of the answer to ``prompts`` (n, 4): shape (n, vocabulary)."""
    logits: Tensor = model(input_ids=prompts, logits_to_keep=1, use_cache=False).logits[:, -1]
    return logits


def stack(policies: Sequence[Any]) -> Members:
    """The parameters of several policies, one on top of the other."""
    each = [dict(policy.named_parameters()) for policy in policies]
    return {name: torch.stack([p[name].detach() for p in each]) for name in each[0]}


def stacked_logits(skeleton: Any, members: Members, prompts: Tensor) -> Tensor:
    """Logits of the answers, (members, n, vocabulary).

    ``prompts`` are (members, n, 4), or (n, 4) for the same prompts to all. ``skeleton`` lends its
    architecture, not its weights.
    """

    def one(parameters: Members, ids: Tensor) -> Tensor:
        inputs = {"input_ids": ids, "logits_to_keep": 1, "use_cache": False}
        logits: Tensor = functional_call(skeleton, parameters, (), inputs).logits[:, -1]
        return logits

    # The fused CPU attention kernel has no batching rule for vmap; the plain one does.
    with sdpa_kernel(SDPBackend.MATH):
        return vmap(one, in_dims=(0, 0 if prompts.dim() == 3 else None))(members, prompts)


@torch.no_grad()
def right_answers(skeleton: Any, members: Members) -> Tensor:
    """Whether the likeliest answer is right: (members, tasks, held-out problems)."""
    prompts, answers = problems("test")
    right = [
        stacked_logits(skeleton, members, asked).argmax(-1) == told
        for asked, told in zip(prompts, answers, strict=True)
    ]
    return torch.stack(right, dim=1)


# --- one step --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step, for each seed; arms of the same seed share them."""

    problem: Tensor
    """Which training problem: (seeds, prompts)."""
    luck: Tensor
    """In [0, 1), for the task of a replayed prompt: (seeds, prompts)."""
    gumbel: Tensor
    """Added to the logits, the largest sum is a sample: (seeds, prompts, group, vocabulary)."""


def draw(streams: Sequence[torch.Generator], plan: Plan, pool: int) -> Draws:
    """Each seed draws from a stream of its own."""
    size = (plan.prompts, plan.group, VOCABULARY)
    found = [
        (
            torch.randint(pool, size[:1], generator=stream),
            torch.rand(size[:1], generator=stream),
            -torch.empty(size).exponential_(generator=stream).log(),
        )
        for stream in streams
    ]
    return Draws(*(torch.stack(each) for each in zip(*found, strict=True)))


def tasks_asked(arm: Arm, stage: int, luck: Tensor) -> Tensor:
    """The task of each prompt of a step, (prompts,)."""
    if arm.practice == "joint":
        return (luck * len(TASKS)).long()
    asked = torch.full(luck.shape, stage)
    if arm.practice == "replay" and stage:
        quarter = len(luck) // 4
        asked[:quarter] = (luck[:quarter] * stage).long()
    return asked


def stacked_loss(logits: Tensor, answers: Tensor, gumbel: Tensor) -> Tensor:
    """The sum of the members' GRPO losses, each on answers that it samples itself.

    ``logits`` (members, prompts, vocabulary), ``answers`` (members, prompts), ``gumbel``
    (members, prompts, group, vocabulary). The reward is 1 for the right answer, else 0.
    """
    sampled = (logits.detach()[:, :, None] + gumbel).argmax(-1)
    rewards = (sampled == answers[..., None]).float().flatten(0, 1)
    log_p = logits.log_softmax(-1).gather(2, sampled).reshape(-1, 1)
    advantages = group_advantages(rewards).flatten()
    mean = grpo_loss(log_p, log_p.detach(), advantages, torch.ones_like(log_p))
    return mean * len(logits)


# --- tasks in a row --------------------------------------------------------------------------


@dataclass
class Springs:
    """A running anchor for each member: stiffness, lambda times Fisher, and the place."""

    stiffness: Members
    place: Members

    @torch.no_grad()
    def pull(self, members: Members) -> None:
        """Add the springs' gradient to the members' gradients."""
        for name, p in members.items():
            assert p.grad is not None
            p.grad.add_(self.stiffness[name] * (p - self.place[name]))


def train_stage(
    skeleton: Any,
    members: Members,
    jobs: Sequence[tuple[Arm, int]],
    stage: int,
    springs: Springs,
    streams: dict[int, torch.Generator],
    plan: Plan,
) -> None:
    """Train all members in place on the task of one stage, or on what their arm practises.

    ``jobs`` names the arm and the seed of each member; ``streams`` has a generator for each seed.
    """
    seeds = list(streams)
    seed_of = torch.tensor([seeds.index(seed) for _, seed in jobs])
    prompts, answers = problems("train")
    optimizer = torch.optim.Adam(members.values(), lr=plan.rate)
    for _ in range(plan.steps):
        drawn = draw(list(streams.values()), plan, prompts.shape[1])
        luck, which = drawn.luck[seed_of], drawn.problem[seed_of]
        asked = torch.stack([tasks_asked(arm, stage, x) for (arm, _), x in zip(jobs, luck)])
        logits = stacked_logits(skeleton, members, prompts[asked, which])
        loss = stacked_loss(logits, answers[asked, which], drawn.gumbel[seed_of])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        springs.pull(members)
        optimizer.step()


def fisher_of(policy: Any, variant: str, stage: int, plan: Plan, seed: int) -> dict[str, Tensor]:
    """The Fisher diagonal of a policy on a task, scaled to a mean of 1.

    All variants see the same prompts; "rollout_score" draws four answers to each, and "empirical"
    and "batched" get the right one.
    """
    if variant in EQUAL:
        tenfold = EQUAL[variant]
        return normalize_fisher(
            {
                name: torch.full_like(p.detach(), 100.0 if tenfold and tenfold in name else 1.0)
                for name, p in policy.named_parameters()
            }
        )
    prompts, answers = (x[stage, : plan.fisher_prompts] for x in problems("train"))
    told = answers[:, None]
    if variant == "rollout_score":
        with torch.no_grad():
            chances = answer_logits(policy, prompts).softmax(-1)
        generator = torch.Generator().manual_seed(seed)
        told = torch.multinomial(chances, 4, replacement=True, generator=generator)
    examples = [
        Example(prompt, [answer])
        for prompt, row in zip(prompts.tolist(), told.tolist(), strict=True)
        for answer in row
    ]
    size = 8 if variant == "batched" else 256  # only the result of "batched" depends on it
    found = estimate_fisher(policy, examples, variant, batch_size=size, seed=seed)  # type: ignore[arg-type]
    return normalize_fisher(found)


@torch.no_grad()
def tighten(
    skeleton: Any,
    members: Members,
    jobs: Sequence[tuple[Arm, int]],
    stage: int,
    springs: Springs,
    plan: Plan,
) -> None:
    """After a stage: move every anchor to the weights as they are, and add the new Fisher."""
    for name, p in members.items():
        springs.place[name] = p.detach().clone()
    for i, (arm, seed) in enumerate(jobs):
        if arm.fisher is None:
            continue
        for name, p in skeleton.named_parameters():
            p.copy_(members[name][i])
        with torch.enable_grad():
            fisher = fisher_of(skeleton, arm.fisher, stage, plan, 100 * seed + stage)
        for name, f in fisher.items():
            springs.stiffness[name][i] += arm.strength * f


def learn_in_a_row(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    plan: Plan | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Tensor:
    """Train a policy for every arm and seed on all tasks in a row.

    Returns which held-out problems were right before training and after each task: booleans of
    shape (1 + tasks, arms, seeds, tasks, problems). A seed's result is the same whatever other
    seeds and arms are trained with it, up to rounding.
    """
    plan = plan or Plan()
    jobs = [(arm, seed) for arm in arms for seed in seeds]
    skeleton = small_policy(0)
    members = stack([small_policy(seed) for _, seed in jobs])
    for p in members.values():
        p.requires_grad_()
    streams = {seed: torch.Generator().manual_seed(10_000 + seed) for seed in seeds}
    springs = Springs(
        {name: torch.zeros_like(p) for name, p in members.items()},
        {name: p.detach().clone() for name, p in members.items()},
    )
    right = [right_answers(skeleton, members)]
    for stage, task in enumerate(TASKS):
        train_stage(skeleton, members, jobs, stage, springs, streams, plan)
        right.append(right_answers(skeleton, members))
        if stage + 1 < len(TASKS):
            tighten(skeleton, members, jobs, stage, springs, plan)
        say(f"  {task} learned by {len(jobs)} policies")
    return torch.stack(right).unflatten(1, (len(arms), len(seeds)))
