"""Local data files → rows, strictly: what cannot be read is an error with its line number, never a guess.

JSON rows may differ in keys and types; :func:`to_dataset` holds nested columns as JSON, so that Arrow does not fill
each row with the other rows' keys, or refuse them.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, Value

from ..errors import DataError, reason, refuse_pointer, wide_encoding
from .row import load_json

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
PROMPT_SUFFIXES = (".txt", ".md")  # a list of prompts, where one such file is named; in a folder they are its README
# What may lie beside data in a folder and is none; any other file there is not left out without a word.
_NAMED = {".txt", ".yaml", ".yml"}  # may be either; it is said that they are left out
_NO_DATA = {"", ".md", ".rst", ".py", ".ipynb", ".sh", ".html", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg"}
_NO_DATA |= {".toml", ".cfg", ".ini", ".lock", ".log", ".bib", ".cff", ".jinja", ".j2", *_NAMED}
# How files begin that are no text, and what they are.
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip (or Excel)",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
}
_BOM = b"\xef\xbb\xbf"
_SPLIT_NAMES = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_OTHER_SPLITS = {"heldout", "holdout"}  # files of these names are a split that has to be asked for by its name


def to_dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Dict rows of any JSON shape as a Dataset; nested or mixed columns become JSON columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: encode_column([row.get(name) for row in rows]) for name in names}
    features = Features({name: feature for name, (_, feature) in columns.items()})
    return Dataset.from_dict({name: values for name, (values, _) in columns.items()}, features=features)


def encode_column(values: list[Any]) -> tuple[list[Any], Value | Json]:
    """A column's values for Arrow and their feature: a plain type where all have it, else JSON."""
    for plain, dtype in ((str, "string"), (bool, "bool"), (int, "int64"), (float, "float64")):
        if all(value is None or type(value) is plain for value in values):
            if plain is int and any(value is not None and abs(value) >= 2**63 for value in values):
                break
            return values, Value(dtype)
    return [None if value is None else _json_text(value) for value in values], Json()


_MANY_DIGITS = re.compile(r"[\d.]{16}|\d[eE]")


def _json_text(value: Any) -> str:
    """JSON that :class:`datasets.Json` gives back as `value`; where it has numbers of more digits than that keeps, the
    JSON of its text, which whoever reads the row reads once more."""
    text = json.dumps(value, default=str)
    if _MANY_DIGITS.search(text):
        try:
            kept = Json().decode_example(text) == json.loads(text)
        except ValueError:  # an integer of more than 64 bits
            kept = False
        return text if kept or not isinstance(value, (dict, list)) else json.dumps(text)
    return text


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The data files of a split: those whose file or folder name says so, or all when no name speaks of a split."""
    shown = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not path.name.startswith("dataset_info")
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    found = [path for path in shown if path.suffix.lower() in SUFFIXES]
    unread = [path for path in shown if path not in found and _may_be_data(path)]
    if not found:
        there = f" (it has {_names(unread, folder)})" if unread else ""
        raise DataError(f"{folder} has no data files{there}; accepted are {', '.join(SUFFIXES)}")
    if unread:
        raise DataError(
            f"{folder} holds data that would be left out: {_names(unread, folder)}; unpack or convert them to "
            f"{', '.join(SUFFIXES)}, move them away, or name one file"
        )
    if passed := [path for path in shown if path.suffix.lower() in _NAMED]:
        logger.warning("%s: left out, as their kinds hold no rows in a folder: %s.", folder, _names(passed, folder))
    words = {path: set(re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())) for path in found}
    wanted = _SPLIT_NAMES.get(split, {split.lower()})
    files = [path for path in found if words[path] & wanted]
    named = set().union(*_SPLIT_NAMES.values(), _OTHER_SPLITS, wanted)
    nameless = [path for path in found if not words[path] & named]
    if files and nameless:
        raise DataError(
            f"{folder} holds files whose names speak of no split, beside {_names(files, folder)}: "
            f"{_names(nameless, folder)}, which would be left out; name their split, move them away, or name one file"
        )
    if not files:
        if split != "train" or any(words[path] & named for path in found):
            raise NoSplitError(
                f"{folder} has no file for the split {split!r}; it has: "
                f"{', '.join(str(path.relative_to(folder)) for path in found)}"
            )
        files = found
    if len({path.suffix.lower() for path in files}) > 1:
        raise DataError(
            f"{folder} mixes kinds of files for the split {split!r} ({', '.join(path.name for path in files)}), which "
            "may be copies of each other; name the file or keep one kind"
        )
    return files


def _may_be_data(path: Path) -> bool:
    """Whether a file that is not read may hold rows: by its suffix, or one before it (part-2.jsonl.bak)."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return any(suffix in SUFFIXES for suffix in suffixes) or "".join(suffixes[-1:]) not in _NO_DATA


def _names(files: Sequence[Path], folder: Path) -> str:
    return ", ".join(str(path.relative_to(folder)) for path in files)


class NoSplitError(DataError):
    """The data have no split of that name."""


