"""What chapter 18 shows: against enumeration, and with answers of every kind."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file

from cpugrpo_edu.data import Episode, Group, Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.notebook import real_model as R
from cpugrpo_edu.notebook.reward_plots import smooth
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.tasks.stories import Stories


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_share_of_mixed_groups_is_that_of_all_subsets(right, size):
    answers = [1] * right + [0] * (5 - right)
    groups = list(itertools.combinations(answers, size))
    mixed = Fraction(sum(0 < sum(group) < size for group in groups), len(groups))
    assert R.mixed_share([right], 5, size) == pytest.approx(float(mixed))
    assert R.mixed_share([right, 0], 5, size) == pytest.approx(float(mixed) / 2)


@pytest.mark.parametrize("size", [0, 6])
def test_a_group_comes_from_the_sample(size):
    with pytest.raises(ValueError, match="cannot be drawn"):
        R.mixed_share([1], 5, size)


def a_problem():
    task = Stories(answer_format="last-number")
    solution = "5 + 7 = 12.\n#### 12"
    return Problem("p", "stories", "basic", "What is 5 + 7?", "12", solution, task)


def test_answers_are_sorted_by_their_kind():
    problem = a_problem()
    texts = {
        "5 + 7 = 12.": "right",
        "It is 12.": "right",
        "7 - 5 = 2": "true equation, wrong plan",
        "5 + 7 = 13": "false equation",
        "I like numbers.": "no equation",
    }
    assert {text: R.kind_of_answer(problem, text) for text in texts} == texts
    assert R.kinds([problem] * len(texts), list(texts)) == Counter(texts.values())


def test_the_signal_map_counts_mixed_groups():
    def group(*rewards):
        return Group([1], [Episode(reward=reward) for reward in rewards], a_problem())

    alt = R.signal_map([group(1, 0, 0, 0), group(0, 0, 0, 0), group(1, 1, 1, 1)]).alt
    assert alt.startswith("3 groups of 4") and "42% are right" in alt and "1 of them hold" in alt
    assert "at 2 it is" in R.signal_by_group_size([1, 0], 4, 2).alt


def test_the_mean_of_neighbours_at_the_ends_has_fewer():
    assert smooth([1, 2, 3, 4], 3) == [1.5, 2.0, 3.0, 3.5]


def row(before, after):
    part = {"n": 10, "before": before, "after": after, "difference": after - before}
    return part | {"low": 0.01, "high": 0.2}


def a_record(seed=3):
    steps = [{"stage": s, "accuracy": a} for s, a in (("basic", 0.1), ("basic", 0.3), ("x", 0.2))]
    sample = {"question": "Q?", "answer": "4", "before": "3\nor so", "before_correct": False}
    sample |= {"after": "4" * 300, "after_correct": True}
    compared = {"after vs before": {"overall": row(0.1, 0.2), "by_difficulty": {"x": row(0, 0.1)}}}
    results = {"steps": steps, "samples": [sample], "comparisons": compared}
    fields = {"kind": "run", "created": "", "commit": "", "machine": {}, "versions": {}}
    return RunRecord(seed=seed, config={}, results=results, **fields)


def test_a_run_is_shown_as_its_record_has_it():
    record = a_record()
    assert R.stage_starts(record) == [(1, "basic"), (3, "x")]
    assert "seed 3 from 20% to 20%" in R.reward_curves([record]).alt
    assert R.gains(record)[-1] == ["all", "10", "10.0 %", "20.0 %", "+10.0 (+1.0 to +20.0)"]
    text = R.five_answers(record)
    assert "before, wrong: 3 | or so" in text and "after, right: 444" in text and "…" in text


def test_the_norm_of_an_update_is_that_of_the_product(tmp_path):
    torch.manual_seed(0)
    weights, squares = {}, Counter()
    for layer, name in itertools.product(range(2), ("self_attn.q_proj", "mlp.up_proj")):
        a, b = torch.randn(2, 6), torch.randn(5, 2)
        for key, part in (("A", a), ("B", b)):
            weights[f"base_model.model.model.layers.{layer}.{name}.lora_{key}.weight"] = part
        squares["MLP" if "mlp" in name else "attention", layer] += (b @ a).square().sum().item()
    save_file(weights, tmp_path / "adapter_model.safetensors")
    found = R.adapter_norms(tmp_path)
    for (kind, layer), square in squares.items():
        assert found[kind][layer] == pytest.approx(square**0.5, rel=1e-5)
    assert R.update_plot(found).alt.startswith("Norm of the update over 2 layers")


def test_without_the_model_a_line_says_why(monkeypatch, capsys):
    def refuse(name, say):
        raise UserError("no network")

    monkeypatch.setattr(R, "fetch", refuse)
    assert not R.at_hand() and "no network" in capsys.readouterr().out
