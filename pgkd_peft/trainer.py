"""The method: one base, a teacher that reads the PI, a student that does not, one divergence.

The way of one optimizer step, top to bottom:

    get_batch_samples   collator batches -> rows; the student writes completions (rollout.py), the teacher reads them
                        after its own prompt (scoring.py); completion tokens are counted over the whole step
    training_step       one micro-batch: forward and backward of the student
    compute_loss        student's hidden states against the teacher's, through the head (divergence.py)
"""

from __future__ import annotations

import contextlib
import logging
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import EvalPrediction
from trl import SFTTrainer
from trl.experimental.gkd import GKDTrainer

from .config import PrivilegedGKDConfig
from .data.check import checked_rows
from .data.collator import DataCollatorForPrivilegedGKD, stop_ids
from .divergence import jsd_between
from .engines.merged import RolloutEngine
from .errors import ConfigError, PGKDError
from .evaluation.gap_callback import EvaluationMixin
from .model.adapters import STUDENT
from .model.frozen import FrozenCheck, ProbeCallback
from .model.head import Head
from .model.load import base_of
from .model.student import build_student, find_tokenizer
from .rollout import generate, window_generator
from .rollout_log import RolloutLogCallback
from .rows import Row, pack, rows_of
from .run.checkpoint import explain_full_disk, find_checkpoint, replacing
from .run.console import show_log_lines
from .run.health import HealthCallback
from .run.info import RunInfo
from .run.interrupt import interruptible
from .run.memory import memory_for
from .run.meters import means_of
from .run.resume import CheckpointMixin
from .scoring import add_hidden_states_forward, score_teacher, without_padding
from .teacher import (
    AverageCallback,
    Teacher,
    build_separate_teacher,
    check_same_vocabulary,
    check_teacher,
    starting_adapter_warning,
    teacher_tokenizer,
)
from .trl_compat import keep_adapter, refuse_sharding, without_input_casts, without_migration_advice

logger = logging.getLogger(__name__)


class NonFiniteLossError(PGKDError):
    """The loss is NaN or infinite; the batch was saved for inspection."""


