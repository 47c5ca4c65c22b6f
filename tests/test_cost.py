"""The cost model: work is counted right, coefficients are found, estimates make sense."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from cpugrpo_edu.engine import c_kernel
from cpugrpo_edu.engine.decode import Sampling
from cpugrpo_edu.engine.memory import CATALOGUE, Architecture
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab import cost, estimate
from cpugrpo_edu.lab.cost import (
    CostModel,
    Fit,
    Step,
    fit,
    fit_points,
    load_work,
    memory_work,
    rollout_work,
    training_work,
)
from cpugrpo_edu.lab.estimate import calibration, catalogue_steps, estimate_run, estimate_text
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.run.config import RunConfig

FLOORS = {
    "float32_gflops": 100.0,
    "int8_gops": 300.0,
    "compiled_gops": 500.0,
    "read_gb_per_second": 20.0,
    "int8_weight_gb_per_second": 15.0,
    "call_seconds": 1e-5,
}
SHAPE = Architecture("small", 8, 512, 2048, 8, 2, 16_384, True)
STEPS = [
    Step(replace(SHAPE, layers=layers), group=group, tokens=tokens, frozen=frozen, reference=True)
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
    "traffic": 0.9,
    "head": 2.5,
    "optimizer": 1.2,
}
TRUE_MEMORY = {"libraries": 0.6, "state": 1.0, "micro-batch": 1.5, "cache": 2.0}


def point(step):
    rollout = Fit(TRUE_ROLLOUT)(rollout_work(step, FLOORS))
    return {
        "step": asdict(step),
        "rollout_seconds": rollout,
        "step_seconds": rollout + Fit(TRUE_TRAINING)(training_work(step, FLOORS)),
        "load_seconds": Fit({"import": 3.0, "weights": 20.0})(load_work(step, FLOORS)),
        "peak_rss_bytes": Fit(TRUE_MEMORY)(memory_work(step)),
    }


EVALUATED = Step(SHAPE, prompts=300, group=1, prompt_tokens=25, tokens=10, longest=40, frozen=False)
EVALUATION = {
    "step": asdict(EVALUATED),
    "seconds": Fit(TRUE_ROLLOUT)(rollout_work(EVALUATED, FLOORS)),
}


@pytest.fixture(scope="module")
def model():
    return fit_points([point(step) for step in STEPS], EVALUATION, FLOORS)


@pytest.fixture
def recorded(model, tmp_path, monkeypatch):
    """A record of the model, found by every command; the machine's floors are those above."""
    record = RunRecord("bench-sweep", "", 0, "", {}, {}, {}, {"model": model.to_json()})
    record.save(tmp_path / "records" / "bench-sweep.json")
    monkeypatch.setattr(estimate, "records_folder", lambda: tmp_path / "records")
    monkeypatch.setattr(estimate, "calibration", lambda: FLOORS)
    return tmp_path / "records" / "bench-sweep.json"


def test_work_is_counted_as_by_hand():
    step = Step(SHAPE, group=4, prompt_tokens=10, tokens=6)
    blocks = 8 * (2 * 512 * (512 + 128) + 3 * 512 * 2048)
    head = 16_384 * 512
    many = rollout_work(replace(step, prompts=100), FLOORS)  # two batches of at most 256 rows
    assert many["calls"] == pytest.approx(2 * 6 * 8 * 1e-5) and many["prompts"] == 100 * 1e-5
    assert (step.blocks, step.head, step.rows) == (blocks, head, 4)
    work = rollout_work(step, FLOORS)
    assert work["calls"] == pytest.approx(6 * 8 * 1e-5)
    assert work["int8 weights"] == pytest.approx(6 * (blocks + head) / 15e9)
    assert work["operations"] == pytest.approx(2 * (24 * (blocks + head) + 10 * blocks) / 300e9)
    # In C a token is one call, but not of many rows, and weights are read as fast as can be.
    for group, calls in ((4, 6), (17, 6 * 8)):
        in_c = rollout_work(replace(step, group=group, compiled=True), FLOORS)
        assert in_c["calls"] == pytest.approx(calls * 1e-5)
        assert in_c["int8 weights"] == pytest.approx(6 * (blocks + head) / 20e9)
    floating = rollout_work(replace(step, frozen=False), FLOORS)
    assert floating["float32 weights"] == pytest.approx(6 * 4 * (blocks + head) / 20e9)
    # Full fine-tuning in float32: forward, and backward to inputs and weights
    full = training_work(replace(step, frozen=False, lora_rank=0), FLOORS)
    attention = 4 * 3 * 4 * 16**2 * 8 * 512
    assert full["float32 operations"] == pytest.approx((2 * 3 * 64 * blocks + attention) / 100e9)
    elements = 3 * 64 * 8 * SHAPE.layer_activations
    assert full["traffic"] == pytest.approx(4 * elements / 20e9)
    assert full["optimizer"] == pytest.approx(32 * SHAPE.parameters / 20e9)


def test_it_counts_rows_as_the_engine_does():
    """Copies, so that counting work needs no torch; they must not part."""
    assert cost.FEW_ROWS == c_kernel.FEW_ROWS
    assert Sampling().max_rows == cost.MAX_ROWS


def test_the_fit_recovers_the_coefficients_it_was_given(model):
    assert model.rollout.coefficients == pytest.approx(TRUE_ROLLOUT, rel=1e-4)
    assert model.training.coefficients == pytest.approx(TRUE_TRAINING, rel=1e-4)
    assert model.memory.coefficients == pytest.approx(TRUE_MEMORY, rel=1e-4)
    assert model.error < 1e-3 and model.memory.error < 1e-3


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
    step = Step(SHAPE, frozen=frozen)
    assert model.step_seconds(replace(step, **more)) > model.step_seconds(step)
    assert model.peak_bytes(replace(step, **more)) >= model.peak_bytes(step)


