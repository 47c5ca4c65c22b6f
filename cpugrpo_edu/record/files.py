"""Write files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpugrpo_edu.errors import UserError

WRITE_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than allowed here",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk reports an error",
}


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; the file or folder made there replaces ``path``.

    If the block raises, ``path`` stays as it was. The data reach the disk before the name, so
    that a power cut leaves no empty file under the final name. A file is replaced in one step;
    an old folder is deleted first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    remove(temporary)
    try:
        yield temporary
        flush(temporary)
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    except BaseException:
        remove(temporary)
        raise


def write_text(path: str | Path, text: str) -> Path:
    """Replace a text file, in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def cache_folder() -> Path:
    """The folder that keeps this user's measurements and models for the next time."""
    return Path.home() / ".cache" / "cpugrpo_edu"


def remembered(
    path: Path,
    key: str,
    usable: Callable[[Any], bool],
    measure: Callable[[], Any],
    keep: Callable[[Any], bool] = bool,
) -> Any:
    """The result of ``measure()``, cached under ``key`` in the JSON file ``path``.

    It measures again if the cache cannot be read or holds nothing ``usable``. A result that
    ``keep`` refuses, by default an empty one, is not cached.
    """
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        known = dict(json.loads(path.read_text(encoding="utf-8")))
        if usable(known[key]):
            return known[key]
    found = measure()
    if keep(found):
        with contextlib.suppress(OSError):  # without a cache it is measured again next time
            write_text(path, json.dumps({**known, key: found}, indent=1))
    return found


def flush(path: Path) -> None:
    """Make the operating system write a file, or every file of a folder, to the disk."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a crash inside ``replacing`` left this behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def check_output_folder(folder: str | Path) -> Path:
    """The folder as a path. UserError, before any work is done, if it cannot be written."""
    folder = Path(folder)
    if "\0" in str(folder):
        raise UserError(f"the output folder {str(folder)!r} holds a NUL; give a plain path")
    try:
        existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    except OSError as error:
        raise UserError(
            f"cannot use the output folder {str(folder)[:80]} ({error.strerror}); "
            "give another --output"
        ) from error
    if not existing.is_dir():
        raise UserError(f"{existing} already exists and is not a folder; give another --output")
    read_only = hasattr(os, "statvfs") and os.statvfs(existing).f_flag & os.ST_RDONLY
    if read_only or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write in {existing}: it is read-only; make it writable, "
            "or give another --output"
        )
    return folder


def write_failure(error: BaseException) -> str | None:
    """Why a write failed, or None if ``error`` and its causes are about something else.

    safetensors and torch hide the system's error in texts of their own.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        if number is None and (hidden := re.search(r"\(os error (\d+)\)", str(seen))):
            number = int(hidden[1])
        if number in WRITE_ERRORS:
            return WRITE_ERRORS[number]
        if isinstance(seen, RuntimeError) and re.search(
            r"PytorchStreamWriter failed|unexpected pos|file write failed", str(seen)
        ):
            return "the disk is full, or the file larger than allowed here"
        seen = seen.__cause__ or seen.__context__
    return None
