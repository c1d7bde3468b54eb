"""Whose weights answer as teacher; the context manager that sets them; the proof that the base stayed frozen."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from .config import PrivilegedGKDConfig
from .errors import ConfigError, ModelError, explained
from .model.adapters import (
    INITIAL,
    STUDENT,
    adapter_state,
    adapter_tensors,
    add_frozen_adapter,
    copy_adapter,
)
from .model.cpu import guard_cpu_linear4bit
from .model.ema import EMA, ProductAverage
from .model.load import base_of, check_source
from .model.student import load_quantized, name_of


class Teacher:
    """The teacher of a run: ``with teacher.weights() as model: ...`` runs `model` as the teacher.

    ``initial`` and ``ema`` are kept as second, frozen adapters of these names in the same PeftModel.

    Args:
        model: the student, a PeftModel.
        which: ``disabled``, ``shared``, ``initial`` or ``ema`` (see :class:`PrivilegedGKDConfig`).
        separate: another model that answers instead; `which` is then not looked at.
        ema_decay: of ``ema`` (see :mod:`pgkd_peft.model.ema`).

    Raises:
        ConfigError: `which` is not available for this model.
    """

    def __init__(
        self,
        model: PeftModel,
        which: str = "disabled",
        *,
        separate: nn.Module | None = None,
        ema_decay: float = 0.99,
    ):
        self.model = model
        self.separate = separate
        self.which = which
        self.average: ProductAverage | None = None
        if separate is not None:
            return
        if which in (INITIAL, EMA):
            self._check_second_adapter()
        if which == INITIAL:
            config = copy.deepcopy(model.peft_config[STUDENT])
            add_frozen_adapter(model, INITIAL, config)
            copy_adapter(model, STUDENT, INITIAL)
        elif which == EMA:
            self.average = ProductAverage(model, ema_decay)

    def _check_second_adapter(self) -> None:
        config = self.model.peft_config[STUDENT]
        if config.bias != "none":
            reason = f"bias={config.bias!r} trains biases of the base, of which there is only one set"
        elif getattr(config, "target_parameters", None):
            reason = "target_parameters allow one adapter only"
        else:
            return
        raise ConfigError(
            f"teacher_adapter={self.which!r} needs a second adapter beside the one that trains, but {reason}. "
            "Remove it from the LoraConfig, or use teacher_adapter='shared'."
        )

    @property
    def fixed(self) -> bool:
        """Whether the teacher stays the same during the run."""
        return self.separate is not None or self.which in ("disabled", INITIAL)

    @contextlib.contextmanager
    def weights(self) -> Iterator[nn.Module]:
        """The model to call as teacher: eval mode, no gradient, restored afterwards."""
        with torch.no_grad():
            if self.separate is not None:
                yield self.separate.eval()
            else:
                with adapter_state(self.model, self.which) as model:
                    yield model

    def save(self, path: str) -> None:
        """Write the second adapter, where there is one, as safetensors."""
        if self.separate is None and self.which in (INITIAL, EMA):
            tensors = {k: t.detach().contiguous() for k, t in adapter_tensors(self.model, self.which).items()}
            save_file(tensors, path, metadata={"teacher_adapter": self.which})

    @torch.no_grad()
    def load(self, path: str) -> None:
        """Take over what :meth:`save` wrote.

        Raises:
            ModelError: it does not fit this model.
        """
        if self.separate is not None or self.which not in (INITIAL, EMA):
            return
        own, saved = adapter_tensors(self.model, self.which), load_file(path)
        for name in sorted(own.keys() | saved.keys()):
            if name not in own or name not in saved or own[name].shape != saved[name].shape:
                raise ModelError(f"{path} does not belong to this model: {name} is missing or has another shape")
            own[name].copy_(saved[name])


class AverageCallback(TrainerCallback):
    """Moves the ``ema`` teacher on after every optimizer step, and notes what its rank cut off."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            lost = self.trainer.teacher.average.update()
            self.trainer.meters.add("train", ema_cut_off=lost)


