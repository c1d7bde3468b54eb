"""One data row → the student's conversation and the teacher's conversation (text only; no torch here).

The two differ by the privileged information (PI) and by nothing else. PI always stands before the generation prompt,
so that the same completion ids can follow both.

    row ── parse ──> conversation, PI ── cut PI to its budget ── place PI ──> Contexts ── chat template ──> two prompts
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import ConfigError, DataError, ModelError
from .row import check_unicode, parse_row
from .shown import check_shown, common_length, squeeze
from .template import date_note, day_of, near_variable, source_of, unread_variable, variables, with_date

PLACEMENTS = ("messages", "user", "system")

DEFAULT_PRIVILEGED_TEMPLATE = "{question}\n\n{privileged}"
"""How the `user` and `system` placements write PI into a turn: ``{privileged}`` is the PI, ``{question}`` the text that
the turn already has (the question, or the system text). Neutral on purpose: PI may be a fact, a critique or a solution,
in any language. Both placeholders are replaced literally; other braces stay as they are."""


@dataclass(frozen=True)
class Contexts:
    """What student and teacher are shown for one row, and the reference answer.

    Attributes:
        student: the conversation up to the answer.
        teacher: the same conversation with the PI placed in it; equal to `student` when there is none. (The prompts may
            still differ then, if the row gives the teacher template variables of its own.)
        answer: the final assistant message, None for a prompt-only row.
        privileged: the PI messages after cutting.
        privileged_tokens: tokens of the PI text after cutting.
        privileged_tokens_cut: tokens of PI text that the budget took away.
        tools: tool schemas for the chat template.
        chat_template_kwargs: further template variables, for the student.
        teacher_chat_template_kwargs: those of the teacher: the student's, overridden by the row's own.
        moved: the PI stands in the last user turn, because where it was to stand the prompts would differ by more.
    """

    student: list[dict[str, Any]]
    teacher: list[dict[str, Any]]
    answer: dict[str, Any] | None
    privileged: list[dict[str, Any]]
    privileged_tokens: int
    privileged_tokens_cut: int
    tools: list[Any] | None
    chat_template_kwargs: dict[str, Any]
    teacher_chat_template_kwargs: dict[str, Any]
    moved: bool = False

    @property
    def has_privileged(self) -> bool:
        return bool(self.privileged)

    @property
    def privileged_text(self) -> str:
        """What the teacher sees in addition to the student, as readable text."""
        return privileged_as_text(self.privileged)


class ContextBuilder:
    """Builds and renders the two contexts of a row, with PI placed where the chat template can carry it.

    Args:
        tokenizer: a Transformers tokenizer with a chat template.
        privileged_key: the column that holds the PI: a message list, or a string (one user message).
        max_privileged_length: budget for the PI text of a row, in tokens; 0 leaves all PI out.
        privileged_placement: `messages` inserts the PI messages as they are after the last user turn; `user` folds
            their text into the last user turn; `system` folds it into the system turn.
        privileged_template: text template of `user` and `system`; default :data:`DEFAULT_PRIVILEGED_TEMPLATE`.
        template_date: the day (YYYY-MM-DD) that templates write as today's; None for the day of today.

    Attributes:
        placement: the placement in force. A template that refuses or drops turns is found by a probe, here and once,
            and then it is `user`.
        placement_note: one line that says why it is not the one that was asked for, or None.
        date_note: one line on the date of today that the template writes into prompts, or None.

    Raises:
        ConfigError: a setting has a value that cannot work.
        ModelError: the tokenizer has no chat template, or one that cannot render a single user turn.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        privileged_key: str = "privileged_messages",
        max_privileged_length: int = 512,
        privileged_placement: str = "messages",
        privileged_template: str | None = None,
        template_date: str | None = None,
    ):
        if privileged_placement not in PLACEMENTS:
            raise ConfigError(f"privileged_placement is {privileged_placement!r}; accepted are {', '.join(PLACEMENTS)}")
        if isinstance(max_privileged_length, bool) or not isinstance(max_privileged_length, int):
            raise ConfigError(f"max_privileged_length is {max_privileged_length!r}; give a number of tokens, e.g. 512")
        if max_privileged_length < 0:
            raise ConfigError(f"max_privileged_length is {max_privileged_length}; give 0 (no PI) or more")
        if privileged_template is not None and "{privileged}" not in privileged_template:
            raise ConfigError(
                f"privileged_template is {privileged_template!r} and has no {{privileged}}, so the teacher would not "
                f"see the PI. Put {{privileged}} (and {{question}}) into it, as in {DEFAULT_PRIVILEGED_TEMPLATE!r}"
            )
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template; "
                "use an instruct model or set tokenizer.chat_template"
            )
        if "\x00" in source_of(tokenizer):
            raise ModelError("the chat template holds characters 0, as UTF-16 text does; save it as UTF-8")
        self.tokenizer = tokenizer
        self.privileged_key = privileged_key
        self.max_privileged_length = max_privileged_length
        self.privileged_template = privileged_template or DEFAULT_PRIVILEGED_TEMPLATE
        self._source = source_of(tokenizer)
        self._read = variables(self._source)
        self._default_systems: dict[str, str] = {}
        self._rendered: dict[str, str] = {}
        self.today = day_of(template_date)
        self.date_note = date_note(self._source, self._read, self.today, pinned=bool(template_date))
        self.placement, self.placement_note = self._probe_placement(privileged_placement)

    @property
    def notes(self) -> list[str]:
        """What a user should know of the template, a line each."""
        return [note for note in (self.placement_note, self.date_note) if note]

    def build(self, row: Any) -> Contexts:
        """Parse a row, cut its PI to the budget and place it.

        Raises:
            DataError: the row cannot be used; the message names the field and the fix, not the row's number.
        """
        parsed = parse_row(row, self.privileged_key)
        student = [self._with_arguments(message) for message in parsed.messages]
        privileged, kept, cut = self._cut_to_budget(parsed.privileged)
        teacher_kwargs = parsed.teacher_chat_template_kwargs
        teacher = self._place(student, privileged, teacher_kwargs, self.placement) if privileged else student
        moved = self.placement != "user" and not self._only_inserts(student, teacher, parsed.tools, teacher_kwargs)
        if moved:
            teacher = self._place(student, privileged, teacher_kwargs, "user")
        return Contexts(
            student=student,
            teacher=teacher,
            moved=moved,
            answer=None if parsed.answer is None else self._with_arguments(parsed.answer),
            privileged=privileged,
            privileged_tokens=kept,
            privileged_tokens_cut=cut,
            tools=parsed.tools,
            chat_template_kwargs=parsed.chat_template_kwargs,
            teacher_chat_template_kwargs=teacher_kwargs,
        )

    def render_student(self, contexts: Contexts) -> str:
        """The student's prompt as text, generation prompt included.

        Raises:
            DataError: the template refuses the conversation, or leaves out tools, turns or tool calls, as templates
                without support for them do in silence; or a variable is named almost as one that the template reads.
        """
        for name in self.unread_variables(contexts):
            if near_variable(name, self.read_variables):
                raise DataError(unread_variable(name, self.read_variables))
        text = self.render(contexts.student, contexts.tools, contexts.chat_template_kwargs)
        check_shown(contexts.student, text)
        for tool in contexts.tools or []:
            name = tool.get("function", tool)["name"]
            if name not in text:
                raise DataError(
                    f"the chat template leaves out the tool {name!r}; drop `tools` (and describe them in a system "
                    "turn), or use a model that calls tools"
                )
        return text

    def render_teacher(self, contexts: Contexts) -> str:
        """The teacher's prompt as text, generation prompt included.

        Raises:
            DataError: the template refuses the PI's turns, or loses some of their text.
        """
        try:
            text = self.render(contexts.teacher, contexts.tools, contexts.teacher_chat_template_kwargs)
        except DataError as error:
            if contexts.has_privileged and self.placement == "messages":
                raise DataError(f"`{self.privileged_key}` after the last user turn: {error}; {self._hint}") from error
            raise
        squeezed = squeeze(text)
        for i, message in enumerate(contexts.privileged):
            if squeeze(message["content"]) not in squeezed:
                raise DataError(
                    f"the chat template loses text of {self.privileged_key}[{i}] (role {message['role']}); {self._hint}"
                )
        if contexts.has_privileged and not self._only_inserts(
            contexts.student, contexts.teacher, contexts.tools, contexts.teacher_chat_template_kwargs
        ):
            raise DataError(
                "the chat template shows the teacher more than the student's prompt and the PI (or less), so that the "
                f"difference would not be the PI alone; {self._hint}"
            )
        return text

    @property
    def read_variables(self) -> set[str]:
        """The variables that the template reads; empty where that cannot be told."""
        return self._read or set()

    def unread_variables(self, contexts: Contexts) -> list[str]:
        """The row's template variables that the template never reads."""
        if self._read is None:
            return []
        return sorted({*contexts.chat_template_kwargs, *contexts.teacher_chat_template_kwargs} - self._read)

    def _only_inserts(
        self,
        student: list[dict[str, Any]],
        teacher: list[dict[str, Any]],
        tools: list[Any] | None,
        template_kwargs: dict[str, Any],
    ) -> bool:
        """Whether the teacher's prompt is the student's (under the teacher's template variables) with one insertion;
        around the question there may be two, where the text template has it in its middle.

        True as well where the template refuses one of them: the refusal is told when they are rendered.
        """
        if teacher == student:
            return True
        try:
            without = self.render(student, tools, template_kwargs)
            with_pi = self.render(teacher, tools, template_kwargs)
        except DataError:
            return True
        start = common_length(without, with_pi)
        end = common_length(without[::-1], with_pi[::-1])
        if start + end >= len(without):
            lost = len(with_pi) == len(without) and self.placement == "system"  # a system turn is not always shown
            return len(with_pi) >= len(without) and not lost
        changed = [a for a, b in zip(student, teacher) if a != b] if len(student) == len(teacher) else []
        template = self.privileged_template.strip()
        if not changed or "{question}" not in template or template.startswith("{question}"):
            return False
        middle = without[start : len(without) - end].strip()
        return not template.endswith("{question}") and squeeze(middle) in squeeze(changed[0]["content"])

    _hint = "write the PI as one string, or set privileged_placement to `user`"

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The chat template's text. Whatever the template raises becomes a :class:`DataError`."""
        try:
            key = json.dumps([messages, tools, template_kwargs, add_generation_prompt])
        except (TypeError, ValueError):  # holds what only a template could use
            return self._render(messages, tools, template_kwargs, add_generation_prompt)
        if key not in self._rendered:
            if len(self._rendered) >= 8:
                self._rendered.clear()
            self._rendered[key] = self._render(messages, tools, template_kwargs, add_generation_prompt)
        return self._rendered[key]

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        template_kwargs: Mapping[str, Any] | None,
        add_generation_prompt: bool,
    ) -> str:
        pinned = {}
        if self.date_note:
            template = str(self.tokenizer.get_chat_template(None, tools))  # that of several which is used with tools
            pinned = {"chat_template": with_date(template, self.today)}
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **{**(template_kwargs or {}), **pinned},
            )
        except Exception as error:  # the template is a program of the model's author: it may raise anything
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(f"the chat template refuses the conversation: {lines[0]}") from error
        check_unicode(text, "the rendered conversation")
        return text

    @cached_property
    def _arguments_type(self) -> type | None:
        """What the template wants a tool call's arguments to be: a dict, or JSON text (DeepSeek's); None when it
        leaves out tool calls."""
        tool = {"type": "function", "function": {"name": "probename", "description": "probe", "parameters": {}}}
        for arguments in ({"probekey": "probevalue"}, '{"probekey": "probevalue"}'):
            call = {"type": "function", "id": "probecall", "function": {"name": "probename", "arguments": arguments}}
            turns: list[dict[str, Any]] = [
                {"role": "user", "content": "Probeuser"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "Probetool", "name": "probename", "tool_call_id": "probecall"},
            ]
            try:
                text = self.render(turns, [tool])
            except DataError:
                continue
            if "probekey" in text and "probevalue" in text:
                return type(arguments)
        return None

    def _with_arguments(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its tool calls' arguments as the template wants them."""
        if "tool_calls" not in message or self._arguments_type is dict:
            return message
        if self._arguments_type is None:
            raise DataError("the chat template leaves out tool calls; use a model that calls tools")
        calls = []
        for call in message["tool_calls"]:
            function = call.get("function", call)
            function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
            calls.append({**call, "function": function} if "function" in call else function)
        return {**message, "tool_calls": calls}

    def _refusal(self, *roles: str) -> str | None:
        """Why the template cannot carry turns of these roles in this order; None when it can."""
        turns = [{"role": role, "content": f"Probe{chr(ord('a') + i) * 4}"} for i, role in enumerate(roles)]
        try:
            text = self.render(turns)
        except DataError as error:
            return str(error)
        position = 0
        for turn in turns:
            position = text.find(turn["content"], position)
            if position < 0:
                return f"the chat template drops turns of a conversation {', '.join(roles)}"
        return None

    def _probe_placement(self, asked: str) -> tuple[str, str | None]:
        refusal = self._refusal("user")
        if refusal is not None:
            raise ModelError(
                f"the chat template cannot render a single user turn of text: {refusal}. Use a text model's template; "
                "templates of vision models want lists of parts"
            )
        if asked == "messages":
            refusal = self._refusal("user", "user") or self._refusal("user", "user", "assistant")
        elif asked == "system":
            refusal = self._refusal("system", "user")
        if refusal is None and asked == "system" and not self._keeps_default_system():
            return asked, (
                "rows without a system turn have the PI in the last user turn: a system turn of their own would change "
                "the text that the chat template writes by itself"
            )
        if refusal is None:
            return asked, None
        return "user", f"privileged_placement={asked!r} falls back to 'user' (PI in the last user turn): {refusal}"

    def _place(
        self,
        messages: list[dict[str, Any]],
        privileged: list[dict[str, Any]],
        template_kwargs: dict[str, Any],
        placement: str,
    ) -> list[dict[str, Any]]:
        last_user = max(i for i, message in enumerate(messages) if message["role"] == "user")
        if placement == "messages":
            # Tool calls and results that follow the last user turn stay next to the generation prompt, as the student
            # sees them; a user turn after them would open a new question (and strip thoughts in thinking templates).
            return messages[: last_user + 1] + privileged + messages[last_user + 1 :]
        text = privileged_as_text(privileged)
        if placement == "user":
            return _fold(messages, last_user, self.privileged_template, text)
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._default_system(template_kwargs)}, *messages]
        return _fold(messages, 0, self.privileged_template, text)

    def _keeps_default_system(self) -> bool:
        user = [{"role": "user", "content": "Probeuser"}]
        teacher = self._place(user, [{"role": "user", "content": "Probeprivileged"}], {}, "system")
        return self._only_inserts(user, teacher, None, {})

    def _default_system(self, template_kwargs: dict[str, Any]) -> str:
        """The system text that the template writes by itself when a conversation has no system turn ("" if none).

        The teacher's system turn with PI would replace it, and the contexts would then differ by more than PI.
        """
        key = json.dumps(template_kwargs, sort_keys=True)
        if key not in self._default_systems:
            user = {"role": "user", "content": "Probeuser"}
            bare = self.render([user], None, template_kwargs)
            given = self.render([{"role": "system", "content": "Probesystem"}, user], None, template_kwargs)
            before, _, after = given.partition("Probesystem")
            fits = bare.startswith(before) and bare.endswith(after) and len(bare) >= len(before) + len(after)
            self._default_systems[key] = bare[len(before) : len(bare) - len(after)] if fits else ""
        return self._default_systems[key]

    def _cut_to_budget(self, privileged: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int, int]:
        """Cut the PI's text from its end, message by message; returns the messages, tokens kept, tokens cut."""
        kept: list[dict[str, Any]] = []
        total = used = 0
        full = False
        for message in privileged:
            text = message["content"]
            length = self._count(text)
            total += length
            if full:
                continue
            if length > self.max_privileged_length - used:
                full = True
                text = self._cut_text(text, self.max_privileged_length - used)
                length = self._count(text)
            if text.strip():
                kept.append({**message, "content": text})
                used += length
        return kept, used, total - used

    def _cut_text(self, text: str, budget: int) -> str:
        """The longest beginning of `text` that a fast tokenizer's token ends offer (a slow one: any beginning) and
        that is at most `budget` tokens when it is tokenized again: at a cut, tokens may split anew."""
        if not getattr(self.tokenizer, "is_fast", False):
            length = bisect.bisect_right(range(len(text) + 1), budget, key=lambda n: self._count(text[:n])) - 1
            return text[: max(length, 0)]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for _, end in reversed(encoded["offset_mapping"][:budget]):
            if self._count(text[:end]) <= budget:
                return text[:end]
        return ""

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _fold(messages: list[dict[str, Any]], index: int, template: str, privileged: str) -> list[dict[str, Any]]:
    """A copy of `messages` in which the turn at `index` carries the PI as well."""
    parts = {"{question}": messages[index]["content"], "{privileged}": privileged}
    if "{question}" not in template:
        template = "{question}\n\n" + template
    text = re.sub(r"\{question\}|\{privileged\}", lambda match: parts[match.group()], template)
    if not parts["{question}"].strip():
        text = text.strip("\n")
    return [*messages[:index], {**messages[index], "content": text}, *messages[index + 1 :]]


def privileged_as_text(privileged: list[dict[str, Any]]) -> str:
    """PI messages as one text; turns are named when more than one role speaks."""
    if len({message["role"] for message in privileged}) <= 1:
        return "\n\n".join(message["content"] for message in privileged)
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in privileged)
