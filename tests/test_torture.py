"""Kill -9 and resume: the small version of `make torture`; and disks that are full or read-only."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from cpugrpo_edu.files import replacing, write_failure, write_text
from cpugrpo_edu.pipeline import writing_to
from cpugrpo_edu.types import UserError


@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_not_been():
    tool = Path(__file__).parents[1] / "tools" / "torture.py"
    done = subprocess.run([sys.executable, tool, "--points", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as never killed") == 2


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
