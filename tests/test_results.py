"""The readme's results are what the records give, and every record says where it comes from."""

from __future__ import annotations

import copy

import pytest
import results

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.show.text import answers_table, results_table, verdict

RECORD = RunRecord(
    kind="run",
    created="2030-01-01T00:00:00+00:00",
    seed=1,
    commit="0123456789" * 4,
    machine={"cpu": "A CPU", "usable_cores": 2, "total_memory": 8 * 2**30},
    versions={"python": "3.11.1", "torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0"},
    config={"seed": 1, "ewc_strength": 10.0, "steps": [16, 16, 16]},
    results={
        "components": {"ewc": {"on": True}},
        "seconds": {"evaluate": 10.0, "total": 50.0},
        "peak_rss_bytes": 2**30,
    },
)


def record(seed=1, ewc=True, **changes):
    made = copy.deepcopy(RECORD)
    made.seed = made.config["seed"] = seed
    made.results["components"]["ewc"]["on"] = ewc
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def between_markers(text, name="results"):
    return text.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0].strip()


# --- this checkout ------------------------------------------------------------------------------


def test_readme_holds_what_the_records_give():
    readme = results.README.read_text(encoding="utf-8")
    said = "the readme is not what records/ gives; run `make results`"
    bundled, chat = (
        results.read_runs(results.RECORDS, names) for names in (results.BUNDLED, results.CHAT)
    )
    assert between_markers(readme) == results.results_block(bundled), said
    assert between_markers(readme, "flagship") == results.flagship_block(chat), said


def test_every_run_record_says_where_it_comes_from():
    paths = sorted(results.RECORDS.glob("run-*.json"))
    missing = {path.name: results.missing_provenance(RunRecord.load(path)) for path in paths}
    assert not {name: what for name, what in missing.items() if what}
    if not paths:
        assert results.PLACEHOLDER in results.README.read_text(encoding="utf-8")
        print("no run is recorded yet, so the readme shows the placeholder")


# --- the tool -----------------------------------------------------------------------------------


def test_block_holds_the_means_and_their_origin(tmp_path):
    for made in (record(1), record(2), record(1, ewc=False)):
        made.save(tmp_path / f"run-seed{made.seed}-{made.results['components']['ewc']['on']}.json")
    record(3, kind="bench").save(tmp_path / "bench-1.json")  # not a training run
    runs = results.read_runs(tmp_path)
    assert len(runs) == 3
    block = results.results_block(runs)
    header, rule, *rows = results_table(runs).splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 1", "| 2", "| mean of 2 seeds"]
    assert block.startswith("\n".join([header, rule, rows[3], ""]) + "\n")
    for origin in ("A CPU, 2 usable cores, 8 GiB", "trl 1.16.0", "0123456789."):
        assert block.count(origin) == 1, origin


def test_block_of_one_run_holds_that_run():
    assert results.results_block([record(1)]).startswith(results_table([record(1)]) + "\n\n")


def test_block_names_every_machine_and_commit():
    other = record(2, commit="f" * 40 + "+dirty", machine={**RECORD.machine, "cpu": "B CPU"})
    block = results.results_block([record(1), other])
    assert "A CPU" in block and "B CPU" in block
    assert "0123456789; ffffffffff+dirty" in block


def test_block_says_how_often_working_is_shown():
    runs = [record(1), record(2)]
    assert "working" not in results.results_block(runs)
    for run, after in zip(runs, (0.75, 0.25), strict=True):
        run.results["working"] = {
            "before": {"share_with_working": 0.125},
            "after": {"share_with_working": after},
        }
    assert "their working: 12.5 % before, 50.0 % after" in results.results_block(runs)


def test_no_records_give_the_placeholder(tmp_path):
    assert results.results_block(results.read_runs(tmp_path)) == results.PLACEHOLDER
    assert results.flagship_block(results.read_runs(tmp_path, results.CHAT)) == results.PLACEHOLDER


def test_flagship_shows_the_first_answers_of_the_report_whatever_they_are():
    sample = {"question": "2 + 2?", "answer": "4", "before": "5\n|", "after": "x" * 300}
    sample |= {"before_correct": False, "after_correct": False}
    run = record()
    run.results["samples"] = [sample] * 3
    table = answers_table(run)
    assert table.count("2 + 2? (4)") == 3 and "wrong: 5 \\|" in table and "…" in table
    shown = results.flagship_block([run])
    assert shown.startswith(results_table([run])) and shown.count("2 + 2? (4)") == results.SHOWN


def test_main_writes_the_readme_and_a_stale_one_is_noticed(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- flagship:begin -->\nold\n<!-- flagship:end -->\n"
        "<!-- results:begin -->\n99 % by hand\n<!-- results:end -->\nafter\n"
    )
    monkeypatch.setattr(results, "README", readme)
    monkeypatch.setattr(results, "RECORDS", tmp_path)
    record().save(tmp_path / "run-seed1.json")
    with pytest.raises(AssertionError, match="make results"):
        test_readme_holds_what_the_records_give()
    results.main()
    test_readme_holds_what_the_records_give()
    assert readme.read_text().startswith("before\n") and readme.read_text().endswith("\nafter\n")


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("machine", {}),
        ("versions", {"python": "3.11.1"}),
        ("seed", 7),  # not the one in its configuration
        ("commit", "unknown"),
    ],
)
def test_a_record_without_its_origin_is_refused(tmp_path, monkeypatch, name, bad):
    made = record()
    setattr(made, name, bad)
    assert results.missing_provenance(record()) == []
    assert results.missing_provenance(made) == [name]
    made.save(tmp_path / "run-seed1.json")
    with pytest.raises(UserError, match=f"run-seed1.json does not say its {name}"):
        results.read_runs(tmp_path)
    monkeypatch.setattr(results, "RECORDS", tmp_path)
    with pytest.raises(AssertionError):
        test_every_run_record_says_where_it_comes_from()
    with pytest.raises(SystemExit, match="does not say its"):
        results.main()


def test_runs_with_other_settings_or_of_another_kind_are_refused(tmp_path):
    record(1).save(tmp_path / "run-seed1.json")
    record(2, config={**RECORD.config, "seed": 2, "steps": [1, 1, 1]}).save(
        tmp_path / "run-seed2.json"
    )
    with pytest.raises(UserError, match=r"run-seed2.json .*\(steps\)"):
        results.read_runs(tmp_path)
    record(2, kind="bench").save(tmp_path / "run-seed2.json")
    with pytest.raises(UserError, match="kind 'bench'"):
        results.read_runs(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "margin", "word"),
    [
        (0.01, 0.3, None, "rises"),
        (-0.3, -0.01, 0.5, "falls"),
        (-0.01, 0.01, None, "is not shown to change"),
        (-0.01, 0.01, 0.02, "stays within the margin"),
        (-0.03, 0.01, 0.02, "is not shown to change"),
        (0.0, 0.01, None, "is not shown to change"),
        (0.01, 0.012, 0.02, "rises"),
    ],
)
def test_a_verdict_says_no_more_than_its_interval(low, high, margin, word):
    assert verdict(low, high, margin=margin) == word


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.1), (float("nan"), 0.1)])
def test_there_is_no_verdict_without_an_interval(low, high):
    with pytest.raises(ValueError, match="interval"):
        verdict(low, high)
