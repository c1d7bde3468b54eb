"""One row → two conversations: placement of PI, its budget, what templates refuse or lose, malformed fields."""

from __future__ import annotations

import copy
import json

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, DROPPING, ROWS, STRICT, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pgkd_peft.data.contexts import ContextBuilder
from pgkd_peft.errors import ConfigError, DataError, ModelError

# A system turn of its own when the conversation has none (as SmolLM2's and Qwen2.5's templates).
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}" + CHATML
)

# Thinking models (as Qwen3's): thoughts of turns before the last question are dropped; `enable_thinking=false` writes
# an empty thinking block into the generation prompt; an answer after the last question always shows a block.
THINKING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m['content'] %}{% set thoughts = m.get('reasoning_content', '') %}"
    "{% if m['role'] == 'assistant' and '</think>' in text %}"
    "{% set thoughts = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}"
    "{{ text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)

# Tool calls: schemas in the system turn, calls and results as tagged JSON; arguments must be a dict.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools' }}{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + ('user' if m['role'] == 'tool' else m['role']) + '\n' }}"
    "{% if m['role'] == 'tool' %}{{ '<tool_response>' + m['content'] + '</tool_response>' }}"
    "{% else %}{{ m['content'] }}{% endif %}"
    "{% for c in m.tool_calls or [] %}"
    '{{ \'<tool_call>{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments | tojson + '
    "'}</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
TOOL_ROW = {
    "messages": [
        {"role": "user", "content": "Warm in Oslo?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
        },
        {"role": "tool", "content": "12 C"},
        {"role": "assistant", "content": "Not very."},
    ],
    "privileged_messages": "Call 20 C warm.",
    "tools": [WEATHER],
}


def swap(template: str, old: str, new: str) -> str:
    """A variant of a template; fails when there is nothing to replace."""
    assert old in template
    return template.replace(old, new)


def builder(template: str = CHATML, **kwargs) -> ContextBuilder:
    return ContextBuilder(byte_tokenizer(template), **kwargs)


def texts(b: ContextBuilder, row: dict) -> tuple[str, str]:
    contexts = b.build(row)
    return b.render_student(contexts), b.render_teacher(contexts)


def row(*turns: str, pi=None, **columns) -> dict:
    """`row("u:question", "a:answer", pi=...)`"""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool", "d": "developer"}
    messages = [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]
    return {"messages": messages, **({} if pi is None else {"privileged_messages": pi}), **columns}


# --- placement ---------------------------------------------------------------------------------------------------


def test_messages_placement_inserts_pi_before_the_generation_prompt():
    student, teacher = texts(builder(), ROWS[0])
    assert student == "<|im_start|>user\nWhat is quicksort?<|im_end|>\n<|im_start|>assistant\n"
    assert teacher == (
        "<|im_start|>user\nWhat is quicksort?<|im_end|>\n<|im_start|>user\nSay its complexity.<|im_end|>\n"
        "<|im_start|>assistant\nO(n log n) on average.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_string_pi_is_one_user_message():
    as_text = row("u:Q", "a:A", pi="Know this.")
    as_list = row("u:Q", "a:A", pi=[{"role": "user", "content": "Know this."}])
    assert builder().build(as_text) == builder().build(as_list)
    assert builder().build(as_text).privileged_text == "Know this."


@pytest.mark.parametrize("placement", ["messages", "user", "system"])
@pytest.mark.parametrize(
    "pi",
    [
        None,
        "",
        " \n\t",
        [],
        [{"role": "user", "content": "  "}],
        [{"role": "user", "content": None}, {"role": "assistant", "content": ""}],
    ],
)
def test_empty_pi_leaves_the_contexts_equal(pi, placement):
    b = builder(DEFAULT_SYSTEM, privileged_placement=placement)
    contexts = b.build({**row("u:Q", "a:A"), "privileged_messages": pi})
    assert contexts.teacher == contexts.student
    assert not contexts.has_privileged
    assert (contexts.privileged_tokens, contexts.privileged_tokens_cut) == (0, 0)
    assert b.render_student(contexts) == b.render_teacher(contexts)


def test_another_privileged_key():
    contexts = builder(privileged_key="hint").build({**row("u:Q"), "hint": "H", "privileged_messages": "not this"})
    assert contexts.privileged_text == "H"


@pytest.mark.parametrize(
    ("template", "reason"), [(STRICT, "Conversation roles must alternate"), (DROPPING, "drops turns")]
)
def test_messages_placement_falls_back_to_user(template, reason):
    b = builder(template)
    assert b.placement == "user"
    assert "'messages' falls back to 'user'" in b.placement_note
    assert reason in b.placement_note
    assert "\n" not in b.placement_note
    student, teacher = texts(b, row("u:Question?", "a:A", pi="The secret."))
    assert teacher == student.replace("Question?", "Question?\n\nThe secret.")


@pytest.mark.parametrize(
    ("template", "reason"), [(STRICT, "System role not supported"), (DROPPING, "drops turns of a conversation system")]
)
def test_system_placement_falls_back_to_user(template, reason):
    b = builder(template, privileged_placement="system")
    assert b.placement == "user"
    assert reason in b.placement_note
    student, teacher = texts(b, row("u:Question?", pi="The secret."))
    assert teacher == student.replace("Question?", "Question?\n\nThe secret.")


@pytest.mark.parametrize("placement", ["messages", "user", "system"])
def test_a_permissive_template_keeps_the_placement(placement):
    b = builder(privileged_placement=placement)
    assert (b.placement, b.placement_note) == (placement, None)


def test_the_probe_runs_once(monkeypatch):
    tokenizer = byte_tokenizer(STRICT)
    calls = []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: calls.append(a) or render(*a, **k))
    b = ContextBuilder(tokenizer)
    assert 0 < len(calls) <= 4
    calls.clear()
    for _ in range(5):
        texts(b, row("u:Q", "a:A", pi="P"))
    assert 0 < len(calls) <= 5 * 2


