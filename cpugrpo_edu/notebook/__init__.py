"""What every notebook of the book uses: its head, figures, sliders and quizzes.

A notebook is read in two ways: live in JupyterLab, and as a page of the book where no
kernel answers. So a slider carries its pictures along, every figure says in words what it
shows, and what the machine measured comes from the notebook's stored record.
"""

from __future__ import annotations

import hashlib
import html
import io
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpugrpo_edu.engine.hardware import configure_threads, versions
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.show.progress import Plot
from cpugrpo_edu.show.report import records_folder, value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIERS = ("SMOKE", "FULL")

FULL_MODEL = "Qwen/Qwen2-0.5B-Instruct"

SHOWN_VERSIONS = ("cpugrpo_edu", "python", "torch", "transformers", "trl")


# The head


def begin(name: str, tier: str = "SMOKE") -> None:
    """The first cell of each notebook: settle the threads, then show what it was run with.

    ``name`` is the notebook's file name without its ending. ``tier`` is "SMOKE" (the bundled
    model) or "FULL" (``FULL_MODEL``, see ``model_for``).
    """
    from IPython.display import Markdown, display

    check_tier(tier)
    warnings.filterwarnings("ignore")  # notices of libraries to their authors
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Read when torch is imported: threads that wait shall sleep, not spin on a core that
    # another program could use. On a busy machine spinning makes small models several times
    # slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    configure_threads()
    quiet_libraries()
    display(Markdown(head(name)))  # type: ignore[no-untyped-call]
    if tier == "FULL" and model_for(tier) is None:
        display(  # type: ignore[no-untyped-call]
            Markdown(
                f"**FULL:** {FULL_MODEL} is not at hand, so the bundled model and stored records "
                "stand in. Set the environment variable CPUGRPO_FULL_MODEL to the model's folder."
            )
        )


def quiet_libraries() -> None:
    """No progress bars and notices of transformers and datasets among a notebook's output."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def head(name: str) -> str:
    """Measured time and memory of a notebook, and the versions at hand, as Markdown."""
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
    """What ``load_policy`` takes in this tier, or None where the full model is not at hand.

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


def small_png(figure: Figure, dpi: int = 100) -> bytes:
    """A figure as PNG with at most 64 colours: a notebook carries many of them."""
    from PIL import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    Image.open(buffer).convert("RGB").quantize(64).save(small, format="png", optimize=True)
    return small.getvalue()


def show(figure: Figure | Plot, alt: str | None = None) -> None:
    """Display a figure with the text for who cannot see it. A ``Plot`` brings its own."""
    from IPython.display import display

    plot = figure if isinstance(figure, Plot) else Plot(figure, alt or "")
    alt = check_alt(alt or plot.alt)
    data = {"image/png": encode(small_png(plot.figure)), "text/plain": alt}
    display(data, metadata={"image/png": {"alt": alt}}, raw=True)  # type: ignore[no-untyped-call]


def check_alt(alt: str) -> str:
    if not alt.strip():
        raise UserError("a figure needs alternative text; say what it shows: show(fig, alt='...')")
    return alt


def encode(png: bytes) -> str:
    import base64

    return base64.b64encode(png).decode("ascii")


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
    so it moves without a kernel. ``alt`` is the text of every picture,
    or a function of the value; a ``Plot`` brings its own. ``start`` is the position shown
    first, the middle by default.
    """
    from IPython.display import display

    if not values:
        raise UserError("explore got no values; give the slider at least one position")
    start = len(values) // 2 if start is None else start
    frames = [frame(draw(value), value, alt) for value in values]
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    data = slider_widget(frames, texts, label, start)._repr_mimebundle_()
    data["text/plain"] = f"slider: {label}"
    data["text/html"] = slider_html(frames, texts, label, start)
    display(data, raw=True)  # type: ignore[no-untyped-call]


def frame(drawn: Figure | Plot, value: Any, alt: str | Callable[[Any], str]) -> tuple[str, str]:
    """One picture of a slider: base64 PNG and alternative text."""
    text = alt(value) if callable(alt) else alt
    if isinstance(drawn, Plot):
        return encode(small_png(drawn.figure, dpi=80)), check_alt(text or drawn.alt)
    return encode(small_png(drawn, dpi=80)), check_alt(text)


def slider_html(
    frames: Sequence[tuple[str, str]], texts: Sequence[str], label: str, start: int
) -> str:
    """A range input that swaps pictures; no library, no request, no kernel.

    Where no script may run, as in a notebook that JupyterLab does not trust yet, there is
    one picture and a line that says so instead of a slider that does not move.
    """
    key = "x" + hashlib.sha256("".join([label, *(f for f, _ in frames)]).encode()).hexdigest()[:12]
    images = "".join(
        f'<img src="data:image/png;base64,{png}" alt="{html.escape(alt)}"'
        f' style="max-width:100%{"" if i == start else ";display:none"}">'
        for i, (png, alt) in enumerate(frames)
    )
    ticks = html.escape(str(list(texts)).replace("'", '"'), quote=True)
    return (
        f'<div id="{key}" class="explore" data-values="{ticks}">'
        f'<span style="display:none"><label>{html.escape(label)}: '
        f'<input type="range" min="0" max="{len(frames) - 1}" step="1" value="{start}" '
        f'style="width:16em;vertical-align:middle"></label> '
        f'<output aria-live="polite">{html.escape(texts[start])}</output></span>'
        f"<em>{html.escape(label)}: {html.escape(texts[start])} (run the cell for a slider)</em>"
        f"<br>{images}</div>"
        f'<script>(()=>{{const box=document.getElementById("{key}");'
        'const images=box.querySelectorAll("img"),texts=JSON.parse(box.dataset.values);'
        'box.querySelector("span").style.display="";box.querySelector("em").style.display="none";'
        'box.querySelector("input").addEventListener("input",event=>{const at=+event.target.value;'
        'images.forEach((image,i)=>{image.style.display=i===at?"":"none"});'
        'box.querySelector("output").textContent=texts[at]})})()</script>'
    )


def slider_widget(
    frames: Sequence[tuple[str, str]], texts: Sequence[str], label: str, start: int
) -> Any:
    """The same slider as a live ipywidget. It has all its pictures, so it moves at once."""
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


def quiz(*questions: Question) -> None:
    """Show a self-check; every answer, right or wrong, explains itself when clicked."""
    from jupyterquiz import display_quiz

    entries = []
    for question in questions:
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
