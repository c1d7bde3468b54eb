"""What a run is told: `PrivilegedGKDConfig`, checked before any model is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from trl.experimental.gkd import GKDConfig

from .errors import ConfigError

QUANTIZATIONS = ("nf4", "int8", "none")
PLACEMENTS = ("messages", "user", "system")
TEACHERS = ("disabled", "shared", "initial", "ema")
ENGINES = ("auto", "adapter", "merged")
CLIP_MODES = ("entry", "token", "rescale")

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
            "16-bit copy of the linear layers with the LoRA added, fastest. auto: merged where it fits into memory.",
            "choices": list(ENGINES),
        },
    )
    num_generations: int = field(
        default=1, metadata={"help": "Rollouts a prompt. Each counts as a row of the batch in the loss."}
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

    def choose(self, name: str, value: Any, reason: str) -> None:
        """Set a field that nobody gave, and remember why."""
        setattr(self, name, value)
        self.automatic[name] = (value, reason)

    def __post_init__(self) -> None:
        for name in ("lmbda", "beta"):
            value = self._number(name, float)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} is {value}; it must lie between 0.0 and 1.0.")
        self._settle_device()
        try:
            with warnings.catch_warnings():  # TRL sets the field that Transformers has renamed
                warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
                super().__post_init__()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._check_choices()
        self._check_ranges()
        self._check_inherited()

    def _settle_device(self) -> None:
        """Without an accelerator train on the CPU; on a GPU without bfloat16 (T4) use float16."""
        import torch

        if not torch.accelerator.is_available():
            self.use_cpu = True
        elif self.bf16 is None and not self.fp16 and compute_dtype() == torch.float16:  # type: ignore[has-type]
            self.fp16 = True

    def _number(self, name: str, kind: type) -> Any:
        value = getattr(self, name)
        if isinstance(value, str):
            try:
                value = kind(value)
            except ValueError:
                raise ConfigError(f"{name} is {value!r}; it must be a number.") from None
            setattr(self, name, value)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and value != int(value)):
            raise ConfigError(f"{name} is {value!r}; it must be {'a whole number' if kind is int else 'a number'}.")
        return value

    def _check_choices(self) -> None:
        for name, accepted in (
            ("teacher_adapter", TEACHERS),
            ("base_quantization", QUANTIZATIONS),
            ("privileged_placement", PLACEMENTS),
            ("rollout_engine", ENGINES),
            ("divergence_clip_mode", CLIP_MODES),
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
        if self.loss_top_k is not None and self._number("loss_top_k", int) < 1:
            raise ConfigError(f"loss_top_k is {self.loss_top_k}; it must be 1 or more, or left out.")
        if not isinstance(self.privileged_key, str) or not self.privileged_key.strip():
            raise ConfigError("privileged_key is empty; give the name of the dataset column that holds the PI.")
        if self.privileged_key == "messages":
            raise ConfigError("privileged_key is 'messages', the column of the conversation itself; name another one.")
        if self.privileged_template is not None and "{privileged}" not in self.privileged_template:
            raise ConfigError("privileged_template lacks {privileged}: the teacher would never see the PI.")

    def _check_inherited(self) -> None:
        """Inherited settings that have no meaning here are refused by name rather than ignored."""
        for name, wanted, why in (
            ("packing", False, "rows stay separate, each with two contexts"),
            ("padding_free", False, "batches are padded"),
            ("assistant_only_loss", False, "the loss is taken on the completion alone"),
            ("completion_only_loss", None, "the loss is always taken on the completion alone"),
            ("use_liger_kernel", False, "it would replace the loss"),
            ("label_smoothing_factor", 0.0, "there are no labels, the teacher's distribution is the target"),
            ("auto_find_batch_size", False, "the rollout batch halves itself when memory runs out"),
        ):
            if getattr(self, name) != wanted:
                raise ConfigError(f"{name}={getattr(self, name)!r} cannot be used: {why}. Remove it.")
        if self.max_length is not None and self._number("max_length", int) < 8:
            raise ConfigError(f"max_length is {self.max_length}; it must be 8 or more, or None for no limit.")
        if self.teacher_model_name_or_path is not None and self.share_student_as_teacher:
            raise ConfigError(
                f"teacher_model_name_or_path is {self.teacher_model_name_or_path!r} while share_student_as_teacher is "
                "True. Set share_student_as_teacher=False to load another teacher, or remove the path."
            )
        if self.seq_kd and self.lmbda == 1.0:
            warnings.warn("seq_kd=True does nothing with lmbda=1.0; lower lmbda or drop seq_kd.", stacklevel=4)

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


def _default_of(f: Any) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def compute_dtype() -> torch.dtype:
    """bfloat16, or float16 on a GPU whose hardware has no bfloat16 (T4, V100)."""
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16
