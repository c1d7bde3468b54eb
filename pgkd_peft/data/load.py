"""Rows from a file, a directory or the Hub; and one report on all rows that cannot be used, before a model is loaded.

Row numbers start at 0 everywhere; line numbers of a file start at 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk

from ..errors import ConfigError, DataError, read_text, reason
from .columns import ColumnMap
from .files import (
    PROMPT_SUFFIXES,
    SUFFIXES,
    BrokenRow,
    NoSplitError,
    bad_rows_error,
    files_of_split,
    read_parquet,
    read_rows,
    to_dataset,
)
from .formats import as_messages, mapping_for, without_beside
from .row import parse_row


def load_rows(
    path_or_name: str | Path,
    *,
    split: str = "train",
    config_name: str | None = None,
    columns: Mapping[str, Any] | None = None,
    privileged_key: str = "privileged_messages",
) -> Dataset:
    """Load a data set with `messages` and, where it has PI, the column `privileged_key`.

    Args:
        path_or_name: a .jsonl, .json, .parquet, .csv or .tsv file (one split, `train`), a directory of such files
            (split by file or folder names), a directory that ``Dataset.save_to_disk`` wrote, or a Hub name; also a .txt
            file with a prompt a line, or a .md file with a prompt a list item (or paragraph).
        split: its name, also sliced as in `train[:100]`.
        config_name: configuration of a Hub data set.
        columns: target columns and their templates, see :mod:`pgkd_peft.data.columns`. Other columns are kept.
        privileged_key: the PI column's name.

    Rows of other projects' formats are converted, see :mod:`pgkd_peft.data.formats`.

    Nested columns of JSON files are held as JSON (``datasets.Json``), so rows need not have the same keys or types.

    Raises:
        DataError: nothing there, an empty or broken file (all broken lines are listed), no such split, no `messages`.
        ConfigError: a template of `columns` is at fault.
    """
    where = str(path_or_name)
    path = Path(where).expanduser()
    if path.exists():
        dataset = _load_local(path, split, None if columns else privileged_key)
    elif path.suffix.lower() in (*SUFFIXES, *PROMPT_SUFFIXES) or where.startswith((".", "/", "~")):
        raise DataError(f"{where}: no such file or directory{_near_file(path)}")
    else:
        dataset = _load_hub(where, config_name, split)
    if len(dataset) == 0:
        raise DataError(f"{where} (split {split}) has no rows, or rows without columns")
    if columns is not None:
        dataset = map_columns(dataset, columns)
    dataset = as_messages(dataset, where, privileged_key)
    if "messages" not in dataset.column_names:
        raise _no_messages(dataset, where, privileged_key)
    return dataset


def give_privileged(dataset: Dataset, path: str, privileged_key: str, *, unless_given: bool = False) -> Dataset:
    """The rows, each with the text of a .txt or .md file as its PI.

    Args:
        unless_given: rows that have PI of their own stay as they are, instead of being an error.

    Raises:
        ConfigError: the file cannot be used, or rows have PI of their own.
    """
    if Path(path).suffix.lower() not in PROMPT_SUFFIXES:
        raise ConfigError(f"privileged_file is {path!r}; give a text file ({' or '.join(PROMPT_SUFFIXES)})")
    if not Path(path).is_file():
        raise ConfigError(f"privileged_file is {path!r}, which is no file")
    text = read_text(path, "privileged_file").strip()
    if not text:
        raise ConfigError(f"privileged_file {path!r} is empty; it must hold what only the teacher reads")
    if privileged_key in dataset.column_names:
        own = sum(value not in (None, "", []) for value in dataset[privileged_key])
        if own and unless_given:
            return dataset
        if own:
            raise ConfigError(
                f"privileged_file gives every row the same PI, but {own} of {len(dataset)} rows have PI of their own "
                f"(column {privileged_key!r}); drop one of the two"
            )
        dataset = dataset.remove_columns(privileged_key)
    return dataset.add_column(privileged_key, [text] * len(dataset))


def _no_messages(dataset: Dataset, where: str, privileged_key: str) -> DataError:
    """Says so, with the mapping that would do it."""
    names = dataset.column_names
    near = difflib.get_close_matches("messages", names, 1)
    block = mapping_for(dataset, privileged_key, near[0] if near else None)
    rated = " (Rated rows: keep the good ones alone.)" if {"completion", "label"} <= set(names) else ""
    return DataError(
        f"{where} has no column `messages`{_near('messages', names)}; its columns are: {', '.join(names)}. Map them "
        f"with `columns:`, in a recipe{rated}" + (f", for example:\n{block}" if block else "; none of them holds text")
    )


def map_columns(dataset: Dataset, columns: Mapping[str, Any]) -> Dataset:
    """Add (or replace) the target columns that templates make; see :mod:`pgkd_peft.data.columns`.

    Raises:
        ConfigError: a template is at fault. DataError: it fails for some rows; all of them are listed.
    """
    column_map = ColumnMap(columns, dataset.column_names)
    faults: dict[int, str] = {}
    made: list[dict[str, Any]] = []
    sources = sorted(column_map.sources)
    rows: Iterable[Any] = dataset.select_columns(sources) if sources else ({} for _ in range(len(dataset)))
    for i, row in enumerate(rows):
        try:
            made.append(column_map(row))
        except DataError as error:
            faults[i] = str(error)
    if faults:
        raise bad_rows_error(faults, len(dataset))
    mapped = to_dataset(made)
    kept = without_beside(dataset, columns)
    return concatenate_datasets([dataset.select_columns(kept), mapped], axis=1) if kept else mapped


def _load_local(path: Path, split: str, privileged_key: str | None) -> Dataset:
    base = split.partition("[")[0]
    if path.is_file():
        accepted = (*SUFFIXES, *PROMPT_SUFFIXES)
        if path.suffix.lower() not in accepted:
            raise DataError(f"{path}: unknown kind of file; accepted are {', '.join(accepted)}")
        if base != "train":
            raise NoSplitError(f"{path} is one file, so its only split is `train`; asked for was {split!r}")
        dataset = _read_files([path], privileged_key)
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        dataset = _load_saved(path, base)
    else:
        dataset = _read_files(files_of_split(path, base), privileged_key)
    if base == split:
        return dataset
    try:
        part = ReadInstruction.from_spec(split).to_absolute({base: len(dataset)})[0]
    except (ValueError, AssertionError) as error:
        raise DataError(f"split {split!r} cannot be read: {error}; write it like train[:100] or train[10%:]") from error
    return dataset.select(range(part.from_ or 0, len(dataset) if part.to is None else part.to))


def _read_files(files: list[Path], privileged_key: str | None) -> Dataset:
    """The rows of data files; where some cannot be read, one report on these and (unless columns are yet to be mapped:
    `privileged_key` None) on the rows whose fields are wrong."""
    if files[0].suffix.lower() == ".parquet":
        return read_parquet(files)
    rows = [row for path in files for row in read_rows(path)]
    faults = {i: str(row) for i, row in enumerate(rows) if isinstance(row, BrokenRow)}
    if not faults:
        return to_dataset(rows)
    for i, row in enumerate(rows):
        if i not in faults and privileged_key is not None:
            try:
                parse_row(row, privileged_key)
            except DataError as error:
                faults[i] = str(error)
    raise bad_rows_error(faults, len(rows))


def _load_saved(path: Path, split: str) -> Dataset:
    try:
        saved = load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path}: cannot be read as a saved data set: {reason(error)}") from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise NoSplitError(f"{path} has no split {split!r}; it has: {', '.join(saved)}")
        return saved[split]
    return saved


def _load_hub(name: str, config_name: str | None, split: str) -> Dataset:
    try:
        return load_dataset(name, config_name, split=split)
    except Exception as error:  # the Hub's client raises a dozen kinds: not found, gated, no network, no such split
        raise DataError(
            f"data set {name!r} cannot be loaded: {reason(error)} "
            "Give a file, a directory, or a Hub name (with its configuration and split) that you may read."
        ) from error


def _column_names(rows: Dataset | Sequence[Any]) -> list[str]:
    if isinstance(rows, Dataset):
        return rows.column_names
    return list(dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row))


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [str(other) for other in names], 1)
    return f" (nearest: `{near[0]}`)" if near else ""


def _near_file(path: Path) -> str:
    siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
