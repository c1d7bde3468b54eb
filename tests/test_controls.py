"""Controls: what they take away, that nothing else changes, and how eval trains, reuses and shows them."""

from __future__ import annotations

import json
import shutil
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import ROWS, TINY_RUN, byte_tokenizer, save_tiny

from pgkd_peft import DataCollatorForPrivilegedGKD, PrivilegedGKDConfig, cli
from pgkd_peft.data.files import to_dataset
from pgkd_peft.errors import ConfigError, DataError
from pgkd_peft.evaluation.controls import CONTROLS, check_controls, control_rows, control_settings, deranged
from pgkd_peft.evaluation.sft_control import SFTControlTrainer, tokens_of
from pgkd_peft.view.report import collect, write_report


@pytest.fixture
def config(tmp_path):
    return PrivilegedGKDConfig(output_dir=str(tmp_path / "run"), bf16=False, base_quantization="none")


# ---- what is taken away --------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.integers(0, 3))
def test_no_place_keeps_its_text_whenever_that_is_possible(numbers, seed):
    texts = [f"text {number}" for number in numbers]
    if 2 * max(Counter(texts).values()) > len(texts):
        with pytest.raises(DataError, match="Leave shuffled out"):
            deranged(texts, seed)
        return
    order = deranged(texts, seed)
    assert sorted(order) == list(range(len(texts)))
    assert all(texts[source] != texts[i] for i, source in enumerate(order))
    assert order == deranged(texts, seed)


def test_the_order_is_random_but_the_seed_s():
    texts = [f"fact {i // 3}" for i in range(60)]
    orders = [deranged(texts, seed) for seed in range(5)]
    assert len({tuple(order) for order in orders}) == 5
    # the rows of one fact do not all get the PI of one other fact: that would teach a consistent falsehood
    received = [[texts[source] for source in orders[0][3 * i : 3 * i + 3]] for i in range(20)]
    assert sum(len(set(three)) > 1 for three in received) > 10


def test_shuffled_rows_differ_in_nothing_but_pi(config):
    plain = [*ROWS, {**ROWS[1], "privileged_messages": "It was Grace Hopper."}]
    rows = to_dataset([{**row, "number": i} for i, row in enumerate(plain)])
    shuffled = control_rows("shuffled", rows, config)
    assert len(shuffled) == len(rows) == 5
    for before, after in zip(rows, shuffled):
        assert {k: v for k, v in after.items() if k != "privileged_messages"} == {
            k: v for k, v in before.items() if k != "privileged_messages"
        }
        assert (after["privileged_messages"] is None) == (before["privileged_messages"] is None)
        if before["privileged_messages"] is not None:
            assert after["privileged_messages"] != before["privileged_messages"]
    values = [sorted(json.dumps(row["privileged_messages"]) for row in part) for part in (rows, shuffled)]
    assert values[0] == values[1]
    assert shuffled[2]["privileged_messages"] is None


def test_no_pi_leaves_the_teacher_what_the_student_reads(config):
    rows = to_dataset([{**row, "teacher_chat_template_kwargs": {"think": True}} for row in ROWS])
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}{% if think %}{{ 'Hm.' }}{% endif %}"
    )
    collator = DataCollatorForPrivilegedGKD(byte_tokenizer(template))
    differ = [collator.encode(row)["student_text"] != collator.encode(row)["teacher_text"] for row in rows]
    assert differ == [True] * 4
    for row in control_rows("no_pi", rows, config):
        encoded = collator.encode(row)
        assert encoded["student_ids"] == encoded["teacher_ids"]
        assert encoded["completion_ids"]


@pytest.mark.parametrize("name", ["sft", "offline"])
def test_rows_without_an_answer_are_named(config, name):
    prompt = {"messages": [{"role": "user", "content": "Hi"}], "privileged_messages": "There"}
    with pytest.raises(DataError, match=rf"control {name} .* 2 of 4 rows .*rows 1, 3.* leave {name} out"):
        control_rows(name, to_dataset([ROWS[0], prompt, ROWS[1], prompt]), config)
    assert len(control_rows(name, to_dataset(ROWS), config)) == 4


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("shuffled", [ROWS[2]], "no row has PI in 'privileged_messages'"),
        ("no_pi", [ROWS[2]], "no row has PI"),
        ("shuffled", [ROWS[0], ROWS[2]], "but all 1 rows with PI"),
        ("shuffled", [ROWS[1], ROWS[1]], r"but all 2 rows with PI have the same \('It was Tony Hoare\.'\)"),
        ("shuffled", [ROWS[1], ROWS[1], ROWS[0]], "but 2 of the 3 rows"),
    ],
)
def test_controls_that_would_be_the_run_itself_or_cannot_be(config, name, rows, words):
    with pytest.raises(DataError, match=words):
        control_rows(name, to_dataset(rows), config)


