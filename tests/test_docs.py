"""What README and docs/ say exists, and works: commands, flags, recipes, settings, messages, names, links."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import ROWS

from pgkd_peft import cli
from pgkd_peft.cli.arguments import TRAIN_ARGUMENTS, Parser
from pgkd_peft.cli.eval import EvalArguments
from pgkd_peft.data.feedback import load_module

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import refresh  # noqa: E402

PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
README = PAGES["README.md"]
EACH_PAGE = pytest.mark.parametrize("page", PAGES)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, flags=re.S | re.M)


def commands(text: str) -> list[str]:
    """The `pgkd` commands of a page: in shell blocks, after `$` in recorded terminals, and in running text."""
    lines = [line.strip() for block in blocks(text, "bash") for line in block.splitlines()]
    lines += [line for block in blocks(text, "console") for line in re.findall(r"^\$ (.*)", block, flags=re.M)]
    lines += re.findall(r"`(pgkd [^`]+)`", text)
    lines += re.findall(r"&& (pgkd [^`&\n]+)", text)
    return [line.split(" #")[0] for line in lines if line.startswith("pgkd ")]


@functools.cache
def help_of(command: str) -> str:
    """What `pgkd COMMAND --help` prints; inspect and bake take the flags of train as well."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main([command, "--help"]) == 0
        if command in ("inspect", "bake"):
            cli.main(["train", "--help"])
    return printed.getvalue()


# ---- commands ------------------------------------------------------------------------------------------------------


def test_every_command_is_in_the_readme():
    assert {line.split()[1] for line in commands(README)} >= set(cli.COMMANDS)


@EACH_PAGE
def test_commands_and_flags_exist(page):
    for line in commands(PAGES[page]):
        words = shlex.split(line)
        if words[1] in ("COMMAND", "--help", "--version"):
            continue
        assert words[1] in cli.COMMANDS, line
        for flag in re.findall(r"--[\w-]+", line):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(words[1])), f"{flag} of: {line}"


@EACH_PAGE
def test_make_targets_exist(page):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    shell = "\n".join(blocks(PAGES[page], "bash") + blocks(PAGES[page], "console"))
    assert set(re.findall(r"^(?:\$ )?make (\w+)", shell, flags=re.M)) <= targets


@EACH_PAGE
def test_recipes_and_files_that_are_named_exist(page):
    names = re.findall(r"pgkd recipes cp (\w+)", PAGES[page])
    paths = re.findall(r"(?<![\w/.-])((?:recipes|tests|examples|docs|pgkd_peft)/[\w./-]*\w)", PAGES[page])
    for path in [*(f"recipes/{name}.yaml" for name in names), *paths]:
        assert path == "recipes/NAME.yaml" or (ROOT / path).exists(), path  # NAME: the command's own usage line


def test_the_readme_names_a_recipe():
    assert re.findall(r"pgkd recipes cp (\w+)", README)


@EACH_PAGE
def test_settings_that_are_named_exist(page):
    """Inline code such as `beta: 0.0` is a setting of a recipe."""
    known = set(yaml_names()) | {"role", "messages", "content"}
    for name in re.findall(r"`([a-z_]+): [^`\s]+`", PAGES[page]):
        assert name in known, name


def yaml_names() -> list[str]:
    return [action.dest for action in Parser(TRAIN_ARGUMENTS, "pgkd train")._actions]


def test_eval_flags_of_the_concepts_page_exist():
    flags = {flag.replace("-", "_") for flag in re.findall(r"`--([\w-]+)`", PAGES["concepts.md"])}
    assert len(flags) > 1
    assert flags <= set(EvalArguments.__dataclass_fields__)


def test_settings_of_the_concepts_page_exist():
    tables = re.findall(r"^\| `(\w+)` \|", PAGES["concepts.md"], flags=re.M)
    found = {name for name in tables if "_" in name or name in ("temperature",)}
    assert {"temperature", "loss_temperature"} <= found
    assert found - {"no_pi"} <= set(yaml_names())


# ---- the README's examples, run ------------------------------------------------------------------------------------


