"""The benchmark does the work it names; its arithmetic and its refusals."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from cpugrpo_edu.cli import app, main
from cpugrpo_edu.cli.bench import workload_of
from cpugrpo_edu.engine import c_kernel
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.sizes import Architecture
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab import bench, bench_plots, engines, sweep, workload
from cpugrpo_edu.lab.bench import (
    ABLATIONS,
    PEERS,
    attempt,
    bench_ablate,
    bench_b1,
    bench_rollout,
    step_floor,
)
from cpugrpo_edu.lab.contestants import Variant, bundled, ours, stock
from cpugrpo_edu.lab.cost import StepSpec
from cpugrpo_edu.lab.engines import rollout_speed
from cpugrpo_edu.lab.floors import calibrate, machine_floors
from cpugrpo_edu.lab.tables import (
    ablate_rows,
    b1_rows,
    coefficient_rows,
    fallback_note,
    rollout_rows,
    steady_seconds,
    sweep_rows,
    sweep_summary,
    train_rows,
)
from cpugrpo_edu.lab.worker import run_worker
from cpugrpo_edu.lab.workload import WORKLOADS, Workload, even_ids, make_model, workload_model
from cpugrpo_edu.record.run_record import new_record
from cpugrpo_edu.run.config import RunConfig

SHAPE = Architecture("tiny", 2, 32, 48, 2, 1, 400, tied=True, qkv_bias=True)
TINY = Workload(
    "tiny", steps=2, tokens=5, shortest_prompt=4, longest_prompt=6, stages=2, architecture=SHAPE
)
FLOORS = {
    "float32_gflops": 100.0,
    "bfloat16_gflops": 200.0,
    "int8_gops": 200.0,
    "compiled_gops": 200.0,
    "read_gb_per_second": 20.0,
    "int8_weight_gb_per_second": 20.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "model"
    make_model(SHAPE, folder)
    return folder


@pytest.fixture
def in_process(monkeypatch, folder):
    """Workers run here, on the tiny model; what a fresh process would do is tested once."""

    def call(function, *arguments, **named):
        if function is machine_floors:
            return FLOORS
        if function is calibrate:
            return {**FLOORS, "call_seconds": 1e-5}
        return function(*arguments, **named)

    for module in (bench, sweep):
        monkeypatch.setattr(module, "run_worker", call)
        monkeypatch.setattr(module, "workload_model", lambda *a: folder)


def test_the_workload_is_the_one_that_is_named():
    b1, b3 = WORKLOADS["b1"], WORKLOADS["b3"]
    assert b1.architecture.parameters == 494_032_768
    prompts = b1.prompts()
    assert len(prompts) == 15 and prompts == b1.prompts() != b1.prompts(seed=1)
    assert all(80 <= len(p.split()) <= 128 for p in prompts)
    assert (b3.group, b3.tokens) == (8, 64)


def test_both_copies_of_the_model_have_the_same_values(folder):
    models = [AutoModelForCausalLM.from_pretrained(folder / d) for d in ("bf16", "fp32")]
    weights = [dict(m.named_parameters()) for m in models]
    assert all((weights[0][n].float() == weights[1][n]).all() for n in weights[0])
    assert AutoConfig.from_pretrained(folder / "fp32").tie_word_embeddings


def test_a_word_of_a_prompt_is_one_token(folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "bf16")
    for prompt in TINY.prompts():
        assert tokenizer(prompt)["input_ids"] == [int(word[1:]) for word in prompt.split()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATIONS)
def test_ours_does_the_whole_workload(folder, name):
    result = ours(TINY, folder, Variant(**ABLATIONS[name]))
    assert len(result["step_seconds"]) == len(result["reward"]) == 4
    assert all(0 < r < s for r, s in zip(result["rollout_seconds"], result["step_seconds"]))
    assert result["weights_changed"]["changed"]
    assert result["weights_changed"]["relative_l2"] > 0
    assert result["kl"][0] == pytest.approx(0, abs=0.05) and max(result["kl"]) > 0
    assert len(result["ewc_penalty"]) == 2  # in the second stage only
    assert result["peak_rss_bytes"] > 0
    assert all(value >= 0 for value in result["seconds"].values())


@pytest.mark.slow
def test_full_fine_tuning(folder):
    result = ours(replace(TINY, stages=1), folder, Variant("full"))
    assert result["weights_changed"]["relative_l2"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_stock(folder, lora):
    result = stock(TINY, folder, lora, steps=2)
    assert len(result["step_seconds"]) == 2


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_rollout_engines(folder, engine):
    result = rollout_speed(engine, folder, rows=2, tokens=4, prompt_tokens=5)
    assert result["tokens_per_second"] == pytest.approx(8 / result["seconds"])


def test_rewards_differ():
    assert even_ids([[2, 4], [1, 3], [1, 2]]) == [1.0, 0.0, 0.5]


def test_the_floor_is_weights_over_bandwidth_and_operations_over_peak():
    rates = {"int8_gops": 80.0, "compiled_gops": 100.0}
    rates |= {"int8_weight_gb_per_second": 9.0, "read_gb_per_second": 10.0}
    b1 = WORKLOADS["b1"]
    floor = step_floor(b1, rates)
    blocks, head = b1.architecture.linear_parameters, b1.architecture.vocab * b1.architecture.hidden
    assert floor["decode"] == pytest.approx(64 * (blocks + head) / 10e9)
    assert floor["forward"] == pytest.approx(2 * (232 * blocks + 128 * head) / 100e9)
    assert floor["prefill"] == pytest.approx(2 * 104 * blocks / 100e9)
    many = step_floor(replace(b1, group=64), rates)  # bound by arithmetic
    assert many["decode"] == pytest.approx(2 * 64 * 64 * (blocks + head) / 100e9)


@pytest.mark.slow
def test_a_comparison_and_its_table(in_process, tmp_path):
    lines = []
    record = bench_b1(TINY, ("stock-lora",), peer_steps=2, say=lines.append)
    assert record.kind == "bench-tiny" and any("stock-lora" in line for line in lines)
    rows = b1_rows(record)
    assert [row[0] for row in rows] == ["ours", "stock-lora", "floor"]
    assert rows[0][4:] == ["1.0", "1.00"]
    seconds = steady_seconds(record.results["ours"])
    assert float(rows[0][2]) == pytest.approx(TINY.group * TINY.tokens / seconds, abs=0.5)
    record.save(tmp_path / "b1.json")
    with pytest.raises(UserError, match="stock-lora"):
        bench_b1(TINY, ("llama",))


@pytest.mark.slow
def test_a_peer_without_memory_or_that_fails_is_skipped(in_process, monkeypatch):
    monkeypatch.setattr(bench, "PEER_MEMORY", dict.fromkeys(PEERS, 2**60))
    record = bench_b1(TINY, ("stock",))
    assert "GiB of memory" in record.results["peers"]["stock"]["skipped"]
    assert b1_rows(record)[1][1].startswith("skipped: needs")

    def fail():
        raise UserError("it broke")

    assert attempt(0, fail) == {"skipped": "it broke"}


@pytest.mark.slow
def test_an_ablation_and_its_table(in_process):
    record = bench_ablate(TINY, names=("all on", "generate"))
    record.results["ablations"]["gone"] = {"skipped": "why"}
    rows = ablate_rows(record)
    assert [row[0] for row in rows] == ["all on", "generate", "gone"]
    assert rows[0][3] == "1.00" and rows[2][1] == "why"


def test_rollout_comparison(in_process):
    record = bench_rollout(TINY, engines=("generate", "ours-int8"), groups=(2, 3))
    engines = record.results["engines"]
    assert engines["ours-int8"]["3"]["tokens_per_second"] > 0
    engines["gone"] = {"2": {"skipped": "why"}}
    rows = rollout_rows(record)
    assert [row[:2] for row in rows[:3]] == [
        ["generate", "2"],
        ["generate", "3"],
        ["ours-int8", "2"],
    ]
    assert rows[0][3] == "1.0" and rows[-1][2] == "skipped: why"
    with pytest.raises(UserError, match="unknown peer vllm; allowed are llama.cpp, continuous"):
        bench_rollout(TINY, ("vllm",))


def test_completions_of_another_length_are_no_measurement(folder, monkeypatch):
    monkeypatch.setitem(engines.PEERS, "continuous", lambda *a: lambda tokens: [[1], [1, 2]])
    with pytest.raises(UserError, match=r"completions of \[1, 2\] tokens instead of 4"):
        rollout_speed("continuous", folder, rows=2, tokens=4)


def test_continuous_batching(folder):
    try:
        result = rollout_speed("continuous", folder, rows=2, tokens=5, prompt_tokens=5)
    except UserError as error:  # a library in motion: then the benchmark says so
        pytest.skip(str(error))
    assert result["tokens_per_second"] > 0


@pytest.mark.slow
def test_llama_cpp_computes_the_same_model(folder, tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    shutil.copytree(folder, tmp_path / "model")
    prompt = [5, 17, 300, 8, 42]
    model = AutoModelForCausalLM.from_pretrained(folder / "fp32")
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    path = engines.make_q8(tmp_path / "model" / "bf16", tmp_path / "model.gguf")
    llama = engines.LlamaCpp(path, rows=2, length=16, threads=1)
    llama.feed(prompt, list(range(5)), [0] * 5)
    found = torch.tensor(llama.logits(4, SHAPE.vocab))
    llama.close()
    assert float(torch.corrcoef(torch.stack([found, expected]))[0, 1]) > 0.999
    result = rollout_speed("llama.cpp", tmp_path / "model", rows=2, tokens=5, prompt_tokens=5)
    assert result["tokens_per_second"] > 0


def test_a_peer_that_is_not_installed_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match="llama_cpp is not here .* pip install llama-cpp-python"):
        rollout_speed("llama.cpp", folder, rows=2, tokens=4)


def test_the_q8_file_has_every_tensor_under_its_name_in_gguf(folder, tmp_path):
    gguf = pytest.importorskip("gguf")
    path = engines.make_q8(folder / "bf16", tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(tensors) == 2 + 12 * SHAPE.layers
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert tensors["blk.1.attn_q.bias"].tensor_type == gguf.GGMLQuantizationType.F32
    model = AutoModelForCausalLM.from_pretrained(folder / "fp32")
    up = tensors["blk.1.ffn_up.weight"]
    found = torch.from_numpy(gguf.quants.dequantize(up.data, up.tensor_type))
    weight = model.model.layers[1].mlp.up_proj.weight
    assert (found - weight).abs().max() <= weight.abs().max() / 127


@pytest.mark.slow
def test_full_fine_tuning_of_ours_is_a_contestant(in_process):
    record = bench_b1(TINY, ("ours-full",), peer_steps=2)
    result = record.results["peers"]["ours-full"]
    assert len(result["step_seconds"]) == 2 and result["weights_changed"]["relative_l2"] > 0


@pytest.mark.slow
def test_without_a_compiler_ours_falls_back_and_says_so(folder, monkeypatch):
    monkeypatch.setattr(c_kernel, "library", lambda: (None, "it needs a compiler"))
    result = ours(replace(TINY, stages=1), folder)
    assert result["int8_kernel"] == "packed" and result["weights_changed"]["changed"]
    record = new_record(
        "bench-tiny", {**asdict(TINY)}, {"ours": result, "peers": {}, "step_floor": {}}
    )
    assert "No C compiler" in fallback_note(record)
    record.results["ours"]["int8_kernel"] = "compiled"
    assert fallback_note(record) == ""


def test_the_first_step_warms_up():
    assert steady_seconds({"step_seconds": [9.0, 1.0, 3.0]}) == 2.0
    assert steady_seconds({"step_seconds": [9.0]}) == 9.0


@pytest.mark.slow
def test_a_fresh_process_and_its_failure(tmp_path):
    run_worker(make_model, replace(SHAPE, layers=1), tmp_path / "m")
    assert (tmp_path / "m" / "fp32" / "model.safetensors").exists()
    with pytest.raises(UserError, match="'b9'; allowed are b1"):
        run_worker(workload_of, "b9")
    with pytest.raises(UserError, match="_exit failed in its own process: BrokenProcessPool"):
        run_worker(os._exit, 3)


def test_the_model_is_made_once(tmp_path, monkeypatch):
    calls = []

    def make(function, shape, place):
        calls.append(function)
        if len(calls) == 1:
            raise UserError("interrupted")

    monkeypatch.setattr(workload, "run_worker", make)
    with pytest.raises(UserError, match="interrupted"):
        workload_model(SHAPE, tmp_path)
    assert workload_model(SHAPE, tmp_path) == workload_model(SHAPE, tmp_path)
    assert calls == [make_model, make_model] and (tmp_path / "workload-2x32").is_dir()


def command(*arguments):
    from typer.testing import CliRunner

    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.mark.slow
def test_commands(in_process, monkeypatch, tmp_path):
    monkeypatch.setattr(workload, "WORKLOADS", {"b1": TINY, "b3": TINY})
    path = tmp_path / "record.json"
    shown = command("b1", "--output", str(path), "--quiet")
    assert shown.exit_code == 0 and "| ours |" in shown.stdout
    assert json.loads(path.read_text())["results"]["ours"]["weights_changed"]["changed"]
    assert "200.0" in command("machine").stdout
    some = functools.partial(bench_rollout, engines=("ours-int8",), groups=(2,))
    monkeypatch.setattr(bench, "bench_rollout", some)
    assert "ours-int8" in command("rollout", "--quiet").stdout
    some = functools.partial(bench_ablate, names=("all on",))
    monkeypatch.setattr(bench, "bench_ablate", some)
    assert "all on" in command("ablate", "--steps", "1", "--quiet").stdout


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "name"), [("auto", "ours"), ("packed", "ours-packed")])
def test_weights_that_do_not_change_fail_the_command(in_process, monkeypatch, kernel, name):
    monkeypatch.setattr(workload, "WORKLOADS", {"b1": TINY})
    good = ours(TINY, bench.workload_model())
    still = {**good, "weights_changed": {"changed": False, "relative_l2": 0.0}}

    def worker(workload, folder, variant=None):
        return still if (variant or Variant()).kernel == kernel else good

    monkeypatch.setattr(bench, "ours", worker)
    shown = command("b1", "--quiet", "--peers", "ours-packed")
    assert shown.exit_code == 1 and f"weights of {name} did not change" in shown.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--workload", "b9"], "'b9'; allowed are b1, b2, b3"),
        (["--steps", "0"], "--steps is 0"),
        (["--peer-steps", "0"], "--peer-steps is 0"),
        (["--peers", "llama"], "allowed are stock, stock-lora, ours-packed, ours-full"),
    ],
)
def test_bad_input(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cpugrpo", "bench", "b1", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and words in capsys.readouterr().err


# The sweep

FEW_POINTS = (
    *(StepSpec(SHAPE, group=2, tokens=tokens, reference=True) for tokens in (2, 4, 6)),
    StepSpec(SHAPE, group=2, tokens=4, frozen=False, reference=True),
    StepSpec(SHAPE, 2, 2, tokens=3, frozen=False, lora_rank=0, int8_rollouts=True),
)


def test_the_points_of_the_sweep():
    points = sweep.sweep_points()
    names = [sweep.name_of(point) for point in points]
    assert len(set(names)) == len(names) == 37
    assert "8 layers of 512, INT8, 1 x G 4, 32 tokens" in names
    assert "24 layers of 896, compiled INT8, 1 x G 8, 32 tokens" in names
    assert "4 layers of 512, float32, 1 x G 4, 32 tokens" not in names
    assert "bundled model, 16 x G 8, 32 tokens" in names


@pytest.mark.slow
def test_a_sweep_is_fitted_shown_and_resumed(in_process, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "STEPS", 2)
    lines, real = [], sweep.measure

    def interrupted(step, folder):
        if step.tokens == 6:
            raise KeyboardInterrupt
        return real(step, folder)

    monkeypatch.setattr(sweep, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.bench_sweep(FEW_POINTS, tmp_path, lines.append)
    assert len(list(tmp_path.glob("sweep/*/pieces/*"))) == 3  # the floors and two points
    calls = []
    monkeypatch.setattr(sweep, "measure", lambda *a: calls.append(1) or real(*a))
    record = sweep.bench_sweep(FEW_POINTS, tmp_path, lines.append)
    assert len(calls) == len(FEW_POINTS) - 2 and not list(tmp_path.glob("sweep/*"))
    rows = sweep_rows(record)
    assert len(rows) == len(FEW_POINTS) and all(row[3].endswith("%") for row in rows)
    assert len(coefficient_rows(record)) == 14  # kinds of work: none of it compiled here
    assert "points left out of the fit, 5 points" in sweep_summary(record)
    first = record.results["points"][0]
    assert 0 < first["rollout_seconds"] < first["step_seconds"]
    assert first["step"]["prompt_tokens"] == 64
    plot = bench_plots.plot_record(record)
    assert "2 tokens" in plot.alt and "5 points" in plot.alt and plot.png()
    record.save(tmp_path / "sweep.json")
    shown = command("plot", str(tmp_path / "sweep.json"))
    assert shown.exit_code == 0 and (tmp_path / "sweep.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_point_that_fails_is_left_out(in_process, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "STEPS", 2)

    def fail(*arguments, **named):
        raise UserError("too little memory")

    monkeypatch.setattr(sweep, "bundled", fail)
    record = sweep.bench_sweep(FEW_POINTS, tmp_path)
    assert record.results["skipped"] == {sweep.name_of(FEW_POINTS[-1]): "too little memory"}


@pytest.mark.slow
def test_steps_of_the_bundled_model(in_process):
    config = RunConfig(steps=(2, 0, 0), prompts_per_step=2, num_generations=2, max_completion=4)
    result = bundled(config, EngineOptions(stop_at_eos=False, patience=0))
    assert len(result["step_seconds"]) == 2
    seconds = sum(result["step_seconds"])
    assert result["tokens_per_second"] == pytest.approx(2 * 2 * 2 * 4 / seconds)
    rewarded = bundled(config, EngineOptions(patience=0), "correct_answer=1")
    record = new_record("bench-train", {}, {"engines": {"fast": rewarded}})
    assert train_rows(record)[0][0] == "fast"


def result(seconds, peak=2e9):
    return {"step_seconds": [9.0, seconds], "peak_rss_bytes": peak, "tokens_per_second": 3.0}


@pytest.mark.parametrize(
    ("kind", "results", "words"),
    [
        (
            "b1",
            {
                "ours": result(4.0),
                "peers": {"stock": result(36.0, 9e9), "stock-lora": {"skipped": "no memory"}},
                "step_floor": {"decode": 1.5},
            },
            [
                "ours 4.00, stock 36.00, floor 1.50",
                "peak GB: ours 2.00, stock 9.00.",
                "Skipped: stock-lora",
            ],
        ),
        (
            "ablate",
            {"ablations": {"all on": result(4.0), "generate": result(9.0)}},
            ["all on 4.00, generate 9.00"],
        ),
        (
            "rollout",
            {"engines": {"generate": {"2": result(1), "8": result(1)}}},
            ["tokens/s: generate (G 2) 3.0, generate (G 8) 3.0"],
        ),
        (
            "train",
            {"engines": {"fast": {**result(1), "rollout_tokens_per_second": 70.0}}},
            ["rollout tokens/s: fast 70"],
        ),
    ],
)
def test_plots_say_what_they_show(kind, results, words):
    plot = bench_plots.plot_record(new_record(f"bench-{kind}", {"group": 2, "tokens": 64}, results))
    assert all(word in plot.alt for word in words) and plot.figure.axes
    with pytest.raises(UserError, match="no plot for a record of kind 'bench-machine'"):
        bench_plots.plot_record(new_record("bench-machine", {}, {}))
