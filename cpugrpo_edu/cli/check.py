"""``cpugrpo check``: look before hours of work."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cpugrpo_edu.cli.command import Call, app, command
from cpugrpo_edu.cli.run import with_threads
from cpugrpo_edu.cli.settings import with_settings

if TYPE_CHECKING:
    from cpugrpo_edu.run.preview import Preview


@command(app)
@with_settings
def check(call: Call, **settings: Any) -> None:
    """Show in about a minute what a run with these settings would begin with; it writes nothing.

    One prompt as the model sees it, a few completions with the answer that was read and their
    reward, how many groups have a signal, how many completions were cut, how far the INT8 copy is
    from the policy, and the time and memory ahead.

    Example: `cpugrpo check --model smollm2 --data prompts.jsonl`, then the same with `run`
    """
    given = {name: value for name, value in settings.items() if value is not None}
    config = with_threads(given, None, 1)
    from cpugrpo_edu.lab.estimate import estimate_text
    from cpugrpo_edu.run.preview import PROMPTS, preview
    from cpugrpo_edu.show.progress import ProgressDisplay

    with ProgressDisplay(quiet=call.quiet) as display:
        found = preview(config, display.counter("sample", PROMPTS))
    ahead = estimate_text(config)
    call.give(asdict(found) | {"ahead": ahead}, "\n".join([*lines(found), f"Ahead: {ahead}"]))


def lines(found: Preview) -> list[str]:
    """What was found, for reading."""
    signal = found.signal
    shown = ["A prompt, as the model sees it:", indented(found.prompt), ""]
    for each in found.completions:
        read = "judged by the verifier"
        if each["reference"]:
            read = f"answer read: {each['answer']!r}, reference: {each['reference']!r}"
        end = "ended by itself" if each["ended"] else "cut at the limit"
        shown += [
            f"{each['question']}",
            indented(each["text"]),
            f"  reward {each['reward']:.2f}; {read}; {each['tokens']} tokens, {end}",
            "",
        ]
    shown.append(f"Answers are read in the format {found.answer_format}.")
    if found.warning:
        shown.append(f"Note: {found.warning}.")
    if signal.unmatched:
        shown.append(f"Note: {signal.unmatched}.")
    ended = (
        "the token that ends a text was seen"
        if signal.cut < 1
        else (
            "no completion ended by itself: raise --max-completion, or check the chat template and "
            "the end-of-text token"
        )
    )
    shown.append(
        f"Signal: in {signal.with_signal} of {signal.groups} groups the rewards differ, their mean "
        f"is {signal.mean_reward:.2f}. Cut at the limit: {signal.cut:.0%}; {ended}."
    )
    if found.drift is not None:
        fit = "close enough" if found.drift.acceptable else "too far: the run would not use it"
        shown.append(f"INT8 copy: {found.drift}; {fit}.")
    return shown


def indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())
