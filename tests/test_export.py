"""An export is kept only if it was loaded back and answers as the model did."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.load import load_policy, save_policy
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.run import export as module
from cpugrpo_edu.run.export import export, load_int8


def make_run(folder, config, policy):
    save_policy(policy, folder / "model")
    RunRecord("run", "now", 0, "abc", {}, {"torch": "2"}, config, {}).save(folder / "record.json")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The bundled model as if it were a run's result."""
    return make_run(tmp_path_factory.mktemp("run"), {"model": "bundled"}, load_policy())


@pytest.fixture
def adapted(tmp_path):
    """A run that trained an adapter, far enough to change answers."""
    policy = load_policy(lora_rank=4, seed=1)
    torch.manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return make_run(tmp_path / "run", {"model": "bundled", "lora_rank": 4}, policy)


@pytest.fixture(autouse=True)
def headline(monkeypatch):
    monkeypatch.setattr("cpugrpo_edu.show.report.headline", lambda record: "It learnt nothing.")


@pytest.mark.parametrize("kind", ["merged", "int8", "gguf"])
def test_an_export_answers_as_the_model(run, tmp_path, kind):
    if kind == "gguf":
        pytest.importorskip("gguf")
    done = export(run, kind, tmp_path / "out", problems=12)
    assert done["compared"] == 12 and done["agree"] >= module.LEAST_AGREEMENT[kind] * 12
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It learnt nothing." in card and f"{done['agree']} of 12" in card
    assert RunRecord.load(tmp_path / "out" / "record.json").commit == "abc"


def test_adapter_and_merged_of_a_lora_run(adapted, tmp_path):
    done = export(adapted, "adapter", tmp_path / "adapter", problems=12)
    assert done["agree"] >= 12 * module.LEAST_AGREEMENT["adapter"]
    assert done["bytes"] < 1_000_000  # without the base
    assert export(adapted, "merged", tmp_path / "merged", problems=12)["agree"] == 12


def test_int8_is_a_quarter_and_within_half_a_step(run, tmp_path):
    export(run, "int8", tmp_path / "out", problems=12)
    stored = load_file(tmp_path / "out" / "model-int8.safetensors")
    ours, theirs = load_policy().model.state_dict(), load_int8(tmp_path / "out").model.state_dict()
    for name, tensor in ours.items():
        scale = stored.get(f"{name}_scale")
        bound = scale[:, None] / 2 + 1e-7 if scale is not None else 0.0
        if name != "lm_head.weight":
            assert ((tensor - theirs[name]).abs() <= bound).all(), name
    small = (tmp_path / "out" / "model-int8.safetensors").stat().st_size
    assert small < 0.3 * (run / "model" / "model.safetensors").stat().st_size


def test_an_export_that_answers_otherwise_is_not_kept(run, tmp_path, monkeypatch):
    def damaged(policy, run, record, folder):
        module.write_merged(policy, run, record, folder)
        weights = load_file(folder / "model.safetensors")
        for tensor in weights.values():
            tensor.add_(0.3 * torch.randn_like(tensor))
        module.save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setitem(module.WAYS, "merged", (damaged, module.read_merged))
    with pytest.raises(UserError, match="gave other answers"):
        export(run, "merged", tmp_path / "out", problems=12)
    assert list(tmp_path.iterdir()) == []


def test_bad_requests(run, tmp_path):
    for words, arguments in (
        ("cannot export to 'pickle'", (run, "pickle", tmp_path / "out")),
        ("so there is no adapter", (run, "adapter", tmp_path / "out")),
        ("already exists", (run, "merged", tmp_path)),
        ("cannot read a run record", (tmp_path / "none", "merged", tmp_path / "out")),
    ):
        with pytest.raises(UserError, match=words):
            export(*arguments)
    (tmp_path / "empty").mkdir()
    record = json.loads((run / "record.json").read_text())
    (tmp_path / "empty" / "record.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="holds no trained model"):
        export(tmp_path / "empty", "merged", tmp_path / "out")
    with pytest.raises(UserError, match="cannot read an INT8 export"):
        load_int8(tmp_path / "empty")
    assert not (tmp_path / "out").exists()
