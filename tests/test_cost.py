"""The cost model: work is counted right, coefficients are found, estimates make sense."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import pytest

from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.sizes import CATALOGUE, Architecture
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab import estimate, floors
from cpugrpo_edu.lab.cost import (
    Fit,
    StepSpec,
    fit,
    fit_sweep,
    memory_work,
    rollout_work,
    training_work,
)
from cpugrpo_edu.lab.estimate import catalogue_steps, estimate_run, estimate_text, run_parts
from cpugrpo_edu.lab.floors import calibration
from cpugrpo_edu.lab.tables import sweep_rows
from cpugrpo_edu.models.load import load_policy
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.run.config import RunConfig, config_for
from cpugrpo_edu.tasks import held_out_problems, split_of

RECORDS = Path(__file__).resolve().parent.parent / "records"

FLOORS = {
    "float32_gflops": 100.0,
    "bfloat16_gflops": 200.0,
    "int8_gops": 300.0,
    "compiled_gops": 500.0,
    "read_gb_per_second": 20.0,
    "int8_weight_gb_per_second": 15.0,
    "call_seconds": 1e-5,
}
SHAPE = Architecture("small", 8, 512, 2048, 8, 2, 16_384, True)
STEPS = [
    StepSpec(
        replace(SHAPE, layers=layers), group=group, tokens=tokens, frozen=frozen, reference=True
    )
    for layers, group, tokens, frozen in (
        *((8, group, 32, True) for group in (2, 4, 8, 16)),
        *((8, 4, tokens, True) for tokens in (16, 64, 128)),
        *((layers, 4, 32, True) for layers in (2, 16, 24)),
        *((8, group, 32, False) for group in (2, 8)),
    )
]
STEPS += [
    replace(
        STEPS[0], architecture=replace(SHAPE, **shape), group=group, tokens=tokens, compiled=True
    )
    for shape, group, tokens in (
        *(({}, group, 32) for group in (2, 4, 8, 32)),
        *(({}, 4, tokens) for tokens in (16, 128)),
        *(({"layers": layers}, 4, 32) for layers in (2, 16)),
        ({"ffn": 8192}, 4, 32),
        ({"hidden": 1024}, 4, 32),
    )
]
STEPS += [replace(STEPS[0], prompts=prompts, frozen=False) for prompts in (4, 16)]
TRUE_ROLLOUT = {
    "calls": 40.0,
    "int8 weights": 0.7,
    "compiled operations": 1.8,
    "float32 weights": 1.5,
    "operations": 2.0,
    "traffic": 3.0,
    "prompts": 60.0,
}
TRUE_TRAINING = {
    "step": 8.0,
    "calls": 90.0,
    "int8 operations": 1.7,
    "compiled operations": 1.4,
    "float32 operations": 1.3,
}
TRUE_MEMORY = {"libraries": 0.6, "state": 1.0, "micro-batch": 1.5, "cache": 2.0}


def point(step):
    rollout = Fit(TRUE_ROLLOUT, [])(rollout_work(step, FLOORS))
    return {
        "step": asdict(step),
        "rollout_seconds": rollout,
        "step_seconds": rollout + Fit(TRUE_TRAINING, [])(training_work(step, FLOORS)),
        "load_seconds": 3.0,
        "peak_rss_bytes": Fit(TRUE_MEMORY, [])(memory_work(step)),
    }


RESULTS = {"points": [point(step) for step in STEPS], "model": {"floors": FLOORS}}


@pytest.fixture(scope="module")
def model():
    return fit_sweep(RESULTS)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A record of the sweep, found by every command; the machine's floors are those above."""
    folder = tmp_path / "records"
    RunRecord("bench-sweep", "", 0, "", {}, {}, {}, RESULTS).save(folder / "bench-sweep.json")
    monkeypatch.setattr(estimate, "records_folder", lambda: folder)
    monkeypatch.setattr("cpugrpo_edu.lab.recorded.records_folder", lambda: folder)
    monkeypatch.setattr(estimate, "calibration", lambda: FLOORS)
    return folder / "bench-sweep.json"


