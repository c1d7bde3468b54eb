"""A user's mistake or a broken file ends with exit code 2, a line that names it and says why, and nothing changed."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from inherited import USED
from peft import LoraConfig, get_peft_model
from runs import finish, make_trainer, run, start
from safetensors.torch import load_file, save_file
from tiny import ROWS, TINY_RUN, byte_tokenizer, save_tiny, tiny_model
from transformers import T5Config, T5ForConditionalGeneration, TrainingArguments
from trl.experimental.gkd import GKDConfig

import pgkd_peft
from pgkd_peft import PrivilegedGKDConfig, cli
from pgkd_peft.config_checks import HARMLESS, OWN_RANGES, RANGES, REFUSED
from pgkd_peft.errors import REASON_LENGTH, ConfigError, ModelError, RunFinished, explained, reason
from pgkd_peft.run.place import LOCK_FILE, check_writable, locked

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


# ---- the boundary ----------------------------------------------------------------------------------------------------


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


# ---- E: models -------------------------------------------------------------------------------------------------------


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


# ---- E, G: adapters --------------------------------------------------------------------------------------------------


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


# ---- E, F: settings --------------------------------------------------------------------------------------------------

INHERITED = dataclasses.fields(GKDConfig)


def test_every_inherited_setting_is_used_refused_or_harmless():
    names = {f.name for f in INHERITED}
    assert len(names) > 120
    tables = [set(USED), set(REFUSED), set(HARMLESS)]
    assert set().union(*tables) == names
    assert sum(map(len, tables)) == len(names)
    assert set(RANGES) <= set(USED) | set(HARMLESS)
    assert all(len(why) > 10 for why in [*HARMLESS.values(), *(refused.why for refused in REFUSED.values())])


@functools.cache
def _code() -> str:
    import accelerate
    import transformers
    import trl

    folders = [Path(module.__file__).parent for module in (transformers, trl, accelerate)]
    files = [*folders[0].glob("train*.py"), folders[0] / "integrations" / "integration_utils.py"]
    files += [folders[1] / "trainer" / "sft_trainer.py", *(REPO / "pgkd_peft").rglob("*.py")]
    return "\n".join(path.read_text("utf-8") for path in files)


def test_what_is_called_used_is_read_somewhere():
    assert [name for name in USED if not re.search(rf"\b(args|config|self)\.{name}\b", _code())] == []


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_setting_is_refused_by_name(name):
    default = next(f for f in INHERITED if f.name == name)
    value = default.default if default.default is not dataclasses.MISSING else default.default_factory()
    assert REFUSED[name].is_left_alone(value)
    dataclasses.replace(PrivilegedGKDConfig(output_dir="x", **{name: value}))  # also when it is made from itself
    other = {bool: not value, str: "x", float: 0.5}.get(type(value), 8 if "num" in name else "x")
    with pytest.raises(ConfigError, match=rf"{name}={other!r} cannot be used: \w+.*\. Remove it"):
        PrivilegedGKDConfig(output_dir="x", **{name: other})


NUMBERS = [
    f.name
    for f in dataclasses.fields(PrivilegedGKDConfig)
    if f.name not in REFUSED and set(re.findall(r"\w+", str(f.type))) & {"int", "float"}
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_number_may_be_nan_or_infinite(name, value):
    assert len(NUMBERS) > 40
    with pytest.raises(ConfigError, match=name):
        PrivilegedGKDConfig(output_dir="x", **{name: value})


@pytest.mark.parametrize("name", [*RANGES, *OWN_RANGES])
def test_numbers_out_of_their_range(name):
    accepted = {**RANGES, **OWN_RANGES}[name]
    outside = [accepted.least - 1, *([] if accepted.included else [accepted.least])]
    outside += [accepted.limit] if accepted.limit is not None else []
    for value in outside:
        with pytest.raises(ConfigError, match=f"{name} is .*; it must be"):
            PrivilegedGKDConfig(output_dir="x", **{name: accepted.kind(value)})
    if accepted.kind is int:
        with pytest.raises(ConfigError, match=f"{name} is .*whole number"):
            PrivilegedGKDConfig(output_dir="x", **{name: accepted.least + 0.5})


SETTINGS = [
    ("--learning_rate", "nan", "learning_rate"),
    ("--learning_rate", "-1", "learning_rate"),
    ("--learning_rate", "0", "learning_rate"),
    ("--per_device_train_batch_size", "0", "per_device_train_batch_size"),
    ("--gradient_accumulation_steps", "0", "gradient_accumulation_steps"),
    ("--seed", "-1", "seed"),
    ("--max_steps", "0", "max_steps"),
    ("--max_steps", "-5", "max_steps"),
    ("--num_train_epochs", "0", "num_train_epochs"),
    ("--temperature", "nan", "temperature"),
    ("--loss_temperature", "nan", "loss_temperature"),
    ("--lora_r", "0", "lora_r"),
    ("--lora_alpha", "0", "lora_alpha"),
    ("--lora_dropout", "2", "lora_dropout"),
    ("--lora_dropout", "nan", "lora_dropout"),
    ("--lora_target_modules", "nothere", "nothere"),
    ("--lora_target_modules", "q_proj nothere", "nothere"),
    ("--lora_modules_to_save", "nothere", "nothere"),
    ("--attn_implementation", "nosuch", "nosuch"),
    ("--dtype", "float17", "float17"),
    ("--report_to", "nosuch", "report_to"),
    ("--deepspeed", "x.json", "deepspeed"),
    ("--fsdp", "full_shard", "fsdp"),
    ("--optim", "nosuch", "nosuch"),
    ("--optim", "adamw_apex_fused", "apex"),
    ("--lr_scheduler_type", "nosuch", "lr_scheduler_type"),
    ("--lr_scheduler_kwargs", '{"nothing": 1}', "nothing"),
    ("--accelerator_config", '{"nothing": 1}', "nothing"),
    ("--lr_scheduler_type", "cosine_with_min_lr", "min_lr"),
    ("--optim", "galore_adamw", "galore"),
    ("--optim_args", "x", "optim_args"),
    ("--output_dir", "", "output_dir is empty"),
    ("--eval_strategy steps --eval_steps 1 --metric_for_best_model", "bleu", "metric_for_best_model"),
    ("--model_init_kwargs", "x", "model_init_kwargs"),
    ("--eval_steps 1 --eval_strategy", "steps", "eval_strategy"),
    ("--eos_token", "<|nope|>", "eos_token"),
    ("--load_in_4bit true --base_quantization", "none", "base_quantization"),
    ("--load_in_4bit true --bnb_4bit_quant_type", "nf5", "nf5"),
    ("--average_tokens_across_devices", "false", "average_tokens_across_devices"),
    ("--torch_compile", "true", "torch_compile"),
    ("--per_device_train_batch_size 8 --dataloader_drop_last", "true", "dataloader_drop_last"),
    ("--save_strategy", "best", "metric_for_best_model"),
    ("--model_init_kwargs", '{"nothing_like_it": 1}', "nothing_like_it"),
    ("--model_init_kwargs", '{"dtype": "nothing"}', "nothing"),
]


@pytest.mark.parametrize(("flags", "value", "named"), SETTINGS, ids=[f"{f} {v}" for f, v, _ in SETTINGS])
def test_settings_that_cannot_train(train, flags, value, named):
    train(*flags.split(), *_values(value), words=[named])


def _values(value):
    return [value] if value.startswith("{") or not value else value.split()


def test_settings_are_refused_before_a_model_is_loaded(train, no_model):
    for flags, value, named in SETTINGS:
        if not flags.startswith(("--attn", "--model_init", "--save_strategy")):  # Transformers alone knows these
            train(*flags.split(), *_values(value), words=[named])


def test_trackers_are_looked_for_before_a_model_is_loaded(train, no_model, monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: [])
    train("--report_to", "wandb", words=["report_to", "wandb", 'pip install "pgkd-peft[wandb]"'])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_modules": ["q_proj", "v_porj"]}, "v_porj"),
        ({"target_modules": r".*\.nothere"}, "nothere"),
        ({"modules_to_save": ["nrom"]}, "nrom"),
        ({"layers_to_transform": [0, 7]}, "layers_to_transform has 7"),
        ({"trainable_token_indices": [999]}, "999"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern"),
        ({"lora_dropout": -0.1}, "lora_dropout"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_lora_settings_that_cannot_train(place, tmp_path, settings, words, loaded, monkeypatch):
    lora = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    if not loaded and not isinstance(settings.get("target_modules"), str):
        monkeypatch.setattr("pgkd_peft.model.student.load_base", None)
    model = tiny_model() if loaded else place.model
    with pytest.raises((ConfigError, ModelError), match=words.replace("[", r"\[")):
        make_trainer(
            place.model, str(tmp_path / "out"), model=model, peft_config=lora, processing_class=byte_tokenizer()
        )


def test_lora_on_the_embedding_starts_at_the_base(place, tmp_path, caplog):
    lora = LoraConfig(r=2, target_modules=["embed_tokens"])
    make_trainer(place.model, str(tmp_path / "out"), peft_config=lora)
    assert "is not zero" not in caplog.text


def test_a_base_that_is_quantized_otherwise_is_refused(place, tmp_path, train):
    from pgkd_peft.model.load import load_base

    stored = tmp_path / "stored"
    load_base(place.model, quantization="nf4").save_pretrained(stored)
    byte_tokenizer().save_pretrained(stored)
    for asked in ("none", "int8"):
        train("--base_quantization", asked, model=stored, words=["quantized to nf4 already", "base_quantization"])
    assert make_trainer(str(stored), str(tmp_path / "o"), settings={"base_quantization": "nf4"}, model=str(stored))


def test_several_gpus_without_a_launcher_are_one(monkeypatch, caplog):
    def two(self):
        self._n_gpu = 2
        return torch.device("cpu")

    found = functools.cached_property(two)
    found.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", found)
    config = PrivilegedGKDConfig(output_dir="x")
    assert config.n_gpu == 1
    assert config.train_batch_size == config.per_device_train_batch_size
    assert "2 GPUs are visible, one is used" in caplog.text
    assert "accelerate launch" in caplog.text


# ---- E: places and consoles ------------------------------------------------------------------------------------------


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


# ---- G: folders and resuming -----------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_nothing_is_touched(place, tmp_path, capsys, no_model):
    folder = copy(place.run, tmp_path / "run")
    before = contents(folder)
    flags = ["--config", place.recipe, "--output_dir", str(folder), "--resume"]
    assert cli.main(["train", *flags]) == 0
    out = capsys.readouterr().out
    assert "is finished: it is at step 3" in out
    assert "raise max_steps" in out
    assert contents(folder) == before


def test_a_finished_run_in_python(place, tmp_path):
    folder = tmp_path / "out"
    settings = {"max_steps": 2, "lmbda": 0.0, "lr_scheduler_type": "constant"}
    make_trainer(place.model, str(folder), settings=settings).train()
    before = contents(folder)
    with pytest.raises(RunFinished, match=r"is finished: it is at step 2.*max_steps is 2"):
        make_trainer(place.model, str(folder), settings=settings).train(resume_from_checkpoint=True)
    assert contents(folder) == before
    epochs = {**settings, "max_steps": -1, "num_train_epochs": 1}  # 7 rows, 4 a step: two steps
    with pytest.raises(RunFinished, match="num_train_epochs is 1"):
        make_trainer(place.model, str(folder), settings=epochs).train(resume_from_checkpoint=True)
    trainer = make_trainer(place.model, str(folder), settings={**settings, "max_steps": 3})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_a_run_that_was_killed_before_its_adapter_was_saved_saves_it(place, tmp_path):
    folder = copy(place.run, tmp_path / "run")
    expected = (folder / ADAPTER).read_bytes()
    for name in (ADAPTER, ADAPTER_CONFIG):
        (folder / name).unlink()
    edit(folder / "run.json", finished=False)
    assert cli.main(["train", "--output_dir", str(folder), "--resume"]) == 0
    assert (folder / ADAPTER).read_bytes() == expected
    assert [p.name for p in sorted(folder.glob("checkpoint-*"))] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert json.loads((folder / "run.json").read_text())["finished"] is True


REFUSED_RESUMES = {
    "another base": lambda place, tmp: ["--model_name_or_path", save_tiny(tmp / "other", seed=7)],
    "another teacher": lambda place, tmp: ["--teacher_adapter", "shared", "--max_steps", "5"],
    "another rank": lambda place, tmp: ["--lora_r", "3", "--max_steps", "5"],
    "a setting": lambda place, tmp: ["--learning_rate", "nan"],
    "no such data": lambda place, tmp: ["--dataset_name", str(tmp / "gone.jsonl"), "--max_steps", "5"],
}


@pytest.mark.parametrize("kind", REFUSED_RESUMES)
def test_a_refused_resume_changes_nothing(place, tmp_path, says, kind):
    folder = copy(place.run, tmp_path / "run")
    before = contents(folder)
    flags = REFUSED_RESUMES[kind](place, tmp_path)
    says(["train", "--config", place.recipe, "--output_dir", folder, "--resume", *flags])
    assert contents(folder) == before


@pytest.mark.parametrize("flags", [["--learning_rate", "nan"], ["--dataset_name", "gone.jsonl"], ["--lora_r", "0"]])
def test_a_refused_run_deletes_nothing(place, tmp_path, says, flags):
    folder = copy(place.run, tmp_path / "run")
    before = contents(folder)
    says(["train", "--config", place.recipe, "--output_dir", folder, "--overwrite", *flags])
    assert contents(folder) == before


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "run.json", "progress_0.json", ADAPTER],
)
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe"])
def test_broken_checkpoint_files(place, tmp_path, says, name, text):
    """Without a manifest, as Transformers' own checkpoints are."""
    folder = copy(place.run, tmp_path / "run")
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "manifest.json").unlink()
        (checkpoint / name).write_bytes(text)
    before = contents(folder)
    named = {"trainer_state.json": "no complete checkpoint"}.get(name, "random state" if ".pt" in name else name)
    says(["train", "--config", place.recipe, "--output_dir", folder, "--resume", "--max_steps", "5"], named)
    assert contents(folder) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": {"optimizer.pt": 1}}'])
