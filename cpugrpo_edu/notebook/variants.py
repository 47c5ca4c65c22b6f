"""Small languages in which the variants of GRPO race, each expectation known by enumeration.

A policy is a table of logits, one row a prefix, so every completion has a probability that can
be written down. The losses are the package's own (``policy.grpo_loss``), and each race trains
many independent runs at once, one a seed.

Shapes: R runs, N completions of the language, T positions, P prefixes, V words, G completions a
group. A policy is (P, V), or (R, P, V) for many runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import comb

import torch
from torch import Tensor
from torch.func import grad, vmap

from cpugrpo_edu.policy import group_advantages, grpo_loss, reduce_tokens
from cpugrpo_edu.record.stats import over_seeds
from cpugrpo_edu.show.text import verdict

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(new log-probs (G, T), old ones, advantages (G,) or (G, T), mask (G, T)) to a scalar."""

Reward = Callable[[Tensor, torch.Generator], Tensor]
"""(numbers of completions (R, G), generator) to rewards (R, G), or (R, G, T): one a token."""

Grade = Callable[[Tensor], Tensor]
"""Rewards to advantages of the same shape."""


# --- Languages ----------------------------------------------------------------


@dataclass(frozen=True)
class Language:
    """Every completion that can be written, and the prefix that precedes each of its tokens."""

    tokens: Tensor
    """(N, T), padded on the right."""
    mask: Tensor
    """(N, T), 1 on tokens."""
    prefixes: Tensor
    """(N, T), the row of the policy that wrote each token."""
    allowed: Tensor
    """(P, V), which words may follow a prefix."""

    @property
    def start(self) -> Tensor:
        """Logits (P, V) of the policy to which all allowed words are equally likely."""
        return torch.zeros(self.allowed.shape, dtype=torch.float64)

    def log_probs(self, theta: Tensor) -> Tensor:
        """log pi of each token of each completion, (..., N, T); 0 on padding."""
        logits = theta.masked_fill(~self.allowed, -torch.inf)
        chosen = logits.log_softmax(-1)[..., self.prefixes, self.tokens]
        return chosen.masked_fill(self.mask == 0, 0.0)

    def chances(self, theta: Tensor) -> Tensor:
        """Probability of each completion, (..., N)."""
        return self.log_probs(theta).sum(-1).exp()

    def entropy(self, theta: Tensor) -> Tensor:
        """Entropy of the completions in nats, (...)."""
        return torch.special.entr(self.chances(theta)).sum(-1)


def language(completions: Sequence[Sequence[int]]) -> Language:
    """The language of the given completions, lists of word numbers.

    Raises ValueError if one is empty, or is the beginning of another: then the tokens alone
    would not say where it ends.
    """
    rows = [tuple(c) for c in completions]
    seen: dict[tuple[int, ...], int] = {}
    for row in rows:
        for t in range(len(row)):
            seen.setdefault(row[:t], len(seen))
    if not all(rows) or len(set(rows)) < len(rows) or any(row in seen for row in rows):
        raise ValueError("no completion may be empty, come twice, or be the beginning of another")
    longest, words = max(map(len, rows)), 1 + max(map(max, rows))
    tokens = torch.full((len(rows), longest), rows[0][0])
    mask = torch.zeros(len(rows), longest, dtype=torch.float64)
    prefixes = torch.zeros(len(rows), longest, dtype=torch.long)
    allowed = torch.zeros(len(seen), words, dtype=torch.bool)
    for i, row in enumerate(rows):
        for t, word in enumerate(row):
            tokens[i, t], mask[i, t], prefixes[i, t] = word, 1.0, seen[row[:t]]
            allowed[seen[row[:t]], word] = True
    return Language(tokens, mask, prefixes, allowed)


def answers(n: int) -> Language:
    """``n`` answers of one word."""
    return language([[word] for word in range(n)])


def passwords(words: int, length: int) -> Language:
    """All sequences of ``length`` words."""
    return language(list(itertools.product(range(words), repeat=length)))


def essays(longest: int) -> Language:
    """A verdict (word 0 or 1), then filler (word 2) until the end (word 3) or ``longest`` words."""
    ends = [[2] * n + [3] for n in range(longest - 1)] + [[2] * (longest - 1)]
    return language([[first, *rest] for first in (0, 1) for rest in ends])


# --- What the variants do -----------------------------------------------------


