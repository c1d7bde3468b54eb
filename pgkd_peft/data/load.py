"""Rows from a file, a directory or the Hub; and one report on all rows that cannot be used, before a model is loaded.

Row numbers start at 0 everywhere; line numbers of a file start at 1.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk

from ..errors import DataError
from .collator import DataCollatorForPrivilegedGKD, RowTooLongError
from .columns import ColumnMap
from .contexts import Contexts
from .files import (
    SUFFIXES,
    BrokenRow,
    files_of_split,
    first_line,
    listing,
    ranges,
    read_parquet,
    read_rows,
    to_dataset,
)
from .row import parse_row

COLUMNS = ("messages", "tools", "chat_template_kwargs", "teacher_chat_template_kwargs")
"""The columns that are read from a row, beside the PI column."""


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
            (split by file or folder names), a directory that ``Dataset.save_to_disk`` wrote, or a Hub name.
        split: its name, also sliced as in `train[:100]`.
        config_name: configuration of a Hub data set.
        columns: target columns and their templates, see :mod:`pgkd_peft.data.columns`. Other columns are kept.
        privileged_key: the PI column's name.

    Nested columns of JSON files are held as JSON (``datasets.Json``), so rows need not have the same keys or types.

    Raises:
        DataError: nothing there, an empty or broken file (all broken lines are listed), no such split, no `messages`.
        ConfigError: a template of `columns` is at fault.
    """
    where = str(path_or_name)
    path = Path(where).expanduser()
    if path.exists():
        dataset = _load_local(path, split, None if columns else privileged_key)
    elif path.suffix.lower() in SUFFIXES or where.startswith((".", "/", "~")):
        raise DataError(f"{where}: no such file or directory{_near_file(path)}")
    else:
        dataset = _load_hub(where, config_name, split)
    if len(dataset) == 0:
        raise DataError(f"{where} (split {split}) has no rows, or rows without columns")
    if columns is not None:
        dataset = map_columns(dataset, columns)
    if "messages" not in dataset.column_names:
        raise DataError(
            f"{where} has no column `messages`{_near('messages', dataset.column_names)}; its columns are: "
            f"{', '.join(dataset.column_names)}. Map them with `columns:`, e.g. messages: "
            '[{role: user, content: "{{ question }}"}, {role: assistant, content: "{{ answer }}"}], '
            f'{privileged_key}: "{{{{ solution }}}}"'
        )
    return dataset


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
    kept = [name for name in dataset.column_names if name not in columns]
    return concatenate_datasets([dataset.select_columns(kept), mapped], axis=1) if kept else mapped


def _load_local(path: Path, split: str, privileged_key: str | None) -> Dataset:
    base = split.partition("[")[0]
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: unknown kind of file; accepted are {', '.join(SUFFIXES)}")
        if base != "train":
            raise DataError(f"{path} is one file, so its only split is `train`; asked for was {split!r}")
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
        raise DataError(f"{path}: cannot be read as a saved data set: {first_line(error)}") from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise DataError(f"{path} has no split {split!r}; it has: {', '.join(saved)}")
        return saved[split]
    return saved


def _load_hub(name: str, config_name: str | None, split: str) -> Dataset:
    try:
        return load_dataset(name, config_name, split=split)
    except Exception as error:  # the Hub's client raises a dozen kinds: not found, gated, no network, no such split
        raise DataError(
            f"data set {name!r} cannot be loaded: {first_line(error)} "
            "Give a file, a directory, or a Hub name (with its configuration and split) that you may read."
        ) from error


@dataclass(frozen=True)
class DataReport:
    """What validation found in the rows that can be used. Lengths and PI are in tokens, one number a row.

    Attributes:
        kept: the usable rows' numbers (all of them, unless over-long rows were skipped).
        skipped_long: numbers of the rows left out because they are longer than `max_length`.
        prompt_lengths, teacher_prompt_lengths, completion_lengths: 0 for the completion of a prompt-only row.
        privileged_tokens, privileged_tokens_cut: PI that the teacher sees, and that the budget cut; 0 without PI.
        leaks: numbers of the rows whose PI stands in the student's prompt as well.
        markup: numbers of the rows whose own text holds the tokenizer's special tokens, which act as markup.
        warnings: what a user should know before training, one line each.
        fingerprint: SHA-256 of the rows, see :func:`fingerprint`.
    """

    kept: list[int]
    skipped_long: list[int]
    prompt_lengths: list[int]
    teacher_prompt_lengths: list[int]
    completion_lengths: list[int]
    privileged_tokens: list[int]
    privileged_tokens_cut: list[int]
    leaks: list[int]
    markup: list[int]
    warnings: list[str]
    fingerprint: str

    @property
    def rows(self) -> int:
        return len(self.kept)

    @property
    def rows_with_privileged(self) -> int:
        return sum(tokens > 0 for tokens in self.privileged_tokens)

    @property
    def rows_cut(self) -> int:
        return sum(tokens > 0 for tokens in self.privileged_tokens_cut)

    @property
    def prompt_only(self) -> int:
        return sum(length == 0 for length in self.completion_lengths)

    def summary(self) -> str:
        """A few readable lines."""
        lines = [
            f"{self.rows} rows, {self.rows_with_privileged} with PI, {self.prompt_only} without an answer",
            f"prompt {_spread(self.prompt_lengths)}, with PI {_spread(self.teacher_prompt_lengths)}, "
            f"answer {_spread(self.completion_lengths)} tokens (median, longest)",
            f"PI {sum(self.privileged_tokens)} tokens, {sum(self.privileged_tokens_cut)} cut in {self.rows_cut} rows",
        ]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