def test_broken_manifests(place, tmp_path, says, text):
    folder = copy(place.run, tmp_path / "run")
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "manifest.json").write_text(text)
    says(["train", "--config", place.recipe, "--output_dir", folder, "--resume"], "nothing to resume")


def test_resume_takes_the_run_s_own_settings(place, tmp_path):
    folder = copy(place.run, tmp_path / "run")
    assert cli.main(["train", "--output_dir", str(folder), "--resume", "--max_steps", "4"]) == 0
    info = json.loads((folder / "run.json").read_text())
    assert info["steps"] == 4
    assert info["config"]["learning_rate"] == TINY_RUN["learning_rate"]
    assert info["config"]["lr_scheduler_type"] == "constant"
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["max_steps"] == 4


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml"])
@pytest.mark.parametrize("text", [b"", b"{", b"- a", b"\xff\xfe"])
def test_broken_files_of_a_run_folder(place, tmp_path, says, capsys, name, text):
    folder = copy(place.run, tmp_path / "run")
    (folder / name).write_bytes(text)
    for argv in (
        ["eval", folder, "--dataset_name", place.data, "--max_new_tokens", "2", "--base_quantization", "none"],
        ["report", folder, "--out", tmp_path / "page.html"],
        ["eval", folder, "--controls", "no_pi", "--dataset_name", place.data, "--base_quantization", "none"],
    ):
        code = cli.main([str(arg) for arg in argv])
        err = capsys.readouterr().err
        assert "Traceback" not in err
        assert code in (0, 2)
        if code == 2:
            assert name in err


