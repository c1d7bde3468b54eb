"""Rows in the formats of other projects -> `messages` and PI; and, where none is known, the mapping that would do it.

Known are, by their columns: ShareGPT (`conversations` of `from`/`value`), Alpaca (`instruction`, `input`, `output`),
TRL's prompt/completion and prompt-only rows, and SDFT's `privileged_context`. What is read is said in one line; a row
that cannot be read is refused by its number.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets

from ..errors import DataError
from .files import bad_rows_error, to_dataset
from .row import kind_of, listed, listed_messages, lists_by_key, load_json

logger = logging.getLogger(__name__)

SDFT_COLUMN = "privileged_context"
_CONVERSATIONS = ("conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_SYSTEMS = ("system", "system_prompt")
# Columns beside `messages` that say more than is read, and what to do with them.
_TEXT_ONLY = "only text is supported, so the model would not see them"
_VARIABLE = "put it into `chat_template_kwargs`"
_UNREAD = {
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), _TEXT_ONLY),
    **dict.fromkeys(("documents", "enable_thinking", "reasoning_effort"), _VARIABLE),
    **dict.fromkeys(
        ("weight", "loss_weight", "loss_mask"), "every row counts the same: leave out those that should not"
    ),
}
_SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "claude", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response", "function"), "tool"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_CALLS = ("function_call", "tool_call")  # speakers whose words are a call, as JSON


@dataclass(frozen=True)
class Format:
    """A format that was recognised.

    Attributes:
        name: as people call it.
        columns: those that are read.
        becomes: what they become, in words.
        convert: a row -> its messages.
    """

    name: str
    columns: tuple[str, ...]
    becomes: str
    convert: Callable[[Mapping[str, Any]], list[Any]]


def as_messages(dataset: Dataset, where: str, privileged_key: str = "privileged_messages") -> Dataset:
    """The rows with a column `messages`, where they have one already or are in a known format, and with SDFT's
    `privileged_context` under the name of the PI; what was read otherwise than it is called is logged.

    Args:
        where: what the log and the errors call these rows.

    Raises:
        DataError: some rows of a known format cannot be read; all of them are listed.
    """
    if SDFT_COLUMN in dataset.column_names and privileged_key not in dataset.column_names:
        logger.warning("%s: the column %s (TRL's SDFT) is read as the PI (%s).", where, SDFT_COLUMN, privileged_key)
        dataset = dataset.rename_column(SDFT_COLUMN, privileged_key)
    _refuse_unread(dataset, where, privileged_key)
    found = recognised(dataset)
    if found is None:
        return dataset
    made, faults = [], {}
    for i, row in enumerate(dataset.select_columns(list(found.columns))):
        try:
            made.append({"messages": found.convert(row)})
        except DataError as error:
            faults[i] = str(error)
    if faults:
        raise bad_rows_error(faults, len(dataset))
    unread = [name for name in dataset.column_names if name not in (*found.columns, *_READ, privileged_key)]
    logger.warning(
        "%s: %s rows (%s) are read as messages: %s.%s",
        where,
        found.name,
        ", ".join(found.columns),
        found.becomes,
        f" Not read: {', '.join(unread)}." if unread else "",
    )
    kept = [name for name in dataset.column_names if name not in ("messages", *_SYSTEMS)]
    return concatenate_datasets([dataset.select_columns(kept), to_dataset(made)], axis=1) if kept else to_dataset(made)


def _refuse_unread(dataset: Dataset, where: str, privileged_key: str) -> None:
    """Refuse rows that hold more, under a well-known name, than would be read of them.

    Raises:
        DataError: names the first such row, the column and the fix.
    """
    fixes = {**_UNREAD, SDFT_COLUMN: f"the PI is in `{privileged_key}`; keep one of the two"}
    for name in [name for name in fixes if name in dataset.column_names and name != privileged_key]:
        for i, row in enumerate(dataset.select_columns([name])):
            if row[name] not in (None, "", [], {}, 1, "1", "1.0", "true"):
                raise DataError(
                    f"{where}, row {i}: the column `{name}` ({reprlib.repr(row[name])}) is not read; {fixes[name]}. "
                    "Take the column out, or say with `columns:` what counts",
                    rows=(i,),
                )


def without_beside(dataset: Dataset, targets: Iterable[str]) -> list[str]:
    """The columns of a mapped data set that are kept: not those which say what the mapping has said."""
    dropped = {*targets, *_SYSTEMS, *_UNREAD, SDFT_COLUMN}
    return [name for name in dataset.column_names if name not in dropped]


def messages_of(rows: Any, where: str, privileged_key: str) -> Any:
    """:func:`as_messages` of what was passed in Python: a Dataset, a list of rows, or several of them by name; anything
    else (a stream, None) as it is."""
    if isinstance(rows, Dataset):
        return as_messages(rows, where, privileged_key)
    if isinstance(rows, dict):  # also a DatasetDict
        return {name: messages_of(each, f"{where}[{name!r}]", privileged_key) for name, each in rows.items()}
    if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
        names = {name for row in rows for name in row}
        if all("messages" not in row for row in rows) or names & {*_SYSTEMS, *_UNREAD}:
            return as_messages(to_dataset(rows), where, privileged_key)
    return rows


_READ = ("tools", "chat_template_kwargs", "teacher_chat_template_kwargs")


def recognised(dataset: Dataset) -> Format | None:
    """The format of rows whose columns say so; None where they have `messages` as they should be, or say nothing."""
    names = dataset.column_names
    systems = tuple(name for name in _SYSTEMS if name in names)[:1]
    if "messages" in names:
        if _is_share_gpt(_first(dataset, "messages")):
            return _share_gpt("messages", systems)
        if not systems or not isinstance(_first(dataset, systems[0]), (str, list)):
            return None
        becomes = f"`{systems[0]}` is a system turn before them"
        turns = _with_system(systems, _turns_of("messages"))
        return Format("conversation", ("messages", *systems), becomes, turns)
    for name in _CONVERSATIONS:
        value = _first(dataset, name) if name in names else None
        if _is_share_gpt(value):
            return _share_gpt(name, systems)
        if _is_conversation(value):
            return Format("conversation", (name, *systems), "as they are", _with_system(systems, _turns_of(name)))
    if {"instruction", "output"} <= set(names):
        others = tuple(name for name in ("input", "history") if name in names)
        becomes = "instruction and input are the user's turn, output is the answer"
        return Format("Alpaca", ("instruction", *others, "output", *systems), becomes, _with_system(systems, _alpaca))
    if "prompt" in names and not {"chosen", "rejected", "label"} & set(names):
        if "completion" in names:
            becomes = "the prompt is the user's turn (or turns), the completion the answer"
            columns = ("prompt", "completion", *systems)
            return Format("prompt/completion", columns, becomes, _with_system(systems, _prompt_completion))
        if not _other_answer(names):
            becomes = "the prompt is the user's turn (or turns), without an answer"
            return Format("prompt-only", ("prompt", *systems), becomes, _with_system(systems, _prompt_completion))
    return None


def _first(dataset: Dataset, name: str) -> Any:
    """The first value of a column that is there."""
    return next((value for row in dataset.select_columns([name]) if (value := row[name]) not in (None, "", [])), None)


def _items(value: Any, field: str) -> list[Any]:
    """The turns of a conversation, however a file held them."""
    value = lists_by_key(listed(value, field), field)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"`{field}` is {kind_of(value)}; give a list of turns")
    return list(value)


def _is_share_gpt(value: Any) -> bool:
    return _speaks(value, "from", "value")


def _is_conversation(value: Any) -> bool:
    return _speaks(value, "role", "content")


def _speaks(value: Any, *keys: str) -> bool:
    try:
        items = _items(value, "value")
    except DataError:
        return False
    return bool(items) and isinstance(items[0], Mapping) and set(keys) <= set(items[0])


def _with_system(
    systems: tuple[str, ...], convert: Callable[[Mapping[str, Any]], list[Any]]
) -> Callable[[Mapping[str, Any]], list[Any]]:
    """`convert`, and the text of a column `system` before what it gives."""
    if not systems:
        return convert

    def converted(row: Mapping[str, Any]) -> list[Any]:
        turns, text = convert(row), row.get(systems[0])
        text = text if isinstance(text, list) else _text(row, systems[0])  # a list of parts, as Anthropic's
        if not text or (isinstance(text, str) and not text.strip()):
            return turns
        if turns and isinstance(turns[0], Mapping) and turns[0].get("role") == "system":
            if turns[0].get("content") == text:
                return turns
            raise DataError(f"`{systems[0]}` and the conversation both have a system turn; keep one")
        return [{"role": "system", "content": text}, *turns]

    return converted


def _share_gpt(name: str, systems: tuple[str, ...]) -> Format:
    becomes = "human is user, gpt is assistant"

    def convert(row: Mapping[str, Any]) -> list[Any]:
        return [_speech(turn, f"{name}[{i}]") for i, turn in enumerate(_items(row[name], name))]

    return Format("ShareGPT", (name, *systems), becomes, _with_system(systems, convert))


def _speech(turn: Any, where: str) -> Any:
    """A turn of `from` and `value` as one of `role` and `content`, its other keys kept."""
    if not isinstance(turn, Mapping) or "role" in turn or turn.get("from") is None:
        return turn  # as it should be, or for the parser to refuse
    rest = {key: item for key, item in turn.items() if key not in ("from", "value") and item is not None}
    if rest.get("content"):
        raise DataError(f"{where} has both `value` and `content`; keep one")
    speaker, value = turn["from"], turn.get("value")
    known = str(speaker).strip().lower()
    if known in _CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(value, where), **rest}
    if known not in _SPEAKERS:
        raise DataError(f"{where} is from {speaker!r}; known are {', '.join((*_SPEAKERS, *_CALLS))}")
    return {"role": _SPEAKERS[known], "content": value, **rest}


def _calls(value: Any, where: str) -> list[Any]:
    """What a `function_call` says, one call or several, as JSON text."""
    try:
        calls = load_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is a call that is not JSON: {error}") from error
    return [calls] if isinstance(calls, Mapping) else calls


def _turns_of(name: str) -> Callable[[Mapping[str, Any]], list[Any]]:
    return lambda row: _items(row[name], name)


def _alpaca(row: Mapping[str, Any]) -> list[Any]:
    turns = []
    for i, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"history[{i}] is {kind_of(pair)}; give a pair of texts, question and answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n\n".join(text for text in (_text(row, "instruction"), _text(row, "input")) if text.strip())
    turns.append({"role": "user", "content": question})
    answer = _text(row, "output")
    return [*turns, {"role": "assistant", "content": answer}] if answer.strip() else turns


def _prompt_completion(row: Mapping[str, Any]) -> list[Any]:
    turns = _said(row, "prompt", "user")
    if not turns:
        raise DataError("`prompt` is empty; give the question")
    answer = _said(row, "completion", "assistant")
    for i, turn in enumerate(answer):
        if not isinstance(turn, Mapping) or turn.get("role") not in ("assistant", "tool"):
            raise DataError(f"completion[{i}] is {kind_of(turn)}; an assistant's turn is wanted")
    return [*turns, *answer]


def _said(row: Mapping[str, Any], name: str, role: str) -> list[Any]:
    """A column of text, as one turn; of turns, as they are; [] where it is empty."""
    value = row.get(name)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return []
    as_turns = lists_by_key(listed_messages(value), name)
    if isinstance(as_turns, (list, tuple)):
        return list(as_turns)
    if isinstance(value, Mapping):
        return [value]
    return [{"role": role, "content": _text(row, name)}]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"`{name}` is {kind_of(value)}; give text")
    return value


# ---- a mapping for rows of no known format -------------------------------------------------------------------------

_QUESTIONS = ("question", "prompt", "instruction", "query", "problem", "input", "request", "user", "human", "title")
_ANSWERS = ("answer", "completion", "response", "output", "chosen", "reply", "target", "assistant", "label")
_HINTS = (
    *("privileged", "solution", "rationale", "explanation", "context", "hint", "evidence", "passage", "document"),
    *("reference", "feedback", "critique", "support", "fact", "background", "reasoning", "knowledge"),
)


def _other_answer(names: Iterable[str]) -> bool:
    """Whether a column may be the answer to a `prompt`, under a name that no format has."""
    return any(name in _ANSWERS for name in names)


def mapping_for(dataset: Dataset, privileged_key: str, near: str | None = None) -> str:
    """A `columns:` block, as YAML, that makes `messages` of these rows' own columns, as far as their names tell."""
    if near is not None:
        return f'columns:\n  messages: "{_template(near)}"'
    plain = [name for name in dataset.column_names if isinstance(_first(dataset, name), (str, int, float))]
    for name in dataset.column_names:
        if _is_conversation(_first(dataset, name)):
            return f"columns:\n  messages: '{_template(name)}'" + _hint_line(plain, privileged_key)
    free = list(plain)
    question = _take(free, _QUESTIONS) or (free.pop(0) if free else None)
    if question is None:
        return ""
    answer = _take(free, _ANSWERS)
    lines = ["columns:", "  messages:", f"    - {{role: user, content: '{_template(question)}'}}"]
    if answer is not None:
        lines.append(f"    - {{role: assistant, content: '{_template(answer)}'}}")
    return "\n".join(lines) + _hint_line(free, privileged_key)


def _hint_line(free: list[str], privileged_key: str) -> str:
    hint = _take(free, _HINTS)
    if hint is None:
        return f"\n  # {privileged_key}: '{{{{ the column with what only the teacher reads }}}}'"
    return f"\n  {privileged_key}: '{_template(hint)}'"


def _take(free: list[str], words: tuple[str, ...]) -> str | None:
    """Takes the column that is called, or else whose name holds, one of these words, the first words first."""
    for fits in (lambda name, word: name == word, lambda name, word: word in name):
        for word in words:
            for name in free:
                if fits(name.lower(), word):
                    free.remove(name)
                    return name
    return None


def _template(name: str) -> str:
    """The column as a template; a name that is none in Jinja through `row`."""
    if name.isidentifier():
        return f"{{{{ {name} }}}}"
    quoted = name.replace("\\", "\\\\").replace('"', '\\"').replace("'", "''")
    return f'{{{{ row["{quoted}"] }}}}'