class BrokenRow(str):
    """What is wrong with a row that could not be read, in its place among the rows."""


def read_rows(path: Path) -> list[Any]:
    """The rows of a JSON or CSV file: dicts, and a :class:`BrokenRow` for each that is none."""
    _check_encoding(path)
    rows = _READERS[path.suffix.lower()](path)
    if not rows:
        raise DataError(f"{path} is empty; it must hold at least one row")
    return rows


def _check_encoding(path: Path) -> None:
    """Refuse what is no UTF-8 text before each of its lines is called broken."""
    refuse_pointer(path)
    with path.open("rb") as file:
        start = file.read(4096)
    packed = next((kind for mark, kind in _PACKED.items() if start.startswith(mark)), None)
    if packed is not None:
        raise DataError(f"{path} is {packed} data under another name, no text; unpack it, or give it its own suffix")
    kind = wide_encoding(start)
    if kind is not None:
        raise DataError(
            f"{path} is {kind} text (PowerShell's `>` writes UTF-16); write it as UTF-8, e.g. with "
            f"iconv -f {kind} -t UTF-8, or Get-Content FILE | Set-Content -Encoding utf8 NEW"
        )


def read_parquet(files: list[Path]) -> Dataset:
    import pyarrow as pa
    from pyarrow import parquet

    tables = []
    for path in files:
        refuse_pointer(path)
        try:
            tables.append(parquet.read_table(path))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable Parquet file: {reason(error)}") from error
    try:
        return Dataset(pa.concat_tables(tables, promote_options="default"))
    except (pa.ArrowException, ValueError, TypeError, NotImplementedError) as error:  # or a type that datasets lacks
        names = ", ".join(path.name for path in files)
        raise DataError(f"the columns of {names} cannot be read together: {reason(error)}") from error


def _read_jsonl(path: Path) -> list[Any]:
    rows: list[Any] = []
    with path.open("rb") as file:
        if file.read(3).removeprefix(_BOM)[:1] == b"[" and isinstance(_whole(path), list):
            raise DataError(f"{path} holds one JSON list, not an object a line; call it .json")
        file.seek(0)
        for number, line in enumerate(file, 1):
            line = line.removeprefix(_BOM).strip()
            if not line:
                continue
            try:
                odd = b"NaN" in line or b"Infinity" in line
                row = _object(load_json(line.decode("utf-8")), check_unicode=b"\\u" in line, check_numbers=odd)
            except (ValueError, RecursionError) as error:
                utf8 = "; the file is not UTF-8, write it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
                row = BrokenRow(reason(error) + utf8)
            rows.append(BrokenRow(f"{path.name} line {number}: {row}") if isinstance(row, BrokenRow) else row)
    return rows


def _whole(path: Path) -> Any:
    try:
        return load_json(path.read_bytes().removeprefix(_BOM))
    except (ValueError, RecursionError):
        return None


def _read_json(path: Path) -> list[Any]:
    data = path.read_bytes().removeprefix(_BOM).strip()
    if not data:
        return []
    first = data.split(b"\n", 1)[0]
    try:
        value = load_json(data)
    except (ValueError, RecursionError) as error:
        try:
            load_json(first)
        except (ValueError, RecursionError):
            raise DataError(f"{path}: broken JSON: {reason(error)}") from error
        return _read_jsonl(path)  # one object a line, under another name
    if isinstance(value, dict) and first == data:
        return _read_jsonl(path)
    if not isinstance(value, list):
        raise DataError(f"{path} holds a {type(value).__name__}; a .json file must be a list of rows (or .jsonl lines)")
    rows = [_object(row) for row in value]
    return [BrokenRow(f"{path.name}: {row}") if isinstance(row, BrokenRow) else row for row in rows]


def _object(row: Any, check_unicode: bool = True, check_numbers: bool = True) -> Any:
    if not isinstance(row, dict):
        return BrokenRow(f"{type(row).__name__}, not an object")
    if check_numbers and (name := next((name for name, value in row.items() if _holds_odd_number(value)), None)):
        return BrokenRow(f"`{name}` holds NaN or Infinity, which JSON has not; write null, or a text")
    if check_unicode and not _encodable(row):
        return BrokenRow("has a lone surrogate, which is not valid Unicode")
    return _keep_nulls(row)


