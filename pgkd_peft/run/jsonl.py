"""JSON files of a run. The append-only ones have one object a line: nothing is lost to a crash."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard


def append_lines(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records and hand them to the operating system; a number that JSON cannot hold (NaN) becomes null.

    A line that a crash left unfinished is ended first, so that it spoils no other.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write("".join(map(_as_line, records)).encode("utf-8", "replace"))


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a file, [] where there is none. Lines that are no JSON object (a crash cut one) are left out."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    records = []
    for line in text.split("\n"):
        try:
            record = json.loads(line, parse_constant=lambda _: None)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


_SECTIONS = ("config", "automatic", "versions", "held_out", "peak_memory_mib", "quantization_config")


def read_run(path: Path) -> dict[str, Any]:
    """``run.json`` for views: a section that is no object (the file was edited, or damaged) is left out."""
    run = read_json(path)
    return {key: value for key, value in run.items() if key not in _SECTIONS or isinstance(value, dict)}


def read_coverage(path: Path) -> dict[str, Any]:
    """``coverage.json`` for views: {} where it is not as a bake writes it (the file was edited, or damaged)."""
    found = read_json(path)
    parts = (found.get("passages"), found.get("rules") or [])
    return found if all(isinstance(part, list) and all(map(_is_passage, part)) for part in parts) else {}


def _is_passage(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    headings, questions = value.get("headings"), value.get("questions")
    if not isinstance(headings, list) or not isinstance(questions, list):
        return False
    if not all(isinstance(question, dict) for question in questions):
        return False
    said = [question.get(name) for question in questions for name in ("question", "base", "teacher", "student")]
    return all(isinstance(text, str) for text in (value.get("source"), value.get("text"), *headings, *said))


def drop_after(path: str | os.PathLike, step: int) -> None:
    """Keep the records up to `step`: a resumed run will write the later ones again. Nothing happens without a file."""
    path = Path(path)
    if not path.is_file():
        return
    kept = [r for r in read_lines(path) if isinstance(r.get("step"), (int, float)) and r["step"] <= step]
    write_lines(path, kept)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """A JSON file that is whole or not there; numbers as in :func:`append_lines`, what JSON does not know as text."""
    write_whole(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str) + "\n")


def write_lines(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """A file of one object a line that is whole or not there; numbers and the rest as in :func:`write_json`."""
    write_whole(path, "".join(map(_as_line, records)))


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write a text beside its place and rename it: a kill leaves the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(text.encode("utf-8", "replace"))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # of a full disk


def _as_line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), ensure_ascii=False, default=str, allow_nan=False) + "\n"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number (and not a truth value)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