def test_work_is_counted_as_by_hand():
    step = StepSpec(SHAPE, group=4, prompt_tokens=10, tokens=6)
    blocks = 8 * (2 * 512 * (512 + 128) + 3 * 512 * 2048)
    head = 16_384 * 512
    many = rollout_work(replace(step, prompts=100), FLOORS)  # two batches of at most 256 rows
    assert many["calls"] == pytest.approx(2 * 6 * 8 * 1e-5) and many["prompts"] == 100 * 1e-5
    assert (SHAPE.linear_parameters, step.rows) == (blocks, 4)
    work = rollout_work(step, FLOORS)
    assert work["calls"] == pytest.approx(6 * 8 * 1e-5)
    assert work["int8 weights"] == pytest.approx(6 * (blocks + head) / 15e9)
    assert work["operations"] == pytest.approx(2 * (24 * (blocks + head) + 10 * blocks) / 300e9)
    # In C a token is one call, but not of many rows, and weights are read as fast as can be.
    for group, calls in ((4, 6), (40, 6)):
        in_c = rollout_work(replace(step, group=group, compiled=True), FLOORS)
        assert in_c["calls"] == pytest.approx(calls * 1e-5)
        assert in_c["int8 weights"] == pytest.approx(6 * (blocks + head) / 20e9)
    floating = rollout_work(replace(step, frozen=False), FLOORS)
    assert floating["float32 weights"] == pytest.approx(6 * 4 * (blocks + head) / 20e9)
    # Full fine-tuning in float32: forward, and backward to inputs and weights
    full = training_work(replace(step, frozen=False, lora_rank=0), FLOORS)
    attention = 4 * 3 * 4 * 16**2 * 8 * 512
    assert full["float32 operations"] == pytest.approx((2 * 3 * 64 * blocks + attention) / 100e9)
    assert full["calls"] == pytest.approx(3 * 8 * 1e-5)
    # On an INT8 base: forward and backward to the inputs, behind one copy of the prompt
    lora = training_work(step, FLOORS)
    attention = 4 * 2 * 34**2 * 8 * 512 / 100e9
    assert lora["int8 operations"] == pytest.approx(2 * 2 * 34 * blocks / 300e9 + attention)


def test_memory_is_counted_as_by_hand():
    step = StepSpec(SHAPE, group=4, prompt_tokens=10, tokens=6)
    work = memory_work(step)
    adapters = SHAPE.lora_parameters(16)
    assert work["state"] == 1.125 * SHAPE.parameters + 16 * adapters
    assert work["micro-batch"] == 4 * 8 * (6 * 512 + 4 * 512) * (10 + 24)
    assert work["cache"] == 2 * 4 * 8 * 128 * 4 * 16
    full = memory_work(replace(step, frozen=False, lora_rank=0, reference=True))
    assert full["state"] == (2 * 4 + 12) * SHAPE.parameters
    each = 4 * (8 * SHAPE.layer_activations * 16 + 3 * SHAPE.vocab * 6)
    assert full["micro-batch"] == 4 * each
    many = memory_work(replace(step, frozen=False, prompts=1000))
    assert many["micro-batch"] < 100 * 2**20  # the trainer takes a few completions at a time
    assert many["cache"] == 2 * 4 * 8 * 128 * EngineOptions.max_rows * 16


def test_the_fit_recovers_the_coefficients_it_was_given(model):
    assert model.rollout.coefficients == pytest.approx(TRUE_ROLLOUT, rel=1e-4)
    assert model.training.coefficients == pytest.approx(TRUE_TRAINING, rel=1e-4)
    assert model.memory.coefficients == pytest.approx(TRUE_MEMORY, rel=1e-4)
    assert model.steps.error < 1e-3 and model.memory.error < 1e-3
    assert model.load_seconds == 3.0


def test_errors_are_of_points_left_out():
    works = [{"a": float(n), "b": 1.0} for n in range(1, 8)]
    seconds = [2.0 * n + 1 for n in range(1, 8)]
    assert fit(works, seconds).error < 1e-9
    seconds[3] *= 2  # one point that no line explains
    found = fit(works, seconds)
    assert found.errors[3] == pytest.approx(-0.5, abs=0.05)
    with pytest.raises(UserError, match="at least 2"):
        fit(works[:1], seconds[:1])


def test_no_coefficient_is_negative():
    works = [{"a": 1.0, "b": float(n)} for n in (1, 2, 3, 4)]
    found = fit(works, [4.0, 3.0, 2.0, 1.0])  # falling in b
    assert min(found.coefficients.values()) == 0


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    "more",
    [
        {"group": 16},
        {"tokens": 128},
        {"prompts": 2},
        {"prompt_tokens": 256},
        {"architecture": replace(SHAPE, layers=16)},
        {"architecture": replace(SHAPE, hidden=1024)},
        {"reference": True},
    ],
    ids=lambda more: next(iter(more)),
)
def test_more_work_takes_longer_and_never_less_memory(model, frozen, more):
    step = StepSpec(SHAPE, frozen=frozen)
    assert model.step_seconds(replace(step, **more)) > model.step_seconds(step)
    assert model.peak_bytes(replace(step, **more)) >= model.peak_bytes(step)


