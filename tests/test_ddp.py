"""Two processes are one with twice the batch: same loss, same gradient, different rollouts, one log."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from runs import run, run_two
from safetensors.torch import load_file
from tiny import save_tiny

from pgkd_peft.errors import ConfigError
from pgkd_peft.run.checkpoint import verify
from pgkd_peft.trl_compat import refuse_sharding

TWO = {"use_cpu": True, "ddp_backend": "gloo", "per_device_train_batch_size": 1, "logging_steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base") / "model")


def test_two_processes_equal_one_with_twice_the_batch(base, tmp_path):
    """Rows of unequal length fall to the ranks, so a mean of the ranks' means would be another number."""
    settings = {"lmbda": 0.0, "max_steps": 3, "_dropout": 0.0, "_rows": [0, 1, 2, 3] * 2, "rollout_log_steps": 0}
    one = run(base, tmp_path / "one", settings={**settings, "per_device_train_batch_size": 2, "logging_steps": 1})
    two = run_two(base, tmp_path / "two", settings={**settings, **TWO})
    assert "error" not in one, one["log"][-3000:]
    assert all("error" not in rank for rank in two), two[0]["log"][-3000:] + two[1]["log"][-3000:]
    single, double = ([e for e in outcome["state"] if "loss" in e] for outcome in (one, two[0]))
    assert len(single) == len(double) == 3
    for a, b in zip(single, double):
        for key in ("loss", "grad_norm", "divergence", "loss_tokens", "completion_length", "learning_rate"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    first, second = (load_file(tmp_path / n / "checkpoint-3" / "adapter_model.safetensors") for n in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-2, atol=1e-4)


def test_ranks_write_different_rollouts_and_stop_together(base, tmp_path):
    settings = {"lmbda": 1.0, "_rows": [0] * 8, "save_steps": 100, **TWO}
    ranks = run_two(base, tmp_path / "out", settings=settings, faults=(None, ("sigterm", 1)))
    assert [rank["error"] for rank in ranks] == ["RunInterrupted"] * 2, ranks[0]["log"][-3000:]
    verify(tmp_path / "out" / "checkpoint-2")
    assert (tmp_path / "out" / "checkpoint-2" / "progress_1.json").is_file()
    go_on = {**settings, "max_steps": 3}
    ranks = run_two(base, tmp_path / "out", settings=go_on, resume=True)
    assert all("error" not in rank for rank in ranks), ranks[0]["log"][-3000:]
    assert ranks[0]["completions"] != ranks[1]["completions"]  # of the same prompt
    assert "trainable parameters" in ranks[0]["log"]
    assert "trainable parameters" not in ranks[1]["log"]
    assert len((tmp_path / "out" / "completions.jsonl").read_text().splitlines()) == 1  # one log, step 2


@pytest.mark.parametrize(("plugin", "name"), [("fsdp_plugin", "FSDP"), ("deepspeed_plugin", "DeepSpeed")])
def test_sharded_engines_are_refused_by_name(plugin, name):
    state = SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=None)
    refuse_sharding(SimpleNamespace(state=state))
    setattr(state, plugin, object())
    with pytest.raises(ConfigError, match=f"{name} is not supported.*DDP"):
        refuse_sharding(SimpleNamespace(state=state))
