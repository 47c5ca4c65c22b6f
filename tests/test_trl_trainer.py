"""The CPU trainer changes how TRL's gradient is computed, never what it is."""

from __future__ import annotations

import math
import weakref

import psutil
import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel
from trl import GRPOConfig, GRPOTrainer

from cpugrpo_edu.data import Problem
from cpugrpo_edu.engine import trl_trainer as trainer_module
from cpugrpo_edu.engine.guard import Guard, RolloutTally
from cpugrpo_edu.engine.int8 import Drift
from cpugrpo_edu.engine.memory import trim_heap
from cpugrpo_edu.engine.micro_batches import WORKING_SPACE, split_by_length
from cpugrpo_edu.engine.options import LOSS_TYPES, EngineOptions
from cpugrpo_edu.engine.trl_data import to_dataset, trl_rewards
from cpugrpo_edu.engine.trl_internals import Offloaded
from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer, cpu_config
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.ewc import Anchor
from cpugrpo_edu.models.load import add_lora, fingerprint, load_policy
from cpugrpo_edu.rewards import Reward

PROMPTS = ["a", "a b c", "Compute 1 + 2.", "x"]
PROBLEMS = [Problem(text, "mine", "basic", text, "") for text in PROMPTS]
LENGTHS = torch.tensor([5, 2, 4, 1, 3, 5, 1, 2])
REFUSED = (
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"
)
ADVANTAGES = torch.tensor([1.1, -0.6, 0.0, -0.9, 0.7, 0.4, 0.0, -0.7])


def odd_tokens(problem, episode):
    """The share of odd token ids: any random model differs in it."""
    ids = episode.completion_ids
    return sum(i % 2 for i in ids) / len(ids)


def make(policy, folder, options=None, reward=odd_tokens, anchor=None, on_step=None, **config):
    settings = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 6} | config
    trainer = CPUGRPOTrainer(
        policy,
        cpu_config(folder, **settings),
        trl_rewards([Reward("mine", reward)], PROBLEMS),
        to_dataset(PROBLEMS),
        options or EngineOptions(patience=0),
        anchor,
        on_step or (lambda metrics: None),
    )
    trainer.current_gradient_accumulation_steps = 1  # what the training loop sets
    trainer.model.train()
    return trainer


@pytest.fixture(scope="module")
def trainer(tiny_folder, tmp_path_factory):
    """For tests that compute gradients of a fixed batch and never step."""
    return make(load_policy(tiny_folder), tmp_path_factory.mktemp("trainer"))


@pytest.fixture
def batch(trainer):
    """What TRL's generation hands to the loss: prompts padded left, completions right."""
    generator = torch.Generator().manual_seed(0)
    prompt_mask = (torch.arange(4) >= 4 - torch.tensor([[2, 2, 4, 4, 1, 1, 3, 3]]).T).long()
    completion_mask = (torch.arange(5) < LENGTHS[:, None]).long()
    pad = trainer.policy.pad_id
    made = {
        "prompt_ids": torch.randint(5, 300, (8, 4), generator=generator),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(5, 300, (8, 5), generator=generator),
        "completion_mask": completion_mask,
        "advantages": ADVANTAGES.clone(),
        "num_items_in_batch": completion_mask.sum(),
    }
    made["prompt_ids"][prompt_mask == 0] = pad
    made["completion_ids"][completion_mask == 0] = pad
    with torch.no_grad():
        now = log_probs(trainer, made)
    noise = torch.randn(2, 8, 5, generator=generator)
    made["old_per_token_logps"] = now + 0.3 * noise[0]
    made["ref_per_token_logps"] = now + 0.3 * noise[1]
    return made


def log_probs(trainer, inputs):
    return trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        inputs["completion_ids"].shape[1],
    )[0]