def test_a_record_is_fitted_when_it_is_read(model, recorded):
    assert fit_sweep(RunRecord.load(recorded).results) == model
    text = recorded.read_text()
    for part in ('"rollout_seconds"', '"floors"', '"points"'):
        recorded.write_text(text.replace(part, '"nothing"'))
        with pytest.raises(UserError, match=f"{part.strip(chr(34))}'; measure it again"):
            estimate.model_here()


def test_the_sweep_that_is_recorded_here_can_be_read():
    """Written by an earlier version, with more kinds of work."""
    record = RunRecord.load(RECORDS / "bench-sweep.json")
    model = fit_sweep(record.results)
    assert model.steps.error < 0.25 and model.memory.error < 0.15
    assert len(sweep_rows(record)) == len(record.results["points"]) > 20
    peaks, seconds = [], []
    for path in sorted(RECORDS.glob("run-seed*.json")):  # runs, which the fit has not seen
        run = RunRecord.load(path)
        config = RunConfig(**{k: v for k, v in run.config.items() if k in RunConfig().__dict__})
        lengths = estimate.completion_lengths([run])
        seconds.append(sum(run_parts(config, model, *lengths).values()))
        peaks.append(model.peak_bytes(estimate.run_step(config, lengths[0])))
        assert seconds[-1] == pytest.approx(run.results["seconds"]["total"], rel=0.2)
        assert peaks[-1] == pytest.approx(run.results["peak_rss_bytes"], rel=0.15)
    assert peaks


def test_prompts_of_the_bundled_model_are_as_long_as_assumed():
    config = RunConfig()
    tokens = estimate.encoder_of(config)
    lengths = [tokens(problem) for problem in held_out_problems(20, config.domains)]
    assert fmean(lengths) == pytest.approx(estimate.PROMPTS["bundled"], abs=1)


