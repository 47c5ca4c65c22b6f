"""The readable sampler against enumeration, against the engine, and through the front door."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from scipy.stats import chi2
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from cpugrpo_edu.data import Group
from cpugrpo_edu.engine.decode import sample as engine_sample
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.policy import Policy, completion_logits, token_log_probs
from cpugrpo_edu.rewards import Reward, parse_rewards, total_reward
from cpugrpo_edu.sample import Sampling, rollout, sample
from cpugrpo_edu.tasks import make_problems

V, LENGTH, EOS = 5, 2, 4
PROMPTS = [[1, 3, 2], [2], [0, 3, 1, 3]]
LONG_PROMPTS = [[5, 6, 7, 8, 9], [40], [100, 3, 77, 12, 250, 9, 31], [8, 8]]


def qwen2(vocabulary: int, **options) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,  # far from uniform, so that mistakes show
        **options,
    )
    return Qwen2ForCausalLM(config).eval()


def gpt2(vocabulary: int) -> GPT2LMHeadModel:
    """Absolute positions, so padding shows."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=64, n_embd=16, n_layer=2, n_head=2,
        initializer_range=0.4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def draw(model, prompts=LONG_PROMPTS, n=1, eos=frozenset(), **sampling):
    return sample(model, prompts, n, Sampling(**sampling), eos_ids=set(eos), pad_id=0)


def ids(groups: list[Group]) -> list[list[list[int]]]:
    return [[episode.completion_ids for episode in group.episodes] for group in groups]


def exact_log_probs(model, prompt, completion, temperature=1.0):
    mask = torch.ones(1, len(prompt) + len(completion), dtype=torch.long)
    with torch.no_grad():
        return token_log_probs(
            model, torch.tensor([prompt]), torch.tensor([completion]), mask, temperature
        )[0].tolist()


# --- against enumeration ----------------------------------------------------------------


