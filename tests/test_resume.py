"""A run that was killed anywhere and resumed equals the uninterrupted one, bit for bit; a signal saves first."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from runs import contents, run, timeless
from tiny import save_tiny

from pgkd_peft.run.checkpoint import verify


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The uninterrupted run of each teacher."""
    done: dict[str, tuple[Path, dict]] = {}

    def get(teacher: str) -> tuple[Path, dict]:
        if teacher not in done:
            out = tmp_path_factory.mktemp("whole") / teacher
            outcome = run(base, out, settings={"teacher_adapter": teacher, "ema_decay": 0.5})
            assert "error" not in outcome, outcome["log"][-3000:]
            done[teacher] = out, outcome
        return done[teacher]

    return get


PHASES = ("rollout", "teacher", "backward", "between", "save", "rename", "renamed")


@pytest.mark.parametrize("teacher", ["ema", "disabled"])
def test_killed_twice_and_resumed_equals_uninterrupted(base, whole, teacher, tmp_path):
    settings = {"teacher_adapter": teacher, "ema_decay": 0.5}
    reference, outcome = whole(teacher)
    out = tmp_path / "out"
    faults = [
        (random.choice(PHASES[:4]), random.choice([3, 5])),  # steps 2 and 4 have been saved by then
        (random.choice(PHASES[4:]), 6),
    ]
    for number, fault in enumerate(faults):
        if fault[0] == "rollout" and number == 0:
            fault = ("teacher", fault[1])  # whether a step rolls out is drawn
        killed = run(base, out, settings=settings, fault=fault, resume=bool(number))
        assert killed["exitcode"] == -signal.SIGKILL, (fault, killed["log"][-3000:])
    resumed = run(base, out, settings=settings, resume=True)
    assert "error" not in resumed, (faults, resumed["log"][-3000:])
    assert timeless(resumed["state"]) == timeless(outcome["state"]), faults
    assert [p.name for p in sorted(out.glob("*checkpoint-*"))] == [f"checkpoint-{n}" for n in (2, 4, 6, 7)]
    for name in ("checkpoint-6", "checkpoint-7"):
        expected, found = contents(reference / name), contents(out / name)
        assert ("teacher.safetensors" in expected) == (teacher != "disabled")
        for part, value in expected.items():
            assert found[part] == value, (faults, name, part)
    assert (out / "completions.jsonl").read_text() == (reference / "completions.jsonl").read_text()


def test_the_reference_run_is_worth_comparing_with(whole):
    """Dropout, sampling, both kinds of steps, a log that straddles checkpoints: else exactness would be no feat."""
    out, outcome = whole("disabled")
    history = timeless(outcome["state"])
    assert [entry["step"] for entry in history] == [3, 6]
    assert 0 < sum(entry["on_policy"] for entry in history) < len(history)
    progress = contents(out / "checkpoint-4")["progress"]
    assert progress["loss"] > 0
    assert progress["last_logged"] == 3
    assert outcome["state"][0]["epoch"] > 1  # the data are shuffled anew within the run


@pytest.mark.parametrize(("name", "signum"), [("sigterm", signal.SIGTERM), ("sigint", signal.SIGINT)])
def test_a_signal_saves_and_says_how_to_go_on(base, tmp_path, name, signum):
    out = tmp_path / "out"
    stopped = run(base, out, fault=(name, 2), settings={"save_steps": 100})
    assert stopped["error"] == "RunInterrupted"
    assert stopped["signum"] == signum
    assert "stopped after step 3 of 7" in stopped["message"]
    assert "--resume" in stopped["message"]
    assert [p.name for p in sorted(out.glob("checkpoint-*"))] == ["checkpoint-3"]
    verify(out / "checkpoint-3")


def test_a_run_that_a_signal_stopped_goes_on_exactly(base, whole, tmp_path):
    reference, outcome = whole("disabled")
    run(base, tmp_path / "out", fault=("sigterm", 2))
    resumed = run(base, tmp_path / "out", resume=True)
    assert timeless(resumed["state"]) == timeless(outcome["state"])
    assert contents(tmp_path / "out" / "checkpoint-7") == contents(reference / "checkpoint-7")
