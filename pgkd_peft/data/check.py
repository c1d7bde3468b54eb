"""All rows of a data set, checked before a model is loaded; one report on what cannot be used."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset

from ..config import PrivilegedGKDConfig
from ..errors import ConfigError, DataError
from .collator import DataCollatorForPrivilegedGKD, RowTooLongError
from .columns import COLUMNS, LEGACY_COLUMNS
from .contexts import Contexts
from .files import bad_rows_error, ranges, to_dataset
from .load import _column_names, _near
from .template import unread_variable


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
        teacher_prompts, answers: token ids of every usable row, 4 bytes each; an empty answer for a prompt-only row.
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
    teacher_prompts: list[array] = field(default_factory=list, repr=False)
    answers: list[array] = field(default_factory=list, repr=False)

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
        used = [name for name in (*COLUMNS, *LEGACY_COLUMNS, key) if name in columns]
        rows = rows.select_columns(used or columns[:1])
    faults: dict[int, str] = {}
    kept: list[int] = []
    skipped: list[int] = []
    leaks: list[int] = []
    markup: list[int] = []
    found: dict[str, list[int]] = {}
    lengths: list[tuple[int, ...]] = []  # of both prompts and the answer; of the PI, kept and cut
    teacher_prompts: list[array] = []
    answers: list[array] = []
    for i, row in enumerate(rows):
        try:
            encoded = _encode(collator, row, require_completion)
        except DataError as error:
            if skip_long and isinstance(error, RowTooLongError):
                skipped.append(i)
            else:
                faults[i] = str(error)
            continue
        contexts: Contexts = encoded["contexts"]
        kept.append(i)
        ids = (len(encoded[name]) for name in ("student_ids", "teacher_ids", "completion_ids"))
        lengths.append((*ids, contexts.privileged_tokens, contexts.privileged_tokens_cut))
        teacher_prompts.append(array("i", encoded["teacher_ids"]))
        answers.append(array("i", encoded["completion_ids"]))
        for fault in _told(collator, encoded):
            found.setdefault(fault, []).append(i)
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
    if not any(privileged) and not collator.keep_sources:  # else the PI is made while training
        warnings.append(_without_privileged(key, columns))
    if skipped:
        warnings.append(f"{len(skipped)} rows are longer than max_length={collator.max_length} and are left out")
    if any(cut):
        rows_cut = sum(tokens > 0 for tokens in cut)
        warnings.append(f"{sum(cut)} PI tokens of {rows_cut} rows are over max_privileged_length and are cut")
    if leaks:
        warnings.append(f"the PI of {len(leaks)} rows stands in the student's prompt as well: rows {ranges(leaks)}")
    if markup:
        warnings.append(f"the text of {len(markup)} rows holds special tokens, which act as markup: {ranges(markup)}")
    warnings += [f"{fault}: {len(numbers)} rows ({ranges(numbers)})" for fault, numbers in found.items()]
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
        teacher_prompts=teacher_prompts,
        answers=answers,
    )


def _without_privileged(key: str, columns: Sequence[str]) -> str:
    missing = "" if key in columns else f" (there is no column {key!r}{_near(key, columns)})"
    return (
        f"no row has PI{missing}: the teacher sees what the student sees, nothing will be learnt; "
        "--privileged_file FILE gives all rows one"
    )


def _encode(collator: DataCollatorForPrivilegedGKD, row: Any, require_completion: bool) -> dict[str, Any]:
    encoded = collator.encode(row)
    if require_completion and encoded["contexts"].answer is None:
        raise DataError(
            "no reference answer (an assistant message with text at the end of `messages`), which lmbda < 1 "
            "trains on; add one, or set lmbda to 1"
        )
    return collator.check_length(encoded)


def _told(collator: DataCollatorForPrivilegedGKD, encoded: dict[str, Any]) -> list[str]:
    """What is not as the row says, but can be trained on."""
    contexts, builder = encoded["contexts"], collator.builder
    lost = encoded["lost_thoughts"]
    told = [unread_variable(name, builder.read_variables) for name in builder.unread_variables(contexts)]
    if len(contexts.student) in lost:
        told.append("the chat template leaves out the answer's thoughts (reasoning_content), which are not learnt")
    if any(i < len(contexts.student) for i in lost):
        told.append("the chat template leaves out the thoughts of earlier turns")
    told += [f"the chat template never shows the field `{name}` of turns" for name in encoded["unshown_fields"]]
    if contexts.moved:
        told.append(
            f"the PI stands in the last user turn, as with placement {builder.placement!r} the chat template would "
            "change more than the PI"
        )
    return told


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


def _spread(lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    return f"{ordered[len(ordered) // 2]}, {ordered[-1]}"


def checked_rows(
    dataset: Any, collator: Any, args: PrivilegedGKDConfig, name: str
) -> tuple[Dataset | IterableDataset, DataReport | None]:
    """The dataset, all its rows found usable, and what was found; None where rows can only be checked one by one."""
    if dataset is None:
        raise ConfigError(f"{name} is missing; pass a datasets.Dataset with a 'messages' column.")
    if isinstance(dataset, IterableDataset) or not isinstance(collator, DataCollatorForPrivilegedGKD):
        return dataset, None
    report = validate_rows(
        dataset,
        collator,
        require_completion=args.lmbda < 1.0 and not args.seq_kd,
        skip_long=args.skip_long_prompts,
    )
    rows = args.per_device_train_batch_size * args.world_size
    if name == "train_dataset" and args.dataloader_drop_last and len(report.kept) < rows:
        raise ConfigError(
            f"dataloader_drop_last drops what does not fill a batch of {rows} rows, and {name} has {len(report.kept)}: "
            "not one step would be trained. Remove it, or lower per_device_train_batch_size."
        )
    if not isinstance(dataset, Dataset):
        dataset = to_dataset(dataset)
    return (dataset.select(report.kept) if report.skipped_long else dataset), report