class PrivilegedSelfDistillTrainer(CheckpointMixin, EvaluationMixin, GKDTrainer):
    """On-policy self-distillation with privileged information (PI).

    The student answers the conversation; the teacher, by default the same base with the adapter switched off, reads
    the conversation *and* the PI; the adapter learns to make the first distribution equal to the second on every
    completion token (generalized JSD, arXiv:2306.13649 eq. 1; fixed privileged teacher as in OPSD, arXiv:2601.18734).

    The constructor takes what :class:`trl.experimental.gkd.GKDTrainer` takes, and `quantization_config`.

    Args:
        model: path or Hub id (loaded once, quantized as ``args.base_quantization`` says), an adapter folder to
            continue from, a Transformers model, or a PeftModel.
        teacher_model: None or the same as `model`; another model only with ``share_student_as_teacher=False``.
        args: the settings.
        data_collator: replaces the default :class:`DataCollatorForPrivilegedGKD`; must return the same keys.
        train_dataset, eval_dataset: rows with ``messages`` and, where there is PI, ``args.privileged_key``.
        processing_class: the tokenizer; default: the model's.
        peft_config: a LoraConfig; default r=16, alpha=32, all linear layers, no dropout.
        quantization_config: bitsandbytes settings, instead of those of ``args.base_quantization``.

    Raises:
        PGKDError: a ValueError that names the row, field or model at fault; rows and settings are checked before a
            model is loaded.
    """

    args: PrivilegedGKDConfig
    model: PeftModel
    _tag_names = ["trl", "pgkd", "privileged-gkd", "self-distillation"]  # noqa: RUF012
    _name = "Privileged GKD"
    _paper = {  # noqa: RUF012
        "title": "Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models",
        "id": "2601.18734",
        "citation": textwrap.dedent("""\
            @misc{zhao2026opsd,
                title  = {Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models},
                year   = 2026,
                eprint = {arXiv:2601.18734},
            }"""),
    }
    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole optimizer step

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        teacher_model: PreTrainedModel | nn.Module | str | None = None,
        args: PrivilegedGKDConfig | None = None,
        data_collator: Any | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
    ):
        # 1. What was passed, checked before anything is loaded.
        if model is None:
            raise ConfigError("no model was given; pass a path, a Hub id or a loaded model.")
        args = args if args is not None else PrivilegedGKDConfig(output_dir="privileged-gkd-model")
        if not isinstance(args, PrivilegedGKDConfig):
            raise ConfigError(f"args is a {type(args).__name__}; it must be a PrivilegedGKDConfig.")
        for name, value in (("formatting_func", formatting_func), ("compute_metrics", compute_metrics)):
            if value is not None:
                raise ConfigError(f"{name} cannot be used: rows need two contexts, and no logits are kept. Remove it.")
        show_log_lines(main_process=args.process_index == 0)
        check_teacher(model, teacher_model, args)
        tokenizer = find_tokenizer(model, processing_class, args)
        collator = data_collator or DataCollatorForPrivilegedGKD.from_config(tokenizer, args)
        train_dataset, report = checked_rows(train_dataset, collator, args, "train_dataset")
        if eval_dataset is not None:
            many = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
            many = {key: checked_rows(dataset, collator, args, key)[0] for key, dataset in many.items()}
            eval_dataset = many if isinstance(eval_dataset, dict) else many["eval_dataset"]

        # 2. One base, one adapter that trains, and perhaps another teacher.
        set_seed(args.seed)
        student, loaded = build_student(model, args, peft_config, quantization_config)
        separate = (
            None if args.share_student_as_teacher else build_separate_teacher(teacher_model, args, quantization_config)
        )
        add_hidden_states_forward(base_of(student))
        if separate is not None:
            check_same_vocabulary(student, separate, tokenizer, teacher_tokenizer(teacher_model, args))
            add_hidden_states_forward(base_of(separate))
        self.head = Head(student)
        self.teacher = Teacher(student, args.teacher_adapter, separate=separate, ema_decay=args.ema_decay)
        self.teacher_head = self.head if separate is None else Head(separate)

        # 3. TRL's trainers around them, without what they would change.
        with keep_adapter(student, args), without_migration_advice("trl.experimental.gkd.gkd_trainer"):
            super().__init__(
                student,
                teacher_model=separate if separate is not None else student,
                args=args,
                data_collator=collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                callbacks=callbacks,
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )
        if separate is None:  # TRL prepared the teacher; this one is the student and is prepared when training starts
            self.accelerator.unwrap_model(student, keep_fp32_wrapper=False)
            self.accelerator._models.clear()
            student._is_accelerate_prepared = False  # else training gets neither DDP nor autocast
        else:
            self.teacher.separate = self.teacher_model
        refuse_sharding(self.accelerator)

        # 4. What a step needs.
        self.stop_ids = stop_ids(tokenizer, base_of(student).generation_config)
        self.pad_id = tokenizer.pad_token_id
        self.frozen = FrozenCheck(student, self.teacher)
        self.run_info = RunInfo(self, loaded, report)
        self._engine: RolloutEngine | None = None
        self._sums: dict[str, dict[str, float]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self.last_rows: list[Row] = []
        self.add_callback(ProbeCallback(self.frozen))
        self.health = HealthCallback(self)
        self.add_callback(self.health)
        if self.teacher.average is not None:
            self.add_callback(AverageCallback(self))
        if args.rollout_log_steps:
            self.add_callback(RolloutLogCallback(self))

        note = collator.builder.placement_note if isinstance(collator, DataCollatorForPrivilegedGKD) else None
        summary = report.summary() if report else "the rows are checked one by one when their turn comes"
        for line in (loaded, summary, note, args.divergence_in_words()):
            if line:
                self.say(line)
        if separate is None and args.teacher_adapter == "disabled":
            warning = starting_adapter_warning(student)
            if warning:
                logger.warning(warning)

    def say(self, line: str) -> None:
        """One line of the run's own log, on the main process alone."""
        if self.is_world_process_zero():
            logger.info(line)

    # ---- one optimizer step ------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of one optimizer step: written, read by the teacher, and counted."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        rows = [row for batch in batches for row in rows_of(batch)]
        rows = self.write_and_read(rows, on_policy=self._draw_on_policy())
        tokens = torch.tensor(sum(len(row.kept) for row in rows), device=device)
        tokens = self.accelerator.gather(tokens).sum()
        return self._micro_batches(rows, len(batches)), tokens

    def _draw_on_policy(self) -> bool:
        """One draw an optimizer step, the same on every rank."""
        generator = window_generator(self.args.seed, self.state.global_step, 0)
        return bool(torch.rand((), generator=generator) < self.lmbda)

    def write_and_read(self, rows: list[Row], *, on_policy: bool) -> list[Row]:
        """Rollouts where this step calls for them, then the teacher's hidden states of every completion."""
        args, sums = self.args, self._sums[self._mode()]
        start = time.perf_counter()
        if on_policy or self.seq_kd:
            with memory_for("rollout"):
                rows = self._roll_out(rows, teacher_writes=not on_policy)
        for row in rows:
            skip_all = args.mask_truncated_completions and row.truncated
            row.keep = slice(0, 0) if skip_all else slice(args.skip_first_tokens, None)
        written = time.perf_counter()
        with memory_for("teacher"), self.teacher.weights() as teacher:
            score_teacher(teacher, rows, self.pad_id)
        self.last_rows = rows

        sums["seconds_rollout"] += written - start
        sums["seconds_teacher"] += time.perf_counter() - written
        sums["windows"] += 1
        sums["rows"] += len(rows)
        sums["on_policy"] += on_policy * len(rows)
        sums["generated"] += sum(row.generated for row in rows)
        sums["truncated"] += sum(row.truncated for row in rows)
        sums["completion_tokens"] += sum(len(row.completion) for row in rows)
        sums["privileged_rows"] += sum(row.has_privileged for row in rows)
        sums["privileged_tokens_cut"] += sum(row.privileged_tokens_cut for row in rows)
        return rows

    def _roll_out(self, rows: list[Row], *, teacher_writes: bool) -> list[Row]:
        """One generation call for all rows of the step; ``num_generations`` completions a prompt."""
        args, copies = self.args, self.args.num_generations
        source = self.teacher.weights() if teacher_writes else self.engine.model()
        with source as model:
            completions = generate(
                model,
                [row.teacher_prompt if teacher_writes else row.prompt for row in rows],
                copies=copies,
                max_new_tokens=args.max_new_tokens,
                stop_ids=self.stop_ids,
                pad_id=self.pad_id,
                temperature=args.temperature,
                generator=window_generator(args.seed, self.state.global_step, 1 + self.accelerator.process_index),
            )
        stops = set(self.stop_ids)
        return [
            Row(
                rows[i // copies].prompt,
                rows[i // copies].teacher_prompt,
                completion,
                rows[i // copies].has_privileged,
                rows[i // copies].privileged_tokens_cut,
                generated=True,
                truncated=completion[-1] not in stops,
            )
            for i, completion in enumerate(completions)
        ]

    @property
    def engine(self) -> RolloutEngine:
        """What writes the student's rollouts; built when first needed."""
        if self._engine is None:
            dtype = base_of(self.model).get_input_embeddings().weight.dtype
            self._engine = RolloutEngine(self.model, self.args.rollout_engine, dtype)
            self.say(f"rollouts by the {self._engine.name} engine ({self._engine.reason})")
        return self._engine

    def _micro_batches(self, rows: list[Row], count: int) -> list[dict[str, Any]]:
        """Deal the rows out over the micro-batches, rows of like length together. The sum over the step stays."""
        rows = sorted(rows, key=lambda row: row.length)
        size = -(-len(rows) // count)
        parts = [rows[i * size : (i + 1) * size] for i in range(count)]
        return [self._tensors(part) for part in parts]

    def _tensors(self, rows: list[Row]) -> dict[str, Any]:
        if not rows:
            return {"rows": rows}
        batch: dict[str, Any] = pack(
            [row.prompt for row in rows], rows, self.pad_id, self.args.device, flat=without_padding(self.model)
        )
        batch["rows"] = rows
        return batch

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch, at most ``per_device_train_batch_size`` rows at a time."""
        if "rows" not in inputs:  # called from outside the training loop, with a batch of the collator
            model.train()
            on_policy = bool(
                torch.rand((), generator=window_generator(self.args.seed, self.state.global_step, 0)) < self.lmbda
            )
            inputs = self._tensors(self.write_and_read(rows_of(inputs), on_policy=on_policy))
        start = time.perf_counter()
        rows: list[Row] = inputs["rows"]
        if num_items_in_batch is None:
            num_items_in_batch = sum(len(row.kept) for row in rows)
        size = self.args.per_device_train_batch_size
        parts = [rows[i : i + size] for i in range(0, len(rows), size)] or [[]]
        total = torch.zeros((), device=self.args.device)
        autocast = self.accelerator.native_amp and hasattr(self.model, "_original_forward")
        with memory_for("student"), without_input_casts(self.model, autocast=autocast):
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                    batch = inputs if len(parts) == 1 else self._tensors(part)
                    total += SFTTrainer.training_step(self, model, batch, num_items_in_batch)
        self._sums["train"]["seconds_student"] += time.perf_counter() - start
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum of the divergence over this batch's kept completion tokens, divided by those of the optimizer step.

        `inputs` is a micro-batch of :meth:`get_batch_samples`, or a batch of the collator, whose reference answers are
        then scored as they are. In nats a token.
        """
        if "rows" not in inputs:
            inputs = self._tensors(self.write_and_read(rows_of(inputs), on_policy=False))
        rows: list[Row] = inputs["rows"]
        args, head, teacher_head = self.args, self.head, self.teacher_head
        if not rows:
            return sum(p.sum() for p in model.parameters() if p.requires_grad) * 0.0
        hidden = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs.get("attention_mask"),
            position_ids=inputs["position_ids"],
            hidden_mask=inputs["hidden_mask"],
        )  # (N, D)
        teacher_hidden = torch.cat([row.teacher_hidden for row in rows if row.kept] or [hidden.detach()])
        tokens = torch.tensor([t for row in rows for t in row.kept], device=hidden.device, dtype=torch.long)
        result = jsd_between(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            beta=self.beta,
            temperature=args.loss_temperature,
            normalize=args.normalize_beta,
            clip=args.divergence_clip,
            clip_mode=args.divergence_clip_mode,
            top_k=args.loss_top_k,
            sampled_ids=tokens,
            chunk_mib=args.loss_chunk_mib,
        )
        total = result.divergence.sum() + hidden.sum() * 0.0  # in the graph even without a kept token
        if num_items_in_batch is None:
            loss = total / max(1, len(tokens))
        else:
            loss = total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
            if args.average_tokens_across_devices:  # DDP averages the gradients of ranks; the count is over all of them
                loss = loss * self.accelerator.num_processes
        self._stop_if_not_finite(loss, rows)
        self._record(result, len(tokens))
        return (loss, {"divergence": result.divergence.detach()}) if return_outputs else loss

    def _stop_if_not_finite(self, loss: torch.Tensor, rows: list[Row]) -> None:
        if torch.isfinite(loss):
            return
        path = self.run_info.save_batch(rows, self.processing_class)
        raise NonFiniteLossError(
            f"the loss is {loss.item()} at step {self.state.global_step}. The batch is in {path}. The last checkpoint "
            "is sound; lower learning_rate, or look for non-finite weights in the adapter it started from."
        )

    # ---- what is measured --------------------------------------------------------------------------------------

    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _record(self, result: Any, tokens: int) -> None:
        sums = self._sums[self._mode()]
        sums["loss_tokens"] += tokens
        for name in ("divergence", "student_entropy", "teacher_entropy", "top1_agreement"):
            sums[name] += getattr(result, name).detach().sum().item()
        if result.sampled_logprob is not None:
            sums["sampled_logprob"] += result.sampled_logprob.sum().item()

    def add_to_log(self, name: str, value: float) -> None:
        """Add to a sum whose mean over optimizer steps is logged."""
        self._sums["train"][name] += value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was measured since the last log: means over tokens, rows or optimizer steps, over all ranks."""
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        sums = self._sums[mode]
        names = sorted(sums)
        if self.accelerator.num_processes > 1 and names:
            values = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=self.args.device)
            gathered = self.accelerator.gather(values[None]).sum(0).tolist()
            sums = defaultdict(float, zip(names, gathered))
        prefix = "eval_" if mode == "eval" else ""
        for name, value in means_of(sums).items():
            logs.setdefault(prefix + name, value)
        self._sums[mode] = defaultdict(float)
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Divergence on held-out rows: on the student's rollouts when ``lmbda=1``, else on the reference answers."""
        on_policy = self.lmbda == 1.0
        with torch.no_grad():
            batch = self._tensors(self.write_and_read(rows_of(inputs), on_policy=on_policy))
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch)
        return loss.detach(), None, None

    # ---- files -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; the run folder then holds ``run.json``, and the base is proven unchanged at the end.

        Args:
            resume_from_checkpoint: True for the last whole checkpoint of the run folder, or a checkpoint's folder. The
                run then goes on as if it had not been interrupted: the same data, rollouts, dropout and losses.

        Raises:
            RunInterrupted: SIGTERM or Ctrl-C; a checkpoint was saved first.
            CheckpointError: a checkpoint cannot be written, or the one to resume from is damaged or of another base.
            FrozenBaseError, NonFiniteLossError: see there.
        """
        run_dir = str(self.args.output_dir)
        checkpoint = find_checkpoint(run_dir, resume_from_checkpoint)
        with explain_full_disk(run_dir), interruptible(self), self.run_info.recording():
            result = super().train(checkpoint, *args, **kwargs)
            self.frozen.verify("at the end of training", probe=True)
        return result

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The adapter, the tokenizer with its chat template, and the model card; the base is checked first."""
        run_dir = str(self.args.output_dir)
        output_dir = output_dir or run_dir
        self.frozen.verify(f"when saving {Path(output_dir).name}")
        if not self.args.should_save:
            return
        with replacing(output_dir) if self._staging is None else contextlib.nullcontext(output_dir) as folder:
            self.model.save_pretrained(folder, selected_adapters=[STUDENT])
            self.processing_class.save_pretrained(folder)
            self.run_info.write(folder)
        card = Path(run_dir) / "README.md"
        self.create_model_card(model_name=(self.args.hub_model_id or Path(run_dir).name).split("/")[-1])
        if card.is_file() and Path(output_dir) != card.parent:
            (Path(output_dir) / "README.md").write_text(card.read_text(encoding="utf-8"), encoding="utf-8")
