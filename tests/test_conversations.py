"""The forms that a conversation can take, from the example rows: what do student and teacher read, what is learnt?

The template is written after Qwen3's: tool schemas in the system turn, tool results in user turns, thoughts only after
the last question, an empty thinking block in the generation prompt when `enable_thinking` is false.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from tiny import CHATML, STRICT, byte_tokenizer

from pgkd_peft import DataCollatorForPrivilegedGKD
from pgkd_peft.data.check import validate_rows
from pgkd_peft.data.load import load_rows
from pgkd_peft.errors import DataError

ROWS = Path(__file__).parents[1] / "examples" / "rows"

QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}"
    "{% endif %}{{ '<tools>' }}{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    '{% for c in m.tool_calls or [] %}{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
OPEN = "<|im_start|>assistant\n"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text("utf-8").splitlines()]


def collator(template: str = QWEN3, **settings) -> DataCollatorForPrivilegedGKD:
    return DataCollatorForPrivilegedGKD(byte_tokenizer(template), max_length=None, **settings)


def seen(row: dict, template: str = QWEN3, **settings) -> tuple[str, str, str]:
    """What the models read and learn, decoded from a batch's ids: student's prompt, teacher's prompt, completion."""
    made = collator(template, **settings)
    batch = made([row])
    keep = (("prompts", "prompt_attention_mask"), ("teacher_prompts", "teacher_prompt_attention_mask"))
    texts = [
        made.tokenizer.decode(batch[ids][0][batch[mask][0].bool()].tolist())
        for ids, mask in (*keep, ("completions", "completion_mask"))
    ]
    return texts[0], texts[1], texts[2]


@pytest.mark.parametrize("name", ["feedback", "multi_turn", "tools", "thinking"])
def test_the_example_rows_can_be_trained_on(name):
    loaded = load_rows(ROWS / f"{name}.jsonl")
    report = validate_rows(loaded, collator())
    assert len(loaded) == len(report.kept) == len(rows(name)) >= 2
    assert not report.leaks
    assert [seen(row) for row in loaded] == [seen(row) for row in rows(name)]


def test_the_readme_names_every_file():
    readme = (ROWS / "README.md").read_text("utf-8")
    assert sorted(path.stem for path in ROWS.glob("*.jsonl")) == sorted(
        line.split("`")[1].removesuffix(".jsonl") for line in readme.splitlines() if line.startswith("| `")
    )


# ---- feedback: the plain form --------------------------------------------------------------------------------------


def test_feedback_follows_the_question_as_turns():
    first, second, without = rows("feedback")
    student, teacher, completion = seen(first, CHATML)
    assert student == f"<|im_start|>user\nExplain Newton's method.<|im_end|>\n{OPEN}"
    assert teacher == (
        "<|im_start|>user\nExplain Newton's method.<|im_end|>\n"
        "<|im_start|>user\nFeedback on an earlier answer: it never said when the method converges.<|im_end|>\n"
        "<|im_start|>assistant\nNear a root where the derivative is not zero, and there quadratically.<|im_end|>\n"
        + OPEN
    )
    assert completion.endswith("again and again.<|im_end|>")
    assert seen(second)[1].count("<|im_start|>user\n") == 3
    student, teacher, _ = seen(without)
    assert student == teacher


def test_feedback_in_a_template_that_wants_alternating_turns():
    student, teacher, _ = seen(rows("feedback")[1], STRICT)
    assert student == "<bos><|im_start|>user\nWhat is quicksort?<|im_end|>\n<|im_start|>model\n"
    assert teacher == (
        "<bos><|im_start|>user\nWhat is quicksort?\n\nUser: Say what it costs.\n\n"
        "Assistant: O(n log n) on average, O(n^2) at worst.\n\nUser: And how to avoid the worst case.\n\n"
        "Assistant: Choose the pivot at random.<|im_end|>\n<|im_start|>model\n"
    )


# ---- several turns -------------------------------------------------------------------------------------------------


def test_only_the_last_assistant_turn_is_the_completion():
    row, _ = rows("multi_turn")
    student, teacher, completion = seen(row, CHATML)
    context = (
        "<|im_start|>system\nYou help with cooking.<|im_end|>\n<|im_start|>user\nHow long do I boil an egg?<|im_end|>\n"
        "<|im_start|>assistant\nSix minutes for a soft one.<|im_end|>\n<|im_start|>user\nAnd a hard one?<|im_end|>\n"
    )
    assert student == context + OPEN
    assert teacher == f"{context}<|im_start|>user\n{row['privileged_messages']}<|im_end|>\n{OPEN}"
    assert completion == "Ten minutes.<|im_end|>"


@pytest.mark.parametrize("placement", ["user", "system"])
def test_pi_is_folded_into_the_last_question_or_the_system_turn(placement):
    row, _ = rows("multi_turn")
    student, teacher, _ = seen(row, privileged_placement=placement)
    turn = {"user": "And a hard one?", "system": "You help with cooking."}[placement]
    assert teacher == student.replace(turn, f"{turn}\n\n{row['privileged_messages']}")
    assert teacher != student


