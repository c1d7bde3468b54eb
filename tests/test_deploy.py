"""What an export leaves for those who run models: K-quants, the Ollama Modelfile, commands, names, rights."""

from __future__ import annotations

import json
import re
import stat
import sys
from pathlib import Path

import pytest
from bpe import bpe_tokenizer
from test_gguf_export import QUIET, read, top_probabilities, trained_run
from tiny import CHATML

from pgkd_peft import cli
from pgkd_peft.errors import ModelError
from pgkd_peft.export import kquants
from pgkd_peft.export.adapter import read_run
from pgkd_peft.export.merge import merge_adapter
from pgkd_peft.export.modelfile import modelfile, read_turns
from pgkd_peft.export.publish import export_adapter

gguf = pytest.importorskip("gguf")

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SMOLLM = (  # a system turn of its own where none is given
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (  # no system turn, and another name for the assistant
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (  # the system's words stand in the user's turn
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}[INST] {{ (s if loop.first else '') + m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
LAST_ONLY = (  # earlier turns are dropped: no loop over turns
    "{{ messages[-1]['content'] }}{% if add_generation_prompt %} =>{% endif %}"
)


def render_go(template: str, messages: list[dict[str, str]]) -> str:
    """The part of Go's template language that a Modelfile of ours uses, by a walk over its actions."""
    pieces = re.split(r"\{\{ ?(.*?) ?\}\}", template)  # text, action, text, action, ..., text

    def run(i: int, dot: dict, active: bool) -> tuple[str, int, str]:
        """Text from piece `i` on up to the `else` or `end` of this level: (text, its number, that action)."""
        out = ""
        while True:
            if i % 2 == 0:
                out += pieces[i] if active else ""
                i += 1
                if i >= len(pieces):
                    return out, i, ""
            action = pieces[i]
            if action == "end" or action.startswith("else"):
                return out, i, action
            if action == ".Content":
                out += dot["content"] if active else ""
                i += 1
            elif action == "range .Messages":
                for message in messages:
                    inner, end, _ = run(i + 1, message, active)
                    out += inner
                i = end + 1
            elif action.startswith("if"):
                done = False
                while action != "end":
                    meant = not done and truth(action.removeprefix("else "), dot)
                    inner, i, action = run(i + 1, dot, active and meant)
                    out += inner
                    done = done or meant
                i += 1
            else:
                raise AssertionError(f"unknown action {action!r}")

    def truth(condition: str, dot: dict) -> bool:
        if condition == "if not .System":
            return not any(m["role"] == "system" for m in messages)
        found = re.fullmatch(r'if eq \.Role "(\w+)"', condition)
        assert found, condition
        return dot["role"] == found[1]

    return run(0, {}, True)[0]


def conversation(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"some words, {i}"} for i, role in enumerate(roles)]


def tokenizer_with(template: str, **tokens):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = template
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "system"),
    [(CHATML, True), (SMOLLM, True), (LLAMA3, True), (GEMMA, False), (MISTRAL, False)],
    ids=["chatml", "smollm", "llama3", "gemma", "mistral"],
)
def test_the_go_template_renders_what_the_chat_template_does(tmp_path, template, system):
    tokenizer = tokenizer_with(template)
    text, missing = modelfile("m.gguf", tokenizer, tmp_path)
    go = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    roles = [("user",), ("user", "assistant", "user"), ("user", "assistant") * 3 + ("user",)]
    roles += [("system", *some) for some in roles] if system else []
    for some in roles:
        messages = conversation(*some)
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render_go(go, messages) == expected
    assert bool(missing) is not system
    if not system:
        assert "system turn is left out" in missing[0]
        assert "# Not here: a system turn is left out" in text


def test_a_bos_that_the_runtime_adds_is_not_in_the_template():
    turns, _ = read_turns(tokenizer_with(LLAMA3), without_bos=True)
    assert "<bos>" not in turns.as_go()
    assert "<bos>" in read_turns(tokenizer_with(LLAMA3), without_bos=False)[0].as_go()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LAST_ONLY, "cannot be written as a loop over turns"),
        (CHATML.replace("<|im_end|>", '"""'), "signs that mean something to Ollama"),
        (None, "no chat template"),
    ],
)
def test_what_cannot_be_derived_is_said(tmp_path, template, words):
    text, missing = modelfile("m.gguf", tokenizer_with(template), tmp_path)
    assert words in missing[0]
    assert f"# Not here: {missing[0][:40]}" in text
    assert "TEMPLATE" not in text.replace("# ", "")
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_stop_tokens_are_those_of_training(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    other = tokenizer.convert_tokens_to_ids("<eos>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [other]}))
    text, _ = modelfile("m.gguf", tokenizer, tmp_path)
    assert re.findall(r'PARAMETER stop "(.*)"', text) == ["<|im_end|>", "<eos>"] or set(
        re.findall(r'PARAMETER stop "(.*)"', text)
    ) == {"<|im_end|>", "<eos>"}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_an_export_has_its_modelfile_its_name_its_commands_and_can_be_read(tmp_path, capsys):
    adapter = trained_run(tmp_path)
    out = tmp_path / "out" / "My Model.gguf"
    assert cli.main(["export", adapter, "--format", "gguf", "--out", str(out), "--no-verify"]) == 0
    shown = capsys.readouterr().out
    written = (out.parent / "Modelfile").read_text()
    assert written.startswith("FROM ./My Model.gguf\n")
    assert "Next:" in shown
    assert f"llama-server -m '{out}'" in shown
    assert f"ollama create my-model -f {out.parent / 'Modelfile'} && ollama run my-model" in shown
    assert "--enable-lora --max-lora-rank 8 --lora-modules run=" in shown
    fields, _ = read(out)
    assert fields["general.name"] == "base run"
    assert {mode(path) for path in out.parent.iterdir()} == {0o644}
    # a second file beside it does not take the first one's Modelfile
    second = out.with_name("second.gguf")
    export_adapter(adapter, str(second), format="gguf", verify=False, **QUIET)
    assert (out.parent / "Modelfile").read_text() == written
    assert (out.parent / "second.Modelfile").read_text().startswith("FROM ./second.gguf\n")


def test_a_lora_that_vllm_refuses_gets_no_vllm_command(tmp_path):
    from adapters import lora

    from pgkd_peft.export.next_steps import after_gguf, next_lines, ollama_name

    run = read_run(trained_run(tmp_path, "llama", lora(use_dora=True)), **QUIET)
    told = next_lines(after_gguf(tmp_path / "m.gguf", tmp_path / "Modelfile", run))
    assert "vllm serve" not in told
    assert told.count("\n") == 2
    assert ollama_name(Path("Über Q4_K_M.gguf")) == "ber-q4_k_m"


def test_a_merge_can_be_read_by_others_and_says_what_comes_next(tmp_path):
    said = []
    adapter = trained_run(tmp_path)
    merge_adapter(adapter, str(tmp_path / "merged"), verify=False, log=said.append)
    files = [path for path in (tmp_path / "merged").rglob("*") if path.is_file()]
    assert len(files) >= 5
    assert {mode(path) for path in files} == {0o644}
    assert f"vllm serve {tmp_path / 'merged'}" in said[-1]
    export_adapter(adapter, str(tmp_path / "peft"), base_id="org/base", verify=False, log=said.append)
    assert {mode(path) for path in (tmp_path / "peft").rglob("*") if path.is_file()} == {0o644}
    assert "vllm serve org/base --enable-lora" in said[-1]


# A stand-in for llama.cpp's llama-quantize: the same call, and a file with its matrices in q5_0.
QUANTIZE = """\
import sys
import gguf
source, target, kind = sys.argv[1:]
if kind == {refuse!r}:
    sys.exit("no such type: " + kind)
reader = gguf.GGUFReader(source)
writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
for name, field in reader.fields.items():
    if not name.startswith("GGUF.") and name != "general.architecture":
        kinds = list(field.types)
        writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
for tensor in reader.tensors:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if len(tensor.shape) > 1:
        wanted = gguf.GGMLQuantizationType.Q5_0
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    else:
        writer.add_tensor(tensor.name, values)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def stand_in(tmp_path, monkeypatch, refuse: str = "") -> None:
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    (tmp_path / "quantize.py").write_text(QUANTIZE.format(refuse=refuse))
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "quantize.py"} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


def with_pi(adapter: str) -> None:
    """Held-out rows with PI in the run's folder, as training leaves them."""
    folder = Path(adapter)
    rows = [
        {
            "messages": [{"role": "user", "content": f"what did cat {i} eat"}, {"role": "assistant", "content": "rat"}],
            "privileged_messages": "the cat ate the rat in 1642",
        }
        for i in range(4)
    ]
    (folder / "holdout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**info, "holdout_prompts": "holdout.jsonl"}))


def test_a_k_quant_is_measured_as_a_merge_is(tmp_path, monkeypatch):
    """KL, top-1 and the recovered gap of the file; the gap by hand from the answers that base with PI gives."""
    adapter = trained_run(tmp_path)
    with_pi(adapter)
    stand_in(tmp_path, monkeypatch)
    said = []
    report = export_adapter(
        adapter, str(tmp_path / "m.gguf"), format="gguf", gguf_type="q4_k_m", tolerance=10.0, log=said.append
    )
    assert report.types == {"Q5_0": 16}
    assert 0.01 < report.rounding < 0.1
    assert report.bytes == (tmp_path / "m.gguf").stat().st_size
    assert 0 < report.fidelity["kl_mean"] < 1
    assert report.fidelity["recovered"] == pytest.approx(report.trained["recovered"], abs=0.5)
    assert report.fidelity["recovered"] != report.trained["recovered"]
    told = "\n".join(said)
    assert "Q4_K_M: " in told
    assert "16 in Q5_0" in told
    assert "recovered gap in nats" in told
    assert sorted(p.name for p in tmp_path.glob("*.gguf*")) == ["m.gguf"]
    fine = export_adapter(adapter, str(tmp_path / "f.gguf"), format="gguf", gguf_type="f32", **QUIET)
    assert fine.fidelity["recovered"] == pytest.approx(fine.trained["recovered"], rel=1e-3)
    assert fine.fidelity["kl_mean"] < report.fidelity["kl_mean"]


def test_score_data_needs_a_measurement(tmp_path, capsys):
    common = ["export", str(tmp_path), "--out", "x.gguf", "--score-data", "rows.jsonl"]
    assert cli.main([*common, "--format", "gguf", "--no-verify"]) == 2
    assert cli.main([*common, "--format", "gguf-lora"]) == 2
    assert capsys.readouterr().err.count("--score-data is read by the measurement") == 2


def test_a_quantizer_that_fails_or_is_missing_is_named(tmp_path, monkeypatch):
    adapter = trained_run(tmp_path)
    stand_in(tmp_path, monkeypatch, refuse="Q4_K_M")
    out = str(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"made no Q4_K_M of .*\n.*no such type: Q4_K_M"):
        export_adapter(adapter, out, format="gguf", gguf_type="q4_k_m", verify=False, **QUIET)
    assert not list(tmp_path.glob("*.gguf*"))
    monkeypatch.setattr(kquants.shutil, "which", lambda _: None)
    monkeypatch.setattr(kquants, "find_spec", lambda _: None)
    monkeypatch.setattr("pgkd_peft.export.publish.read_run", None)  # not called: it is said before anything is read
    with pytest.raises(ModelError, match="pip install llama-cpp-py-sync"):
        export_adapter(adapter, out, format="gguf", gguf_type="q5_k_m", verify=False, **QUIET)


def test_a_damaged_quantization_is_found(tmp_path):
    adapter = trained_run(tmp_path)
    for name in ("a", "b"):
        export_adapter(adapter, str(tmp_path / f"{name}.gguf"), format="gguf", verify=False, **QUIET)
    assert kquants.compare_files(tmp_path / "a.gguf", tmp_path / "b.gguf")[0] == 0.0
    tensor = next(t for t in gguf.GGUFReader(tmp_path / "b.gguf", "r+").tensors if t.name.startswith("blk.0.attn_q"))
    tensor.data[0, 0] = float("nan")
    tensor.data.flush()
    with pytest.raises(ModelError, match=r"blk\.0\.attn_q"):
        kquants.compare_files(tmp_path / "a.gguf", tmp_path / "b.gguf")


def real_quantizer() -> bool:
    """Whether llama.cpp's own is here and can be loaded (its wheel needs a newer libc than some systems have)."""
    try:
        kquants.quantizer()
        if kquants.shutil.which("llama-quantize") is None:
            from llama_cpp_py_sync._cffi_bindings import get_lib

            get_lib()
    except (ModelError, ImportError, RuntimeError, OSError):
        return False
    return True


@pytest.mark.skipif(not real_quantizer(), reason="no llama.cpp quantizer is installed (pip install llama-cpp-py-sync)")
@pytest.mark.parametrize("kind", ["q4_k_m", "q5_k_m"])
def test_llama_cpp_quantizes_and_runs_what_it_wrote(tmp_path, kind):
    """Rows of 256: K types where llama.cpp gives them; what it wrote, it runs, near to the f32 file."""
    adapter = trained_run(tmp_path, hidden_size=256, intermediate_size=512, num_attention_heads=8)
    exact, small = tmp_path / "exact.gguf", tmp_path / "small.gguf"
    export_adapter(adapter, str(exact), format="gguf", gguf_type="f32", verify=False, **QUIET)
    report = export_adapter(adapter, str(small), format="gguf", gguf_type=kind, tolerance=10.0, **QUIET)
    assert {"q4_k_m": "Q4_K", "q5_k_m": "Q5_K"}[kind] in report.types
    assert report.fidelity["kl_mean"] > 0
    assert small.stat().st_size < 0.5 * exact.stat().st_size
    fields, _ = read(small)
    assert fields["general.name"] == "base run"
    xllamacpp = pytest.importorskip("xllamacpp")
    shared = 0  # of the 20 likeliest next tokens each; 1.3 of 320 by chance
    for prompt in ([60, 70, 80, 90, 100, 65, 75], [80, 90, 60, 66]):
        there, here = top_probabilities(xllamacpp, exact, prompt), top_probabilities(xllamacpp, small, prompt)
        shared = max(shared, len(set(there) & set(here)))
    assert shared >= 8


def test_the_card_of_a_run_is_ours_and_its_code_loads_the_student(tmp_path):
    """What training leaves in the run folder, read as a stranger would: base, settings, and code that runs."""
    from runs import make_trainer
    from tiny import save_tiny

    base = save_tiny(tmp_path / "base")
    trainer = make_trainer(base, str(tmp_path / "run"), settings={"max_steps": 2, "learning_rate": 0.1})
    trainer.train()
    trainer.save_model()
    run = tmp_path / "run"
    card = (run / "README.md").read_text()
    assert "None" not in card.replace("NoneType", "")
    assert "library_name: peft" in card
    assert "\n# run\n" in card
    assert "- Loss: " in card
    assert "learning_rate 0.1" in card
    assert str(tmp_path) not in card
    assert mode(run / "adapter_model.safetensors") == 0o644
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    scope: dict = {}
    exec(code.replace("THE_BASE_MODEL", base).replace("THIS_ADAPTER", str(run)), scope)
    assert scope["model"].peft_config["default"].r == trainer.model.peft_config["default"].r
    trainer.create_model_card("other", dataset_name="org/rows", tags="mine")
    card = (run / "README.md").read_text()
    assert "# other\n" in card
    assert "- org/rows" in card
    assert "- mine" in card
