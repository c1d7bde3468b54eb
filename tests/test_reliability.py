"""Checkpoints are whole or absent; what goes wrong in a run is said by name, with what to do."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import make_trainer, run
from safetensors.torch import load_file, save_file
from tiny import ROWS, save_tiny

import pgkd_peft.rollout as rollout
from pgkd_peft.errors import ConfigError
from pgkd_peft.rollout import generate
from pgkd_peft.rows import Row
from pgkd_peft.run.checkpoint import (
    CheckpointError,
    check_run_folder,
    checkpoints,
    find_checkpoint,
    last_complete_checkpoint,
    publish,
    remove_leftovers,
    rotate,
    verify,
)
from pgkd_peft.run.health import HealthCallback
from pgkd_peft.run.jsonl import drop_after
from pgkd_peft.run.memory import OutOfMemoryError, is_out_of_memory, memory_for
from pgkd_peft.trainer import NonFiniteLossError

SHORT = {"max_steps": 4, "lmbda": 0.0, "rollout_log_steps": 0, "logging_steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    """A finished run with checkpoint-2 and checkpoint-4; to be copied, not changed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    trainer = make_trainer(base, str(out), settings=SHORT)
    trainer.train()
    trainer.save_model()
    return out


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


# ---- finding and checking ------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_resuming_needs_and_no_pickled_settings(finished):
    assert [p.name for p in checkpoints(finished)] == ["checkpoint-4", "checkpoint-2"]
    verify(finished / "checkpoint-4")
    assert not list(finished.rglob("training_args.bin"))
    files = {p.name for p in (finished / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "manifest.json"} <= files
    assert {"run.json", "README.md", "chat_template.jinja"} <= files
    assert not [p.name for p in finished.iterdir() if p.name.startswith(".")]


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named_and_passed_over(folder, name, how, caplog):
    damage(folder / "checkpoint-4" / name, how)
    with pytest.raises(CheckpointError, match=f"{name}.*(damaged|missing)|incomplete: {name}"):
        verify(folder / "checkpoint-4")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    assert name in caplog.text
    with pytest.raises(CheckpointError, match=name):
        find_checkpoint(folder, str(folder / "checkpoint-4"))


def test_a_damaged_manifest_is_named(folder):
    (folder / "checkpoint-4" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        verify(folder / "checkpoint-4")


def test_a_run_folder_is_only_entered_on_request(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"holds a run already.*--resume to continue from checkpoint-4.*--overwrite"):
        check_run_folder(folder)
    assert check_run_folder(folder, resume=True) == str(folder / "checkpoint-4")
    with pytest.raises(ConfigError, match="exclude each other"):
        check_run_folder(folder, resume=True, overwrite=True)
    (folder / "notes.txt").write_text("mine")
    assert check_run_folder(folder, overwrite=True) is None
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    assert check_run_folder(folder) is None
    assert check_run_folder(tmp_path / "new") is None
    with pytest.raises(ConfigError, match="nothing to resume"):
        check_run_folder(folder, resume=True)
    with pytest.raises(ConfigError, match="is a file"):
        check_run_folder(folder / "notes.txt")


def test_publish_replaces_and_leftovers_go(tmp_path):
    for name, text in (("new", "new"), ("checkpoint-1", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(text)
    publish(tmp_path / "new", tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "a").read_text() == "new"
    (tmp_path / ".saving-checkpoint-9").mkdir()
    (tmp_path / "checkpoint-1").rename(tmp_path / ".replaced-checkpoint-1")  # killed between the two renames
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_rotation_keeps_the_newest_the_best_and_the_limit(tmp_path):
    for step in (1, 2, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, None, {"checkpoint-20"})
    assert len(checkpoints(tmp_path)) == 4
    rotate(tmp_path, 2, {"checkpoint-20", "checkpoint-1"})
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-1"]


def test_save_total_limit_and_the_best_model(base, tmp_path):
    settings = {**SHORT, "max_steps": 6, "save_total_limit": 1, "load_best_model_at_end": True, "eval_steps": 2}
    settings |= {"eval_strategy": "steps", "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(base, str(tmp_path / "out"), settings=settings, eval_dataset=ROWS)
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = max(losses, key=losses.get)  # "greater is better", so an early one
    assert best != 6
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{best}")
    saved = load_file(tmp_path / "out" / f"checkpoint-{best}" / "adapter_model.safetensors")
    own = dict(trainer.model.named_parameters())
    for name, tensor in saved.items():
        assert torch.equal(own[name.replace(".weight", ".default.weight")], tensor)


def test_logs_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    drop_after(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


# ---- resuming into something else ----------------------------------------------------------------------------------


def resume(base: str, folder: Path, **settings):
    trainer = make_trainer(base, str(folder), settings={**SHORT, "max_steps": 5, **settings})
    trainer.train(resume_from_checkpoint=True)
    return trainer


def test_resuming_on_a_changed_base_is_refused(base, folder, tmp_path):
    changed = Path(shutil.copytree(base, tmp_path / "changed"))
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="was trained on"):
        resume(str(changed), folder)
    shutil.copytree(base, tmp_path / "kept")
    for path in (folder / "checkpoint-4", folder / "checkpoint-2"):
        info = json.loads((path / "run.json").read_text())
        info["base_model"] = str(changed)  # the same path, other weights
        (path / "run.json").write_text(json.dumps(info))
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"weights of .* have changed since"):
        resume(str(changed), folder)


def test_resuming_with_another_quantization_teacher_or_rank_is_refused(base, folder):
    with pytest.raises(CheckpointError, match="held as none, this run's as nf4"):
        resume(base, folder, base_quantization="nf4")
    with pytest.raises(CheckpointError, match=r"teacher_adapter='ema'.*trained with 'disabled'"):
        resume(base, folder, teacher_adapter="ema")
    from peft import LoraConfig

    other = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(base, str(folder), settings=SHORT, peft_config=other)
    with pytest.raises(CheckpointError, match=r"lora_A.*is \(2, \d+\), expected is \(3, \d+\)"):
        trainer.train(resume_from_checkpoint=True)


def test_resuming_with_other_settings_says_so(base, folder, caplog):
    resume(base, folder, learning_rate=0.5)
    assert "learning_rate (was 0.01, is 0.5)" in caplog.text


# ---- saving --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("free_kib", [0, 30, 70])
def test_a_full_disk_leaves_the_previous_checkpoint(base, small_disk, free_kib):
    out = small_disk / "out"
    make_trainer(base, str(out), settings={**SHORT, "max_steps": 2}).train()
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        space = os.statvfs(small_disk)
        filler.write(b"x" * max(0, space.f_bavail * space.f_frsize - free_kib * 1024))
    trainer = make_trainer(base, str(out), settings=SHORT)
    with pytest.raises(CheckpointError, match=r"cannot be written.*checkpoint-2 is intact.*--resume"):
        trainer.train(resume_from_checkpoint=True)
    assert [p.name for p in out.iterdir() if "checkpoint" in p.name] == ["checkpoint-2"]
    verify(out / "checkpoint-2")
    (small_disk / "filler").unlink()
    make_trainer(base, str(out), settings=SHORT).train(resume_from_checkpoint=True)
    verify(out / "checkpoint-4")


def test_a_failed_final_save_leaves_the_old_adapter(base, folder, monkeypatch):
    before = (folder / "adapter_model.safetensors").read_bytes()
    trainer = make_trainer(base, str(folder), settings=SHORT)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.processing_class, "save_pretrained", full)
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.save_model()
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".saving")]


# ---- non-finite ----------------------------------------------------------------------------------------------------


def test_non_finite_weights_stop_the_run_with_the_batch(base, tmp_path):
    trainer = make_trainer(base, str(tmp_path / "out"), settings=SHORT)
    next(p for n, p in trainer.model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"failed_batch_step0\.json"):
        trainer.train()
    rows = json.loads((tmp_path / "out" / "failed_batch_step0.json").read_text())
    assert rows
    assert all(row["completion"] and row["teacher_prompt"] for row in rows)
    assert not checkpoints(tmp_path / "out")


# ---- memory --------------------------------------------------------------------------------------------------------

CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried ...")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), CPU_ERROR, MemoryError()])
def test_a_rollout_halves_itself_and_loses_nothing(base, monkeypatch, error):
    from tiny import tiny_model

    model, prompts = tiny_model(), [[10, 11, 12], [20, 21], [30, 31, 32, 33], [40]]
    settings = {"max_new_tokens": 5, "stop_ids": [4], "pad_id": 0, "temperature": 1.0, "seed": 3}
    expected = generate(model, prompts, **settings)
    sizes, decode = [], rollout._decode

    def small(model, prompts, *args):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise error
        return decode(model, prompts, *args)

    monkeypatch.setattr(rollout, "_decode", small)
    assert generate(model, prompts, **settings) == expected
    assert sizes[0] == 4
    assert max(sizes[1:]) <= 2


@pytest.mark.parametrize(
    ("phase", "owner", "name", "advice"),
    [
        ("rollout", "pgkd_peft.trainer", "generate", "max_new_tokens"),
        ("teacher", "pgkd_peft.trainer", "score_teacher", "max_privileged_length"),
        ("student", "pgkd_peft.trainer", "jsd_between", "per_device_train_batch_size"),
    ],
)
def test_out_of_memory_names_its_phase(base, tmp_path, monkeypatch, phase, owner, name, advice):
    trainer = make_trainer(base, str(tmp_path / "out"), settings={**SHORT, "lmbda": 1.0})

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(f"{owner}.{name}", full)
    with pytest.raises(OutOfMemoryError, match=rf"in the {phase} phase.*{advice}.*Tried to allocate"):
        trainer.train()


def test_other_errors_are_no_memory_errors():
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"), memory_for("student"):
        raise RuntimeError("shapes do not match")


# ---- alarms --------------------------------------------------------------------------------------------------------


def rows_of_length(length: int, *, truncated: bool = False, kept: bool = True) -> list[Row]:
    row = Row([1], [1], [5] * length, True, 0, generated=True, truncated=truncated)
    row.keep = slice(0, None) if kept else slice(0, 0)
    return [row]


ARGS = SimpleNamespace(
    max_new_tokens=64,
    skip_first_tokens=0,
    mask_truncated_completions=False,
    beta=0.5,
    normalize_beta=False,
    privileged_key="pi",
)
LOG = {"loss": 0.1, "student_entropy": 2.0, "teacher_entropy": 2.0, "divergence": 0.01, "privileged_rows": 0.5}


def watch(steps=(), logs=(), **args) -> dict[str, str]:
    """The alarms of a run with these rows a step and these logs."""
    trainer = SimpleNamespace(last_rows=[], is_world_process_zero=lambda: True)
    health, settings = HealthCallback(trainer), SimpleNamespace(**{**vars(ARGS), **args})
    for number, trainer.last_rows in enumerate(steps):
        health.on_step_end(settings, SimpleNamespace(global_step=number), None)
    for number, entry in enumerate(logs):
        health.on_log(settings, SimpleNamespace(global_step=number), None, logs={**LOG, **entry})
    return health.alarms


def test_a_healthy_run_raises_no_alarm():
    steps = [rows_of_length(20 + step % 5) for step in range(40)]
    logs = [{"student_entropy": 2.0 - 0.02 * n, "divergence": 0.05 / (n + 1)} for n in range(40)]
    assert watch(steps, logs) == {}


def test_lengths_that_drift_either_way():
    grows = [rows_of_length(10 + 2 * step) for step in range(20)]
    shrinks = [rows_of_length(50 - 2 * step) for step in range(24)]
    assert set(watch(grows)) == {"longer"}
    assert set(watch(shrinks)) == {"shorter"}
    assert "lower learning_rate" in watch(grows)["longer"]


def test_truncated_rollouts_and_empty_steps():
    alarms = watch([rows_of_length(64, truncated=True)] * 6)
    assert set(alarms) == {"truncated"}
    assert "max_new_tokens=64" in alarms["truncated"]
    assert set(watch([rows_of_length(5, kept=False)], mask_truncated_completions=True)) == {"no tokens"}


def test_collapsing_entropy():
    assert set(watch(logs=[{}, {"student_entropy": 0.3}])) == {"entropy"}
    assert watch(logs=[{}, {"student_entropy": 0.3, "teacher_entropy": 0.4}]) == {}  # the teacher is that sure as well


def test_pi_that_changes_nothing():
    assert set(watch(logs=[{"divergence": 1e-6}])) == {"no effect"}
    assert set(watch(logs=[{"divergence": 1e-6, "privileged_rows": 0}])) == {"no PI"}
    assert watch(logs=[{"divergence": 1e-3}]) == {}
    assert watch(logs=[{}, {"divergence": 1e-6}]) == {}  # later, agreement is the aim


def test_alarms_reach_the_log_of_a_real_run(base, tmp_path, caplog):
    rows = [{**row, "privileged_messages": None} for row in ROWS]
    trainer = make_trainer(base, str(tmp_path / "out"), settings={**SHORT, "max_steps": 1}, train_dataset=rows)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "no row so far has PI in 'privileged_messages'" in caplog.text
    assert set(trainer.health.alarms) == {"no PI"}


def test_killed_in_a_save_the_run_folder_is_entered_again(base, tmp_path):
    out = tmp_path / "out"
    killed = run(base, out, settings=SHORT, fault=("save", 4))
    assert killed["exitcode"] == -9
    assert last_complete_checkpoint(out) == str(out / "checkpoint-2")
    assert (out / ".saving-checkpoint-4").is_dir()
    assert "error" not in run(base, out, settings=SHORT, resume=True)
    assert [p.name for p in checkpoints(out)] == ["checkpoint-4", "checkpoint-2"]
    assert not (out / ".saving-checkpoint-4").exists()
