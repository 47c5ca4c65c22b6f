"""The readable loop: TRL's step exactly, a loop of one's own in its place, and it learns."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from transformers import TrainerCallback

from cpugrpo_edu.data import Episode, Group
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.trl_data import to_dataset, trl_rewards
from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer, cpu_config
from cpugrpo_edu.evaluate import evaluate
from cpugrpo_edu.models.load import fingerprint, load_policy
from cpugrpo_edu.policy import group_advantages, grpo_loss, token_log_probs
from cpugrpo_edu.record.stats import mcnemar
from cpugrpo_edu.rewards import Reward, give_rewards
from cpugrpo_edu.sample import Sampling, rollout
from cpugrpo_edu.tasks import make_problems
from cpugrpo_edu.train import Batch, Settings, make_batch, measure, train, update

PROBLEMS = make_problems("arithmetic", "basic", "train", 4)
LENGTH, GROUP = 8, 4
ENDS = list(range(0, 320, 6))
"""A random model seldom ends by itself: these tokens make completions of every length."""


def odd_tokens(problem, episode):
    """The share of odd token ids: any random model differs in it."""
    return sum(i % 2 for i in episode.completion_ids) / len(episode.completion_ids)


ODD = [Reward("odd_tokens", odd_tokens)]


class KeepGradient(TrainerCallback):
    """The gradient as the optimizer gets it, clipped."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradient = [p.grad.clone() for p in model.parameters()]


def trl_step(folder, model_folder, stale=0.3, **config):
    """One step of the product's trainer, with all that it was made of.

    The old log-probs are ``stale``: changed at random, so that ratios differ from 1 and some are
    clipped.
    """
    policy = load_policy(model_folder)
    policy.model.generation_config.eos_token_id = ENDS
    rows = []
    settings = {"prompts_per_step": len(PROBLEMS), "num_generations": GROUP, "max_steps": 1}
    trainer = CPUGRPOTrainer(
        policy,
        cpu_config(folder, **settings, max_completion_length=LENGTH, **config),
        trl_rewards(ODD, PROBLEMS),
        to_dataset(PROBLEMS, policy.system),
        EngineOptions(patience=0, micro_batch=5),
        on_step=rows.append,
    )
    trainer.add_callback(kept := KeepGradient())
    generate, compute = trainer._generate_and_score_completions, trainer.compute_loss
    taken = {"before": [p.detach().clone() for p in policy.model.parameters()]}

    def generate_stale(inputs):
        output = generate(inputs)
        ids, mask = (
            torch.cat([output[f"prompt_{name}"], output[f"completion_{name}"]], 1)
            for name in ("ids", "mask")
        )
        width = output["completion_ids"].shape[1]
        with torch.no_grad():
            now = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0]
        noise = torch.randn(now.shape, generator=torch.Generator().manual_seed(7))
        return output | {"old_per_token_logps": now + stale * noise}

    def keep_inputs(model, inputs, *arguments, **named):
        taken["inputs"] = inputs
        loss = compute(model, inputs, *arguments, **named)
        taken["loss"] = loss.item()
        return loss

    trainer._generate_and_score_completions, trainer.compute_loss = generate_stale, keep_inputs
    trainer.train()
    return taken | {"policy": policy, "trainer": trainer, "row": rows[0], "kept": kept.gradient}


def as_batch(inputs) -> Batch:
    """What TRL hands to its loss, as the readable loop's batch."""
    return Batch(
        inputs["prompt_ids"],
        inputs["completion_ids"],
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        inputs["old_per_token_logps"],
        inputs["advantages"],
    )