def leave_one_out(r: Tensor) -> Tensor:
    """RLOO: each reward minus the mean of the *other* ones (arXiv 2402.14740), (..., G)."""
    return (r - r.mean(-1, keepdim=True)) * (r.shape[-1] / (r.shape[-1] - 1))


def centred(r: Tensor) -> Tensor:
    """Dr. GRPO: the mean subtracted and nothing divided (arXiv 2503.20783)."""
    return group_advantages(r, "none")


def cispo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    most: float = 2.0,
) -> Tensor:
    """CISPO: a capped weight *without* gradient times A log pi (arXiv 2506.13585, eq. 4).

    No token loses its gradient. ``most`` is the cap of the ratio, as in TRL's ``cispo``.
    """
    weight = (log_probs - old_log_probs).exp().clamp(max=most).detach()
    advantages = advantages if advantages.ndim == 2 else advantages.unsqueeze(1)
    return reduce_tokens(-weight * advantages * log_probs * mask, mask, "dapo")


def entropy_bonus(b: float) -> Loss:
    """GRPO with ``b`` times the surprise -log pi(o) added to each advantage.

    The gradient of the entropy of the completions is -E[log pi(o) grad log pi(o)], so the
    bonus climbs it.
    """

    def loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return grpo_loss(new, old, advantages - b * (old * mask).sum(-1), mask)

    return loss


def clip_cov(share: float) -> Loss:
    """GRPO without the ``share`` of completions that would lower the entropy most.

    These have the highest (log pi - mean)(A - mean). A short form of Clip-Cov (arXiv 2505.22617),
    which picks tokens, at random among those above a bound.
    """

    def loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        log_prob = (old * mask).sum(-1)
        covariance = (log_prob - log_prob.mean()) * (advantages - advantages.mean())
        rank = covariance.argsort(descending=True, stable=True).argsort()
        return grpo_loss(new, old, advantages * (rank >= share * len(rank)), mask)

    return loss


def corrected(level: str, most: float = float("inf")) -> Loss:
    """A policy gradient on another policy's samples, with importance weights of at most ``most``.

    ``level`` is "none" (no correction), "token" (each its own ratio) or "sequence" (the product).
    A finite ``most`` is truncated importance sampling (Yao et al. 2025).
    """

    def loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        log_ratio = ((new - old) * mask).detach()
        if level == "sequence":
            log_ratio = log_ratio.sum(-1, keepdim=True)
        weight = torch.ones_like(new) if level == "none" else log_ratio.exp().clamp(max=most)
        return reduce_tokens(-weight * advantages[:, None] * new * mask, mask, "dapo")

    return loss


def step_advantages(r: Tensor) -> Tensor:
    """Rewards of steps (..., G, T) to advantages: what is still to come, minus the group's mean.

    DeepSeekMath's process supervision (arXiv 2402.03300, section 4.1.3), but centred at each
    step and not divided by the standard deviation.
    """
    to_come = r.flip(-1).cumsum(-1).flip(-1)
    return to_come - to_come.mean(-2, keepdim=True)


def soft_overlong(length: Tensor, longest: int, cache: int) -> Tensor:
    """DAPO's penalty for length: 0, then falling to -1 over the last ``cache`` tokens.

    arXiv 2503.14476, eq. 13: 0 up to ``longest - cache``, -1 beyond ``longest``.
    """
    return ((longest - cache - length) / cache).clamp(-1.0, 0.0)


def gae(rewards: Tensor, values: Tensor, lam: float) -> Tensor:
    """Generalised advantages (..., T) with gamma = 1 (arXiv 1506.02438, eq. 16).

    ``rewards`` (..., T) are paid after each token; ``values`` (..., T) are the critic's guesses
    before it. The value after the last token is 0. The sum runs backwards:
    A_t = delta_t + lam A_(t+1), delta_t = r_t + v_(t+1) - v_t.
    """
    after = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], dim=-1)
    delta = rewards + after - values
    advantages, later = [], torch.zeros_like(delta[..., 0])
    for t in reversed(range(delta.shape[-1])):
        later = delta[..., t] + lam * later
        advantages.append(later)
    return torch.stack(advantages[::-1], dim=-1)


