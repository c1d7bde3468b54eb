"""Merging end to end on tiny models: the files, the verdicts, resuming, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import dense_copy, lora, save_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from pgkd_peft.errors import ConfigError, ModelError
from pgkd_peft.export import write as merged_checkpoint
from pgkd_peft.export.merge import TOLERANCE, VerificationError, merge_adapter
from pgkd_peft.export.write import write_checkpoint
from pgkd_peft.model.load import load_base

QUIET = {"log": lambda _: None, "max_new_tokens": 6}


@pytest.fixture
def run(tmp_path):
    """(adapter folder, base folder) of a tiny llama trained on NF4; the run folder has tokenizer and held-out rows."""
    base = save_tiny(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({**config, "temperature": 0.7}))
    adapter = save_adapter(tmp_path / "run", base, lora())
    byte_tokenizer().save_pretrained(adapter)
    update(
        Path(adapter) / "run.json", holdout_prompts="holdout.jsonl", command=["pgkd", "train", "--data", "/home/me/x"]
    )
    row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]}
    (Path(adapter) / "holdout.jsonl").write_text(json.dumps(row) + "\n")
    return adapter, base


def update(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def scale_b(adapter: str, factor: float) -> None:
    file = Path(adapter) / "adapter_model.safetensors"
    save_file({k: v * factor if "lora_B" in k else v for k, v in load_file(file).items()}, file)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_merged_is_the_trained_function(run, tmp_path, dtype):
    adapter, base = run
    report = merge_adapter(adapter, str(tmp_path / "out"), dtype=dtype, **QUIET)
    ids = torch.tensor([[3, 50, 60, 70, 200, 9]])
    trained = PeftModel.from_pretrained(dense_copy(load_base(base, dtype=torch.bfloat16), base), adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    with torch.no_grad():
        p, q = (m(ids).logits.log_softmax(-1).double() for m in (trained, merged.float()))
        with trained.disable_adapter():
            untrained = trained(ids).logits.log_softmax(-1).double()
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert kl < {"fp32": 1e-7, "fp16": 1e-6, "bf16": 1e-3}[dtype]
    assert (p.exp() * (p - untrained)).sum(-1).mean() > 0.01
    assert report.passed
    assert report.tolerance == TOLERANCE[dtype]
    assert report.fidelity["dequantized"]["kl_mean"] == pytest.approx(kl.item(), rel=20, abs=1e-7)
    assert report.surviving_share == pytest.approx(1.0, abs={"fp32": 1e-6, "fp16": 1e-3, "bf16": 0.02}[dtype])
    assert report.rounding_noise < {"fp32": 1e-6, "fp16": 0.01, "bf16": 0.1}[dtype]
    assert report.four_bit_share < 1.0 < report.four_bit_noise + 1.0
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == report.as_dict()
    assert not (tmp_path / "out.partial").exists()


def test_result_loads_without_peft_and_bitsandbytes(run, tmp_path):
    adapter, _ = run
    merge_adapter(adapter, str(tmp_path / "out"), **QUIET)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    code = (
        "import sys; sys.modules['peft'] = sys.modules['bitsandbytes'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "path = sys.argv[1]; model = AutoModelForCausalLM.from_pretrained(path)\n"
        "tokenizer = AutoTokenizer.from_pretrained(path)\n"
        "text = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hi'}], tokenize=False)\n"
        "print(type(model).__name__, model.dtype, model.generation_config.temperature, repr(text))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    expected = byte_tokenizer().apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert done.stdout.strip() == f"LlamaForCausalLM torch.bfloat16 0.7 {expected!r}"


def test_base_stored_in_4_bits_merges_to_a_plain_model(tmp_path):
    plain, stored = save_tiny(tmp_path / "plain"), tmp_path / "stored"
    load_base(plain, dtype=torch.bfloat16).save_pretrained(stored)
    byte_tokenizer().save_pretrained(stored)
    update(stored / "config.json", _name_or_path="/home/me/stored")
    adapter = save_adapter(tmp_path / "run", plain, lora())
    update(tmp_path / "run" / "adapter_config.json", base_model_name_or_path=str(stored))
    report = merge_adapter(adapter, str(tmp_path / "out"), dtype="fp32", compare=True, **QUIET)
    assert list(report.fidelity) == ["dequantized"]  # there is no other base to compare with
    assert report.passed
    assert not {"quantization_config", "_name_or_path"} & set(
        json.loads((tmp_path / "out" / "config.json").read_text())
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    expected = PeftModel.from_pretrained(dense_copy(load_base(plain, dtype=torch.bfloat16), plain), adapter)
    for key, value in expected.merge_and_unload().state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-6, atol=1e-6)


def test_card_tells_the_numbers_and_no_paths(run, tmp_path):
    adapter, _ = run
    (Path(adapter) / "summary.json").write_text(
        json.dumps({"base": 0.0, "teacher": 0.9, "student": 0.75, "recovered": 0.8333333, "n": 48, "drift": 0.0123})
    )
    report = merge_adapter(adapter, str(tmp_path / "out"), **QUIET)
    card = (tmp_path / "out" / "README.md").read_text()
    for expected in (
        "0.8333",
        "0.0123",
        "n = 48",
        "nf4",
        f"{report.fidelity['dequantized']['kl_mean']:.4g}",
        "| dequantized |",
    ):
        assert expected in card
    assert "pgkd train --data x" in card
    assert str(tmp_path) not in card
    assert "/home" not in card


def test_above_tolerance_fails_keeps_the_work_and_can_be_accepted(run, tmp_path):
    adapter, _ = run
    out = tmp_path / "out"
    with pytest.raises(VerificationError, match=r"not the model that was trained: KL .*tolerance 1e-09") as caught:
        merge_adapter(adapter, str(out), base="original", tolerance=1e-9, **QUIET)
    kl = caught.value.report.fidelity["original"]["kl_mean"]
    assert kl > 1e-4
    assert not out.exists()
    assert "FAILED" not in (tmp_path / "out.partial" / "README.md").read_text()
    shard = tmp_path / "out.partial" / "model.safetensors"
    stamp = shard.stat().st_mtime_ns
    report = merge_adapter(adapter, str(out), base="original", tolerance=2 * kl, **QUIET)
    assert report.passed
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp  # not merged again


def test_compare_measures_both_bases_and_recommends_one(run, tmp_path):
    adapter, _ = run
    report = merge_adapter(adapter, str(tmp_path / "a"), dtype="fp32", compare=True, **QUIET)
    dequantized, original = report.fidelity["dequantized"], report.fidelity["original"]
    assert dequantized["kl_mean"] < TOLERANCE["fp32"] < original["kl_mean"]
    assert report.recommendation
    assert report.recommendation.startswith(("dequantized:", "original:"))
    assert not list(tmp_path.glob("a.partial*"))
    assert set(load_file(tmp_path / "a" / "model.safetensors")) > {"lm_head.weight"}


def test_original_base_on_the_neutral_set_enforces_nothing(run, tmp_path):
    adapter, _ = run
    (Path(adapter) / "holdout.jsonl").unlink()
    said: list[str] = []
    report = merge_adapter(adapter, str(tmp_path / "out"), base="original", max_new_tokens=2, log=said.append)
    assert report.tolerance is None
    assert report.passed is None
    assert any("No tolerance is enforced" in line for line in said)


def test_task_score_decides_the_recommendation(run, tmp_path):
    adapter, _ = run

    def score(model, tokenizer) -> float:
        assert tokenizer.chat_template
        weight = model.get_submodule("model.layers.0.mlp.up_proj").weight if not isinstance(model, PeftModel) else None
        return 0.5 if weight is None else float(weight.float().abs().sum() % 7)

    report = merge_adapter(adapter, str(tmp_path / "out"), compare=True, score=score, **QUIET)
    scores = {base: f["score"] for base, f in report.fidelity.items()}
    assert report.trained["score"] == 0.5
    assert scores["dequantized"] != scores["original"]
    better = "original" if scores["original"] > scores["dequantized"] * 1.01 else "dequantized"
    assert report.recommendation.startswith(f"{better}:")


def test_adapter_that_adds_nothing_is_refused(run, tmp_path):
    adapter, _ = run
    update(Path(adapter) / "adapter_config.json", lora_alpha=0)
    with pytest.raises(VerificationError, match="identical to the base's"):
        merge_adapter(adapter, str(tmp_path / "out"), **QUIET)
    scale_b(adapter, 0.0)
    with pytest.raises(VerificationError, match="all zeros"):
        merge_adapter(adapter, str(tmp_path / "out2"), **QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "run"]


def test_a_disk_without_room_is_noticed_before_the_work(run, tmp_path, monkeypatch):
    adapter, _ = run
    usage = merged_checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merged_checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(ModelError, match=r"has 0.0 GB free, the merged model needs 0.\d GB more"):
        merge_adapter(adapter, str(tmp_path / "out"), **QUIET)


def test_requantizing_is_refused_with_the_numbers_and_can_be_forced(run, tmp_path):
    adapter, _ = run
    scale_b(adapter, 0.05)  # as small as training makes it
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--requantize nf4 is refused.* In 4 bits, -?\d+\.\d% .*would survive"):
        merge_adapter(adapter, out, requantize="nf4", **QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "run"]
    report = merge_adapter(adapter, out, requantize="nf4", force=True, **QUIET)
    assert report.four_bit_share < 0.5
    assert json.loads((Path(out) / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    assert report.fidelity["dequantized"]["kl_mean"] > 0.2 * report.adapter_effect
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "run"]


def test_resumes_after_an_interruption(run, tmp_path, monkeypatch):
    adapter, base = run
    monkeypatch.setattr(merged_checkpoint, "SHARD_BYTES", 40_000)
    from pgkd_peft.export.adapter import read_run
    from pgkd_peft.export.merged_weights import MergedWeights

    weights = MergedWeights(read_run(adapter))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    write_checkpoint(weights, whole, "bf16", shard_bytes=40_000)
    shards = sorted(p.name for p in whole.glob("*.safetensors"))
    assert len(shards) >= 4

    written = []
    real = merged_checkpoint.save_file

    def failing(tensors, path, **kw):
        if len(written) == 2:
            path.write_bytes(b"half a shard")
            raise OSError("No space left on device")
        written.append(path.name)
        real(tensors, path, **kw)

    monkeypatch.setattr(merged_checkpoint, "save_file", failing)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(weights, resumed, "bf16", shard_bytes=40_000)
    monkeypatch.setattr(merged_checkpoint, "save_file", lambda t, p, **kw: (written.append(p.name), real(t, p, **kw)))
    stats = write_checkpoint(weights, resumed, "bf16", shard_bytes=40_000)
    assert len(written) == len(shards)  # each shard once
    assert stats == write_checkpoint(weights, whole, "bf16", shard_bytes=40_000)
    for name in [*shards, "model.safetensors.index.json", "config.json"]:
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    written.clear()
    write_checkpoint(weights, resumed, "fp16", shard_bytes=40_000)  # another merge: nothing of the first may stay
    assert len(written) == len(shards)
    model = AutoModelForCausalLM.from_pretrained(resumed, dtype="auto")
    single = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert model.dtype == torch.float16
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in single.items()}


def test_existing_output_is_never_overwritten_by_accident(run, tmp_path):
    adapter, _ = run
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(ConfigError, match="nothing here says that a merge wrote it"):
            merge_adapter(adapter, str(out), force=force, **QUIET)
    (out / "thesis.tex").unlink()
    merge_adapter(adapter, str(out), verify=False, **QUIET)
    with pytest.raises(ConfigError, match="--force replaces it"):
        merge_adapter(adapter, str(out), **QUIET)
    report = merge_adapter(adapter, str(out), force=True, dtype="fp16", verify=False, **QUIET)
    assert report.fidelity == {}
    assert report.passed is None
    assert load_file(out / "model.safetensors")["lm_head.weight"].dtype == torch.float16
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="no merge wrote it"):
        merge_adapter(adapter, str(tmp_path / "other"), **QUIET)


def test_overflow_in_fp16_is_refused_by_name(run, tmp_path):
    adapter, _ = run
    scale_b(adapter, 1e6)
    with pytest.raises(ModelError, match=r"_proj\.weight overflows torch\.float16; use --dtype bf16"):
        merge_adapter(adapter, str(tmp_path / "out"), dtype="fp16", **QUIET)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"base": "W16"}, "--base is 'W16'; accepted are dequantized, original"),
        ({"dtype": "float16"}, "--dtype is 'float16'; accepted are bf16, fp16, fp32"),
        ({"tolerance": 0.0}, "--tolerance is 0.0; give a KL"),
        ({"tolerance": float("nan")}, "--tolerance is nan; give a KL"),
        ({"requantize": "gptq"}, "--requantize is 'gptq'; accepted are nf4, int8"),
    ],
)
def test_wrong_flags(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        merge_adapter("anything", str(tmp_path / "out"), **flags)


def test_untied_head_survives_loading(tmp_path):
    base = save_tiny(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "run", base, lora(target_modules=["q_proj", "lm_head"]))
    report = merge_adapter(adapter, str(tmp_path / "out"), dtype="fp32", **QUIET)
    assert report.untied
    assert report.fidelity["dequantized"]["kl_mean"] < 1e-6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings is False
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_run_of_the_trainer_merges_and_a_changed_base_is_noticed(tmp_path, make_trainer):
    """From training to a verified checkpoint; then the base's files change under the adapter."""
    base = save_tiny(tmp_path / "base")
    trainer = make_trainer(model=base, config={"base_quantization": "nf4", "learning_rate": 0.02, "max_steps": 3})
    trainer.train()
    trainer.save_model()
    folder = trainer.args.output_dir
    report = merge_adapter(folder, str(tmp_path / "out"), dtype="fp32", **QUIET)
    assert (report.quantization, report.assumed) == ("nf4", [])
    assert report.base_matches_training is True
    assert report.passed
    assert report.adapter_effect > 1e-3
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][0] += 1.0
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="is not the one that the adapter was trained on"):
        merge_adapter(folder, str(tmp_path / "out2"), dtype="fp32", **QUIET)
    assert not (tmp_path / "out2").exists()
