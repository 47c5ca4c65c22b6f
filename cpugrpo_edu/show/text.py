"""Numbers of records as text: for prose, for tables and for the README.

Nobody types a result by hand: every number that a page, a chapter or the README shows comes
from a record by one of these functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.markdown import markdown_table
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.record.stats import over_seeds

MAIN = "after vs before"
"""The comparison that answers whether a run helped."""


# One number as text


def shorten(text: str, most: int) -> str:
    """At most ``most`` characters of a text."""
    return text if len(text) <= most else text[: most - 1] + "…"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(low: float, high: float) -> str:
    """An interval of fractions, in signed percentage points."""
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def difference_text(row: Mapping[str, Any]) -> str:
    """A difference of fractions with its interval in points: ``+1.2 (-0.3 to +2.7)``."""
    return f"{100 * row['difference']:+.1f} ({points(row['low'], row['high'])})"


def gib(n_bytes: float) -> str:
    """Bytes as text in GiB, or in MiB below one GiB."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def clock_time(seconds: float) -> str:
    """Seconds as ``4.2 s``, ``3:07`` (minutes) or ``1:02:03`` (hours)."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def change_in_words(row: Mapping[str, Any], confidence: float) -> str:
    """What a paired comparison shows, in a sentence that claims no more than its interval.

    ``row`` is one of :func:`cpugrpo_edu.record.stats.compare`.
    """
    change = (
        f"from {percent(row['before'])} to {percent(row['after'])} "
        f"on the same {row['n']:,} problems ({100 * row['difference']:+.1f} points, "
        f"{round(100 * confidence)} % interval {points(row['low'], row['high'])}, "
        f"McNemar {p_text(row['p_value'])})"
    )
    if not row["significant"]:
        return (
            f"This run does not show that training changed accuracy: it went {change}, "
            "which the choice of problems alone may explain."
        )
    if row["difference"] > 0:
        return f"After training, accuracy rose {change}."
    return f"Training made the model worse: accuracy fell {change}."


def verdict(
    low: float,
    high: float,
    up: str = "rises",
    down: str = "falls",
    margin: float | None = None,
    same: str = "stays within the margin",
    unclear: str = "is not shown to change",
) -> str:
    """The words that the interval [low, high] of a difference allows, and no stronger ones.

    ``up`` or ``down`` if it excludes zero. Otherwise ``same``, if a ``margin`` was stated in
    advance and the whole interval lies within +-margin; else ``unclear``: a difference that was
    not shown is not the same as none. Raises ValueError if low > high, or for NaN.

    >>> verdict(-0.01, 0.06)
    'is not shown to change'
    """
    if not low <= high:
        raise ValueError(f"the interval is {low} to {high}; its lower end must not be the higher")
    if low > 0 or high < 0:
        return up if low > 0 else down
    return same if margin is not None and max(-low, high) <= margin else unclear


# Numbers out of records


def value(source: RunRecord | str | Path, key: str) -> Any:
    """The value at a dotted key of a record, ``value(record, "results.seconds.train")``.

    Parts of the key are field names, dictionary keys or list positions; a key that contains a
    dot cannot be reached. Raises UserError naming the part that is missing, and what is there
    instead.
    """
    record = source if isinstance(source, RunRecord) else RunRecord.load(source)
    found: Any = vars(record)
    for depth, part in enumerate(key.split(".")):
        try:
            found = found[int(part)] if isinstance(found, list) else found[part]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            here = ".".join(key.split(".")[:depth]) or "the record"
            there = f"the value {found!r}"
            if isinstance(found, dict):
                there = ", ".join(map(str, found))
            elif isinstance(found, list):
                there = f"positions 0 to {len(found) - 1}"
            raise UserError(f"key {key!r}: no {part!r} in {here}, which has {there}") from error
    return found


def records_folder() -> Path:
    """``records/`` of the working directory, of a parent of it, of the source tree or the wheel."""
    here, (package, tree) = Path.cwd(), Path(__file__).resolve().parents[1:3]
    places = [p / "records" for p in (here, *here.parents, tree, package / "_lab")]
    return next((place for place in places if place.is_dir()), places[0])


OVER: dict[str, Callable[[list[Any]], Any]] = {
    "mean": fmean,
    "min": min,
    "max": max,
    "sum": sum,
    "count": len,
}


def number(
    record_name: str,
    key: str,
    fmt: str = "{:.1f}",
    scale: float = 1.0,
    folder: str | Path | None = None,
    over: str = "mean",
) -> str:
    """A number of ``records/<record_name>.json`` as text for prose, times ``scale``.

    ``number("smoke", "results.peak_rss_bytes", "{:.2f} GiB", scale=2**-30)``. A name with
    wildcards, ``run-seed?-ewc``, takes the number from every record that matches, and ``over``
    says how to combine them: mean, min, max, sum or count. Raises UserError if there is no such
    record, key or way to combine, or if ``fmt`` cannot show what is there.
    """
    folder = records_folder() if folder is None else Path(folder)
    paths = sorted(folder.glob(f"{record_name}.json"))
    if not paths:
        names = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "none"
        raise UserError(f"no record {record_name!r} in {folder}; there are: {names}")
    if over not in OVER:
        raise UserError(f"cannot take {over!r} of records; allowed are {', '.join(OVER)}")
    values = [value(path, key) for path in paths]
    try:
        several = len(values) > 1 or re.search(r"[*?\[]", record_name)
        found = OVER[over](values) if several else values[0]
        return fmt.format(found if scale == 1.0 else found * scale)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"{key!r} of record {record_name!r} is {values[0]!r}, which {fmt!r} cannot show; "
            "name a number, or give another fmt"
        ) from error


# The table of the README


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


COLUMNS: list[tuple[str, Callable[[float], str]]] = [
    ("Before", percent),
    ("After", percent),
    ("Difference, points (95 % interval)", _signed),
    ("Worst forgetting, points (95 % interval)", _signed),
    ("Time without evaluation", clock_time),
    ("Time in all", clock_time),
    ("Peak memory", gib),
]
"""What ``results_table`` shows of a run, and how to write it; the third and fourth column
have an interval."""

Ends = tuple[float, float]


def _run_numbers(record: RunRecord) -> tuple[list[float | None], dict[int, Ends]]:
    """The numbers of one run for ``COLUMNS``, and the interval of some, by their column."""
    results = record.results
    overall = results.get("comparisons", {}).get(MAIN, {}).get("overall", {})
    forgotten = [c for c in results.get("forgetting", {}).get("forgetting", {}).values() if c]
    worst: dict[str, Any] = max(forgotten, key=lambda cell: cell["points"], default={})
    seconds = results.get("seconds", {})
    total, evaluating = seconds.get("total"), seconds.get("evaluate")
    numbers = [overall.get(key) for key in ("before", "after", "difference")]
    numbers += [worst["points"] / 100 if worst else None]
    numbers += [None if None in (total, evaluating) else total - evaluating, total]
    numbers += [results.get("peak_rss_bytes")]
    ends = {}
    if overall:
        ends[2] = (overall["low"], overall["high"])
    if worst:
        ends[3] = (worst["points_low"] / 100, worst["points_high"] / 100)
    return numbers, ends


def _cells(numbers: Sequence[float | None], ends: Mapping[int, Ends]) -> list[str]:
    cells = ["–" if x is None else form(x) for x, (_, form) in zip(numbers, COLUMNS, strict=True)]
    for column, (low, high) in ends.items():
        cells[column] += f" ({points(low, high)})"
    return cells


def _mean_cells(runs: Sequence[Sequence[float | None]]) -> list[str]:
    """The means over runs, with the t interval over seeds where a run has one of its own."""
    known = [[x for x in column if x is not None] for column in zip(*runs, strict=True)]
    spreads = {i: over_seeds(known[i]) for i in (2, 3) if len(known[i]) > 1}
    means = [fmean(column) if column else None for column in known]
    cells = _cells(means, {i: (s.low, s.high) for i, s in spreads.items()})
    return [
        cell + (f" (n = {len(column)})" if 0 < len(column) < len(runs) else "")
        for cell, column in zip(cells, known, strict=True)
    ]


def ewc_acted(record: RunRecord) -> bool:
    """Whether a run's EWC penalty was on."""
    return bool(record.results.get("components", {}).get("ewc", {}).get("on"))


