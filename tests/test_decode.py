"""The decode engine against Hugging Face's generate and against exact probabilities."""

from __future__ import annotations

import math
import weakref
from unittest import mock

import pytest
import torch
from scipy.stats import chi2
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from cpugrpo_edu.engine import decode as engine_module
from cpugrpo_edu.engine.blocks import causal_lm, is_supported
from cpugrpo_edu.engine.decode import chunks_by_length, sample
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.load import add_lora, load_policy
from cpugrpo_edu.policy import token_log_probs
from cpugrpo_edu.sample import Sampling, draw, keep_top_p

PROMPTS = [[5, 6, 7, 8, 9], [40], [100, 3, 77, 12, 250, 9, 31], [8, 8]]


def stir(model, seed=0):
    """Weights, biases and adapters large enough that the tokens vary and matter."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    return model.eval()


@pytest.fixture
def model(tiny_policy):
    return stir(tiny_policy.model)


@pytest.fixture
def adapted(tiny_folder):
    model = stir(load_policy(tiny_folder).model)
    model = add_lora(model, 4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def gpt2():
    config = GPT2Config(
        vocab_size=320, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=None
    )
    return stir(GPT2LMHeadModel(config))


def run(model, prompts=PROMPTS, copies=1, eos=frozenset(), engine="fast", max_rows=256, **sampling):
    options = EngineOptions(engine=engine, max_rows=max_rows)
    return sample(
        model, prompts, copies, Sampling(**sampling), eos_ids=set(eos), pad_id=0, options=options
    )


def ids(groups):
    return [[episode.completion_ids for episode in group.episodes] for group in groups]


def exact_log_probs(model, prompt, completion, temperature=1.0):
    mask = torch.ones(1, len(prompt) + len(completion), dtype=torch.long)
    with torch.no_grad():
        return token_log_probs(
            model, torch.tensor([prompt]), torch.tensor([completion]), mask, temperature
        )[0]


@pytest.mark.parametrize("which", ["model", "adapted"])
def test_greedy_equals_hugging_face_generate_on_ragged_prompts(which, request):
    model = request.getfixturevalue(which)
    fast = run(model, temperature=0.0, max_new_tokens=16)
    reference = run(model, temperature=0.0, max_new_tokens=16, engine="generate")
    assert ids(fast) == ids(reference)
    for ours, theirs in zip(fast, reference, strict=True):
        assert ours.episodes[0].logprobs == pytest.approx(theirs.episodes[0].logprobs, abs=1e-4)
    for prompt, group in zip(PROMPTS, fast, strict=True):  # nor does padding matter
        assert ids(run(model, [prompt], temperature=0.0, max_new_tokens=16)) == ids([group])
    assert len({token for [[row]] in zip(ids(fast)) for token in row}) > 4  # not one token all over


def test_adapters_change_what_is_sampled(model, adapted):
    greedy = {"temperature": 0.0, "max_new_tokens": 16}
    assert ids(run(model, **greedy)) != ids(run(adapted, **greedy))


@pytest.mark.parametrize("engine", ["fast", "generate"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_log_probs_are_those_of_a_plain_forward(adapted, engine, temperature):
    groups = run(
        adapted, copies=3, eos={17, 40}, temperature=temperature, max_new_tokens=12, engine=engine
    )
    for group in groups:
        for episode in group.episodes:
            exact = exact_log_probs(adapted, group.prompt_ids, episode.completion_ids, temperature)
            assert episode.logprobs == pytest.approx(exact.tolist(), abs=1e-4)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_sampling_frequencies_match_the_exact_distribution(model, top_p):
    copies, temperature = 4000, 0.8
    [group] = run(
        model, [PROMPTS[0]], copies, max_new_tokens=1, temperature=temperature, top_p=top_p,
        max_rows=copies,
    )  # fmt: skip
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    exact = (logits / temperature).softmax(-1)
    if top_p < 1:  # enumerate: the likeliest tokens until their mass reaches top_p
        order = exact.argsort(descending=True).tolist()
        mass, nucleus = 0.0, []
        while mass < top_p:
            nucleus.append(order[len(nucleus)])
            mass += float(exact[nucleus[-1]])
        assert 1 < len(nucleus) < 300
        kept = torch.zeros_like(exact)
        kept[nucleus] = exact[nucleus] / mass
        exact = kept
    drawn = torch.tensor([episode.completion_ids[0] for episode in group.episodes])
    counts = torch.bincount(drawn, minlength=320)
    assert counts[exact == 0].sum() == 0
    expected = exact * copies
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]).double()
    wanted = wanted.clamp(min=1e-9)
    statistic = float(((observed - wanted).square() / wanted)[wanted > 0.5].sum())
    assert statistic < chi2.ppf(1 - 1e-5, int(common.sum()))
    for episode in group.episodes[:50]:  # normalised within the nucleus
        p = float(exact[episode.completion_ids[0]])
        assert episode.logprobs[0] == pytest.approx(math.log(p), abs=1e-4)


def test_nucleus_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    assert keep_top_p(logits, 0.7).isfinite().tolist() == [
        [True, True, False, False],
        [False, False, True, True],
    ]
    assert keep_top_p(logits, 0.01).isfinite().sum(-1).tolist() == [1, 1]
    assert keep_top_p(logits, 1.0).isfinite().all()


def staggered_eos(model):
    """Ends for some of the greedy completions, none at the first token; and all without ends."""
    rows = [row for [row] in ids(run(model, temperature=0.0, max_new_tokens=20))]
    first = {row[0] for row in rows}
    later = [[t for t in row[1 + 2 * i :] if t not in first] for i, row in enumerate(rows)]
    return {tokens[0] for tokens in later if tokens}, rows


def test_retiring_finished_rows_changes_no_other_row(model, monkeypatch):
    eos, full = staggered_eos(model)
    greedy = {"eos": eos, "temperature": 0.0, "max_new_tokens": 20}
    retiring = run(model, copies=2, **greedy)
    monkeypatch.setattr(engine_module, "RETIRE_SHARE", 0.0)
    assert ids(retiring) == ids(run(model, copies=2, **greedy))
    lengths = []
    for group, row in zip(retiring, full, strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in eos), 20)
        for episode in group.episodes:
            assert episode.completion_ids == row[:end]
            assert episode.finished == any(token in eos for token in row)
            exact = exact_log_probs(model, group.prompt_ids, row[:end]).tolist()
            assert episode.logprobs == pytest.approx(exact, abs=1e-4)
        lengths.append(end)
    assert len(set(lengths)) > 1


def test_the_batch_really_shrinks(model, monkeypatch):
    eos, _ = staggered_eos(model)
    sizes = []
    forward = engine_module.Decoder.forward

    def counting(decoder, tokens, *rest):
        sizes.append(len(tokens))
        return forward(decoder, tokens, *rest)

    monkeypatch.setattr(engine_module.Decoder, "forward", counting)
    run(model, copies=4, eos=eos, temperature=0.0, max_new_tokens=20)
    assert sizes[:2] == [4, 16]  # each prompt is prefilled once
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert sizes[-1] < 16


@pytest.mark.parametrize("engine", ["fast", "generate"])
def test_ends_and_lengths(model, engine):
    model.generation_config.eos_token_id = list(range(320))  # must not count
    groups = run(model, copies=2, max_new_tokens=7, engine=engine)
    episodes = [episode for group in groups for episode in group.episodes]
    assert {len(episode.completion_ids) for episode in episodes} == {7}
    assert not any(episode.finished for episode in episodes)
    groups = run(model, copies=2, max_new_tokens=7, eos=range(320), engine=engine)
    episodes = [episode for group in groups for episode in group.episodes]
    assert {len(episode.completion_ids) for episode in episodes} == {1}
    assert all(episode.finished and len(episode.logprobs) == 1 for episode in episodes)


@pytest.mark.parametrize("engine", ["fast", "generate"])
def test_groups_come_back_in_the_order_given_in_chunks_of_at_most_max_rows(model, engine):
    seen = []
    groups = sample(
        model, PROMPTS, 2, Sampling(max_new_tokens=2), eos_ids=set(), pad_id=0,
        options=EngineOptions(engine=engine, max_rows=4), on_done=seen.append,
    )  # fmt: skip
    assert [group.prompt_ids for group in groups] == PROMPTS
    assert [len(group.episodes) for group in groups] == [2] * 4
    assert sum(seen) == 4 and max(seen) <= 2
    assert run(model, []) == []
    assert list(chunks_by_length([[1] * 3, [1], [1] * 2], 2)) == [[1, 2], [0]]


@pytest.mark.parametrize("engine", ["fast", "generate"])
def test_a_batch_under_way_is_counted_by_its_tokens(model, engine):
    """Four prompts of eight tokens in one batch: one more prompt is done every second token."""
    seen, steps = [], []
    options = EngineOptions(engine=engine)
    with mock.patch.object(engine_module, "draw", lambda *a: steps.append(0) or draw(*a)):
        sample(
            model, PROMPTS, 2, Sampling(8, seed=1), eos_ids=set(), pad_id=0, options=options,
            on_done=lambda more: seen.append((len(steps), more)),
        )  # fmt: skip
    assert seen == [(2, 1), (4, 1), (6, 1), (8, 1)]


def test_a_second_try_counts_each_prompt_once(model, monkeypatch):
    seen, refused = [], []
    first = engine_module.decode

    def refuse_once(*arguments, **named):
        groups = first(*arguments, **named)
        if not refused:
            refused.append(True)
            raise MemoryError
        return groups

    monkeypatch.setattr(engine_module, "decode", refuse_once)
    sampling = Sampling(4, seed=1)
    sample(model, PROMPTS, 2, sampling, eos_ids=set(), pad_id=0, on_done=seen.append)
    assert refused and sum(seen) == 4


@pytest.mark.parametrize("engine", ["fast", "generate"])
def test_seeds_reproduce_and_chunks_do_not_repeat_each_other(model, engine):
    def drawn(seed, rows=256):
        prompts = [[5, 6]] * 2
        return ids(run(model, prompts, 2, engine=engine, seed=seed, max_rows=rows))

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = drawn(3, rows=2)
    assert torch.equal(before, torch.random.get_rng_state())  # the global state is left alone
    assert first == drawn(3, rows=2)
    assert first != drawn(4, rows=2)
    assert first[0] != first[1]  # the same prompt in another chunk is drawn anew
    assert first[0][0] != first[0][1]


def test_other_architectures_go_through_generate(gpt2):
    assert not is_supported(gpt2)
    greedy = {"temperature": 0.0, "max_new_tokens": 6}
    groups = run(gpt2, **greedy)
    assert ids(groups) == ids(run(gpt2, engine="generate", **greedy))
    for group in groups:
        [episode] = group.episodes
        exact = exact_log_probs(gpt2, group.prompt_ids, episode.completion_ids)
        assert episode.logprobs == pytest.approx(exact.tolist(), abs=1e-4)


@pytest.mark.parametrize("which", ["model", "adapted"])
def test_a_models_own_generation_config_does_not_act(which, request):
    model = request.getfixturevalue(which)
    sampled = {"temperature": 0.9, "top_p": 0.8, "max_new_tokens": 8, "engine": "generate"}
    expected = [run(model, copies=3, **sampled), run(model, temperature=0.0, engine="generate")]
    usual = [row for [row] in ids(expected[1])]
    config = GenerationConfig(
        do_sample=True, num_beams=2, min_p=0.9, typical_p=0.1, top_k=1, repetition_penalty=5.0,
        suppress_tokens=usual[0], stop_strings=["a", "b", "c"], max_length=7, min_new_tokens=50,
    )  # fmt: skip
    for owner in {model, causal_lm(model)}:
        owner.generation_config = config
    assert run(model, copies=3, **sampled) == expected[0]
    assert run(model, temperature=0.0, engine="generate") == expected[1]
    assert causal_lm(model).generation_config is config


def test_generate_draws_what_the_distribution_says(model):
    copies, sampling = 2000, {"temperature": 0.8, "top_p": 0.5, "max_new_tokens": 1}
    [group] = run(model, [PROMPTS[0]], copies, max_rows=copies, engine="generate", **sampling)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[:, -1]
    exact = keep_top_p(logits / 0.8, 0.5).softmax(-1)[0]
    drawn = torch.tensor([episode.completion_ids[0] for episode in group.episodes])
    shares = torch.bincount(drawn, minlength=320) / copies
    assert not shares[exact == 0].any()
    assert ((shares - exact).abs() < 5 * (exact / copies).sqrt() + 1e-6).all()


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_restored_even_after_an_error(model, training):
    model.train(training)
    run(model, max_new_tokens=1)
    assert model.training is training
    with pytest.raises(IndexError):
        run(model, [[99_999]], max_new_tokens=1)
    assert model.training is training


def test_sliding_windows_are_left_to_generate(model):
    assert is_supported(model)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert not is_supported(model)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"max_new_tokens": 0}, UserError, "max_new_tokens is 0"),
        ({"temperature": -0.1}, UserError, "temperature is -0.1"),
        ({"top_p": 0.0}, UserError, "top_p is 0.0"),
        ({"top_p": 1.1}, UserError, "top_p is 1.1"),
        ({"engine": "vllm"}, UserError, "'vllm'.*fast and generate"),
        ({"prompts": [[1], []]}, ValueError, "no tokens"),
        ({"copies": 0}, ValueError, "0 completions were asked"),
    ],
)
def test_bad_input_is_refused(model, arguments, error, names):
    with pytest.raises(error, match=names):
        run(model, **arguments)


# Memory


def test_fewer_rows_where_memory_is_short_or_refused(tiny_policy, monkeypatch):
    import cpugrpo_edu.engine.decode as module

    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    sampling = Sampling(max_new_tokens=5, temperature=0)

    def greedy(**more):
        options = EngineOptions(**more)
        return ids(
            sample(
                tiny_policy.model, prompts, 4, sampling, eos_ids=set(), pad_id=0, options=options
            )
        )

    whole, original, rows = greedy(), module.decode, []

    def spy(lm, texts, copies, **arguments):
        rows.append(len(texts) * copies)
        if rows[-1] > 3:
            raise MemoryError
        return original(lm, texts, copies, **arguments)

    monkeypatch.setattr(engine_module, "decode", spy)
    assert greedy() == whole
    assert rows[0] == 12 and max(rows[-2:]) <= 3 and all(len(group) == 4 for group in whole)
    rows.clear()
    assert greedy(memory_limit=1) == whole  # nothing left: one row at a time
    assert set(rows) == {1}
    rows.clear()
    monkeypatch.setattr(engine_module, "MOST_BYTES", 1)  # however much there is
    assert greedy() == whole and set(rows) == {1}


def test_generate_has_fewer_rows_where_memory_is_short(gpt2, monkeypatch):
    original, rows = engine_module.decode_with_generate, []

    def spy(lm, texts, copies, **arguments):
        rows.append(len(texts) * copies)
        return original(lm, texts, copies, **arguments)

    monkeypatch.setattr(engine_module, "decode_with_generate", spy)
    whole = run(gpt2, copies=2, temperature=0.0, max_new_tokens=3)
    monkeypatch.setattr(engine_module, "free_memory", lambda limit: 0)
    assert ids(run(gpt2, copies=2, temperature=0.0, max_new_tokens=3)) == ids(whole)
    assert rows == [8] + [1] * 8


def test_generate_keeps_the_scores_of_one_step(gpt2, monkeypatch, no_collection):
    seen, original = [], engine_module.DrawInstead.__call__

    def spy(self, input_ids, scores):
        assert all(earlier() is None for earlier in seen[:-1])
        result = original(self, input_ids, scores)
        seen.extend([weakref.ref(scores), weakref.ref(result)])
        return result

    monkeypatch.setattr(engine_module.DrawInstead, "__call__", spy)
    run(gpt2, max_new_tokens=5)
    assert len(seen) == 10
