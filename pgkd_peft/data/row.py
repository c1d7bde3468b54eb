"""Parsing of one row's fields: messages, privileged information, tools, template variables.

Everything a row can get wrong is refused here by field, index and fix, as a :class:`DataError` without the row's number
(who iterates over rows adds it). What comes back is clean: known roles, text content, no None-filled keys.
"""

from __future__ import annotations

import difflib
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DataError

ROLES = ("system", "user", "assistant", "tool", "developer")

# What other formats put beside (or instead of) an answer's text; none of it would be read.
_CALLS_FIX = "write it as `tool_calls`: [{'function': {'name': ..., 'arguments': {...}}}]"
_LEGACY_FIELDS = {
    **dict.fromkeys(("functioncall", "functioncalls", "toolcall", "toolcalls"), _CALLS_FIX),
    "refusal": "write its text into `content`",
    **dict.fromkeys(("audio", "image", "images", "video", "videos"), "only text is supported, write it into `content`"),
}
_MEDIA = ("image", "audio", "video", "input_", "file", "source")
_CALL_FIELDS = {"id", "type", "index", "name", "arguments"}
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
_WEIGHT_FIELDS = ("weight", "loss_weight", "loss", "train", "training", "trainable", "train_on_turn")
# Fields of a message that no template has to show.
LABELS = {"role", "content", "tool_calls", "tool_call_id", "id", *THOUGHT_FIELDS, *_WEIGHT_FIELDS}
# Fields that a message without text may have and still be empty.
_BLANK_FIELDS = {"role", "content", "name", "id", *_WEIGHT_FIELDS}

_MESSAGE_EXAMPLE = '{"role": "user", "content": "..."}'
# Arguments of apply_chat_template that a row must not set: they are ours, or would bring in code or truncation.
_RESERVED_KWARGS = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens"),
}


@dataclass(frozen=True)
class ParsedRow:
    """A row's clean fields: the conversation up to the answer, the answer (None: prompt-only), PI, template input."""

    messages: list[dict[str, Any]]
    answer: dict[str, Any] | None
    privileged: list[dict[str, Any]]
    tools: list[Any] | None
    chat_template_kwargs: dict[str, Any]
    teacher_chat_template_kwargs: dict[str, Any]


def parse_row(row: Any, privileged_key: str) -> ParsedRow:
    """Everything about a row that can be checked without a tokenizer.

    Raises:
        DataError: names the field at fault and the fix.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a dict of columns, this one is {kind_of(row)}")
    if row.get("messages") is None:
        columns = ", ".join(str(column) for column in row) or "none"
        raise DataError(f"no `messages` (columns: {columns}); give a list of messages, or map your columns to it")
    messages = parse_messages(row["messages"], "messages")
    answer = messages.pop() if messages[-1]["role"] == "assistant" else None
    if answer is not None:
        _check_weight(answer, f"messages[{len(messages)}]")
        if not answer["content"].strip() and "tool_calls" not in answer:
            answer = None
    if not any(message["role"] == "user" for message in messages):
        raise DataError("`messages` has no user turn before the answer; there is nothing to answer")
    _check_legacy(row)
    kwargs = parse_template_kwargs(row, "chat_template_kwargs")
    return ParsedRow(
        messages=messages,
        answer=answer,
        privileged=parse_privileged(row.get(privileged_key), privileged_key),
        tools=parse_tools(row.get("tools")),
        chat_template_kwargs=kwargs,
        teacher_chat_template_kwargs={**kwargs, **parse_template_kwargs(row, "teacher_chat_template_kwargs")},
    )


def parsed_or_none(row: Any, privileged_key: str) -> ParsedRow | None:
    """:func:`parse_row`; None for a row that cannot be used, which the check of all rows reports."""
    try:
        return parse_row(row, privileged_key)
    except DataError:
        return None


def _check_legacy(row: Mapping[str, Any]) -> None:
    """Refuse the schemas of OpenAI's older format, which nobody would show to the model."""
    value = row.get("functions")
    if row.get("tools") or not value:
        return
    try:
        items = lists_by_key(listed(value, "functions"), "functions")
    except DataError:
        return  # some other column of that name
    if isinstance(items, (list, tuple)) and items and all(isinstance(i, Mapping) and "name" in i for i in items):
        raise DataError(
            "`functions` (an older format) is not read; write it as `tools`: [{'type': 'function', 'function': {...}}]"
        )


