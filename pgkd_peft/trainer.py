"""The method: one base, a teacher that reads the PI, a student that does not, one divergence.

The way of one optimizer step, top to bottom:

    get_batch_samples      rows of the step; the student writes completions (rollout.py), the teacher reads them after
                           its own prompt (scoring.py); completion tokens are counted over the whole step
    training_step          one micro-batch: forward and backward of the student
    compute_loss           student's hidden states against the teacher's, through the head (divergence.py)

Shapes: N kept completion tokens of a micro-batch, D hidden width.
"""

from __future__ import annotations

import contextlib
import itertools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalPrediction
from trl import SFTTrainer
from trl.experimental.gkd import GKDTrainer

from .automatic import (
    start_block,
)
from .base_trainer import RunTrainer
from .compare import read_as, token_nll
from .config import PrivilegedGKDConfig
from .construction import check_models, prepare
from .data.check import DataReport
from .data.collator import DataCollatorForPrivilegedGKD, stop_ids
from .data.feedback import load_feedback, with_feedback
from .divergence import jsd_between
from .engines.merged import RolloutEngine
from .engines.proof import START_PROMPTS, Proof, begin
from .engines.server import Sampling
from .engines.servers import RolloutServers, ServersLetGo
from .errors import ConfigError, PGKDError, explained
from .model.load import base_of
from .prefix import plan_teacher
from .rollout import generate, generate_mixed, masks_unread, window_generator
from .rollout_log import RolloutLogCallback, distinct, write_final_traces
from .rows import Row, RowCollator, pack, rows_in, rows_of, to_device
from .run.console import logger
from .run.health import HealthCallback
from .run.memory import memory_for
from .scoring import reads_packed_rows, score_teacher
from .teacher import (
    AverageCallback,
    Teacher,
    starting_adapter_warning,
)
from .trl_compat import (
    keep_adapter,
    refuse_sharding,
    release_shared_teacher,
    runs_under_autocast,
    without_input_casts,
    without_migration_advice,
)


class NonFiniteLossError(PGKDError):
    """The loss is NaN or infinite; the batch was saved for inspection."""


