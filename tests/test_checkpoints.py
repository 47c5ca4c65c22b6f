"""Listing and pruning checkpoints never takes the last good one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.run.checkpoints import list_checkpoints, prune


def make(folder, good=True, complete=False):
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(10)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    if complete:
        (folder / "complete.json").write_text("{}")
    if not good:
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[:-8])


@pytest.fixture
def run(tmp_path):
    """Two good stages, a damaged third, and steps of which the last is not complete."""
    (tmp_path / "state.json").write_text("{}")
    make(tmp_path / "stages" / "1-basic")
    make(tmp_path / "stages" / "2-intermediate")
    make(tmp_path / "stages" / "3-advanced", good=False)
    make(tmp_path / "checkpoints" / "3" / "checkpoint-2", complete=True)
    make(tmp_path / "checkpoints" / "3" / "checkpoint-10", complete=True)
    make(tmp_path / "checkpoints" / "3" / "checkpoint-11")
    make(tmp_path / "model")
    (tmp_path / "stages" / "notes").mkdir()  # not ours
    return tmp_path


def names(found):
    return [c.path.name for c in found]


def test_the_list_says_what_is_good(run):
    found = list_checkpoints(run)
    assert names(found) == [
        *("1-basic", "2-intermediate", "3-advanced"),
        *("checkpoint-2", "checkpoint-10", "checkpoint-11"),
    ]
    faults = [c.fault for c in found]
    assert "damaged" in faults[2] and faults[5] == "not complete"
    assert [faults[i] for i in (0, 1, 3, 4)] == [""] * 4
    assert all(c.size > 0 for c in found)


def test_prune_keeps_the_last_good_ones(run):
    would = prune(run, dry_run=True)
    assert len(list_checkpoints(run)) == 6
    assert prune(run) == would
    assert names(list_checkpoints(run)) == ["2-intermediate", "checkpoint-10"]
    assert (run / "model").is_dir() and (run / "stages" / "notes").is_dir()
    assert prune(run) == []  # nothing more to take


def test_keep_more_and_never_none(run):
    assert names(prune(run, keep=2)) == ["3-advanced", "checkpoint-11"]
    with pytest.raises(UserError, match="at least 1"):
        prune(run, keep=0)


def test_nothing_is_deleted_where_nothing_is_good(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    make(tmp_path / "stages" / "1-basic", good=False)
    with pytest.raises(UserError, match="nothing was deleted"):
        prune(tmp_path)
    assert names(list_checkpoints(tmp_path)) == ["1-basic"]


def test_links_are_not_followed(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    make(elsewhere)
    (run / "stages" / "0-link").symlink_to(elsewhere, target_is_directory=True)
    prune(run)
    assert (elsewhere / "model.safetensors").exists()


def test_no_run(tmp_path):
    with pytest.raises(UserError, match=r"no state\.json"):
        list_checkpoints(tmp_path)
