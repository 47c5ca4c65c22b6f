"""Numbers cannot lie: none is typed into prose."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.show.text import number

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "book").rglob("*.md"))
PROSE = [*PAGES, ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]

API = ROOT / "book" / "api"


def extension(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "book" / "_ext" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages, api = extension("records"), extension("api")

UNIT = (
    r"(?:%|percent\b|(?:percentage\ )?points?\b|seconds?\b|s\b|ms\b|minutes?\b|min\b|hours?\b"
    r"|[KMGT]i?B\b|tokens?\ (?:a|per)\ second|tokens/s|GFLOPS|GB/s|nats?\b"
    r"|(?:[x×]|times)\ (?:as\ )?(?:faster|slower|larger|smaller|less|more|fast)\b"
    r"|×(?![\s\w]*\d))"
)
RESULT = re.compile(rf"(?<![\w.$-])[+\u2212-]?\d[\d.,]*\s?{UNIT}", re.X)
LEVEL = re.compile(r"(?:95|99|90|100|50|0|5|1|10|20|80)\s?(?:%|percent)")
"""Levels of intervals and tests, and shares that are chosen, not measured."""

DEFINITIONS = {
    ("README.md", "3 GB"): "room for the installation: the size of the pinned packages",
    ("11_int8.ipynb", "4x smaller"): "somebody's claim, quoted to be audited",
    ("11_int8.ipynb", "2 points"): "a margin that the reader chooses",
    ("09_memory.ipynb", "200 MiB"): "the size of a tensor in a question, given by its shape",
}
"""Numbers with a unit that define something, and why they are not measurements."""


def without_code(text: str) -> str:
    """Markdown without code blocks and without the fences of directives, whose text stays."""
    kept: list[str] = []
    open_fences: list[tuple[str, bool]] = []  # (marks, whether it holds code)
    for line in text.splitlines():
        fence = re.match(r"\s*(`{3,}|:{3,})\s*(\S*)", line)
        inside_code = bool(open_fences) and open_fences[-1][1]
        if fence is None:
            kept += [] if inside_code else [line]
        elif open_fences and not fence[2] and fence[1].startswith(open_fences[-1][0]):
            open_fences.pop()
        elif not inside_code:
            code = not fence[2].startswith("{") or fence[2] == "{eval-rst}"
            open_fences.append((fence[1], code))
    assert not open_fences, f"a block is never closed: {open_fences}"
    return "\n".join(kept)


def prose(path: Path) -> str:
    """The text of a page without code, formulas, links, roles and generated parts."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    text = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", text, flags=re.S)
    text = without_code(text)
    inline = r"`(?:[^`\n]|\n(?!\s*\n))+`"
    return re.sub(rf"\$\$.*?\$\$|\$[^$\n]+\$|{inline}|\]\([^)]*\)", "", text, flags=re.S)


def typed_results(text: str) -> list[str]:
    """Figures with a unit that look measured; they belong in a record or a cell."""
    found = [match.group().strip() for match in RESULT.finditer(text)]
    return [words for words in found if not LEVEL.fullmatch(words)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It took 12 s and 1.5 GiB.", ["12 s", "1.5 GiB"]),
        ("gained +3.1 points (41 %)", ["+3.1 points", "41 %"]),
        ("is 3.2x faster, or 5 times as fast", ["3.2x faster", "5 times as fast"]),
        ("4,100 tokens/s, a 2.5× gain", ["4,100 tokens/s", "2.5×"]),
        ("A 95 % interval of 100 % of the cells, arXiv:2402.03300, 8 completions.", []),
        ("a matrix of 512 x 512, 3 x 6 steps", []),
    ],
)
def test_typed_results_are_recognised(text, found):
    assert typed_results(text) == found


def test_code_roles_and_generated_parts_are_no_prose(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```bash\nsleep 5 s\n```\n\n{record}`r:k|{:.1f} s` $3 s$\n\n"
        "<!-- results:begin -->\n31 points\n<!-- results:end -->\n\n"
        "````{note}\nIt took 7 s.\n\n```\n8 s\n```\n````\nAnd 9 s.\n"
    )
    assert typed_results(prose(page)) == ["7 s", "9 s"]


