"""Write the results table of README.md from the records of training runs: `make results`.

Reads records/run-*.json, refuses any that does not say where it comes from, and
replaces what stands between the markers. Nobody types a result by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.show.report import replace_between_markers, results_table

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RECORDS = ROOT / "records"
PLACEHOLDER = "No results recorded yet."
COMPARED = {"seed", "ewc_strength"}
"""What may differ between the runs of one table; a mean over other differences says nothing."""


def missing_provenance(record: RunRecord) -> list[str]:
    """What of a record's origin is absent: without it nobody can judge or repeat the number."""
    there = {
        "machine": {"cpu", "usable_cores", "total_memory"} <= set(record.machine),
        "versions": {"python", "torch", "transformers", "trl"} <= set(record.versions),
        "seed": isinstance(record.seed, int) and record.config.get("seed") == record.seed,
        "commit": re.fullmatch(r"[0-9a-f]{40}(\+dirty)?", record.commit) is not None,
    }
    return [name for name, found in there.items() if not found]


def read_runs(folder: Path) -> list[RunRecord]:
    """The training runs recorded in a folder, each with its origin, comparable with each other."""
    records = []
    for path in sorted(folder.glob("run-*.json")):
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
    """How often completions show their working, so that no gain is taken for skill alone."""
    found = [r.results["working"] for r in records if "working" in r.results]
    if not found:
        return ""
    shares = []
    for side in ("before", "after"):
        values = [100 * working[side]["share_with_working"] for working in found]
        shares.append(f"{sum(values) / len(values):.1f} % {side}")
    return f"Completions that show their working: {', '.join(shares)} (mean of all runs above).\n"


def results_block(records: Sequence[RunRecord]) -> str:
    """What stands between the markers: the table, and where its numbers come from."""
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
        f"{results_table(records)}\n\n"
        "Exact match on held-out problems, greedy; a seed's interval is about the problems drawn "
        "(paired bootstrap), that of the mean about the seed (t). Forgetting: points that the "
        "difficulty that lost most is below its best; negative is a gain.\n"
        f"{habit(records)}"
        f"Machine: {machines}. Versions: {packages}. Commit: {commits}.\n"
        "Written by `make results` from [`records/`](records/)."
    )


def main() -> None:
    try:
        records = read_runs(RECORDS)
        text = README.read_text(encoding="utf-8")
        README.write_text(replace_between_markers(text, results_block(records)), encoding="utf-8")
    except UserError as error:
        sys.exit(f"results: {error}")
    print(f"{README.name}: {len(records)} runs")


if __name__ == "__main__":
    main()
