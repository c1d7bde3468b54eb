"""Trackers: checked before a model is loaded, each with an extra and a place in the docs."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

from pgkd_peft import PrivilegedGKDConfig, cli
from pgkd_peft.config_checks import TRACKER_EXTRAS
from pgkd_peft.errors import ConfigError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    """A wandb that is installed; returns what sets whether it finds a key. It must not be imported by a test before."""
    folder = tmp_path / "packages" / "wandb"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def write(login: str) -> None:
        (folder / "__init__.py").write_text(f"run = None\n{login}\n")

    yield write
    sys.modules.pop("wandb", None)


def config(**settings):
    return PrivilegedGKDConfig(output_dir="unused", **settings)


def test_wandb_without_a_key_is_told_at_once(fake_wandb, monkeypatch):
    fake_wandb("def login(prompt=True, verify=True):\n    assert not prompt and not verify\n    return False")
    with pytest.raises(ConfigError, match=r"report_to is 'wandb'.*wandb login.*WANDB_API_KEY.*WANDB_MODE=offline"):
        config(report_to="wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert config(report_to="wandb").report_to == ["wandb"]


@pytest.mark.parametrize(
    "login",
    [
        "def login(prompt=True, verify=True):\n    return True",
        "class api:\n    api_key = 'k'\ndef login(key=None):\n    raise RuntimeError('it asked the user')",
    ],
)
def test_wandb_with_a_key(fake_wandb, login):
    fake_wandb(login)
    assert config(report_to="wandb").report_to == ["wandb"]


@pytest.mark.parametrize("name", TRACKER_EXTRAS)
def test_a_tracker_that_is_not_installed_names_its_extra(monkeypatch, name):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: [])
    with pytest.raises(ConfigError, match=rf'report_to is \'{name}\'.*pip install "pgkd-peft\[{name}\]"'):
        config(report_to=[name])


def test_the_command_stops_before_it_looks_for_the_model(tmp_path, capsys):
    flags = ["--model_name_or_path", "no/such-model", "--dataset_name", "builtin:facts"]
    where = ["--output_dir", str(tmp_path / "run")]
    assert cli.main(["train", *flags, *where, "--report_to", "tensorbord"]) == 2
    assert "report_to is 'tensorbord'; accepted are none, all" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_extras_and_page_name_the_same_trackers():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "tracking.md").read_text()
    assert set(re.findall(r'pip install "pgkd-peft\[(\w+)\]"', page)) == set(TRACKER_EXTRAS)
    for name in TRACKER_EXTRAS:
        assert [re.match(r"[\w-]+", package)[0] for package in extras[name]] == [name]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_what_tensorboard_gets_is_what_the_run_logs(make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(config={"report_to": "tensorboard", "max_steps": 2})
    trainer.train()
    (folder,) = {path.parent for path in (tmp_path / "run").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    logged = [log["divergence"] for log in trainer.state.log_history if "divergence" in log]
    assert [event.value for event in events.Scalars("train/divergence")] == pytest.approx(logged)
