"""Batches: aligned completions, padding and masks from lengths, end of turn, reference answers of odd templates."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_context import DEFAULT_SYSTEM, THINKING, TOOL_ROW, TOOLS, row, swap
from tiny import CHATML, DROPPING, ROWS, STRICT, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AddedToken, PreTrainedTokenizerFast

from pgkd_peft.data.collator import DataCollatorForPrivilegedGKD, RowTooLongError, stop_ids
from pgkd_peft.errors import ConfigError, DataError

IM_END = 4
KEYS = {
    "prompts",
    "prompt_attention_mask",
    "teacher_prompts",
    "teacher_prompt_attention_mask",
    "completions",
    "completion_mask",
    "has_privileged",
    "privileged_tokens",
    "privileged_tokens_cut",
}
# The generation prompt opens a thinking block; thoughts are taken out of answers, also of the last (as DeepSeek-R1's).
OPENS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('</think>')[-1] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# The generation prompt opens a thinking block; an answer shows an empty one, written in another way (as Nemotron's).
EMPTY_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and '<think>' not in m['content'] %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def collator(template: str = CHATML, *, pad_is_eos: bool = False, **kwargs) -> DataCollatorForPrivilegedGKD:
    return DataCollatorForPrivilegedGKD(byte_tokenizer(template, pad_is_eos=pad_is_eos), **kwargs)


def completion(template: str, given_row: dict) -> str:
    c = collator(template)
    return c.tokenizer.decode(c.encode(given_row)["completion_ids"])


def rows_of(batch: dict, ids: str, mask: str) -> list[list[int]]:
    """Each row without its padding."""
    return [i[m.bool()].tolist() for i, m in zip(batch[ids], batch[mask])]


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_shapes_padding_and_masks(pad_is_eos):
    c = collator(pad_is_eos=pad_is_eos)
    batch = c(ROWS)
    assert set(batch) == KEYS
    assert all(tensor.dtype == torch.long and len(tensor) == 4 for tensor in batch.values())
    for ids, mask, key in [
        ("prompts", "prompt_attention_mask", "student_ids"),
        ("teacher_prompts", "teacher_prompt_attention_mask", "teacher_ids"),
        ("completions", "completion_mask", "completion_ids"),
    ]:
        expected = [c.encode(r)[key] for r in ROWS]
        longest = max(map(len, expected))
        assert batch[ids].shape == batch[mask].shape == (4, longest)
        assert rows_of(batch, ids, mask) == expected
        for mask_row, ids_row, row_ids in zip(batch[mask].tolist(), batch[ids].tolist(), expected):
            padding = [0] * (longest - len(row_ids))
            ones = [1] * len(row_ids)
            assert mask_row == (ones + padding if ids == "completions" else padding + ones)
            pad_id = IM_END if pad_is_eos else 0
            padded = ids_row[len(row_ids) :] if ids == "completions" else ids_row[: longest - len(row_ids)]
            assert padded == [pad_id] * len(padding)
    assert batch["has_privileged"].tolist() == [1, 1, 0, 1]
    assert batch["privileged_tokens"].tolist() == [18 + 23, 18, 0, 19]
    assert batch["privileged_tokens_cut"].tolist() == [0] * 4


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_completion_ends_with_a_trained_end_of_turn(pad_is_eos):
    batch = collator(pad_is_eos=pad_is_eos)(ROWS)
    for ids, original in zip(rows_of(batch, "completions", "completion_mask"), ROWS):
        answer = original["messages"][-1]["content"]
        assert ids == [*byte_tokenizer()(answer)["input_ids"], IM_END]


@pytest.mark.parametrize("template", [CHATML, STRICT, DROPPING, DEFAULT_SYSTEM, TOOLS])
@pytest.mark.parametrize("placement", ["messages", "user", "system"])
def test_student_prompt_and_completion_are_the_conversation(template, placement):
    """Independent oracle: the whole conversation, rendered and tokenized at once by the tokenizer itself."""
    c = collator(template, privileged_placement=placement)
    for original in ROWS[:3]:
        whole = c.tokenizer.apply_chat_template(original["messages"], return_dict=False)
        encoded = c.encode(original)
        ids = encoded["student_ids"] + encoded["completion_ids"]
        assert ids == whole[: len(ids)]
        assert c.tokenizer.decode(whole[len(ids) :]).strip() == ""
        prompt = c.tokenizer.apply_chat_template(
            original["messages"][:-1], add_generation_prompt=True, return_dict=False
        )
        assert encoded["student_ids"] == prompt


def test_pi_over_budget_is_counted_in_the_batch():
    batch = collator(max_privileged_length=20, allow_privileged_cut=True)(ROWS)
    assert batch["privileged_tokens"].tolist() == [20, 18, 0, 19]
    assert batch["privileged_tokens_cut"].tolist() == [21, 0, 0, 0]


def test_prompt_only_rows():
    c = collator()
    batch = c([row("u:Q", pi="P"), row("u:Longer question", "a:")])
    assert batch["completions"].shape == batch["completion_mask"].shape == (2, 0)
    assert batch["completions"].dtype == torch.long
    batch = c([row("u:Q", pi="P"), row("u:Q", "a:A")])
    assert batch["completion_mask"].tolist() == [[0, 0], [1, 1]]


def test_a_bos_in_the_template_is_not_doubled():
    tokenizer = byte_tokenizer(STRICT)
    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    assert tokenizer("x")["input_ids"][0] == bos  # what the test is about
    batch = DataCollatorForPrivilegedGKD(tokenizer)(ROWS[:1])
    for key in ("prompts", "teacher_prompts"):
        assert batch[key][0].tolist().count(bos) == 1
    assert bos not in batch["completions"][0]


def test_no_truncation_whatever_the_tokenizer_believes():
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 8
    batch = DataCollatorForPrivilegedGKD(tokenizer, max_length=None)([row("u:" + "Q" * 3000, "a:" + "A" * 3000)])
    assert batch["prompts"].shape[1] > 3000
    assert batch["completions"].shape[1] == 3001
    assert tokenizer._tokenizer.truncation is None
    assert not tokenizer.deprecation_warnings  # it has not warned of too long a sequence either


def test_max_length_counts_the_students_prompt_and_the_answer():
    given_row = row("u:Question", "a:Answer", pi="P" * 100)
    c = collator(max_length=None)
    encoded = c.encode(given_row)
    prompt, answer = len(encoded["student_ids"]), len(encoded["completion_ids"])
    collator(max_length=prompt + answer)([given_row])
    with pytest.raises(DataError, match=f"row 1 of this batch .*{prompt} \\+ {answer} tokens, max_length is .*; raise"):
        collator(max_length=prompt + answer - 1)([row("u:Q", "a:A"), given_row])
    only_prompt = row("u:Question", pi="P" * 100)
    collator(max_length=prompt)([only_prompt])
    c = collator(max_length=prompt - 1)
    with pytest.raises(RowTooLongError, match=f"the prompt has {prompt} tokens, max_length is {prompt - 1}; raise"):
        c.check_length(c.encode(only_prompt))


def test_a_bad_row_is_named_by_its_place_in_the_batch():
    with pytest.raises(DataError, match=r"row 1 of this batch \(counted from 0\): `messages` is empty") as error:
        collator()([ROWS[0], {"messages": []}])
    assert error.value.rows == (1,)


def test_the_users_tokenizer_is_left_as_it_is():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    c = DataCollatorForPrivilegedGKD(tokenizer)
    batch = c(ROWS)
    assert c.pad_token_id == tokenizer.eos_token_id
    assert batch["prompts"][0, 0] == tokenizer.eos_token_id
    assert tokenizer.pad_token is None
    assert tokenizer.padding_side == "right"


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match="max_length is 0"):
        collator(max_length=0)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a pad token nor an EOS"):
        DataCollatorForPrivilegedGKD(tokenizer)


# --- end of turn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ("<|im_end|>\n", "<|im_end|>")),
        (swap(CHATML, "<|im_end|>", "<eos>"), ("<eos>\n", "<eos>")),
        # as Phi-3's: an end of text after the end of the last turn
        (CHATML + "{% if not add_generation_prompt %}<eos>{% endif %}", ("<|im_end|>\n<eos>", "<|im_end|>")),
        (swap(CHATML, "<|im_end|>", ""), ("\n", "<|im_end|>")),  # no token at all: the tokenizer's EOS
        (swap(CHATML, "<|im_end|>' + '\n", ""), ("", "<|im_end|>")),
    ],
)
def test_end_of_turn_is_found(template, expected):
    c = collator(template)
    assert (c.turn_end, c.end_of_turn) == expected
    assert c._tokenize(c.end_of_turn) == c.tokenizer.convert_tokens_to_ids([expected[1]])
    text = c.tokenizer.decode(c.encode(row("u:Q", "a:A\n"))["completion_ids"])
    assert text == "A\n" + expected[1]


@pytest.mark.parametrize("special", [True, False])
def test_end_of_turn_that_is_only_an_added_token(special):
    tokenizer = byte_tokenizer(swap(CHATML, "<|im_end|>", "<end_of_turn>"))
    tokenizer.add_tokens(AddedToken("<end_of_turn>", special=special))
    assert "<end_of_turn>" not in tokenizer.all_special_tokens  # what the test is about
    c = DataCollatorForPrivilegedGKD(tokenizer)
    assert c.end_of_turn == "<end_of_turn>"
    assert ("<end_of_turn>" in c.special_tokens) is special
    assert tokenizer.decode(c.encode(row("u:Q", "a:A"))["completion_ids"]) == "A<end_of_turn>"
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") in stop_ids(tokenizer)


@pytest.mark.parametrize(
    ("from_config", "expected"), [(None, [3, 4]), (1, [1, 3, 4]), ([1, 0], [0, 1, 3, 4]), ([], [3, 4])]
)
def test_stop_ids_are_the_union_of_three_sources(from_config, expected):
    tokenizer = byte_tokenizer(swap(CHATML, "<|im_end|>", "<|im_start|>"))  # template ends a turn with id 3, EOS is 4
    assert stop_ids(tokenizer, SimpleNamespace(eos_token_id=from_config)) == expected
    assert stop_ids(tokenizer) == [3, 4]


def test_stop_ids_without_eos_or_template():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert stop_ids(tokenizer) == [IM_END]
    tokenizer.chat_template = None
    assert stop_ids(tokenizer, SimpleNamespace(eos_token_id=7)) == [7]


# --- reference answers -------------------------------------------------------------------------------------------

NO_THINKING = {"enable_thinking": False}
NO_THOUGHTS_A = "\n</think>\n\nA<|im_end|>"


@pytest.mark.parametrize(
    ("template", "given_row", "expected"),
    [
        (THINKING, row("u:Q", "a:A"), "<think>\n\n</think>\n\nA<|im_end|>"),
        (THINKING, row("u:Q", "a:A", chat_template_kwargs=NO_THINKING), "A<|im_end|>"),
        (THINKING, row("u:Q", "a:<think>\nhm\n</think>\n\nA"), "<think>\nhm\n</think>\n\nA<|im_end|>"),
        (OPENS_THINKING, row("u:Q", "a:A"), NO_THOUGHTS_A),
        (OPENS_THINKING, row("u:Q", "a:<think>\nhm\n</think>\n\nA"), "hm\n</think>\n\nA<|im_end|>"),
        (OPENS_THINKING, row("u:Q", "a:<think>hm</think>A"), "hm</think>A<|im_end|>"),
        (OPENS_THINKING, row("u:Q", "a:hm\n</think>\n\nA"), "hm\n</think>\n\nA<|im_end|>"),
        (OPENS_THINKING, row("u:Q", "a:\n</think>\n\nA"), "\n</think>\n\nA<|im_end|>"),
        # an end of text after the last turn, so that the prompt does not go on from the same text without an answer
        (OPENS_THINKING + "{% if not add_generation_prompt %}<eos>{% endif %}", row("u:Q", "a:A"), NO_THOUGHTS_A),
        (EMPTY_THINKING, row("u:Q", "a:A"), "</think>A<|im_end|>"),
        (EMPTY_THINKING, row("u:Q", "a:<think>\nhm</think>A"), "hm</think>A<|im_end|>"),
        # thoughts that the template takes out of the answer are kept
        (swap(OPENS_THINKING, "<think>\n", ""), row("u:Q", "a:<think>hm</think>A"), "<think>hm</think>A<|im_end|>"),
        (STRICT, row("u:Q", "a: A \n"), "A<|im_end|>"),
        (CHATML, row("u:Q", "a:one<|im_end|>two"), "one<|im_end|>two<|im_end|>"),
    ],
)
def test_reference_answer_follows_the_generation_prompt(template, given_row, expected):
    assert completion(template, given_row) == expected


def test_the_reference_answer_is_the_same_for_a_teacher_that_thinks():
    given_row = row("u:Q", "a:A", pi="P", chat_template_kwargs=NO_THINKING)
    given_row["teacher_chat_template_kwargs"] = {"enable_thinking": True}
    c = collator(THINKING)
    batch = c([given_row])
    decode = c.tokenizer.decode
    assert decode(batch["prompts"][0]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert decode(batch["teacher_prompts"][0]).endswith("P<|im_end|>\n<|im_start|>assistant\n")
    assert decode(batch["completions"][0]) == "A<|im_end|>"


def test_a_tool_call_as_reference_answer():
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>'
    given_row = {**TOOL_ROW, "messages": TOOL_ROW["messages"][:2]}
    assert completion(TOOLS, given_row) == call
    assert completion(TOOLS, TOOL_ROW) == "Not very.<|im_end|>"
    opens = swap(TOOLS, "assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    assert completion(opens, given_row) == "\n</think>\n\n" + call
    other = swap(TOOLS, "assistant\n' }}{% endif", "assistant\n<plan>' }}{% endif")
    with pytest.raises(DataError, match="the answer's tool call in another way"):
        completion(other, given_row)


def test_a_special_token_that_closes_a_tool_call_is_kept():
    """Llama-3.1 and gpt-oss end a call with a token of its own."""
    closes = swap(TOOLS, "</tool_call>' }}{% endfor %}{{ '<|im_end|>", "</tool_call><eos>' }}{% endfor %}{{ '")
    template = swap(closes, "{{ m['content'] }}", "{{ m['content'] + '<|im_end|>' if m['content'] else '' }}")
    given_row = {**TOOL_ROW, "messages": TOOL_ROW["messages"][:2]}
    assert completion(template, given_row).endswith("</tool_call><eos>")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a space before a text that stands alone, as Llama-2's and Mistral's do."""
    pieces = [*"▁abcdefghijklmnopqrstuvwxyzABCQ[]/", "▁A", "▁Q", "<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "A"), ("▁", "Q")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[' + m['content'] + ']' }}"
        "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
    )
    return tokenizer


