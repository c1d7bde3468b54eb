"""A user's mistake or a broken file ends with exit code 2, a line that names it and says why, and nothing changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import ROWS, TINY_RUN, byte_tokenizer, save_tiny, tiny_model
from transformers import T5Config, T5ForConditionalGeneration

import pgkd_peft
from pgkd_peft import cli
from pgkd_peft.errors import REASON_LENGTH, ConfigError, ModelError, explained, reason
from pgkd_peft.run.place import check_writable

REPO = Path(pgkd_peft.__file__).parent.parent


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4711\n"


ADAPTER, ADAPTER_CONFIG, WEIGHTS = "adapter_model.safetensors", "adapter_config.json", "model.safetensors"


NOWHERE = "/proc/nowhere/out"  # no disk that anybody can write to


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> SimpleNamespace:
    """A tiny model, rows, and a finished run of three steps at a constant learning rate."""
    folder = tmp_path_factory.mktemp("faults")
    model = save_tiny(folder / "model")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    settings = {**TINY_RUN, "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    recipe = folder / "recipe.yaml"
    said = {"model_name_or_path": model, "dataset_name": str(data), "output_dir": str(folder / "run"), **settings}
    recipe.write_text(yaml.safe_dump(said), "utf-8")
    assert cli.main(["train", "--config", str(recipe)]) == 0
    return SimpleNamespace(folder=folder, model=model, data=str(data), recipe=str(recipe), run=folder / "run")


@pytest.fixture
def says(capsys):
    """Run a command that must be refused: exit code 2, one message with these words, no traceback."""

    def check(argv, *words, code=2):
        capsys.readouterr()
        got = cli.main([str(arg) for arg in argv])
        err = capsys.readouterr().err
        assert got == code, err
        assert "Traceback" not in err
        message = err[err.index("pgkd: ") :]
        for word in words:
            assert str(word) in message, message
        return message

    return check


@pytest.fixture
def train(place, tmp_path, says):
    """`pgkd train` with these flags, which must be refused; nothing of a run may be there afterwards."""

    def check(*flags, words=(), model=place.model):
        out = tmp_path / "out"
        settings = [part for name, value in TINY_RUN.items() for part in (f"--{name}", str(value))]
        argv = ["train", "--model_name_or_path", model, "--dataset_name", place.data, "--output_dir", out, *settings]
        message = says([*argv, *flags], *words)
        assert not out.exists() or not [p.name for p in out.iterdir()]
        return message

    return check


@pytest.fixture
def no_model(monkeypatch):
    """Fail when a base is loaded."""

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("pgkd_peft.model.student.load_base", loaded)
    monkeypatch.setattr("pgkd_peft.export.adapter.load_base", loaded)


def copy(source: str | Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), "utf-8")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_reason_is_whole_and_in_one_line():
    error = RuntimeError("Error(s) in loading state_dict for X:\n\tsize mismatch for embed:  280 rows.\n\n  272 wanted")
    assert reason(error) == "Error(s) in loading state_dict for X: size mismatch for embed: 280 rows. 272 wanted"
    assert reason(KeyError("model_type")) == "KeyError: 'model_type'"
    assert reason(OSError(30, "Read-only file system", "/disk/x")) == "/disk/x: Read-only file system"
    assert reason(RuntimeError()) == "RuntimeError"
    many = reason(ValueError("\n".join(f"line {i}" for i in range(50))))
    assert "line 0" in many
    assert many.endswith("line 49")
    assert len(reason(ValueError("x" * 10_000))) < REASON_LENGTH + 10


def test_a_reason_has_the_cause_that_it_hides():
    error = OSError("Can't load the tokenizer.")
    error.__cause__ = ConnectionError("no route to host")
    assert reason(error) == "Can't load the tokenizer; because: no route to host"


def test_what_is_explained_already_or_about_memory_passes():
    for error in (ConfigError("mine"), MemoryError(), RuntimeError("CUDA out of memory. Tried"), BrokenPipeError()):
        with pytest.raises(type(error)) as caught, explained("file x cannot be read"):
            raise error
        assert caught.value is error
    said = r"^file x cannot be read: KeyError: 'y'\. Mend it\.$"
    with pytest.raises(ModelError, match=said), explained("file x cannot be read", advice="Mend it."):
        raise KeyError("y")


def _t5(folder: Path) -> None:
    shutil.rmtree(folder)
    small = T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=1, d_kv=16, vocab_size=272)
    T5ForConditionalGeneration(small).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _other_shape(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(7, 64)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def _missing_shard(folder: Path) -> None:
    names = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN_MODELS = {
    "weights are a Git LFS pointer": (lambda f: (f / WEIGHTS).write_text(POINTER), [WEIGHTS, "git lfs pull"]),
    "weights cut in half": (lambda f: cut(f / WEIGHTS), [WEIGHTS, "cut off or damaged"]),
    "weights empty": (lambda f: (f / WEIGHTS).write_bytes(b""), [WEIGHTS]),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ["safetensors"]),
    "shard missing": (_missing_shard, ["model-00001-of-00001"]),
    "unknown architecture": (lambda f: edit(f / "config.json", model_type="brandnewlm"), ["brandnewlm"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "config no JSON": (lambda f: (f / "config.json").write_text('{"model_type":'), ["config.json"]),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), []),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), []),
    "config of nonsense": (lambda f: edit(f / "config.json", hidden_size="wide"), []),
    "config without heads": (lambda f: edit(f / "config.json", num_attention_heads=0), []),
    "no causal model": (_t5, ["T5Config"]),
    "code of its own": (
        lambda f: edit(f / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}),
        ["trust_remote_code"],
    ),
    "tensor of another shape": (_other_shape, ["up_proj"]),
    "tokenizer empty": (lambda f: (f / "tokenizer.json").write_text("{}"), ["no tokenizer can be loaded"]),
    "tokenizer a pointer": (lambda f: (f / "tokenizer.json").write_text(POINTER), ["tokenizer"]),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("*token*")], ["tokenizer"]),
    "quantized by another library": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        ["gptq"],
    ),
}


@pytest.mark.parametrize("kind", BROKEN_MODELS)
def test_broken_models(place, tmp_path, train, kind):
    harm, words = BROKEN_MODELS[kind]
    folder = copy(place.model, tmp_path / "model")
    harm(folder)
    train(model=folder, words=[str(folder), *words])


@pytest.mark.parametrize(
    ("name", "words"),
    [("/nowhere/at all", "does not exist"), ("./nowhere", "does not exist"), ("FILE", "is a file"), ("", "")],
)
def test_models_that_are_not_there(place, train, says, name, words, no_model):
    name = place.data if name == "FILE" else name
    train(model=name, words=[words])
    says(["inspect", "--model_name_or_path", name, "--dataset_name", place.data], words)


def test_other_files_and_names_that_a_flag_gives(place, tmp_path, says, train, no_model, monkeypatch):
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "own_scorer.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    judge = ["eval", place.run, "--dataset_name", place.data]
    says([*judge, "--text_file", tmp_path / "one.txt"], "text_file", "has 1 tokens")
    says([*judge, "--text_file", tmp_path / "binary.txt"], "text_file", "UTF-8")
    says([*judge, "--scorer", "own_scorer:f"], "own_scorer:f", "division by zero")
    says(["merge", place.run, "--out", tmp_path / "o", "--prompts", tmp_path / "binary.txt"], "--prompts", "UTF-8")
    says(["merge", place.run, "--out", tmp_path / "o", "--tolerance", "inf"], "--tolerance")
    says(["export", place.run, "--out", tmp_path / "o", "--base-id", "not an id"], "--base-id")
    says(["train", "--config", tmp_path / "binary.txt"], "--config", "UTF-8")
    train("--share_student_as_teacher", "false", "--teacher_model_name_or_path", "/no/such", words=["/no/such"])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (b"{% for m in %}", "template"),
        (b"\xff\xfe{\x00", "UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"{{ messages.nothing.at_all }}", "template"),
    ],
)
def test_broken_chat_templates(tmp_path, train, no_model, harm, words):
    path = tmp_path / "mine.jinja"
    path.write_bytes(harm)
    train("--chat_template_path", path, words=[words])


def _tensors(folder: Path, change) -> None:
    save_file(change(load_file(folder / ADAPTER)), folder / ADAPTER, metadata={"format": "pt"})


BROKEN_ADAPTERS = {
    "a Git LFS pointer": (lambda f: (f / ADAPTER).write_text(POINTER), [ADAPTER, "git lfs pull"]),
    "cut in half": (lambda f: cut(f / ADAPTER), [ADAPTER, "cut off or damaged"]),
    "empty": (lambda f: (f / ADAPTER).write_bytes(b""), [ADAPTER]),
    "no tensors": (lambda f: _tensors(f, lambda t: {}), [ADAPTER, "no tensor of it fits this base"]),
    "layer 1 is missing": (
        lambda f: _tensors(f, lambda t: {k: v for k, v in t.items() if ".layers.1." not in k}),
        [ADAPTER, "layers.1.", "is missing"],
    ),
    "all keys renamed": (
        lambda f: _tensors(f, lambda t: {k.replace("base_model.model", "other"): v for k, v in t.items()}),
        [ADAPTER, "no tensor of it fits this base"],
    ),
    "a tensor too many": (
        lambda f: _tensors(f, lambda t: {**t, "base_model.model.model.layers.7.x.lora_A.weight": torch.zeros(2, 2)}),
        ["layers.7.x.lora_A"],
    ),
    "another rank": (lambda f: edit(f / ADAPTER_CONFIG, r=3), ["lora_A"]),
    "config no JSON": (lambda f: (f / ADAPTER_CONFIG).write_text('{"peft_type":'), [ADAPTER_CONFIG]),
    "config a list": (lambda f: (f / ADAPTER_CONFIG).write_text("[]"), [ADAPTER_CONFIG, "list"]),
    "config not UTF-8": (lambda f: (f / ADAPTER_CONFIG).write_bytes(b"\xff\xfe{"), [ADAPTER_CONFIG, "UTF-8"]),
    "no LoRA": (lambda f: edit(f / ADAPTER_CONFIG, peft_type="IA3"), ["IA3"]),
    "its base is gone": (lambda f: edit(f / ADAPTER_CONFIG, base_model_name_or_path="/gone/base"), ["/gone/base"]),
    "names no base": (lambda f: edit(f / ADAPTER_CONFIG, base_model_name_or_path=None), ["base_model_name_or_path"]),
    "doubles layers": (lambda f: edit(f / ADAPTER_CONFIG, layer_replication=[[0, 2], [1, 2]]), ["layer_replication"]),
    "changed the base": (lambda f: edit(f / ADAPTER_CONFIG, init_lora_weights="pissa_niter_4"), ["pissa"]),
}


@pytest.mark.parametrize("kind", BROKEN_ADAPTERS)
@pytest.mark.parametrize("command", ["merge", "eval", "export", "train"])
def test_broken_adapters(place, tmp_path, says, train, kind, command):
    harm, words = BROKEN_ADAPTERS[kind]
    folder = copy(place.run, tmp_path / "adapter")
    (folder / "run.json").unlink()  # an adapter as others hand it on
    harm(folder)
    out = tmp_path / "result"
    if command == "train":
        train(model=folder, words=words)
    elif command == "eval":
        says(["eval", folder, "--dataset_name", place.data, "--base_quantization", "none", "--out", out], *words)
    else:
        flags = ["--base-id", "me/base"] if command == "export" else []
        says([command, folder, "--out", out, "--quantization", "none", *flags], *words)
    assert not out.exists()


def test_an_adapter_with_more_embedding_rows_says_so(place, tmp_path, says):
    """PEFT's message has the sizes behind its first line."""
    wide = save_tiny(tmp_path / "wide", vocab_size=280)
    model = get_peft_model(tiny_model(vocab_size=280), LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    model.base_model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    edit(tmp_path / "adapter" / ADAPTER_CONFIG, base_model_name_or_path=place.model)
    assert wide
    message = says(["merge", tmp_path / "adapter", "--out", tmp_path / "out", "--quantization", "none"], "280", "272")
    assert "embed_tokens" in message


@pytest.mark.parametrize("command", ["merge", "eval", "export", "gguf-lora"])
def test_a_base_that_was_exchanged_is_refused_alike(place, tmp_path, says, command):
    """Another model of the same shape, by the digest in run.json."""
    folder = copy(place.run, tmp_path / "run")
    other = save_tiny(tmp_path / "other", seed=5)
    edit(folder / ADAPTER_CONFIG, base_model_name_or_path=other)
    out = tmp_path / ("out.gguf" if command == "gguf-lora" else "out")
    argv = {
        "eval": ["eval", folder, "--dataset_name", place.data, "--max_new_tokens", "2"],
        "merge": ["merge", folder, "--out", out],
        "export": ["export", folder, "--out", out, "--base-id", "me/base"],
        "gguf-lora": ["export", folder, "--out", out, "--format", "gguf-lora"],
    }[command]
    says(argv, "is not the one that the adapter was trained on", "digest", code=1 if command == "merge" else 2)
    assert not out.exists()
    assert not (folder / "eval_results.json").exists()


def test_all_chat_templates_of_a_tokenizer_are_copied(place, tmp_path):
    model = copy(place.model, tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ 'tools' }}"}
    tokenizer.save_pretrained(model)
    run_folder, out = copy(place.run, tmp_path / "run"), tmp_path / "out"
    for path in run_folder.glob("*token*"):
        path.unlink()
    (run_folder / "chat_template.jinja").unlink()
    edit(run_folder / ADAPTER_CONFIG, base_model_name_or_path=str(model))
    assert cli.main(["merge", str(run_folder), "--out", str(out), "--dtype", "fp32", "--no-verify"]) == 0
    assert type(tokenizer).from_pretrained(out).chat_template == tokenizer.chat_template


