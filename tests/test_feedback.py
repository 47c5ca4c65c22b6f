"""Feedback pages keep the hints of visible tests and hide all the rest."""

from __future__ import annotations

from typing import Any

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

pytest.importorskip("nbgrader", reason="grading needs the extra cpugrpo-edu[grading]")

from cpugrpo_edu.course.feedback import NOTICE, HideAnswers, normalise, regions

HIDDEN = "assert abs(found - 0.123456) < 1e-6"
HINT = "one number for each group"
TEST = f"""assert len(a) == 2, "{HINT}"
### BEGIN HIDDEN TESTS
{HIDDEN}
### END HIDDEN TESTS"""


def error(message: str, trace: str = HIDDEN) -> Any:
    return new_output("error", ename="AssertionError", evalue=message, traceback=[trace])


def cleaned(*cells: Any) -> list[Any]:
    nb, _ = HideAnswers().preprocess(new_notebook(cells=list(cells)), {})
    return list(nb.cells)


def test_hidden_source_and_mark_scheme_go() -> None:
    task = "Why?\n### BEGIN MARK SCHEME\n1 point: because it is so.\n### END MARK SCHEME"
    test, written = cleaned(new_code_cell(TEST), new_markdown_cell(task))
    assert HINT in test.source and HIDDEN not in test.source
    assert written.source == "Why?"


def test_a_failed_hidden_test_says_no_more() -> None:
    for message in ("", "found 3 instead of 0.123456", HIDDEN):
        (cell,) = cleaned(new_code_cell(TEST, outputs=[error(message)]))
        assert cell.outputs[0].evalue == NOTICE
        assert cell.outputs[0].traceback == [NOTICE]


def test_what_grading_itself_reports_stays() -> None:
    own = new_output("error", ename="Timeout", evalue="longer than 5 s", traceback=["Timeout"])
    (cell,) = cleaned(new_code_cell(TEST, outputs=[own]))
    assert cell.outputs == [own]


def test_a_visible_hint_stays() -> None:
    (cell,) = cleaned(new_code_cell(TEST, outputs=[error(HINT)]))
    assert HINT in cell.outputs[0].evalue
    assert HIDDEN not in str(cell.outputs)


@pytest.mark.parametrize(
    "shown",
    [
        HIDDEN,
        f"   12 {HIDDEN}",
        repr(HIDDEN),
        f"\x1b[31m{HIDDEN[:10]}\x1b[0m{HIDDEN[10:]}",
        HIDDEN.replace(" ", ""),
    ],
)
def test_what_a_spying_answer_printed_is_taken_out(shown: str) -> None:
    spying = [
        new_output("stream", text=f"source: {shown}\n"),
        new_output("display_data", data={"text/plain": shown}),
        error("mine", shown),
    ]
    _, answer = cleaned(new_code_cell(TEST), new_code_cell("spy()", outputs=spying))
    flat = normalise(str(answer.outputs))
    assert normalise(HIDDEN) not in flat
    assert "(output not shown)" in str(answer.outputs)


def test_ordinary_output_stays() -> None:
    mine = new_output("stream", text="loss 0.5\n")
    _, answer = cleaned(new_code_cell(TEST), new_code_cell("train()", outputs=[mine]))
    assert answer.outputs == [mine]


def test_a_public_line_is_no_secret() -> None:
    same = new_code_cell(TEST + "\n" + HIDDEN)
    mine = new_output("stream", text=HIDDEN)
    _, answer = cleaned(same, new_code_cell("x", outputs=[mine]))
    assert answer.outputs == [mine]


def test_regions_and_normalise() -> None:
    assert regions("a\n# BEGIN HIDDEN TESTS\nb\n# END HIDDEN TESTS\nc") == (["a", "c"], ["b"])
    assert normalise('   3 x = "a b"') == normalise("x = 'a b'") == "x=ab"