def test_paths_with_spaces_can_be_pasted(place, tmp_path, capsys):
    folder = tmp_path / "my run"
    assert cli.main(["train", "--config", place.recipe, "--output_dir", str(folder), "--max_steps", "1"]) == 0
    out = capsys.readouterr().out
    assert f"pgkd eval '{folder}'\n" in out
    assert f"pgkd merge '{folder}' --out '{folder}-merged'\n" in out


# ---- G: one process a folder -----------------------------------------------------------------------------------------


def _hold(folder: Path) -> subprocess.Popen:
    """Another process that holds the folder until it is ended."""
    code = (
        "import sys, time; from pgkd_peft.run.place import locked\n"
        "with locked(sys.argv[1]): print('held', flush=True); time.sleep(120)"
    )
    argv = [sys.executable, "-c", code, str(folder)]
    holder = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=REPO)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_live_folder_is_refused_and_a_stale_lock_is_not(place, tmp_path, says):
    folder = copy(place.run, tmp_path / "run")
    holder = _hold(folder)
    try:
        before = contents(folder)
        for how in ("--resume", "--overwrite"):
            says(
                ["train", "--config", place.recipe, "--output_dir", folder, how, "--max_steps", "5"],
                f"in use by process {holder.pid}",
                os.uname().nodename,
            )
        with pytest.raises(ConfigError, match="in use by process"):
            make_trainer(place.model, str(folder), settings={"max_steps": 1}).train()
        assert contents(folder) == before
    finally:
        holder.kill()
        holder.wait()
    assert (folder / LOCK_FILE).is_file()  # a kill leaves it
    flags = ["--output_dir", str(folder), "--resume", "--max_steps", "4"]
    assert cli.main(["train", "--config", place.recipe, *flags]) == 0
    assert not (folder / LOCK_FILE).exists()


