"""Settings: the documented names and defaults, and a clear word for each value that cannot work."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import trl
from packaging.version import Version
from trl.experimental.gkd import GKDConfig, GKDTrainer

from pgkd_peft import DataCollatorForPrivilegedGKD, PrivilegedGKDConfig, PrivilegedSelfDistillTrainer
from pgkd_peft.data.collator import CONTEXT_SETTINGS
from pgkd_peft.errors import ConfigError

PACKAGE = Path(__file__).parent.parent / "pgkd_peft"

DEFAULTS = {
    "privileged_key": "privileged_messages",
    "max_privileged_length": 512,
    "share_student_as_teacher": True,
    "rollout_log_steps": 0,
    "rollout_log_samples": 1,
    "rollout_log_max_new_tokens": 64,
    "rollout_log_max_chars": 240,
    "teacher_adapter": "disabled",
    "base_quantization": "nf4",
    "privileged_placement": "messages",
    "rollout_engine": "auto",
    "num_generations": 1,
    "loss_temperature": 1.0,
    "normalize_beta": False,
    "divergence_clip": None,
    "divergence_clip_mode": "rescale",
    "loss_top_k": None,
    "skip_first_tokens": 0,
    "loss_chunk_mib": 64,
    "mask_truncated_completions": False,
    "lmbda": 0.5,
    "beta": 0.5,
    "temperature": 0.9,
    "max_new_tokens": 128,
}

REFUSED = [
    ({"beta": 1.5}, "beta"),
    ({"beta": "much"}, "beta"),
    ({"lmbda": -0.1}, "lmbda"),
    ({"teacher_adapter": "frozen"}, "disabled, shared, initial, ema"),
    ({"base_quantization": "int4"}, "nf4, int8, none"),
    ({"privileged_placement": "assistant"}, "messages, user, system"),
    ({"rollout_engine": "vllm"}, "auto, adapter, merged"),
    ({"divergence_clip_mode": "hard"}, "entry, token, rescale"),
    ({"divergence_clip": 0.0}, "divergence_clip"),
    ({"max_privileged_length": 0}, "max_privileged_length"),
    ({"num_generations": 0}, "num_generations"),
    ({"num_generations": 1.5}, "whole number"),
    ({"skip_first_tokens": -1}, "skip_first_tokens"),
    ({"loss_temperature": 0.0}, "loss_temperature"),
    ({"temperature": -1.0}, "temperature"),
    ({"loss_top_k": 0}, "loss_top_k"),
    ({"loss_chunk_mib": 0}, "loss_chunk_mib"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"rollout_log_steps": -1}, "rollout_log_steps"),
    ({"privileged_key": " "}, "privileged_key"),
    ({"privileged_key": "messages"}, "the conversation itself"),
    ({"privileged_template": "Hint:"}, "{privileged}"),
    ({"ema_decay": 1.0}, "ema_decay"),
    ({"packing": True}, "packing"),
    ({"assistant_only_loss": True}, "assistant_only_loss"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ({"max_length": 2}, "max_length"),
    ({"teacher_model_name_or_path": "other"}, "share_student_as_teacher"),
]


def make(**settings) -> PrivilegedGKDConfig:
    return PrivilegedGKDConfig(output_dir="unused", report_to="none", **settings)


def test_documented_defaults():
    config = make()
    assert isinstance(config, GKDConfig)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(("settings", "says"), REFUSED, ids=[str(s) for s, _ in REFUSED])
def test_what_cannot_work_is_refused_by_name(settings, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        make(**settings)
    assert next(iter(settings)) in str(error.value)


def test_numbers_given_as_text_are_numbers():
    assert make(beta="0.25", divergence_clip="1e-1").divergence_clip == 0.1


def test_whole_numbers_given_as_floats_are_whole_numbers():
    config = make(max_new_tokens=64.0, num_generations="2", max_steps=3.0, loss_top_k=20.0, max_length=512.0)
    names = ("max_new_tokens", "num_generations", "max_steps", "loss_top_k", "max_length")
    assert [type(getattr(config, name)) for name in names] == [int] * 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0.0}, "forward KL(teacher || student)"),
        ({"beta": 1.0}, "reverse KL(student || teacher)"),
        ({"beta": 0.25}, "0.25 * KL(teacher || M) + 0.75 * KL(student || M), with M = 0.25 * teacher + 0.75 * student"),
        ({"beta": 0.5, "normalize_beta": True}, "= 0.25"),
        ({"loss_top_k": 20}, "top 20"),
        ({"divergence_clip": 0.5, "divergence_clip_mode": "entry"}, "clipped at 0.5 nats (entry)"),
        ({"skip_first_tokens": 3}, "without the first 3 tokens"),
        ({"loss_temperature": 2.0}, "divided by 2"),
    ],
)
def test_the_divergence_is_put_into_words(settings, words):
    assert words in make(**settings).divergence_in_words()


def test_every_field_of_ours_is_read_by_the_package():
    ours = {f.name for f in dataclasses.fields(PrivilegedGKDConfig)} - {f.name for f in dataclasses.fields(GKDConfig)}
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "config.py")
    assert len(ours) >= 20
    by_name = set(CONTEXT_SETTINGS)  # handed to the collator, from a config or from run.json
    assert by_name <= ours & set(inspect.signature(DataCollatorForPrivilegedGKD).parameters)
    assert {name for name in ours - by_name if not re.search(rf"\b(args|config)\.{name}\b", code)} == set()


def test_every_field_has_a_help_text():
    ours = {f.name for f in dataclasses.fields(PrivilegedGKDConfig)} - {f.name for f in dataclasses.fields(GKDConfig)}
    helps = {f.name: f.metadata.get("help", "") for f in dataclasses.fields(PrivilegedGKDConfig)}
    assert [name for name in ours if len(helps[name]) < 20] == []


def test_what_we_rely_on_in_trl_is_still_there():
    """trl.experimental may change in any release; this names what would break."""
    assert Version("1.16") <= Version(trl.__version__) < Version("1.17")
    assert issubclass(PrivilegedSelfDistillTrainer, GKDTrainer)
    for name in ("get_batch_samples", "training_step", "compute_loss", "prediction_step", "log", "_save"):
        assert callable(getattr(GKDTrainer, name)), name
    assert hasattr(GKDTrainer, "loss_is_scaled_for_ga")
    assert {"lmbda", "beta", "temperature", "max_new_tokens", "seq_kd", "max_length"} <= {
        f.name for f in dataclasses.fields(GKDConfig)
    }
