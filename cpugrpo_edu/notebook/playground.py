"""One prompt to two models, their answers side by side and judged by the verifier.

In a notebook: ``from cpugrpo_edu.notebook.playground import playground``, then ``playground()``.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from cpugrpo_edu.data import DIFFICULTIES, Problem, StepReport
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.show.palette import BLUE, VERMILLION
from cpugrpo_edu.tasks import DOMAINS, make_problems
from cpugrpo_edu.tasks.answers import exact_match, with_answer_format

if TYPE_CHECKING:
    from cpugrpo_edu.models.load import Policy

TYPED = "typed"
"""The domain of a prompt that the user wrote: only its final answer can be judged."""


def playground(runs: str | Path = "runs") -> Playground:
    """The widget, which offers the bundled model and every model saved below ``runs``."""
    return Playground(runs)


@dataclass(frozen=True)
class Answer:
    """A completion and what the verifier says; ``correct`` is None where nothing can judge."""

    text: str
    tokens: int
    finished: bool
    correct: bool | None
    report: StepReport | None


def find_models(runs: str | Path) -> list[str]:
    """``bundled``, then the folders below ``runs`` that hold a model, newest first."""
    found = [path.parent for path in Path(runs).glob("**/config.json")]
    found = [path for path in found if (path / "model.safetensors").exists()]
    newest = sorted(found, key=lambda path: (path / "config.json").stat().st_mtime, reverse=True)
    return ["bundled", *map(str, newest)]


def model_folder(name: str) -> str:
    """The chosen model; a run's output folder stands for the model that the run trained."""
    name = name.strip()
    inside = Path(name) / "model"
    if name and not (Path(name) / "config.json").exists() and inside.is_dir():
        return str(inside)
    return name


@lru_cache(maxsize=2)
def cached_policy(name: str, changed: float) -> Policy:
    """Keep the two models used last; ``changed``, the time of the weights, tells when a folder
    holds another model than before."""
    from cpugrpo_edu.models.load import check_policy, load_policy

    policy = load_policy(name)
    check_policy(policy)
    return policy


def policy_of(name: str) -> Policy:
    folder = model_folder(name)
    weights = Path(folder) / "model.safetensors"
    return cached_policy(folder, weights.stat().st_mtime if weights.exists() else 0.0)


def answer_of(
    name: str, problem: Problem, temperature: float, max_tokens: int, seed: int
) -> Answer:
    """Let the model answer, and judge it."""
    from cpugrpo_edu.models.load import default_answer_format
    from cpugrpo_edu.sample import Sampling, rollout

    policy = policy_of(name)
    [group] = rollout(policy, [problem], 1, Sampling(max_tokens, temperature, seed=seed))
    [episode] = group.episodes
    chosen = default_answer_format(policy.model.config)
    correct, report = judge(problem, episode.text, chosen)
    return Answer(episode.text, len(episode.completion_ids), episode.finished, correct, report)


def judge(
    problem: Problem, text: str, answer_format: str = "hash"
) -> tuple[bool | None, StepReport | None]:
    """Verdict and step marks; a typed prompt has no steps, and no verdict without an answer."""
    if problem.domain == TYPED:
        return (exact_match(problem, text, answer_format) if problem.answer else None), None
    [problem] = with_answer_format([problem], answer_format)
    return problem.verify(text), problem.check_steps(text)


def answer_html(answer: Answer, problem: Problem) -> str:
    """Verdict and completion, line by line; marks are words and signs, never colour alone."""
    if answer.correct is None:
        verdict = "not judged: give the right answer to compare with"
    elif answer.correct:
        verdict = f'<span style="color:{BLUE}">✓ right</span>'
    else:
        verdict = (
            f'<span style="color:{VERMILLION}">✗ wrong</span>, '
            f"the answer is {html.escape(problem.answer)}"
        )
    length = f"{answer.tokens} tokens" + ("" if answer.finished else ", cut at the length limit")
    lines = []
    steps = list(answer.report.steps) if answer.report else []
    for line in answer.text.splitlines() or [""]:
        mark = ""
        if steps and steps[0].text.strip() and steps[0].text.strip() in line:
            valid = steps.pop(0).valid
            sign, colour = ("✓ step holds", BLUE) if valid else ("✗ step fails", VERMILLION)
            mark = f'  <span style="color:{colour}">{sign}</span>'
        lines.append(html.escape(line) + mark)
    report = ""
    if answer.report is not None:
        report = (
            f"<p>Steps: {sum(step.valid for step in answer.report.steps)} of "
            f"{len(answer.report.steps)} written hold, {answer.report.required} needed, "
            f"score {answer.report.score:.2f}</p>"
        )
    return (
        f"<p><b>{verdict}</b> ({length})</p>"
        f'<pre style="white-space:pre-wrap;border:1px solid #999;padding:6px">'
        f"{chr(10).join(lines)}</pre>{report}"
    )


