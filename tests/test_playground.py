"""The playground: every control has the effect that its label says."""

from __future__ import annotations

import shutil
import sys

import pytest

import cpugrpo_edu.notebook.playground as module
from cpugrpo_edu.data import Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.load import BUNDLED
from cpugrpo_edu.notebook.playground import Answer, Playground, find_models, judge, playground
from cpugrpo_edu.tasks import get_task, split_of


@pytest.fixture
def widget(tmp_path):
    return Playground(tmp_path / "runs")


@pytest.fixture
def asked(monkeypatch):
    """What the models are asked, instead of asking them."""
    calls = []

    def answer_of(*arguments):
        calls.append(arguments)
        return Answer("1+1=2\n#### 2", 5, True, True, None)

    monkeypatch.setattr(module, "answer_of", answer_of)
    return calls


def test_draw_takes_a_new_held_out_problem_of_the_chosen_cell(widget):
    widget.domain.value, widget.difficulty.value = "lists", "advanced"
    widget.draw.click()
    first = widget.problem
    assert (first.domain, first.difficulty) == ("lists", "advanced")
    assert split_of(first.question) == "eval"
    assert widget.prompt.value == first.question and widget.answer.value == first.answer
    widget.draw.click()
    assert widget.problem.question != first.question
    widget.domain.value = "algebra"
    widget.draw.click()
    assert widget.problem.domain == "algebra"


def test_every_field_reaches_both_models(widget, asked):
    widget.left.value, widget.right.value = "bundled", "some/folder"
    widget.prompt.value, widget.answer.value = "What is 1+1?", "2"
    widget.temperature.value, widget.length.value, widget.seed.value = 0.7, 33, 9
    widget.generate.click()
    problem = Problem("typed", "typed", "", "What is 1+1?", "2")
    assert asked == [
        ("bundled", problem, 0.7, 33, 9),
        ("some/folder", problem, 0.7, 33, 9),
    ]
    assert all("✓ right" in shown.value for shown in widget.shown)
    assert not widget.generate.disabled and widget.status.value == ""


def test_a_drawn_problem_is_judged_by_its_task_until_it_is_changed(widget, asked):
    widget.draw.click()
    widget.generate.click()
    assert asked[0][1] == widget.problem
    widget.prompt.value += " Show your working."
    widget.generate.click()
    assert asked[-1][1].domain == "typed"


def test_an_empty_prompt_is_refused(widget, asked):
    widget.prompt.value = "  "
    widget.generate.click()
    assert "the prompt is empty" in widget.status.value and not asked


def test_a_model_that_cannot_be_loaded_leaves_the_other_alone(widget):
    widget.right.value = "./nowhere"
    widget.draw.click()
    widget.length.value = 8
    widget.generate.click()
    assert "<pre" in widget.shown[0].value
    assert "no model folder at ./nowhere" in widget.shown[1].value
    assert not widget.generate.disabled


def test_length_temperature_and_seed_change_the_completion():
    [problem] = module.make_problems("arithmetic", "basic", "eval", 1)

    def ask(temperature=0.0, length=60, seed=0):
        return module.answer_of("bundled", problem, temperature, length, seed)

    assert ask().text == ask(seed=5).text  # greedy
    assert len({ask(temperature=2.0, seed=seed).text for seed in range(6)}) > 1
    short = ask(temperature=2.0, length=1)
    assert short.tokens == 1
    assert "cut at the length limit" in module.answer_html(
        Answer("1", 1, False, False, None), problem
    )


def test_saved_models_are_offered_and_a_run_folder_means_its_model(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    shutil.copytree(BUNDLED, runs / "first" / "model")
    (runs / "broken").mkdir()
    (runs / "broken" / "config.json").write_text("{}")
    assert find_models(runs) == ["bundled", str(runs / "first" / "model")]
    assert module.model_folder(str(runs / "first")) == str(runs / "first" / "model")
    assert module.model_folder("bundled") == "bundled"
    widget = playground(runs)
    assert widget.right.value == str(runs / "first" / "model")
    widget.left.value = str(runs / "first")
    widget.draw.click()
    widget.length.value = 8
    widget.generate.click()
    assert widget.shown[0].value == widget.shown[1].value and "<pre" in widget.shown[0].value


def test_step_marks_and_verdict():
    solution = "21+5=26\n26+13=39"
    fields = ("x", "arithmetic", "basic", "Compute 21+5+13.", "39", solution)
    problem = Problem(*fields, task=get_task("arithmetic"))
    text = "21+5=26\n26+13=38\n#### 38 <b>"
    correct, report = judge(problem, text)
    shown = module.answer_html(Answer(text, 9, True, correct, report), problem)
    assert correct is False and "✗ wrong" in shown and "the answer is 39" in shown
    lines = shown.split("\n")
    assert "✓ step holds" in lines[0] and "✗ step fails" in lines[1]
    assert (
        "1 of 2 written hold, 2 needed" in shown and "&lt;b&gt;" in shown and "<b>\n" not in shown
    )


def test_a_typed_prompt_is_judged_by_its_answer_alone():
    assert judge(Problem("typed", "typed", "", "q", "4"), "#### 4") == (True, None)
    assert judge(Problem("typed", "typed", "", "q", "4"), "#### 5") == (False, None)
    assert judge(Problem("typed", "typed", "", "q", ""), "#### 4") == (None, None)


def test_playground_without_ipywidgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(UserError, match="pip install ipywidgets"):
        playground()