def test_locks_of_other_hosts_count_and_broken_ones_do_not(tmp_path):
    lock = tmp_path / LOCK_FILE
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": 0.0}))
    with pytest.raises(ConfigError, match=r"process 1 on elsewhere.*delete"), locked(tmp_path):
        pass
    for text in ("", "[]", '{"pid": "x"}', json.dumps({"pid": os.getpid(), "host": os.uname().nodename, "started": 1})):
        lock.write_text(text)
        if text == '{"pid": "x"}':
            continue  # of no host: nobody knows whose
        with locked(tmp_path), locked(tmp_path):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
        assert not lock.exists()


def test_a_lock_makes_no_folder_that_stays(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "a"):
        raise KeyError
    assert not (tmp_path / "a").exists()


# ---- G: signals ------------------------------------------------------------------------------------------------------


def test_a_closed_terminal_saves_first(place, tmp_path):
    out = tmp_path / "out"
    stopped = run(place.model, out, fault=("sighup", 2), settings={"save_steps": 100})
    assert (stopped["error"], stopped["signum"]) == ("RunInterrupted", signal.SIGHUP)
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-3"]


def test_under_nohup_a_closed_terminal_is_nothing(place, tmp_path):
    process, result = start(place.model, tmp_path / "out", fault=("nohup", 2), settings={"max_steps": 4})
    done = finish(process, result)
    assert "error" not in done, done["log"][-2000:]


@pytest.fixture
def heeds_interrupts():
    """Python's own handler, which it leaves out where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_a_stopped_preflight_says_that_it_was(place, tmp_path, monkeypatch, capsys):
    def interrupted(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    from pgkd_peft.evaluation.preflight import ProbeTrainer

    original = ProbeTrainer.training_step
    monkeypatch.setattr(ProbeTrainer, "training_step", interrupted)
    settings = [part for name, value in TINY_RUN.items() for part in (f"--{name}", str(value))]
    argv = ["inspect", "--model_name_or_path", place.model, "--dataset_name", place.data, "--preflight", *settings]
    assert cli.main([*argv, "--output_dir", str(tmp_path / "out")]) == 130
    err = capsys.readouterr().err
    assert "the preflight was stopped; nothing was trained or saved" in err
    assert "--resume" not in err