def nucleus(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """The likeliest tokens until their mass reaches ``top_p``, by hand."""
    kept, mass = torch.zeros_like(p), 0.0
    for token in sorted(range(len(p)), key=lambda i: -float(p[i])):
        if mass < top_p:
            kept[token] = p[token]
        mass += float(p[token])
    return kept / kept.sum()


def every_completion(model, prompt, temperature, top_p, eos) -> dict[tuple[int, ...], float]:
    """The probability of each completion of at most LENGTH tokens that ends with ``eos``."""
    ids, mask = torch.tensor([prompt]), torch.ones(1, len(prompt) + LENGTH)
    found: dict[tuple[int, ...], float] = {}
    for completion in itertools.product(range(V), repeat=LENGTH):
        with torch.no_grad():
            logits = completion_logits(model, ids, torch.tensor([completion]), mask, temperature)
        p = 1.0
        for length, token in enumerate(completion, start=1):
            p *= float(nucleus(logits[0, length - 1].softmax(-1), top_p)[token])
            if token in eos:
                break
        found[completion[:length]] = p
    return found


@pytest.mark.parametrize("make", [qwen2, gpt2])
@pytest.mark.parametrize(
    ("temperature", "top_p", "eos"),
    [(1.0, 1.0, set()), (1.0, 1.0, {EOS}), (0.7, 1.0, {EOS}), (1.0, 0.8, {EOS, 0})],
)
def test_completions_come_as_often_as_enumeration_says(make, temperature, top_p, eos):
    """Prompts of three lengths share a batch: each has its own exact distribution."""
    model, n = make(V), 3000
    groups = draw(
        model, PROMPTS, n, eos, max_new_tokens=LENGTH, temperature=temperature, top_p=top_p
    )
    for prompt, group in zip(PROMPTS, groups, strict=True):
        exact = every_completion(model, prompt, temperature, top_p, eos)
        assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
        drawn = [tuple(episode.completion_ids) for episode in group.episodes]
        assert all(exact[completion] > 0 for completion in drawn)
        expected = {completion: n * p for completion, p in exact.items() if n * p >= 5}
        rare = n - sum(expected.values())
        statistic = sum((drawn.count(c) - e) ** 2 / e for c, e in expected.items())
        # One test in 100,000 of a right sampler would fail; the seed is fixed anyway.
        assert statistic < chi2.ppf(1 - 1e-5, len(expected))
        assert sum(c not in expected for c in drawn) < rare + 5 * max(rare, 1) ** 0.5 + 1
        wrong = every_completion(model, prompt, 2 * temperature, top_p, eos)
        statistic = sum((drawn.count(c) - n * wrong[c]) ** 2 / max(n * wrong[c], 1) for c in exact)
        assert statistic > chi2.ppf(1 - 1e-5, len(exact))  # the bound tells a policy from another


# --- against the engine -----------------------------------------------------------------


@pytest.mark.parametrize("engine", ["fast", "generate"])
@pytest.mark.parametrize("eos", [frozenset(), frozenset(range(0, 320, 9))])
def test_greedy_gives_the_tokens_and_log_probs_of_the_engine(engine, eos):
    model, sampling = qwen2(320), Sampling(16, temperature=0.0)
    contract = {"eos_ids": set(eos), "pad_id": 0}
    ours = sample(model, LONG_PROMPTS, 2, sampling, **contract)
    options = EngineOptions(engine=engine)
    theirs = engine_sample(model, LONG_PROMPTS, 2, sampling, **contract, options=options)
    assert ids(ours) == ids(theirs)
    assert len({token for [row, _] in ids(ours) for token in row}) > 4  # not one token throughout
    for one, other in zip(ours, theirs, strict=True):
        assert one.prompt_ids == other.prompt_ids
        for a, b in zip(one.episodes, other.episodes, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
            assert a.finished == b.finished == (a.completion_ids[-1] in eos)
    if eos:
        assert len({len(row) for rows in ids(ours) for row in rows}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("make", [qwen2, gpt2])
def test_log_probs_are_those_that_training_sees(make, temperature):
    model = make(320)
    for group in draw(model, n=3, eos={17, 40}, max_new_tokens=12, temperature=temperature):
        for episode in group.episodes:
            exact = exact_log_probs(model, group.prompt_ids, episode.completion_ids, temperature)
            assert episode.logprobs == pytest.approx(exact, abs=1e-4)


def test_log_probs_within_a_nucleus_are_normalised():
    model = qwen2(V)
    for group in draw(model, PROMPTS, n=20, max_new_tokens=LENGTH, top_p=0.7):
        ids, mask = torch.tensor([group.prompt_ids]), torch.ones(1, len(group.prompt_ids) + LENGTH)
        for episode in group.episodes:
            chosen = episode.completion_ids
            with torch.no_grad():
                logits = completion_logits(model, ids, torch.tensor([chosen]), mask)[0]
            p = [nucleus(row.softmax(-1), 0.7)[token] for row, token in zip(logits, chosen)]
            assert episode.logprobs == pytest.approx(torch.stack(p).log().tolist(), abs=1e-4)


# --- ends, padding, dropout, seeds --------------------------------------------------------


def test_a_completion_ends_with_its_first_end_of_text():
    model = qwen2(V)
    stopped = draw(model, PROMPTS, 50, {EOS}, max_new_tokens=8)
    for episode in (episode for group in stopped for episode in group.episodes):
        assert EOS not in episode.completion_ids[:-1]
        assert episode.finished == (episode.completion_ids[-1] == EOS)
        assert episode.finished or len(episode.completion_ids) == 8
        assert len(episode.logprobs) == len(episode.completion_ids)
    full = draw(model, PROMPTS, 50, {EOS}, max_new_tokens=8, stop_at_eos=False)
    rows = [episode for group in full for episode in group.episodes]
    assert {len(episode.completion_ids) for episode in rows} == {8}
    assert not any(episode.finished for episode in rows)
    assert any(EOS in episode.completion_ids[:-1] for episode in rows)


@pytest.mark.parametrize("make", [qwen2, gpt2])
def test_padding_on_the_left_changes_nothing(make):
    model = make(320)
    together = draw(model, temperature=0.0, max_new_tokens=12)
    for prompt, group in zip(LONG_PROMPTS, together, strict=True):
        [alone] = draw(model, [prompt], temperature=0.0, max_new_tokens=12)
        assert ids([alone]) == ids([group]) and group.prompt_ids == prompt
        assert alone.episodes[0].logprobs == pytest.approx(group.episodes[0].logprobs, abs=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_restored(training):
    model = qwen2(320, attention_dropout=0.5)
    expected = draw(model, n=2, max_new_tokens=10)
    model.train(training)
    assert draw(model, n=2, max_new_tokens=10) == expected
    assert model.training is training
    assert all(module.training is training for module in model.modules())


def test_seeds_reproduce_and_leave_the_global_state_alone():
    model = qwen2(320)
    before = torch.random.get_rng_state()
    first = draw(model, [[5, 6]] * 2, 2, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == draw(model, [[5, 6]] * 2, 2, seed=3) != draw(model, [[5, 6]] * 2, 2, seed=4)
    assert ids(first)[0] != ids(first)[1] and ids(first)[0][0] != ids(first)[0][1]


def test_no_gradient_is_kept():
    seen = []
    model = qwen2(V)
    model.lm_head.register_forward_hook(lambda *arguments: seen.append(arguments[2].requires_grad))
    draw(model, PROMPTS, max_new_tokens=3)
    assert seen == [False] * 3


# --- the front door -----------------------------------------------------------------------


REWARDS = "correct_answer=1,valid_steps=0.5,good_format=0.2"


@pytest.fixture(params=["readable", "engine"])
def policy(request, tiny_policy) -> Policy:
    if request.param == "engine":
        return tiny_policy
    return dataclasses.replace(tiny_policy, sampler=None)


@pytest.fixture(scope="module")
def problems():
    return make_problems("lists", "basic", "train", 3)


def test_rollout_fills_in_problem_text_and_reward(policy, problems):
    done = []
    odd = Reward("odd", lambda problem, episode: sum(i % 2 for i in episode.completion_ids), 0.25)
    rewards = [*parse_rewards(REWARDS), odd]
    groups = rollout(policy, problems, 4, Sampling(6), rewards, done.append)
    assert [group.problem for group in groups] == problems
    assert all(group.problem.task is not None for group in groups)
    assert [group.prompt_ids for group in groups] == [policy.encode_problem(p) for p in problems]
    assert [len(group.episodes) for group in groups] == [4] * 3 and sum(done) == 3
    decode = policy.tokenizer.decode
    for group in groups:
        for episode in group.episodes:
            text = decode(episode.completion_ids, skip_special_tokens=True)
            assert episode.text == text
            assert episode.reward == total_reward(rewards, group.problem, episode)
    earned = {episode.reward for group in groups for episode in group.episodes}
    assert len(earned) > 1 and max(earned) > 0
    unrewarded = rollout(policy, problems, 4, Sampling(6))
    assert ids(unrewarded) == ids(groups)
    assert {episode.reward for group in unrewarded for episode in group.episodes} == {0.0}


def test_end_of_text_stays_in_the_tokens_but_not_in_the_text(policy, problems):
    policy.model.generation_config.eos_token_id = list(range(200))
    episodes = [e for g in rollout(policy, problems, 8, Sampling(20)) for e in g.episodes]
    assert any(episode.finished for episode in episodes)
    for episode in episodes:
        last = episode.completion_ids[-1]
        assert episode.finished == (last in policy.eos_ids)
    end = policy.tokenizer.eos_token_id
    policy.sampler = lambda model, prompts, n, *_, **__: [
        Group(prompt, [dataclasses.replace(episodes[0], completion_ids=[60, end])] * n)
        for prompt in prompts
    ]
    [group, *_] = rollout(policy, problems, 1, Sampling(20))
    assert group.episodes[0].completion_ids == [60, end]
    assert group.episodes[0].text == policy.tokenizer.decode([60])


@pytest.mark.parametrize("n", [0, -1])
def test_fewer_than_one_completion_is_refused(policy, problems, n):
    with pytest.raises(ValueError, match=f"n is {n}"):
        rollout(policy, problems, n, Sampling(4))


def test_an_empty_prompt_is_refused(policy, problems, monkeypatch):
    monkeypatch.setattr(Policy, "encode_problem", lambda self, problem: [])
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        rollout(policy, problems, 2, Sampling(4))


def test_a_reward_that_fails_is_named(policy, problems):
    with pytest.raises(UserError, match="reward broken failed on problem 'lists/basic/"):
        rollout(policy, problems, 2, Sampling(4), [Reward("broken", lambda *_: 1 / 0)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_sampling_refuses_what_cannot_be_drawn(options, words):
    with pytest.raises(UserError, match=words):
        Sampling(**options)
