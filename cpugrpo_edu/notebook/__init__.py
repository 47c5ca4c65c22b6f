"""What every chapter of the book imports: head, palette, figures, sliders, quizzes and numbers.

A notebook is read in two ways: live in JupyterLab, and as a page of the book where no kernel
answers. So a slider carries its pictures along, every figure says in words what it shows, and
what the machine measured comes from the notebook's stored record.
"""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import os
import tomllib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader

from cpugrpo_edu.engine.hardware import configure_threads
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.machine import versions
from cpugrpo_edu.record.markdown import markdown_table
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.show.palette import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    Plot,
    new_figure,
    tidy,
)
from cpugrpo_edu.show.text import gib, number, records_folder, value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What a chapter imports from here.
__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "PURPLE", "VERMILLION", "Plot", "new_figure", "tidy"]
__all__ += ["Question", "begin", "explore", "model_for", "quiet_libraries", "quiz", "show"]
__all__ += ["gib", "markdown_table", "number", "records_folder", "value"]

TIERS = ("SMOKE", "FULL")

FULL_MODEL = "Qwen/Qwen2-0.5B-Instruct"

COLOURS = 64
"""Colours of a stored picture: enough for a chart, and a notebook carries many of them."""

SHOWN_VERSIONS = ("cpugrpo_edu", "python", "torch", "transformers", "trl")


# The head


def begin(name: str, tier: str = "SMOKE") -> None:
    """The first cell of each notebook: set the number of threads, then show the head.

    ``name`` is the notebook's file name without its ending. ``tier`` is "SMOKE" (the bundled
    model) or "FULL" (``FULL_MODEL``, see ``model_for``).
    """
    from IPython.display import Markdown, display

    check_tier(tier)
    warnings.filterwarnings("ignore")  # deprecations inside libraries: not the reader's business
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch reads this when it is imported. Waiting threads should sleep: spinning on a core that
    # another program could use makes small models several times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    configure_threads()
    quiet_libraries()
    display(Markdown(head(name)))  # type: ignore[no-untyped-call]
    if tier == "FULL" and model_for(tier) is None:
        display(  # type: ignore[no-untyped-call]
            Markdown(
                f"**FULL:** {FULL_MODEL} was not found, so the bundled model and stored records "
                "stand in. Set the environment variable CPUGRPO_FULL_MODEL to the model's folder."
            )
        )


