"""More kinds of broken inputs: each was a traceback, a false reason, or a run that should not have started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_faults import ADAPTER, ADAPTER_CONFIG, WEIGHTS, place, says, train  # noqa: F401
from tiny import ROWS, save_tiny

from pgkd_peft import PrivilegedGKDConfig
from pgkd_peft.data.load import load_rows
from pgkd_peft.errors import ConfigError, DataError


def edited(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


@pytest.mark.parametrize("harm", ["a layer more", "config with one layer less"])
def test_a_base_with_layers_that_its_config_lacks(place, tmp_path, train, harm):  # noqa: F811
    model = save_tiny(tmp_path / "m")
    named = "model.layers.1."
    if harm == "a layer more":
        named = "model.layers.2."
        weights = load_file(Path(model) / WEIGHTS)
        more = {name.replace("layers.1.", "layers.2."): w.clone() for name, w in weights.items() if "layers.1." in name}
        save_file({**weights, **more}, Path(model) / WEIGHTS, metadata={"format": "pt"})
    else:
        edited(Path(model) / "config.json", num_hidden_layers=1)
    train(model=model, words=[named, "layers that config.json does not have"])


def test_a_tower_that_the_architecture_lacks_is_left_out(tmp_path):
    from pgkd_peft.model.load import load_base

    model = save_tiny(tmp_path / "m")
    weights = load_file(Path(model) / WEIGHTS)
    save_file({**weights, "visual.blocks.0.weight": torch.zeros(2)}, Path(model) / WEIGHTS, metadata={"format": "pt"})
    assert load_base(model, quantization="none", dtype=torch.float32).config.num_hidden_layers == 2


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_base_with_broken_numbers_says_that_they_are(place, tmp_path, train, number):  # noqa: F811
    model = save_tiny(tmp_path / "m")
    weights = load_file(Path(model) / WEIGHTS)
    weights["model.norm.weight"][3] = number
    save_file(weights, Path(model) / WEIGHTS, metadata={"format": "pt"})
    train(model=model, words=["the base itself gives NaN or infinite logits", "its files hold such numbers"])


def test_other_files_of_a_base(place, tmp_path, train):  # noqa: F811
    model = save_tiny(tmp_path / "m")
    (Path(model) / "generation_config.json").write_text('{"eos_token_id": "x"}')
    train(model=model, words=["eos_token_id of the model's generation_config.json is 'x'"])
    template = Path(model) / "chat_template.jinja"
    template.write_bytes(template.read_text("utf-8").encode("utf-16-le"))
    train(model=model, words=["the chat template holds characters 0"])


@pytest.mark.parametrize("command", ["merge", "eval", "export", "train"])
@pytest.mark.parametrize("kind", ["nan", "integers", "targets"])
def test_adapters_with_broken_numbers_or_names(place, tmp_path, says, train, kind, command):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(place.run, run)
    if kind == "targets":
        edited(run / ADAPTER_CONFIG, target_modules=5)
        words = ["target_modules is 5"]
    else:
        weights = load_file(run / ADAPTER)
        broken = float("nan") if kind == "nan" else 0.0
        weights = {name: tensor + broken for name, tensor in weights.items()}
        weights = {n: t.to(torch.int32) for n, t in weights.items()} if kind == "integers" else weights
        save_file(weights, run / ADAPTER, metadata={"format": "pt"})
        words = ["holds NaN or infinite numbers" if kind == "nan" else "holds int32, not floating-point"]
    if command == "train":
        train(model=str(run), words=words)
    else:
        out = ["--out", tmp_path / "out"] if command != "eval" else []
        says([command, run, *out], *words)


@pytest.mark.parametrize("command", ["report", "runs"])
def test_views_leave_out_sections_of_run_json_that_are_none(place, tmp_path, says, command):  # noqa: F811
    shutil.copytree(place.run, tmp_path / "run")
    edited(tmp_path / "run" / "run.json", config="x", automatic=3, versions=[1])
    from pgkd_peft import cli

    assert cli.main([command, str(tmp_path / ("run" if command == "report" else "."))]) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient_checkpointing_kwargs": {"nosuch": True}}, "gradient_checkpointing_kwargs has 'nosuch'"),
        ({"eval_on_start": True}, "eval_on_start is set, but nothing is evaluated"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "load_best_model_at_end is set, but nothing"),
    ],
)
def test_settings_that_would_fail_late_or_do_nothing(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        PrivilegedGKDConfig(output_dir=str(tmp_path), **settings)
    PrivilegedGKDConfig(output_dir=str(tmp_path), gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora_task_type", "SEQ_CLS"], "only CAUSAL_LM writes text"),
        (["--holdout_rows", "99"], "holdout_rows is 99, but only 3 rows have PI"),
        (["--neutral_dataset_name", "/nowhere"], "/nowhere: no such file"),
    ],
)
def test_more_flags_that_are_refused(place, train, flags, words):  # noqa: F811
    train(*flags, words=[words])


def test_an_output_folder_that_is_a_file(place, tmp_path, says):  # noqa: F811
    (tmp_path / "file").write_text("x")
    argv = ["train", "--config", place.recipe, "--output_dir", tmp_path / "file"]
    says(argv, "output_dir", "is a file. Give another place")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"messages;x\na;b\n", "are its cells divided by ';'"),
        ("a.tsv", b"messages,x\na,b\n", "are its cells divided by ','"),
        ("a.csv", "messages,x\né,b\n".encode("latin-1"), "write it as UTF-8"),
        ("a.jsonl", b"\x00" * 400, "Expecting value"),
        (
            "a.jsonl",
            b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff" + bytes(range(200, 256)),
            "is gzip data under another name",
        ),
    ],
)
def test_files_that_are_something_else_are_called_what_they_are(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        load_rows(tmp_path / name)
    assert "UTF-16" not in str(error.value)
    assert "UTF-32" not in str(error.value)


def test_a_parquet_type_that_datasets_does_not_have(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    column = pa.array([[("role", "user")]], pa.map_(pa.string(), pa.string()))
    parquet.write_table(pa.table({"messages": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"the columns of a\.parquet cannot be read"):
        load_rows(tmp_path / "a.parquet")


def test_a_broken_test_file_is_not_passed_over(place, tmp_path, says):  # noqa: F811
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "data" / "test.jsonl").write_text("{")
    argv = ["train", "--config", place.recipe, "--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "out"]
    says(argv, "test.jsonl line 1")
