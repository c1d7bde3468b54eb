"""What a run is told: `PrivilegedGKDConfig`, checked before any model is loaded."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.utils.checkpoint
from transformers import Trainer, get_scheduler
from trl.experimental.gkd import GKDConfig

from .errors import ConfigError, PGKDError, explained, reason
from .trl_compat import MAPPINGS, RANGES, REFUSED, TEXTS

logger = logging.getLogger(__name__)

QUANTIZATIONS = ("nf4", "int8", "none")
PLACEMENTS = ("messages", "user", "system")
TEACHERS = ("disabled", "shared", "initial", "ema")
ENGINES = ("auto", "adapter", "merged", "server")
WITHOUT_FEEDBACK = ("anchor", "skip")
CLIP_MODES = ("entry", "token", "rescale")
TRACKER_EXTRAS = ("tensorboard", "trackio", "wandb")
"""Trackers that an extra of this package installs."""

DIVERGENCE_IN_WORDS = {
    0.0: "forward KL(teacher || student): the student must cover everything that the teacher may say",
    1.0: "reverse KL(student || teacher): the student must avoid what the teacher would not say",
}


@dataclass
class PrivilegedGKDConfig(GKDConfig):
    """Settings of a privileged self-distillation run.

    Everything that :class:`trl.experimental.gkd.GKDConfig` (and through it ``SFTConfig`` and ``TrainingArguments``)
    knows is accepted; the fields below are ours. Each one's comment is its help text.

    The trainer chooses what nobody gave and what depends on model and rows: learning_rate, normalize_beta, max_steps,
    warmup_steps, logging_steps, max_privileged_length, privileged_placement and privileged_template (see
    :mod:`pgkd_peft.automatic`). A value that is passed always wins, also one that equals the default.

    Attributes:
        given: names of the fields that were passed. (Where all are, as argument parsers and ``dataclasses.replace``
            do it: those that differ from their defaults.)
        automatic: what the trainer chose: field -> (value, reason).

    Raises:
        ConfigError: a value that cannot work; the message names the field, the value and what is accepted.
    """

    privileged_key: str = field(
        default="privileged_messages",
        metadata={"help": "Dataset column with the privileged information (PI): a list of messages, or a string."},
    )
    max_privileged_length: int = field(
        default=512,
        metadata={"help": "Budget in tokens for the text of the PI alone. The conversation is never cut for it."},
    )
    allow_privileged_cut: bool = field(
        default=False,
        metadata={"help": "Cut PI that is over max_privileged_length at its end, instead of refusing to start."},
    )
    share_student_as_teacher: bool = field(
        default=True,
        metadata={"help": "Teacher and student share one set of base weights, loaded once."},
    )
    rollout_log_steps: int = field(
        default=0,
        metadata={"help": "Log the student's and the teacher's answer side by side every n optimizer steps; 0: never."},
    )
    rollout_log_samples: int = field(default=1, metadata={"help": "Number of prompts in one rollout log."})
    rollout_log_max_new_tokens: int = field(
        default=64, metadata={"help": "Length limit, in tokens, of the answers written for the rollout log."}
    )
    rollout_log_max_chars: int = field(
        default=240,
        metadata={"help": "Longest text shown on the console, in characters; completions.jsonl holds it whole."},
    )
    teacher_adapter: str = field(
        default="disabled",
        metadata={
            "help": "Whose weights answer as teacher. disabled: the base alone, fixed for the run (the fixed teacher "
            "of OPSD, arXiv:2601.18734). shared: the student's own current weights. initial: a frozen copy of the "
            "adapter that training started from. ema: a moving average of the student (SDFT, arXiv:2601.19897).",
            "choices": list(TEACHERS),
        },
    )
    base_quantization: str = field(
        default="nf4",
        metadata={
            "help": "How a model given as a string is loaded. nf4: 4-bit, double quantization (QLoRA, "
            "arXiv:2305.14314). int8: LLM.int8(). none: 16-bit.",
            "choices": list(QUANTIZATIONS),
        },
    )
    privileged_placement: str = field(
        default="messages",
        metadata={
            "help": "Where the teacher sees the PI. messages: as turns after the last user turn. user: folded into the "
            "last user turn. system: in the system turn.",
            "choices": list(PLACEMENTS),
        },
    )
    privileged_template: str | None = field(
        default=None,
        metadata={
            "help": "Text template of the placements user and system, with {privileged} and, for user, {question}. "
            "Default: the one of the placement (see pgkd_peft.data.contexts)."
        },
    )
    template_date: str | None = field(
        default=None,
        metadata={"help": "The day (YYYY-MM-DD) that chat templates write as today's. Default: the day of today."},
    )
    rollout_engine: str = field(
        default="auto",
        metadata={
            "help": "What writes the rollouts. adapter: the model with its LoRA modules, least memory. merged: a "
            "16-bit copy of the linear layers with the LoRA added, fastest. auto: merged where it fits into memory. "
            "server: the vLLM servers of rollout_server_url.",
            "choices": list(ENGINES),
        },
    )
    rollout_server_url: list[str] | None = field(
        default=None,
        metadata={
            "help": "Of rollout_engine=server: http://HOST:PORT of one or several vLLM servers that serve the same "
            "base with --enable-lora; the requests of a step are spread over them. A key is read from VLLM_API_KEY."
        },
    )
    rollout_server_timeout: float = field(
        default=600.0, metadata={"help": "Seconds that a server may take for one rollout before it counts as dead."}
    )
    rollout_server_folder: str | None = field(
        default=None,
        metadata={
            "help": "Where the adapter is written for the servers to load, once an optimizer step: a folder that they "
            "see under the same path. Default: in output_dir."
        },
    )
    rollout_mismatch_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Nats a token that the servers' log-probabilities of a step's rollouts may be off the student's "
            "own (rollout_mismatch in the log) before the run stops. Default: 3 times what the bases differ by at the "
            "start, at least 0.05."
        },
    )
    num_generations: int = field(
        default=1, metadata={"help": "Rollouts a prompt. Each counts as a row of the batch in the loss."}
    )
    teacher_takeover: float | None = field(
        default=None,
        metadata={
            "help": "In a rollout the teacher writes each token at which its distribution and the student's are more "
            "than this many nats (JSD, at most 0.693) apart, and the student the others (OpenReview 6DlaA6eBt7). None: "
            "the student writes all."
        },
    )
    feedback: str | None = field(
        default=None,
        metadata={
            "help": "module:function or path/to/file.py:function that gets a data row and the student's answers to it, "
            "and returns what the teacher reads as PI in place of the data's (SDPO). Runs that code."
        },
    )
    feedback_without: str = field(
        default="anchor",
        metadata={
            "help": "What becomes of a rollout without feedback. anchor: the teacher reads what the student reads. "
            "skip: it is left out of the step.",
            "choices": list(WITHOUT_FEEDBACK),
        },
    )
    loss_temperature: float = field(
        default=1.0,
        metadata={"help": "Divides both models' logits in the loss. (`temperature` is the one that samples.)"},
    )
    normalize_beta: bool = field(
        default=False,
        metadata={
            "help": "Divide the divergence by beta*(1-beta), so that its gradient near agreement is that of KL for "
            "every beta; without it beta=0.5 learns at a quarter of the rate."
        },
    )
    divergence_clip: float | None = field(
        default=None,
        metadata={"help": "Bound in nats on what one token may contribute (OPSD clips entries); None: no bound."},
    )
    divergence_clip_mode: str = field(
        default="rescale",
        metadata={
            "help": "How divergence_clip binds. rescale: scale the token's loss down, keeping its gradient's "
            "direction. token: clamp the token's divergence. entry: clamp each vocabulary entry, as OPSD's code does.",
            "choices": list(CLIP_MODES),
        },
    )
    loss_top_k: int | None = field(
        default=None,
        metadata={
            "help": "Compare only the teacher's k likeliest tokens and one bucket for the rest (a lower bound of the "
            "divergence; 20 to 100 are usual). None: the whole vocabulary."
        },
    )
    skip_first_tokens: int = field(
        default=0,
        metadata={
            "help": "Leave the first k completion tokens out of the loss, against openings such as 'Based on the text' "
            "(SDFT uses 3)."
        },
    )
    loss_chunk_mib: int = field(
        default=64, metadata={"help": "Size in MiB of the logits that the loss holds at a time; never all of them."}
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Leave rollouts that never reached a stop token out of the loss."}
    )
    skip_long_prompts: bool = field(
        default=False,
        metadata={"help": "Skip (and count) rows that are longer than max_length, instead of refusing to start."},
    )
    ema_decay: float = field(
        default=0.99,
        metadata={"help": "Decay a step of teacher_adapter='ema': teacher = decay*teacher + (1-decay)*student."},
    )

    teacher_cache_gib: float | None = field(
        default=None,
        metadata={
            "help": "Host memory in GiB for what a fixed teacher (disabled, initial, or another model) has read: "
            "beginnings of its prompts, and answers that stay. 0: nothing is kept from step to step. Default: a "
            "quarter of the free memory."
        },
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> PrivilegedGKDConfig:
        self = super().__new__(cls)
        names = [f.name for f in fields(cls) if f.init]
        passed = {**dict(zip(names, args)), **kwargs}
        if passed.keys() >= set(names):
            passed = {f.name: passed[f.name] for f in fields(cls) if f.init and passed[f.name] != _default_of(f)}
        self.__dict__.update(_given=frozenset(passed), _automatic={})  # before __init__ fills the defaults in
        return self

    @property
    def given(self) -> frozenset[str]:
        return self.__dict__["_given"]

    @given.setter
    def given(self, names: Iterable[str]) -> None:
        self.__dict__["_given"] = frozenset(names)

    @property
    def automatic(self) -> dict[str, tuple[Any, str]]:
        return self.__dict__["_automatic"]

    def is_open(self, name: str) -> bool:
        """Whether nobody gave this field: not when the settings were made, nor by assignment since."""
        if name in self.given:
            return False
        default = next(_default_of(f) for f in fields(self) if f.name == name)
        return bool(getattr(self, name) == self.automatic.get(name, (default,))[0])

    def without_checkpointing(self) -> None:
        """Switch gradient checkpointing off, by the name that Transformers reads and by its older one."""
        self.gradient_checkpointing = self.activation_checkpointing = False

    def choose(self, name: str, value: Any, reason: str) -> None:
        """Set a field that nobody gave, and remember why."""
        setattr(self, name, value)
        if name == "gradient_checkpointing":
            self.activation_checkpointing = value
        self.automatic[name] = (value, reason)

    def __post_init__(self) -> None:
        for name in ("lmbda", "beta"):
            value = self._number(name, float)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} is {value}; it must lie between 0.0 and 1.0.")
        self._check_inherited()
        self._settle_device()
        try:
            with warnings.catch_warnings():  # TRL sets the field that Transformers has renamed
                warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
                super().__post_init__()
        except PGKDError:
            raise
        except Exception as error:  # any type: a value of a wrong type fails where Transformers first uses it
            named = [name for name in TEXTS if str(error).startswith(f"{getattr(self, name)} is not a valid ")]
            what = " and ".join(named) or "these settings"
            raise ConfigError(f"{what} cannot be used: {reason(error)}") from error
        self._settle_gpus()
        self._check_choices()
        self._check_ranges()
        self._check_servers()
        self._check_mappings()
        self._check_checkpointing()
        self._check_evaluation()
        self._check_optimizer()
        self._check_trackers()

    def _settle_device(self) -> None:
        """Without an accelerator train on the CPU; on a GPU without bfloat16 (T4) use float16."""
        import torch

        if not torch.accelerator.is_available():
            self.use_cpu = True
        elif self.bf16 is None and not self.fp16 and compute_dtype() == torch.float16:  # type: ignore[has-type]
            self.fp16 = True

    def _settle_gpus(self) -> None:
        """One process trains on one GPU; Transformers would split batches over all that are visible (DataParallel),
        which TRL's trainers refuse."""
        count = self.n_gpu
        if count > 1:
            self._n_gpu = 1
            logger.warning(
                "%d GPUs are visible, one is used (%s). For all of them: accelerate launch --multi_gpu --num_processes "
                "%d -m pgkd_peft train ...; to choose one: CUDA_VISIBLE_DEVICES.",
                count,
                self.device,
                count,
            )

    def _number(self, name: str, kind: type) -> Any:
        value = getattr(self, name)
        if isinstance(value, str):
            try:
                value = kind(value)
            except ValueError:
                raise ConfigError(f"{name} is {value!r}; it must be a number.") from None
            setattr(self, name, value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} is {value}; it must be a finite number.")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and value != int(value)):
            raise ConfigError(f"{name} is {value!r}; it must be {'a whole number' if kind is int else 'a number'}.")
        if kind is int and abs(value) > sys.maxsize:
            raise ConfigError(f"{name} is {value}; that is more than a computer counts to.")
        if kind is int and isinstance(value, float):  # 64.0 counts nothing
            value = int(value)
            setattr(self, name, value)
        return value

    def _check_choices(self) -> None:
        for name, accepted in (
            ("teacher_adapter", TEACHERS),
            ("base_quantization", QUANTIZATIONS),
            ("privileged_placement", PLACEMENTS),
            ("rollout_engine", ENGINES),
            ("divergence_clip_mode", CLIP_MODES),
            ("feedback_without", WITHOUT_FEEDBACK),
        ):
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; accepted are {', '.join(accepted)}.")

    def _check_ranges(self) -> None:
        for name, least, kind in (
            ("max_privileged_length", 1, int),
            ("rollout_log_steps", 0, int),
            ("rollout_log_samples", 1, int),
            ("rollout_log_max_new_tokens", 1, int),
            ("rollout_log_max_chars", 1, int),
            ("num_generations", 1, int),
            ("skip_first_tokens", 0, int),
            ("loss_chunk_mib", 1, int),
            ("max_new_tokens", 1, int),
        ):
            if self._number(name, kind) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        if self._number("temperature", float) < 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or more.")
        if self._number("loss_temperature", float) <= 0:
            raise ConfigError(f"loss_temperature is {self.loss_temperature}; it must be more than 0.")
        if not 0.0 <= self._number("ema_decay", float) < 1.0:
            raise ConfigError(f"ema_decay is {self.ema_decay}; it must be at least 0 and less than 1.")
        if self.divergence_clip is not None and self._number("divergence_clip", float) <= 0:
            raise ConfigError(f"divergence_clip is {self.divergence_clip}; it must be more than 0, or left out.")
        if self.teacher_takeover is not None and self._number("teacher_takeover", float) < 0:
            raise ConfigError(f"teacher_takeover is {self.teacher_takeover}; it must be 0 or more, or left out.")
        for name in ("teacher_takeover", "feedback"):
            if getattr(self, name) is not None and self.lmbda == 0.0:
                raise ConfigError(f"{name} is set, but lmbda is 0.0: the student writes nothing. Raise lmbda.")
        if self.loss_top_k is not None and self._number("loss_top_k", int) < 1:
            raise ConfigError(f"loss_top_k is {self.loss_top_k}; it must be 1 or more, or left out.")
        if self.teacher_cache_gib is not None and not 0 <= self._number("teacher_cache_gib", float) < float("inf"):
            raise ConfigError(
                f"teacher_cache_gib is {self.teacher_cache_gib}; it must be 0 (keep nothing) or more, or left out."
            )
        if not isinstance(self.privileged_key, str) or not self.privileged_key.strip():
            raise ConfigError("privileged_key is empty; give the name of the dataset column that holds the PI.")
        if self.privileged_key == "messages":
            raise ConfigError("privileged_key is 'messages', the column of the conversation itself; name another one.")
        if self.privileged_template is not None and "{privileged}" not in self.privileged_template:
            raise ConfigError("privileged_template lacks {privileged}: the teacher would never see the PI.")

    def _check_servers(self) -> None:
        """What can be said of rollout_engine='server' without asking a server."""
        for name in ("rollout_server_timeout", "rollout_mismatch_tolerance"):
            if getattr(self, name) is not None and self._number(name, float) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be more than 0.")
        urls = self.rollout_server_url
        if isinstance(urls, str):
            urls = urls.replace(",", " ").split()
        if self.rollout_engine != "server":
            if urls:
                raise ConfigError(
                    f"rollout_server_url is {urls!r}, but rollout_engine is {self.rollout_engine!r}. Set "
                    "rollout_engine to server, or remove the address."
                )
            return
        if not urls:
            raise ConfigError(
                "rollout_engine is 'server', but rollout_server_url names none. Give one or several, as "
                "http://localhost:8000."
            )
        self.rollout_server_url = [_server_url(url) for url in urls]
        if self.teacher_takeover is not None:
            raise ConfigError(
                "teacher_takeover is set with rollout_engine 'server': there both models write, token by token, in "
                "one process. Remove one of the two."
            )

    def _check_inherited(self) -> None:
        """Inherited settings that have no meaning here are refused by name rather than ignored, and numbers that cannot
        train, before Transformers meets them."""
        for name, refused in REFUSED.items():
            if getattr(self, name) is None and isinstance(refused.wanted, str):  # null in a recipe: left alone
                setattr(self, name, refused.wanted)
            if not refused.is_left_alone(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)!r} cannot be used: {refused.why}. Remove it.")
        optional = {f.name for f in dataclasses.fields(self) if f.default is None}
        for name, accepted in RANGES.items():
            if getattr(self, name) is None and name in optional:
                continue
            if not accepted.allows(self._number(name, accepted.kind)):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {accepted}.")
        for name in TEXTS:
            value = getattr(self, name)
            is_path = name == "output_dir" and isinstance(value, os.PathLike)
            if not isinstance(value, str) and not is_path and not (value is None and name in optional):
                raise ConfigError(f"{name} is {value!r}; it must be text.")
        if isinstance(self.accelerator_config, (bool, int, float)):  # Transformers would open the file of this number
            raise ConfigError(
                f"accelerator_config is {self.accelerator_config!r}; it must be a mapping, or a JSON file."
            )
        if self.output_dir is not None and not str(self.output_dir).strip():
            raise ConfigError("output_dir is empty; give the folder to write the run to.")
        if self._number("max_steps", int) < 1 and self.max_steps != -1:
            raise ConfigError(
                f"max_steps is {self.max_steps}; it must be 1 or more (or -1: num_train_epochs says how long)."
            )
        for own in dataclasses.fields(self):  # a number that no table knows can still not be NaN or infinite
            if isinstance(getattr(self, own.name, None), float):
                self._number(own.name, float)
        if self.train_sampling_strategy == "group_by_length":
            raise ConfigError(
                "train_sampling_strategy is 'group_by_length', which needs rows of token ids; the rows of a step are "
                "grouped by length anyway. Use random or sequential."
            )
        if self.router_aux_loss_coef:
            raise ConfigError(
                f"router_aux_loss_coef={self.router_aux_loss_coef!r} cannot be used: routers do not train, "
                "the target is the teacher's distribution. Remove it."
            )
        if self.max_length is not None and self._number("max_length", int) < 8:
            raise ConfigError(f"max_length is {self.max_length}; it must be 8 or more, or None for no limit.")
        if self.teacher_model_name_or_path is not None and self.share_student_as_teacher:
            raise ConfigError(
                f"teacher_model_name_or_path is {self.teacher_model_name_or_path!r} while share_student_as_teacher is "
                "True. Set share_student_as_teacher=False to load another teacher, or remove the path."
            )
        if self.seq_kd and self.lmbda == 1.0:
            warnings.warn("seq_kd=True does nothing with lmbda=1.0; lower lmbda or drop seq_kd.", stacklevel=4)

    def _check_mappings(self) -> None:
        for name in MAPPINGS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ConfigError(
                    f'{name} is {value!r}; it must be a mapping (on the command line JSON, {{"name": 1}}).'
                )

    def _check_checkpointing(self) -> None:
        """Torch would refuse a name that it does not know in the first step."""
        accepted = [*inspect.signature(torch.utils.checkpoint.checkpoint).parameters, "every_n_layers"]
        for field_name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            for name in getattr(self, field_name) or {}:
                if name not in accepted or name in ("function", "args", "kwargs"):
                    known = ", ".join(sorted({*accepted} - {"function", "args", "kwargs"}))
                    raise ConfigError(f"{field_name} has {name!r}, which it does not know ({known}).")

    def _check_evaluation(self) -> None:
        """What is about evaluations means nothing without one."""
        if self.eval_strategy != "no":
            return
        for name in ("eval_on_start", "load_best_model_at_end"):
            if getattr(self, name):
                raise ConfigError(f"{name} is set, but nothing is evaluated; set eval_strategy (and eval_steps).")

    def _check_optimizer(self) -> None:
        """Optimizer and scheduler are made when training begins; what they lack is found out now, on one number."""
        with explained(f"optim {str(self.optim)!r} with optim_args {self.optim_args!r} cannot be used", ConfigError):
            try:
                Trainer.get_optimizer_cls_and_kwargs(self)
            except ValueError as error:
                if "model" not in str(error):  # some look for their layers in it
                    raise
        if self.lr_scheduler_type == "reduce_lr_on_plateau":
            return  # takes other arguments
        kind, kwargs = str(self.lr_scheduler_type), self.lr_scheduler_kwargs
        with explained(f"lr_scheduler_type {kind!r} with lr_scheduler_kwargs {kwargs!r} cannot be used", ConfigError):
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.learning_rate)
            get_scheduler(self.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=self.lr_scheduler_kwargs)

    def _check_trackers(self) -> None:
        """A tracker that is not installed would end the run when its model is loaded already."""
        from transformers.integrations import get_available_reporting_integrations
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        there = get_available_reporting_integrations()
        for name in self.report_to:
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

    def divergence_in_words(self) -> str:
        """One line that says which divergence is minimised, with its formula in words."""
        words = DIVERGENCE_IN_WORDS.get(
            float(self.beta),
            f"{self.beta:g} * KL(teacher || M) + {1 - self.beta:g} * KL(student || M), with "
            f"M = {self.beta:g} * teacher + {1 - self.beta:g} * student",
        )
        extras = []
        if self.normalize_beta and 0 < self.beta < 1:
            extras.append(f"divided by beta*(1-beta) = {self.beta * (1 - self.beta):g}")
        if self.loss_temperature != 1.0:
            extras.append(f"logits divided by {self.loss_temperature:g}")
        if self.loss_top_k is not None:
            extras.append(f"over the teacher's top {self.loss_top_k} tokens and one bucket for the rest")
        if self.divergence_clip is not None:
            extras.append(f"clipped at {self.divergence_clip:g} nats ({self.divergence_clip_mode})")
        if self.skip_first_tokens:
            extras.append(f"without the first {self.skip_first_tokens} tokens")
        return ", ".join([f"beta={self.beta:g}: {words}", *extras]) + "; mean over completion tokens, in nats"


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


def _default_of(f: Any) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def compute_dtype() -> torch.dtype:
    """bfloat16, or float16 on a GPU whose hardware has no bfloat16 (T4, V100)."""
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16
