"""Rows and settings of other projects: read as ours and said so, or refused with what to write instead."""

from __future__ import annotations

import json
import logging

import pytest
import yaml
from datasets import Dataset
from tiny import ROWS, byte_tokenizer
from trl.experimental.sdft import SDFTConfig

from pgkd_peft.cli.arguments import parse_train
from pgkd_peft.cli.trl_names import CONVERTED, ELSEWHERE, SAME
from pgkd_peft.data.check import validate_rows
from pgkd_peft.data.collator import DataCollatorForPrivilegedGKD
from pgkd_peft.data.formats import messages_of
from pgkd_peft.data.load import give_privileged, load_rows
from pgkd_peft.errors import ConfigError, DataError

KEY = "privileged_messages"
NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def load(tmp_path, rows, **kwargs):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return load_rows(path, **kwargs)


CALL = {"name": "find", "arguments": {"word": "zeta"}}
FORMATS = {
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "R"},
                {"from": "gpt", "value": "A", "weight": 1},
            ],
            "id": "x1",
        },
        [
            turn("system", "S"),
            turn("user", "Q"),
            turn("assistant", "", tool_calls=[CALL]),
            turn("tool", "R"),
            turn("assistant", "A", weight=1),
        ],
    ),
    "ShareGPT, system beside": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
        [turn("system", "S"), turn("user", "Q"), turn("assistant", "A")],
    ),
    "ShareGPT in messages": (
        {"messages": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]},
        [turn("user", "Q"), turn("assistant", "A")],
    ),
    "ShareGPT as text": (
        {"conversations": '[{"from": "human", "value": "Q"}]'},
        [turn("user", "Q")],
    ),
    "conversation": ({"conversation": [turn("user", "Q"), turn("assistant", "A")]}, None),
    "Alpaca": (
        {"instruction": "I", "input": "in", "output": "O", "history": [["q", "a"]], "system": ""},
        [turn("user", "q"), turn("assistant", "a"), turn("user", "I\n\nin"), turn("assistant", "O")],
    ),
    "Alpaca without answer": ({"instruction": "I", "input": None, "output": ""}, [turn("user", "I")]),
    "prompt/completion": ({"prompt": "P", "completion": "C"}, [turn("user", "P"), turn("assistant", "C")]),
    "prompt/completion of turns": (
        {"prompt": [turn("system", "S"), turn("user", "P")], "completion": [turn("assistant", "C")]},
        [turn("system", "S"), turn("user", "P"), turn("assistant", "C")],
    ),
    "SDFT": ({"prompt": [turn("user", "P")], "privileged_context": "hint"}, [turn("user", "P")]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_other_formats_are_read_and_it_is_said(tmp_path, caplog, name):
    row, messages = FORMATS[name]
    messages = messages or row["conversation"]
    with caplog.at_level(logging.WARNING, "pgkd_peft"):
        dataset = load(tmp_path, [row])
    assert dataset[0]["messages"] == messages
    assert (f"{name.split(',')[0].split(' ')[0]} rows" in caplog.text) or name == "SDFT"
    if name == "SDFT":
        assert dataset[0][KEY] == "hint"
        assert "privileged_context (TRL's SDFT) is read as the PI" in caplog.text
    if name == "ShareGPT":
        assert "Not read: id." in caplog.text
    assert (
        validate_rows(dataset, DataCollatorForPrivilegedGKD(byte_tokenizer())).rows == 1
        if "find" not in str(row)
        else 1
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"conversations": [{"from": "oracle", "value": "Q"}]},
            r"conversations\[0\] is from 'oracle'; known are human",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "{"}]},
            r"conversations\[0\] is a call that is not JSON",
        ),
        ({"conversations": None}, "`conversations` is NoneType"),
        ({"instruction": "I", "output": 4}, "`output` is int 4; give text"),
        ({"instruction": "I", "output": "O", "history": [["q"]]}, r"history\[0\] is list .* give a pair of texts"),
        ({"prompt": "", "completion": "C"}, "`prompt` is empty"),
        (
            {"prompt": "P", "completion": [turn("user", "C")]},
            r"completion\[0\] is dict .*an assistant's turn is wanted",
        ),
        ({"conversations": [turn("system", "S")], "system": "T"}, "both have a system turn"),
    ],
)
def test_a_row_that_cannot_be_converted_is_refused_by_number(tmp_path, row, words):
    good = {name: FORMATS["ShareGPT"][0]["conversations"] if name == "conversations" else "text" for name in row}
    good |= {"system": ""} if "system" in row else {}
    good |= {"history": []} if "history" in row else {}
    with pytest.raises(DataError, match=f"(?s)1 of 2 rows cannot be used.*row 1: .*{words}") as error:
        load(tmp_path, [good, row])
    assert error.value.rows == (1,)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "2+2?", "answer": "4", "rationale": "Two and two."}, ["2+2?", "4", "Two and two."]),
        ({"Question text": "2+2?", "The \"short\" 'Answer'": "4", "my context": "Use it."}, ["2+2?", "4", "Use it."]),
        ({"id": "7", "Problem": "2+2?", "expected_answer": "4"}, ["2+2?", "4", None]),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, ["2+2?", "4", None]),
        ({"prompt": "2+2?", "completion": "4", "label": "good"}, ["2+2?", "4", None]),
        ({"text": "2+2?"}, ["2+2?", None, None]),
        ({"my dialogs": [turn("user", "2+2?"), turn("assistant", "4")], "hint": "Add."}, ["2+2?", "4", "Add."]),
        ({"mesages": [turn("user", "2+2?"), turn("assistant", "4")]}, ["2+2?", "4", None]),
    ],
)
def test_an_unknown_format_is_refused_with_a_mapping_that_works(tmp_path, row, expected):
    with pytest.raises(DataError, match="has no column `messages`") as error:
        load(tmp_path, [row])
    message = str(error.value)
    columns = yaml.safe_load(message[message.index("columns:\n") :])["columns"]
    dataset = load(tmp_path, [row], columns=columns)
    turns = [message["content"] for message in dataset[0]["messages"]]
    question, answer, hint = expected
    assert turns == [text for text in (question, answer) if text is not None]
    assert dataset[0].get(KEY) == hint
    if "label" in row:
        assert "Rated rows: keep the good ones alone" in message


