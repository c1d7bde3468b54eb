"""Settings that cannot train, or are another library's: refused by name, before a model is loaded."""
# ruff: noqa: F811  fixtures of another file, as arguments

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch
from inherited import USED
from peft import LoraConfig
from runs import make_trainer
from test_faults import ADAPTER, REPO, no_model, place, says, train  # noqa: F401
from tiny import byte_tokenizer, tiny_model
from transformers import TrainingArguments
from trl.experimental.gkd import GKDConfig

from pgkd_peft import PrivilegedGKDConfig
from pgkd_peft.config_checks import HARMLESS, OWN_RANGES, RANGES, REFUSED
from pgkd_peft.errors import ConfigError, ModelError

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
