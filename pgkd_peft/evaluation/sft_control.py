"""The control `sft`: TRL's SFTTrainer on the same base, LoRA, rows and settings, and on the ids of our own collator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from transformers import BitsAndBytesConfig, TrainerCallback, set_seed
from trl import SFTTrainer
from trl.trainer.utils import disable_dropout_in_model

from ..config import PrivilegedGKDConfig
from ..data.check import checked_rows
from ..data.collator import DataCollatorForPrivilegedGKD
from ..errors import ConfigError
from ..model.adapters import STUDENT
from ..model.architecture import zero_dropout
from ..model.frozen import FrozenCheck
from ..model.student import build_student, find_tokenizer
from ..run.console import show_log_lines
from ..run.info import RunInfo
from ..trl_compat import keep_adapter
from .gap_callback import EvaluationMixin


class SFTControlTrainer(EvaluationMixin, SFTTrainer):
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
        show_log_lines(main_process=args.process_index == 0)
        tokenizer = find_tokenizer(model, None, args)
        collator = DataCollatorForPrivilegedGKD.from_config(tokenizer, args)
        args.dataset_kwargs = {"skip_prepare_dataset": True}  # the rows are tokens already, none of them too long
        rows, report = checked_rows(train_dataset, collator, args, "train_dataset")
        set_seed(args.seed)
        student, loaded = build_student(model, args, peft_config, quantization_config)
        with keep_adapter(student, args):
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
        self.context_collator = collator
        self.frozen = FrozenCheck(student)
        self.run_info = RunInfo(self, loaded, report)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; ``run.json`` is written, and the base proven unchanged at the end.

        Raises:
            ConfigError: a checkpoint is given: TRL's do not hold what would make resuming exact.
        """
        if resume_from_checkpoint:
            raise ConfigError("the control sft is not resumed, it starts anew: give --overwrite instead of --resume.")
        with self.run_info.recording():
            result = super().train(None, *args, **kwargs)
            self.frozen.verify("at the end of training")
        return result

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or self.args.output_dir
        self.model.save_pretrained(folder, selected_adapters=[STUDENT])
        self.processing_class.save_pretrained(folder)
        self.run_info.write(folder)
        self.create_model_card(model_name=Path(str(folder)).name)


def tokens_of(rows: Dataset, collator: DataCollatorForPrivilegedGKD) -> Dataset:
    """``input_ids`` (student prompt + reference answer) and ``labels`` (-100 in the prompt) of every row."""
    ids, labels = [], []
    for row in rows:
        encoded = collator.encode(row)
        prompt, answer = encoded["student_ids"], encoded["completion_ids"]
        ids.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
    return Dataset.from_dict({"input_ids": ids, "labels": labels})