def test_the_model_survives_its_record(model, recorded):
    assert estimate.recorded_model(recorded) == model
    assert CostModel.from_json(json.loads(json.dumps(model.to_json()))) == model
    text = recorded.read_text()
    for old in ('"rollout"', '"int8 weights"'):  # a kind less, as in earlier versions
        assert old in text
        recorded.write_text(text.replace(old, '"nothing"'))
        with pytest.raises(UserError, match="measure it again"):
            estimate.recorded_model(recorded)


def test_without_a_calibration_the_error_is_wider(recorded, model, monkeypatch):
    assert estimate.cost_model().calibrated

    def fail():
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(estimate, "calibration", fail)
    found = estimate.cost_model()
    assert not found.calibrated and found.floors == model.floors
    assert found.error >= cost.WIDER > model.error
    assert "on the machine of the record" in catalogue_steps()[1]


def test_a_calibration_is_cached_and_a_broken_cache_is_not_trusted(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(estimate, "calibrate", lambda: calls.append(1) or dict(FLOORS))
    assert calibration(tmp_path) == calibration(tmp_path) == FLOORS and len(calls) == 1
    path = tmp_path / "calibration.json"
    for text in ("{", "[]", json.dumps({k: {} for k in json.loads(path.read_text())})):
        path.write_text(text)
        assert calibration(tmp_path) == FLOORS
    assert len(calls) == 4


def test_the_calibration_measures_every_floor():
    floors = cost.calibrate(rows=4)
    assert set(floors) == set(cost.FLOORS) and all(value > 0 for value in floors.values())


def test_estimate_of_a_run(recorded):
    some = RunConfig(steps=(2, 2, 2), per_cell=10)
    found = estimate_run(some)
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert set(found.parts) == {"load", "rollouts", "training", "fisher", "evaluate"}
    assert "runs to its limit" in found.assumption  # no run is recorded in this folder
    more = estimate_run(replace(some, steps=(4, 4, 4)))
    assert more.parts["training"] == pytest.approx(2 * found.parts["training"])
    less = estimate_run(replace(some, per_cell=0, fisher_examples=0))
    assert set(less.parts) == {"load", "rollouts", "training"}


def recorded_run(folder, seconds, machine, seed=0):
    results = {
        "steps": [{"completion_length": 8.0}, {"completion_length": 12.0}],
        "evaluations": [{"table": {"by_difficulty": {"basic": {"tokens": 5.0}}}}],
        "peak_rss_bytes": 1e9,
        "seconds": {"total": seconds},
    }
    config = asdict(RunConfig())
    record = RunRecord("run", "", seed, "", machine, {}, config, results)
    record.save(folder / f"run-seed{seed}-ewc.json")


def test_recorded_runs_tell_lengths_memory_and_time(recorded, model):
    machine = {"cpu": "A", "usable_cores": 2}
    recorded_run(recorded.parent, 50.0, machine)
    known = estimate.recorded_runs(model)
    assert (known.sampled, known.evaluated) == (10.0, 5.0) and known.peak_ratio > 0
    assert known.time_ratio == 1  # from another machine than the sweep's
    short, long = estimate_run(RunConfig()), estimate_run(RunConfig(data="other.jsonl"))
    assert short.assumption == "" and short.parts["training"] < long.parts["training"]
    assert "evaluations come on top" in long.assumption
    assert short.peak_bytes == pytest.approx(1e9)
    same = replace(model, machine="A, 2 usable cores")
    assert estimate_run(RunConfig(), same).seconds == pytest.approx(50.0)
    for seed, seconds in ((1, 40.0), (2, 60.0)):
        recorded_run(recorded.parent, seconds, machine, seed)
    found = estimate_run(RunConfig(), same)
    assert found.seconds == pytest.approx(50.0) and found.error == pytest.approx(0.2)
    twice = {k: v / 2 if k != "call_seconds" else 2 * v for k, v in FLOORS.items()}
    assert estimate_run(RunConfig(), replace(same, floors=twice)).seconds == pytest.approx(100.0)


def test_text_of_an_estimate():
    text = estimate.Estimate(40.2, 0.15, 1.1 * 2**30, {}).text()
    assert text == "about 40 s (± 15%) and 1.1 GiB expected"
    assert "about 10 min" in estimate.Estimate(600, 0.1, 1, {}).text()
    assert "about 3.0 h" in estimate.Estimate(10800, 0.1, 1, {}).text()


def test_no_estimate_says_why_and_stops_nothing(recorded, monkeypatch):
    assert "expected" in estimate_text(RunConfig())
    assert "no estimate" in estimate_text(RunConfig(model="nowhere/at-all"))
    recorded.unlink()
    assert "bench sweep" in estimate_text(RunConfig())
    monkeypatch.setattr(estimate, "cost_model", lambda: 1 / 0)
    assert "ZeroDivisionError" in estimate_text(RunConfig())


def test_every_model_of_the_catalogue_has_its_step(recorded):
    steps, about = catalogue_steps()
    assert set(steps) == {*(a.name for a in CATALOGUE), "bundled"} and "one GRPO step" in about
    assert steps["Qwen2.5-1.5B-Instruct"]["int8_step_seconds"] > 0
    recorded.unlink()
    assert catalogue_steps()[0] == {} and "bench sweep" in catalogue_steps()[1]
