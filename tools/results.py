"""Write the results in README.md from the records of training runs: `make results`.

Reads the runs in records/, refuses any that does not say where it comes from, and replaces the
text between the markers: the means over seeds and what they rest on, and, at the top, how a real
chat model answered before and after. The table of every seed is on the book's results page. Nobody
types a result by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.show.text import answers_table, ewc_acted, replace_between_markers, results_table

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RECORDS = ROOT / "records"
PLACEHOLDER = "No results recorded yet."
BUNDLED, CHAT = "run-seed*.json", "run-smollm2-seed*.json"
SHOWN = 2
"""Answers in the readme: the first of the report."""
COMPARED = {"seed", "ewc_strength"}
"""Only these may differ between the runs of one table; a mean over anything else means nothing."""


def missing_provenance(record: RunRecord) -> list[str]:
    """Which parts of a record's origin are missing; nobody can judge or repeat it without them."""
    there = {
        "machine": {"cpu", "usable_cores", "total_memory"} <= set(record.machine),
        "versions": {"python", "torch", "transformers", "trl"} <= set(record.versions),
        "seed": isinstance(record.seed, int) and record.config.get("seed") == record.seed,
        "commit": re.fullmatch(r"[0-9a-f]{40}(\+dirty)?", record.commit) is not None,
    }
    return [name for name, found in there.items() if not found]


def read_runs(folder: Path, pattern: str = BUNDLED) -> list[RunRecord]:
    """The training runs of these names. UserError if one lacks its origin or differs."""
    records = []
    for path in sorted(folder.glob(pattern)):
        record = RunRecord.load(path)
        if record.kind != "run":
            raise UserError(f"{path.name} is of kind {record.kind!r}, not 'run'; rename it")
        if missing := missing_provenance(record):
            raise UserError(
                f"{path.name} does not say its {', '.join(missing)}; "
                "record the run again, from a checkout with git"
            )
        first = records[0].config if records else record.config
        different = {
            key
            for key in {*record.config, *first} - COMPARED
            if record.config.get(key) != first.get(key)
        }
        if different:
            raise UserError(
                f"{path.name} ran with other settings than the first run "
                f"({', '.join(sorted(different))}); give it a name that does not begin with run-"
            )
        records.append(record)
    return records


def listed(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))


def habit(records: Sequence[RunRecord]) -> str:
    """How often completions show their working, so that nobody takes the gain for skill alone."""
    default = [record for record in records if not ewc_acted(record)]
    found = [r.results["working"] for r in default or records if "working" in r.results]
    if not found:
        return ""
    shares = []
    for side in ("before", "after"):
        values = [100 * working[side]["share_with_working"] for working in found]
        shares.append(f"{sum(values) / len(values):.1f} % {side}")
    runs = "the runs without EWC" if default else "all recorded runs"
    shown = ", ".join(shares)
    return f"Completions that show their working: {shown} (mean of {runs}).\n"


def headline(table: str) -> str:
    """The rows of means over seeds; a table without any stays whole."""
    header, rule, *rows = table.splitlines()
    means = [row for row in rows if row.startswith("| mean of")]
    return "\n".join([header, rule, *(means or rows)])


def results_block(records: Sequence[RunRecord]) -> str:
    """The text between the markers: the results, and where the numbers come from."""
    if not records:
        return PLACEHOLDER
    machines = listed(
        f"{r.machine['cpu']}, {r.machine['usable_cores']} usable cores, "
        f"{r.machine['total_memory'] / 2**30:.0f} GiB of memory"
        for r in records
    )
    packages = listed(
        ", ".join(
            f"{name} {r.versions[name]}" for name in ("python", "torch", "transformers", "trl")
        )
        for r in records
    )
    commits = listed(r.commit[:10] + r.commit[40:] for r in records)
    return (
        f"{headline(results_table(records))}\n\n"
        "Exact match on held-out problems, greedy; intervals over seeds (t). Forgetting: how many "
        "points the difficulty that lost most ends below its best; negative is a gain.\n"
        f"{habit(records)}"
        f"Machine: {machines}. Versions: {packages}. Commit: {commits}.\n"
        "Written by `make results` from [`records/`](records/); every seed: "
        "[results](book/results.md)."
    )


def flagship_block(records: Sequence[RunRecord]) -> str:
    """What the chat model learned, and its first answers before and after."""
    if not records:
        return PLACEHOLDER
    header, rule, *rows = answers_table(records[0]).splitlines()
    answers = "\n".join([header, rule, *rows[:SHOWN]])
    return f"{headline(results_table(records))}\n\n{answers}"


def main() -> None:
    try:
        records = read_runs(RECORDS)
        text = README.read_text(encoding="utf-8")
        text = replace_between_markers(text, results_block(records))
        text = replace_between_markers(text, flagship_block(read_runs(RECORDS, CHAT)), "flagship")
        README.write_text(text, encoding="utf-8")
    except UserError as error:
        sys.exit(f"results: {error}")
    print(f"{README.name}: {len(records)} runs")


if __name__ == "__main__":
    main()