def test_settings_of_a_control(config):
    config.push_to_hub, config.run_name = True, "mine"
    folder = config.output_dir
    control_settings("offline", config)
    assert (config.lmbda, config.seq_kd, config.push_to_hub) == (0.0, False, False)
    assert config.output_dir == f"{folder}/controls/offline"
    assert config.run_name == "mine-offline"
    config.lmbda = 0.0
    with pytest.raises(ConfigError, match="offline is this run itself"):
        control_settings("offline", config)


def test_names():
    assert check_controls(["shuffled,no_pi", "sft", "shuffled"]) == ["shuffled", "no_pi", "sft"]
    with pytest.raises(ConfigError, match=r"no control 'shufled'; did you mean shuffled\? .*offline"):
        check_controls(["shufled"])
    with pytest.raises(ConfigError, match="controls is empty"):
        check_controls([","])


# ---- sft -----------------------------------------------------------------------------------------------------------


def sft(path, config, rows=ROWS, **kwargs):
    return SFTControlTrainer(path, config, to_dataset(rows), **kwargs)


def test_sft_starts_where_the_run_starts(llama_path, make_config, make_trainer, tmp_path):
    control = sft(llama_path, make_config(output_dir=str(tmp_path / "sft")))
    run = make_trainer(model=llama_path)
    theirs = dict(control.model.named_parameters())
    ours = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    assert len(ours) > 10
    for name, param in ours.items():
        assert theirs[name].requires_grad
        assert theirs[name].dtype == torch.float32
        assert torch.equal(theirs[name], param), name
    assert control.frozen.digest == run.frozen.digest


def test_sft_learns_the_answer_and_nothing_else(llama_path, make_config):
    """The loss of the first step, against a plain loop over rows and tokens."""
    config = make_config(per_device_train_batch_size=4, max_steps=1)
    trainer = sft(llama_path, config)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in ROWS:
            encoded = trainer.contexts.encode(row)
            prompt, answer = encoded["student_ids"], encoded["completion_ids"]
            logits = trainer.model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
            for t, token in enumerate(answer):
                total -= logits[len(prompt) + t - 1].log_softmax(-1)[token].item()
                tokens += 1
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_sft_rows_end_with_the_turn(llama_path):
    collator = DataCollatorForPrivilegedGKD(byte_tokenizer())
    prompt_only = {"messages": [{"role": "user", "content": "Hi"}]}
    rows = tokens_of(to_dataset([ROWS[0], prompt_only]), collator)
    labels = [label for label in rows[0]["labels"] if label != -100]
    assert collator.tokenizer.decode(labels) == "Quicksort partitions around a pivot.<|im_end|>"
    assert rows[0]["input_ids"][-len(labels) :] == labels
    assert "complexity" not in collator.tokenizer.decode(rows[0]["input_ids"])
    assert set(rows[1]["labels"]) == {-100}


def test_sft_on_a_quantized_base(llama_path, make_config):
    """What TRL would do to it: round the LoRA to bfloat16. What bitsandbytes would do: repack the weights in place."""
    trainer = sft(llama_path, make_config(base_quantization="nf4", max_steps=2, eval_strategy="no"))
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    layers = [m for m in trainer.model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "quant_state")]
    assert len(layers) >= 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    before = trainer.frozen.digest
    trainer.train()
    trainer.frozen.restart()
    assert trainer.frozen.digest == before


def test_sft_is_not_resumed(llama_path, make_config):
    with pytest.raises(ConfigError, match="--overwrite"):
        sft(llama_path, make_config()).train(resume_from_checkpoint="somewhere")


# ---- the commands --------------------------------------------------------------------------------------------------


def checksum(answer, row):
    """A score that depends on every character of an answer; of the fixture's rows it gives the teacher more."""
    return zlib.crc32(answer.encode() + b"67") % 1000 / 1000


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def sums(numbers):
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus {i}?"},
                {"role": "assistant", "content": f"It is {2 * i}."},
            ],
            "privileged_messages": f"The sum is {2 * i}.",
            "answer": str(2 * i),
        }
        for i in numbers
    ]


