"""All that is known of the insides of TRL, Transformers, accelerate and PEFT, in one place.

``INSIDES`` names each private attribute that the package reads, sets or overrides, with the version it was read in; a
contract test looks for every one, so that a new release that drops it fails by name and not in somebody's run.
What TRL's constructors would do to a QLoRA student that is its own teacher is held back here; what cannot work is
refused.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers.trainer
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import transformers_weight_conversion as weight_conversion
from torch import nn

from .errors import ConfigError


@dataclass(frozen=True)
class Inside:
    """A private attribute of another library.

    Attributes:
        owner: dotted path of the class or module.
        name: the attribute; an instance's own is looked for in the source of its class.
        read_in: the version in which it was read.
        why: what the package needs it for.
    """

    owner: str
    name: str
    read_in: str
    why: str


INSIDES = (
    Inside("transformers.Trainer", "_get_output_dir", "5.23.0", "checkpoints are written beside their place"),
    Inside("transformers.Trainer", "_push_from_checkpoint", "5.23.0", "pushed once it is whole"),
    Inside("transformers.Trainer", "_save_checkpoint", "5.23.0", "whole or absent"),
    Inside("transformers.Trainer", "_save", "5.23.0", "the base is checked before its adapter is written"),
    Inside("transformers.Trainer", "_load_from_checkpoint", "5.23.0", "the run that it belongs to"),
    Inside("transformers.Trainer", "_load_rng_state", "5.23.0", "damage is explained"),
    Inside("transformers.Trainer", "_load_optimizer_and_scheduler", "5.23.0", "damage is explained"),
    Inside("transformers.Trainer", "_tr_loss", "5.23.0", "exact resume between two logs"),
    Inside("transformers.Trainer", "_total_loss_scalar", "5.23.0", "exact resume between two logs"),
    Inside("transformers.Trainer", "_globalstep_last_logged", "5.23.0", "exact resume between two logs"),
    Inside("transformers.trainer", "hf_api", "5.23.0", "what a run uploads is chosen file by file"),
    Inside("transformers.trainer", "DEFAULT_PROGRESS_CALLBACK", "5.23.0", "the live view takes its place"),
    Inside("accelerate.Accelerator", "_models", "1.15.0", "TRL prepares the shared base as a teacher"),
    Inside("accelerate.Accelerator", "_is_accelerate_prepared", "1.15.0", "TRL prepares the shared base as a teacher"),
    Inside("accelerate.Accelerator", "_original_forward", "1.15.0", "whether autocast wraps the forward"),
    Inside("peft.tuners.lora.LoraLayer", "cast_input_dtype_enabled", "0.21.0", "no casts under autocast"),
    Inside("peft.tuners.tuners_utils.BaseTunerLayer", "merged_adapters", "0.21.0", "nothing merges into the base"),
    Inside("peft.tuners.tuners_utils.BaseTunerLayer", "adapter_layer_names", "0.21.0", "which tensors are its own"),
    Inside("transformers.PreTrainedConfig", "_attn_implementation", "5.23.0", "which attention a model runs"),
    Inside("argparse.ArgumentParser", "_action_groups", "3.11", "the method's own settings stand first in --help"),
    Inside("argparse.ArgumentParser", "_group_actions", "3.11", "the method's own settings stand first in --help"),
    Inside("peft.tuners.lora.LoraLayer", "lora_variant", "0.21.0", "what the merged copy cannot add"),
    Inside(
        "peft.utils.transformers_weight_conversion",
        "_MOE_TARGET_MODULE_MAPPING",
        "0.21.0",
        "target names that PEFT takes for fused experts'",
    ),
    Inside(
        "peft.utils.transformers_weight_conversion",
        "_MODEL_TO_CONVERSION_PATTERN",
        "0.21.0",
        "in which model types it does",
    ),
)


def names_of_fused_experts(model: nn.Module) -> set[str]:
    """Last names of modules that PEFT, asked for a LoRA on them, puts on the fused experts of this model type instead,
    and takes away from dense and shared MLPs of the same name."""
    kind = weight_conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)  # type: ignore[union-attr]
    return set(weight_conversion._MOE_TARGET_MODULE_MAPPING.get(kind, ()))


def log_progress(trainer: Any) -> dict[str, Any]:
    """What Transformers has summed up since its last log; it saves none of it."""
    return {"loss": trainer._tr_loss.item(), "last_logged": trainer._globalstep_last_logged}


def set_log_progress(trainer: Any, progress: dict[str, Any]) -> None:
    """Go on from what :func:`log_progress` gave."""
    trainer._tr_loss = torch.tensor(progress["loss"], device=trainer.args.device)
    trainer._total_loss_scalar = -progress["loss"]  # train_loss is about the steps of this call alone
    trainer._globalstep_last_logged = progress["last_logged"]


def release_shared_teacher(accelerator: Any, student: nn.Module) -> None:
    """Undo that TRL prepared the student as a teacher: else accelerate takes it for prepared when training starts, and
    it gets neither DDP nor autocast."""
    accelerator.unwrap_model(student, keep_fp32_wrapper=False)
    accelerator._models.clear()
    student._is_accelerate_prepared = False  # type: ignore[assignment]


def runs_under_autocast(accelerator: Any, model: nn.Module) -> bool:
    """Whether accelerate has wrapped the model's forward into autocast."""
    return bool(accelerator.native_amp) and hasattr(model, "_original_forward")


@contextlib.contextmanager
def keep_adapter(student: PeftModel, args: Any) -> Iterator[None]:
    """Undo what TRL's constructors do to a QLoRA student: they round the adapter to bfloat16, in which Adam's small
    steps are lost, they switch off LoRA's own dropout together with the base's, and they make a mixture of experts
    return its router logits (an auxiliary loss, which nothing here uses and which breaks cached rollouts)."""
    weights = [(param, param.data) for param in student.parameters() if param.requires_grad]
    dropouts = [(m, m.p) for name, m in student.named_modules() if "lora_dropout" in name and isinstance(m, nn.Dropout)]
    init_kwargs, args.model_init_kwargs = args.model_init_kwargs, None  # used already, when the base was loaded
    teacher_kwargs, args.teacher_model_init_kwargs = args.teacher_model_init_kwargs, None
    coefficient, args.router_aux_loss_coef = args.router_aux_loss_coef, 0.0
    config = student.get_base_model().config.get_text_config()
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


class _ChosenUploads:
    """The Hub's client, whose uploads of a folder are cut to the files that may go."""

    def __init__(self, api: Any, files: Sequence[str], of_checkpoints: Sequence[str]):
        self.api, self.files, self.of_checkpoints = api, list(files), list(of_checkpoints)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.api, name)

    def upload_folder(self, **kwargs: Any) -> Any:
        files = self.of_checkpoints if kwargs.get("path_in_repo") else self.files
        return self.api.upload_folder(**{**kwargs, "allow_patterns": files})


@contextlib.contextmanager
def uploading_only(files: Sequence[str], of_checkpoints: Sequence[str]) -> Iterator[None]:
    """Transformers' trainer uploads these files alone; by itself it takes all that is in the run folder.

    Args:
        files: names, or patterns, of the run folder.
        of_checkpoints: of a checkpoint that goes as a folder of its own.
    """
    original = transformers.trainer.hf_api
    transformers.trainer.hf_api = lambda: _ChosenUploads(original(), files, of_checkpoints)
    try:
        yield
    finally:
        transformers.trainer.hf_api = original


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
