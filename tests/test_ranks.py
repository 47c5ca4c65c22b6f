"""Several processes train as one does, and neither uneven work nor a death leaves them waiting."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from cpugrpo_edu import cli
from cpugrpo_edu.engine import ranks
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.metrics import read_metrics
from cpugrpo_edu.record.run_record import RunRecord
from tests.ranks import CASES

RANKS = Path(__file__).with_name("ranks.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LONG = 240
"""Seconds after which a test takes ranks that wait for each other for dead."""


# One process


def test_alone_nothing_is_shared():
    assert ranks.size() == 1 and ranks.is_main() and ranks.local_size() == 1
    assert ranks.gather("x") == ["x"] and not ranks.agree(False)
    assert ranks.share([1, 2, 3]) == [1, 2, 3]
    tensors = {"w": torch.ones(2)}
    assert ranks.average(tensors, 5) is tensors
    assert ranks.on_main(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        ranks.on_main(lambda: 1 / 0)


def test_prompts_are_shared_equally_or_not_at_all():
    assert ranks.prompts_per_process(16, 4) == 4
    with pytest.raises(UserError, match=r"6 prompts .* 4 processes.*multiple of 4.*1, 2, 3, 6"):
        ranks.prompts_per_process(6, 4)


@pytest.mark.parametrize(
    "options, words",
    [(["--nproc", "0"], "nproc is 0"), (["--nproc", "3"], "16 prompts a step cannot be shared")],
)
def test_a_wrong_number_of_processes_is_refused(tmp_path, capsys, options, words):
    folder = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "--quiet", "--output", str(folder), *options])
    assert end.value.code == 2 and words in capsys.readouterr().err and not folder.exists()


def failure(rank, code, word=None):
    data = {"message": {"message": word}} if word else None
    return SimpleNamespace(
        local_rank=rank, exitcode=code, error_file_data=data, signal_name=lambda: "SIGKILL"
    )


@pytest.mark.parametrize(
    "failures, code, words",
    [
        ([failure(0, 1), failure(1, -9)], 1, "process 1 was ended by SIGKILL"),
        ([failure(0, 1), failure(1, 2, "UserError: too large")], 2, "cpugrpo: too large"),
        ([failure(0, 1, "RuntimeError: odd")], 1, "process 0 failed"),
        ([failure(0, 130), failure(1, 130)], 130, ""),
        ([failure(0, -15), failure(1, -9)], 1, "process 1 was ended by SIGKILL"),
        ([failure(0, 130), failure(1, -15)], 130, ""),
    ],
)
def test_the_first_cause_is_told(tmp_path, capsys, failures, code, words):
    given = {f.local_rank: f for f in failures}
    assert ranks.explain(given, tmp_path, "go on with --resume") == code
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == (1 if words else 0)


# Two ranks


def environment():
    """Without the launcher's variables, and one thread a rank."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RANKS.parents[1])}