def test_a_conversation_that_ends_with_the_user_has_no_reference():
    _, row = rows("multi_turn")
    student, teacher, completion = seen(row)
    assert student.endswith(f"Seven.<|im_end|>\n<|im_start|>user\nA larger one, please.<|im_end|>\n{OPEN}")
    assert "only 97" in teacher
    assert "only 97" not in student
    assert completion == ""


# ---- tools ---------------------------------------------------------------------------------------------------------


def test_a_tool_call_as_completion():
    row, _ = rows("tools")
    student, teacher, completion = seen(row)
    schema = json.dumps(row["tools"][0])
    for text in (student, teacher):
        assert json.loads(text.split("<tools>\n")[1].split("\n</tools>")[0]) == json.loads(schema)
        assert text.endswith(OPEN)
    pi = f"<|im_start|>user\n{row['privileged_messages']}<|im_end|>\n"
    assert teacher == student.removesuffix(OPEN) + pi + OPEN
    body = completion.removesuffix("\n</tool_call><|im_end|>").rpartition("<tool_call>\n")[2]
    assert completion.endswith("\n</tool_call><|im_end|>")
    assert json.loads(body) == {"name": "get_weather", "arguments": {"city": "Oslo", "unit": "C"}}


def test_the_answer_after_a_tool_result_as_completion():
    _, row = rows("tools")
    student, teacher, completion = seen(row)
    done = (
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "unit": "C"}}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n"
        '{"temperature": 12, "sky": "clear"}\n</tool_response><|im_end|>\n'
    )
    assert student.endswith("in Oslo today?<|im_end|>\n" + done + OPEN)
    pi = f"<|im_start|>user\n{row['privileged_messages']}<|im_end|>\n"
    assert teacher.endswith(pi + done + OPEN)  # PI stands before the call, which stays next to its result
    assert teacher.replace(pi, "") == student
    assert completion.endswith("A light one: it is 12 degrees and clear.<|im_end|>")


def test_tools_that_a_template_leaves_out_are_refused():
    with pytest.raises(DataError, match="leaves out the tool 'get_weather'"):
        seen({"messages": [{"role": "user", "content": "Coat?"}], "tools": rows("tools")[0]["tools"]}, CHATML)


# ---- thinking ------------------------------------------------------------------------------------------------------

NO_THOUGHTS = "<think>\n\n</think>\n\n"


def test_the_teacher_may_think_and_the_student_does_not():
    both, _ = rows("thinking")
    student, teacher, completion = seen(both)
    assert student == f"<|im_start|>user\nWhat is 17 times 23?<|im_end|>\n{OPEN}{NO_THOUGHTS}"
    assert teacher == (
        "<|im_start|>user\nWhat is 17 times 23?<|im_end|>\n"
        f"<|im_start|>user\n{both['privileged_messages']}<|im_end|>\n{OPEN}"
    )
    assert completion == "391<|im_end|>"


def test_the_teacher_has_the_students_variables_unless_the_row_gives_it_its_own():
    _, student_only = rows("thinking")
    student, teacher, _ = seen(student_only)
    assert student.endswith(OPEN + NO_THOUGHTS)
    assert teacher.endswith(OPEN + NO_THOUGHTS)


def test_a_student_that_is_left_to_think_learns_to_write_no_thoughts():
    row = rows("thinking")[0]
    student, _, completion = seen({"messages": row["messages"]})
    assert student.endswith(f"<|im_end|>\n{OPEN}")
    assert completion == f"{NO_THOUGHTS}391<|im_end|>"


def test_template_variables_are_of_the_row_not_of_the_batch():
    made = collator()
    thinking = copy.deepcopy(rows("thinking"))
    thinking[1]["chat_template_kwargs"] = {"enable_thinking": True}
    batch = made(thinking)
    texts = [
        made.tokenizer.decode(ids[mask.bool()].tolist())
        for ids, mask in zip(batch["prompts"], batch["prompt_attention_mask"])
    ]
    assert [text.endswith(NO_THOUGHTS) for text in texts] == [True, False]


# ---- text only -----------------------------------------------------------------------------------------------------

IMAGE = [{"type": "image", "url": "cat.png"}, {"type": "text", "text": "What is this?"}]
QUESTION = [{"role": "user", "content": "What is this?"}]


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ({"messages": [{"role": "user", "content": IMAGE}]}, r"messages\[0\]\.content"),
        (
            {"messages": QUESTION, "privileged_messages": [{"role": "user", "content": IMAGE}]},
            r"privileged_messages\[0\]\.content",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
    ],
)
def test_images_are_refused_by_row_and_field(row, where):
    with pytest.raises(DataError, match=rf"1 of 2 rows cannot be used[^$]*row 1: .*{where}") as error:
        validate_rows([{"messages": QUESTION}, row], collator())
    assert "only text is supported" in str(error.value)
    assert "'image" in str(error.value)
