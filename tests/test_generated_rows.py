"""400 generated rows through several templates: encoded as written, or refused by number with a reason.

The oracle writes the conversation itself, with plain string work, and knows which rows must be refused and why. Every
piece of text has a mark of its own, so that what is lost is found whatever the template does.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from tiny import CHATML, STRICT, byte_tokenizer

from pgkd_peft.data.check import validate_rows
from pgkd_peft.data.collator import DataCollatorForPrivilegedGKD
from pgkd_peft.data.files import to_dataset
from pgkd_peft.data.load import load_rows
from pgkd_peft.errors import DataError

COUNT = 400
KEY = "privileged_messages"

FULL = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}{% set f = c.function or c %}"
    "{{ '<call>' + f.name + ' ' + f.arguments | tojson + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FIRST_CALL = FULL.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
TEXT_OR_CALL = FULL.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}")
TEMPLATES = {"full": FULL, "plain": CHATML, "strict": STRICT, "first call": FIRST_CALL, "text or call": TEXT_OR_CALL}


class Generator:
    """Rows by a seed. `refused` is a pattern of the reason for which a row must be refused, or None."""

    def __init__(self, seed: int):
        self.random, self.marks = random.Random(seed), 0

    def row(self) -> tuple[dict[str, Any], str | None]:
        kinds = [self.talk] * 5 + [self.calls] * 4 + [self.thoughts] * 2 + [self.broken] * 3
        row, refused = self.random.choice(kinds)()
        row = {**row, **({} if KEY in row else self.privileged())}
        return dict(self.random.sample(list(row.items()), len(row))), refused

    def words(self) -> str:
        """A text with a mark of its own, in one of many shapes."""
        self.marks += 1
        mark = f"M{self.marks}x"
        shapes = (
            "{}", "{} and so on.", "Ärger {} 漢字 🙂 العربية é", "long " * 200 + "{}", "two\nlines {}\n\n  indented",
            '{{"json": "{}"}}', "{{{{ {} }}}} {{% if x %}}", '"{}" \\n \\ back', "\ttab {}\u00a0", "<b>{}</b> [INST]",
            "{} ", " {}", "a\u0301 {} \u200b", "{}\u2028line", "\\u00e9 {}", "%s %d {} %",
        )  # fmt: skip
        return self.random.choice(shapes).format(mark)

    def value(self, depth: int = 0) -> Any:
        leaves = (self.words, lambda: self.random.randint(-9, 10**25), lambda: True, lambda: 0.25, lambda: "")
        if depth > 2 or self.random.random() < 0.5:
            return self.random.choice(leaves)()
        if self.random.random() < 0.5:
            return [self.value(depth + 1) for _ in range(self.random.randint(0, 3))]
        return {f"k{i}": self.value(depth + 1) for i in range(self.random.randint(0, 3))}

    def nulls(self, turn: dict[str, Any]) -> dict[str, Any]:
        """The turn, perhaps with the keys that Arrow fills with nulls for other rows."""
        if self.random.random() < 0.3:
            turn = {**turn, **{name: None for name in ("name", "tool_calls", "reasoning_content") if name not in turn}}
        return turn

    def user(self) -> dict[str, Any]:
        text = self.words()
        parts = [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]
        return self.nulls({"role": "user", "content": parts if self.random.random() < 0.1 else text})

    def assistant(self) -> dict[str, Any]:
        extra = {"weight": 1} if self.random.random() < 0.1 else {}
        return self.nulls({"role": "assistant", "content": self.words(), **extra})

    def begin(self) -> list[dict[str, Any]]:
        turns = [{"role": "system", "content": self.words()}] if self.random.random() < 0.3 else []
        for _ in range(self.random.choice((0, 0, 1, 2))):
            turns += [self.user(), self.assistant()]
        return [*turns, self.user()]

    def talk(self) -> tuple[dict[str, Any], str | None]:
        """Plain turns; with an answer, or (empty, null, missing) without."""
        empty = {"role": "assistant", "content": self.random.choice(("", None, "  "))}
        end = self.random.choice(([self.assistant()], [self.assistant()], [], [empty]))
        return {"messages": [*self.begin(), *end]}, None

    def call(self) -> dict[str, Any]:
        arguments: Any = {f"a{i}": self.value() for i in range(self.random.randint(0, 3))}
        if self.random.random() < 0.3:
            arguments = json.dumps(arguments, ensure_ascii=self.random.random() < 0.5)
        self.marks += 1
        function = {"name": f"tool_M{self.marks}x", "arguments": arguments}
        flat = self.random.random() < 0.2
        return function if flat else {"id": f"c{self.marks}", "type": "function", "function": function}

    def calls(self) -> tuple[dict[str, Any], str | None]:
        """Calls, one or several, with and without text, as the answer or before it, with results."""
        count = self.random.randint(1, 3)
        text = self.random.choice(("", None, self.words()))
        made = {"role": "assistant", "content": text, "tool_calls": [self.call() for _ in range(count)]}
        turns = [*self.begin(), self.nulls(made)]
        if self.random.random() < 0.5:
            turns += [{"role": "tool", "content": self.words(), "name": "t"} for _ in range(count)]
            turns += [self.assistant()] if self.random.random() < 0.8 else []
        tools: Any = [{"type": "function", "function": {"name": f"tool{i}", "parameters": {}}} for i in range(2)]
        tools = self.random.choice((None, tools, json.dumps(tools), []))
        return {"messages": turns, "tools": tools}, None

    def thoughts(self) -> tuple[dict[str, Any], str | None]:
        answer = self.assistant()
        field = self.random.choice(("reasoning_content", "reasoning", "thinking", "inline"))
        if field == "inline":
            answer["content"] = f"<think>\n{self.words().strip()}\n</think>\n\n{answer['content'].strip()}"
        else:
            answer[field] = self.words()
        return {"messages": [*self.begin(), answer]}, None

    def broken(self) -> tuple[dict[str, Any], str | None]:
        turns, answer = self.begin(), self.assistant()
        image = {"type": "image_url", "image_url": {"url": "x.png"}}
        legacy = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
        call = {"role": "assistant", "content": ""}
        harm: list[tuple[Any, dict[str, Any], str]] = [
            ([{"role": "user", "content": [image]}], {}, "only text is supported"),
            ([*turns, {**answer, "weight": 0}], {}, "`weight` 0"),
            ([*turns, {**answer, "train": False}], {}, "`train` False"),
            ([*turns, legacy], {}, "`function_call`, which is not read"),
            ([*turns, {**answer, "role": "bot"}], {}, "has role 'bot'"),
            ([*turns, {**answer, "content": 7}], {}, "is int 7"),
            ([*turns, {**call, "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}], {}, "give an object"),
            ([*turns, {**call, "tool_calls": [{"function": {"arguments": {}}}]}], {}, "has no name"),
            ([*turns, {"role": "user", "content": " "}], {}, "a user turn without text"),
            ([*turns, [answer]], {}, "a list inside the list"),
            ([answer], {}, "no user turn before the answer"),
            ([], {}, "is empty"),
            (None, {}, "no `messages`"),
            ("Hello", {}, "give a list of messages"),
            ([*turns, answer], {"functions": [{"name": "f", "parameters": {}}]}, "`functions` .* is not read"),
            ([*turns, answer], {"tools": "[{]"}, "`tools` is a string but not JSON"),
            ([*turns, answer], {"tools": [{"name": 3}]}, r"tools\[0\] is dict"),
            ([*turns, answer], {"chat_template_kwargs": [1]}, "`chat_template_kwargs` is list"),
            ([*turns, answer], {"chat_template_kwargs": {"tokenize": True}}, "not the row's to set"),
            ([*turns, answer], {KEY: 5}, "is int 5"),
            ([*turns, answer], {KEY: [{"role": "user", "content": [image]}]}, "only text is supported"),
        ]
        messages, more, refused = self.random.choice(harm)
        return {"messages": messages, **more}, refused

    def privileged(self) -> dict[str, Any]:
        text = self.words()
        choices = (text, text, [{"role": "user", "content": text}], [{"role": "user", "content": text}, self.user()])
        return {KEY: self.random.choice((*choices, None, "", [], [{"role": "user", "content": ""}]))}


@pytest.fixture(scope="module")
def rows() -> list[tuple[dict[str, Any], str | None]]:
    generator = Generator(20260118)
    return [generator.row() for _ in range(COUNT)]


def said(content: Any) -> str:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def written(turn: dict[str, Any]) -> str:
    """A turn as FULL writes it, by hand."""
    text = f"<|im_start|>{turn['role']}\n"
    thoughts = next((turn[name] for name in ("reasoning_content", "reasoning", "thinking") if turn.get(name)), None)
    if turn["role"] == "assistant" and thoughts:
        text += f"<think>\n{thoughts}\n</think>\n\n"
    text += said(turn.get("content"))
    for call in turn.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        text += f"<call>{function['name']} {json.dumps(without_nulls(arguments), ensure_ascii=False)}</call>"
    return text + "<|im_end|>\n"


def oracle(row: dict[str, Any]) -> tuple[str, str, str]:
    """Student's prompt, teacher's prompt (the PI as turns after the last question) and answer, as FULL writes them."""
    turns = list(row["messages"])
    answer = turns.pop() if turns[-1]["role"] == "assistant" else None
    if answer and not said(answer.get("content")).strip() and not answer.get("tool_calls"):
        answer = None
    tools = row.get("tools") or []
    tools = json.loads(tools) if isinstance(tools, str) else tools
    head = f"<|im_start|>tools\n{json.dumps(tools, ensure_ascii=False)}<|im_end|>\n" if tools else ""
    hint = row[KEY] or []
    hint = [{"role": "user", "content": hint}] if isinstance(hint, str) else hint
    hint = [turn for turn in hint if said(turn["content"]).strip()]
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "user") + 1
    end = "<|im_start|>assistant\n"
    student = head + "".join(map(written, turns)) + end
    teacher = head + "".join(map(written, [*turns[:last], *hint, *turns[last:]])) + end
    return student, teacher, written(answer).removeprefix(end).removesuffix("\n") if answer else ""


def test_the_generator_makes_all_kinds(rows):
    refused = {reason for _, reason in rows if reason}
    text = json.dumps([row for row, _ in rows])
    assert len(refused) > 15
    assert 50 < sum(reason is not None for _, reason in rows) < 150
    for word in ('"tool_calls": [{"id"', '"reasoning_content": "', "\\ud83d", "null", '"weight": 1', "<think>"):
        assert text.count(word) > 5, word


def test_a_template_that_shows_everything_encodes_every_row_as_written(rows, tmp_path):
    """From the file to the token ids; what must be refused is, for its reason, all in one report."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in rows), "utf-8")
    dataset = load_rows(path)
    made = DataCollatorForPrivilegedGKD(byte_tokenizer(FULL), max_length=None, max_privileged_length=10**6)
    for i, (row, refused) in enumerate(rows):
        if refused:
            with pytest.raises(DataError, match=refused):
                made.encode(dataset[i])
            continue
        student, teacher, answer = oracle(row)
        encoded = made.encode(dataset[i])
        assert encoded["student_text"] == student, i
        assert encoded["teacher_text"] == teacher, i
        for name, text in (("student_ids", student), ("teacher_ids", teacher), ("completion_ids", answer)):
            assert made.tokenizer.decode(encoded[name]) == text, (i, name)
    with pytest.raises(DataError) as error:
        validate_rows(dataset, made)
    assert error.value.rows == tuple(i for i, (_, refused) in enumerate(rows) if refused)
    good = [row for row, refused in rows if not refused]
    report = validate_rows(to_dataset(good), made)
    assert report.rows == len(good)
    assert report.rows_with_privileged == sum(oracle(row)[0] != oracle(row)[1] for row in good)
    assert report.prompt_only == sum(oracle(row)[2] == "" for row in good)