@pytest.fixture(scope="module")
def gradients(tiny_folder, tmp_path_factory):
    """(facts, folder) of one process and of two, on the same completions."""
    found = []
    for name, program in (
        ("one", [sys.executable]),
        ("two", [*TORCHRUN, "--standalone", "--nproc_per_node=2"]),
    ):
        folder = tmp_path_factory.mktemp(name)
        done = subprocess.run(
            [*program, str(RANKS), str(tiny_folder), str(folder)],
            env=environment(), capture_output=True, text=True, timeout=LONG,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found.append((json.loads((folder / "facts.json").read_text()), folder))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_with_the_same_batch(gradients, case):
    (alone, one), (shared, two) = gradients
    ours, theirs = (load_file(folder / f"{case}.safetensors") for folder in (two, one))
    length = sum(float(g.double().norm()) ** 2 for g in theirs.values()) ** 0.5
    apart = sum(float((ours[n] - g).double().norm()) ** 2 for n, g in theirs.items()) ** 0.5
    assert (length > 0) == bool(CASES[case]["rewarded"])
    assert apart <= 1e-5 * length
    facts = shared[case]
    assert len(set(facts["weights"])) == 1
    assert facts["metrics"][0] == facts["metrics"][1]
    for name, value in alone[case]["metrics"][0].items():
        assert facts["metrics"][0][name] == pytest.approx(value, abs=1e-5)
    # The ranks' shares differ in tokens, else the divisors of the losses were not put to a test.
    assert facts["tokens"][0] != facts["tokens"][1]
    assert sum(facts["tokens"]) == alone[case]["tokens"][0]
    assert facts["bytes"] == facts["gradient_bytes"] == alone[case]["gradient_bytes"]


@pytest.mark.slow
def test_two_ranks_have_uneven_work_without_waiting_forever(gradients):
    """They came to the end; here is that their work really differed."""
    facts = gradients[1][0]
    assert facts["one rank has a single row"]["skipped"] == [0, 8]
    assert facts["the other has it"]["skipped"] == [8, 0]
    assert facts["one group in all"]["skipped"] == [8, 4]
    assert facts["no signal"]["skipped"] == [8, 8]
    assert facts["lora"]["bytes"] < facts["dapo"]["bytes"] / 2


@pytest.mark.slow
def test_two_ranks_with_different_divisors_would_differ(gradients):
    """The losses normalise differently on these completions: equality above says something."""
    folder = gradients[0][1]
    flat = {
        name: torch.cat([g.flatten() for g in load_file(folder / f"{name}.safetensors").values()])
        for name in ("dapo", "grpo", "dr_grpo", "kl")
    }
    assert (flat["dapo"] - flat["grpo"]).norm() > 1e-2 * flat["dapo"].norm()
    assert (flat["grpo"] - flat["dr_grpo"]).norm() > 1e-2 * flat["grpo"].norm()


# Whole runs


def program(model, folder, *more, steps="3,1,0", nproc=2):
    return [
        sys.executable, "-m", "cpugrpo_edu.cli", "run", "--quiet", "--model", str(model),
        "--steps", steps, "--prompts-per-step", "4", "--num-generations", "4", "--patience", "0",
        "--max-completion", "40", "--fisher-examples", "4", "--per-cell", "1", "--seed", "3",
        "--domains", "arithmetic", "--no-int8-evaluation",
        "--threads", "1", "--save-minutes", "0", "--output", str(folder),
        *(["--nproc", str(nproc)] if nproc > 1 else []), *more,
    ]  # fmt: skip


def sentence(stderr):
    """The only line that a failed run prints."""
    assert "Traceback" not in stderr
    [line] = [line for line in stderr.splitlines() if line.startswith("cpugrpo: ")]
    return line


@pytest.fixture(scope="module")
def bundled_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "run"
    done = subprocess.run(
        program("bundled", folder), env=environment(), capture_output=True, text=True, timeout=LONG
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["global_step"] for line in lines]


@pytest.mark.slow
def test_a_run_on_two_processes(bundled_run):
    record = RunRecord.load(bundled_run / "record.json")
    facts = record.results["distributed"]
    assert facts["processes"] == 2 and facts["hosts"] == 1 and facts["same_weights"]
    weights = load_file(bundled_run / "model" / "model.safetensors")
    assert facts["gradient_bytes_per_step"] == sum(4 * w.numel() for w in weights.values())
    assert facts["ring_bytes_per_process"] == facts["gradient_bytes_per_step"]
    assert rows(bundled_run) == [1, 2, 3, 4]
    assert record.results["weights_changed"]["changed"]
    assert [stage["completions"] for stage in record.results["stages"]] == [48, 16, 0]
    assert (bundled_run / "report.html").exists()
    assert not (bundled_run / "checkpoints").exists()


def begin(folder, *more, **settings):
    return psutil.Popen(
        program("bundled", folder, *more, **settings),
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_rows(process, folder, count):
    deadline = time.monotonic() + LONG
    while not ((folder / "metrics.jsonl").exists() and len(rows(folder)) >= count):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)


def check_the_rest(folder, steps):
    """Resume: every step once, and a complete record."""
    done = subprocess.run(
        program("bundled", folder, "--resume", steps=steps),
        env=environment(), capture_output=True, text=True, timeout=LONG,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(folder) == list(range(1, sum(map(int, steps.split(","))) + 1))
    assert len(read_metrics(folder / "metrics.jsonl")) == len(rows(folder))
    results = RunRecord.load(folder / "record.json").results
    assert results["distributed"]["same_weights"]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_and_resume_goes_on(tmp_path, victim):
    folder, steps = tmp_path / "run", "12,1,0"
    process = begin(folder, steps=steps)
    wait_for_rows(process, folder, 2)
    [rank] = [c for c in process.children() if c.environ().get("RANK") == str(victim)]
    rank.kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"process {victim} was ended by SIGKILL" in sentence(said) and "--resume" in said
    assert not (folder / "record.json").exists() and len(rows(folder)) < 12
    results = check_the_rest(folder, steps)
    assert [stage["completions"] for stage in results["stages"]] == [12 * 16, 16, 0]


@pytest.mark.slow
def test_ranks_end_with_their_launcher(tmp_path):
    folder = tmp_path / "run"
    process = begin(folder, steps="12,0,0")
    wait_for_rows(process, folder, 1)
    ranks = process.children()
    process.kill()
    assert len(ranks) == 2 and psutil.wait_procs(ranks, timeout=30)[1] == []


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    folder, steps = tmp_path / "run", "12,1,0"
    process = begin(folder, steps=steps)
    wait_for_rows(process, folder, 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "stopped after step" in sentence(said) and "--resume" in said
    check_the_rest(folder, steps)


# Two hosts


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable, each with an address of its own."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the program ip")
    names, ends = ["cpugrpo-a", "cpugrpo-b"], ["cpugrpo0", "cpugrpo1"]
    addresses = ["10.77.0.1", "10.77.0.2"]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    made = [ip("netns", "add", name) for name in names]
    made.append(ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1]))
    for name, end, address in zip(names, ends, addresses, strict=True):
        made.append(ip("link", "set", end, "netns", name))
        made.append(ip("-n", name, "addr", "add", f"{address}/24", "dev", end))
        made += [ip("-n", name, "link", "set", device, "up") for device in (end, "lo")]
    try:
        wrong = [done.stderr.strip() for done in made if done.returncode]
        if wrong:
            pytest.skip(f"cannot make network namespaces here: {wrong[0]}")
        yield list(zip(names, ends, addresses, strict=True))
    finally:
        for name in names:
            ip("netns", "del", name)


