"""Whether what a row holds stands in what the chat template made of it: nothing is lost in silence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import DataError
from .row import LABELS, THOUGHT_FIELDS

THINKING = (
    *("<think>", "<thinking>", "<thought>", "<thoughts>", "<reasoning>", "<reason>", "<seed:think>", "[THINK]"),
    *("<|START_THINKING|>", "<|think|>", "<|thinking|>", "<|begin_of_thought|>", "<|thought|>"),
    *("<|inner_prefix|>", "<|channel>thought"),
)
_SWITCHES = re.compile(r"/(no_)?think\b")  # templates take these commands out of the text


def squeeze(text: str) -> str:
    """The text without white space: templates trim and pad what they render."""
    return "".join(text.split())


def common_length(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def holds(text: str, part: str) -> bool:
    """Whether `part` stands in `text`, but for white space and the escapes of JSON."""
    text, plain = squeeze(text), squeeze(part)
    return plain in text or any(
        squeeze(json.dumps(part.strip(), ensure_ascii=ascii_only)[1:-1]) in text for ascii_only in (False, True)
    )


def closer(tag: str) -> str:
    """The tag that closes `tag`."""
    if named := re.fullmatch(r"<\|(\w+)>\w*", tag):
        return f"<{named[1]}|>"
    if tag.endswith("_prefix|>"):
        return tag.replace("_prefix|>", "_suffix|>")
    for opened, closed in (("<|START_", "<|END_"), ("<|begin_", "<|end_"), ("<|", "<|/"), ("<", "</"), ("[", "[/")):
        if tag.startswith(opened):
            return closed + tag[len(opened) :]
    return ""


def split_thoughts(answer: dict[str, Any]) -> tuple[str, str]:
    """The thoughts of an answer, in a field of their own, in tags before its text or in both, and its words."""
    words = answer["content"]
    thoughts = next((answer[key] for key in THOUGHT_FIELDS if answer.get(key)), "")
    for tag in THINKING:
        before, found, after = words.partition(closer(tag))
        if found and (before.lstrip().startswith(tag) or tag not in before):
            inner = before.lstrip().removeprefix(tag).strip()
            apart = [] if squeeze(thoughts) in squeeze(inner) else [thoughts.strip()]
            return "\n\n".join(part for part in (*apart, inner) if part), after
    return thoughts, words


def check_shown(messages: Sequence[Mapping[str, Any]], text: str, first: int = 0) -> None:
    """Check that every turn's words and tool calls stand in `text`; `first` is the first message's number.

    A text that other turns hold as well must stand there as often as the turns have it.

    Raises:
        DataError: names the first one that is lost.
    """
    squeezed = squeeze(text)
    words = [_words(message) for message in messages]
    everywhere = squeeze("\x00".join(words)) if len(words) > 1 else ""
    for i, (message, own) in enumerate(zip(messages, words), first):
        plain = squeeze(own)
        shown = holds(text, own) if len(words) == 1 else _as_often(plain, own, everywhere, squeezed, text)
        if not (shown or (_SWITCHES.search(own) and holds(text, _SWITCHES.sub("", own)))):
            if message["role"] == "developer":
                raise DataError("the chat template drops the `developer` turn; give it the role `system`")
            beside = " beside its tool call" if message.get("tool_calls") else ""
            raise DataError(
                f"the chat template loses the text of messages[{i}] (role {message['role']}){beside}; take it out or "
                "put it where the template shows it, or use another template"
            )
        for call in message.get("tool_calls", ()):
            _check_call(call.get("function", call), text, squeezed, f"messages[{i}].tool_calls")


def _as_often(plain: str, own: str, everywhere: str, squeezed: str, text: str) -> bool:
    wanted = everywhere.count(plain)
    return squeezed.count(plain) >= wanted or (plain not in squeezed and holds(text, own))


def _words(message: Mapping[str, Any]) -> str:
    text = message["content"]
    if message["role"] == "assistant":
        text = split_thoughts(dict(message))[1]
    return str(text)


def _check_call(function: Mapping[str, Any], text: str, squeezed: str, where: str) -> None:
    if function["name"] not in text:
        raise DataError(f"the chat template leaves out the tool call {function['name']!r} of {where}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    for leaf in _leaves(arguments):
        written = leaf if isinstance(leaf, str) else json.dumps(leaf)
        if not holds(text, written) and squeeze(str(leaf)) not in squeezed:
            raise DataError(
                f"the chat template leaves out {written[:60]!r} of the arguments of {function['name']!r} in {where}; "
                "use a template that writes every tool call"
            )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value


def unshown_fields(messages: Sequence[Mapping[str, Any]], text: str) -> list[str]:
    """Fields of messages, of no format that is known here, whose values are nowhere in `text`."""
    return sorted(
        {
            name
            for message in messages
            for name, value in message.items()
            if name not in LABELS and not (name == "name" and message["role"] == "tool")
            for leaf in _leaves(value)
            if isinstance(leaf, (str, bool, int, float))
            if not holds(text, leaf if isinstance(leaf, str) else json.dumps(leaf))
        }
    )


def lost_thoughts(messages: Sequence[dict[str, Any]], text: str) -> list[int]:
    """Numbers of the messages whose thoughts are nowhere in `text`."""
    return [
        i
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and (thoughts := split_thoughts(message)[0]) and not holds(text, thoughts)
    ]