def prefix_values(world: Language, theta: Tensor, rewards: Tensor) -> Tensor:
    """The exact value of each prefix, (P,): the mean reward (N,) of what follows it."""
    chance = world.chances(theta)
    weight = torch.zeros(len(world.allowed), dtype=chance.dtype)
    total = torch.zeros_like(weight)
    for t in range(world.tokens.shape[1]):
        live = chance * world.mask[:, t]
        weight = weight.index_add(0, world.prefixes[:, t], live)
        total = total.index_add(0, world.prefixes[:, t], live * rewards)
    return total / weight


# --- Exact gradients ----------------------------------------------------------


def policy_gradient(world: Language, theta: Tensor, rewards: Tensor) -> Tensor:
    """The exact gradient (P, V) of the expected reward; ``rewards`` is (N,)."""
    return grad(lambda x: (world.chances(x) * rewards).sum())(theta)


def token_scores(world: Language, theta: Tensor) -> Tensor:
    """Gradient of each token's log-probability, (N, T, P, V); 0 on padding."""
    p = theta.masked_fill(~world.allowed, -torch.inf).softmax(-1)
    n, t = world.tokens.shape
    scores = torch.zeros(n, t, *theta.shape, dtype=theta.dtype)
    rows, columns = torch.meshgrid(torch.arange(n), torch.arange(t), indexing="ij")
    scores[rows, columns, world.prefixes] = -p[world.prefixes]
    scores[rows, columns, world.prefixes, world.tokens] += 1.0
    return scores * world.mask[..., None, None]


def moments(chance: Tensor, estimates: Tensor) -> tuple[Tensor, float]:
    """Exact mean (...) and total variance of estimates (N, ...) drawn with ``chance`` (N,)."""
    flat = estimates.reshape(len(estimates), -1)
    mean = chance @ flat
    variance = chance @ (flat - mean).square().sum(-1)
    return mean.reshape(estimates.shape[1:]), float(variance)


def expected_update(
    world: Language, theta: Tensor, rewards: Tensor, loss: Loss, grade: Grade, size: int
) -> Tensor:
    """Mean of -grad(loss) over *all* N^size groups that an on-policy step may draw, (P, V)."""
    groups = torch.tensor(list(itertools.product(range(len(rewards)), repeat=size)))
    chance = world.chances(theta)[groups].prod(-1)

    def one(index: Tensor, advantages: Tensor) -> Tensor:
        return grad(_loss_of(world, loss))(theta, theta, index, advantages)

    gradients = vmap(one)(groups, grade(rewards[groups]))
    return -torch.einsum("n,npv->pv", chance, gradients)


def attention(p: float, size: int, grade: Grade) -> float:
    """How strongly a prompt that is solved with chance ``p`` is pushed, exactly.

    With rewards of 0 and 1, the expected gradient of a group is this number times the gradient
    of p: the mean advantage of a right completion minus that of a wrong one.
    """
    others = torch.arange(size, dtype=torch.float64)  # right ones among the others
    log_chance = torch.distributions.Binomial(size - 1, torch.tensor(p).double()).log_prob(others)
    right = (torch.arange(size - 1) < others[:, None]).double()
    first = torch.ones(size, 1, dtype=torch.float64)
    gap = grade(torch.cat([first, right], 1))[:, 0] - grade(torch.cat([0 * first, right], 1))[:, 0]
    return float(log_chance.exp() @ gap)


def batch_attention(chances: Sequence[float], grade: Grade) -> Tensor:
    """``attention`` of each prompt in a batch with *one* completion a prompt, (B,).

    ``grade`` maps the rewards (outcomes, B) of the whole batch, as REINFORCE++ does.
    """
    p = torch.tensor(chances, dtype=torch.float64)
    outcomes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(p)))).double()
    each = torch.where(outcomes == 1, p, 1 - p)
    signed = each.prod(1, keepdim=True) / each * (2 * outcomes - 1)
    return (signed * grade(outcomes)).sum(0)