def test_user_placement_names_the_turns_of_pi_with_roles():
    student, teacher = texts(builder(privileged_placement="user"), ROWS[0])
    folded = "What is quicksort?\n\nUser: Say its complexity.\n\nAssistant: O(n log n) on average."
    assert teacher == student.replace("What is quicksort?", folded)


def test_user_placement_folds_into_the_last_user_turn():
    student, teacher = texts(builder(privileged_placement="user"), row("u:One?", "a:1.", "u:Two?", pi="P"))
    assert teacher == student.replace("Two?", "Two?\n\nP")


def test_system_placement_extends_or_adds_the_system_turn():
    b = builder(privileged_placement="system")
    student, teacher = texts(b, row("s:Be brief.", "u:Q", pi="P"))
    assert teacher == student.replace("Be brief.", "Be brief.\n\nP")
    student, teacher = texts(b, row("u:Q", pi="P"))
    assert teacher == "<|im_start|>system\nP<|im_end|>\n" + student


def test_system_placement_keeps_the_default_system_text_of_the_template():
    student, teacher = texts(builder(DEFAULT_SYSTEM, privileged_placement="system"), row("u:Q", pi="P"))
    assert "<|im_start|>system\nBe helpful.<|im_end|>" in student
    assert teacher == student.replace("Be helpful.", "Be helpful.\n\nP")


def test_default_system_text_that_depends_on_template_variables():
    template = swap(DEFAULT_SYSTEM, "Be helpful.", "{{ persona or 'Be helpful.' }}")
    b = builder(template, privileged_placement="system")
    _, teacher = texts(b, row("u:Q", pi="P", chat_template_kwargs={"persona": "Be a pirate."}))
    assert "system\nBe a pirate.\n\nP<" in teacher
    _, teacher = texts(b, row("u:Q", pi="P"))
    assert "system\nBe helpful.\n\nP<" in teacher


def test_both_contexts_get_the_default_system_turn_in_messages_placement():
    student, teacher = texts(builder(DEFAULT_SYSTEM), row("u:Q", pi="P"))
    assert teacher == student.replace("Q<|im_end|>\n", "Q<|im_end|>\n<|im_start|>user\nP<|im_end|>\n")


def test_privileged_template_is_filled_literally():
    b = builder(privileged_placement="user", privileged_template="{privileged} || {question} || {other} {{x}}")
    _, teacher = texts(b, row("u:Is {privileged} a field?", pi="{question} $1 \\1"))
    assert "{question} $1 \\1 || Is {privileged} a field? || {other} {{x}}<|im_end|>" in teacher


def test_privileged_template_without_question_keeps_the_question():
    b = builder(privileged_placement="user", privileged_template="Hint: {privileged}")
    _, teacher = texts(b, row("u:Why?", pi="P"))
    assert "user\nWhy?\n\nHint: P<|im_end|>" in teacher


def test_the_input_row_is_not_changed():
    for placement in ("messages", "user", "system"):
        for original in (*ROWS, TOOL_ROW):
            given_row = copy.deepcopy(original)
            texts(builder(TOOLS, privileged_placement=placement, max_privileged_length=3), given_row)
            assert given_row == original