def check_same_vocabulary(
    student: nn.Module, teacher: nn.Module, tokenizer: Any = None, teacher_tokenizer: Any = None
) -> None:
    """A separate teacher must speak of the same tokens as the student, with the same shape of logits.

    Raises:
        ModelError: names what differs.
    """
    sizes = [base_of(m).get_output_embeddings().weight.shape[0] for m in (student, teacher)]
    names = [
        str(getattr(base_of(m).config, "_name_or_path", "")) or type(base_of(m)).__name__ for m in (student, teacher)
    ]
    caps = [getattr(base_of(m).config.get_text_config(), "final_logit_softcapping", None) for m in (student, teacher)]
    if caps[0] != caps[1]:
        raise ModelError(
            f"the teacher {names[1]!r} caps its logits at {caps[1]}, the student {names[0]!r} at {caps[0]} "
            "(final_logit_softcapping). One loss cannot use both; take a teacher of the same family."
        )
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the teacher {names[1]!r} has a vocabulary of {sizes[1]:,} tokens, the student {names[0]!r} one of "
            f"{sizes[0]:,}. Their distributions cannot be compared token by token; take a teacher of the same family "
            "and vocabulary."
        )
    if tokenizer is not None and teacher_tokenizer is not None:
        own, other = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
        differ = sorted(
            (t for t in own.keys() | other.keys() if own.get(t) != other.get(t)), key=lambda t: own.get(t, -1)
        )
        if differ:
            token = differ[0]
            raise ModelError(
                f"the tokenizers of teacher {names[1]!r} and student {names[0]!r} differ in {len(differ):,} tokens, "
                f"e.g. {token!r} is {other.get(token)} for the teacher and {own.get(token)} for the student. Take a "
                "teacher with the student's tokenizer."
            )


def starting_adapter_warning(model: PeftModel) -> str | None:
    """A sentence when the student does not start at the base, so that a disabled adapter is not its starting point."""
    config = model.peft_config[model.active_adapter]
    assert isinstance(config, LoraConfig)
    moved = [
        name
        for name, param in model.named_parameters()
        if (".lora_B." in name or ".lora_embedding_A." in name) and bool(param.detach().any())  # both start at zero
    ]
    if moved:
        reason = "the adapter that training starts from is not zero"
    elif config.bias != "none":
        reason = f"bias={config.bias!r} trains biases of the base itself, which stay when the adapter is disabled"
    elif isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("gaussian", "orthogonal"):
        reason = f"init_lora_weights={config.init_lora_weights!r} changes the base weights"
    else:
        return None
    return (
        f"teacher_adapter='disabled', but {reason}: the teacher is not the model that training starts from, and of the "
        "difference only that stays which these rows teach anew. With teacher_adapter='initial' all of it stays."
    )


def check_teacher(model: Any, teacher_model: Any, args: PrivilegedGKDConfig) -> None:
    """Refuse a teacher that contradicts ``share_student_as_teacher``.

    Raises:
        ConfigError: names both models and what to change.
    """
    teacher = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    same = teacher is None or teacher is model or (isinstance(teacher, str) and teacher == name_of(model))
    if args.share_student_as_teacher and not same:
        raise ConfigError(
            f"share_student_as_teacher=True, but the student is {name_of(model)!r} and teacher_model is "
            f"{name_of(teacher)!r}. To share one base, pass the same model or no teacher_model; to learn from the "
            "other model, set share_student_as_teacher=False."
        )
    if not args.share_student_as_teacher:
        if teacher is None:
            raise ConfigError(
                "share_student_as_teacher=False needs a teacher: pass teacher_model (or --teacher_model_name_or_path)."
            )
        if isinstance(teacher, str):
            check_source(teacher, "teacher model")
        if args.teacher_adapter != "disabled":
            raise ConfigError(
                f"teacher_adapter={args.teacher_adapter!r} chooses among the student's own weights, but "
                "share_student_as_teacher=False brings another model. Remove one of the two."
            )


def build_separate_teacher(
    teacher_model: Any, args: PrivilegedGKDConfig, quantization_config: BitsAndBytesConfig | None
) -> PreTrainedModel:
    """Another model as teacher, loaded once, quantized as the student's base."""
    teacher = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    if isinstance(teacher, str):
        teacher = load_quantized(teacher, args, quantization_config, teacher=True)
    guard_cpu_linear4bit(teacher)
    return teacher.requires_grad_(False).eval()


def teacher_tokenizer(teacher_model: Any, args: PrivilegedGKDConfig) -> PreTrainedTokenizerBase | None:
    """The separate teacher's own tokenizer, where it was named by path or Hub id."""
    teacher = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    if not isinstance(teacher, str):
        return None
    local = (Path(teacher) / "tokenizer_config.json").is_file()
    with explained(f"the tokenizer of teacher {teacher!r} cannot be loaded"):
        try:
            return AutoTokenizer.from_pretrained(teacher, trust_remote_code=args.trust_remote_code)
        except (OSError, ValueError):  # weights without a tokenizer, unless there is one that is broken
            if local:
                raise
            return None