def test_a_calibration_is_cached_and_a_broken_cache_is_not_trusted(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(floors, "calibrate", lambda: calls.append(1) or dict(FLOORS))
    monkeypatch.setattr(floors, "UNDISTURBED", -1.0)
    assert calibration(tmp_path) == calibration(tmp_path) == FLOORS and len(calls) == 1
    path = tmp_path / "calibration.json"
    for text in ("{", "[]", json.dumps({k: {} for k in json.loads(path.read_text())})):
        path.write_text(text)
        assert calibration(tmp_path) == FLOORS
    assert len(calls) == 4


def test_a_calibration_beside_other_work_is_not_cached(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(floors, "calibrate", lambda: calls.append(time.sleep(0.05)) or dict(FLOORS))
    assert calibration(tmp_path) == calibration(tmp_path) == FLOORS  # asleep: it had no processor
    assert len(calls) == 2 and not list(tmp_path.iterdir())


def test_the_calibration_measures_every_floor():
    found = floors.calibrate(rows=4)
    assert set(found) == set(floors.FLOORS) and all(value > 0 for value in found.values())


def test_estimate_of_a_run(recorded, model):
    some = RunConfig(steps=(2, 2, 2), per_cell=10)
    parts = run_parts(some, model, 104, 104)
    assert set(parts) == {"load", "rollouts", "training", "evaluate"}
    with_ewc = run_parts(replace(some, ewc_strength=0.1), model, 104, 104)
    assert parts.items() <= with_ewc.items() and with_ewc["fisher"] > 0
    seconds, _, told = estimate_run(some, model)
    assert seconds == pytest.approx(sum(parts.values()))
    assert "runs to its limit" in told  # no run is recorded in this folder
    more = run_parts(replace(some, steps=(4, 4, 4)), model, 104, 104)
    assert more["training"] == pytest.approx(2 * parts["training"])
    less = run_parts(replace(some, per_cell=0), model, 104, 104)
    assert set(less) == {"load", "rollouts", "training"}


def test_recorded_runs_tell_lengths(recorded, model):
    results = {
        "steps": [{"completion_length": 8.0}, {"completion_length": 12.0}],
        "evaluations": [{"table": {"overall": {"tokens": 5.0}}}],
    }
    run = RunRecord("run", "", 0, "", {}, {}, asdict(RunConfig()), results)
    run.save(recorded.parent / "run-seed0-no-ewc.json")
    assert estimate.completion_lengths([run]) == (10.0, 5.0)
    short, _, told = estimate_run(RunConfig(), model)
    assert told == "" and short == sum(run_parts(RunConfig(), model, 10, 5).values())
    long, _, told = estimate_run(RunConfig(data="other.jsonl"), model)
    assert "evaluations come on top" in told
    assert long > sum(run_parts(RunConfig(per_cell=0), model, 10, 5).values())
    assert estimate_run(RunConfig(max_completion=7), model)[0] < short


def test_a_larger_model_goes_by_its_recorded_runs(recorded, model, monkeypatch):
    monkeypatch.setattr(estimate, "architecture_of", lambda name: SHAPE)
    config = config_for("smollm2")
    whole = sum(run_parts(config, model, 10, 5).values())
    results = {
        "steps": [{"completion_length": 10.0}],
        "evaluations": [{"table": {"overall": {"tokens": 5.0}}}],
        "seconds": {"total": whole / 4},
        "peak_rss_bytes": model.peak_bytes(estimate.run_step(config, 10)) / 2,
    }
    run = RunRecord("run", "", 0, "", {}, {}, asdict(config), results)
    run.save(recorded.parent / "run-smollm2-seed0.json")
    seconds, peak, told = estimate_run(config, model)
    assert seconds == pytest.approx(whole / 4) and peak == pytest.approx(results["peak_rss_bytes"])
    assert told == "; the 1 recorded runs that this goes by differ by up to 0%"


def test_prompts_of_your_own_count_as_long_as_they_are(recorded, model, tiny_folder, tmp_path):
    """Those that are drawn, in tokens of the run's model with its system prompt."""
    asked = [f"{i}. {'Long ' * (i % 7)}story: what is {i} + 1?" for i in range(60)]
    data, judge = tmp_path / "own.jsonl", tmp_path / "judge.py"
    data.write_text("\n".join(json.dumps({"prompt": text}) for text in asked))
    judge.write_text("raise SystemExit('an estimate executes no verifier')")
    common = {"model": str(tiny_folder), "verifier": f"{judge}:judge", "system": "Be brief."}
    config = RunConfig(data=str(data), steps=(1, 0, 0), prompts_per_step=4, **common)
    drawn = [problem.question for problem in estimate.drawn_problems(config)]
    assert len(drawn) == 4 and "eval" not in map(split_of, drawn)
    policy = load_policy(tiny_folder, system="Be brief.")
    problems = [replace(held_out_problems(1)[0], question=text) for text in drawn]
    lengths = [len(policy.encode_problem(problem)) for problem in problems]
    assert estimate.prompt_lengths(config) == (fmean(lengths), max(lengths))
    short = estimate_run(config, model)
    long = estimate_run(replace(config, system="Be brief. " * 500), model)
    assert long[0] > short[0] and long[1] > short[1]
    for other in ({"data": "generated"}, {"answer_column": "gold"}, {"steps": (0, 0, 0)}):
        assert estimate.prompt_lengths(replace(config, **other)) == (64, 64)


def test_text_of_an_estimate(recorded, monkeypatch):
    gib, expected = 2**30, [40.2, 1.1 * 2**30, ""]
    monkeypatch.setattr(estimate, "available_memory", lambda: 2 * gib)
    monkeypatch.setattr(estimate, "estimate_run", lambda config, model: expected)
    model = replace(fit_sweep(RESULTS), steps=Fit({}, [0.15]), memory=Fit({}, [-0.1]))
    monkeypatch.setattr(estimate, "model_here", lambda: model)
    text = estimate_text(RunConfig())
    assert text == "about 40 s (± 15%) and 1.1 GiB (± 10%) expected"
    for seconds, words in ((600, "about 10 min"), (10800, "about 3.0 h")):
        expected[0] = seconds
        assert words in estimate_text(RunConfig())
    expected[1] = 3 * gib
    assert "only 2.0 GiB of memory are free, so it may not fit" in estimate_text(RunConfig())


def test_no_estimate_says_why_and_stops_nothing(recorded, monkeypatch):
    assert "expected" in estimate_text(RunConfig())
    assert "no estimate" in estimate_text(RunConfig(model="nowhere/at-all"))
    recorded.unlink()
    assert "bench sweep" in estimate_text(RunConfig())
    monkeypatch.setattr(estimate, "model_here", lambda: 1 / 0)
    assert "ZeroDivisionError" in estimate_text(RunConfig())


def test_every_model_of_the_catalogue_has_its_step(recorded):
    steps, about = catalogue_steps()
    assert set(steps) == {*(a.name for a in CATALOGUE), "bundled"} and "one GRPO step" in about
    assert steps["Qwen2.5-1.5B-Instruct"]["int8_step_seconds"] > 0
    recorded.unlink()
    assert catalogue_steps()[0] == {} and "bench sweep" in catalogue_steps()[1]


def test_a_packaged_model_that_was_fetched_has_an_estimate(tiny_folder, monkeypatch):
    monkeypatch.setattr(estimate, "fetched", lambda name: tiny_folder)
    assert estimate.architecture_of("smollm2").layers == 2
    monkeypatch.setattr(estimate, "fetched", lambda name: None)
    with pytest.raises(UserError, match="cannot read a model config from 'smollm2'"):
        estimate.architecture_of("smollm2")