@pytest.fixture(scope="module")
def run_with_controls(tmp_path_factory):
    """A run, and what `pgkd eval` made of it with all controls."""
    folder = tmp_path_factory.mktemp("controls")
    (folder / "data").mkdir()
    write_rows(folder / "data" / "train.jsonl", sums(range(4)))
    write_rows(folder / "data" / "test.jsonl", sums(range(4, 7)))
    write_rows(folder / "neutral.jsonl", [{"messages": [{"role": "user", "content": text}]} for text in ("Hi", "Why?")])
    recipe = {
        "model_name_or_path": save_tiny(folder / "model", seed=9),
        "dataset_name": str(folder / "data"),
        "output_dir": str(folder / "run"),
        **TINY_RUN,
        "privileged_placement": "user",
        "scorer": "test_controls:checksum",
        "neutral_dataset_name": str(folder / "neutral.jsonl"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    assert cli.main(["train", "--config", str(folder / "recipe.yaml")]) == 0
    flags = ["--max_new_tokens", "8", "--show", "1"]
    assert cli.main(["eval", str(folder / "run"), *flags, "--controls", "shuffled,no_pi", "sft", "offline"]) == 0
    return folder


@pytest.fixture
def copied(run_with_controls, tmp_path):
    """A copy of the run's folder, to change."""
    shutil.copytree(run_with_controls / "run", tmp_path / "run")
    return tmp_path / "run"


def read(path):
    return json.loads(Path(path).read_text("utf-8"))


def test_every_control_is_one_and_says_so(run_with_controls):
    run = run_with_controls / "run"
    own = read(run / "run.json")
    assert (own["control"], own["finished"], own["steps"]) == (None, True, 2)
    adapters = {"run": load_file(run / "adapter_model.safetensors")}
    for name in CONTROLS:
        folder = run / "controls" / name
        info = read(folder / "run.json")
        assert (info["control"], info["finished"], info["steps"]) == (name, True, 2)
        assert info["base_digest"] == own["base_digest"]
        assert info["seed"] == own["seed"]
        assert info["config"]["learning_rate"] == own["config"]["learning_rate"]
        assert f"This is the control `{name}`" in (folder / "README.md").read_text("utf-8")
        assert (folder / "metrics.jsonl").is_file()
        adapters[name] = load_file(folder / "adapter_model.safetensors")
    assert read(run / "controls" / "sft" / "run.json")["teacher_adapter"] is None
    names = list(adapters)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert any(not torch.equal(adapters[one][k], adapters[other][k]) for k in adapters[one]), (one, other)
    # without PI teacher and student agree from the start, so nothing is learnt but rounding
    assert max(t.abs().max() for k, t in adapters["no_pi"].items() if "lora_B" in k) < 0.2 * max(
        t.abs().max() for k, t in adapters["run"].items() if "lora_B" in k
    )


def test_results_have_a_row_a_control(run_with_controls):
    run = run_with_controls / "run"
    results = read(run / "eval_results.json")
    assert results["scorer"] == "test_controls:checksum"  # the recipe's
    assert list(results["controls"]) == ["shuffled", "no_pi", "sft", "offline"]
    for control in results["controls"].values():
        assert (control["base"], control["teacher"]) == (results["base"], results["teacher"])
        assert control["n"] == results["n"] == 3
        assert control["drift"] >= 0
        assert list(control["columns"]) == ["student"]
        expected = (control["student"] - control["base"]) / (control["teacher"] - control["base"])
        assert control["recovered"] == pytest.approx(expected)
        assert control["columns"]["student"]["length_tokens"] > 0
        low, high = control["recovered_interval"]
        assert low <= high
    assert results["controls"]["no_pi"]["drift"] < 0.01 < results["controls"]["sft"]["drift"]


def test_a_control_s_row_is_the_evaluation_of_its_adapter(run_with_controls, tmp_path):
    run = run_with_controls / "run"
    out = tmp_path / "own.json"
    flags = ["--max_new_tokens", "8", "--show", "0", "--out", str(out)]
    assert cli.main(["eval", str(run / "controls" / "sft"), *flags]) == 0
    alone, among = read(out), read(run / "eval_results.json")["controls"]["sft"]
    assert alone["control"] == "sft"
    for key in ("base", "teacher", "student", "recovered", "recovered_interval", "drift"):
        assert alone[key] == pytest.approx(among[key]), key
    assert alone["columns"]["student"] == among["columns"]["student"]


def test_finished_controls_are_reused_and_interrupted_ones_trained(copied, capsys):
    folder = copied / "controls"
    before = {name: (folder / name / "adapter_model.safetensors").read_bytes() for name in CONTROLS}
    broken = read(folder / "shuffled" / "run.json")
    (folder / "shuffled" / "run.json").write_text(json.dumps({**broken, "finished": False}))
    shutil.rmtree(folder / "sft")
    (copied / "recipe.yaml").write_text((copied / "recipe.yaml").read_text("utf-8"))
    assert cli.main(["eval", str(copied), "--max_new_tokens", "4", "--controls", "shuffled,no_pi,sft"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "training the control shuffled (PI of other rows)" in printed
    assert "training the control sft (SFT on the answers)" in printed
    assert "training the control no_pi" not in printed
    assert "Trained again with one thing taken away" in printed
    for name in ("shuffled", "no_pi", "sft"):
        assert (folder / name / "adapter_model.safetensors").read_bytes() == before[name], name
        assert read(folder / name / "run.json")["finished"]
    card = (copied / "README.md").read_text("utf-8")
    for name in ("shuffled", "no_pi", "sft"):
        assert f"| {name}: {CONTROLS[name]} |" in card
    assert card.count("## Evaluation") == 1


def refused(monkeypatch, capsys, *argv):
    def no_model(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("pgkd_peft.model.student.load_base", no_model)
    monkeypatch.setattr("pgkd_peft.model.load.load_base", no_model)
    capsys.readouterr()
    assert cli.main([*argv]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_control_of_other_settings_is_refused(copied, monkeypatch, capsys):
    recipe = yaml.safe_load((copied / "recipe.yaml").read_text("utf-8"))
    (copied / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "max_steps": 5, "beta": 0.25}), "utf-8")
    said = refused(monkeypatch, capsys, "eval", str(copied), "--controls", "sft")
    assert "it differs in beta, max_steps" in said
    assert str(copied / "controls" / "sft") in said


def test_other_data_are_refused(copied, monkeypatch, capsys, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", sums(range(5)))
    write_rows(data / "test.jsonl", sums(range(4, 7)))
    recipe = yaml.safe_load((copied / "recipe.yaml").read_text("utf-8"))
    (copied / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "dataset_name": str(data)}), "utf-8")
    assert "no longer those" in refused(monkeypatch, capsys, "eval", str(copied), "--controls", "offline")


def test_what_eval_refuses_before_a_model_is_loaded(copied, monkeypatch, capsys):
    assert "did you mean shuffled?" in refused(monkeypatch, capsys, "eval", str(copied), "--controls", "shufled")
    control = str(copied / "controls" / "sft")
    assert "is itself the control 'sft'" in refused(monkeypatch, capsys, "eval", control, "--controls", "no_pi")
    (copied / "recipe.yaml").unlink()
    said = refused(
        monkeypatch, capsys, "eval", str(copied), "--controls", "sft", "--dataset_name", "builtin:facts_heldout"
    )
    assert "has no recipe.yaml" in said


def test_train_refuses_before_a_model_is_loaded(run_with_controls, tmp_path, monkeypatch, capsys):
    flags = ["train", "--config", str(run_with_controls / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]
    assert "accepted are shuffled" in refused(monkeypatch, capsys, *flags, "--control", "nothing").lower()
    write_rows(tmp_path / "rows.jsonl", [*sums([1]), {**sums([2])[0], "privileged_messages": "The sum is 2."}])
    data = ["--dataset_name", str(tmp_path / "rows.jsonl")]
    assert "Leave shuffled out" in refused(monkeypatch, capsys, *flags, *data, "--control", "shuffled")
    assert not (tmp_path / "run").exists()


def test_the_control_s_own_recipe_trains_it_again(run_with_controls, tmp_path, capsys):
    recipe = run_with_controls / "run" / "controls" / "sft" / "recipe.yaml"
    out = tmp_path / "again"
    assert cli.main(["train", "--config", str(recipe), "--output_dir", str(out)]) == 0
    assert "It is the control 'sft'" in capsys.readouterr().out
    again = load_file(out / "controls" / "sft" / "adapter_model.safetensors")
    before = load_file(recipe.parent / "adapter_model.safetensors")
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert not (out / "adapter_model.safetensors").exists()


def test_sft_with_evaluations_and_the_best_adapter(run_with_controls, tmp_path):
    out = tmp_path / "run"
    flags = ["--output_dir", str(out), "--control", "sft", "--eval_strategy", "steps", "--eval_steps", "1"]
    flags += ["--save_strategy", "steps", "--save_steps", "1", "--load_best_model_at_end", "--save_total_limit", "1"]
    assert cli.main(["train", "--config", str(run_with_controls / "recipe.yaml"), *flags]) == 0
    lines = [json.loads(line) for line in (out / "controls/sft/metrics.jsonl").read_text("utf-8").splitlines()]
    curve = [line["eval_recovered"] for line in lines if "eval_recovered" in line]
    assert len(curve) == 2
    best = out / "controls" / "sft" / f"checkpoint-{1 + curve.index(max(curve))}" / "adapter_model.safetensors"
    assert best.read_bytes() == (out / "controls" / "sft" / "adapter_model.safetensors").read_bytes()


def test_the_report_shows_them(copied):
    results = collect(copied)["results"]
    assert [result["name"] for result in results] == ["this run", "shuffled", "no_pi", "sft", "offline"]
    page = write_report(copied).read_text("utf-8")
    for name, label in CONTROLS.items():
        assert f'<th scope="row">{name}: {label}</th>' in page
    control = write_report(copied / "controls" / "shuffled").read_text("utf-8")
    assert "control: shuffled" in control