def test_the_recipe_in_the_readme_parses(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    (text,) = blocks(README, "yaml")
    recipe.write_text(text)
    assert yaml.safe_load(text)["columns"]
    data, model, config = Parser(TRAIN_ARGUMENTS, "pgkd train").parse(["--config", str(recipe)])
    assert data.columns["privileged_messages"].startswith("A worked solution")
    assert (config.lmbda, config.learning_rate) == (1.0, 1e-4)
    assert model.model_name_or_path


def test_example_row_in_the_readme_is_a_row():
    from tiny import byte_tokenizer

    from pgkd_peft import DataCollatorForPrivilegedGKD

    (text,) = blocks(README, "json")
    batch = DataCollatorForPrivilegedGKD(byte_tokenizer())([json.loads(text)])
    assert batch["teacher_prompts"].shape[1] > batch["prompts"].shape[1]


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, llama_path, capsys):
    """The block with MODEL and rows.jsonl, on a tiny model, one step long."""
    (block,) = [block for block in blocks(README, "bash") if "MODEL" in block and "rows.jsonl" in block]
    (row,) = blocks(README, "json")
    line = json.dumps(json.loads(row)) + "\n"
    for name in ("rows.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_text(line * 4)
    monkeypatch.chdir(tmp_path)
    short = {
        "train": ["--max_steps", "1", "--max_new_tokens", "4", "--bf16", "false", "--rollout_log_max_new_tokens", "4"],
        "eval": ["--max_new_tokens", "4"],
    }
    ran = []
    for command in re.findall(r"^pgkd (.*?)(?: +#.*)?$", block, flags=re.M):
        words = shlex.split(command.replace("MODEL", llama_path))
        code = cli.main([*words, *short.get(words[0], [])])
        assert code == 0, capsys.readouterr().err
        ran.append(words[0])
    assert ran == ["inspect", "train", "eval", "merge", "report", "runs", "report"]
    assert (tmp_path / "runs" / "mine-merged" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert "recovered gap" in capsys.readouterr().out


def test_recipes_are_listed_and_copied_as_the_readme_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name in re.findall(r"pgkd recipes cp (\w+)", README):
        assert name in listed
        assert cli.main(["recipes", "cp", name]) == 0
        assert (tmp_path / f"{name}.yaml").is_file()


def test_the_two_example_scripts_run(tmp_path, llama_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    scripts = ROOT / "examples" / "scripts"
    full = ["--model_name_or_path", llama_path, "--dataset_name", str(rows), "--output_dir", str(tmp_path / "run")]
    full += ["--max_steps", "1", "--max_new_tokens", "4", "--report_to", "none"]
    for script, flags in (
        ("privileged_gkd_smoke.py", ["--model_name_or_path", llama_path]),
        ("privileged_gkd.py", full),
    ):
        command = [sys.executable, str(scripts / script), *flags]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_the_example_script_hands_its_flags_on(monkeypatch, tmp_path):
    class Reached(Exception):
        pass

    def record(**kwargs):
        seen.update(kwargs)
        raise Reached

    seen: dict = {}
    monkeypatch.setattr("pgkd_peft.trainer.PrivilegedSelfDistillTrainer", record)
    script = load_module(str(ROOT / "examples" / "scripts" / "privileged_gkd.py"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--model_name_or_path", "S", "--dataset_name", str(rows), "--output_dir", str(tmp_path / "run")]
    flags += ["--teacher_model_name_or_path", "T", "--share_student_as_teacher", "false", "--report_to", "none"]
    monkeypatch.setattr("sys.argv", ["privileged_gkd.py", *flags, "--load_in_8bit"])
    with pytest.raises(Reached):
        script.main()
    assert (seen["model"], seen["teacher_model"]) == ("S", "T")
    assert seen["quantization_config"].load_in_8bit


# ---- names and messages --------------------------------------------------------------------------------------------


@EACH_PAGE
def test_python_compiles_and_its_names_exist(page):
    import importlib

    signatures = page == "api.md"  # which are no statements
    for block in [] if signatures else blocks(PAGES[page], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pgkd_peft"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_api_reference_is_up_to_date():
    made = refresh.api_markdown()
    assert PAGES["api.md"] == made, "run: python docs/refresh.py api"
    assert made.count("\n## ") > 20


def test_api_reference_has_all_public_names():
    import pgkd_peft

    for name in set(pgkd_peft.__all__) - {"__version__"}:
        assert f"## `pgkd_peft.{name}`" in PAGES["api.md"]
    for module, names in refresh.PUBLIC.items():
        for name in names:
            assert ast.get_docstring(refresh._definitions(module)[name]), f"{module}.{name} has no docstring"


def templates() -> list[str]:
    """Every string of the package, with … where a value stands."""
    found = []
    for path in (ROOT / "pgkd_peft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append(re.sub("…+", "…", "".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    told = [" ".join(block.split()) for block in blocks(PAGES["troubleshooting.md"], "text")]
    assert len(told) > 25
    spoken = templates()
    unknown = [message for message in told if not any(message in template for template in spoken)]
    assert not unknown


def test_a_message_that_nobody_prints_would_be_noticed():
    assert not any("the flux capacitor is empty" in template for template in templates())
    assert any("the prompt has … tokens, max_length is …" in template for template in templates())


# ---- links and traces ----------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EACH_PAGE
def test_links_lead_somewhere(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    text = re.sub(r"`[^`\n]*`", "", PAGES[page])
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text)
    for link in filter(None, (part for pair in links for part in pair)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path) if path else folder / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@EACH_PAGE
def test_no_trace_of_the_machine_that_wrote_it(page):
    assert not re.search(r"(?<![\w.~])/(root|work|tmp|home|opt|Users)\b", PAGES[page])


def test_the_readme_links_the_docs():
    for name in ("concepts", "troubleshooting", "walkthrough", "api"):
        assert f"(docs/{name}.md)" in README


def test_the_walkthrough_has_what_its_commands_print():
    terminals = blocks(PAGES["walkthrough.md"], "console")
    assert len(terminals) >= 6
    for terminal in terminals:
        assert not terminal.splitlines()[-1].startswith("$ "), f"no output: {terminal}"
        assert "Traceback" not in terminal
    text = "\n".join(terminals)
    for sign in ("recovered gap", "KL(trained || merged)", "teacher prompt"):
        assert sign in text
