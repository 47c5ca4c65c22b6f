"""Finished pieces of long work, kept on disk, so that an interrupted command continues."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import check_output_folder, replacing


def write_packed(path: Path, data: Any) -> Path:
    """Compressed JSON, without a time stamp, so that equal data give equal files."""
    text = json.dumps(data, separators=(",", ":"), sort_keys=True)
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


def read_packed(path: str | Path) -> Any:
    """What ``write_packed`` wrote. UserError if it cannot be read."""
    try:
        return json.loads(gzip.decompress(Path(path).read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read {path} ({error}); write it again") from error


class Pieces:
    """The finished pieces of one command, each in a file of its own.

    Their folder is named after everything that ``decides`` them: another processor or other
    settings get another folder, so results never mix.
    """

    def __init__(self, work: Path, name: str, decides: Mapping[str, Any]):
        text = json.dumps(decides, sort_keys=True, default=str)
        self.folder = work / name / hashlib.sha256(text.encode()).hexdigest()[:12]
        check_output_folder(self.folder)

    def once(self, name: str, call: Callable[[], Any]) -> Any:
        """``call()``, or its result from last time; that must be plain JSON."""
        path = self.folder / "pieces" / f"{name.replace('/', '_').replace(' ', '_')}.json.gz"
        if path.exists():
            try:
                return read_packed(path)
            except UserError:
                path.unlink()  # half a file: measure again
        result = json.loads(json.dumps(call()))
        write_packed(path, result)
        return result


def made_once(folder: Path, make: Callable[[Path], Any]) -> Path:
    """``folder``, filled by ``make(temporary folder)`` on first use; never half-filled."""
    if not folder.exists():
        with replacing(folder) as temporary:
            temporary.mkdir()
            make(temporary)
    return folder
