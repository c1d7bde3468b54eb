"""GGUF files, read back by the gguf package, by Transformers, and by llama.cpp where a binding is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import lora, save_adapter
from bpe import bpe_tokenizer
from safetensors.torch import load_file
from tiny import VOCAB, byte_tokenizer, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, Qwen3Config, Qwen3ForCausalLM

from pgkd_peft.errors import ConfigError, ModelError
from pgkd_peft.export.adapter import read_run
from pgkd_peft.export.gguf import write_gguf_lora
from pgkd_peft.export.gguf_format import Architecture, pre_tokenizer_name
from pgkd_peft.export.merge import VerificationError, merge_adapter
from pgkd_peft.export.merged_weights import MergedWeights
from pgkd_peft.export.publish import GGUF_TOLERANCE, export_adapter

gguf = pytest.importorskip("gguf")
QUIET = {"log": lambda _: None}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def trained_run(tmp_path: Path, kind: str = "llama", config=None, *, pre: str = "gpt-2", **overrides) -> str:
    if kind == "qwen3":
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=VOCAB,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,
                max_position_embeddings=512,
                eos_token_id=4,
            )
        )
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.mul_(4.0) if p.dim() == 2 else p.add_(0.3 * torch.randn_like(p)) if "norm" in name else None
        model.save_pretrained(tmp_path / "base")
    else:
        save_tiny(tmp_path / "base", kind, **overrides)
    bpe_tokenizer(pre).save_pretrained(tmp_path / "base")
    return save_adapter(tmp_path / "run", str(tmp_path / "base"), config or lora())


def read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def read_config(adapter: str):
    return MergedWeights(read_run(adapter, **QUIET)).config


@pytest.mark.parametrize(
    ("kind", "gguf_type"), [("llama", "f32"), ("llama", "q8_0"), ("qwen", "f16"), ("qwen", "q8_0"), ("qwen3", "f32")]
)
def test_transformers_reads_the_trained_model_back(tmp_path, kind, gguf_type):
    adapter = trained_run(tmp_path, kind, pre="smollm" if kind == "llama" else "qwen2")
    file = tmp_path / "model.gguf"
    report = export_adapter(adapter, str(file), format="gguf", gguf_type=gguf_type, **QUIET)
    assert report.fidelity["kl_mean"] < {"f32": 1e-7, "f16": 1e-5, "q8_0": GGUF_TOLERANCE["q8_0"]}[gguf_type]
    assert {"f32": 0.0, "f16": 1e-5, "q8_0": 1e-3}[gguf_type] <= report.rounding
    assert report.rounding <= {"f32": 0.0, "f16": 1e-3, "q8_0": 1e-2}[gguf_type]
    merge_adapter(adapter, str(tmp_path / "merged"), dtype="fp32", verify=False, **QUIET)
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="model.gguf",
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        **(
            {"config": read_config(adapter)} if kind == "qwen3" else {}
        ),  # the reader knows Qwen3's usual head size only
    ).state_dict()
    assert loaded.keys() == expected.keys()
    for key, tensor in expected.items():
        atol = {"f32": 0.0, "f16": 2e-3, "q8_0": 2e-2}[gguf_type]
        torch.testing.assert_close(loaded[key], tensor, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
    assert sorted(p.name for p in tmp_path.glob("*.gguf*")) == ["model.gguf"]


def test_metadata_and_vocabulary(tmp_path):
    adapter = trained_run(tmp_path, "llama", rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)
    export_adapter(adapter, str(tmp_path / "m.gguf"), format="gguf", verify=False, **QUIET)
    fields, tensors = read(tmp_path / "m.gguf")
    tokenizer = bpe_tokenizer()
    assert fields["general.architecture"] == "llama"
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (4, 2)
    assert (fields["llama.rope.dimension_count"], fields["llama.block_count"]) == (16, 2)
    assert fields["llama.rope.freq_base"] == 10000.0
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == VOCAB == len(kinds)
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert kinds[4] == gguf.TokenType.CONTROL
    assert kinds[-1] == gguf.TokenType.UNUSED
    assert len(fields["tokenizer.ggml.merges"]) == VOCAB - 2 - 256 - 6
    assert "output.weight" not in tensors  # tied
    assert tensors["blk.0.attn_norm.weight"].dtype == np.float32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = 1.0 / 10000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / tensors["rope_freqs.weight"], model.model.rotary_emb.inv_freq, rtol=1e-5)
    assert len(set(tensors["rope_freqs.weight"].round(3))) >= 3  # scaled, blended, untouched


def test_transformers_reads_the_tokenizer_back(tmp_path):
    adapter = trained_run(tmp_path)
    export_adapter(adapter, str(tmp_path / "m.gguf"), format="gguf", verify=False, **QUIET)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "the cat ate <|im_end|> Zürich, 1642!"
    assert tokenizer(text)["input_ids"] == bpe_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize(
    "config",
    [lora(), lora(use_rslora=True), lora(rank_pattern={"q_proj": 8}, alpha_pattern={"k_proj": 32}, lora_alpha=3)],
    ids=["plain", "rslora", "patterns"],
)
@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_lora_file_holds_the_delta(tmp_path, kind, config):
    """alpha / rank * B A of the file, rows put back into Transformers' order, is what the adapter adds."""
    adapter = trained_run(tmp_path, kind, config)
    file = tmp_path / "lora.gguf"
    export_adapter(adapter, str(file), format="gguf-lora", **QUIET)
    fields, tensors = read(file)
    arch = {"llama": "llama", "qwen": "qwen2"}[kind]
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == ("adapter", "lora", arch)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], 2)
    found = 0
    for tensor in MergedWeights(read_run(adapter)).tensors():
        name = names.get_name(tensor.key, try_suffixes=(".weight", ".bias"))
        if not tensor.linear:
            assert f"{name}.lora_a" not in tensors
            continue
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        delta = fields["adapter.lora.alpha"] / len(a) * (b @ a)
        if arch == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = 4 if "attn_q" in name else 2
            half = len(b) // heads // 2  # llama.cpp's row 2i + s of a head is Transformers' row s * half + i
            order = [h * 2 * half + s * half + i for h in range(heads) for i in range(half) for s in range(2)]
            back = np.empty_like(delta)
            back[order] = delta
            delta = back
        np.testing.assert_allclose(delta, (tensor.merged - tensor.base).numpy(), rtol=0, atol=1e-5)
        found += 1
    assert 2 * found == len(tensors) == 2 * 14


