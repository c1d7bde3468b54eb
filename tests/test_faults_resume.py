"""Run folders: resumed, finished, damaged, in use by another process, or left by a signal."""
# ruff: noqa: F811  fixtures of another file, as arguments

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import finish, make_trainer, run, start
from test_faults import ADAPTER, ADAPTER_CONFIG, REPO, contents, copy, edit, no_model, place, says  # noqa: F401
from tiny import TINY_RUN, save_tiny

from pgkd_peft import cli
from pgkd_peft.errors import ConfigError, RunFinished
from pgkd_peft.run.place import LOCK_FILE, locked


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
