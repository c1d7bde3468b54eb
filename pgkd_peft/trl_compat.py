"""What TRL's constructors would do to a QLoRA student that is its own teacher, held back; what cannot work, refused."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from .config import PrivilegedGKDConfig
from .errors import ConfigError
from .model.load import base_of


@contextlib.contextmanager
def keep_adapter(student: PeftModel, args: PrivilegedGKDConfig) -> Iterator[None]:
    """Undo what TRL's constructors do to a QLoRA student: they round the adapter to bfloat16, in which Adam's small
    steps are lost, they switch off LoRA's own dropout together with the base's, and they make a mixture of experts
    return its router logits (an auxiliary loss, which nothing here uses and which breaks cached rollouts)."""
    weights = [(param, param.data) for param in student.parameters() if param.requires_grad]
    dropouts = [(m, m.p) for name, m in student.named_modules() if "lora_dropout" in name and isinstance(m, nn.Dropout)]
    init_kwargs, args.model_init_kwargs = args.model_init_kwargs, None  # used already, when the base was loaded
    teacher_kwargs, args.teacher_model_init_kwargs = args.teacher_model_init_kwargs, None
    coefficient, args.router_aux_loss_coef = args.router_aux_loss_coef, 0.0
    config = base_of(student).config.get_text_config()
    names = ("output_router_logits", "router_aux_loss_coef")
    router = {name: getattr(config, name) for name in names if hasattr(config, name)}
    if "output_router_logits" in router:
        router["output_router_logits"] = False
    try:
        yield
    finally:
        args.model_init_kwargs, args.teacher_model_init_kwargs = init_kwargs, teacher_kwargs
        args.router_aux_loss_coef = coefficient
        for name, value in router.items():
            setattr(config, name, value)
        for param, data in weights:
            param.data = data.to(param.device)
        for module, p in dropouts:
            module.p = p


@contextlib.contextmanager
def without_migration_advice(name: str) -> Iterator[None]:
    """Hold back TRL's advice to move to another trainer, which has no privileged context."""

    def no_advice(record: logging.LogRecord) -> bool:
        return "DistillationTrainer" not in record.getMessage()

    log = logging.getLogger(name)
    log.addFilter(no_advice)
    try:
        yield
    finally:
        log.removeFilter(no_advice)


def refuse_sharding(accelerator: Any) -> None:
    for name, used in (
        ("FSDP", getattr(accelerator.state, "fsdp_plugin", None) is not None),
        ("DeepSpeed", getattr(accelerator.state, "deepspeed_plugin", None) is not None),
    ):
        if used:
            raise ConfigError(
                f"{name} is not supported: the adapter is switched off inside the shared base, which sharded weights "
                "do not allow. One GPU, or several with plain DDP (accelerate launch --multi_gpu), work."
            )


@contextlib.contextmanager
def without_input_casts(model: nn.Module, *, autocast: bool) -> Iterator[None]:
    """Under autocast, spare LoRA's float32 weights the detour of casting every activation up and down again.

    PEFT casts a layer's input to the dtype of its LoRA weights, and autocast casts it straight back: two passes over
    the activations of each of some 200 layers, with the same result.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)] if autocast else []
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True