# --- tools, several turns, thinking ------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["messages", "user", "system"])
def test_pi_stands_before_a_tool_call_and_its_result(placement):
    student, teacher = texts(builder(TOOLS, privileged_placement=placement), TOOL_ROW)
    tail = (
        '<|im_start|>assistant\n<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>12 C</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert student.endswith(tail)
    assert teacher.endswith(tail)
    assert "Call 20 C warm." in teacher.removesuffix(tail)
    assert json.dumps(WEATHER) in student
    assert json.dumps(WEATHER) in teacher


def test_tools_and_arguments_given_as_json_text():
    as_text = copy.deepcopy(TOOL_ROW)
    as_text["tools"] = json.dumps(as_text["tools"])
    function = as_text["messages"][1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    as_list_of_text = {**as_text, "tools": [json.dumps(WEATHER)]}
    assert builder(TOOLS).build(as_text) == builder(TOOLS).build(TOOL_ROW)
    assert builder(TOOLS).build(as_list_of_text) == builder(TOOLS).build(TOOL_ROW)


def test_a_template_that_wants_arguments_as_text_gets_text():
    template = swap(TOOLS, "c.function.arguments | tojson", "c.function.arguments")
    assert texts(builder(template), TOOL_ROW) == texts(builder(TOOLS), TOOL_ROW)


def test_tool_calls_that_the_template_drops_are_refused():
    without_calls = swap(TOOLS, "m.tool_calls or []", "[]")
    with pytest.raises(DataError, match="leaves out tool calls; use a model that calls tools"):
        texts(builder(without_calls), TOOL_ROW)
    with pytest.raises(DataError, match="leaves out the tool 'weather'; drop `tools`"):
        texts(builder(CHATML), row("u:Q", tools=[WEATHER]))


def test_thinking_template_student_and_teacher_with_their_own_variables():
    given_row = row(
        "u:One?",
        "a:<think>\nhm\n</think>\n\n1.",
        "u:Two?",
        pi="P",
        chat_template_kwargs={"enable_thinking": False},
        teacher_chat_template_kwargs={"enable_thinking": True},
    )
    student, teacher = texts(builder(THINKING), given_row)
    history = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1.<|im_end|>\n"
    history += "<|im_start|>user\nTwo?<|im_end|>\n"
    assert student == history + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert teacher == history + "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n"
    del given_row["teacher_chat_template_kwargs"]
    _, teacher = texts(builder(THINKING), given_row)
    assert teacher.endswith("<think>\n\n</think>\n\n")


def test_thoughts_before_a_tool_result_stay_in_both_contexts():
    """A user turn after the tool result would make the template hide the student's thoughts from the teacher."""
    given_row = row("u:Q", "a:<think>\nI call.\n</think>\n\ncall", "t:result", pi="P")
    student, teacher = texts(builder(THINKING), given_row)
    assert "I call." in student
    assert "I call." in teacher


# --- rows that come through Arrow --------------------------------------------------------------------------------


def test_rows_from_a_dataset_equal_the_rows_it_was_made_from():
    """Arrow gives every dict the keys of all others, filled with None."""
    rows = [
        {**TOOL_ROW, "chat_template_kwargs": {"enable_thinking": False}},
        {**row("u:Q", "a:A", pi="P"), "tools": None, "chat_template_kwargs": {"other": "x"}},
        {**row("u:Q"), "privileged_messages": None, "tools": [{"type": "x", "function": {"name": "f"}}]},
    ]
    dataset = Dataset.from_list(rows)
    assert dataset[1]["messages"][0]["tool_calls"] is None  # what the test is about
    b = builder(TOOLS)
    for original, read in zip(rows, dataset):
        assert b.build(read) == b.build(original)


# --- the budget --------------------------------------------------------------------------------------------------


def test_pi_over_budget_is_cut_from_the_end_message_by_message():
    pi = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "second"},
        {"role": "user", "content": "third"},
    ]
    for budget, kept in [
        (16, ["first", "second", "third"]),
        (15, ["first", "second", "thir"]),
        (11, ["first", "second"]),
        (9, ["first", "seco"]),
        (5, ["first"]),
        (2, ["fi"]),
        (0, []),
    ]:
        contexts = builder(max_privileged_length=budget).build(row("u:" + "Q" * 50, pi=pi))
        assert [message["content"] for message in contexts.privileged] == kept
        assert contexts.privileged_tokens == budget
        assert contexts.privileged_tokens_cut == 16 - budget
        assert contexts.student[0]["content"] == "Q" * 50