def _keep_nulls(value: Any, key: str = "") -> Any:
    """The row with a call's arguments, and a tool, as JSON text where they have nulls: these were written, while other
    nulls may be keys that Arrow fills in, and are dropped."""
    if isinstance(value, dict):
        if key in ("arguments", "tools") and _has_null(value):
            return json.dumps(value)
        return {name: _keep_nulls(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_keep_nulls(item, "tools" if key == "tools" else "") for item in value]
    return value


def _has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(item is None or _has_null(item) for item in value.values())
    return isinstance(value, list) and any(map(_has_null, value))


def _holds_odd_number(value: Any, nested: bool = False) -> bool:
    """Whether NaN or an infinity stands inside a list or an object, where it would become null; a column of numbers
    may have them."""
    if isinstance(value, dict):
        return any(_holds_odd_number(item, True) for item in value.values())
    if isinstance(value, list):
        return any(_holds_odd_number(item, True) for item in value)
    return nested and isinstance(value, float) and not math.isfinite(value)


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_csv(path: Path) -> list[Any]:
    """All values as text, so that 007 stays 007."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(2**31 - 1)
    rows: list[Any] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            lines = (cells for cells in reader if len(cells) > 1 or any(cell.strip() for cell in cells))
            header = [name.strip() for name in next(lines, [])]
            other = next((mark for mark in ",;\t|" if mark != delimiter and mark in "".join(header[:1])), None)
            if len(header) == 1 and other is not None:
                raise DataError(
                    f"{path} has the one column {header[0]!r}; are its cells divided by {other!r}? A .csv file has "
                    "commas, a .tsv file tabs"
                )
            if len(set(header)) < len(header):
                raise DataError(f"{path}: the header names a column twice: {', '.join(header)}")
            for cells in lines:
                where = f"{path.name} line {reader.line_num}"
                if len(cells) == len(header):
                    rows.append(dict(zip(header, cells)))
                else:
                    rows.append(BrokenRow(f"{where}: {len(cells)} cells, the header has {len(header)}"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}; write it as UTF-8") from error
    except csv.Error as error:  # the reader does not know where the next row starts
        rows.append(BrokenRow(f"{path.name} line {reader.line_num}: {error} (and nothing after it was read)"))
    finally:
        csv.field_size_limit(limit)
    return rows


_TITLE = re.compile(r"#{1,6}(\s|$)")
_ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+(?=\S)")


def read_prompts(path: Path) -> list[Any]:
    """Rows of one user turn: of text a line each, of Markdown a list item each, or a paragraph where it has no list."""
    try:
        text = path.read_bytes().removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; write it as UTF-8") from error
    lines = re.split(r"\r\n|\r|\n", text)  # a line separator of Unicode's is part of a prompt
    if (first := text.lstrip()[:1]) == "{" or (first == "[" and path.suffix.lower() == ".txt"):
        return _read_json(path)  # under another name
    if path.suffix.lower() == ".txt":
        prompts: list[str | BrokenRow] = [line.strip() for line in lines if line.strip()]
    elif any(_ITEM.match(line) for line in lines):
        prompts = _list_items(path, lines)
    else:
        blocks = re.split(r"\n\s*\n", "\n".join(line for line in lines if not _TITLE.match(line)))
        prompts = [block.strip() for block in blocks if block.strip()]
        if code := next((number for number, line in enumerate(lines, 1) if line.startswith(("```", "~~~"))), None):
            fault = f"{path.name} line {code}: code may hold blank lines and #; make it a list, with the code indented"
            prompts = [BrokenRow(fault)]
    return [
        prompt if isinstance(prompt, BrokenRow) else {"messages": [{"role": "user", "content": prompt}]}
        for prompt in prompts
    ]


def _list_items(path: Path, lines: Sequence[str]) -> list[str | BrokenRow]:
    """The items of a Markdown list, with the indented lines that go on from them; headings are left out."""
    items: list[str | BrokenRow] = []
    for number, line in enumerate(lines, 1):
        item = _ITEM.match(line)
        if item and not (items and line.startswith("  ")):
            items.append(line[item.end() :].strip())
        elif line.strip() and not _TITLE.match(line):
            if items and line.startswith((" ", "\t")):
                items[-1] = type(items[-1])(f"{items[-1]}\n{line.strip()}")
            else:
                fault = f"{path.name} line {number}: neither a list item, nor a heading, nor indented below an item"
                items.append(BrokenRow(fault))
    return items


_READERS: dict[str, Callable[[Path], list[Any]]] = {
    **dict.fromkeys(PROMPT_SUFFIXES, read_prompts),
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}


def listing(faults: Mapping[int, str], limit: int, noun: str) -> str:
    """Faults by number, equal ones in one line; past `limit` lines only the numbers."""
    groups: dict[str, list[int]] = {}
    for number in sorted(faults):
        groups.setdefault(faults[number], []).append(number)
    lines = [
        f"  {noun}{'s' if len(numbers) > 1 else ''} {ranges(numbers)}: {fault}"
        for fault, numbers in list(groups.items())[:limit]
    ]
    rest = sorted(number for numbers in list(groups.values())[limit:] for number in numbers)
    if rest:
        lines.append(f"  and {len(rest)} more {noun}{'s' if len(rest) > 1 else ''}: {ranges(rest)}")
    return "\n".join(lines)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs joined: "3, 7-9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def bad_rows_error(faults: Mapping[int, str], total: int, max_rows_listed: int = 20) -> DataError:
    """One error for all rows that cannot be used."""
    return DataError(
        f"{len(faults)} of {total} rows cannot be used (row numbers start at 0):\n"
        + listing(faults, max_rows_listed, "row"),
        rows=tuple(sorted(faults)),
    )
