"""Rows of the user's data: JSONL, a JSON array, CSV, Parquet, a folder with splits, or a hub id."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cpugrpo_edu.errors import UserError

FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")
"""Names of a split to evaluate on, the preferred one first."""
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"


class Row(NamedTuple):
    """One object of the data."""

    number: int
    where: str
    """For messages, such as "line 3 of prompts.jsonl"."""
    texts: dict[str, Any]
    """Its values, with all numbers as text, digit for digit."""
    values: dict[str, Any]
    """Its values as they are."""


def read_rows(source: str | Path, split: str | None = None) -> Iterator[Row]:
    """The rows of a file, or of one split of a folder or a hub id.

    Raises `UserError` for a source that cannot be read, and names the faulty line of a file.
    """
    path = Path(source)
    if _is_dataset(source):
        return _of_dataset(source, split)
    if path.suffix == ".parquet":
        return _of_values(_parquet(path), source)
    if path.suffix in (".csv", ".tsv"):
        return _of_csv(path)
    return _of_array(path) if path.suffix == ".json" and _is_array(path) else _of_jsonl(path)


def splits(source: str | Path) -> list[str]:
    """The splits of a folder or a hub id; none for a file."""
    return list(_dataset(source)) if _is_dataset(source) else []


def _is_dataset(source: str | Path) -> bool:
    """Whether the source is a folder or a hub id. UserError if it is no file either."""
    path = Path(source)
    if path.exists() or path.suffix in FILES:
        return path.is_dir()
    if re.fullmatch(HUB_ID, str(source)):
        return True
    raise UserError(
        f"{source} is not a file or folder; give a file ({', '.join(FILES)}), a folder with "
        "train and test files, or a hub id such as openai/gsm8k"
    )


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; give a UTF-8 file, such as JSONL") from error


def read_jsonl(path: Path, exact: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each non-empty line; ``exact`` keeps numbers as
    text."""
    numbers: dict[str, Any] = {"parse_int": str, "parse_float": str} if exact else {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, **numbers)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"line {number} of {path} is not JSON ({error}); write one object per line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"line {number} of {path} is not an object; write {{...}} on each line")
        yield number, row


def _of_jsonl(path: Path) -> Iterator[Row]:
    both = zip(read_jsonl(path), read_jsonl(path, exact=False), strict=True)
    for (number, texts), (_, values) in both:
        yield Row(number, f"line {number} of {path}", texts, values)


def _is_array(path: Path) -> bool:
    return read_text(path).lstrip().startswith("[")


def _of_array(path: Path) -> Iterator[Row]:
    text = read_text(path)
    try:
        texts, values = json.loads(text, parse_int=str, parse_float=str), json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); write one array of objects") from error
    for number, (exact, row) in enumerate(zip(texts, values, strict=True), start=1):
        if not isinstance(row, dict):
            raise UserError(f"entry {number} of {path} is not an object; write {{...}} for each")
        yield Row(number, f"entry {number} of {path}", exact, row)


def _of_csv(path: Path) -> Iterator[Row]:
    lines = read_text(path).splitlines(keepends=True)
    reader = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise csv.Error(f"it has another number of cells than the {len(row)} headings")
            yield Row(number, f"row {number} of {path}", row, row)
    except csv.Error as error:
        raise UserError(
            f"row {reader.line_num} of {path} is not CSV ({error}); quote cells with commas"
        ) from error


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"cannot read {path}: {error}; give a Parquet file") from error
    return rows


def _of_values(rows: Iterable[dict[str, Any]], source: str | Path) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield Row(number, f"row {number} of {source}", as_text(row), row)


def as_text(value: Any) -> Any:
    """The value with every number in it as text."""
    if isinstance(value, dict):
        return {key: as_text(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_text(inner) for inner in value]
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _of_dataset(source: str | Path, split: str | None) -> Iterator[Row]:
    found = _dataset(source)
    name = split or next(iter(found))
    if name not in found:
        raise UserError(f"{source} holds no split {name!r}; it has {', '.join(found)}")
    return _of_values(found[name], f"{source} ({name})")


def _dataset(source: str | Path) -> Any:
    """The data set of a folder or a hub id, by split."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    saved = path.is_dir() and any(
        (path / name).exists() for name in ("dataset_dict.json", "dataset_info.json")
    )
    try:
        if saved:
            found = datasets.load_from_disk(str(path))
            return found if isinstance(found, dict) else {"train": found}
        return datasets.load_dataset(str(source))
    except Exception as error:  # the library raises many unrelated exceptions
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"could not read the data set {source}: {type(error).__name__}: {reason}; give a "
            f"folder with train and test files ({', '.join(FILES)}), or a hub id"
        ) from error