@pytest.mark.parametrize("max_grad_norm", [0.3, 100.0])  # clipped, and not
@pytest.mark.parametrize("reduction", ["dapo", "grpo", "dr_grpo"])
def test_a_step_is_the_step_of_the_products_trainer(
    tiny_folder, tmp_path, reduction, max_grad_norm
):
    """Same batch: same loss, same gradient, and after AdamW the same weights."""
    rate = 1e-3
    config = {"loss_type": reduction, "learning_rate": rate, "max_grad_norm": max_grad_norm}
    trl = trl_step(tmp_path, tiny_folder, **config)
    batch = as_batch(trl["inputs"])
    assert len(batch.mask.sum(1).unique()) > 3  # else the reductions would not differ
    for micro_batch in (1, 3, 5, 128):
        settings = Settings(
            max_new_tokens=LENGTH,
            learning_rate=rate,
            reduction=reduction,
            max_grad_norm=max_grad_norm,
            micro_batch=micro_batch,
        )
        model = load_policy(tiny_folder).model.train()
        parameters = list(model.parameters())
        for parameter, start in zip(parameters, trl["before"], strict=True):
            assert torch.equal(parameter, start)
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        gradient = []
        optimizer.register_step_pre_hook(
            lambda *_, g=gradient, p=parameters: g.extend(q.grad.clone() for q in p)
        )
        metrics = update(model, batch, optimizer, settings)
        assert metrics["loss"] == pytest.approx(trl["loss"], abs=1e-5)
        assert metrics["grad_norm"] == pytest.approx(trl["row"]["grad_norm"], rel=1e-4)
        for ours, theirs in zip(gradient, trl["kept"], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        apart = [
            (p - q).abs().max()
            for p, q in zip(parameters, trl["policy"].model.parameters(), strict=True)
        ]
        moved = [(p - q).abs().max() for p, q in zip(parameters, trl["before"], strict=True)]
        assert max(moved) > 0.9 * rate
        assert max(apart) < 1e-5


def rows_of(batch: Batch) -> dict[tuple, list[float]]:
    """(advantage, old log-probs) of each row by its prompt and completion: no order, no padding."""
    prompt_mask = batch.attention_mask[:, : batch.prompt_ids.shape[1]].bool()
    rows: dict[tuple, list[float]] = {}
    for row, (mask, advantage) in enumerate(zip(batch.mask.bool(), batch.advantages.tolist())):
        prompt = batch.prompt_ids[row][prompt_mask[row]].tolist()
        completion = batch.completion_ids[row][mask].tolist()
        old = batch.old_log_probs[row]
        assert not old[~mask].any()
        rows[tuple(prompt), tuple(completion)] = [advantage, *old[mask].tolist()]
    return rows


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_the_batch_and_its_metrics_are_those_of_the_products_trainer(tiny_folder, tmp_path, scale):
    """The same rollouts: the same prompts, completions, masks, old log-probs and advantages."""
    trl = trl_step(tmp_path, tiny_folder, stale=0.0, scale_rewards=scale)
    policy, groups = trl["policy"], trl["trainer"].last_groups
    by_prompt = {tuple(policy.encode_problem(problem)): problem for problem in PROBLEMS}
    for group in groups:
        group.problem = by_prompt[tuple(group.prompt_ids)]
    give_rewards(groups, ODD)
    ours = rows_of(make_batch(groups, scale, policy.pad_id))
    theirs = rows_of(as_batch(trl["inputs"]))
    assert ours.keys() == theirs.keys() and len(ours) > GROUP
    for row, values in ours.items():
        assert values == pytest.approx(theirs[row], abs=1e-5)
    metrics, row = measure(groups), trl["row"]
    assert metrics["reward"] == pytest.approx(row["reward"], abs=1e-6)
    assert metrics["frac_zero_std"] == row["frac_reward_zero_std"]
    assert metrics["completion_length"] == row["completions/mean_length"]
    assert metrics["reward_std"] == pytest.approx(row["reward_std"], abs=1e-6)


def test_bfloat16_weights_are_not_trained(tiny_folder):
    policy = load_policy(tiny_folder, dtype="bfloat16")
    with pytest.raises(ValueError, match="load them in float32, or use LoRA"):
        train(policy, PROBLEMS, ODD, steps=1, settings=Settings(max_new_tokens=4))


def test_a_batch_by_hand():
    groups = [
        Group([5, 6], [Episode([7], [-1.0], reward=1.0), Episode([8, 9], [-2.0, -3.0])]),
        Group([4], [Episode([1, 2, 3], [-1.0] * 3, reward=2.0), Episode([3], [-4.0], reward=2.0)]),
    ]
    batch = make_batch(groups, "none", pad_id=0)
    assert batch.prompt_ids.tolist() == [[5, 6], [5, 6], [0, 4], [0, 4]]
    assert batch.completion_ids.tolist() == [[7, 0, 0], [8, 9, 0], [1, 2, 3], [3, 0, 0]]
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1],
        [0, 1, 1, 0, 0],
    ]
    assert batch.mask.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch.old_log_probs.tolist() == [[-1, 0, 0], [-2, -3, 0], [-1] * 3, [-4, 0, 0]]
    assert batch.advantages.tolist() == [0.5, -0.5, 0, 0]
    parts = list(batch.split(3))
    assert [len(part.advantages) for part in parts] == [3, 1]
    for name in ("prompt_ids", "completion_ids", "attention_mask", "old_log_probs", "advantages"):
        whole = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(whole, getattr(batch, name))
    assert measure(groups) == {
        "reward": 1.25,
        "reward_std": pytest.approx((11 / 12) ** 0.5),  # of 1, 0, 2, 2
        "frac_zero_std": 0.5,
        "completion_length": 7 / 4,
    }


