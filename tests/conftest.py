"""Shared fixtures: one thread (the suite shares its cores), tiny models on disk, a trainer in one call."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from tiny import ROWS, byte_tokenizer, save_tiny, tiny_model

from pgkd_peft import PrivilegedGKDConfig, PrivilegedSelfDistillTrainer


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def make_config(tmp_path):
    def make(**overrides) -> PrivilegedGKDConfig:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "lmbda": 1.0,
            "max_new_tokens": 8,
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "bf16": False,
            "base_quantization": "none",
        }
        return PrivilegedGKDConfig(**{**settings, **overrides})

    return make


@pytest.fixture
def make_trainer(make_config):
    """A trainer over a tiny model in float32; `config` holds settings, the other arguments are the trainer's."""

    def make(*, kind="llama", model=None, rows=ROWS, tokenizer=None, config=None, **kwargs):
        return PrivilegedSelfDistillTrainer(
            model=tiny_model(kind) if model is None else model,
            args=make_config(**(config or {})),
            train_dataset=rows,
            processing_class=tokenizer or (byte_tokenizer() if not isinstance(model, str) else None),
            **kwargs,
        )

    return make


def perturb(model, scale: float = 0.1, seed: int = 1):
    """Give LoRA's B matrices values, so that the adapter changes the output."""
    generator = torch.Generator().manual_seed(seed)
    count = 0
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.copy_(torch.randn(param.shape, generator=generator) * scale)
                count += 1
    assert count > 0
    return model