class Playground:
    """The widgets. Every control is an attribute, so that code can operate it like a hand."""

    def __init__(self, runs: str | Path = "runs"):
        try:
            import ipywidgets as w
        except ImportError as error:
            raise UserError(
                "the playground needs ipywidgets, which is not installed; pip install ipywidgets"
            ) from error
        self.runs = runs
        self.problem: Problem | None = None
        wide = w.Layout(width="98%")
        models = find_models(runs)
        self.left, self.right = (
            w.Combobox(
                value=value,
                options=models,
                ensure_option=False,
                description=f"Model {letter}",
                placeholder="bundled, a model folder, or a run's folder",
                layout=wide,
            )
            for letter, value in (("A", "bundled"), ("B", models[min(1, len(models) - 1)]))
        )
        self.domain = w.Dropdown(options=DOMAINS, description="Domain")
        self.difficulty = w.Dropdown(options=DIFFICULTIES, description="Difficulty")
        self.draw = w.Button(description="Draw a problem", tooltip="A held-out one")
        self.prompt = w.Textarea(description="Prompt", rows=2, layout=wide)
        self.answer = w.Text(description="Answer", placeholder="the right answer, if there is one")
        self.temperature = w.FloatSlider(
            0.0,
            min=0.0,
            max=2.0,
            step=0.1,
            description="Temperature",
            readout_format=".1f",
            style={"description_width": "initial"},
        )
        self.length = w.IntSlider(104, min=1, max=512, description="Length")
        self.seed = w.BoundedIntText(0, min=0, max=2**31 - 1, description="Seed")
        self.generate = w.Button(description="Generate", button_style="primary")
        self.status = w.HTML()
        self.shown = w.HTML(), w.HTML()
        half = w.Layout(width="50%", padding="0 8px 0 0")
        self.widget = w.VBox(
            [
                w.HBox([self.domain, self.difficulty, self.draw]),
                self.prompt,
                w.HBox([self.answer, self.seed]),
                w.HBox([self.temperature, self.length, self.generate]),
                self.status,
                w.HBox(
                    [
                        w.VBox([chosen, shown], layout=half)
                        for chosen, shown in zip((self.left, self.right), self.shown, strict=True)
                    ]
                ),
            ]
        )
        self._draws = 0
        self.draw.on_click(lambda _: self._on_draw())
        self.generate.on_click(lambda _: self._on_generate())

    def _on_draw(self) -> None:
        """Draw another held-out problem of the chosen domain and difficulty."""
        self._draws += 1
        [self.problem] = make_problems(
            self.domain.value, self.difficulty.value, "eval", 1, seed=self._draws
        )
        self.prompt.value, self.answer.value = self.problem.question, self.problem.answer
        for shown in self.shown:
            shown.value = ""
        self.status.value = ""

    def asked(self) -> Problem:
        """The drawn problem, or a typed one once its text or answer has been changed."""
        question, answer = self.prompt.value.strip(), self.answer.value.strip()
        if not question:
            raise UserError("the prompt is empty; type one, or draw a problem")
        drawn = self.problem
        if drawn is not None and (question, answer) == (drawn.question, drawn.answer):
            return drawn
        return Problem(TYPED, TYPED, "", question, answer)

    def _on_generate(self) -> None:
        """Ask both models; an error of one appears in its place and leaves the other alone."""
        try:
            problem = self.asked()
        except UserError as error:
            self.status.value = html.escape(str(error))
            return
        self.generate.disabled = True
        self.status.value = "Generating …"
        try:
            for chosen, shown in zip((self.left, self.right), self.shown, strict=True):
                shown.value = "…"
                try:
                    answer = answer_of(
                        chosen.value,
                        problem,
                        self.temperature.value,
                        self.length.value,
                        self.seed.value,
                    )
                    shown.value = answer_html(answer, problem)
                except UserError as error:
                    shown.value = f"<p>{html.escape(str(error))}</p>"
        finally:
            self.generate.disabled = False
            self.status.value = ""
        for chosen in (self.left, self.right):
            chosen.options = find_models(self.runs)  # with those saved in the meantime

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)  # type: ignore[no-untyped-call]
