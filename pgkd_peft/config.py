"""What a run is told: `PrivilegedGKDConfig`, checked before any model is loaded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from trl.experimental.gkd import GKDConfig

from .config_checks import TEXTS, check_given, check_settled
from .errors import ConfigError, PGKDError, reason

logger = logging.getLogger(__name__)

QUANTIZATIONS = ("nf4", "int8", "none")
PLACEMENTS = ("messages", "user", "system")
TEACHERS = ("disabled", "shared", "initial", "ema")
ENGINES = ("auto", "adapter", "merged", "server")
WITHOUT_FEEDBACK = ("anchor", "skip")
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
        check_given(self)
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
        check_settled(self)

    def _settle_device(self) -> None:
        """Without an accelerator train on the CPU; on a GPU without bfloat16 (T4) use float16."""
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