@pytest.mark.parametrize("placement", ["messages", "user", "system"])
@pytest.mark.parametrize("budget", [1, 4, 7])
def test_a_cut_leaves_markup_and_conversation_whole(placement, budget):
    b = builder(privileged_placement=placement, max_privileged_length=budget)
    student, teacher = texts(b, row("s:S", "u:Question", pi="XYZXYZXYZ"))
    assert teacher.count("<|im_start|>") == teacher.count("<|im_end|>") + 1
    assert teacher.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert teacher.replace("XYZXYZXYZ"[:budget], "", 1) in {
        student.replace("Question", "Question\n\n"),
        student.replace("system\nS", "system\nS\n\n"),
        student.replace("Question<|im_end|>\n", "Question<|im_end|>\n<|im_start|>user\n<|im_end|>\n"),
    }


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, so that text cut at a token's end may tokenize anew."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    corpus = ["abab ababab aabb bab 你好 你你 好好 naïve 𝔘𝔘 " * 3, "ba ab aab bba abba " * 5]
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


class SlowTokenizer:
    """A tokenizer without offsets, as those that are written in Python."""

    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, text, **kwargs):
        assert not kwargs.get("return_offsets_mapping")
        return self._tokenizer(text, **kwargs)


FAST = merging_tokenizer()


@pytest.mark.parametrize("tokenizer", [FAST, SlowTokenizer(FAST)], ids=["fast", "slow"])
def test_cut_pi_fits_its_budget_when_tokenized_again(tokenizer):
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.text("ab 你好ï𝔘\n", max_size=30), min_size=1, max_size=4), st.integers(0, 40))
    def check(pieces, budget):
        b = ContextBuilder(tokenizer, max_privileged_length=budget)
        pi = [{"role": "user", "content": piece} for piece in pieces]
        contexts = b.build(row("u:Q", pi=pi))
        lengths = [len(FAST(m["content"], add_special_tokens=False)["input_ids"]) for m in contexts.privileged]
        assert sum(lengths) == contexts.privileged_tokens <= budget
        written = [piece for piece in pieces if piece.strip()]
        total = sum(len(FAST(piece, add_special_tokens=False)["input_ids"]) for piece in written)
        assert contexts.privileged_tokens + contexts.privileged_tokens_cut == total
        kept = [message["content"] for message in contexts.privileged]
        assert kept[:-1] == written[: len(kept) - 1] or not kept
        assert not kept or written[len(kept) - 1].startswith(kept[-1])
        if total <= budget:
            assert kept == written

    check()


# --- what is refused, by name ------------------------------------------------------------------------------------

U = {"role": "user", "content": "Q"}


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (5, "a row must be a dict of columns, this one is int 5"),
        ([U], "a row must be a dict"),
        ({}, "no `messages` (columns: none)"),
        ({"prompt": "x"}, "no `messages` (columns: prompt)"),
        ({"messages": None}, "no `messages`"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": "Q"}, "`messages` is str 'Q'; give a list of messages"),
        ({"messages": U}, "`messages` is one message; put it into a list"),
        ({"messages": [[U]]}, "messages[0] is a list inside the list"),
        ({"messages": [U, 7]}, "messages[1] is int 7"),
        ({"messages": [{"content": "x"}]}, "messages[0] has no `role`; accepted are system, user,"),
        ({"messages": [{"role": "User", "content": "x"}]}, "has role 'User' (did you mean 'user'?)"),
        ({"messages": [{"role": "human", "content": "x"}]}, "has role 'human'; accepted are"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "has role ['user']; accepted are"),
        ({"messages": [{"from": "human", "value": "x"}]}, "rename them to `role`/`content`"),
        ({"messages": [{"role": "user"}]}, "messages[0] (role user) has no `content`"),
        ({"messages": [{"role": "user", "content": None}]}, "has no `content`"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0] is a user turn without text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content is int 5; only text is supported"),
        ({"messages": [{"role": "user", "content": b"x"}]}, "only text is supported"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content has a lone surrogate (U+D800)"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]},
            "messages[0].content has a part that is not text ('image')",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "image_url": {"url": "y"}}]}]},
            "messages[0].content has a part that is not text ('image_url')",
        ),
        ({"messages": [{"role": "assistant", "content": "A"}]}, "no user turn before the answer"),
        ({"messages": [{"role": "system", "content": "S"}]}, "no user turn"),
        ({"messages": [U, {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "tool_calls[0] has no name"),
        (
            {"messages": [U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}]},
            "is a string but not JSON",
        ),
        ({"messages": [U], "privileged_messages": [[U]]}, "privileged_messages[0] is a list inside the list"),
        ({"messages": [U], "privileged_messages": U}, "give a string or a list of messages"),
        ({"messages": [U], "privileged_messages": 3}, "`privileged_messages` is int 3"),
        ({"messages": [U], "privileged_messages": ["x"]}, "privileged_messages[0] is str 'x'; give a message like"),
        ({"messages": [U], "privileged_messages": "\udfff"}, "lone surrogate (U+DFFF)"),
        ({"messages": [U], "privileged_messages": [{"role": "me", "content": "x"}]}, "has role 'me'"),
        (
            {"messages": [U], "privileged_messages": [{"role": "assistant", "content": "x", "reasoning_content": "y"}]},
            "has `reasoning_content`, which the PI budget cannot cut",
        ),
        ({"messages": [U], "tools": 5}, "`tools` is int 5; give a list of tool schemas"),
        ({"messages": [U], "tools": [{"type": "function"}]}, "tools[0] is dict {'type': 'function'}; give a tool"),
        ({"messages": [U], "tools": "[{"}, "`tools` is a string but not JSON"),
        ({"messages": [U], "chat_template_kwargs": [1]}, "`chat_template_kwargs` is list [1]; give a dict"),
        ({"messages": [U], "chat_template_kwargs": {"chat_template": "x"}}, "sets 'chat_template', which is not"),
        ({"messages": [U], "teacher_chat_template_kwargs": {"truncation": True}}, "sets 'truncation'"),
        ({"messages": [U], "chat_template_kwargs": {"x": {1, 2}}}, "cannot be written as JSON"),
    ],
)
def test_malformed_rows_are_named(bad, expected):
    with pytest.raises(DataError) as error:
        texts(builder(), bad)
    assert expected in str(error.value)