def test_rows_passed_in_python_are_read_alike():
    rows = [FORMATS["SDFT"][0]]
    for given in (rows, Dataset.from_list(rows)):
        assert messages_of(given, "train_dataset", "hint_column")[0]["hint_column"] == "hint"
    assert messages_of({"a": rows}, "eval_dataset", KEY)["a"][0]["messages"] == [turn("user", "P")]
    assert messages_of(ROWS, "train_dataset", KEY) is ROWS
    assert messages_of(None, "eval_dataset", KEY) is None


# ---- text files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.txt", "\ufeffOne?\n\n  - Two? \r\nThree", ["One?", "- Two?", "Three"]),
        ("a.md", "# Questions\n\n- One?\n  more\n* Two?\n3. Three\n", ["One?\nmore", "Two?", "Three"]),
        ("a.md", "# Questions\n\nOne,\nstill one?\n\nTwo?\n", ["One,\nstill one?", "Two?"]),
        ("a.txt", "One\u2028still one?\r\nTwo?\x0c\r", ["One\u2028still one?", "Two?"]),
        ("a.md", "#one is a tag?\n\n## Heading\n\n#\nTwo?\n", ["#one is a tag?", "Two?"]),
        ("a.md", "- One?\n#two is a tag\n", ValueError),
        ("a.md", "Why?\n\n```python\n# one\n\nx = 1\n```\n", ValueError),
        ("a.txt", json.dumps(ROWS[0]) + "\n", None),  # JSON lines under another name
    ],
)
def test_a_text_file_is_a_list_of_prompts(tmp_path, name, text, prompts):
    (tmp_path / name).write_bytes(text.encode())
    if prompts is ValueError:
        with pytest.raises(DataError, match=r"a.md line \d: (neither a list item|code may hold blank lines)"):
            load_rows(tmp_path / name)
        return
    dataset = load_rows(tmp_path / name)
    if prompts is None:
        assert dataset[0]["messages"] == ROWS[0]["messages"]
    else:
        assert [row["messages"] for row in dataset] == [[turn("user", prompt)] for prompt in prompts]


def test_text_that_is_no_prompt_is_named_and_a_folder_s_readme_is_no_data(tmp_path):
    (tmp_path / "a.md").write_text("- One?\n\nAnd what of this?\n")
    with pytest.raises(DataError, match=r"row 1: a.md line 3: neither a list item, nor a heading"):
        load_rows(tmp_path / "a.md")
    (tmp_path / "b.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="is empty"):
        load_rows(tmp_path / "b.txt")
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]))
    assert len(load_rows(tmp_path)) == 1


