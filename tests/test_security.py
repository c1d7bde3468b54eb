"""What comes from others is read as data: no file is unpickled, no code of a model's repository runs unasked."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from adapters import lora, save_adapter
from runs import make_trainer
from tiny import byte_tokenizer, save_tiny

from pgkd_peft import PrivilegedGKDConfig, cli
from pgkd_peft.data.columns import ColumnMap
from pgkd_peft.errors import CheckpointError, ConfigError, PGKDError
from pgkd_peft.model.load import load_base

SHORT = {"max_steps": 2, "lmbda": 0.0, "rollout_log_steps": 0}


class Bomb:
    """Unpickling it creates the file `path`."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    trainer = make_trainer(base, str(out), settings=SHORT)
    trainer.train()
    trainer.save_model()
    return out


def test_the_bomb_works(tmp_path):
    """Else the tests below would pass for nothing."""
    torch.save({"x": Bomb(tmp_path / "gone-off")}, tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "gone-off").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_is_never_unpickled(base, finished, tmp_path, name):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    checkpoint = out / "checkpoint-2"
    torch.save({"state": Bomb(tmp_path / "gone-off")}, checkpoint / name)
    (checkpoint / "manifest.json").unlink()  # whoever plants a file can write a manifest to it as well
    trainer = make_trainer(base, str(out), settings={**SHORT, "max_steps": 3})
    if name == "training_args.bin":
        trainer.train(resume_from_checkpoint=True)
    else:
        with pytest.raises(CheckpointError, match=r"cannot be read.*Weights only load failed") as caught:
            trainer.train(resume_from_checkpoint=True)
        assert isinstance(caught.value.__cause__, pickle.UnpicklingError)
    assert not (tmp_path / "gone-off").exists()


def test_an_adapter_is_only_read_from_safetensors(base, finished, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(finished / "adapter_config.json", folder)
    torch.save({"x": Bomb(tmp_path / "gone-off")}, folder / "adapter_model.bin")
    with pytest.raises(PGKDError, match="safetensors"):
        make_trainer(base, str(tmp_path / "out"), settings=SHORT, model=str(folder))
    assert not (tmp_path / "gone-off").exists()


def test_a_base_is_only_read_from_safetensors(base, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(tmp_path / "gone-off")}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)safetensors|weights.only|pytorch_model"):
        load_base(str(folder), quantization="none", device="cpu")
    assert not (tmp_path / "gone-off").exists()


def custom_code(base: str, tmp_path: Path) -> Path:
    """A model whose repository brings its own code."""
    folder = Path(shutil.copytree(base, tmp_path / "custom"))
    (folder / "modeling.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MyConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "modeling.MyConfig", "AutoModelForCausalLM": "modeling.MyModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_remote_code_is_off_unless_asked(base, tmp_path):
    assert PrivilegedGKDConfig(output_dir=str(tmp_path)).trust_remote_code is False
    folder = custom_code(base, tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        make_trainer(str(folder), str(tmp_path / "out"), settings=SHORT, processing_class=byte_tokenizer())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "RUN", "--dataset_name", "ROWS", "--max_new_tokens", "2"],
        ["chat", "RUN", "--message", "Hi", "--max_new_tokens", "2"],
    ],
)
def test_a_run_that_needed_its_own_code_can_be_used_when_asked(tmp_path, command, capsys):
    run = save_adapter(tmp_path / "run", save_tiny(tmp_path / "base"), lora(), quantization="none")
    custom_code(str(tmp_path / "base"), tmp_path)
    config = json.loads((Path(run) / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "custom")
    (Path(run) / "adapter_config.json").write_text(json.dumps(config))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "2+2?"}], "answer": "4"}) + "\n")
    argv = [{"RUN": run, "ROWS": str(rows)}.get(word, word) for word in command]
    assert cli.main(argv) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert cli.main([*argv, "--trust_remote_code", "true"]) == 0
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ question.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{% for x in [].__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
        "{{ question.format.__globals__ }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_templates_of_a_recipe_are_sandboxed(template):
    from pgkd_peft.errors import DataError

    with pytest.raises((ConfigError, DataError)):
        ColumnMap({"messages": [{"role": "user", "content": template}]}, ["question"])({"question": "Why?"})