class PrivilegedSelfDistillTrainer(RunTrainer, GKDTrainer):
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
    teacher: Teacher
    last_rows: list[Row]  # of the newest step
    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole optimizer step

    # ---- one optimizer step ------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of one optimizer step: written, read by the teacher, and counted."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        rows = [row for batch in batches for row in rows_in(batch)]
        rows = self.roll_out_and_score(rows, on_policy=self.on_policy_step())
        tokens = torch.full((), sum(len(row.kept) for row in rows), device=device)
        self.step_tokens = self.accelerator.gather(tokens).sum()
        return self.micro_batches(rows, len(batches)), self.step_tokens

    def on_policy_step(self) -> bool:
        """One draw an optimizer step, the same on every rank."""
        generator = window_generator(self.args.seed, self.state.global_step, 0)
        return bool(torch.rand((), generator=generator) < self.lmbda)

    def roll_out_and_score(self, rows: list[Row], *, on_policy: bool, stream: int = 0) -> list[Row]:
        """Rollouts where this step calls for them, then the teacher's hidden states of every completion.

        Args:
            stream: of random numbers; evaluation batches of one step each have their own.
        """
        args, mode = self.args, self._mode
        with memory_for("rollout"), self.meters.timed(mode, "rollout"):
            if on_policy or self.seq_kd:
                rows = self.roll_out(rows, teacher_writes=not on_policy, stream=stream)
        for row in rows:
            skip_all = not row.counts or (args.mask_truncated_completions and row.truncated)
            row.keep = slice(0, 0) if skip_all else slice(args.skip_first_tokens, None)
            if row.teacher_hidden is not None:  # a mixed rollout brought them
                row.teacher_hidden = row.teacher_hidden[row.keep]
        with memory_for("teacher"), self.meters.timed(mode, "teacher"), self.teacher.weights() as teacher:
            at_once, unread = args.per_device_train_batch_size, [row for row in rows if row.teacher_hidden is None]
            with masks_unread(base_of(teacher)):
                score_teacher(teacher, unread, self.pad_id, memory=self.memory, rows_at_once=at_once)
        self.last_rows = rows
        self.meters.add(
            mode,
            windows=1,
            rows=len(rows),
            on_policy=on_policy * len(rows),
            generated=sum(row.generated for row in rows),
            truncated=sum(row.truncated for row in rows),
            completion_tokens=sum(len(row.completion) for row in rows),
            privileged_rows=sum(row.has_privileged for row in rows),
            privileged_tokens_cut=sum(row.privileged_tokens_cut for row in rows),
        )
        return rows

    def roll_out(self, rows: list[Row], *, teacher_writes: bool, stream: int = 0) -> list[Row]:
        """One generation call for all rows of the step; ``num_generations`` completions a prompt."""
        args, copies = self.args, self.args.num_generations
        seeds = (args.seed, self.state.global_step, 1 + self.accelerator.process_index, *([stream] if stream else []))
        generator = window_generator(*seeds)
        sources = [row for row in rows for _ in range(copies)]
        if args.teacher_takeover is not None and not teacher_writes:
            made = self.roll_out_mixed(sources, args.teacher_takeover, generator)
        elif self.servers is not None and not teacher_writes:
            made = self.roll_out_on_servers(sources, generator, fresh=stream <= 1)
        else:
            with self.teacher.weights() if teacher_writes else self.student_weights() as model:
                completions = generate(
                    model,
                    [row.teacher_prompt if teacher_writes else row.prompt for row in rows],
                    copies=copies,
                    max_new_tokens=args.max_new_tokens,
                    stop_ids=self.stop_ids,
                    pad_id=self.pad_id,
                    temperature=args.temperature,
                    generator=generator,
                    memory=self.memory if teacher_writes else None,
                )
            made = [row.answered(ids, self.stop_ids) for row, ids in zip(sources, completions)]
        if self.feedback is not None and not teacher_writes:
            each = [row.source for row in made]
            made = with_feedback(made, each, self.feedback, self.contexts, without=args.feedback_without)
        return made

    def roll_out_on_servers(self, rows: list[Row], generator: torch.Generator, *, fresh: bool) -> list[Row]:
        """Rollouts by the servers, which are sent the adapter first (`fresh`: once a step, once an evaluation)."""
        assert self.servers is not None
        assert self.proof is not None
        if fresh:
            self.servers.sync(self.model)
        seeds = torch.randint(2**31 - 1, (len(rows),), generator=generator).tolist()
        sampling = Sampling(self.args.temperature, self.args.max_new_tokens, frozenset(self.stop_ids))
        written = self.servers.write([row.prompt for row in rows], seeds, sampling)
        made = [
            row.answered(each.ids, self.stop_ids, logprobs=each.logprobs, server=each.server)
            for row, each in zip(rows, written)
        ]
        if not self.proof.in_passing:
            own_N = self.logprobs_of("shared", made).to(self.args.device)
            self.meters.add(self._mode, **self.proof.add(made, own_N, kept=False))
        return made

    def logprobs_of(self, which: str, rows: Sequence[Row], temperature: float = 1.0) -> torch.Tensor:
        """What the student ("shared") or its base ("disabled") gives every completion token: (tokens,) in float64."""
        reading = read_as(self.model, which, [(row.prompt, row.completion) for row in rows], self.pad_id)
        return -torch.cat(token_nll(reading, [row.completion for row in rows], temperature=temperature))

    def roll_out_mixed(self, rows: list[Row], takeover: float, generator: torch.Generator) -> list[Row]:
        """Rollouts in which the teacher writes where the two disagree; its states come with them."""
        mixed = generate_mixed(
            self.student_weights,
            self.teacher.weights,
            self.teacher_head.logits,
            [row.prompt for row in rows],
            [row.teacher_prompt for row in rows],
            takeover=takeover,
            max_new_tokens=self.args.max_new_tokens,
            stop_ids=self.stop_ids,
            pad_id=self.pad_id,
            temperature=self.args.temperature,
            generator=generator,
        )
        made = []
        for row, each in zip(rows, mixed):
            row = row.answered(each.completion, self.stop_ids)
            # An anchor is scored as the student is: both must round alike.
            row.teacher_hidden = each.teacher_hidden if row.has_privileged else None
            made.append(row)
        self.meters.add(self._mode, taken_over=sum(sum(each.by_teacher) for each in mixed))
        return made

    def micro_batches(self, rows: list[Row], count: int) -> list[dict[str, Any]]:
        """Deal the rows out over the micro-batches, rows of like length together. The sum over the step stays.

        Each is as large as the teacher's batches, so that a row without PI is read alike by both, to the last bit.
        Where feedback has left fewer rows than there are micro-batches, the shortest one stands in, without a kept
        token: on every rank a step has as many forwards as Transformers has counted.
        """
        rows = sorted(rows, key=lambda row: row.length)
        rows = [replace(rows[0], keep=slice(0, 0), counts=False)] * (count - len(rows)) + rows
        size = self.args.per_device_train_batch_size * self.args.num_generations
        bounds = [*range(0, len(rows), size), len(rows)]
        if len(bounds) != count + 1:  # a loader of its own kind: as even as can be
            bounds = [i * len(rows) // count for i in range(count + 1)]
        return [self.batch_of(rows[first:last]) for first, last in itertools.pairwise(bounds)]

    def batch_of(self, rows: list[Row]) -> dict[str, Any]:
        """What the student reads (:func:`pgkd_peft.rows.pack`), with the rows themselves."""
        prompts, device = [row.prompt for row in rows], self.args.device
        kept_ids_N = to_device(torch.tensor([id_ for row in rows for id_ in row.kept], dtype=torch.long), device)
        batch = pack(prompts, rows, self.pad_id, device, flat=reads_packed_rows(self.model))
        return {**batch, "kept_ids": kept_ids_N, "rows": rows}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch, at most ``per_device_train_batch_size`` rows at a time."""
        if "input_ids" not in inputs:  # called from outside the training loop, with a batch of the collator
            model.train()
            inputs = self.batch_of(self.roll_out_and_score(rows_in(inputs), on_policy=self.on_policy_step()))
        rows: list[Row] = inputs["rows"]
        if num_items_in_batch is None:
            num_items_in_batch = sum(len(row.kept) for row in rows)
        size = self.args.per_device_train_batch_size
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        total = torch.zeros((), device=self.args.device)
        autocast = runs_under_autocast(self.accelerator, self.model)
        step = SFTTrainer.training_step  # GKDTrainer's own would roll out once more
        with (
            memory_for("student"),
            self.meters.timed("train", "student"),
            masks_unread(base_of(self.model)),
            without_input_casts(self.model, autocast=autocast),
        ):
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                    total += step(self, model, inputs if len(parts) == 1 else self.batch_of(part), num_items_in_batch)
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
        if "input_ids" not in inputs:
            inputs = self.batch_of(self.roll_out_and_score(rows_in(inputs), on_policy=False))
        rows: list[Row] = inputs["rows"]
        args = self.args
        student_ND = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs.get("attention_mask"),
            position_ids=inputs.get("position_ids"),
            hidden_index=inputs["hidden_index"],
        )
        read = [row.teacher_hidden for row in rows if row.kept]
        result = jsd_between(
            student_ND,
            self.head,
            torch.cat(read) if read else student_ND.detach(),
            self.teacher_head if read else self.head,  # without a kept token there is no row of the teacher's width
            beta=self.beta,
            temperature=args.loss_temperature,
            normalize=args.normalize_beta,
            clip=args.divergence_clip,
            clip_mode=args.divergence_clip_mode,
            top_k=args.loss_top_k,
            sampled_ids=inputs["kept_ids"],
            chunk_mib=args.loss_chunk_mib,
        )
        total = result.divergence.sum() + student_ND.sum() * 0.0  # in the graph even without a kept token
        if num_items_in_batch is None:
            loss = total / max(1, len(student_ND))
        else:  # DDP averages the gradients of ranks; the count is over all of them
            count = torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
            loss = total / count * self.accelerator.num_processes
        self.finite &= torch.isfinite(loss.detach())
        self.meters.add(self._mode, loss_tokens=len(student_ND), **result.statistics())
        if self.proof is not None and self.proof.in_passing and result.sampled_logprob is not None:
            self.meters.add(self._mode, **self.proof.add(rows, result.sampled_logprob, kept=True))
        return (loss, {"divergence": result.divergence.detach()}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Divergence on held-out rows: on the student's rollouts when ``lmbda=1``, else on the reference answers."""
        self._evaluated += 1
        with torch.no_grad():
            rows = self.roll_out_and_score(rows_in(inputs), on_policy=self.lmbda == 1.0, stream=self._evaluated)
            loss = self.compute_loss(model, self.batch_of(rows))
        self.stop_if_not_finite()
        self.stop_if_not_the_students()
        return loss.detach(), None, None

    # ---- around the step ---------------------------------------------------------------------------------------

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
        parts = prepare(
            model,
            teacher_model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config,
            quantization_config,
            formatting_func=formatting_func,
            compute_metrics=compute_metrics,
        )
        args, student, separate, report = parts.args, parts.student, parts.separate, parts.report
        self.teacher, self.head, self.teacher_head = parts.teacher, parts.head, parts.teacher_head
        self.servers = parts.servers

        # TRL's trainers around them, without what they would change.
        args.logging_nan_inf_filter = False  # a look at every loss; stop_if_not_finite takes one a step
        advice = without_migration_advice("trl.experimental.gkd.gkd_trainer")
        with explained("TRL or Transformers refuse these settings", ConfigError), keep_adapter(student, args), advice:
            super().__init__(
                student,
                teacher_model=separate if separate is not None else student,
                args=args,
                data_collator=parts.collator,
                train_dataset=parts.train_dataset,
                eval_dataset=parts.eval_dataset,
                processing_class=parts.tokenizer,
                callbacks=callbacks,
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )
        if separate is None:
            release_shared_teacher(self.accelerator, student)
        else:
            self.teacher.separate = self.teacher_model  # as accelerate has prepared it
        refuse_sharding(self.accelerator)
        check_models(student, separate, parts.tokenizer, args)
        self.stop_ids = stop_ids(parts.tokenizer, base_of(student).generation_config)
        self.pad_id = parts.tokenizer.pad_token_id
        self.memory, remembered = plan_teacher(self.teacher, report, args, self.accelerator.num_processes)
        self.last_rows = []
        self.step_tokens = torch.zeros((), dtype=torch.long, device=args.device)  # kept ones of the step, on all ranks
        self.finite = torch.ones((), dtype=torch.bool, device=args.device)  # no loss of the step is NaN or infinite
        self.feedback = load_feedback(args.feedback) if args.feedback is not None else None
        self._evaluated = 0  # batches of this evaluation
        self._engine: RolloutEngine | None = None
        self.start_run(parts.collator, parts.loaded, report)
        self._watch(parts.loaded, report, remembered)

    def _watch(self, loaded: str, report: DataReport | None, remembered: str | None) -> None:
        """The callbacks of a step, and what is said before the first one."""
        args, collator = self.args, self.contexts
        self.proof = self._begin_proof(self.servers) if self.servers is not None else None
        self.add_callback(StepEnd(self))
        self.health = HealthCallback(self)
        self.add_callback(self.health)
        if self.teacher.average is not None:
            self.add_callback(AverageCallback(self))
        if args.rollout_log_steps:
            self.add_callback(RolloutLogCallback(self))
        notes = collator.builder.notes if isinstance(collator, DataCollatorForPrivilegedGKD) else []
        summary = report.summary() if report else "the rows are checked one by one when their turn comes"
        block = start_block(args.automatic)
        for line in (loaded, summary, *notes, block, args.divergence_in_words(), remembered):
            if line:
                self.say(line)
        if self.teacher.separate is None and args.teacher_adapter == "disabled":
            warning = starting_adapter_warning(self.model)
            if warning:
                logger.warning(warning)

    def when_trained(self) -> None:
        """The trained student's answers, token by token, for the report."""
        args = self.args
        if args.rollout_log_steps and self.last_rows and self.is_world_process_zero():
            write_final_traces(self, distinct(self.last_rows)[: args.rollout_log_samples])

    def _begin_proof(self, servers: RolloutServers) -> Proof:
        """The servers take the adapter, and their base is measured against ours."""
        self.add_callback(ServersLetGo(servers))
        first = rows_of(self.contexts(list(itertools.islice(self.train_dataset, START_PROMPTS))))
        servers.begin(self.model, self.accelerator)
        proof = begin(servers, first, self.logprobs_of, self.args, self.model, self.stop_ids)
        self.say(
            f"rollouts by {', '.join(proof.urls)}, whose base and ours differ by {proof.floor:.4f} nats a token; a "
            f"step stops the run at more than {proof.tolerance:.3f} (rollout_mismatch)"
        )
        return proof

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def engine(self) -> RolloutEngine:
        """What writes the student's rollouts; built when first needed."""
        if self._engine is None:
            dtype = base_of(self.model).get_input_embeddings().weight.dtype
            name = self.args.rollout_engine if self.servers is None else "adapter"  # what servers do not write
            self._engine = RolloutEngine(self.model, name, dtype)
            if self.servers is None:
                self.say(f"rollouts by the {self._engine.name} engine ({self._engine.reason})")
        return self._engine

    def student_weights(self) -> contextlib.AbstractContextManager[nn.Module]:
        """The student as a model that answers: the rollout engine's, where there is or will be one."""
        if self._engine is None and self.lmbda == 0:  # no second copy of the weights for an evaluation alone
            return super().student_weights()
        return self.engine.model()

    def stop_if_not_finite(self) -> None:
        """The step's one look at its losses: no rank goes on when one of them cannot.

        Raises:
            NonFiniteLossError: a loss was NaN or infinite; on the rank that it happened on, the rows were saved.
        """
        everywhere = self.accelerator.gather(self.finite.float()).min()
        if everywhere.item():
            return
        place = "on another rank"
        if not self.finite.item():
            place = f"in {self.run_info.save_batch(self.last_rows, self.processing_class)}"
        raise NonFiniteLossError(
            f"the loss is NaN or infinite at step {self.state.global_step}. The batch is {place}. The last checkpoint "
            "is sound; lower learning_rate, or look for non-finite weights in the adapter it started from."
        )

    def stop_if_not_the_students(self) -> None:
        """The step's look at the proof of its rollouts, over all ranks.

        Raises:
            RolloutMismatchError: a server has written them with other weights than the student's.
        """
        if self.proof is None:
            return
        sums = self.accelerator.gather(self.proof.take()[None]).sum(0).tolist()
        worst = self.proof.refuses(sums)
        if worst is not None:
            mean = sums[worst][0] / sums[worst][1]
            raise self.proof.failed(worst, mean, self.last_rows, self.logprobs_of, self.args.temperature)

    def get_train_dataloader(self) -> Any:
        with self._rows_collated(self.train_dataset):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        self._evaluated = 0
        with self._rows_collated(self.eval_dataset if eval_dataset is None else eval_dataset):
            return super().get_eval_dataloader(eval_dataset)

    @contextlib.contextmanager
    def _rows_collated(self, dataset: Any) -> Iterator[None]:
        """Loaders made inside give rows instead of padded tensors, which would go to the device and straight back.

        Not those of streams: accelerate splits a stream's batches between ranks as tensors.
        """
        collator = self.data_collator
        if not isinstance(dataset, IterableDataset):
            self.data_collator = RowCollator(collator)
        try:
            yield
        finally:
            self.data_collator = collator


class StepEnd(TrainerCallback):
    """Before the optimizer moves the weights: no loss was NaN, and the teacher's states of the step are let go.

    A step without a kept token has no gradient either, so that the optimizer's momentum moves nothing.
    """

    def __init__(self, trainer: PrivilegedSelfDistillTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.stop_if_not_finite()
        self.trainer.stop_if_not_the_students()
        nothing = not any(row.kept for row in self.trainer.last_rows) and not self.trainer.step_tokens.item()
        if nothing and self.trainer.accelerator.scaler is None:  # which wants gradients in every step
            self.trainer.model.zero_grad()
        for row in self.trainer.last_rows:
            row.teacher_hidden = None