def test_a_text_file_is_the_pi_of_rows_without_any(tmp_path):
    (tmp_path / "tone.md").write_text("\ufeffBe brief.\n", "utf-8")
    file = str(tmp_path / "tone.md")
    bare = [{"messages": [turn("user", q)]} for q in ("One?", "Two?")]
    rows = give_privileged(load(tmp_path, bare), file, KEY)
    assert rows[KEY] == ["Be brief.", "Be brief."]
    empty = give_privileged(load(tmp_path, [{**bare[0], KEY: ""}, {**bare[1], KEY: None}]), file, KEY)
    assert empty[KEY] == ["Be brief.", "Be brief."]
    own = load(tmp_path, [{**bare[0], KEY: "own"}, bare[1]])
    with pytest.raises(ConfigError, match="1 of 2 rows have PI of their own"):
        give_privileged(own, file, KEY)
    assert give_privileged(own, file, KEY, unless_given=True)[KEY] == ["own", None]
    (tmp_path / "no.txt").write_text("\n")
    for name, words in (("no.txt", "is empty"), ("tone.pdf", "give a text file"), ("none.md", "which is no file")):
        with pytest.raises(ValueError, match=words):
            give_privileged(own, str(tmp_path / name), KEY)


# ---- settings -------------------------------------------------------------------------------------------------------


def parsed(*flags: str):
    return parse_train([*NEEDED, *flags])[2]


def test_settings_of_sdft_that_mean_the_same_are_read(caplog, tmp_path):
    config = parsed(
        *("--distillation_alpha", "0.25", "--max-completion-length=32", "--num_loss_tokens_to_skip", "3"),
        *("--distillation_topk", "50", "--teacher_model_kind", "ema", "--teacher_update_rate", "0.05"),
        *("--teacher_prompt_template", "{prompt} ({privileged_context})", "--use_vllm", "false", "--top_p", "1.0"),
    )
    assert (config.beta, config.max_new_tokens, config.skip_first_tokens) == (0.25, 32, 3)
    assert (config.loss_top_k, config.teacher_adapter, config.ema_decay) == (50, "ema", 0.95)
    assert (config.privileged_template, config.privileged_placement) == ("{question} ({privileged})", "user")
    assert {"beta", "ema_decay", "privileged_placement"} <= set(config.given)
    assert "distillation_alpha (TRL) is read as beta='0.25'" in caplog.text
    recipe = tmp_path / "r.yaml"
    recipe.write_text("alpha: 0.5\nteacher_model_kind: live\nmax_completion_length: 16\nlmbda: 1\n")
    config = parsed("--config", str(recipe), "--beta", "0.75")  # a flag goes before the recipe
    assert (config.beta, config.teacher_adapter, config.max_new_tokens) == (0.75, "shared", 16)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max_prompt_length", "256"], "max_length bounds prompt and answer together"),
        (["--generate_from_teacher", "true"], "set seq_kd to true and lmbda to 0"),
        (["--generate_from_teacher"], "set seq_kd to true and lmbda to 0"),
        (["--use_vllm", "true"], "rollout_engine"),
        (["--vllm_mode", "colocate"], "rollout_engine"),
        (["--top_p", "0.9"], "sampled from the student as it is"),
        (["--distillation_mode", "sampled_token"], "over the whole vocabulary"),
        (["--teacher_model_kind", "other"], "known are base, live, ema"),
        (["--teacher_update_rate", "fast"], "ema_decay"),
        (["--alpha", "0.5", "--beta", "0.5"], "--alpha is --beta here"),
        (["--alpha", "2"], "beta is 2"),
        (["--teacher_model_name_or_path", "big"], "Set share_student_as_teacher=False"),
    ],
)
def test_settings_without_a_counterpart_say_what_to_set(flags, words):
    with pytest.raises(ConfigError, match=words):
        parsed(*flags)


def test_a_recipe_s_settings_without_a_counterpart_are_told_together(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("max_prompt_length: 9\ntop_k: 5\nalpha: 0.1\nbeta: 0.2\nnum_iterations: 1\n")
    with pytest.raises(
        ConfigError, match=r"(?s)max_prompt_length is .*top_k is .*alpha is beta here, which is given too"
    ):
        parsed("--config", str(recipe))


def test_every_setting_of_sdft_is_ours_read_or_answered():
    import dataclasses

    from pgkd_peft.cli.arguments import TRAIN_ARGUMENTS

    ours = {f.name for kind in TRAIN_ARGUMENTS for f in dataclasses.fields(kind)}
    theirs = {f.name for f in dataclasses.fields(SDFTConfig)}
    assert len(theirs - ours) > 20
    known = {*ours, *SAME, *CONVERTED, *ELSEWHERE}
    assert {name for name in theirs - known if not name.startswith("vllm_")} == set()
    assert not ours & {*SAME, *CONVERTED, *ELSEWHERE}, "one of ours by now"
    assert set(SAME.values()) <= ours