def validate_rows(
    rows: Dataset | Sequence[Any],
    collator: DataCollatorForPrivilegedGKD,
    *,
    require_completion: bool = False,
    max_rows_listed: int = 20,
    skip_long: bool = False,
) -> DataReport:
    """Check every row as training will use it, without a model.

    Args:
        rows: the data set, or a list of rows.
        collator: the run's own collator.
        require_completion: a row without a reference answer is a fault (lmbda < 1, when nobody else writes one).
        max_rows_listed: faults that are spelled out in the report; the other rows are listed by number.
        skip_long: leave out rows that are longer than `max_length` and count them, instead of refusing them.

    Raises:
        DataError: one report on all rows that cannot be used, with the fix for each.
    """
    if len(rows) == 0:
        raise DataError("the data set has no rows")
    key = collator.builder.privileged_key
    columns = _column_names(rows)
    if isinstance(rows, Dataset):
        rows = rows.select_columns([name for name in (*COLUMNS, key) if name in columns] or columns[:1])
    faults: dict[int, str] = {}
    kept: list[int] = []
    skipped: list[int] = []
    leaks: list[int] = []
    markup: list[int] = []
    lengths: list[tuple[int, int, int, int, int]] = []
    for i, row in enumerate(rows):
        try:
            encoded = collator.encode(row)
            contexts = encoded["contexts"]
            if require_completion and contexts.answer is None:
                raise DataError(
                    "no reference answer (an assistant message with text at the end of `messages`), which lmbda < 1 "
                    "trains on; add one, or set lmbda to 1"
                )
            collator.check_length(encoded)
        except RowTooLongError as error:
            if skip_long:
                skipped.append(i)
            else:
                faults[i] = str(error)
            continue
        except DataError as error:
            faults[i] = str(error)
            continue
        kept.append(i)
        lengths.append(
            (
                len(encoded["student_ids"]),
                len(encoded["teacher_ids"]),
                len(encoded["completion_ids"]),
                contexts.privileged_tokens,
                contexts.privileged_tokens_cut,
            )
        )
        if leaked(contexts, encoded["student_text"]):
            leaks.append(i)
        if has_markup(contexts, collator.special_tokens):
            markup.append(i)
    if faults:
        raise bad_rows_error(faults, len(rows), max_rows_listed)
    if not kept:
        raise DataError(f"all {len(rows)} rows are longer than max_length={collator.max_length}; raise it")
    prompt, teacher, completion, privileged, cut = (list(column) for column in zip(*lengths))
    warnings = []
    if not any(privileged):
        missing = "" if key in columns else f" (there is no column {key!r}{_near(key, columns)})"
        warnings.append(f"no row has PI{missing}: the teacher sees what the student sees, nothing will be learnt")
    if skipped:
        warnings.append(f"{len(skipped)} rows are longer than max_length={collator.max_length} and are left out")
    if any(cut):
        rows_cut = sum(tokens > 0 for tokens in cut)
        warnings.append(f"{sum(cut)} PI tokens of {rows_cut} rows are over max_privileged_length and are cut")
    if leaks:
        warnings.append(f"the PI of {len(leaks)} rows stands in the student's prompt as well: rows {ranges(leaks)}")
    if markup:
        warnings.append(f"the text of {len(markup)} rows holds special tokens, which act as markup: {ranges(markup)}")
    return DataReport(
        kept=kept,
        skipped_long=skipped,
        prompt_lengths=prompt,
        teacher_prompt_lengths=teacher,
        completion_lengths=completion,
        privileged_tokens=privileged,
        privileged_tokens_cut=cut,
        leaks=leaks,
        markup=markup,
        warnings=warnings,
        fingerprint=fingerprint(rows, key),
    )


def bad_rows_error(faults: Mapping[int, str], total: int, max_rows_listed: int = 20) -> DataError:
    """One error for all rows that cannot be used."""
    return DataError(
        f"{len(faults)} of {total} rows cannot be used (row numbers start at 0):\n"
        + listing(faults, max_rows_listed, "row"),
        rows=tuple(sorted(faults)),
    )


def leaked(contexts: Contexts, student_text: str) -> bool:
    """Whether a PI message stands verbatim (but for white space) in the student's prompt; texts under 12 characters
    are not counted, they occur by chance."""
    prompt = " ".join(student_text.split())
    texts = (" ".join(message["content"].split()) for message in contexts.privileged)
    return any(len(text) >= 12 and text in prompt for text in texts)


def has_markup(contexts: Contexts, special_tokens: Iterable[str]) -> bool:
    """Whether the row's own text holds special tokens, such as an end of turn inside a question."""
    answer = [contexts.answer] if contexts.answer else []
    texts = [message["content"] for message in [*contexts.student, *contexts.privileged, *answer]]
    return any(token in text for token in special_tokens for text in texts)


def fingerprint(rows: Iterable[Any], privileged_key: str = "privileged_messages") -> str:
    """SHA-256 over the rows' training columns in order, as canonical JSON without None values, so that the same rows
    from a list, a file or Arrow have the same one."""
    digest = hashlib.sha256()
    for row in rows:
        used = {name: row[name] for name in (*COLUMNS, privileged_key) if row.get(name) is not None}
        digest.update(json.dumps(_canonical(used), sort_keys=True, default=lambda value: type(value).__name__).encode())
    return digest.hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return value


def _column_names(rows: Dataset | Sequence[Any]) -> list[str]:
    if isinstance(rows, Dataset):
        return rows.column_names
    return list(dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row))


def _spread(lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    return f"{ordered[len(ordered) // 2]}, {ordered[-1]}"


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [str(other) for other in names], 1)
    return f" (nearest: `{near[0]}`)" if near else ""


def _near_file(path: Path) -> str:
    siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