def test_deeply_nested_values_are_refused_not_a_recursion_error():
    deep: dict = {}
    for _ in range(20_000):
        deep = {"a": deep}
    for bad in ({"messages": [{**U, "x": deep}]}, {"messages": [U], "tools": [deep]}):
        with pytest.raises(DataError, match="nested too deeply"):
            builder().build(bad)


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "image_url": None}]
    student, _ = texts(builder(), {"messages": [{"role": "user", "content": parts}]})
    assert "user\none two<|im_end|>" in student


def test_what_the_template_raises_for_a_row_is_told():
    with pytest.raises(DataError, match="refuses the conversation: System role not supported"):
        texts(builder(STRICT), row("s:S", "u:Q"))


def test_pi_turns_that_the_template_loses_or_refuses_in_one_row():
    """The probe has user and assistant turns; PI with other roles is checked as it is rendered."""
    drops_system = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML
    pi = [{"role": "system", "content": "The secret."}]
    with pytest.raises(DataError, match=r"loses text of privileged_messages\[0\] \(role system\); write the PI as one"):
        texts(builder(drops_system), row("u:Q", pi=pi))
    refuses = swap(
        CHATML,
        "{{ '<|im_start|>' + m",
        "{% if m['role'] == 'tool' %}{{ raise_exception('none') }}{% endif %}{{ '<|im_start|>' + m",
    )
    with pytest.raises(DataError, match=r"`privileged_messages` after the last user turn: .*none; write the PI as one"):
        texts(builder(refuses), row("u:Q", pi=[{"role": "tool", "content": "x"}]))


def test_developer_turns_only_where_the_template_renders_them():
    student, _ = texts(builder(), row("d:Be terse.", "u:Q"))
    assert "Be terse." in student
    drops = "{% set messages = messages | rejectattr('role', 'equalto', 'developer') | list %}" + CHATML
    with pytest.raises(DataError, match="drops the `developer` turn"):
        texts(builder(drops), row("d:Be terse.", "u:Q"))


def test_an_answer_without_text_makes_a_prompt_only_row():
    assert builder().build(row("u:Q", "a: ")).answer is None
    assert builder().build(row("u:Q")).answer is None
    assert builder().build(row("u:Q", "a:A")).answer == {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({"privileged_placement": "end"}, "privileged_placement is 'end'; accepted are messages, user, system"),
        ({"max_privileged_length": -1}, "max_privileged_length is -1"),
        ({"max_privileged_length": 1.5}, "max_privileged_length is 1.5"),
        ({"privileged_template": "no field"}, "has no {privileged}"),
    ],
)
def test_settings_that_cannot_work(settings_, expected):
    with pytest.raises(ConfigError) as error:
        builder(**settings_)
    assert expected in str(error.value)


def test_tokenizers_without_a_usable_chat_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        ContextBuilder(tokenizer)
    with pytest.raises(ModelError, match=r"cannot render a single user turn of text: .*broken"):
        builder("{{ raise_exception('broken') }}")
