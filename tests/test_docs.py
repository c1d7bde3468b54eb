"""What the README says exists: commands, flags, recipes, names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from pgkd_peft.arguments import TRAIN_ARGUMENTS, Parser
from pgkd_peft.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


def test_commands_in_the_readme_exist():
    commands = {name for block in blocks("bash") for name in re.findall(r"^pgkd (\w+)", block, flags=re.M)}
    assert {"train", "inspect", "eval", "merge", "report"} <= commands <= set(COMMANDS)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert {name for block in blocks("bash") for name in re.findall(r"^make (\w+)", block, flags=re.M)} <= targets


def test_flags_of_train_in_the_readme_exist():
    known = {option for action in Parser(TRAIN_ARGUMENTS, "pgkd train")._actions for option in action.option_strings}
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines() if "pgkd train" in line]
    used = {flag for line in lines for flag in re.findall(r"--\w+", line)}
    assert used
    assert used <= known


def test_the_recipe_in_the_readme_parses(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    (text,) = blocks("yaml")
    recipe.write_text(text)
    assert yaml.safe_load(text)["columns"]
    data, model, config = Parser(TRAIN_ARGUMENTS, "pgkd train").parse(["--config", str(recipe)])
    assert data.columns["privileged_messages"].startswith("A worked solution")
    assert (config.lmbda, config.learning_rate) == (1.0, 1e-4)
    assert model.model_name_or_path


def test_python_in_the_readme_compiles_and_its_names_exist():
    import pgkd_peft

    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "pgkd_peft":
                assert all(hasattr(pgkd_peft, alias.name) for alias in node.names)


def test_example_row_in_the_readme_is_a_row():
    import json

    from tiny import byte_tokenizer

    from pgkd_peft import DataCollatorForPrivilegedGKD

    (text,) = blocks("json")
    batch = DataCollatorForPrivilegedGKD(byte_tokenizer())([json.loads(text)])
    assert batch["teacher_prompts"].shape[1] > batch["prompts"].shape[1]


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_script_that_parses(recipe):
    text = recipe.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env -S pgkd train --config\n")
    assert recipe.stat().st_mode & 0o111, "not executable"
    Parser(TRAIN_ARGUMENTS, "pgkd train").parse(["--config", str(recipe), "--output_dir", "unused"])


def test_the_two_example_scripts_run(tmp_path, llama_path):
    import json
    import os
    import subprocess
    import sys

    from tiny import ROWS

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    scripts = ROOT / "examples" / "scripts"
    full = ["--model_name_or_path", llama_path, "--dataset_name", str(rows), "--output_dir", str(tmp_path / "run")]
    full += ["--max_steps", "1", "--max_new_tokens", "4", "--report_to", "none"]
    for script, flags in (
        ("privileged_gkd_smoke.py", ["--model", llama_path]),
        ("privileged_gkd.py", full),
    ):
        command = [sys.executable, str(scripts / script), *flags]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