def gradient(trainer, inputs, monkeypatch=None, stock=False, **options):
    """Loss and flat gradient: of TRL's own loss on the whole batch, or of ours with options."""
    trainer.model.zero_grad()
    if stock:
        loss = GRPOTrainer.compute_loss(trainer, trainer.model, dict(inputs))
    else:
        monkeypatch.setattr(trainer, "options", EngineOptions(**options))
        loss = trainer.compute_loss(trainer.model, dict(inputs))
    trainer.accelerator.backward(loss)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    return loss.item(), torch.cat([p.grad.flatten() for p in parameters]).clone()


# Micro-batches


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_give_trls_gradient(trainer, batch, monkeypatch, loss_type, level):
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "importance_sampling_level", level)
    if loss_type == "cispo":
        monkeypatch.setattr(trainer, "epsilon_high", 5.0)
    loss, whole = gradient(trainer, batch, stock=True)
    assert whole.norm() > 1e-3
    for options in (
        {"micro_batch": 3, "skip_zero_advantage": False},  # 3, 3 and 2 rows
        {"micro_batch": 4, "skip_zero_advantage": True},  # 4 and 2 of the 6 rows with signal
    ):
        ours, parts = gradient(trainer, batch, monkeypatch, **options)
        assert ours == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_without_old_log_probs_and_in_one_piece(trainer, batch, monkeypatch):
    del batch["old_per_token_logps"]
    _, whole = gradient(trainer, batch, stock=True)
    for size in (1, 8, 100):
        _, parts = gradient(trainer, batch, monkeypatch, micro_batch=size)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_rows_without_advantage_are_skipped_only_where_that_is_exact(trainer, batch, monkeypatch):
    trainer.tally.skipped = trainer.tally.rows = 0
    gradient(trainer, batch, monkeypatch, micro_batch=8)
    assert (trainer.tally.skipped, trainer.tally.rows) == (2, 8)
    monkeypatch.setattr(trainer, "beta", 0.3)
    _, whole = gradient(trainer, batch, stock=True)
    _, parts = gradient(trainer, batch, monkeypatch, micro_batch=3)
    assert trainer.tally.skipped == 2  # no more: their KL term has a gradient
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(trainer, "beta", 0.0)
    per_token = batch["advantages"][:, None].repeat(1, 5)
    assert trainer.rows_with_signal(batch | {"advantages": per_token}).tolist() == [
        0, 1, 3, 4, 5, 7,
    ]  # fmt: skip


def test_no_advantage_at_all_gives_zero_gradients(trainer, batch, monkeypatch):
    trainer.model.zero_grad()
    loss, flat = gradient(
        trainer, batch | {"advantages": torch.zeros(8)}, monkeypatch, micro_batch=3
    )
    assert loss == 0 and not flat.any()


def test_splitting_trims_padding_and_keeps_log_probs(trainer, batch):
    whole = log_probs(trainer, batch).detach()
    keep = torch.tensor([0, 1, 3, 4, 6, 7])
    seen, widths = [], []
    for micro in split_by_length(batch, keep, 2):
        # The kept rows differ in their advantages, which so tell them apart.
        row = [next(i for i in keep.tolist() if ADVANTAGES[i] == a) for a in micro["advantages"]]
        seen += row
        longest = int(LENGTHS[row].max())
        assert micro["completion_ids"].shape[1] == longest
        assert micro["old_per_token_logps"].shape == micro["completion_ids"].shape
        assert micro["prompt_mask"].sum(1).max() == micro["prompt_ids"].shape[1]
        assert micro["num_items_in_batch"] == batch["num_items_in_batch"]
        ours = log_probs(trainer, micro).detach()
        mask = micro["completion_mask"].bool()
        torch.testing.assert_close(ours[mask], whole[row][:, :longest][mask], atol=1e-5, rtol=1e-5)
        widths.append(int((micro["prompt_mask"].sum(1) + micro["completion_mask"].sum(1)).max()))
    assert sorted(seen) == keep.tolist()
    assert widths == sorted(widths)  # like lengths together, short ones first