def coin_drift(
    p: float, loss: Loss, size: int = 8, updates: int = 8, rate: float = 0.3
) -> tuple[float, float]:
    """What rewards that are coin flips do to a habit of probability ``p`` in one batch, exactly.

    Returns the expected change of p and of the entropy in nats, over all groups and all flips.
    """
    world, start = answers(2), torch.tensor([[p, 1 - p]], dtype=torch.float64).log()
    # (with the habit, of these paid, of the others paid): the order within a group is no matter
    rows = [(k, i, j) for k in range(size + 1) for i in range(k + 1) for j in range(size - k + 1)]
    ways = [
        comb(size, k) * p**k * (1 - p) ** (size - k) * comb(k, i) * comb(size - k, j) / 2**size
        for k, i, j in rows
    ]
    index = torch.tensor([[0] * k + [1] * (size - k) for k, _, _ in rows])
    paid = [[1.0] * i + [0.0] * (k - i) + [1.0] * j + [0.0] * (size - k - j) for k, i, j in rows]
    advantages = group_advantages(torch.tensor(paid, dtype=torch.float64))
    gradient = vmap(grad(_loss_of(world, loss)), in_dims=(0, None, 0, 0))
    theta = start.expand(len(rows), -1, -1)
    for _ in range(updates):
        theta = theta - rate * gradient(theta, start, index, advantages)
    weight = torch.tensor(ways, dtype=torch.float64)
    drift = weight @ (world.chances(theta)[:, 0] - p)
    return float(drift), float(weight @ (world.entropy(theta) - world.entropy(start)))


# --- Races --------------------------------------------------------------------


def _loss_of(world: Language, loss: Loss) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def of(theta: Tensor, sampler: Tensor, index: Tensor, advantages: Tensor) -> Tensor:
        new = world.log_probs(theta)[index]
        old = world.log_probs(sampler)[index].detach()
        return loss(new, old, advantages, world.mask[index])

    return of


def pays(rewards: Sequence[float] | Tensor) -> Reward:
    """The reward that depends on nothing but the completion's number."""
    table = torch.as_tensor(rewards, dtype=torch.float64)
    return lambda index, generator: table[index]