def marks(value: Any) -> list[str]:
    return re.findall(r"M\d+x", json.dumps(value))


@pytest.mark.parametrize("placement", ["messages", "user", "system"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_is_lost_in_silence_whatever_the_template(rows, name, placement):
    made = DataCollatorForPrivilegedGKD(
        byte_tokenizer(TEMPLATES[name]), max_length=None, max_privileged_length=10**6, privileged_placement=placement
    )
    done, reasons = 0, set()
    for i, (row, refused) in enumerate(rows):
        try:
            encoded = made.encode(row)
        except DataError as error:
            reasons.add(str(error))
            continue
        assert refused is None, (i, refused)
        done += 1
        student, completion = encoded["student_text"], made.tokenizer.decode(encoded["completion_ids"])
        contexts = encoded["contexts"]
        for at, turn in enumerate(row["messages"]):
            place = student if at < len(contexts.student) else completion
            thoughts = marks([turn.get(key) for key in ("reasoning_content", "reasoning", "thinking")])
            if "<think>" in str(turn["content"]):
                thoughts += marks(turn["content"].partition("</think>")[0])
            for mark in marks(turn):
                shown = mark in place
                assert shown or (mark in thoughts and at in encoded["lost_thoughts"]), (i, at, mark)
        for mark in marks(row[KEY]):
            assert mark in encoded["teacher_text"], i
            assert mark not in student + completion, i
        if encoded["completion_ids"]:
            assert completion.endswith("<|im_end|>"), i
            assert completion.count("<|im_end|>") == 1, i
    assert done > {"full": 250, "plain": 100, "strict": 30, "first call": 200, "text or call": 200}[name], done
    assert min(map(len, reasons)) > 20
