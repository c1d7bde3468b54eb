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
from typing import Any, NamedTuple

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


# ---- inherited settings --------------------------------------------------------------------------------------------
#
# Every setting that comes from TRL and Transformers, once: used, refused, or harmless; and the ranges of the numbers. A
# setting that is accepted and does nothing misleads as much as a wrong one. Read in transformers 5.23 and TRL 1.16; a
# test demands that each inherited field stands in exactly one of the tables, so a new one has to be decided upon.

# What the trainers of Transformers and TRL do with these is what a run of ours wants of them.
USED = frozenset(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step log_on_each_node log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start
    save_strategy save_steps save_on_each_node save_total_limit push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
    accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    train_sampling_strategy ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    ddp_backend ddp_timeout debug resume_from_checkpoint model_init_kwargs trust_remote_code chat_template_path
    max_length temperature lmbda beta max_new_tokens teacher_model_name_or_path
    teacher_model_init_kwargs disable_dropout seq_kd
    """.split()  # noqa: SIM905
)

_NO_LOGITS = "no logits are kept, so there are no metrics of them"
_RENDERED = "the rows are rendered by the chat template, one by one"
# Whatever they say, a run is the same; each with the reason.
HARMLESS = {
    "prediction_loss_only": _NO_LOGITS,
    "eval_do_concat_batches": _NO_LOGITS,
    "eval_use_gather_object": _NO_LOGITS,
    "eval_accumulation_steps": _NO_LOGITS,
    "include_for_metrics": _NO_LOGITS,
    "batch_eval_metrics": _NO_LOGITS,
    "label_names": "there are no labels",
    "logging_nan_inf_filter": "it would read every loss; a step's are looked at together, and NaN stops the run",
    "remove_unused_columns": "GKDTrainer sets it: rows keep their columns until both contexts are made",
    "length_column_name": "it names a column of train_sampling_strategy='group_by_length', which is refused",
    "skip_memory_metrics": "it adds Transformers' own memory figures to the log, or not",
    "do_train": "read by Transformers' example scripts alone",
    "do_eval": "read by Transformers' example scripts alone",
    "do_predict": "read by Transformers' example scripts alone",
    "local_rank": "the launcher's environment says which process this is",
}


class Refused(NamedTuple):
    """An inherited setting with one value that it may have.

    Attributes:
        wanted: that value, the default of TRL or Transformers.
        why: why no other one can be had, or what to use instead.
    """

    wanted: Any
    why: str

    def is_left_alone(self, value: Any) -> bool:
        """Whether a value says no more than the default does; empty is as good as none, and False as "no"."""
        empty = value in (None, "", [], {}) and self.wanted in (None, False)
        return bool(value == self.wanted) or empty or (value is False and self.wanted == "no")


_LOSS = "the loss is a divergence between two models, not one of labels"
_SHARDED = (
    "the adapter is switched off inside the shared base, which sharded weights do not allow; one GPU, or several with "
    "plain DDP (accelerate launch --multi_gpu), work"
)
_UNTRIED = "it has not been tried with a base that is teacher and student at once"
REFUSED = {
    "packing": Refused(False, "rows stay separate, each with two contexts"),
    "packing_strategy": Refused("bfd", "rows stay separate, each with two contexts"),
    "eval_packing": Refused(None, "rows stay separate, each with two contexts"),
    "padding_free": Refused(False, "batches are padded"),
    "pad_to_multiple_of": Refused("auto", "batches are padded to their longest row"),
    "pad_token": Refused(None, "masks come from lengths; the tokenizer's own pad token, or its EOS, fills up"),
    "eos_token": Refused(None, "answers end as tokenizer, generation config and chat template say"),
    "assistant_only_loss": Refused(False, "the loss is taken on the completion alone"),
    "completion_only_loss": Refused(None, "the loss is always taken on the completion alone"),
    "loss_type": Refused("nll", _LOSS + "; beta chooses it"),
    "label_smoothing_factor": Refused(0.0, "there are no labels, the teacher's distribution is the target"),
    "router_aux_loss_coef": Refused(None, _LOSS + "; routers are frozen"),
    "dataset_text_field": Refused("text", "rows are conversations, in `messages`; `columns` maps others to it"),
    "dataset_kwargs": Refused(None, _RENDERED),
    "dataset_num_proc": Refused(None, _RENDERED),
    "shuffle_dataset": Refused(False, "training shuffles in every epoch (train_sampling_strategy)"),
    "truncation_mode": Refused(
        "keep_start", "a conversation is never cut: a row over max_length is refused, or left out (skip_long_prompts)"
    ),
    "average_tokens_across_devices": Refused(True, "every completion token of a step counts the same, on all ranks"),
    "use_liger_kernel": Refused(False, "it would replace the loss"),
    "liger_kernel_config": Refused(None, "it would replace the loss"),
    "neftune_noise_alpha": Refused(None, "noise on the student's embeddings is noise in the divergence"),
    "activation_offloading": Refused(False, _UNTRIED),
    "torch_compile": Refused(False, _UNTRIED),
    "torch_compile_backend": Refused(None, _UNTRIED),
    "torch_compile_mode": Refused(None, _UNTRIED),
    "use_cache": Refused(False, "rollouts have their cache anyway, training passes need none"),
    "auto_find_batch_size": Refused(False, "the rollout batch halves itself when memory runs out"),
    "bf16_full_eval": Refused(False, "it rounds adapter and base, which must stay as they are"),
    "fp16_full_eval": Refused(False, "it rounds adapter and base, which must stay as they are"),
    "include_num_input_tokens_seen": Refused("no", "completion_tokens is logged, which is what a step trains on"),
    "save_only_model": Refused(False, "a checkpoint without its optimizer cannot be resumed; save_strategy 'no' saves "
                               "the adapter at the end alone"),
    "enable_jit_checkpoint": Refused(False, "SIGTERM, SIGHUP and Ctrl-C save a checkpoint without it"),
    "fsdp": Refused(None, _SHARDED),
    "fsdp_config": Refused(None, _SHARDED),
    "deepspeed": Refused(None, _SHARDED),
    "parallelism_config": Refused(None, _SHARDED),
}  # fmt: skip


class Range(NamedTuple):
    """What a number may be: of a kind, from `least` (itself included, or not) up to below `limit`."""

    kind: type
    least: float
    included: bool = True
    limit: float | None = None

    def allows(self, value: float) -> bool:
        above = value >= self.least if self.included else value > self.least
        return above and (self.limit is None or value < self.limit)

    def __str__(self) -> str:
        low = f"{self.least:g} or more" if self.included else f"more than {self.least:g}"
        return low if self.limit is None else f"{low} and less than {self.limit:,.10g}"


COUNT, FROM_ZERO = Range(int, 1), Range(int, 0)
SEED = Range(int, 0, limit=2**32)  # numpy's
ABOVE_ZERO, NOT_NEGATIVE = Range(float, 0, included=False), Range(float, 0)
SHARE = Range(float, 0, limit=1)

# Text, or the name of something.
TEXTS = (
    *("output_dir", "run_name", "optim", "lr_scheduler_type", "metric_for_best_model"),
    *("logging_strategy", "eval_strategy", "save_strategy", "hub_strategy", "privileged_template"),
)

RANGES = {
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "num_train_epochs": ABOVE_ZERO,
    "learning_rate": ABOVE_ZERO,
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": ABOVE_ZERO,
    "max_grad_norm": NOT_NEGATIVE,  # 0: gradients are not clipped
    "logging_steps": ABOVE_ZERO,  # below 1: a share of all steps
    "eval_steps": ABOVE_ZERO,
    "save_steps": ABOVE_ZERO,
    "eval_delay": NOT_NEGATIVE,
    "save_total_limit": COUNT,
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": FROM_ZERO,
    "dataloader_prefetch_factor": COUNT,
    "torch_empty_cache_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
}

# Settings that are mappings, which the command line gives as JSON.
MAPPINGS = (
    "model_init_kwargs",
    "teacher_model_init_kwargs",
    "lr_scheduler_kwargs",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs",
)