def test_no_space_is_put_before_the_answer_by_the_tokenizer():
    tokenizer = metaspace_tokenizer()
    assert tokenizer.tokenize("A") == ["▁A"]  # what the test is about
    encoded = DataCollatorForPrivilegedGKD(tokenizer).encode(row("u:Q", "a:A"))
    assert tokenizer.convert_ids_to_tokens(encoded["completion_ids"]) == ["A", "</s>"]
    whole = tokenizer("[Q]A</s>", add_special_tokens=False)["input_ids"]
    assert encoded["student_ids"] + encoded["completion_ids"] == whole


def test_an_answer_that_merges_with_the_prompt_is_tokenized_on_its_own():
    tokenizer = metaspace_tokenizer()
    tokenizer.chat_template = swap(tokenizer.chat_template, "']'", "'] '")  # the prompt ends with a space
    encoded = DataCollatorForPrivilegedGKD(tokenizer).encode(row("u:Q", "a:A"))
    assert tokenizer.convert_ids_to_tokens(encoded["student_ids"])[-1] == "▁"
    assert tokenizer.convert_ids_to_tokens(encoded["completion_ids"]) == ["▁A", "</s>"]


# --- any batch ---------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda text: text.strip())
TURN = st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), TEXT)
CONVERSATION = st.builds(
    lambda before, question, answer: [*before, {"role": "user", "content": question}, *answer],
    st.lists(TURN, max_size=3),
    TEXT,
    st.lists(TEXT.map(lambda text: {"role": "assistant", "content": text}), max_size=1),
)
PRIVILEGED = st.none() | TEXT | st.lists(TURN, max_size=3)
SHARED = {
    placement: collator(
        TOOLS,
        pad_is_eos=True,
        max_length=None,
        max_privileged_length=9,
        allow_privileged_cut=True,
        privileged_placement=placement,
    )
    for placement in ("messages", "user", "system")
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(CONVERSATION, PRIVILEGED), min_size=1, max_size=4), st.sampled_from(sorted(SHARED)))
def test_every_row_of_a_batch_is_what_it_is_alone(pairs, placement):
    c = SHARED[placement]
    rows = [{"messages": messages, "privileged_messages": pi} for messages, pi in pairs]
    before = copy.deepcopy(rows)
    batch = c(rows)
    assert rows == before
    assert [batch[key].tolist() for key in ("prompts", "completions")] == [
        c(rows)[key].tolist() for key in ("prompts", "completions")
    ]
    for i, original in enumerate(rows):
        alone = c([original])
        for ids, mask in [
            ("prompts", "prompt_attention_mask"),
            ("teacher_prompts", "teacher_prompt_attention_mask"),
            ("completions", "completion_mask"),
        ]:
            assert alone[mask].all()
            assert rows_of(batch, ids, mask)[i] == alone[ids][0].tolist()
        answer = original["messages"][-1] if original["messages"][-1]["role"] == "assistant" else None
        expected = [*c.tokenizer(answer["content"])["input_ids"], IM_END] if answer else []
        assert rows_of(batch, "completions", "completion_mask")[i] == expected
        if not batch["has_privileged"][i]:
            assert alone["teacher_prompts"].tolist() == alone["prompts"].tolist()
        assert batch["privileged_tokens"][i] <= 9
