"""Studies: reduced versions run to a record, finished pieces are kept, the arithmetic holds."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from command_line import invoke
from lab_fixtures import ARGUMENTS, CHROMIUM, needs_browser

from cpugrpo_edu.engine import hardware
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab.pieces import Pieces, read_packed
from cpugrpo_edu.lab.studies import (
    ablations,
    chat_formats,
    common,
    cpu_or_gpu,
    generalisation,
    letters,
    quantization,
    real_model,
)
from cpugrpo_edu.lab.studies.registry import STUDIES
from cpugrpo_edu.lab.studies.setting import Setting
from cpugrpo_edu.lab.worker import silent
from cpugrpo_edu.models.load import load_policy
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.run import prepare
from cpugrpo_edu.run.config import check_settings
from cpugrpo_edu.run.scenarios import SCENARIOS
from cpugrpo_edu.tasks import make_problems

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    original = hardware.configure_threads
    monkeypatch.setattr(hardware, "configure_threads", lambda threads=None: original(1))
    monkeypatch.setattr(prepare, "configure_threads", lambda threads=None: original(1))


def run_reduced(name, tmp_path, *more):
    path = tmp_path / f"study-{name}.json"
    code, out, err = invoke(
        *("study", "run", name, "--reduced", "--output", path),
        *("--work", tmp_path / "work", "--cache", tmp_path / "cache", *more),
    )
    assert code == 0, err
    record = RunRecord.load(path)
    assert record.kind == f"study-{name}"
    for title, _, rows in STUDIES[name].tables(record):
        assert title in out and rows
    module = STUDIES[name].load()
    assert all(line in out for line in module.findings(record))
    plot = module.plot(record)
    assert len(plot.alt) > 60 and plot.figure.axes and plot.png()
    return record, path


def accuracies(table):
    return {
        label: each["correct"].count("1") / len(table["item_ids"])
        for label, each in table["answers"].items()
    }


# --- the list, the command ------------------------------------------------------------------


def test_every_study_has_its_parts():
    for name, study in STUDIES.items():
        module = study.load()
        assert study.module == module.__name__
        for part in ("run", "tables", "findings", "plot"):
            assert callable(getattr(module, part))
        assert (ROOT / "book" / "studies" / f"{name.replace('-', '_')}.md").exists()


def test_list_names_every_study_and_mistakes_end_with_a_sentence():
    code, out, _ = invoke("study", "list", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == list(STUDIES)
    for arguments, says in (
        (("nothing",), "allowed are quantization"),
        (("cpu-or-gpu", "--seeds", 2), "takes no --seeds"),
        (("ablations", "--model", "x"), "takes no --model"),
        (("ablations", "--seeds", 0), "at least 1"),
        (("ablations", "--only", "weather"), "allowed are order, ewc"),
        (("real-model", "--only", "weather"), "allowed are grpo, sft, rft"),
    ):
        code, out, err = invoke("study", "run", *arguments)
        assert code == 2 and out == "" and says in err and "Traceback" not in err


# --- pieces ---------------------------------------------------------------------------------


def test_pieces_are_done_once_unless_what_decides_them_changes(tmp_path):
    calls = []

    def call():
        calls.append(1)
        return {"n": len(calls)}

    pieces = Pieces(tmp_path, "toy", {"code": "a"})
    assert pieces.once("one, 1/2", call) == {"n": 1}
    assert Pieces(tmp_path, "toy", {"code": "a"}).once("one, 1/2", call) == {"n": 1}
    assert Pieces(tmp_path, "toy", {"code": "b"}).once("one, 1/2", call) == {"n": 2}
    [path] = (pieces.folder / "pieces").iterdir()
    path.write_bytes(path.read_bytes()[:10])
    assert pieces.once("one, 1/2", call) == {"n": 3}
    with pytest.raises(KeyboardInterrupt):
        pieces.once("two", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert pieces.once("two", call) == {"n": 4}


def test_holm_and_pairs_over_seeds():
    assert common.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert common.holm([0.9, 0.8]) == [1.0, 1.0]
    row = common.paired_over_seeds([0.1, 0.2, 0.3], [0.2, 0.4, 0.6])
    assert row["difference"] == pytest.approx(0.2) and row["low"] < 0.2 < row["high"]
    assert 0.05 < row["p_value"] < 0.1  # t = 3.46 with two degrees of freedom
    alone = common.paired_over_seeds([0.1], [0.2])
    assert alone["low"] is None and "no interval" in common.signed(alone)
    assert common.paired_over_seeds([0.5, 0.5], [0.5, 0.5])["p_value"] == 1.0


# --- quantization ---------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32), (4, None)])
def test_rounded_weights_are_the_nearest_of_few_values(bits, group):
    torch.manual_seed(0)
    weight = torch.randn(6, 80)
    rounded = quantization.round_groups(weight, bits, group)
    assert rounded.shape == weight.shape
    for row, back in zip(weight, rounded):
        for part, values in zip(row.split(group or 80), back.split(group or 80)):
            scale = part.abs().max() / (2 ** (bits - 1) - 1)
            assert (part - values).abs().max() <= scale / 2 + 1e-6
            assert len(values.unique()) <= 2**bits - 1
    assert quantization.round_groups(torch.zeros(2, 8), bits, group).abs().max() == 0


def test_formats_leave_the_model_and_the_head_alone_and_order_by_error():
    policy = load_policy("bundled")
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    problems = [make_problems("arithmetic", "basic", "train", 1, seed=3)[0]]
    errors, sizes = {}, {}
    for chosen in quantization.FORMATS:
        changed = chosen.make(policy.model)
        errors[chosen.name] = quantization.layer_errors(policy, changed, problems)
        sizes[chosen.name] = quantization.stored_bytes(policy.model, chosen, changed)
        if chosen.simulated:
            head = changed.get_output_embeddings().weight
            assert torch.equal(head, policy.model.get_output_embeddings().weight)
    assert all(torch.equal(before[n], p) for n, p in policy.model.named_parameters())
    assert errors["fp32"] == {"output_error": 0.0, "weight_error": 0.0}
    for key in quantization.PREDICTORS:
        four = errors["INT4 weight-only"][key]
        assert 0 < errors["INT8 weight-only"][key] < four
        assert 0 < errors["bf16"][key] < four
    total = sum(p.numel() for p in policy.model.parameters())
    for name, each in (("fp32", 4), ("bf16", 2)):  # and the buffers, a few numbers
        assert each * total <= sizes[name] < each * total + 1000
    assert sizes["INT4 weight-only"] < sizes["INT8 weight-only"] < sizes["bf16"]


def test_a_predictor_is_judged_on_models_that_it_has_not_seen():
    rows = [
        {
            "model": model,
            "format": form,
            "loss": 0.5 * error * size,
            "output_error": error * size,
            "weight_error": 0.3,
        }
        for model, size in (("a", 1.0), ("b", 2.0), ("c", 4.0))
        for form, error in (("INT8", 0.01), ("INT4", 0.1))
    ]
    judged = quantization.judge_predictors(rows)
    errors = judged["mean_absolute_error"]
    assert errors["output_error"] == pytest.approx(0, abs=1e-12)
    assert errors["no loss"] == pytest.approx(sum(r["loss"] for r in rows) / 6)
    assert errors["weight_error"] > 0.01 and errors["mean loss of the format"] > 0.01
    changed = [{**r, "loss": 9.0} if r["model"] == "a" else r for r in rows]
    again = quantization.judge_predictors(changed)
    for old, new in zip(judged["rows"], again["rows"]):
        if old["model"] == "a":
            assert old["predicted"] == new["predicted"]
    with pytest.raises(UserError, match="at least 2"):
        quantization.judge_predictors(rows[:2])


def test_levels_and_offsets_round_to_the_nearest():
    torch.manual_seed(0)
    weight = torch.randn(3, 96)
    nf4 = chat_formats.round_to_levels(weight, chat_formats.NF4, 32)
    for part, values in zip(weight.split(32, 1), nf4.split(32, 1), strict=True):
        table = torch.tensor(chat_formats.NF4) * part.abs().amax(1, keepdim=True)
        best = (part[..., None] - table[:, None]).abs().min(-1).values
        assert torch.allclose((part - values).abs(), best, atol=1e-6)
    offset = chat_formats.round_with_offset(weight, 4, 32)
    for part, values in zip(weight.split(32, 1), offset.split(32, 1), strict=True):
        step = (part.amax(1) - part.amin(1)) / 15
        assert ((part - values).abs().amax(1) < 0.51 * step + 2e-3).all()
        assert all(len(row.unique()) <= 16 for row in values)
    again = chat_formats.round_with_offset(offset, 4, 32)
    assert (again - offset).abs().max() < 2e-3  # rounded weights stay where they are
    flat = torch.full((2, 32), 0.25)
    assert torch.equal(chat_formats.round_with_offset(flat, 4, 32), flat)


@pytest.mark.slow
def test_reduced_chat_formats(tmp_path):
    record, path = run_reduced("chat-formats", tmp_path)
    rows = record.results["rows"]
    assert len(rows) == 2 * len(chat_formats.FORMATS)
    found = accuracies(read_packed(path.with_name("study-chat-formats.items.json.gz")))
    for row in rows:
        assert row["accuracy"]["accuracy"] == found[f"{row['model']} | {row['format']}"]
        assert (row["kl"] == 0) == (row["format"] == "fp32")
    drift = {row["format"]: row["kl"] for row in rows if row["model"] == "after GRPO"}
    assert drift["INT8 weights, blocks of 32 (as Q8_0)"] < drift["4 bits, blocks of 32"]
    assert set(record.results["predictor"]) == {"no loss", *quantization.PREDICTORS}


@pytest.mark.slow
def test_reduced_quantization(tmp_path):
    record, path = run_reduced("quantization", tmp_path)
    items = read_packed(path.with_name("study-quantization.items.json.gz"))
    table = items["formats"]
    assert {len(set(table["domains"])), len(set(table["difficulties"]))} == {4, 3}
    found = accuracies(table)
    for row in record.results["rows"]:
        measured = found[f"{row['model']} | {row['format']}"]
        assert row["accuracy"]["accuracy"] == pytest.approx(measured)
        assert (row["tokens_per_second"] is None) == row["simulated"]
    assert len(record.results["rows"]) == 3 * len(quantization.FORMATS)
    assert set(record.results["rollouts"]) == set(quantization.ARMS)
    changed = [r["runs"][0]["after"] for r in record.results["rollouts"].values()]
    assert all(0 <= share <= 1 for share in changed)
    made = quantization.member_folder(quantization.TINY[0], tmp_path / "cache")
    assert (made / "pretraining.json").exists()


def test_the_estimate_counts_only_models_that_are_missing(tmp_path):
    setting = Setting(cache=tmp_path)
    assert quantization.estimate(setting).startswith("5 of 5 models")
    folder = quantization.member_folder(quantization.FAMILY[0], tmp_path)
    folder.mkdir(parents=True)
    (folder / "pretraining.json").write_text("{}")
    assert quantization.estimate(setting).startswith("4 of 5 models")
    minutes = [quantization.pretraining_minutes([m])[0] for m in quantization.FAMILY]
    assert min(minutes) > 0 and minutes[0] < minutes[-1]


# --- CPU or GPU -----------------------------------------------------------------------------

VALUES = {
    **{each.key: each.value for each in cpu_or_gpu.ASSUMPTIONS},
    **{"students": 10, "runs": 6, "seconds": 600, "electricity": 0.5, "gpu_speed": 10},
    **{"cpu_setup": 0, "cpu_price": 0.1, "cpu_watts": 20, "cpu_machines": 4, "gpu_setup": 0},
    **{"gpu_price": 1.0, "gpu_watts": 400, "laptop_setup": 30, "laptop_watts": 40},
}


def test_the_calculator_by_hand():
    found = cpu_or_gpu.calculate(VALUES)
    assert found["cpu"] == pytest.approx(
        {"hours_each": 1, "machine_hours": 10, "wall_hours": 3, "kwh": 0.2, "money": 1.0}
    )
    assert found["laptop"] == pytest.approx(
        {"hours_each": 1.5, "machine_hours": 15, "wall_hours": 1.5, "kwh": 0.6, "money": 0.3}
    )
    assert found["gpu"] == pytest.approx(
        {"hours_each": 0.1, "machine_hours": 1, "wall_hours": 1, "kwh": 0.4, "money": 1.0}
    )
    assert found["gpu_pays_from"] == pytest.approx({"money": 10, "energy": 20})


@pytest.mark.parametrize("setup", [0, 1.5])
def test_at_the_speed_from_which_it_pays_the_gpu_costs_the_same(setup):
    values = {**VALUES, "gpu_setup": setup}
    for name, key in (("money", "money"), ("energy", "kwh")):
        speed = cpu_or_gpu.calculate(values)["gpu_pays_from"][name]
        at = cpu_or_gpu.calculate({**values, "gpu_speed": speed})
        assert at["gpu"][key] == pytest.approx(at["cpu"][key])
    never = cpu_or_gpu.calculate({**values, "gpu_setup": 60})["gpu_pays_from"]
    assert never["money"] is None
    assert "no money at any speed" in cpu_or_gpu.pays_text({"gpu_pays_from": never})


def test_without_a_speed_there_is_no_gpu_number():
    found = cpu_or_gpu.calculate({**VALUES, "gpu_speed": None})
    assert found["gpu"] is None and found["gpu_pays_from"]["money"] == pytest.approx(10)
    assert "–" in cpu_or_gpu.class_rows(found)[2]
    unmeasured = [a for a in cpu_or_gpu.ASSUMPTIONS if a.key == "gpu_speed"]
    assert unmeasured[0].value is None and "not measured" in unmeasured[0].source


def test_calculator_command():
    code, out, _ = invoke("calculator", "--set", "students=4", "--set", "gpu_speed=8", "--json")
    assert code == 0
    given = {a["key"]: a for a in json.loads(out)["assumptions"]}
    assert given["students"]["value"] == 4 and given["gpu_speed"]["source"] == "given"
    code, out, _ = invoke("calculator")
    assert code == 0 and "measured: mean of" in out and "The GPU against the cloud CPU" in out
    for text, says in (
        ("students=many", "a name and a number"),
        ("weather=1", "allowed are students"),
        ("students=0", "at least 1"),
        ("gpu_price=nan", "at least 0"),
    ):
        code, _, err = invoke("calculator", "--set", text)
        assert code == 2 and says in err


def test_cpu_or_gpu_is_held_against_the_records(tmp_path):
    record, _ = run_reduced("cpu-or-gpu", tmp_path)
    runs = cpu_or_gpu.recorded_runs()
    rows = record.results["validation"]["repeat"]
    assert len(rows) == len(runs)
    for row in rows:
        assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    first = next(r for r in runs if r.seed == rows[0]["seed"] and not rows[0]["ewc"])
    others = [r.results["seconds"]["total"] for r in runs if r is not first]
    match = [r for r in rows if r["measured"] == first.results["seconds"]["total"]]
    if match:
        assert match[0]["predicted"] == pytest.approx(sum(others) / len(others))
    model = record.results["validation"]["cost_model"]
    assert bool(model["rows"]) != bool(model["why_none"])
    assert record.results["arithmetic"]["operations"] > 1e11


@needs_browser
def test_the_page_calculates_as_the_package_does():
    playwright = pytest.importorskip("playwright.sync_api")
    script = (ROOT / "book" / "_static" / "calculator.js").read_text(encoding="utf-8")
    cases = [VALUES, {**VALUES, "gpu_speed": None, "gpu_setup": 60}, {**VALUES, "gpu_price": 0}]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page()
        page.set_content(f"<html><body>{extension().calculator_form()}</body></html>")
        page.add_script_tag(content=script)
        for values in cases:
            theirs = page.evaluate("v => calculate(v)", values)
            ours = cpu_or_gpu.calculate(values)
            for part, each in ours.items():
                assert theirs[part] == (each if each is None else pytest.approx(each))
        shown = "form => { showCalculator(form); return form.innerText }"
        form = page.locator("form.calculator")
        page.fill("[name=gpu_speed]", "25")
        text = form.evaluate(shown)
        inputs = cpu_or_gpu.assumptions({"gpu_speed": 25})
        row = cpu_or_gpu.class_rows(cpu_or_gpu.calculate(cpu_or_gpu.values_of(inputs)))[2]
        assert re.search(r"\s+".join(map(re.escape, row)), text)
        page.fill("[name=students]", "-1")
        assert "Students, persons: give a number of at least 1." in form.evaluate(shown)
        assert page.get_attribute("[name=students]", "aria-invalid") == "true"
        browser.close()


# --- ablations, generalisation --------------------------------------------------------------


def completions_of(config) -> int:
    """Completions that a run samples for training: the compute that is held equal."""
    return sum(config.steps) * config.prompts_per_step * config.num_generations


def test_every_arm_is_allowed_and_samples_as_much_as_the_others():
    default = ablations.config_of(ablations.ARMS[0], 0, False)
    assert len({arm.name for arm in ablations.ARMS}) == len(ablations.ARMS)
    for reduced in (False, True):
        sizes = set()
        for arm in ablations.ARMS:
            config = ablations.config_of(arm, 0, reduced)
            check_settings(config)
            sizes.add(completions_of(config))
        assert len(sizes) == 1, reduced
    assert completions_of(default) == 18 * ablations.COMPLETIONS
    for arm in ablations.ARMS[1:]:
        assert replace(default, **arm.change) != default, arm.name


def test_arms_are_compared_by_seed():
    rows = [
        {
            "arm": arm,
            "factor": "none" if arm == ablations.BASE else "loss",
            "seed": seed,
            "accuracy": 0.1 * seed + gain + 0.001 * seed * bool(gain),
            "forgetting": None,
            "seconds": 1.0,
            "peak_rss_bytes": 1,
            "completions": 8,
            "tokens": 9,
        }
        for seed in range(5)
        for arm, gain in ((ablations.BASE, 0.0), ("same", 0.0), ("better", 0.05))
    ]
    found = {each["arm"]: each for each in ablations.summarize(rows)}
    assert "accuracy_difference" not in found[ablations.BASE]
    better = found["better"]["accuracy_difference"]
    assert better["difference"] == pytest.approx(0.052) and better["p_holm"] < 0.001
    assert found["same"]["accuracy_difference"]["p_holm"] == 1.0
    assert "forgetting_difference" not in found["same"]


def test_every_condition_trains_as_long_as_the_others():
    for reduced in (False, True):
        total = set()
        for condition in generalisation.conditions(reduced):
            config = generalisation.config_of(condition, 0, reduced)
            check_settings(config)
            total.add(completions_of(config))
            trained = [stage for stage in config.stages if stage.steps]
            if condition.kind == "difficulty":
                assert {k for k, v in trained[0].mixture.items() if v} == {condition.name}
            elif condition.kind == "domain":
                assert config.domains == (condition.name,)
        assert len(total) == 1


@pytest.mark.slow
def test_reduced_ablations_and_their_resumption(tmp_path, monkeypatch):
    record, path = run_reduced("ablations", tmp_path)
    table = read_packed(path.with_name("study-ablations.items.json.gz"))
    found = accuracies(table)
    for row in record.results["runs"]:
        assert row["accuracy"] == pytest.approx(found[f"{row['arm']} | seed {row['seed']}"])
    assert len({row["completions"] for row in record.results["runs"]}) == 1
    monkeypatch.setattr(common, "run", lambda *a, **k: pytest.fail("a finished run ran again"))
    again, _ = run_reduced("ablations", tmp_path)
    assert again.results == record.results


@pytest.mark.slow
def test_reduced_generalisation(tmp_path):
    record, path = run_reduced("generalisation", tmp_path)
    table = read_packed(path.with_name("study-generalisation.items.json.gz"))
    found = accuracies(table)
    start = record.results["before"]["domain"]
    assert sum(start.values()) / len(start) == pytest.approx(found["before"])
    for row in record.results["gains"]:
        level = record.results["before"][row["kind"]][row["tested"]]
        assert row["difference"] == pytest.approx(row["accuracy"] - level)
    assert not list((tmp_path / "work").glob("**/model.safetensors"))


def taken(right, stories, nats, people=()):
    difficulties = ["basic", "intermediate", "advanced"]
    exam = {"correct": stories, "difficulties": difficulties}
    row = {"stories": exam, "longer": exam, "people": []}
    row |= {"right": right, "vote": [r > 1 for r in right]}
    if people:
        row["people"] = {"correct": list(people), "difficulties": ["basic"] * len(people)}
    row |= {"tokens": 9.0, "kl_nats": nats - 3}
    return row | {"difficulties": difficulties, "plain_nats": nats}


def test_arms_of_the_real_model_are_compared_with_the_base_by_seed():
    measured = {
        "base": [taken([0, 1, 4], [False, False, True], 3.0, (True, False))],
        "grpo": [
            taken([0, 4, 4], [False, True, True], 3.1, (True, True)),
            taken([0, 3, 4], [True, True, True], 3.3, (True, False)),
        ],
        "sft": [
            taken([0, 4, 4], [False, False, True], 3.1, (True, True)),
            taken([0, 3, 4], [False, True, True], 3.3, (True, False)),
        ],
    }
    results = {"samples": 4} | real_model.summary(measured, 4)
    arms = results["arms"]
    assert arms["base"]["stories"]["all"]["mean"] == pytest.approx(1 / 3)
    grpo = arms["grpo"]
    assert grpo["stories"]["all"]["difference"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert grpo["stories"]["basic"]["mean"] == 0.5 and grpo["people"]["difference"] == 0.25
    assert grpo["pass"]["1"]["difference"] == pytest.approx((3 / 4 + 2 / 4) / 2 / 3)
    assert grpo["pass"]["4"]["difference"] == 0  # nothing that four base answers do not solve
    assert grpo["vote"]["mean"] == pytest.approx(2 / 3)
    assert grpo["plain_nats"]["difference"] == pytest.approx(0.2)
    assert results["grpo_minus"]["sft"]["difference"] == pytest.approx(1 / 3)
    results["seconds"] = {"grpo": [60.0, 120.0], "sft": [90.0, 90.0]}
    record = new_record("study-real-model", {"seeds": 2}, results)
    said = real_model.findings(record)
    assert any("pass@4 is not shown to change" in line for line in said) and len(said) == 12
    assert said[0] == "Not measured yet: SFT on own right answers."
    assert "GRPO against SFT" in said[-1] and "(+33.3 (+33.3 to +33.3) points)" in said[-1]
    greedy, _, plain = real_model.tables(record)
    assert "+0.200" in str(plain) and [row[3:] for row in plain[2]] == [
        ["0.000", "9"],
        ["0.200", "9"],
        ["0.200", "9"],
    ]
    assert [row[1] for row in greedy[2]] == ["0.0", "1.5", "1.5"]


@pytest.mark.slow
def test_reduced_real_model(tmp_path):
    record, path = run_reduced("real-model", tmp_path)
    items = read_packed(path.with_name("study-real-model.items.json.gz"))
    assert set(items) == {"base", "grpo", "sft", "rft"} == set(record.results["arms"])
    assert all(len(rows) == 1 and len(rows[0]["right"]) == 6 for rows in items.values())
    arms = record.results["arms"]
    assert len({part["plain_nats"]["mean"] for part in arms.values()}) == 4  # different models
    far = {arm: part["kl_nats"]["mean"] for arm, part in arms.items()}
    assert far["base"] == 0 and min(far["grpo"], far["sft"], far["rft"]) > 0


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own_goes_on_and_tells_mistakes(tmp_path):
    config = ablations.config_of(ablations.ARMS[0], 0, True)
    config = replace(config, steps=(1, 0, 0), fisher_examples=0, threads=1)
    record = common.run_or_resume(config, tmp_path / "run", silent, apart=True)
    assert record.results["peak_rss_bytes"] > 0
    assert {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()} == {"evaluations"}
    with pytest.raises(UserError, match="unknown --order 'odd'"):
        common.run_or_resume(replace(config, order="odd"), tmp_path / "odd", silent, apart=True)


# --- the book -------------------------------------------------------------------------------


def extension():
    spec = importlib.util.spec_from_file_location("studies", ROOT / "book" / "_ext" / "studies.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_say_what_was_not_run_and_what_was_reduced(tmp_path, monkeypatch):
    pages = extension()
    monkeypatch.setattr(pages, "RECORDS", tmp_path)
    for name in STUDIES:
        assert "Not run yet" in pages.study_text(name)
    assert pages.table_studies().count("not run yet") == len(STUDIES)
    rows = [
        {
            "kind": "domain",
            "trained": "a",
            "tested": "b",
            "own": False,
            "accuracy": 0.5,
            "difference": 0.1,
            "low": None,
            "high": None,
            "p_value": None,
        }
    ]
    results = {"before": {"domain": {"b": 0.4}, "difficulty": {}}, "gains": rows}
    record = new_record("study-generalisation", {"reduced": True}, results)
    record.save(tmp_path / "study-generalisation.json")
    text = pages.study_text("generalisation")
    assert "reduced version" in text and "+10.0 (no interval)" in text
    assert "reduced version only" in pages.table_studies()


def test_every_input_of_the_form_has_a_label_and_a_source():
    form = extension().calculator_form()
    for each in cpu_or_gpu.ASSUMPTIONS:
        assert f'<label for="calc-{each.key}">' in form
        assert f'id="calc-{each.key}-source"' in form
    assert form.count("<input") == len(cpu_or_gpu.ASSUMPTIONS)


def test_the_page_on_generalisation_shows_the_cells_that_it_names():
    record = RunRecord.load(ROOT / "records" / "study-generalisation.json")
    page = (ROOT / "book" / "studies" / "generalisation.md").read_text(encoding="utf-8")
    shown = [int(i) for i in re.findall(r"results\.gains\.(\d+)\.difference", page)]
    cells = [record.results["gains"][i] for i in shown]
    assert [(cell["trained"], cell["tested"]) for cell in cells] == [
        ("arithmetic", "lists"),
        ("lists", "algebra"),
        ("basic", "advanced"),
        ("advanced", "advanced"),
    ]


def test_the_page_on_quantization_says_what_its_record_says():
    record = RunRecord.load(ROOT / "records" / "study-quantization.json")
    mean = record.results["predictor"]["mean_absolute_error"]
    assert min(mean, key=lambda name: mean[name]) == "output_error"
    assert mean["no loss"] - mean["output_error"] < 0.003
    clear = {
        (row["model"], row["format"]): row["against_fp32"]["overall"]["difference"]
        for row in record.results["rows"]
        if "against_fp32" in row and row["against_fp32"]["overall"]["p_holm"] < 0.05
    }
    better = {cell for cell, difference in clear.items() if difference > 0}
    assert better == {("bundled after GRPO", "INT8 dynamic, per channel")}
    assert {chosen for _, chosen in clear.keys() - better} == {"INT4 weight-only"}


def test_ablations_say_what_confounds_them_and_how_wide_their_nulls_are():
    record = RunRecord.load(ROOT / "records" / "study-ablations.json")
    said = "\n".join(ablations.findings(record))
    rows = {e["arm"]: e.get("accuracy_difference") for e in record.results["arms"]}
    if record.config["default"]["ewc_strength"]:
        assert said.startswith("**In this record the default has EWC on, at 0.1 (")
        assert f"{100 * rows['no EWC']['difference']:+.1f}" in said.splitlines()[0]
    null = [row for row in rows.values() if row and row["p_holm"] >= 0.05]
    ends = 100 * min(r["low"] for r in null), 100 * max(r["high"] for r in null)
    assert said.endswith(f"from {ends[0]:+.1f} to {ends[1]:+.1f} points.")
    free = copy.deepcopy(record)
    free.config["default"]["ewc_strength"] = 0.0
    assert "EWC on" not in "\n".join(ablations.findings(free))


def test_the_pages_that_compare_runs_with_and_without_ewc_say_what_the_records_say():
    """claims.md and seed_map.md: in the default stages EWC cost accuracy."""
    gains = {
        arm: [
            RunRecord.load(path).results["comparisons"]["after vs before"]["overall"]["difference"]
            for path in sorted((ROOT / "records").glob(f"run-seed?-{arm}.json"))
        ]
        for arm in ("ewc", "no-ewc")
    }
    assert common.paired_over_seeds(gains["no-ewc"], gains["ewc"])["high"] < 0


def test_the_scenario_has_the_strength_that_its_study_chose():
    record = RunRecord.load(ROOT / "records" / "study-letters.json")
    chosen, rows = record.results["chosen"], record.results["choice"]
    assert SCENARIOS["letters"].settings["ewc_strength"] == chosen["EWC"]
    for arm in letters.SPRINGS:
        means = {
            s: fmean(r["after"]["all"] for r in rows if (r["arm"], r["strength"]) == (arm, s))
            for s in record.config["strengths"]
        }
        assert means[chosen[arm]] == max(means.values())
    assert not {r["seed"] for r in rows} & {r["seed"] for r in record.results["runs"]}


def test_letters_compare_arms_of_the_same_seed():
    """Three arms of two seeds; the differences by hand."""
    ends = {"none": (0.1, 0.3), "EWC": (0.5, 0.9), "uniform": (0.4, 0.4)}
    rows = [
        {"arm": arm, "seed": seed, "after": dict.fromkeys(("all", *letters.DIFFICULTIES), value)}
        for arm, values in ends.items()
        for seed, value in enumerate(values)
    ]
    pairs = {(p["arm"], p["base"]): p for p in letters.contrasts(rows) if p["tested"] == "all"}
    assert pairs["EWC", "none"]["difference"] == pytest.approx(0.5)
    assert pairs["EWC", "none"]["low"] == pytest.approx(0.5 - 12.706 * 0.1, abs=1e-3)
    assert pairs["EWC", "uniform"]["difference"] == pytest.approx(0.3)
    tried = [
        {"arm": "EWC", "strength": s, "after": {"all": a}}
        for s, a in ((1.0, 0.5), (0.1, 0.5), (3.0, 0.2))
    ]
    assert letters.best_strength(tried, "EWC") == 0.1  # of equal ones the weaker


@pytest.mark.slow
def test_reduced_letters(tmp_path):
    record, _ = run_reduced("letters", tmp_path)
    assert {row["arm"] for row in record.results["runs"]} == {"none", *letters.SPRINGS}
    assert "One seed" in letters.findings(record)[0]
    assert len(letters.tables(record)) == 4 and letters.plot(record).alt
