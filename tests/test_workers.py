"""Batches side by side: the same results, each thread with its share of the machine."""

from __future__ import annotations

import pytest
import torch

from cpugrpo_edu.engine import decode as module
from cpugrpo_edu.engine.decode import sample
from cpugrpo_edu.engine.int8 import quantize_for_rollout
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.workers import side_by_side
from cpugrpo_edu.sample import Sampling

GREEDY = Sampling(6, temperature=0.0)


@pytest.fixture
def threads():
    """Three threads, as on a machine with three cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def ask(policy, prompts, n=1, sampling=GREEDY, **more):
    given = {"eos_ids": policy.eos_ids, "pad_id": policy.pad_id} | more
    return sample(policy.model, prompts, n, sampling, **given)


def test_every_item_once_with_a_share_of_the_threads(threads):
    def call(item):
        return item, torch.get_num_threads(), torch.is_inference_mode_enabled()

    assert sorted(side_by_side(call, range(20), 3)) == [(i, 1, True) for i in range(20)]
    assert torch.get_num_threads() == 3


def test_an_error_ends_it_and_gives_the_threads_back(threads):
    def call(item):
        if item == 3:
            raise ValueError("three")
        return item

    with pytest.raises(ValueError, match="three"):
        list(side_by_side(call, range(100), 2))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("int8", [False, True])
def test_greedy_completions_are_those_of_one_thread(tiny_policy, threads, monkeypatch, int8):
    if int8:  # in C, where there is a compiler
        tiny_policy.model = quantize_for_rollout(tiny_policy.model)
    monkeypatch.setattr(module, "WORKER_ROWS", 2)
    prompts = [[5 + i % 7] * (1 + i % 5) for i in range(23)]
    done, used = [], []

    def watched(function, items, workers):
        used.append(workers)
        return side_by_side(function, items, workers)

    monkeypatch.setattr(module, "side_by_side", watched)
    options = EngineOptions(max_rows=7)
    together = ask(tiny_policy, prompts, n=2, options=options, on_done=done.append)
    assert used == [3] and sum(done) == 23
    torch.set_num_threads(1)
    alone = ask(tiny_policy, prompts, n=2, options=options)
    assert used == [3]  # one thread needs no other
    for ours, theirs, prompt in zip(together, alone, prompts, strict=True):
        assert ours.prompt_ids == theirs.prompt_ids == prompt
        for a, b in zip(ours.episodes, theirs.episodes, strict=True):
            assert a.completion_ids == b.completion_ids and a.finished == b.finished
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_drawn_completions_do_not_depend_on_the_threads(tiny_policy, threads, monkeypatch):
    monkeypatch.setattr(module, "WORKER_ROWS", 2)
    prompts = [[5 + i] for i in range(12)]
    options = EngineOptions(max_rows=4)
    drawn = [ask(tiny_policy, prompts, sampling=Sampling(6, seed=3), options=options)]
    torch.set_num_threads(1)
    drawn.append(ask(tiny_policy, prompts, sampling=Sampling(6, seed=3), options=options))
    first, second = ([g.episodes[0].completion_ids for g in groups] for groups in drawn)
    assert first == second


def test_a_stop_while_threads_work(tiny_policy, threads, monkeypatch):
    """What ``on_done`` raises comes out, as Ctrl-C does in an evaluation."""
    monkeypatch.setattr(module, "WORKER_ROWS", 2)

    def stop(done):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        ask(tiny_policy, [[5]] * 40, options=EngineOptions(max_rows=6), on_done=stop)
    assert torch.get_num_threads() == 3


def test_a_prompt_pass_in_pieces_is_one_pass(tiny_policy, monkeypatch):
    prompts = [[5, 6, 7], [8], [9, 10], [11, 12, 13], [5]]
    decoder = module.Decoder(tiny_policy.model)
    with torch.inference_mode():
        hidden, lengths, cache = module.prefill(decoder, prompts, tiny_policy.pad_id)
        monkeypatch.setattr(module, "PREFILL_TOKENS", 6)  # two prompts at a time
        pieces = module.prefill(decoder, prompts, tiny_policy.pad_id, room=4)
    torch.testing.assert_close(pieces[0], hidden, atol=1e-5, rtol=1e-4)
    assert torch.equal(pieces[1], lengths) and pieces[2].length == cache.length == 3
    assert pieces[2].mask.shape == (5, 7) and torch.equal(pieces[2].mask[:, :3], cache.mask)
    for ours, theirs in zip(
        (*pieces[2].keys, *pieces[2].values), (*cache.keys, *cache.values), strict=True
    ):
        real = cache.mask[:, None, :, None]
        torch.testing.assert_close(ours[:, :, :3] * real, theirs * real, atol=1e-5, rtol=1e-4)
