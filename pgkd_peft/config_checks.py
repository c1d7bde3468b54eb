"""What a settings field may be, and what goes with what: found out before a model is loaded.

Inherited settings stand in a table each: what is refused, and why; and the range of each number. A setting that is
accepted and does nothing misleads as much as a wrong one. (Read in transformers 5.23 and TRL 1.16; a test demands that
each inherited field is known to be used, refused or harmless, so a new one has to be decided upon.)
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import sys
import warnings
from dataclasses import fields
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
import torch.utils.checkpoint
from transformers import Trainer, get_scheduler
from trl.experimental.gkd import GKDConfig

from .errors import ConfigError, explained

TRACKER_EXTRAS = ("tensorboard", "trackio", "wandb")
"""Trackers that an extra of this package installs."""


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


_RENDERED = "the rows are rendered by the chat template, one by one"
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


_NO_LOGITS = "no logits are kept, so there are no metrics of them"
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
"""Whatever they say, a run is the same; each with the reason. Not listed by --help."""


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

RANGES = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "eval_accumulation_steps"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit", "torch_empty_cache_steps"), COUNT),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout", "max_new_tokens"), COUNT),
    **dict.fromkeys(("num_train_epochs", "learning_rate", "adam_epsilon"), ABOVE_ZERO),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), ABOVE_ZERO),  # below 1: a share of all steps
    **dict.fromkeys(("warmup_steps", "weight_decay", "eval_delay", "temperature"), NOT_NEGATIVE),
    "max_grad_norm": NOT_NEGATIVE,  # 0: gradients are not clipped
    **dict.fromkeys(("adam_beta1", "adam_beta2"), SHARE),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "dataloader_num_workers": FROM_ZERO,
}
"""Of inherited numbers."""
OWN_RANGES = {
    **dict.fromkeys(("max_privileged_length", "num_generations", "loss_chunk_mib", "loss_top_k"), COUNT),
    **dict.fromkeys(("rollout_log_samples", "rollout_log_max_new_tokens", "rollout_log_max_chars"), COUNT),
    **dict.fromkeys(("rollout_log_steps", "skip_first_tokens"), FROM_ZERO),
    **dict.fromkeys(("loss_temperature", "divergence_clip"), ABOVE_ZERO),
    **dict.fromkeys(("rollout_server_timeout", "rollout_mismatch_tolerance"), ABOVE_ZERO),
    **dict.fromkeys(("teacher_takeover", "teacher_cache_gib"), NOT_NEGATIVE),
    "ema_decay": SHARE,
}

TEXTS = (
    *("output_dir", "run_name", "optim", "lr_scheduler_type", "metric_for_best_model"),
    *("logging_strategy", "eval_strategy", "save_strategy", "hub_strategy", "privileged_template"),
)
"""Text, or the name of something."""
CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")  # the older name, and the newer


def check_given(config: GKDConfig) -> None:
    """What can be said before Transformers and TRL look at the settings (their ``__post_init__``).

    Raises:
        ConfigError: names the field, its value and what is accepted.
    """
    check_refused(config)
    check_numbers(config)
    check_texts(config)
    check_inherited(config)


def check_settled(config: GKDConfig) -> None:
    """What needs what they have made of them (strategies as enums, the default of ``report_to``).

    Raises:
        ConfigError: names the field, its value and what is accepted.
    """
    check_choices(config)
    check_own(config)
    check_servers(config)
    check_mappings(config)
    check_checkpointing(config)
    check_evaluation(config)
    check_optimizer(config)
    check_trackers(config)


def check_refused(config: GKDConfig) -> None:
    """Inherited settings that have no meaning here are refused by name rather than ignored."""
    for name, refused in REFUSED.items():
        if getattr(config, name) is None and isinstance(refused.wanted, str):  # null in a recipe: left alone
            setattr(config, name, refused.wanted)
        if not refused.is_left_alone(getattr(config, name)):
            raise ConfigError(f"{name}={getattr(config, name)!r} cannot be used: {refused.why}. Remove it.")


def check_numbers(config: GKDConfig) -> None:
    """Every number is finite and in its range."""
    for name in ("lmbda", "beta"):
        value = number(config, name, float)
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"{name} is {value}; it must lie between 0.0 and 1.0.")
    optional = {f.name for f in fields(config) if f.default is None}
    for name, accepted in {**RANGES, **OWN_RANGES}.items():
        may_be_none = name in optional
        if getattr(config, name) is None and may_be_none:
            continue
        if not accepted.allows(number(config, name, accepted.kind)):
            left_out = ", or left out" if may_be_none else ""
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be {accepted}{left_out}.")
    if config.max_length is not None and number(config, "max_length", int) < 8:
        raise ConfigError(f"max_length is {config.max_length}; it must be 8 or more, or None for no limit.")
    if number(config, "max_steps", int) < 1 and config.max_steps != -1:
        raise ConfigError(
            f"max_steps is {config.max_steps}; it must be 1 or more (or -1: num_train_epochs says how long)."
        )
    for own in fields(config):  # a number that no table knows can still not be NaN or infinite
        if isinstance(getattr(config, own.name, None), float):
            number(config, own.name, float)


def number(config: GKDConfig, name: str, kind: type) -> Any:
    """The field as a finite number of that kind; text (of a command line, or a recipe) is converted in place."""
    value, what = getattr(config, name), "a whole number" if kind is int else "a number"
    if isinstance(value, str):
        try:
            value = kind(value)
        except ValueError:
            raise ConfigError(f"{name} is {value!r}; it must be {what}.") from None
        setattr(config, name, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; it must be a finite number.")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and value != int(value)):
        raise ConfigError(f"{name} is {value!r}; it must be {what}.")
    if kind is int and abs(value) > sys.maxsize:
        raise ConfigError(f"{name} is {value}; that is more than a computer counts to.")
    if kind is int and isinstance(value, float):  # 64.0 counts nothing
        value = int(value)
        setattr(config, name, value)
    return value


def check_texts(config: GKDConfig) -> None:
    """What is text, or the name of something, is no number."""
    optional = {f.name for f in fields(config) if f.default is None}
    for name in TEXTS:
        value = getattr(config, name)
        is_path = name == "output_dir" and isinstance(value, os.PathLike)
        if not isinstance(value, str) and not is_path and not (value is None and name in optional):
            raise ConfigError(f"{name} is {value!r}; it must be text.")


def check_inherited(config: GKDConfig) -> None:
    """Inherited settings that do not go with this trainer, or with each other."""
    if isinstance(config.accelerator_config, (bool, int, float)):  # Transformers would open the file of this number
        raise ConfigError(f"accelerator_config is {config.accelerator_config!r}; it must be a mapping, or a JSON file.")
    if config.output_dir is not None and not str(config.output_dir).strip():
        raise ConfigError("output_dir is empty; give the folder to write the run to.")
    if config.train_sampling_strategy == "group_by_length":
        raise ConfigError(
            "train_sampling_strategy is 'group_by_length', which needs rows of token ids; the rows of a step are "
            "grouped by length anyway. Use random or sequential."
        )
    if config.teacher_model_name_or_path is not None and config.share_student_as_teacher:
        raise ConfigError(
            f"teacher_model_name_or_path is {config.teacher_model_name_or_path!r} while share_student_as_teacher is "
            "True. Set share_student_as_teacher=False to load another teacher, or remove the path."
        )
    if config.seq_kd and config.lmbda == 1.0:
        warnings.warn("seq_kd=True does nothing with lmbda=1.0; lower lmbda or drop seq_kd.", stacklevel=5)


def check_choices(config: GKDConfig) -> None:
    """The choices that our own fields name."""
    for f in own_fields(config):
        accepted = f.metadata.get("choices")
        if accepted is not None and getattr(config, f.name) not in accepted:
            raise ConfigError(f"{f.name} is {getattr(config, f.name)!r}; accepted are {', '.join(accepted)}.")


def own_fields(config: GKDConfig) -> list[dataclasses.Field]:
    inherited = {f.name for f in fields(GKDConfig)}
    return [f for f in fields(config) if f.name not in inherited]


def check_own(config: GKDConfig) -> None:
    """Our own fields that are neither numbers nor choices, and what goes with what."""
    for name in ("teacher_takeover", "feedback"):
        if getattr(config, name) is not None and config.lmbda == 0.0:
            raise ConfigError(f"{name} is set, but lmbda is 0.0: the student writes nothing. Raise lmbda.")
    if not isinstance(config.privileged_key, str) or not config.privileged_key.strip():
        raise ConfigError("privileged_key is empty; give the name of the dataset column that holds the PI.")
    if config.privileged_key == "messages":
        raise ConfigError("privileged_key is 'messages', the column of the conversation itself; name another one.")
    if config.privileged_template is not None and "{privileged}" not in config.privileged_template:
        raise ConfigError("privileged_template lacks {privileged}: the teacher would never see the PI.")


def check_servers(config: GKDConfig) -> None:
    """What can be said of rollout_engine='server' without asking a server."""
    urls = config.rollout_server_url
    if isinstance(urls, str):
        urls = urls.replace(",", " ").split()
    if config.rollout_engine != "server":
        if urls:
            raise ConfigError(
                f"rollout_server_url is {urls!r}, but rollout_engine is {config.rollout_engine!r}. Set "
                "rollout_engine to server, or remove the address."
            )
        return
    if not urls:
        raise ConfigError(
            "rollout_engine is 'server', but rollout_server_url names none. Give one or several, as "
            "http://localhost:8000."
        )
    config.rollout_server_url = [_server_url(url) for url in urls]
    if config.teacher_takeover is not None:
        raise ConfigError(
            "teacher_takeover is set with rollout_engine 'server': there both models write, token by token, in "
            "one process. Remove one of the two."
        )


def check_mappings(config: GKDConfig) -> None:
    """Settings that are mappings, which the command line gives as JSON."""
    for name in ("model_init_kwargs", "teacher_model_init_kwargs", "lr_scheduler_kwargs", *CHECKPOINTING):
        value = getattr(config, name)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f'{name} is {value!r}; it must be a mapping (on the command line JSON, {{"name": 1}}).')


def check_checkpointing(config: GKDConfig) -> None:
    """Torch would refuse a name that it does not know in the first step."""
    accepted = [*inspect.signature(torch.utils.checkpoint.checkpoint).parameters, "every_n_layers"]
    for field_name in CHECKPOINTING:
        for name in getattr(config, field_name) or {}:
            if name not in accepted or name in ("function", "args", "kwargs"):
                known = ", ".join(sorted({*accepted} - {"function", "args", "kwargs"}))
                raise ConfigError(f"{field_name} has {name!r}, which it does not know ({known}).")


def check_evaluation(config: GKDConfig) -> None:
    """What is about evaluations means nothing without one."""
    if config.eval_strategy != "no":
        return
    for name in ("eval_on_start", "load_best_model_at_end"):
        if getattr(config, name):
            raise ConfigError(f"{name} is set, but nothing is evaluated; set eval_strategy (and eval_steps).")


def check_optimizer(config: GKDConfig) -> None:
    """Optimizer and scheduler are made when training begins; what they lack is found out now, on one number."""
    with explained(f"optim {str(config.optim)!r} with optim_args {config.optim_args!r} cannot be used", ConfigError):
        try:
            Trainer.get_optimizer_cls_and_kwargs(config)
        except ValueError as error:
            if "model" not in str(error):  # some look for their layers in it
                raise
    if config.lr_scheduler_type == "reduce_lr_on_plateau":
        return  # takes other arguments
    kind, kwargs = str(config.lr_scheduler_type), config.lr_scheduler_kwargs
    with explained(f"lr_scheduler_type {kind!r} with lr_scheduler_kwargs {kwargs!r} cannot be used", ConfigError):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
        get_scheduler(config.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=config.lr_scheduler_kwargs)


def check_trackers(config: GKDConfig) -> None:
    """A tracker that is not installed would end the run when its model is loaded already."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    there = get_available_reporting_integrations()
    for name in config.report_to:
        if not isinstance(name, str) or name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"report_to is {name!r}; accepted are none, all, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
            )
        if name not in there:
            package = f'"pgkd-peft[{name}]"' if name in TRACKER_EXTRAS else name.replace("_", "-")
            raise ConfigError(
                f"report_to is {name!r}, whose package is not installed: pip install {package}, or "
                "leave it out (report_to none; every run folder has metrics.jsonl)."
            )
        if name == "wandb" and not _wandb_can_start():
            raise ConfigError(
                "report_to is 'wandb', but there is no key for it: run `wandb login`, set WANDB_API_KEY, or "
                "WANDB_MODE=offline to keep the run on this machine."
            )


def _wandb_can_start() -> bool:
    """Whether wandb needs no key, or has one; without, it fails when training begins."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    import wandb

    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))  # looks for a key, and asks neither user nor network
    return bool(wandb.api.api_key)  # of older versions


def _server_url(url: Any) -> str:
    """The address of a rollout server without a path; raises ConfigError for what is none."""
    text = str(url).strip().rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        good = False
    if not good or parts.path or parts.query or parts.fragment:
        raise ConfigError(
            f"rollout_server_url is {url!r}; it must be http://HOST:PORT of a vLLM server, as http://localhost:8000."
        )
    if parts.username or parts.password:
        raise ConfigError(
            "rollout_server_url holds a user's name or password, which would stand in run.json. Put the server's key "
            "into the environment as VLLM_API_KEY."
        )
    return text