def test_a_run_with_several_chat_templates_is_saved_twice(place, tmp_path):
    from pgkd_peft.run.checkpoint import clear_run_folder, replacing

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ 'tools' }}"}
    for _ in range(2):
        with replacing(tmp_path) as staged:
            tokenizer.save_pretrained(staged)
    assert type(tokenizer).from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    clear_run_folder(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("where", [NOWHERE, "FILE/below"])
def test_results_that_could_not_be_written_are_refused_before_the_work(place, tmp_path, says, where, no_model):
    out = where.replace("FILE", place.data)
    says(["train", "--config", place.recipe, "--output_dir", out], "output_dir", out)
    says(["merge", place.run, "--out", out], "--out", out)
    says(["export", place.run, "--out", out, "--base-id", "me/base"], "--out", out)
    says(["export", place.run, "--out", f"{out}.gguf", "--format", "gguf"], "--out", out)
    says(["eval", place.run, "--dataset_name", place.data, "--out", f"{out}.json"], "--out", out)
    says(["eval", place.run, "--dataset_name", place.data, "--out", tmp_path], "--out", "is a folder")
    says(["report", place.run, "--out", f"{out}.html"], "--out", out)
    says(["report", place.run, "--out", tmp_path], "--out", "is a folder")


def test_a_place_may_be_made_later(tmp_path):
    check_writable(tmp_path / "a" / "b", "--out")
    check_writable(tmp_path, "--out")
    assert not list(tmp_path.iterdir())


def command(*argv, **env):
    return [sys.executable, "-m", "pgkd_peft", *map(str, argv)], {"cwd": REPO, "env": {**os.environ, **env}}


def test_a_console_that_knows_ascii_alone(place, tmp_path):
    data = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "Wie heißt 東京?"}, {"role": "assistant", "content": "Tōkyō …"}]}
    data.write_text(json.dumps(row, ensure_ascii=False), "utf-8")
    argv, where = command(
        "inspect", "--model_name_or_path", place.model, "--dataset_name", data, PYTHONIOENCODING="ascii", PYTHONUTF8="0"
    )
    done = subprocess.run(argv, capture_output=True, timeout=120, check=False, **where)
    assert done.returncode == 0, done.stderr.decode()
    assert rb"\u6771" in done.stdout
    assert b"Traceback" not in done.stderr