def parse_messages(value: Any, field: str) -> list[dict[str, Any]]:
    """A conversation as a list of clean message dicts: known role, text content, no None-filled keys.

    Raises:
        DataError: names the field and index at fault.
    """
    value = lists_by_key(listed(value, field), field)
    if isinstance(value, Mapping):
        raise DataError(f"`{field}` is one message; put it into a list")
    if not isinstance(value, (list, tuple)):
        raise DataError(f"`{field}` is {kind_of(value)}; give a list of messages like {_MESSAGE_EXAMPLE}")
    if not value:
        raise DataError(f"`{field}` is empty; give at least a user turn")
    return [_parse_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def parse_privileged(value: Any, field: str) -> list[dict[str, Any]]:
    """The PI as messages; [] when it is missing, None, empty or blank. A string is one user message.

    Raises:
        DataError: names the field and index at fault.
    """
    if value is None:
        return []
    value = lists_by_key(listed_messages(value), field)
    if isinstance(value, str):
        check_unicode(value, f"`{field}`")
        return [{"role": "user", "content": value}] if value.strip() else []
    if isinstance(value, (list, tuple)) and not value:
        return []
    if isinstance(value, Mapping) or not isinstance(value, (list, tuple)):
        raise DataError(f"`{field}` is {kind_of(value)}; give a string or a list of messages like {_MESSAGE_EXAMPLE}")
    messages = []
    for i, item in enumerate(value):
        message = _parse_message(item, f"{field}[{i}]", blank_allowed=True)
        extra = sorted(set(message) & {"tool_calls", "reasoning_content", "thinking", "reasoning"})
        if extra:
            raise DataError(
                f"{field}[{i}] has `{extra[0]}`, which the PI budget cannot cut; write it into `content` as text"
            )
        if message["content"].strip():
            messages.append(message)
    return messages


def parse_template_kwargs(row: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A row's variables for the chat template (a dict, or its JSON text), without None-filled keys."""
    value = _from_json(row.get(field), field)
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise DataError(f"`{field}` is {kind_of(value)}; give a dict like {{'enable_thinking': false}}")
    reserved = sorted(_RESERVED_KWARGS & set(value))
    if reserved:
        raise DataError(f"`{field}` sets {reserved[0]!r}, which is not the row's to set; take it out")
    for name, flag in value.items():
        if isinstance(flag, str) and flag.strip().lower() in ("true", "false"):
            raise DataError(f"`{field}` has {name} {flag!r}, a text, which is true whatever it says; drop the quotes")
    return _json_like(value, field)


def parse_tools(value: Any) -> list[Any] | None:
    """A row's tool schemas (a list of dicts, or the JSON text of the list or of each), None when there are none."""
    written = isinstance(value, str)
    value = lists_by_key(_from_json(value, "tools"), "tools")
    if value is None or value == []:
        return None
    if not isinstance(value, (list, tuple)):
        raise DataError(f"`tools` is {kind_of(value)}; give a list of tool schemas (dicts)")
    tools = [
        _json_like(_from_json(tool, f"tools[{i}]"), f"tools[{i}]", written=written or isinstance(tool, str))
        for i, tool in enumerate(value)
    ]
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"tools[{i}] is {kind_of(tool)}; give a tool schema (a dict with a function's name)")
    return tools


def _parse_message(message: Any, where: str, blank_allowed: bool = False) -> dict[str, Any]:
    if isinstance(message, (list, tuple)):
        raise DataError(f"{where} is a list inside the list; flatten it to one list of messages")
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is {kind_of(message)}; give a message like {_MESSAGE_EXAMPLE}")
    if "role" not in message and "from" in message:
        raise DataError(
            f"{where} has `from`/`value` (ShareGPT); rename them to `role`/`content`, human to user, gpt to assistant"
        )
    role = message.get("role")
    if role is None:
        raise DataError(f"{where} has no `role`; accepted are {', '.join(ROLES)}")
    if not isinstance(role, str) or role not in ROLES:
        near = difflib.get_close_matches(role.strip().lower(), ROLES, 1) if isinstance(role, str) else []
        nearest = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(f"{where} has role {reprlib.repr(role)}{nearest}; accepted are {', '.join(ROLES)}")
    clean = _strip_none(dict(message), where)
    for name, value in clean.items():
        fix = _LEGACY_FIELDS.get(re.sub("[_-]", "", str(name)).lower()) if name != "tool_calls" else None
        if value and fix:
            raise DataError(f"{where} has `{name}`, which is not read; {fix}")
    if "tool_calls" in clean:
        clean["tool_calls"] = _parse_tool_calls(clean["tool_calls"], f"{where}.tool_calls")
        if not clean["tool_calls"]:
            del clean["tool_calls"]
    content = clean.get("content")
    if content is None:
        if not (blank_allowed or role == "assistant" or "tool_calls" in clean):
            raise DataError(f"{where} (role {role}) has no `content`; give its text")
        content = ""
    clean["content"] = _text(content, f"{where}.content")
    for name in THOUGHT_FIELDS:
        if name in clean:
            clean[name] = _text(clean[name], f"{where}.{name}")
    thoughts = {" ".join(clean[name].split()): name for name in THOUGHT_FIELDS if clean.get(name, "").strip()}
    if len(thoughts) > 1:
        raise DataError(f"{where} has other thoughts in `{'` than in `'.join(thoughts.values())}`; keep one of them")
    if not clean["content"].strip() and "tool_calls" not in clean:
        other = [name for name, field in clean.items() if name not in _BLANK_FIELDS and field not in ("", [], {})]
        if other and role == "assistant":
            raise DataError(f"{where} has `{other[0]}` but no text; write what it says into `content`")
    if role == "user" and not blank_allowed and not clean["content"].strip():
        raise DataError(f"{where} is a user turn without text; give the question")
    return clean


def _text(content: Any, where: str) -> str:
    content = lists_by_key(content, where)
    if isinstance(content, (list, tuple)):
        for part in content:
            kind = part.get("type", "text") if isinstance(part, Mapping) else None
            if kind == "text":  # beside which other kinds may stand, whatever the part says it is
                kind = next((name for name, value in part.items() if value and name.startswith(_MEDIA)), kind)
            if kind != "text" or not isinstance(part.get("text"), str):
                raise DataError(
                    f"{where} has a part that is not text ({reprlib.repr(kind or part)}); only text is supported"
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where} is {kind_of(content)}; only text is supported, give a string")
    check_unicode(content, where)
    return content


def _parse_tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as a dict: data sets often hold them as JSON text, templates expect a dict."""
    calls = lists_by_key(_from_json(calls, where), where)
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{where} is {kind_of(calls)}; give a list of dicts")
    parsed = []
    for i, call in enumerate(_json_like(calls, where)):
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}[{i}] has no name; give {{'function': {{'name': ..., 'arguments': ...}}}}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            name = f"{where}[{i}] arguments"
            arguments = _json_like(_from_json(arguments, name), name, written=True)
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            raise DataError(f"{where}[{i}] has arguments {kind_of(arguments)}; give an object, name by name")
        unread = {name for name, value in function.items() if value and name not in _CALL_FIELDS}
        if function is not call:
            known = {"function", *_CALL_FIELDS} - {"arguments"}
            unread |= {name for name, value in call.items() if value and name not in known}
        if unread:
            raise DataError(
                f"{where}[{i}] has `{min(unread)}`, which is not read; a call has `name` and `arguments`, alone or "
                "both in `function`"
            )
        function = {**function, "arguments": arguments}
        parsed.append({**call, "function": function} if "function" in call else function)
    return parsed


def _check_weight(answer: Mapping[str, Any], where: str) -> None:
    """Refuse an answer that its row says not to train on, or to train on with a weight of its own."""
    for name in _WEIGHT_FIELDS:
        value = answer.get(name)
        if value is not None and str(value).strip().lower() not in ("1", "1.0", "true"):
            raise DataError(
                f"{where} has `{name}` {value!r}, but every answer counts the same: take the answer out (a prompt-only "
                f"row), or take `{name}` out"
            )


def listed(value: Any, field: str) -> Any:
    """A list or dict that a CSV cell holds as JSON text; any other value as it is."""
    return _from_json(value, field) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value


def listed_messages(value: Any) -> Any:
    """PI, or a prompt, as messages where its text is the JSON of messages; any other text stays text."""
    if not isinstance(value, str) or value.lstrip()[:1] != "[":
        return value
    try:
        items = load_json(value)
    except (ValueError, RecursionError):
        return value
    return items if all(isinstance(item, dict) and "role" in item for item in items) else value


def lists_by_key(value: Any, field: str) -> Any:
    """A list of dicts that is written as a dict of lists, as `datasets` writes its old `Sequence` of dicts.

    Raises:
        DataError: the lists have different lengths.
    """
    if not isinstance(value, Mapping):
        return value
    lists = {key: items for key, items in value.items() if items is not None}
    if not lists or not all(isinstance(items, (list, tuple)) for items in lists.values()):
        return value
    lengths = {key: len(items) for key, items in lists.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"`{field}` is lists by key of different lengths ({lengths}); give a list of dicts")
    return [dict(zip(lists, items)) for items in zip(*lists.values())]


def load_json(text: str | bytes) -> Any:
    """JSON as it is written.

    Raises:
        ValueError: it is none, or one object has a key twice.
    """
    return json.loads(text, object_pairs_hook=_distinct)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; keep one")
    return found


def _from_json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return load_json(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"`{where}` is a string but not JSON: {error}") from error


def _json_like(value: Any, where: str, written: bool = False) -> Any:
    """`value`, refused unless it could be written as JSON (the chat template prints it); without None, unless its own
    text was JSON: then nobody but its author wrote them."""
    value = value if written else _strip_none(value, where)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} cannot be written as JSON: {error}") from error
    return value


def _strip_none(value: Any, where: str) -> Any:
    """Drop None values from dicts at every depth: Arrow fills the keys that other rows have."""
    try:
        return _without_none(value)
    except RecursionError:
        raise DataError(f"{where} is nested too deeply") from None


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value


def check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad = text[error.start]
        raise DataError(
            f"{where} has a lone surrogate (U+{ord(bad):04X}); no tokenizer takes it, repair the text"
        ) from None


def kind_of(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"