def sent_bytes(name, end):
    counter = f"/sys/class/net/{end}/statistics/tx_bytes"
    done = subprocess.run(
        ["ip", "netns", "exec", name, "cat", counter], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.slow
def test_two_hosts_train_one_model(two_hosts, tmp_path):
    folder, processes = tmp_path / "run", []
    before = [sent_bytes(name, end) for name, end, _ in two_hosts]
    for node, (name, end, _) in enumerate(two_hosts):
        launcher = [
            *TORCHRUN, "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1",
            "--master-addr", two_hosts[0][2], "--master-port", "29500",
        ]  # fmt: skip
        arguments = program("bundled", folder, steps="2,0,0", nproc=1)[1:]
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *launcher, *arguments],
                env={**environment(), "GLOO_SOCKET_IFNAME": end},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    try:
        said = [process.communicate(timeout=LONG)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    results = RunRecord.load(folder / "record.json").results
    facts = results["distributed"]
    assert facts["processes"] == 2 and facts["same_weights"] and rows(folder) == [1, 2]
    # What went over the cable: the gradients of two steps by the ring's formula, and the weights
    # of the first process, which each of three stages sends once; little else.
    least = 2 * facts["ring_bytes_per_process"]
    for (name, end, _), old in zip(two_hosts, before, strict=True):
        assert sent_bytes(name, end) - old > least