@pytest.mark.parametrize("value", [0.5, 0.7, 1 / 3])
def test_equal_rewards_teach_nothing_whatever_their_value(tiny_policy, value):
    """In float32 the mean of 8 equal rewards of 0.7 is another number, hence float64."""
    before = fingerprint(tiny_policy.model)
    settings = Settings(prompts_per_step=2, completions=8, max_new_tokens=4, learning_rate=1e-2)
    same = [Reward("same", lambda problem, episode: value)]
    [row] = train(tiny_policy, PROBLEMS, same, 1, settings)
    assert row["frac_zero_std"] == 1 and row["grad_norm"] == 0
    assert fingerprint(tiny_policy.model) == before


# --- the whole loop -----------------------------------------------------------------------

SHORT = Settings(
    prompts_per_step=3, completions=4, max_new_tokens=6, learning_rate=1e-3, seed=5, micro_batch=5
)


def loop_of_ones_own(policy, problems, rewards, steps, settings, on_step=lambda metrics: None):
    """GRPO again from the formulas alone, with the signature of ``train.train``."""
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    shuffle, history = random.Random(settings.seed), []
    policy.model.train()
    for step in range(1, steps + 1):
        chosen = shuffle.sample(problems, settings.prompts_per_step)
        sampling = Sampling(settings.max_new_tokens, seed=settings.seed * 1_000_003 + step)
        groups = rollout(policy, chosen, settings.completions, sampling, rewards)
        tokens = sum(len(e.completion_ids) for g in groups for e in g.episodes)
        total = 0.0
        for group in groups:
            advantages = group_advantages(torch.tensor([e.reward for e in group.episodes]))
            for episode, advantage in zip(group.episodes, advantages, strict=True):
                prompt = torch.tensor([group.prompt_ids])
                completion = torch.tensor([episode.completion_ids])
                mask = torch.ones(1, prompt.shape[1] + completion.shape[1])
                log_probs = token_log_probs(policy.model, prompt, completion, mask)
                old = torch.tensor([episode.logprobs])
                loss = grpo_loss(
                    log_probs, old, advantage[None], torch.ones_like(old), total_tokens=tokens
                )
                loss.backward()
                total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        reward = sum(e.reward for g in groups for e in g.episodes) / (
            len(groups) * len(group.episodes)
        )
        history.append({"step": step, "loss": total, "reward": reward})
        on_step(history[-1])
    return history


def test_a_loop_of_ones_own_takes_its_place(tiny_folder):
    """One row at a time, without padding: two steps end at the same weights."""
    ends, told = [], []
    for loop in (train, loop_of_ones_own):
        policy = load_policy(tiny_folder)
        policy.model.generation_config.eos_token_id = ENDS
        start = [p.detach().clone() for p in policy.model.parameters()]
        rows = []
        assert loop(policy, PROBLEMS, ODD, 2, SHORT, rows.append) == rows
        assert [row["step"] for row in rows] == [1, 2]
        moved = [(p - q).abs().max() for p, q in zip(policy.model.parameters(), start, strict=True)]
        assert max(moved) > SHORT.learning_rate
        ends.append([p.detach() for p in policy.model.parameters()])
        told.append(rows)
    for ours, theirs in zip(*told, strict=True):
        for name in ("loss", "reward"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-6)
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_the_same_seed_gives_the_same_run_and_another_another(tiny_folder):
    def run(seed, **changes):
        policy = load_policy(tiny_folder)
        settings = dataclasses.replace(SHORT, seed=seed, **changes)
        return train(policy, PROBLEMS, ODD, 2, settings), fingerprint(policy.model)

    first = run(1)
    assert first == run(1) and first[1] != run(2)[1]
    assert first[1] != run(1, learning_rate=1e-4)[1] != run(1, eps=0.0)[1]


def test_only_what_may_be_trained_moves_and_few_problems_are_enough(tiny_folder):
    policy = load_policy(tiny_folder, lora_rank=2)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    settings = dataclasses.replace(SHORT, prompts_per_step=100)
    rows = train(policy, PROBLEMS[:2], ODD, 2, settings)
    moved = {n for n, p in policy.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert all(row["grad_norm"] > 0 for row in rows)
    assert policy.model.training


def test_nothing_to_reward_is_refused(tiny_policy):
    for rewards in ([], [Reward("odd_tokens", odd_tokens, 0.0)]):
        with pytest.raises(ValueError, match="no reward has a weight above 0"):
            train(tiny_policy, PROBLEMS, rewards, 1, SHORT)


@pytest.mark.slow
def test_the_bundled_model_learns_in_fifteen_steps():
    """Paired on 100 problems that it never trained on: far beyond chance."""
    policy = load_policy()
    held_out = make_problems("arithmetic", "basic", "eval", 100)
    before = evaluate(policy, held_out, "before")
    rows = train(policy, make_problems("arithmetic", "basic", "train", 256), steps=15)
    after = evaluate(policy, held_out, "after")
    assert sum(after.correct) - sum(before.correct) >= 30
    assert mcnemar(before.correct, after.correct) < 1e-6
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.3
