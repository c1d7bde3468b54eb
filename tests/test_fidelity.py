"""The measuring instrument itself: float32 arithmetic, KL, sequences and prompts against plain oracles."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from adapters import dense_copy, lora, save_adapter
from peft import PeftModel
from tiny import byte_tokenizer, save_tiny, tiny_model

from pgkd_peft.errors import DataError
from pgkd_peft.export.adapter import read_run
from pgkd_peft.export.rounding import Surviving
from pgkd_peft.export.verify import (
    Prompts,
    TrainedModel,
    build_sequences,
    read_prompts,
    use_float32_arithmetic,
)
from pgkd_peft.model.load import load_base

IDS = torch.tensor([[7, 99, 30, 41, 8, 120, 255, 3]])


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_float32_arithmetic_is_that_of_the_dense_model(tmp_path, kind, quantization):
    base = save_tiny(tmp_path / "base", kind)
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "down_proj"]
    adapter = save_adapter(tmp_path / "run", base, lora(target_modules=targets), quantization=quantization)
    held = load_base(base, quantization=quantization, dtype=torch.bfloat16)
    dense = PeftModel.from_pretrained(dense_copy(held, base), adapter).eval()
    model = PeftModel.from_pretrained(held, adapter).eval()
    with torch.no_grad():
        noisy = model(IDS).logits.float()
        use_float32_arithmetic(model)
        ours, expected = model(IDS).logits, dense(IDS).logits
        with model.disable_adapter():
            without = model(IDS).logits
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert (noisy - expected).abs().max() > 1e-3  # there was noise to remove
    assert (without - expected).abs().max() > 1e-2  # and an adapter to see


def test_greedy_continuations_are_argmax_of_unpadded_forwards():
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    model.generation_config.repetition_penalty = 1.7  # a model's own habits must not enter
    texts = ["Hi", "A much longer question than the other one?"]
    rows = tuple({"messages": [{"role": "user", "content": t}]} for t in texts)
    for sequence in build_sequences(model, tokenizer, Prompts(rows, ""), 6):
        ids = list(sequence.ids[: sequence.start])
        while len(ids) < sequence.start + 6:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert list(sequence.ids) == ids


def test_a_rows_own_answer_is_a_sequence_too():
    tokenizer = byte_tokenizer()
    row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    own, greedy = build_sequences(tiny_model(), tokenizer, Prompts((row,), ""), 4)
    text = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(own.ids) == text + "4" + tokenizer.eos_token
    assert (own.from_row, greedy.from_row) == (True, False)
    assert own.ids[: own.start] == greedy.ids[: greedy.start]


def test_trained_model_against_itself_its_base_and_its_answers(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(tmp_path / "run", base, lora())
    prompts = tmp_path / "p.jsonl"
    row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]}
    prompts.write_text(json.dumps(row) + "\nWhat is up?\n")
    run = read_run(adapter)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    held = load_base(base, dtype=torch.bfloat16)
    dense = PeftModel.from_pretrained(dense_copy(held, base), adapter).eval()
    with TrainedModel(run, byte_tokenizer(), read_prompts(run, str(prompts)), max_new_tokens=5) as trained:
        same = trained.compare(trained.read(dense))
        other = trained.compare(trained.read(dense, "disabled"))
        assert same.kl_max < 1e-6
        assert same.top1_agreement == 1.0
        assert same.tokens == sum(len(s.ids) - s.start for s in trained.sequences)
        assert same.answer_nll == pytest.approx(trained.answer_nll, abs=1e-4)
        assert trained.adapter_effect == pytest.approx(other.kl_mean, rel=1e-3)
        assert other.top1_agreement < 1.0
        assert 1e-7 < trained.arithmetic_floor < 0.1 * trained.adapter_effect
    assert list(Path(tempfile.gettempdir()).iterdir()) == []  # nothing of it went to the disk


def test_prompts_from_a_file_the_run_or_the_neutral_set(tmp_path):
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(tmp_path / "run", base, lora())
    file = tmp_path / "prompts.txt"
    file.write_text('Hello?\n\n{"prompt": "Hi"}\n{"messages": [{"role": "user", "content": "Yes"}], "tools": null}\n')
    given = read_prompts(read_run(adapter), str(file))
    assert [r["messages"][0]["content"] for r in given.rows] == ["Hello?", "Hi", "Yes"]
    neutral = read_prompts(read_run(adapter), None)
    assert neutral.neutral
    assert "built-in neutral prompts" in neutral.source
    run_json = tmp_path / "run" / "run.json"
    run_json.write_text(json.dumps({**json.loads(run_json.read_text()), "holdout_prompts": "holdout.jsonl"}))
    (tmp_path / "run" / "holdout.jsonl").write_text('{"messages": [{"role": "user", "content": "Held out"}]}\n')
    own = read_prompts(read_run(adapter), None)
    assert own.rows[0]["messages"][0]["content"] == "Held out"
    assert not own.neutral
    file.write_text('fine\n{"messages": []}\n{broken\n')
    with pytest.raises(DataError, match=r"line 2: needs 'messages'.*\n.*line 3: Expecting property name"):
        read_prompts(read_run(adapter), str(file))
    with pytest.raises(DataError, match="is no file"):
        read_prompts(read_run(adapter), str(tmp_path / "none"))


def test_rows_are_read_as_training_reads_them(tmp_path):
    """Columns as JSON text, and ends of lines inside a text."""
    adapter = save_adapter(tmp_path / "run", save_tiny(tmp_path / "base"), lora())
    turns = [{"role": "user", "content": "2\u2028+\u00852?"}, {"role": "assistant", "content": "4"}]
    plain = {"messages": turns, "tools": [], "chat_template_kwargs": {}}
    texts = {"messages": json.dumps(turns), "tools": "[]", "chat_template_kwargs": '{"date": "today"}'}
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (plain, texts)), encoding="utf-8")
    prompts = read_prompts(read_run(adapter), str(file))
    assert len(prompts.rows) == 2
    first, second, *greedy = build_sequences(tiny_model(), byte_tokenizer(), prompts, 4)
    assert first == second
    assert greedy[0] == greedy[1]
    assert "2\u2028+\u00852?" in byte_tokenizer().decode(first.ids)
    file.write_text(json.dumps({"messages": [{"role": "nobody", "content": "Hi"}]}))
    with pytest.raises(DataError, match=r"line 1: .*nobody"):
        read_prompts(read_run(adapter), str(file))


def test_surviving_share_and_noise_of_a_known_rounding():
    base = torch.tensor([0.0, 0.0, 0.0, 0.0])
    merged = torch.tensor([0.4, 0.6, -0.6, 1.0])
    one = Surviving()
    one.add(base, merged, torch.round)  # E = 0, 1, -1, 1
    d, e = merged.tolist(), [0.0, 1.0, -1.0, 1.0]
    assert one.share == pytest.approx(sum(x * y for x, y in zip(d, e)) / sum(x * x for x in d))
    assert one.noise == pytest.approx(math.sqrt(sum((y - x) ** 2 for x, y in zip(d, e)) / sum(x * x for x in d)))
    assert (one.changed, one.elements) == (3, 4)
    two = Surviving.total([one.as_dict(), one.as_dict()])
    assert (two.share, two.noise, two.changed) == (pytest.approx(one.share), pytest.approx(one.noise), 6)