@dataclass
class Race:
    """How to train; ``run`` does it. All runs start from the same policy."""

    world: Language
    reward: Reward
    start: Tensor
    steps: int = 100
    group: int = 8
    updates: int = 1
    rate: float = 1.0
    lag: int = 0
    """How many steps old the policy is that samples."""
    runs: int = 20
    seed: int = 0
    watch: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """What to record after each step: a name, and policies (R, P, V) to numbers (R,)."""

    def run(self, loss: Loss = grpo_loss, grade: Grade = group_advantages) -> dict[str, Tensor]:
        """Train with ``loss`` and ``grade``; what was watched, each (steps + 1, R)."""
        return self.train(loss, lambda index, r: grade(r))

    def train(self, loss: Loss, judge: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        """As ``run``, with advantages that may depend on what was written (``Critic``)."""
        generator = torch.Generator().manual_seed(self.seed)
        theta = self.start.expand(self.runs, -1, -1).clone()
        gradient = vmap(grad(_loss_of(self.world, loss)))
        past, seen = [theta], [self._look(theta)]
        for _ in range(self.steps):
            sampler = past[0]
            chance = self.world.chances(sampler)
            index = torch.multinomial(chance, self.group, True, generator=generator)
            advantages = judge(index, self.reward(index, generator))
            for _ in range(self.updates):
                theta = theta - self.rate * gradient(theta, sampler, index, advantages)
            past = [*past, theta][-1 - self.lag :]
            seen.append(self._look(theta))
        return {name: torch.stack([row[name] for row in seen]) for name in self.watch}

    def _look(self, theta: Tensor) -> dict[str, Tensor]:
        return {name: look(theta) for name, look in self.watch.items()}


class Critic:
    """PPO's second network as a table (R, P): advantages by GAE in place of the group's mean.

    It starts at 0, and each batch moves it towards the mean return that followed each prefix.
    """

    def __init__(self, race: Race, lam: float = 0.95, rate: float = 0.5) -> None:
        self.world, self.lam, self.rate = race.world, lam, rate
        self.values = torch.zeros(race.runs, len(race.world.allowed), dtype=torch.float64)

    def __call__(self, index: Tensor, r: Tensor) -> Tensor:
        """Advantages (R, G, T) of the completions ``index`` (R, G) with rewards (R, G)."""
        at, live = self.world.prefixes[index], self.world.mask[index]
        flat = at.flatten(1)
        guess = self.values.gather(1, flat).view_as(at) * live
        last = live.sum(-1, keepdim=True).long() - 1
        paid = torch.zeros_like(live).scatter(-1, last, r[..., None])
        zeros = torch.zeros_like(self.values)
        seen = zeros.scatter_add(1, flat, live.flatten(1))
        gap = zeros.scatter_add(1, flat, ((r[..., None] - guess) * live).flatten(1))
        self.values = self.values + self.rate * gap / seen.clamp(min=1)
        return gae(paid, guess, self.lam)


def skill_race(
    dynamic: bool, steps: int = 60, rate: float = 0.5, runs: int = 20, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """One skill, prompts of many difficulties: DAPO's dynamic sampling against plain groups.

    A prompt of ease b is solved with chance sigmoid(skill + b), b uniform in [-6, 2]. A step takes
    16 groups of 8. ``dynamic`` draws on until 16 groups have both right and wrong answers (of at
    most 160). Returns the mean chance over all prompts, and the completions spent so far, both
    (steps + 1, R).
    """
    generator = torch.Generator().manual_seed(seed)
    prompts, group, drawn = 16, 8, 160 if dynamic else 16
    skill = torch.zeros(runs, dtype=torch.float64)
    all_prompts = torch.linspace(-6, 2, 81, dtype=torch.float64)
    chances, spent = [], [torch.zeros(runs)]
    for step in range(steps + 1):
        chances.append((skill[:, None] + all_prompts).sigmoid().mean(1))
        if step == steps:
            break
        ease = 8 * torch.rand(runs, drawn, generator=generator, dtype=torch.float64) - 6
        p = (skill[:, None] + ease).sigmoid()[..., None].expand(-1, -1, group)
        r = torch.bernoulli(p, generator=generator)
        teaches = (r != r[..., :1]).any(-1)
        kept = teaches & (teaches.cumsum(1) <= prompts) if dynamic else torch.ones_like(teaches)
        push = (group_advantages(r) * (r - p)).mean(-1)
        skill = skill + rate * (push * kept).sum(1) / kept.sum(1).clamp(min=1)
        used = (teaches.cumsum(1) < prompts).sum(1) + 1 if dynamic else torch.full((runs,), drawn)
        spent.append(spent[-1] + used.clamp(max=drawn) * group)
    return torch.stack(chances), torch.stack(spent)


def aim(
    chances: Sequence[float],
    grade: Grade,
    group: int = 8,
    options: int = 16,
    batches: int = 200,
    runs: int = 20,
    seed: int = 0,
) -> Tensor:
    """Mean cosine between a batch's gradient and the exact gradient of the mean success, (R,).

    Each prompt has a policy of its own over ``options`` answers: the right one has the prompt's
    chance, the wrong ones share the rest. ``grade`` maps rewards (..., prompts, group). A batch
    without gradient counts 0. Methods with the same seed grade the same samples.
    """
    generator = torch.Generator().manual_seed(seed)
    p = torch.tensor(chances, dtype=torch.float64)[:, None]
    first = (torch.arange(options) == 0).double()
    policy = torch.where(first == 1, p, (1 - p) / (options - 1))
    drawn = torch.multinomial(policy, runs * batches * group, True, generator=generator)
    index = drawn.view(len(p), runs, batches, group).movedim(0, 2)
    advantages = grade((index == 0).double())
    scores = torch.nn.functional.one_hot(index, options) - policy[:, None]
    estimates = (advantages[..., None] * scores).mean(-2).flatten(2)
    exact = (p * (first - policy)).flatten().expand_as(estimates)
    return torch.cosine_similarity(estimates, exact, dim=-1, eps=1e-12).mean(1)


def at_cost(values: Tensor, spent: Tensor, budget: float) -> Tensor:
    """What each run had reached when it had spent ``budget``, (R,) from (steps + 1, R)."""
    last = (spent <= budget).sum(0) - 1
    return values.gather(0, last[None])[0]


def steps_to(values: Tensor, goal: float) -> Tensor:
    """The first step at which each run exceeds ``goal``, (R,); their number if it never does."""
    hit = values > goal
    return torch.where(hit.any(0), hit.int().argmax(0), len(values)).double()


def contrast(
    a: Tensor,
    b: Tensor,
    up: str = "higher",
    down: str = "lower",
    unclear: str = "no difference is shown",
    margin: float | None = None,
) -> str:
    """``a - b`` over the runs (R,): mean, 95 % t interval, and the words that it allows."""
    s = over_seeds((a - b).tolist())
    words = verdict(s.low, s.high, up, down, margin, "the same within the margin", unclear)
    return f"{s.mean:+.3f} ({s.low:+.3f} to {s.high:+.3f}): {words}"
