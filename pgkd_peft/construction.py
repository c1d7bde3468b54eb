"""What a trainer is made of: the arguments checked, the rows checked, and then the models loaded and put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .automatic import choose_placement, settle_checkpointing, settle_contexts, settle_training
from .config import PrivilegedGKDConfig
from .conformance import check_model
from .data.check import DataReport, checked_rows
from .data.collator import DataCollatorForPrivilegedGKD
from .data.formats import messages_of
from .data.named import model_name
from .engines.servers import RolloutServers, connect
from .errors import ConfigError
from .model.architecture import warn_of_long_rope, zero_dropout
from .model.head import Head
from .model.load import base_of
from .model.student import build_student, context_length, embedding_rows, find_tokenizer, hidden_size
from .run.console import logger, show_log_lines
from .run.resume import refuse_other_base
from .scoring import add_hidden_states_forward
from .teacher import Teacher, build_separate_teacher, check_same_vocabulary, check_teacher, teacher_tokenizer


@dataclass
class Parts:
    """What a trainer is made of.

    Attributes:
        report: on the training rows; None where they can only be checked one by one.
        student: one base with the one adapter that trains.
        separate: another model that teaches, where there is one.
        loaded: what was loaded, in a sentence.
    """

    args: PrivilegedGKDConfig
    tokenizer: PreTrainedTokenizerBase
    collator: Any
    train_dataset: Any
    eval_dataset: Any
    report: DataReport | None
    servers: RolloutServers | None
    student: PeftModel
    separate: PreTrainedModel | None
    teacher: Teacher
    head: Head
    teacher_head: Head
    loaded: str


def prepare(
    model: PreTrainedModel | nn.Module | str | None,
    teacher_model: PreTrainedModel | nn.Module | str | None,
    args: PrivilegedGKDConfig | None,
    data_collator: Any,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | dict[str, Dataset] | None,
    processing_class: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    quantization_config: BitsAndBytesConfig | None,
    **unusable: Any,
) -> Parts:
    """The arguments of :class:`pgkd_peft.PrivilegedSelfDistillTrainer` -> what it is made of.

    Args:
        unusable: arguments of TRL's constructor that mean nothing here; refused unless None.

    Raises:
        PGKDError: names the row, field or model at fault; rows and settings are checked before a model is loaded.
    """
    # What was passed, checked before anything is loaded.
    model, teacher_model = model_name(model), model_name(teacher_model)
    args = _usable(model, args, eval_dataset, **unusable)
    show_log_lines(main_process=args.process_index == 0)
    check_teacher(model, teacher_model, args)
    train_dataset, eval_dataset = _as_messages(train_dataset, eval_dataset, data_collator, args)
    tokenizer = find_tokenizer(model, processing_class, args)
    limits = context_length(model, args), embedding_rows(model, args)
    many = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    settle_contexts(args, tokenizer, [train_dataset, *many], limits[0])
    collator = data_collator or DataCollatorForPrivilegedGKD.from_config(tokenizer, args, *limits)
    train_dataset, report = checked_rows(train_dataset, collator, args, "train_dataset")
    eval_dataset = _all_checked(eval_dataset, collator, args)

    servers = connect(args, tokenizer, report.prompt_lengths if report else (), model, peft_config)

    # One base, one adapter that trains, and perhaps another teacher.
    set_seed(args.seed)
    student, loaded = build_student(model, args, peft_config, quantization_config)
    refuse_other_base(student, model)
    separate = None
    if not args.share_student_as_teacher:
        separate = build_separate_teacher(teacher_model, args, quantization_config)
        check_same_vocabulary(student, separate, tokenizer, teacher_tokenizer(teacher_model, args))
    for each in (student, separate) if separate is not None else (student,):
        add_hidden_states_forward(base_of(each))
    loaded += _without_checkpointing(base_of(student), args)
    teacher = Teacher(student, args.teacher_adapter, separate=separate, ema_decay=args.ema_decay)
    head = Head(student)
    teacher_head = head if separate is None else Head(separate)
    if (
        data_collator is None
        and report is not None
        and choose_placement(args, tokenizer, train_dataset, teacher, teacher_head)
    ):
        collator = DataCollatorForPrivilegedGKD.from_config(tokenizer, args, *limits)
        train_dataset, report = checked_rows(train_dataset, collator, args, "train_dataset")
    settle_training(args, hidden_size(student), report.rows if report else None)
    settle_checkpointing(args, student, report)
    if args.feedback is not None:
        collator.keep_sources = True
    return Parts(
        args=args,
        tokenizer=tokenizer,
        collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        report=report,
        servers=servers,
        student=student,
        separate=separate,
        teacher=teacher,
        head=head,
        teacher_head=teacher_head,
        loaded=loaded,
    )


def check_models(student: nn.Module, separate: nn.Module | None, tokenizer: Any, args: PrivilegedGKDConfig) -> None:
    """That they compute here what plain Transformers does, without dropout; refused by name where they do not."""
    if args.disable_dropout:
        zero_dropout(student)
    check_model(student, tokenizer, writes=args.lmbda > 0 or (args.seq_kd and separate is None))
    if separate is not None:
        zero_dropout(separate)
        check_model(separate, tokenizer, writes=args.seq_kd or args.teacher_takeover is not None)
    if long_rope := warn_of_long_rope(base_of(student).config):
        logger.warning(long_rope)


def _usable(model: Any, args: Any, eval_dataset: Any, **unusable: Any) -> PrivilegedGKDConfig:
    """The settings, after what can be said of the arguments alone."""
    if model is None:
        raise ConfigError("no model was given; pass a path, a Hub id or a loaded model.")
    args = args if args is not None else PrivilegedGKDConfig(output_dir="privileged-gkd-model")
    if not isinstance(args, PrivilegedGKDConfig):
        raise ConfigError(f"args is a {type(args).__name__}; it must be a PrivilegedGKDConfig.")
    for name, value in unusable.items():
        if value is not None:
            raise ConfigError(f"{name} cannot be used: rows need two contexts, and no logits are kept. Remove it.")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ConfigError(
            "eval_strategy is set, but there are no rows to evaluate on. Pass eval_dataset (as a flag, "
            "--eval_dataset_name), or set eval_strategy to no."
        )
    return args


def _as_messages(train: Any, evaluation: Any, collator: Any, args: PrivilegedGKDConfig) -> tuple[Any, Any]:
    """Both sets of rows with `messages`, whatever format they are in; another collator reads its own."""
    if collator is not None and not isinstance(collator, DataCollatorForPrivilegedGKD):
        return train, evaluation
    key = args.privileged_key
    return messages_of(train, "train_dataset", key), messages_of(evaluation, "eval_dataset", key)


def _without_checkpointing(base: PreTrainedModel, args: PrivilegedGKDConfig) -> str:
    """Switch gradient checkpointing off for a model that has none; returns what to say of it."""
    if not args.gradient_checkpointing or base.supports_gradient_checkpointing:
        return ""
    args.without_checkpointing()
    return f"; {type(base).__name__} offers no gradient checkpointing, which is off"


def _all_checked(eval_dataset: Any, collator: Any, args: PrivilegedGKDConfig) -> Any:
    """The rows to evaluate on, of one data set or of several by name."""
    if eval_dataset is None:
        return None
    if isinstance(eval_dataset, dict):
        return {key: checked_rows(rows, collator, args, key)[0] for key, rows in eval_dataset.items()}
    return checked_rows(eval_dataset, collator, args, "eval_dataset")[0]