def test_refusals_by_name(tmp_path):
    adapter = trained_run(tmp_path)
    with pytest.raises(ConfigError, match="must end in"):
        export_adapter(adapter, str(tmp_path / "x"), format="gguf", **QUIET)
    with pytest.raises(ConfigError, match="--gguf-type is 'q4_k'; accepted are f16, q8_0, f32"):
        export_adapter(adapter, str(tmp_path / "x.gguf"), format="gguf", gguf_type="q4_k", **QUIET)
    (tmp_path / "x.gguf").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        export_adapter(adapter, str(tmp_path / "x.gguf"), format="gguf", **QUIET)
    gpt2 = save_adapter(tmp_path / "gpt2run", save_tiny(tmp_path / "gpt2", "gpt2"), lora(target_modules=["c_attn"]))
    with pytest.raises(ModelError, match=r"model type 'gpt2' cannot be written as GGUF here; llama, qwen2, qwen3 can"):
        export_adapter(gpt2, str(tmp_path / "g.gguf"), format="gguf-lora", **QUIET)
    for name, config in {
        "DoRA": lora(use_dora=True),
        "replaces whole weights": lora(modules_to_save=["norm"]),
        "shares its weight": lora(target_modules=["lm_head"]),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        tied = {"tie_word_embeddings": True} if "lm_head" in config.target_modules else {}
        run = read_run(trained_run(folder, "llama", config, **tied))
        if tied:  # PEFT also saves the base's embedding beside a LoRA on the head
            weights = MergedWeights(run)
            weights.overrides.clear()
            weights.untied = False
        else:
            weights = MergedWeights(run)
        with pytest.raises(ModelError, match=name):
            write_gguf_lora(weights, folder / "l.gguf", name="x")
        assert not list(folder.glob("*.gguf*"))


@pytest.mark.parametrize("setting", [{"use_sliding_window": True}, {"rope_parameters": {"rope_type": "longrope"}}])
def test_settings_without_a_gguf_form_are_refused(setting):
    config = Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    for key, value in setting.items():
        setattr(config, key, value)
    with pytest.raises(ModelError, match=r"use_sliding_window|'longrope'"):
        Architecture(config).rope_factors()


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2"])
def test_pre_tokenizers_have_their_names(pre):
    assert pre_tokenizer_name(json.loads(bpe_tokenizer(pre).backend_tokenizer.to_str())) == pre


def test_unknown_tokenizers_are_refused(tmp_path):
    for tokenizer in (byte_tokenizer(), bpe_tokenizer("unknown")):
        with pytest.raises(ModelError, match="tokenize some texts differently"):
            pre_tokenizer_name(json.loads(tokenizer.backend_tokenizer.to_str()))
    backend = json.loads(bpe_tokenizer().backend_tokenizer.to_str())
    with pytest.raises(ModelError, match="SentencePiece"):
        pre_tokenizer_name({**backend, "model": {**backend["model"], "byte_fallback": True}})


def test_a_file_that_does_not_read_back_is_removed(tmp_path, monkeypatch):
    adapter = trained_run(tmp_path)
    write = gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(
        gguf.GGUFWriter, "write_tensor_data", lambda self, array: write(self, array + array.dtype.type(1))
    )
    with pytest.raises(ModelError, match="does not read back as it was written: blk"):
        export_adapter(adapter, str(tmp_path / "m.gguf"), format="gguf", **QUIET)
    assert not list(tmp_path.glob("*gguf*"))


def test_a_file_that_is_not_the_trained_model_is_reported(tmp_path, monkeypatch):
    adapter = trained_run(tmp_path)
    monkeypatch.setattr(Architecture, "reorder_rows", lambda self, key, array: array)
    with pytest.raises(VerificationError, match="is not the model that was trained"):
        export_adapter(adapter, str(tmp_path / "m.gguf"), format="gguf", **QUIET)
    assert [p.name for p in tmp_path.glob("*.gguf")] == ["m.unverified.gguf"]


def top_probabilities(xllamacpp, model: Path, prompt: list[int], lora_file: Path | None = None) -> dict[int, float]:
    """llama.cpp's likeliest next tokens after `prompt`, token id -> log-probability."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup, params.port = 256, 1, False, 0
    params.cpuparams.n_threads = 1
    if lora_file is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo(str(lora_file), 1.0)
        params.lora_adapters = [adapter]
    server = xllamacpp.Server(params)
    request = {"prompt": prompt, "n_predict": 1, "n_probs": 20, "temperature": -1.0, "cache_prompt": False}
    answer = server.handle_completions(request)
    found = answer["choices"][0]["logprobs"]  # None where the likeliest token is a stop token
    return {c["id"]: c["logprob"] for c in found["content"][0]["top_logprobs"]} if found else {4: 0.0}


@pytest.mark.parametrize("kind", ["llama", "qwen", "qwen3"])
def test_llama_cpp_gives_the_same_probabilities(tmp_path, kind):
    """The merged file, and the base with the LoRA file on it, against the merged model in Transformers."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="no llama.cpp binding is installed (pip install xllamacpp)")
    adapter = trained_run(tmp_path, kind, pre="qwen2")
    merged, lora_file, base = (tmp_path / name for name in ("merged.gguf", "lora.gguf", "base.gguf"))
    export_adapter(adapter, str(merged), format="gguf", gguf_type="f32", verify=False, **QUIET)
    export_adapter(adapter, str(lora_file), format="gguf-lora", **QUIET)
    weights = MergedWeights(read_run(adapter, **QUIET))
    weights.layers.clear()  # the base alone
    weights.overrides.clear()
    from pgkd_peft.export.gguf import write_gguf_model

    write_gguf_model(weights, bpe_tokenizer("qwen2"), base, "f32", name="base")
    merge_adapter(adapter, str(tmp_path / "hf"), dtype="fp32", verify=False, **QUIET)
    prompt = [60, 70, 80, 90, 100, 65, 75]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    for found in (top_probabilities(xllamacpp, merged, prompt), top_probabilities(xllamacpp, base, prompt, lora_file)):
        assert max(found, key=found.get) == int(expected.argmax())
        for token, log_prob in found.items():
            assert log_prob == pytest.approx(float(expected[token]), abs=0.02)
    without = top_probabilities(xllamacpp, base, prompt)
    assert max(abs(p - float(expected[t])) for t, p in without.items()) > 0.1  # the LoRA file does something
    assert "xllamacpp" in sys.modules
