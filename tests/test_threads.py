"""The number of threads, chosen by measuring."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import invoke

from cpugrpo_edu.engine import threads as T
from cpugrpo_edu.engine.sizes import Architecture

TINY = Architecture("tiny", 2, 64, 128, 2, 1, 100, True)


@pytest.mark.parametrize(
    ("cores", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_candidates(cores, expected):
    assert T.candidates(cores) == expected


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: 1.0, 2: 0.6}, 2),
        ({1: 0.95, 2: 1.0}, 2),  # by so little it may be chance
        ({1: 0.5, 2: 1.0}, 1),
        ({1: 0.8, 2: 0.5, 4: 0.6, 8: 1.0}, 2),
    ],
)
def test_fewer_threads_only_where_they_are_clearly_faster(seconds, chosen):
    assert T.choose(seconds) == chosen


@pytest.mark.slow
def test_every_number_is_timed_and_torch_keeps_its_own():
    before = torch.get_num_threads()
    found = T.time_threads(TINY, [1, 2], repeats=2)
    assert sorted(found) == [1, 2] and min(found.values()) > 0
    assert torch.get_num_threads() == before


def test_sizes_come_from_the_config_and_nothing_of_it_is_run(tmp_path, capsys):
    bundled = T.shape_of("bundled")
    assert bundled.layers > 1 and T.shape_of(str(tmp_path / "none")) == bundled
    config = tmp_path / "config.json"
    for text in (
        "{",
        "[]",
        "{}",
        '{"num_attention_heads": "many"}',
        '{"num_attention_heads": 0, "num_hidden_layers": 1, "hidden_size": 8, '
        '"intermediate_size": 8, "vocab_size": 8}',
        '{"model_type": "bert", "hidden_size": "big"}',
        '{"auto_map": {"AutoConfig": "a.B"}}',
    ):
        config.write_text(text)
        assert T.shape_of(str(tmp_path)) == bundled
    assert capsys.readouterr() == ("", "")


def test_a_measurement_is_kept_for_the_machine_and_the_shape(tmp_path, monkeypatch):
    calls = []

    def fake(a, counts):
        calls.append(a.layers)
        return {n: (0.1 if n == 1 else 1.0) for n in counts}

    monkeypatch.setattr(T, "time_threads", fake)
    monkeypatch.setattr(T, "usable_cores", lambda: 4)
    monkeypatch.setattr(T.psutil, "cpu_percent", lambda seconds: 90.0)
    assert T.fastest_threads("bundled", tmp_path) == 4 and not calls  # others are at work
    monkeypatch.setattr(T.psutil, "cpu_percent", lambda seconds: 5.0)
    assert T.fastest_threads("bundled", tmp_path) == 1
    assert T.fastest_threads("bundled", tmp_path) == 1 and len(calls) == 1
    model = tmp_path / "model"
    model.mkdir()
    shape = {"model_type": "qwen2", "num_hidden_layers": 3, "hidden_size": 64}
    shape |= {"intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    (model / "config.json").write_text(json.dumps({**shape, "vocab_size": 99}))
    T.fastest_threads(str(model), tmp_path)
    assert calls[1:] == [3]
    (tmp_path / "threads.json").write_text("[1, 2")  # half a file: measured again
    T.fastest_threads("bundled", tmp_path)
    assert len(calls) == 3
    monkeypatch.setattr(T, "usable_cores", lambda: 1)
    assert T.fastest_threads("bundled", tmp_path) == 1 and len(calls) == 3


def test_a_run_takes_the_fastest_number_and_keeps_it_when_it_goes_on(tmp_path, monkeypatch):
    from cpugrpo_edu.run.pipeline import Interrupted

    asked = []

    def stop(config, folder, **named):
        asked.append(config.threads)
        raise Interrupted("stopped")

    monkeypatch.setattr("cpugrpo_edu.run.pipeline.run", stop)
    monkeypatch.setattr("cpugrpo_edu.cli.run.usable_cores", lambda *_: 4)
    monkeypatch.setattr(T, "fastest_threads", lambda model: 2)
    assert invoke("run", "--output", tmp_path / "a")[0] == 130
    assert invoke("run", "--output", tmp_path / "a", "--threads", 3)[0] == 130
    monkeypatch.setattr(T, "fastest_threads", lambda model: 4)
    assert invoke("run", "--output", tmp_path / "a")[0] == 130
    (tmp_path / "state.json").write_text(json.dumps({"config": {"threads": 3}}))
    assert invoke("run", "--output", tmp_path, "--resume")[0] == 130
    assert asked == [2, 3, None, 3]
