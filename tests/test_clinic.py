"""The clinic of chapter 7: its faults do what they say, and its pictures say what they show."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from cpugrpo_edu.data import Episode
from cpugrpo_edu.engine.trl_data import to_dataset
from cpugrpo_edu.notebook import clinic
from cpugrpo_edu.sample import left_pad


def log(n, **more):
    """n steps of a log whose reward is the step."""
    return [
        {
            "step": i + 1,
            "reward": float(i + 1),
            "rewards/correct_answer/mean": 0.5,
            "loss": 0.0,
            "grad_norm": 1.0,
            "entropy": 0.5,
            "completions/mean_length": 5.0,
            "completions/clipped_ratio": 0.25,
            "frac_reward_zero_std": 1.0,
            "kl": 0.0,
            "gap": 1e-6,
            **more,
        }
        for i in range(n)
    ]


def test_every_fault_was_met_by_somebody_or_is_called_constructed():
    cases = clinic.cases()
    assert len({case.name for case in cases}) == len(cases) == 10
    for case in cases:
        assert case.made and case.sign and case.cure and case.problems
        assert not case.source or re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", case.source)
    assert [case.name for case in cases if not case.source] == [
        "one reward term drowns the others",
        "sign of the KL term reversed",
    ]


def test_right_pad_puts_the_padding_on_the_other_side():
    ids, mask = clinic.right_pad([[5, 6], [7]], 0)
    assert ids.tolist() == [[5, 6], [7, 0]] and mask.tolist() == [[True, True], [True, False]]
    left, left_mask = left_pad([[5, 6], [7]], 0)
    assert left.shape == ids.shape and left_mask.sum() == mask.sum()


def test_plain_text_is_the_question_without_its_conversation():
    problems = clinic.draw_problems("basic", 7)
    changed = clinic.as_plain_text(to_dataset(problems))
    assert changed["prompt"] == [problem.question for problem in problems]


def test_the_wrong_end_is_set_right_again():
    policy = SimpleNamespace(
        tokenizer=SimpleNamespace(eos_token="end", pad_token="pad"),
        model=SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=3)),
    )
    with pytest.raises(KeyError), clinic.wrong_end(policy):
        assert policy.tokenizer.eos_token == "pad"
        raise KeyError
    assert policy.tokenizer.eos_token == "end"
    assert policy.model.generation_config.eos_token_id == 3


def test_brevity_costs_one_a_token():
    assert clinic.brevity(None, Episode(text="", completion_ids=[4, 5, 6])) == -3


def test_a_watched_method_leaves_its_span():
    trainer = SimpleNamespace(rollout=lambda prompts: prompts * 2, rollout_func=None)
    spans = clinic.watch(trainer, ["rollout"])
    assert trainer.rollout_func([1]) == [1, 1]
    [(name, start, end)] = spans
    assert name == "rollout" and start <= end


def test_the_score_is_the_weighted_sum_of_the_healthy_terms():
    rows = [{"step": 3, "rewards/correct_answer/mean": 0.5, "rewards/good_format/mean": 1.0}]
    assert clinic.score(rows) == [{"step": 3, "score": pytest.approx(0.5 + 0.2)}]


def test_early_and_late_are_means_of_three_steps():
    rows = [{"reward": reward} for reward in (1, 2, 3, 4, 5, 6)]
    said = "Reward: 2.00 in the first three steps, 5.00 in the last three"
    assert clinic.early_and_late(rows, {"reward": "Reward"}) == [said]


def test_pictures_say_their_numbers():
    alt = clinic.timeline(
        [("rollout", 0.01, 0.03), ("training_step", 0.0, 0.1)],
        {"training_step": "CPUGRPOTrainer", "rollout": "GRPOTrainer"},
    ).alt
    assert "rollout 10 to 30" in alt and "training_step 0 to 100" in alt
    alt = clinic.chart("K", log(6), log(6)).alt
    assert "Patient K, from step 1 to 6: reward from 1 to 6" in alt and "share alike" in alt
    treated = [{**row, "step": row["step"] + 6} for row in log(5)]
    alt = clinic.recovery({"A": "top_p"}, {"A": log(6)}, {"A": treated}, log(11)).alt
    assert "top_p 0.50, then 0.50" in alt
    alt = clinic.alarm_grid({"control": [], "A": ["all cut"]}, ["all cut", "all alike"]).alt
    assert "control: none; A: all cut" in alt


def test_a_trainer_takes_all_problems_in_one_step(tmp_path, tiny_policy):
    problems = clinic.draw_problems("basic", 7)
    trainer = clinic.make_trainer(str(tmp_path), tiny_policy, problems, 1, learning_rate=0.5)
    assert trainer.args.per_device_train_batch_size == clinic.G * len(problems)
    assert trainer.args.learning_rate == 0.5 and trainer.args.max_completion_length == 48
    assert trainer.options.patience == 0
    torch.testing.assert_close(trainer.reward_weights, torch.tensor([1.0, 0.5, 0.2]))