def quiet_libraries() -> None:
    """Keep progress bars and notices of transformers and datasets out of a notebook's output."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def head(name: str) -> str:
    """Measured time and memory of a notebook, and the installed versions, as Markdown."""
    found = versions()
    parts = [f"{key} {found[key]}" for key in SHOWN_VERSIONS if key in found]
    return f"{measured(name)}\n\n**Versions here:** {', '.join(parts)}."


def measured(name: str) -> str:
    """What the stored record says the notebook took, as one line of Markdown."""
    path = records_folder() / "notebooks" / f"{name}.json"
    if not path.exists():
        return "**Time and memory:** not measured yet."
    record = RunRecord.load(path)
    seconds = value(record, "results.seconds")
    peak = value(record, "results.peak_rss_bytes")
    machine = record.machine
    return (
        f"**Measured:** {seconds:.0f} s and {peak / 2**20:.0f} MiB at the peak, from top to "
        f"bottom, on {machine.get('usable_cores', '?')} cores of {machine.get('cpu', '?')} "
        f"({record.created[:10]})."
    )


def check_tier(tier: str) -> None:
    if tier not in TIERS:
        raise UserError(f"the tier is {tier!r}; allowed are {' and '.join(TIERS)}")


def model_for(tier: str) -> str | None:
    """What ``load_policy`` takes in this tier, or None where the full model is missing.

    "FULL" looks for a folder named by the environment variable CPUGRPO_FULL_MODEL, then in
    Hugging Face's local cache. It never downloads. Without the model, a notebook shows the
    stored records instead.
    """
    check_tier(tier)
    if tier == "SMOKE":
        return "bundled"
    if folder := os.environ.get("CPUGRPO_FULL_MODEL"):
        return folder
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(FULL_MODEL, "config.json")
    return str(Path(found).parent) if isinstance(found, str) else None


# Figures


def described(drawn: Figure | Plot, alt: str = "") -> Plot:
    """The figure with its alternative text; a ``Plot`` brings its own. UserError without any."""
    plot = drawn if isinstance(drawn, Plot) else Plot(drawn, "")
    if not (alt or plot.alt).strip():
        raise UserError("a figure needs alternative text; say what it shows: show(fig, alt='...')")
    return Plot(plot.figure, alt or plot.alt)


def show(figure: Figure | Plot, alt: str = "") -> None:
    """Display a figure with its alternative text; a ``Plot`` brings its own."""
    from IPython.display import display

    plot = described(figure, alt)
    data = {"image/png": plot.base64(dpi=100, colours=COLOURS), "text/plain": plot.alt}
    display(data, metadata={"image/png": {"alt": plot.alt}}, raw=True)  # type: ignore[no-untyped-call]


# Sliders


def explore(
    draw: Callable[[Any], Figure | Plot],
    values: Sequence[Any],
    label: str,
    alt: str | Callable[[Any], str] = "",
    start: int | None = None,
) -> None:
    """A slider over ``values`` that moves the figure ``draw(value)``.

    In a live notebook it is a widget. In the book it is plain HTML with all pictures inside,
    so it moves without a kernel. ``alt`` is the text of every picture, or a function of the
    value; a ``Plot`` brings its own. ``start`` is the position shown first, by default the middle.
    """
    from IPython.display import display

    if not values:
        raise UserError("explore got no values; give the slider at least one position")
    start = len(values) // 2 if start is None else start
    frames = []
    for at in values:
        plot = described(draw(at), alt(at) if callable(alt) else alt)
        frames.append((plot.base64(dpi=80, colours=COLOURS), plot.alt))
    texts = [f"{at:g}" if isinstance(at, float) else str(at) for at in values]
    data = slider_widget(frames, texts, label, start)._repr_mimebundle_()
    data["text/plain"] = f"slider: {label}"
    data["text/html"] = slider_html(frames, texts, label, start)
    display(data, raw=True)  # type: ignore[no-untyped-call]


def slider_html(
    frames: Sequence[tuple[str, str]], texts: Sequence[str], label: str, start: int
) -> str:
    """A range input that swaps pictures; no library, no request, no kernel.

    Where no script may run, as in a notebook that JupyterLab does not trust yet, it shows one
    picture and a line of text instead of a slider that does not move.
    """
    key = "x" + hashlib.sha256("".join([label, *(f for f, _ in frames)]).encode()).hexdigest()[:12]
    template = Environment(loader=PackageLoader("cpugrpo_edu.notebook"), autoescape=True)
    return template.get_template("slider.html.j2").render(
        key=key, frames=frames, texts=texts, values=json.dumps(texts), label=label, start=start
    )


def slider_widget(
    frames: Sequence[tuple[str, str]], texts: Sequence[str], label: str, start: int
) -> Any:
    """The same slider as a live ipywidget; it holds all its pictures, so it moves at once."""
    import ipywidgets

    picture = ipywidgets.HTML()
    slider = ipywidgets.SelectionSlider(
        options=[(text, i) for i, text in enumerate(texts)],
        index=start,
        description=label,
        style={"description_width": "initial"},
        layout={"width": "32em"},
    )

    def move(at: int) -> None:
        png, alt = frames[at]
        picture.value = (
            f'<img src="data:image/png;base64,{png}" alt="{html.escape(alt)}" '
            'style="max-width:100%">'
        )

    move(start)
    slider.observe(lambda change: move(change["new"]), names="value")
    return ipywidgets.VBox([slider, picture])


# Quizzes


@dataclass(frozen=True)
class Question:
    """One question with a right answer and wrong ones, each an (answer, explanation)."""

    text: str
    right: tuple[str, str]
    wrong: Sequence[tuple[str, str]]


def quiz(*questions: Question | str) -> None:
    """Show a self-check; every answer, right or wrong, explains itself when clicked.

    A name, such as ``"04_rewards"``, stands for the questions stored for that chapter.
    """
    from jupyterquiz import display_quiz

    entries = []
    asked = [stored_questions(q) if isinstance(q, str) else [q] for q in questions]
    for question in itertools.chain.from_iterable(asked):
        answers = [(*question.right, True), *((*wrong, False) for wrong in question.wrong)]
        if len(answers) < 2 or not all(text and why for text, why, _ in answers):
            raise UserError(
                f"the question {question.text!r} needs a right and a wrong answer at least, "
                "each with an explanation"
            )
        entries.append(
            {
                "question": question.text,
                "type": "multiple_choice",
                "answers": [
                    {"answer": text, "correct": correct, "feedback": why}
                    for text, why, correct in answers
                ],
            }
        )
    display_quiz(entries, shuffle_answers=True)


def stored_questions(name: str) -> list[Question]:
    """The questions of ``quizzes/NAME.toml``. Raises UserError if there is no such file."""
    folder = Path(__file__).with_name("quizzes")
    path = folder / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise UserError(f"there are no questions for {name!r}; allowed are {known}")
    stored = tomllib.loads(path.read_text(encoding="utf-8"))["question"]
    return [Question(q["text"], tuple(q["right"]), [tuple(w) for w in q["wrong"]]) for q in stored]