def results_table(records: Sequence[RunRecord]) -> str:
    """Markdown table of training runs: a row a seed, then their mean; without EWC, then with.

    The interval of one seed is about which problems were drawn (paired bootstrap), that of a
    mean about the seed (95 % t interval, ddof = 1). Forgetting is that of the difficulty that
    lost most; positive means lost. Raises UserError if a seed comes twice with the same state
    of EWC.
    """
    if not records:
        raise UserError("a results table needs at least one run record; none was given")
    groups: dict[str, dict[int, RunRecord]] = {"off": {}, "on": {}}
    for record in records:
        ewc = ewc_acted(record)
        group = groups["on" if ewc else "off"]
        if record.seed in group:
            state = "with" if ewc else "without"
            raise UserError(f"two records of seed {record.seed} {state} EWC; give one of each")
        group[record.seed] = record
    rows = []
    for state, group in groups.items():
        runs = [(seed, *_run_numbers(group[seed])) for seed in sorted(group)]
        rows += [[str(seed), state, *_cells(numbers, ends)] for seed, numbers, ends in runs]
        if len(runs) > 1:
            means = _mean_cells([numbers for _, numbers, _ in runs])
            rows.append([f"mean of {len(runs)} seeds", state, *means])
    return markdown_table(["Seed", "EWC", *(title for title, _ in COLUMNS)], rows)


def answers_table(record: RunRecord, most: int = 200) -> str:
    """Markdown table: the problems that a run's report shows, answered before and after.

    Their places in the exam chose them, not the answers. Longer answers end after ``most``
    characters.
    """
    rows = []
    for sample in value(record, "results.samples"):
        row = [f"{sample['question']} ({sample['answer']})"]
        for side in ("before", "after"):
            mark = "right" if sample[f"{side}_correct"] else "wrong"
            row.append(f"{mark}: {shorten(' '.join(sample[side].split()), most)}")
        rows.append(row)
    return markdown_table(["Problem (answer)", "Before training", "After"], rows)


def replace_between_markers(text: str, block: str, name: str = "results") -> str:
    """``text`` with everything between the two markers of this name replaced by ``block``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"the text must hold {begin} once and {end} once after it; add them")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{block.strip()}\n{end}{rest.split(end)[1]}"