def test_a_reader_that_goes_is_no_failure(place):
    argv, where = command("inspect", "--model_name_or_path", place.model, "--dataset_name", place.data, "--rows", "4")
    writer = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **where)
    writer.stdout.readline()
    writer.stdout.close()
    err = writer.stderr.read().decode()
    assert writer.wait(120) in (0, 141), err
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def test_the_system_s_errors_are_a_line(monkeypatch, capsys):
    def full(argv):
        raise OSError(28, "No space left on device", "/disk/x")

    monkeypatch.setattr("pgkd_peft.cli.recipes.main", full)
    assert cli.main(["recipes"]) == 2
    assert capsys.readouterr().err == "pgkd: /disk/x: No space left on device\n"


def test_a_library_s_error_is_a_line_and_our_own_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr("pgkd_peft.cli.recipes.main", lambda argv: json.loads("{"))
    assert cli.main(["recipes"]) == 2
    err = capsys.readouterr().err
    assert re.match(r"pgkd: JSONDecodeError in .*decoder\.py, line \d+: Expecting property name", err)
    assert "Traceback" not in err
    monkeypatch.setenv("PGKD_TRACEBACK", "1")
    assert cli.main(["recipes"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.delenv("PGKD_TRACEBACK")
    monkeypatch.undo()
    monkeypatch.setattr("pgkd_peft.cli.recipes.recipes", lambda: None)  # our own main then fails on it
    assert cli.main(["recipes"]) == 1
    assert "Traceback" in capsys.readouterr().err