def test_checkpointing_changes_no_gradient(trainer, batch, monkeypatch):
    _, plain = gradient(trainer, batch, monkeypatch, micro_batch=4)
    calls = []
    layer = trainer.model.model.layers[0]
    # When it enters, since computing anew stops as soon as all that is needed is there.
    handle = layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        _, again = gradient(trainer, batch, monkeypatch, micro_batch=4)
    finally:
        trainer.model.gradient_checkpointing_disable()
        handle.remove()
    assert len(calls) == 4  # two micro-batches, each computed twice
    torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-5)


# Memory


def test_the_plan_follows_the_memory_says_so_and_keeps_the_gradient(trainer, batch, monkeypatch):
    said = []
    monkeypatch.setattr(trainer, "say", said.append)
    monkeypatch.setattr(trainer, "tally", RolloutTally())
    free = {"bytes": 2**40}
    monkeypatch.setattr(trainer, "free_memory", lambda: free["bytes"])
    _, whole = gradient(trainer, batch, monkeypatch)
    one = trainer.sequence_bytes(9, False)
    for free["bytes"], size in (
        (int(WORKING_SPACE * one * 2 / 0.8) + 9, 2),
        (int(WORKING_SPACE * one * 2 / 0.8) + 9, 2),
        (0, 1),
    ):
        _, parts = gradient(trainer, batch, monkeypatch)
        assert trainer.tally.micro_batches[-1] == size
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    assert trainer.tally.micro_batches[0] == 8 and trainer.tally.shrunk == 3
    assert len(said) == 2  # once each time it changes
    assert "micro-batches of 2 instead of 8" in said[0] and "of 1 instead of 8" in said[1]
    assert trainer.micro_batch_size(batch) == 1
    monkeypatch.setattr(trainer, "options", EngineOptions(micro_batch=3))
    assert trainer.micro_batch_size(batch) == 3  # as asked


def test_the_memory_limit_counts_what_is_held_and_what_will_come(trainer, monkeypatch):
    trim_heap()  # what earlier tests freed, as the trainer does
    held, limit = psutil.Process().memory_info().rss, 2**45
    monkeypatch.setattr("cpugrpo_edu.engine.memory.available_memory", lambda: 2**60)
    monkeypatch.setattr(trainer, "options", EngineOptions(memory_limit=limit))
    trainer.model.zero_grad(set_to_none=True)
    monkeypatch.setattr(trainer.state, "global_step", 0)
    before = trainer.free_memory()
    monkeypatch.setattr(trainer.state, "global_step", 1)
    weights = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    assert trainer.free_memory() - before == pytest.approx(2 * weights, abs=2**26)
    assert limit - trainer.free_memory() == pytest.approx(held, abs=2**28)
    monkeypatch.setattr(trainer, "options", EngineOptions(memory_limit=held // 2))
    assert trainer.free_memory() == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(REFUSED)])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_refused_memory_is_tried_again_in_halves(trainer, batch, monkeypatch, where, error):
    """In the second micro-batch, after one whose gradient is already there."""
    trainer.model.zero_grad()
    loss, whole = gradient(trainer, batch, monkeypatch, micro_batch=4)
    monkeypatch.setattr(trainer, "tally", RolloutTally())
    monkeypatch.setattr(trainer, "micro_batch_limit", None)
    said, calls = [], []
    monkeypatch.setattr(trainer, "say", said.append)
    owner, name = (
        (trainer, "_compute_loss")
        if where == "forward"
        else (
            trainer.accelerator,
            "backward",
        )
    )
    original = getattr(owner, name)

    def refuse_the_second(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            if where == "backward":  # half of the work is done when it fails
                next(iter(trainer.model.parameters())).grad.add_(1.0)
            raise error
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, refuse_the_second)
    rows = {key: len(values) for key, values in trainer._metrics["train"].items()}
    trainer.model.zero_grad()
    monkeypatch.setattr(trainer, "options", EngineOptions(micro_batch=4))
    again = trainer.compute_loss(trainer.model, dict(batch))
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    ours = torch.cat([p.grad.flatten() for p in parameters])
    assert again.item() == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-5)
    assert trainer.tally.refusals == 1 and trainer.micro_batch_limit == 2
    assert "trying again with 2" in said[0]
    added = {k: len(v) - rows.get(k, 0) for k, v in trainer._metrics["train"].items()}
    assert set(added.values()) <= {0, 3}  # 6 rows with signal in micro-batches of 2, counted once
    assert trainer.micro_batch_size(batch) == 2  # the next step begins smaller


