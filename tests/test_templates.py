"""Generated chat templates by generated conversations: what holds for every row that is not refused.

Templates: 6 thinking styles x 4 system styles x 3 tool styles x 3 ends of a generation prompt; 13 conversations.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
from test_context import WEATHER, row, swap
from tiny import CHATML, byte_tokenizer

from pgkd_peft.data.check import validate_rows
from pgkd_peft.data.collator import DataCollatorForPrivilegedGKD
from pgkd_peft.data.contexts import ContextBuilder
from pgkd_peft.errors import DataError

THINK = "{% set thoughts = m.reasoning_content or '' %}{% set words = m.content %}"
SPLIT = (
    "{% if '</think>' in words %}{% set thoughts = words.split('</think>')[0].split('<think>')[-1] | trim %}"
    "{% set words = words.split('</think>')[-1] | trim %}{% endif %}"
)
THINKING = {  # what stands before an answer's words, and how the generation prompt ends
    "none": ("", ""),
    "shown": ("{% if thoughts %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}", ""),
    "opened": ("{% if thoughts %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}", "<think>\n"),
    "close_only": ("{{ thoughts + '</think>' }}", "<think>"),
    "empty": ("{{ '<think></think>' if not thoughts else '<think>' + thoughts + '</think>' }}", "<think></think>"),
    "brackets": ("{% if thoughts %}{{ '[THINK]' + thoughts + '[/THINK]' }}{% endif %}", "[THINK]"),
}
SYSTEM = {
    "turn": "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
    "dropped": "",
    "default": "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
    "mangled": "{{ '<|im_start|>' + m.role + '\n' + m.content | replace('e', '') + '<|im_end|>\n' }}",
}
CALLS = {
    "json": "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}",
    "first": "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}",
    "instead": "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}",
}
ENDS = ("asked", "always", "words")


def template(thinking: str, system: str, calls: str, end: str) -> str:
    before, opens = THINKING[thinking]
    words = "{% if not m.tool_calls %}{{ words }}{% endif %}" if calls == "instead" else "{{ words }}"
    start = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    split = "" if thinking == "none" else SPLIT
    prompt = (
        "{{ '<|im_start|>assistant\n" + opens.replace("\n", "\\n") + ("Notes:\\n" if end == "words" else "") + "' }}"
    )
    return (
        (start if system in ("default", "mangled") else "")
        + "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
        + "{% for m in messages %}"
        + f"{{% if m.role == 'system' %}}{SYSTEM[system]}"
        + "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        + f"{THINK}{split}{before}{words}{CALLS[calls]}"
        + "{{ '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        + "{% endif %}{% endfor %}"
        + (prompt if end == "always" else "{% if add_generation_prompt %}" + prompt + "{% endif %}")
    )


def called(*cities: str, text: str = "", **fields) -> dict:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}} for city in cities]
    return {"role": "assistant", "content": text, "tool_calls": calls, **fields}


def shapes() -> list[dict]:
    plain, pi = row("u:Qone?", "a:Aone."), "Privileged text."
    ask, end = {"role": "user", "content": "Qtwo?"}, {"role": "assistant", "content": "Atwo."}
    result = {"role": "tool", "content": "12 degrees"}
    reason = {**end, "reasoning_content": "Rtwo."}
    conversations = [
        plain["messages"],
        [*plain["messages"], ask, end],
        [{"role": "system", "content": "Sone text."}, ask, end],
        [ask, {**end, "content": "<think>\nTtwo.\n</think>\n\nAtwo."}],
        [ask, {**end, "content": "Ttwo.\n</think>\n\nAtwo."}],
        [ask, reason],
        [{"role": "user", "content": "Qone?"}, {**reason, "content": "Aone."}, ask, end],
        [ask, called("Oslo")],
        [ask, called("Oslo", "Rome")],
        [ask, called("Oslo", text="Looking it up.")],
        [ask, called("Oslo"), result, end],
        [ask, called("Oslo", "Rome", text="Looking."), result, {**result, "content": "30 degrees"}, end],
        [ask],
    ]
    return [
        {
            "messages": m,
            "privileged_messages": pi,
            **({"tools": [WEATHER]} if any("tool_calls" in t for t in m) else {}),
        }
        for m in conversations
    ]


def check(made: DataCollatorForPrivilegedGKD, given: dict) -> None:
    """The three rules, by plain string work on what is trained on."""
    encoded = made.encode(given)
    student, teacher = encoded["student_text"], encoded["teacher_text"]
    completion = made.tokenizer.decode(encoded["completion_ids"])
    whole = student[student.rindex("<|im_start|>assistant") :] + completion
    # A: one block at most, the thoughts in it, the words behind it, an end of turn at the end
    turns = given["messages"]
    answer = turns[-1] if turns[-1]["role"] == "assistant" else None
    tags = re.findall(r"<think>|</think>|\[THINK\]|\[/THINK\]", whole)
    if answer:
        assert tags in ([], ["<think>", "</think>"], ["[THINK]", "[/THINK]"])
        assert completion.endswith("<|im_end|>")
        assert completion.count("<|im_end|>") == 1
        words = answer["content"].split("</think>")[-1].strip()
        assert words in re.split(r"</think>|\[/THINK\]", whole)[-1]
        assert "<|im_start|>" not in completion
        assert "Notes:" not in whole
        for thought in ("Ttwo.", "Rtwo."):
            if tags and thought in whole:
                assert re.search(rf"(<think>|\[THINK\])\s*{thought}\s*(</think>|\[/THINK\])", whole)
    # B: all words and all arguments are there, and thoughts unless they are counted
    for i, turn in enumerate(turns):
        text = student if turn is not answer else completion
        assert turn["content"].split("</think>")[-1].strip() in text
        for call in turn.get("tool_calls", ()):
            assert call["function"]["arguments"]["city"] in text
        if turn.get("reasoning_content") and i not in encoded["lost_thoughts"]:
            assert turn["reasoning_content"] in text
    # C: cutting one stretch out of the teacher's prompt gives the student's
    extra = len(teacher) - len(student)
    assert any(teacher[:i] + teacher[i + extra :] == student for i in range(len(student) + 1))
    assert "Privileged text." in teacher


@pytest.mark.parametrize("placement", ["messages", "user", "system"])
def test_whatever_the_template_the_three_rules_hold(placement):
    counts: Counter[str] = Counter()
    refused: set[tuple[str, int]] = set()  # of the templates that lose nothing: thinking style and shape
    for style in itertools.product(THINKING, SYSTEM, CALLS, ENDS):
        if placement != "messages" and style[2] != "json":
            continue
        tokenizer = byte_tokenizer(template(*style))
        made = DataCollatorForPrivilegedGKD(tokenizer, privileged_placement=placement, max_length=None)
        for number, given in enumerate(shapes()):
            try:
                made.encode(given)
            except DataError:
                counts["refused"] += 1
                if style[1:] == ("turn", "json", "asked"):
                    refused.add((style[0], number))
                continue
            try:
                check(made, given)
            except AssertionError as error:
                raise AssertionError(f"{style}, shape {number}: {error}") from error
            counts["held"] += 1
    assert refused == {("none", 4), ("empty", 3), ("empty", 4)}  # a stray tag; thoughts behind a closed block
    assert counts["held"] > counts["refused"] / 2 > 0, counts


def test_a_system_turn_that_moves_with_the_last_question_is_told():
    moving = (
        "{% set given = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last and m.role == 'user' and given %}{{ given + '\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    made = DataCollatorForPrivilegedGKD(byte_tokenizer(moving), max_length=None)
    encoded = made.encode(row("s:Be brief.", "u:Q?", "a:A.", pi="Secret."))
    assert encoded["contexts"].moved
    assert encoded["teacher_text"] == encoded["student_text"].replace("Q?", "Q?\n\nSecret.")
    assert made.tokenizer.decode(encoded["completion_ids"]) == "A.<|im_end|>"
    with pytest.raises(DataError, match=r"loses the text of messages\[0\] \(role system\)"):
        made.encode(row("s:Be brief.", "u:Q?", "a:A.", "t:result", "a:B."))


def test_a_template_without_a_generation_prompt_is_refused():
    made = DataCollatorForPrivilegedGKD(byte_tokenizer(CHATML.partition("{% if add_gen")[0]), max_length=None)
    with pytest.raises(DataError, match="writes no generation prompt, so the answer would begin with"):
        made.encode(row("u:Q", "a:A"))


def test_tags_around_the_answer_are_learnt():
    wraps = swap(CHATML, "{% for m in", "{% set tags = {'assistant': ['<|say|>', '<|/say|>']} %}{% for m in")
    wraps = swap(wraps, "m['content']", "tags.get(m.role, ['', ''])[0] + m['content'] + tags.get(m.role, ['', ''])[1]")
    wraps = swap(wraps, "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<|say|>'")
    tokenizer = byte_tokenizer(wraps)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|say|>", "<|/say|>"]})
    made = DataCollatorForPrivilegedGKD(tokenizer, max_length=None)
    assert made.tokenizer.decode(made.encode(row("u:Q", "a:A"))["completion_ids"]) == "A<|/say|><|im_end|>"


@pytest.mark.parametrize("template", [CHATML, swap(CHATML, "m['content']", "m['content'].replace('/no_think', '')")])
def test_a_switch_in_a_turn_may_be_taken_out(template):
    made = DataCollatorForPrivilegedGKD(byte_tokenizer(template), max_length=None)
    made.encode(row("s:Be /no_think brief.", "u:Q /no_think", "a:A"))
    lossy = DataCollatorForPrivilegedGKD(byte_tokenizer(swap(CHATML, "m['content']", "m['content'].replace('f', '')")))
    with pytest.raises(DataError, match=r"loses the text of messages\[0\]"):
        lossy.encode(row("s:Be brief.", "u:Q", "a:A"))


def test_variables_that_the_template_never_reads_are_named():
    thinks = CHATML + "{% if enable_thinking %}<think>{% endif %}"
    made = DataCollatorForPrivilegedGKD(byte_tokenizer(thinks), max_length=None)
    with pytest.raises(DataError, match="never reads the variable 'enable_thinkng'; did you mean 'enable_thinking'"):
        made.encode(row("u:Q", "a:A", chat_template_kwargs={"enable_thinkng": False}))
    plain = DataCollatorForPrivilegedGKD(byte_tokenizer(CHATML), max_length=None)
    report = validate_rows([row("u:Q", "a:A", pi="P", chat_template_kwargs={"enable_thinking": False})], plain)
    assert any("never reads the variable 'enable_thinking'" in warning for warning in report.warnings)


def test_thoughts_that_are_not_learnt_are_counted():
    given = row("u:Q", "a:A", pi="P")
    given["messages"][-1]["reasoning_content"] = "Because."
    report = validate_rows([given, row("u:Q", "a:A", pi="P")], DataCollatorForPrivilegedGKD(byte_tokenizer(CHATML)))
    assert any("leaves out the answer's thoughts" in w and w.endswith("1 rows (0)") for w in report.warnings)


def test_the_date_that_a_template_writes_is_told_and_can_be_pinned():
    dated = "{{ 'Today is ' + strftime_now('%d %B %Y') + '.' }}" + CHATML
    assert "pin it with --template_date" in ContextBuilder(byte_tokenizer(dated)).notes[0]
    pinned = ContextBuilder(byte_tokenizer(dated), template_date="2024-02-29")
    assert "pinned to 2024-02-29" in pinned.notes[0]
    assert pinned.render_student(pinned.build(row("u:Q"))).startswith("Today is 29 February 2024.")
    assert ContextBuilder(byte_tokenizer(swap(dated, "strftime_now('%d %B %Y')", "'x'"))).notes == []


def test_a_date_whose_format_is_a_variable_is_pinned_too():
    dated = "\n{% set how = '%Y' ~ '-%m' %}{{ strftime_now(how) }} 100%% {% if strftime_now is defined %}yes{% endif %}"
    pinned = ContextBuilder(
        byte_tokenizer(dated + "{{ strftime_now('%-d %b, 5%%') }}" + CHATML), template_date="2024-02-09"
    )
    text = pinned.render_student(pinned.build(row("u:Q")))
    assert text.startswith("\n2024-02 100%% yes9 Feb, 5%<|im_start|>")


# Templates of the same shape as public ones: what opens and closes thoughts, what the generation prompt has of it, the
# answer behind it without and with thoughts.
TURN = "<|im_start|>assistant\n"


def thinker(before: str, prompt: str) -> str:
    """A template whose answers begin with `before` and whose generation prompt ends with `prompt`."""
    turn = "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}" + before + "{% endif %}{{ m.content }}"
    return (
        "{% for m in messages %}" + turn + "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}" + prompt + "{% endif %}"
    )


CHANNEL = "{% if m.reasoning_content %}<|channel>thought\n{{ m.reasoning_content }}\n<channel|>{% endif %}"
EFFORT = "<effort>low</effort>"
THOUGHT = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
PREFIX = "{% if m.reasoning_content %}<|inner_prefix|>{{ m.reasoning_content }}<|inner_suffix|>{% endif %}"


@pytest.mark.parametrize(
    ("template", "plain", "thinking"),
    [
        # thoughts are switched off by an empty channel (Gemma 4), which the row's thoughts are not put behind
        (thinker(CHANNEL, "{{ '<|channel>thought\n<channel|>' }}"), "A.", "A."),
        (thinker(CHANNEL, ""), "A.", "<|channel>thought\nHm.\n<channel|>A."),
        (thinker(CHANNEL, "{{ '<|channel>thought\n' }}"), "\n<channel|>\n\nA.", "Hm.\n<channel|>A."),
        (thinker(PREFIX, "<|inner_prefix|>"), "\n<|inner_suffix|>\n\nA.", "Hm.<|inner_suffix|>A."),
        # no thoughts: the closing tag alone, in prompts and in past answers (DeepSeek V3.1)
        (thinker("</think>", "</think>"), "A.", "A."),
        # a pair of tags in the header is not the answer's
        (thinker(EFFORT + THOUGHT, EFFORT), "A.", "<think>Hm.</think>A."),
    ],
)
def test_thoughts_in_tags_of_other_shapes(template, plain, thinking):
    made = DataCollatorForPrivilegedGKD(byte_tokenizer(template), max_length=None)
    assert made.tokenizer.decode(made.encode(row("u:Q", "a:A."))["completion_ids"]) == plain + "<|im_end|>"
    given = row("u:Q", "a:A.")
    given["messages"][-1]["reasoning_content"] = "Hm."
    encoded = made.encode(given)
    assert made.tokenizer.decode(encoded["completion_ids"]) == thinking + "<|im_end|>"
    assert encoded["lost_thoughts"] == ([] if "Hm." in thinking else [1])


@pytest.mark.parametrize("written", ["<think>\nHm.\n</think>\n\nA.", "<reasoning>Hm.</reasoning>\n\nA."])
def test_thoughts_in_other_tags_than_the_template_s_stand_in_one_block(written):
    strips = thinker("", "{{ '<thought>\n' }}").replace("m.content", "m.content.split('</thought>')[-1]")
    made = DataCollatorForPrivilegedGKD(byte_tokenizer(strips), max_length=None)
    completion = made.tokenizer.decode(made.encode(row("u:Q", "a:" + written))["completion_ids"])
    assert completion == "Hm.\n</thought>\n\nA.<|im_end|>"


def test_pi_goes_to_the_question_where_a_row_s_system_turn_is_not_shown():
    """Mistral's templates show it with the last user turn, if that is the last of all."""
    last = (
        "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last and m.role == 'user' and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}"
        "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    made = DataCollatorForPrivilegedGKD(byte_tokenizer(last), max_length=None, privileged_placement="system")
    assert made.builder.placement == "system"
    encoded = made.encode(row("u:Q", "a:A", "t:result", "a:B", pi="Secret."))
    assert encoded["contexts"].moved
    assert encoded["teacher_text"] == encoded["student_text"].replace("Q<", "Q\n\nSecret.<")
