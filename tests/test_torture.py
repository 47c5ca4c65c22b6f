"""Kill -9 and resume, the small version of `make torture`; full and read-only disks."""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import replacing, write_failure, write_text
from cpugrpo_edu.run.pipeline import writing_to


@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_not_been():
    tool = Path(__file__).parents[1] / "tools" / "torture.py"
    arguments = ["--points", "2", "--only", "kill"]
    done = subprocess.run([sys.executable, tool, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as if never killed") == 2


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 9 MB: room for the first stage of the bundled model, not the second."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_and_a_read_only_disk_lose_nothing(small_disk):
    run = small_disk / "run"
    settings = (
        "--steps 2,1,1 --prompts-per-step 2 --num-generations 4 --max-completion 24 --patience 0 "
        "--fisher-examples 2 --per-cell 1 --threads 1 --quiet"
    )

    def go(*more: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "cpugrpo_edu.cli", "run", "--output", str(run)]
        arguments = [*program, *shlex.split(settings), *more]
        return subprocess.run(arguments, capture_output=True, text=True)

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(small_disk)], check=True)

    def contents() -> dict[str, str]:
        files = (f for f in (run / "stages").rglob("*") if f.is_file())
        return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    full = go()
    assert full.returncode == 2 and "the disk is full" in full.stderr, full.stderr
    assert "Traceback" not in full.stderr and "--resume" in full.stderr
    saved = contents()
    assert any("1-basic" in name for name in saved) and not any("2-" in name for name in saved)

    remount("ro")
    refused = go("--resume")
    assert refused.returncode == 2 and "read-only" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr and contents() == saved

    remount("rw,size=200m")
    resumed = go("--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    assert saved.items() <= contents().items()


def test_a_failed_write_leaves_the_old_file_and_folder(tmp_path):
    write_text(tmp_path / "file", "old")
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "folder" / "inner", "old")
    for name in ("file", "folder"):
        with pytest.raises(OSError), replacing(tmp_path / name) as temporary:
            if name == "folder":
                temporary.mkdir()
                temporary = temporary / "inner"
            temporary.write_text("ne")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "folder" / "inner").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
        (
            RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"),
            "the disk is full",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_a_disk_that_refuses_ends_with_a_sentence(error, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught, writing_to(tmp_path):
        raise error
    assert "--resume" in str(caught.value)


def test_other_errors_keep_their_own_name():
    assert write_failure(ValueError("no")) is None
    with pytest.raises(RuntimeError, match="shape"), writing_to("out"):
        raise RuntimeError("shape mismatch")