@pytest.mark.parametrize("path", PROSE, ids=lambda p: p.name)
def test_no_result_is_typed_by_hand(path):
    found = [words for words in typed_results(prose(path)) if (path.name, words) not in DEFINITIONS]
    assert not found, "take it from a record: {record}`...` on a page, a cell in a notebook"


def test_every_definition_is_still_there():
    there = {(path.name, words) for path in PROSE for words in typed_results(prose(path))}
    assert set(DEFINITIONS) <= there


# --- the helper ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for seed, gain in ((0, 0.25), (1, 0.5)):
        record = RunRecord("run", "", seed, "", {}, {}, {}, {"gain": gain, "a b": {"c": 7}})
        record.save(tmp_path / f"run-seed{seed}-ewc.json")
    return tmp_path


def test_a_number_comes_from_one_record_or_from_all_that_fit(folder):
    assert number("run-seed1-ewc", "results.gain", "{:+.1f}", 100, folder) == "+50.0"
    assert number("run-seed?-ewc", "results.gain", "{:.3f}", folder=folder) == "0.375"
    assert number("run-seed?-ewc", "results.gain", "{:.2f}", folder=folder, over="min") == "0.25"
    assert number("run-seed?-ewc", "results.gain", "{}", folder=folder, over="count") == "2"
    with pytest.raises(UserError, match=r"run-seed\?-x.*there are: run-seed0-ewc"):
        number("run-seed?-x", "results.gain", folder=folder)
    with pytest.raises(UserError, match="allowed are mean"):
        number("run-seed?-ewc", "results.gain", folder=folder, over="median")


def test_the_role_reads_a_record(folder, monkeypatch):
    monkeypatch.setattr(pages, "RECORDS", folder)
    assert pages.from_record("run-seed0-ewc:results.a b.c|{:d} points") == "7 points"
    assert pages.from_record("run-seed?-ewc:results.gain|{:.0f} %|100|max") == "50 %"
    for wrong in ("run-seed0-ewc", "run-seed0-ewc:results.none", "none:seed", "a:b|{}|1|max|5"):
        with pytest.raises(UserError):
            pages.from_record(wrong)


@pytest.mark.parametrize("name", pages.PLOTS)
def test_plots_of_the_results_page_say_what_they_show(name):
    plot = pages.PLOTS[name]()
    if name in pages.BENCH_TABLES and name not in {record.kind for record in pages.benchmarks()}:
        assert plot is None  # not measured, so there is nothing to draw
        return
    assert len(plot.alt) > 60
    assert plot.figure.axes


@pytest.mark.parametrize("name", pages.TABLES)
def test_tables_of_the_pages_can_be_made(name):
    assert pages.TABLES[name]().strip()


# --- the pages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_page_has_one_title_and_skips_no_level(path):
    text = path.read_text(encoding="utf-8")
    if "{include}" in text:
        text = (path.parent / re.search(r"\{include\} (\S+)", text).group(1)).read_text()
    text = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.S | re.M)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.M)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_the_reference_shows_every_module_once():
    marks = [re.findall(r"<!-- modules: (\S+) -->", p.read_text()) for p in API.glob("*.md")]
    named = [name for rooms in marks for room in rooms for name in api.modules(room)]
    there = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "cpugrpo_edu").rglob("*.py")
    }
    assert len(named) == len(set(named))
    assert set(named) == there - {"cpugrpo_edu", "cpugrpo_edu.cli.__main__"}


def test_every_citation_of_a_page_is_in_the_bibliography():
    text = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    keys = re.findall(r"^@\w+\{([^,]+),", text, re.M)
    assert len(keys) == len(set(keys))
    for path in PAGES:
        for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", path.read_text(encoding="utf-8")):
            assert {key.strip() for key in group.split(",")} <= set(keys), path.name