def test_refused_memory_keeps_gradients_accumulated_before(trainer, batch, monkeypatch):
    monkeypatch.setattr(trainer, "micro_batch_limit", None)
    _, once = gradient(trainer, batch, monkeypatch, micro_batch=8)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    original, calls = trainer._compute_loss, []

    def refuse_the_first(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return original(*arguments)

    monkeypatch.setattr(trainer, "_compute_loss", refuse_the_first)
    trainer.compute_loss(trainer.model, dict(batch))
    ours = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(ours, 2 * once, atol=1e-5, rtol=1e-5)


def test_memory_refused_for_one_completion_ends_with_a_sentence(trainer, batch, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError(REFUSED)

    monkeypatch.setattr(trainer, "micro_batch_limit", None)
    monkeypatch.setattr(trainer, "_compute_loss", refuse)
    with pytest.raises(UserError, match="refused memory for a single completion"):
        gradient(trainer, batch, monkeypatch, micro_batch=8)

    def fail(*arguments):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(trainer, "micro_batch_limit", None)
    monkeypatch.setattr(trainer, "_compute_loss", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        gradient(trainer, batch, monkeypatch, micro_batch=8)


# Rollouts


def test_each_prompt_is_prefilled_once_and_answered_in_order(trainer, monkeypatch):
    import cpugrpo_edu.engine.trl_trainer as module

    calls = []
    original = module.sample

    def spy(model, prompts, copies, *args, **kwargs):
        calls.append((list(prompts), copies))
        groups = original(model, prompts, copies, *args, **kwargs)
        for prompt, group in zip(prompts, groups, strict=True):
            for i, episode in enumerate(group.episodes):
                episode.completion_ids = [prompt[0], i]
        return groups

    monkeypatch.setattr(module, "sample", spy)
    monkeypatch.setattr(trainer, "encode", list)
    prompts = [[50, 51, 52], [60], [70, 71]]
    repeated = [prompt for prompt in prompts for _ in range(2)]
    answer = trainer.rollout(repeated)
    assert calls.pop() == (prompts, 2)
    assert answer["prompt_ids"] == repeated
    assert answer["completion_ids"] == [[p[0], i] for p in prompts for i in range(2)]
    assert len(answer["logprobs"]) == 6
    # A group cut in two (several processes): every prompt counts alone.
    answer = trainer.rollout(repeated[1:])
    assert calls.pop() == (repeated[1:], 1)
    assert answer["prompt_ids"] == repeated[1:]
    assert [i[0] for i in answer["completion_ids"]] == [p[0] for p in repeated[1:]]


def test_prompts_are_encoded_as_trl_does(trainer):
    talks = [row["prompt"] for row in trainer.train_dataset]
    assert [trainer.encode(talk) for talk in talks] == trainer._tokenize_prompts(talks)[0]
    assert [trainer.encode(text) for text in PROMPTS] == trainer._tokenize_prompts(PROMPTS)[0]


@pytest.mark.parametrize(
    ("native", "far", "chosen", "words"),
    [
        (True, (), "packed", ["rollouts use the INT8 copy"]),
        (True, ("packed",), "bf16", ["so rollouts use a bfloat16 copy", "use the bfloat16 copy:"]),
        (True, ("packed", "bf16"), None, ["a bfloat16 copy", "so rollouts use the float weights"]),
        (False, ("packed",), None, ["so rollouts use the float weights"]),
    ],
)
def test_a_copy_that_is_another_policy_is_not_sampled_from(
    tiny_policy, tmp_path, monkeypatch, native, far, chosen, words
):
    said = []
    options = EngineOptions(int8_rollouts=True, kernel="packed", patience=0)
    trainer = make(tiny_policy, tmp_path, options)
    trainer.say = said.append
    monkeypatch.setattr(trainer_module, "native_bfloat16", lambda: native)
    monkeypatch.setattr(
        trainer_module,
        "measure_drift",
        lambda *given: Drift(1.0 if trainer.copy_kind in far else 0.001, 0.5, 0.05),
    )
    rows = [r for i in range(2) for r in [trainer.train_dataset[i]] * 2]
    output = trainer.with_old_log_probs(trainer._generate_and_score_completions(rows))
    assert trainer.copy_kind == chosen
    assert (trainer.rollout_copy is None) is (chosen is None)
    assert ("old_per_token_logps" in output) is (chosen is not None)
    assert len(said) == len(words) and all(w in s for w, s in zip(words, said, strict=True))
    trainer._generate_and_score_completions(rows)
    assert len(said) == len(words)  # measured once


@pytest.mark.parametrize("correct", [True, False])
def test_int8_rollouts(tiny_policy, tmp_path, correct):
    options = EngineOptions(int8_rollouts=True, importance_correction=correct, patience=0)
    trainer = make(tiny_policy, tmp_path, options)
    rows = [r for i in range(2) for r in [trainer.train_dataset[i]] * 2]
    output = trainer.with_old_log_probs(trainer._generate_and_score_completions(rows))
    assert "sampling_per_token_logps" not in output
    assert ("old_per_token_logps" in output) is correct
    if correct:
        mask = output["completion_mask"].bool()
        served = log_probs_of(trainer.rollout_copy, output)[mask]
        live = log_probs_of(trainer.model, output)[mask]
        sampled = output["old_per_token_logps"][mask]
        # INT8 scores each activation tensor in its own range, so a batch is not token by token.
        assert (sampled - live).abs().max() > 0
        assert (served - sampled).abs().mean() < 0.1 and (sampled - live).abs().mean() < 0.5
    copy = trainer.rollout_copy
    with torch.no_grad():
        tiny_policy.model.model.layers[0].mlp.up_proj.weight.mul_(2)
    before = copy.model.layers[0].mlp.up_proj.dequantized().clone()
    assert trainer.sampling_model() is copy
    after = copy.model.layers[0].mlp.up_proj.dequantized()
    torch.testing.assert_close(after, 2 * before)


@torch.no_grad()
def log_probs_of(model, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    width = inputs["completion_ids"].shape[1]
    chosen = logits[:, -width - 1 : -1].log_softmax(-1)
    return chosen.gather(-1, inputs["completion_ids"][:, :, None]).squeeze(-1)


# Steps


@pytest.mark.parametrize("bf16", [False, True])
def test_packed_passes_follow_trls_option(tiny_policy, tmp_path, monkeypatch, bf16):
    real, asked = trainer_module.packed_log_probs, []

    def spy(*arguments):
        asked.append(arguments[7])
        return real(*arguments)

    monkeypatch.setattr(trainer_module, "packed_log_probs", spy)
    before = [p.detach().clone() for p in tiny_policy.model.parameters()]
    options = EngineOptions(share_prefix=True, patience=0)
    settings = {"max_steps": 1, "beta": 0.1, "learning_rate": 1e-3, "bf16": bf16}
    make(tiny_policy, tmp_path, options, **settings).train()
    assert asked and set(asked) == {bf16}
    after = list(tiny_policy.model.parameters())
    assert all(p.dtype == torch.float32 for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(after, before))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_step_changes_what_is_trained_and_reports_it(tiny_folder, tmp_path, lora_rank):
    policy = load_policy(tiny_folder, lora_rank=lora_rank)
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    rows = []
    trainer = make(policy, tmp_path, on_step=rows.append, max_steps=2, learning_rate=1e-2)
    trainer.train()
    moved = {n for n, p in policy.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert rows[0]["rollout/tokens_per_second"] > 0 and trainer.tally.tokens > 0
    assert not list(tmp_path.glob("checkpoint-*"))


def test_another_architecture_trains_too(tiny_policy, tmp_path):
    """GPT-2: learned positions, fused projections, no estimate of its memory."""
    config = GPT2Config(vocab_size=320, n_positions=96, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    tiny_policy.model = add_lora(GPT2LMHeadModel(config), 2)
    before = fingerprint(tiny_policy.model)
    rows = []
    make(tiny_policy, tmp_path, on_step=rows.append, max_steps=1, learning_rate=1e-2).train()
    assert rows[0]["grad_norm"] > 0 and fingerprint(tiny_policy.model) != before


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_ewc_pulls_once_a_step_and_before_clipping(tiny_policy, tmp_path, micro_batch):
    """Without rewards' signal the whole gradient is EWC's: strength * F * (theta - theta*)."""
    parameters = dict(tiny_policy.model.named_parameters())
    anchor = Anchor(
        {n: p.detach() - 0.01 for n, p in parameters.items()},
        {n: torch.full_like(p, 2.0) for n, p in parameters.items()},
    )
    numbers = sum(p.numel() for p in parameters.values())
    start = {n: p.detach().clone() for n, p in parameters.items()}
    rows = []
    trainer = make(
        tiny_policy,
        tmp_path,
        EngineOptions(
            patience=0, ewc_strength=5.0, micro_batch=micro_batch, skip_zero_advantage=False
        ),
        reward=constant,
        anchor=anchor,
        on_step=rows.append,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=1.0,
    )
    trainer.train()
    force = 5.0 * 2.0 * 0.01
    assert rows[0]["ewc_penalty"] == pytest.approx(5.0 / 2 * 2.0 * 0.01**2 * numbers, rel=1e-3)
    assert rows[0]["grad_norm"] == pytest.approx(force * numbers**0.5, rel=1e-3)
    moved = torch.cat([(start[n] - p).flatten() for n, p in parameters.items()])
    assert moved.norm().item() == pytest.approx(0.1, rel=1e-2)  # clipped to norm 1, rate 0.1


def constant(problem, episode):
    return 0.5


def test_a_stop_request_saves_a_checkpoint(tiny_policy, tmp_path):
    def stop(metrics):
        if metrics["step"] == 2:
            trainer.should_stop = lambda: True

    trainer = make(tiny_policy, tmp_path, on_step=stop, max_steps=3)
    seeds = {}

    def spy(prompts, trainer):
        seeds[trainer.state.global_step] = trainer.rollout_seed()
        return trainer.rollout(prompts)

    trainer.rollout_func = spy
    trainer.train()
    assert trainer.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    assert len(seeds) == len(set(seeds.values())) == 2  # no two steps draw alike


# What goes wrong


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda problem, episode: math.nan, "finite number"),
        (lambda problem, episode: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_broken_reward_stops_training(tiny_policy, tmp_path, reward, words):
    before = fingerprint(tiny_policy.model)
    trainer = make(tiny_policy, tmp_path, reward=reward, max_steps=1)
    with pytest.raises(UserError, match=words):
        trainer.train()
    assert fingerprint(tiny_policy.model) == before


def test_a_nan_loss_stops_training(tiny_policy, tmp_path):
    trainer = make(tiny_policy, tmp_path, max_steps=3)
    original = trainer._compute_loss
    trainer._compute_loss = lambda *args: original(*args) * math.nan
    with pytest.raises(UserError, match="loss is NaN"):
        trainer.train()


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        (True, "in 2 steps in a row every group's rewards"),
        (False, "all completions were cut at the length limit in 2 steps in a row"),
    ],
)
def test_without_signal_training_stops_after_the_patience(
    tiny_policy, tmp_path, monkeypatch, ending, words
):
    import cpugrpo_edu.engine.trl_trainer as module

    original = module.sample
    last = tiny_policy.tokenizer.eos_token_id if ending else 7

    def ended(*args, **kwargs):
        groups = original(*args, **kwargs)
        for episode in (episode for group in groups for episode in group.episodes):
            episode.completion_ids[-1] = last
        return groups

    monkeypatch.setattr(module, "sample", ended)
    rows = []
    trainer = make(
        tiny_policy,
        tmp_path,
        EngineOptions(patience=2),
        reward=constant,
        on_step=rows.append,
        max_steps=5,
    )
    with pytest.raises(UserError, match=words):
        trainer.train()
    assert len(rows) == 2


def test_no_data(tiny_policy, tmp_path):
    with pytest.raises(UserError, match="training data is empty"):
        CPUGRPOTrainer(tiny_policy, cpu_config(tmp_path), [], Dataset.from_dict({"prompt": []}))


DEAD = {"loss": 0.0, "frac_reward_zero_std": 1.0}
CUT = {"loss": 0.0, "completions/clipped_ratio": 1.0}
FINE = {"loss": 0.1, "frac_reward_zero_std": 0.9, "completions/clipped_ratio": 0.9}


@pytest.mark.parametrize(
    ("bad", "words"), [(DEAD, "rewards were all equal"), (CUT, "cut at the length")]
)
def test_guard_counts_steps_in_a_row(bad, words):
    guard = Guard(3)
    for metrics in (bad, bad, FINE, bad, bad):
        guard.check(metrics)
    with pytest.raises(UserError, match=f"{words}|in 3 steps in a row.*{words}"):
        guard.check(bad)


def test_guard_with_patience_0_stops_only_for_nan():
    guard = Guard(0)
    for _ in range(50):
        guard.check(DEAD | CUT)
    guard.check({})
    with pytest.raises(UserError, match="lower the learning rate"):
        guard.check({"loss": math.nan})


# Configuration


def test_the_configuration_works_where_the_stock_one_refuses(tmp_path):
    with pytest.raises(ValueError, match="bf16"):
        GRPOConfig(output_dir=str(tmp_path), bf16=True)
    config = cpu_config(tmp_path, prompts_per_step=3, num_generations=4, beta=0.1)
    assert config.use_cpu and not config.bf16 and not config.fp16
    assert (config.per_device_train_batch_size, config.num_generations) == (12, 4)
    assert config.beta == 0.1 and config.loss_type == "dapo"
    assert not config.logging_nan_inf_filter  # else the guard would never see a NaN


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_generations": 1}, "num_generations is 1; give at least 2"),
        ({"num_generations": 0}, "num_generations is 0"),
        ({"prompts_per_step": 0}, "prompts_per_step is 0; give at least 1"),
        ({"loss_type": "ppo"}, "unknown loss type 'ppo'; allowed are grpo, bnpo"),
        ({"importance_sampling_level": "word"}, "unknown importance level 'word'"),
    ],
)
def test_bad_settings(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        cpu_config(tmp_path, **settings)


def test_bfloat16_weights_are_not_trained(tiny_folder, tmp_path):
    """AdamW's step of about the learning rate is below the rounding of most of them."""
    with pytest.raises(UserError, match="load the model in float32, or train LoRA"):
        make(load_policy(tiny_folder, dtype="bfloat16"), tmp_path)
    make(load_policy(tiny_folder, dtype="bfloat16", lora_rank=2), tmp_path)


def test_a_step_says_how_far_it_is(tiny_folder, tmp_path):
    trainer = make(
        load_policy(tiny_folder), tmp_path, EngineOptions(patience=0, micro_batch=2), max_steps=1
    )
    seen = []
    trainer.on_part = lambda *part: seen.append(part)
    trainer.train()
    rollouts = [(done, total) for what, done, total in seen if what == "rollouts"]
    assert rollouts[-1] == (2, 2)
    batches = [(done, total) for what, done, total in seen if what == "micro-batches"]
    assert batches and batches == [(i + 1, batches[0][1]) for i in range(batches[0][1])]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_batch_that_is_masked_out_teaches_nothing(trainer, batch, monkeypatch, loss_type):
    """With TRL's mask_truncated_completions, when all were truncated: 0, not 0 / 0."""
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    batch["num_items_in_batch"] = torch.tensor(0)
    for micro_batch in (2, 8):
        loss, found = gradient(trainer, batch, monkeypatch, micro_batch=micro_batch)
        stock, wanted = gradient(trainer, batch, stock=True)
        assert loss == stock == 0 and not found.any() and not wanted.any()


# Groups without signal, and settings that would be wrong without a word


@pytest.mark.parametrize("value", [0.5, 0.7, 1 / 3])
def test_equal_rewards_teach_nothing_whatever_their_value(tiny_folder, tmp_path, value):
    rows = []
    policy = load_policy(tiny_folder)
    before = fingerprint(policy.model)
    trainer = make(
        policy,
        tmp_path,
        reward=lambda problem, episode: value,
        on_step=rows.append,
        num_generations=8,
        max_steps=2,
        learning_rate=1e-2,
    )
    trainer.train()
    assert [row["frac_reward_zero_std"] for row in rows] == [1.0, 1.0]
    assert trainer.tally.skipped == trainer.tally.rows
    assert fingerprint(policy.model) == before


@pytest.mark.parametrize("name, value", [("entropy_coef", 0.1), ("top_k", 1), ("min_p", 0.5)])
def test_what_rollouts_or_micro_batches_would_change_is_refused(tmp_path, name, value):
    with pytest.raises(UserError, match=f"{name} is {value}; the CPU trainer knows only"):
        cpu_config(tmp_path, **{name: value})


def test_top_p_has_no_importance_correction(tiny_folder, tmp_path):
    with pytest.raises(UserError, match="top_p is 0.5"):
        make(load_policy(tiny_folder), tmp_path, EngineOptions(int8_rollouts=True), top_p=0.5)


def test_cispo_cuts_the_ratio_at_five(tmp_path):
    assert cpu_config(tmp_path, loss_type="cispo").epsilon_high == 5.0
    assert cpu_config(tmp_path, loss_type="cispo", epsilon_high=2.0).epsilon_high == 2.0
    assert cpu_config(tmp_path).epsilon_high is None


def test_an_offloaded_reference_is_the_same_reference(tiny_folder, tmp_path):
    ends = []
    for offload in (False, True):
        policy = load_policy(tiny_folder)
        options = EngineOptions(patience=0, spare_memory=offload)
        rows = []
        make(
            policy,
            tmp_path,
            options,
            on_step=rows.append,
            beta=0.5,
            max_steps=3,
            learning_rate=1e-2,
        ).train()
        assert rows[-1]["kl"] > 0
        ends.append([p.detach().clone() for p in policy.model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_an_offloaded_model_ends_with_its_use(tiny_folder, tmp_path, monkeypatch, no_collection):
    loaded = []
    load = Offloaded.load

    def remember(self, temperature):
        model = load(self, temperature)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Offloaded, "load", remember)
    options = EngineOptions(patience=0, spare_memory=True)
    trainer = make(load_policy(tiny_folder), tmp_path, options, beta=0.5)
    ids = torch.randint(3, 300, (2, 8))
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, torch.ones_like(ids), 4)
    assert [model() for model in loaded] == [None]
