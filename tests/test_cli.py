"""The command line as a user meets it: what it prints, what it writes, and with which exit code it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import ROWS, TINY_RUN, save_tiny

import pgkd_peft
from pgkd_peft import cli
from pgkd_peft.cli.arguments import TRAIN_ARGUMENTS, Parser, lora_config, parse_train
from pgkd_peft.cli.eval import EvalArguments
from pgkd_peft.cli.recipes import purpose, recipes
from pgkd_peft.config_checks import HARMLESS, REFUSED
from pgkd_peft.errors import ConfigError

REPO = Path(pgkd_peft.__file__).parent.parent


def write_rows(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture
def recipe(tmp_path, llama_path):
    """Write a recipe for a tiny run; keyword arguments change it. Returns its path."""

    def write(**changes):
        settings = {
            "model_name_or_path": llama_path,
            "dataset_name": write_rows(tmp_path / "rows.jsonl"),
            "output_dir": str(tmp_path / "run"),
            **TINY_RUN,
            "learning_rate": "1e-3",
            "lmbda": 1.0,
            "save_strategy": False,  # what YAML makes of a bare `no`
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**settings, **changes}), "utf-8")
        return str(path)

    return write


def python(*args, **env):
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, **env},
        timeout=120,
        check=False,
    )


# ---- without a command ---------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from pgkd_peft import cli; assert cli.main(['--help']) == 0; assert cli.main([]) == 0;"
        "assert cli.main(['--version']) == 0; assert cli.main(['no-such-command']) == 2;"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'numpy', 'peft'} & set(sys.modules)))"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    assert result.stdout.count("usage: pgkd COMMAND") == 2
    for name in cli.COMMANDS:
        assert f"  {name} " in result.stdout
    assert f"pgkd-peft {pgkd_peft.__version__}" in result.stdout


def test_python_m_is_the_same_command():
    result = python("-m", "pgkd_peft", "trian")
    assert result.returncode == 2
    assert result.stderr == "pgkd: unknown command 'trian'; did you mean train? `pgkd --help` lists them.\n"
    assert result.stdout == ""


def test_an_unknown_command_like_none_is_told_so(capsys):
    assert cli.main(["xyzzy"]) == 2
    assert capsys.readouterr().err == "pgkd: unknown command 'xyzzy'. `pgkd --help` lists them.\n"


def test_every_command_that_is_listed_exists(capsys):
    assert len(cli.COMMANDS) >= 8
    for name in cli.COMMANDS:
        assert cli.main([name, "--help"]) == 0
        assert f"usage: pgkd {name}" in capsys.readouterr().out


def test_an_interrupt_ends_with_its_signal(monkeypatch, capsys):
    def stop(argv):
        error = KeyboardInterrupt("saved; go on with --resume")
        error.signum = 15
        raise error

    monkeypatch.setattr("pgkd_peft.cli.recipes.main", stop)
    assert cli.main(["recipes"]) == 143
    assert "go on with --resume" in capsys.readouterr().err


# ---- arguments -----------------------------------------------------------------------------------------------------


def test_a_recipe_and_flags_over_it(recipe):
    path = recipe(
        seed=7,
        weight_decay="1e-2",
        lora_target_modules=["q_proj"],
        columns={"messages": "{{ chat }}"},
        eval_strategy=False,
        warmup_steps=3,
    )
    data, model, config = parse_train(["--config", path, "--learning_rate", "3e-4", "--lora-r=8", "--normalize_beta"])
    assert config.learning_rate == 3e-4
    assert (config.weight_decay, config.seed, config.warmup_steps) == (0.01, 7, 3)
    assert config.normalize_beta is True
    assert config.eval_strategy == "no"
    assert config.save_strategy == "no"
    assert data.columns == {"messages": "{{ chat }}"}
    lora = lora_config(model)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (8, 32, 0.0, {"q_proj"})
    assert data.told["learning_rate"] == 3e-4
    assert data.told["seed"] == 7
    assert "beta" not in data.told


def test_the_default_lora_is_left_to_the_trainer(recipe):
    _, model, config = parse_train(["--config", recipe()])
    assert lora_config(model) is None
    assert config.model_init_kwargs == {} or config.model_init_kwargs is None
    _, model, _ = parse_train(["--config", recipe(), "--lora_target_modules", "all-linear", "--lora_alpha", "64"])
    assert lora_config(model).target_modules == "all-linear"


def test_dtype_and_revision_reach_the_model(recipe):
    _, _, config = parse_train(["--config", recipe(dtype="float32", model_revision="v1")])
    assert config.model_init_kwargs == {"dtype": "float32", "revision": "v1"}


@pytest.mark.parametrize("name", ["lora_r", "lora_dropout", "lora_modules_to_save"])
def test_an_adapter_brings_its_own_lora(tmp_path, recipe, name):
    (tmp_path / "adapter_config.json").write_text("{}")
    value = {"lora_r": 4, "lora_dropout": 0.1, "lora_modules_to_save": ["lm_head"]}[name]
    _, model, _ = parse_train(["--config", recipe(model_name_or_path=str(tmp_path), **{name: value})])
    with pytest.raises(ConfigError, match=name):
        lora_config(model)


def test_all_faults_of_a_recipe_at_once(recipe):
    path = recipe(learning_rates=1, teacher_adaptr="ema", max_steps="many", teacher_adapter="disable", lmbda={"a": 1})
    with pytest.raises(ConfigError) as error:
        parse_train(["--config", path])
    text = str(error.value)
    for line in (
        "unknown key 'learning_rates'; did you mean learning_rate?",
        "unknown key 'teacher_adaptr'; did you mean teacher_adapter?",
        "max_steps: 'many' is given, expected is a whole number",
        "teacher_adapter: 'disable' is given, accepted are disabled, shared, initial, ema; did you mean disabled?",
        "lmbda: a mapping is given, expected is a number",
    ):
        assert f"\n  {line}" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset", "rows.jsonl"], "unknown flag --dataset; did you mean --dataset_name?"),
        (["--model", "some/model"], "unknown flag --model; did you mean --model_name_or_path?"),
        (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean --learning_rate?"),
        (["--learning-rates=1"], "unknown flag --learning-rates; did you mean --learning_rate?"),
        (["stray"], "unexpected argument 'stray'"),
        (["--max_steps", "x"], "invalid int value: 'x'"),
        (["--teacher_adapter", "live"], "invalid choice: 'live'"),
        (["--lmbda", "2"], "lmbda is 2.0"),
        (["--use_peft", "false"], "use_peft is false"),
        (["--columns", "{"], "not JSON"),
        (["--columns", "[1]"], "must map"),
        (["--load_in_4bit", "--load_in_8bit"], "keep one"),
        (["--eval_strategy", "steps", "--save_strategy", "steps", "--load_best_model_at_end", "--save_steps", "3"], ""),
    ],
)
def test_flags_that_do_not_fit(recipe, capsys, flags, words):
    """No traceback, exit code 2, and what is wrong; the last case is a ValueError of Transformers."""
    assert cli.main(["train", "--config", recipe(), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pgkd: ")
    assert words in err


def test_abbreviated_flags_are_refused(recipe, capsys):
    """`--temp` could mean another field in the next release."""
    assert cli.main(["train", "--config", recipe(), "--temp", "0.5"]) == 2
    assert "unknown flag --temp" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not valid YAML"),
        ("- a\n- b", "holds list"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("env: 3", "env is 3"),
        (None, "pgkd recipes"),
    ],
)
def test_recipes_that_cannot_be_read(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        parse_train(["--config", str(path)])


def test_a_recipe_sets_the_environment(recipe, monkeypatch):
    monkeypatch.setenv("PGKD_TEST", "before")
    parse_train(["--config", recipe(env={"PGKD_TEST": 3})])
    assert os.environ["PGKD_TEST"] == "3"


def test_what_is_missing_is_told_at_once(capsys):
    assert cli.main(["train"]) == 2
    err = capsys.readouterr().err
    assert "--model_name_or_path" in err
    assert "--dataset_name" in err


# ---- train, eval ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder made by `pgkd train`, with columns mapped from question and answer, and its held-out file."""
    folder = tmp_path_factory.mktemp("trained")
    model = save_tiny(folder / "model")
    rows = [{"question": f"What is {i} plus {i}?", "gold": str(2 * i), "group": i // 2} for i in range(6)]
    (folder / "data").mkdir()
    write_rows(folder / "data" / "train.jsonl", rows[:4])
    write_rows(folder / "data" / "test.jsonl", rows[4:])
    recipe = {
        "model_name_or_path": model,
        "dataset_name": str(folder / "data"),
        "columns": {
            "messages": [
                {"role": "user", "content": "{{ question }}"},
                {"role": "assistant", "content": "It is {{ gold }}."},
            ],
            "privileged_messages": "It is {{ gold }}.",
            "answer": "{{ gold }}",
        },
        "output_dir": str(folder / "run"),
        **TINY_RUN,
        "learning_rate": "5e-2",
        "privileged_placement": "user",
        "save_strategy": "steps",
        "save_steps": 1,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    assert cli.main(["train", "--config", str(path)]) == 0
    return folder


def test_train_writes_what_it_says(trained, capsys):
    run = trained / "run"
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "run.json"):
        assert (run / name).is_file(), name
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 2
    told = yaml.safe_load((run / "recipe.yaml").read_text("utf-8"))
    assert told["learning_rate"] == 0.05
    assert told["columns"]["answer"] == "{{ gold }}"
    assert parse_train(["--config", str(run / "recipe.yaml")])[2].learning_rate == 0.05


def test_a_run_is_neither_overwritten_nor_mixed(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    flags = ["--config", str(trained / "recipe.yaml"), "--output_dir", str(run)]
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert cli.main(["train", *flags]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert cli.main(["train", *flags, "--resume", "--max_steps", "3"]) == 0
    assert (run / "checkpoint-3").is_dir()
    first = ["--resume_from_checkpoint", str(run / "checkpoint-1")]
    assert cli.main(["train", *flags, *first, "--overwrite"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert cli.main(["train", "--output_dir", str(run), *first, "--max_steps", "2"]) == 0  # not from checkpoint-3
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert max(steps) == 2
    assert cli.main(["train", *flags, "--overwrite", "--max_steps", "1"]) == 0
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1"]


def test_eval_takes_its_rows_from_the_run(trained, tmp_path, capsys):
    """The test split of the data that was trained on, through the same columns and placement."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    neutral = write_rows(tmp_path / "neutral.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    text = tmp_path / "text.txt"
    text.write_text("It was a dark night. " * 3)
    flags = ["--neutral_dataset_name", neutral, "--text_file", str(text), "--group_key", "group"]
    assert cli.main(["eval", str(run), "--max_new_tokens", "5", *flags]) == 0
    results = json.loads((run / "eval_results.json").read_text())
    assert results["n"] == 2
    assert set(results["columns"]) == {"base", "teacher", "student", "student_with_pi"}
    assert results["drift"] > 0
    assert results["perplexity_base"] != results["perplexity_student"]
    answers = [json.loads(line) for line in (run / "eval_answers.jsonl").open()]
    assert [answer["prompt"] for answer in answers] == ["What is 4 plus 4?", "What is 5 plus 5?"]
    assert [answer["privileged"] for answer in answers] == ["It is 8.", "It is 10."]
    assert all(set(answer["answers"]) == set(results["columns"]) for answer in answers)
    out = capsys.readouterr().out
    assert "2 held-out rows" in out
    assert "Answers side by side" in out
    card = (run / "README.md").read_text("utf-8")
    assert card.count("## Evaluation (contains)") == 1
    assert "base with PI (teacher)" in card


def test_a_second_evaluation_replaces_its_section_of_the_card(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    card = run / "README.md"
    assert cli.main(["eval", str(run), "--max_new_tokens", "2", "--limit", "1"]) == 0
    first = card.read_text("utf-8")
    card.write_text(first + "\n## Kept\n\nmine\n", "utf-8")
    own = ["--scorer", "pgkd_peft.evaluation.scorers:at_most_five_words", "--out", str(run / "short.json")]
    assert cli.main(["eval", str(run), "--max_new_tokens", "2", *own]) == 0
    assert cli.main(["eval", str(run), "--max_new_tokens", "3"]) == 0
    text = card.read_text("utf-8")
    assert text.startswith(first[: first.index("## Evaluation")])
    assert text.count("## Evaluation (contains)") == 1
    assert text.count("## Evaluation (pgkd_peft.evaluation.scorers:at_most_five_words)") == 1
    assert "2 held-out rows, greedy, at most 3 tokens" in text
    assert "1 held-out rows" not in text
    assert "## Kept\n\nmine" in text
    assert (run / "short.answers.jsonl").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scorer", "bleu"], "scorer is 'bleu'"),
        (["--scorer", "choice"], "no letter from A to J"),
        (["--dataset_name", "nowhere.jsonl"], "no such file"),
        (["--group_key", "fact"], "group_key is 'fact'"),
        (["--hint_phrases", "("], "not a regular expression"),
        (["--text_file", "nowhere.txt"], "text_file"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--base_quantization", "fp4"], "fp4"),
        (["--scorers", "exact"], "did you mean --scorer?"),
    ],
)
def test_eval_refuses_before_a_model_is_loaded(trained, capsys, monkeypatch, flags, words):
    monkeypatch.setattr("pgkd_peft.cli.eval.load_student", None)
    assert cli.main(["eval", str(trained / "run"), *flags]) == 2
    assert words in capsys.readouterr().err


def test_eval_needs_an_adapter(tmp_path, capsys):
    assert cli.main(["eval"]) == 2
    assert "pgkd eval ADAPTER" in capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err


BAD_ROWS = [
    ROWS[0],
    {"messages": [{"role": "narrator", "content": "x"}]},
    {"messages": [{"role": "assistant", "content": "no question"}]},
    {"messages": []},
]


def test_bad_data_is_one_report_before_a_model_is_loaded(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pgkd_peft.construction.build_student", None)
    assert cli.main(["train", "--config", recipe(dataset_name=write_rows(tmp_path / "bad.jsonl", BAD_ROWS))]) == 2
    err = capsys.readouterr().err
    assert "3 of 4 rows cannot be used" in err
    for number in (1, 2, 3):
        assert f"row {number}:" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("text", "words"), [("", "is empty"), ('{"messages": [}\n', "line 1")])
def test_broken_files(recipe, tmp_path, capsys, text, words):
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    assert cli.main(["train", "--config", recipe(dataset_name=str(path))]) == 2
    assert words in capsys.readouterr().err


def test_a_mistake_ends_without_a_traceback_in_a_process_of_its_own(recipe):
    result = python("-m", "pgkd_peft", "train", "--config", recipe(learning_rates=3))
    assert result.returncode == 2
    assert "did you mean learning_rate?" in result.stderr
    assert "Traceback" not in result.stderr


# ---- merge, recipes ------------------------------------------------------------------------------------------------


def test_merge_passes_its_flags_on(monkeypatch, capsys):
    from pgkd_peft.export.merge import VerificationError

    calls = []
    monkeypatch.setattr("pgkd_peft.export.merge.merge_adapter", lambda *args, **kwargs: calls.append((args, kwargs)))
    flags = "--base original --dtype fp32 --prompts p.txt --tolerance 1e-3 --compare --force --push-to-hub me/it"
    assert cli.main(["merge", "run", "--out", "there", *flags.split()]) == 0
    args, kwargs = calls[0]
    assert args == ("run", "there")
    wanted = {"base": "original", "dtype": "fp32", "prompts": "p.txt", "tolerance": 1e-3, "push_to_hub": "me/it"}
    assert wanted.items() <= kwargs.items()
    assert kwargs["compare"] is kwargs["force"] is kwargs["verify"] is True
    assert cli.main(["merge", "run", "--out", "there", "--no-verify"]) == 0
    assert calls[1][1]["verify"] is False
    assert calls[1][1]["dtype"] == "bf16"

    def fail(*args, **kwargs):
        raise VerificationError("KL 0.1 is above the tolerance")

    monkeypatch.setattr("pgkd_peft.export.merge.merge_adapter", fail)
    assert cli.main(["merge", "run", "--out", "there"]) == 1
    assert "KL 0.1" in capsys.readouterr().err


def test_merge_scores_the_models_on_rows(trained, tmp_path):
    rows = [{**row, "answer": "no such answer"} for row in ROWS]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "merged"
    assert cli.main(["merge", str(trained / "run"), "--out", str(out), "--dtype", "fp32", "--score-data", data]) == 0
    report = json.loads((out / "merge_report.json").read_text())
    assert report["trained"]["score"] == 0.0


def test_export_passes_its_flags_on(monkeypatch):
    calls = []
    monkeypatch.setattr("pgkd_peft.export.publish.export_adapter", lambda *args, **kwargs: calls.append((args, kwargs)))
    flags = "--format gguf --gguf-type q8_0 --base-id org/base --base original"
    assert cli.main(["export", "run", "--out", "x.gguf", *flags.split()]) == 0
    assert calls[0][0] == ("run", "x.gguf")
    assert {"format": "gguf", "gguf_type": "q8_0", "base_id": "org/base", "base": "original"}.items() <= calls[0][
        1
    ].items()


@pytest.mark.parametrize("argv", [["merge", "run"], ["merge", "run", "--out", "o", "--dtype", "int4"], ["export"]])
def test_wrong_flags_of_merge_and_export(argv, capsys):
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.startswith("pgkd: ")


def test_recipes_are_listed_and_copied(tmp_path, capsys):
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert {"facts_cpu", "chatterbot_terse"} <= set(recipes())
    for name in (*recipes(), "bake/document_24gb"):
        assert f"  {name} " in out
    assert cli.main(["recipes", "cp", "facts_cpu", str(tmp_path)]) == 0
    copied = tmp_path / "facts_cpu.yaml"
    assert copied.read_text("utf-8") == recipes()["facts_cpu"].read_text("utf-8")
    assert os.access(copied, os.X_OK)
    assert cli.main(["recipes", "cp", "bake/prompt_t4", str(tmp_path)]) == 0
    assert "pgkd bake --config" in (tmp_path / "prompt_t4.yaml").read_text("utf-8")
    assert cli.main(["recipes", "cp", "facts_cpu", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main(["recipes", "cp", "fact_cpu", str(tmp_path / "x")]) == 2
    assert "did you mean facts_cpu?" in capsys.readouterr().err


@pytest.mark.parametrize("path", recipes().values(), ids=recipes())
def test_every_recipe_is_a_script_with_a_header_and_valid_settings(path, monkeypatch):
    monkeypatch.setattr("pgkd_peft.cli.arguments.model_path", lambda name: name)
    text = path.read_text("utf-8")
    assert text.startswith("#!/usr/bin/env -S pgkd train --config\n")
    assert os.access(path, os.X_OK)
    assert f"pgkd train --config recipes/{path.name}" in text
    assert len(purpose(path)) > 20
    data, _, config = parse_train(["--config", str(path)])
    assert data.dataset_name
    assert config.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", recipes().values(), ids=recipes())
def test_the_commands_in_a_recipe_s_header_are_valid(path, monkeypatch):
    monkeypatch.setattr("pgkd_peft.cli.arguments.model_path", lambda name: name)
    commands = [line.lstrip("# ").split("#")[0].split() for line in path.read_text().splitlines() if "  pgkd " in line]
    assert len(commands) >= 2
    monkeypatch.chdir(REPO)
    for program, command, *rest in commands:
        assert program == "pgkd"
        if command == "train":
            parse_train(rest)
        else:
            assert command == "eval"
            Parser([EvalArguments], "pgkd eval").parse(rest[1:])


def test_demo_end_to_end_on_a_tiny_model(tmp_path, llama_path, capsys):
    out = tmp_path / "demo"
    flags = ["--output_dir", str(out), "--model", llama_path, "--max_steps", "3", "--seed", "3"]
    assert cli.main(["demo", *flags]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert {"base", "teacher", "student", "recovered", "n", "drift", "seconds", "seed"} <= set(summary)
    assert summary["seed"] == 3
    assert summary["steps"] == 3
    assert summary["n"] == len((REPO / "examples" / "data" / "facts_heldout.jsonl").read_text().splitlines())
    assert summary["drift"] > 0
    printed = capsys.readouterr().out.replace("\n", "")
    for name in ("summary.json", "completions.jsonl", "eval_answers.jsonl"):
        assert str(out / name) in printed
        assert name == "completions.jsonl" or (out / name).is_file()
    assert "## Evaluation (contains)" in (out / "README.md").read_text("utf-8")
    assert cli.main(["demo", *flags]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["demo", *flags, "--overwrite"]) == 0


@pytest.mark.parametrize("flags", [["--steps", "3"], ["--max_steps", "0"], ["--model", "/nowhere/at/all"]])
def test_demo_refuses(flags, tmp_path, capsys):
    assert cli.main(["demo", "--output_dir", str(tmp_path / "d"), *flags]) == 2
    assert capsys.readouterr().err.startswith("pgkd: ")


# ---- help ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def help_of(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def read(command):
        assert cli.main([command, "--help"] if command else ["--help"]) == 0
        return capsys.readouterr().out

    return read


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_fits_into_80_columns_and_says_things_once(help_of, command):
    shown = help_of(command)
    assert max(map(len, shown.splitlines())) <= 80
    assert "default: None" not in shown
    for flag in re.findall(r"^  (--\w[\w-]*)", shown, flags=re.M):
        twin = flag.replace("_", "-") if "_" in flag else f"--{flag[2:].replace('-', '_')}"
        assert twin == flag or not re.search(rf"(?<![\w-]){twin}(?![\w-])", shown), twin


def test_help_of_train_begins_with_what_a_first_run_needs(help_of):
    shown = help_of("train")
    first, _, rest = shown.partition("\nmethod:\n")
    for flag in ("--model_name_or_path", "--dataset_name", "--output_dir", "--max_steps", "--learning_rate"):
        assert f"  {flag} " in first
        assert f"  {flag} " not in rest
    assert "2e-05" not in shown  # that of full fine-tuning, which a run without a rate does not take
    assert "--gap_filter, --no_gap_filter" in help_of("bake")
    assert "beta 0.0" in help_of("bake")  # what a bake sets otherwise than `pgkd train`


def test_help_of_train_lists_what_can_be_set_and_nothing_else(help_of):
    listed = set(re.findall(r"^  --(\w+)", help_of("train"), flags=re.M))
    fields = {field.name for kind in TRAIN_ARGUMENTS for field in dataclasses.fields(kind) if field.init}
    assert listed - {"config"} == fields - set(HARMLESS) - set(REFUSED)


def test_help_says_which_settings_are_chosen(help_of):
    sources = [Path(pgkd_peft.__file__).parent / name for name in ("automatic.py", "cli/train.py")]
    chosen = {name for path in sources for name in re.findall(r'\.choose\(\s*"(\w+)"', path.read_text())}
    assert len(chosen) > 8
    told = re.findall(r"^  --(\w+)(?:(?!^  --).)*?Default:", help_of("train"), flags=re.M | re.S)
    assert chosen - set(told) <= {"max_privileged_length"}  # 512, and more only where the PI is longer
