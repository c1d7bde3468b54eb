"""The control `sft`: TRL's SFTTrainer on the same base, LoRA, rows and settings, and on the ids of our own collator."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from peft import PeftConfig
from transformers import BitsAndBytesConfig, TrainerCallback, set_seed
from trl.trainer.utils import disable_dropout_in_model

from ..automatic import settle_contexts, settle_training
from ..base_trainer import RunTrainer
from ..config import PrivilegedGKDConfig
from ..data.check import checked_rows
from ..data.collator import DataCollatorForPrivilegedGKD
from ..data.named import model_name
from ..errors import ConfigError, explained
from ..model.architecture import zero_dropout
from ..model.student import build_student, context_length, embedding_rows, find_tokenizer, hidden_size
from ..run.console import show_log_lines
from ..run.resume import refuse_other_base
from ..trl_compat import keep_adapter


class SFTControlTrainer(RunTrainer):
    """SFTTrainer that starts where :class:`~pgkd_peft.PrivilegedSelfDistillTrainer` starts: the same base (guarded
    against bitsandbytes' repacking on CPU), the same first LoRA weights in float32, the same rows in the same order.
    The loss is the mean cross-entropy of the reference answer's tokens after the student's prompt, the end of turn
    included.

    Raises:
        PGKDError: as the other trainer, before a model is loaded.
    """

    def __init__(
        self,
        model: str,
        args: PrivilegedGKDConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
    ):
        model = model_name(model)
        show_log_lines(main_process=args.process_index == 0)
        tokenizer = find_tokenizer(model, None, args)
        context, vocabulary = context_length(model, args), embedding_rows(model, args)
        settle_contexts(args, tokenizer, [train_dataset, eval_dataset], context)
        collator = DataCollatorForPrivilegedGKD.from_config(tokenizer, args, context, vocabulary)
        args.dataset_kwargs = {"skip_prepare_dataset": True}  # the rows are tokens already, none of them too long
        rows, report = checked_rows(train_dataset, collator, args, "train_dataset")
        set_seed(args.seed)
        student, loaded = build_student(model, args, peft_config, quantization_config)
        refuse_other_base(student, model)
        settle_training(args, hidden_size(student), len(rows))
        with explained("TRL or Transformers refuse these settings", ConfigError), keep_adapter(student, args):
            if args.disable_dropout:
                disable_dropout_in_model(student)
                zero_dropout(student)
            super().__init__(
                student,
                args=args,
                train_dataset=tokens_of(rows, collator),
                eval_dataset=tokens_of(eval_dataset, collator) if eval_dataset is not None else None,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        self.start_run(collator, loaded, report)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; ``run.json`` is written, and the base proven unchanged at the end.

        Raises:
            ConfigError: a checkpoint is given: TRL's do not hold what would make resuming exact.
        """
        if resume_from_checkpoint:
            raise ConfigError("the control sft is not resumed, it starts anew: give --overwrite instead of --resume.")
        return super().train(None, *args, **kwargs)


def tokens_of(rows: Dataset, collator: DataCollatorForPrivilegedGKD) -> Dataset:
    """``input_ids`` (student prompt + reference answer) and ``labels`` (-100 in the prompt) of every row."""
    ids, labels = [], []
    for row in rows:
        encoded = collator.encode(row)
        prompt, answer = encoded["student_ids"], encoded["completion_ids"]
        ids.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
    return Dataset.from_dict({"input_ids": ids, "labels": labels})
