"""The recovered gap while training: answers to held-out rows, scored at every evaluation of the run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..base_trainer import GapCallback, RunTrainer
from ..data.check import validate_rows
from ..data.collator import DataCollatorForPrivilegedGKD
from ..errors import ConfigError
from .answers import Evaluation, continuations, evaluate, measure_drift, recovered_gap
from .nats import SMALLEST_GAP, recovered_nats
from .scorers import Scorer, check_scorable, make_scorer

logger = logging.getLogger(__name__)


class RecoveredGapCallback(GapCallback):
    """Adds to every evaluation of the run what `pgkd eval` measures: ``eval_student``, ``eval_base`` and
    ``eval_teacher`` (mean scores of greedy answers), ``eval_recovered``, ``eval_recovered_nats`` (on the teacher's
    answers; it decides between checkpoints of one score), and with neutral rows ``eval_drift``.

    Evaluations happen as Transformers has it (``eval_strategy``, ``eval_steps``, an ``eval_dataset``), and their
    metrics can be used as usual, for example ``metric_for_best_model="eval_recovered"`` with
    ``load_best_model_at_end=True`` and ``EarlyStoppingCallback``. Base and teacher (the base with PI) answer once, when
    training begins. ``eval_recovered`` is left out when the teacher is not better than the base.

    Args:
        rows: held-out rows, as for training; the reference stands where the scorer looks for it.
        scorer: a scorer's name, see :func:`pgkd_peft.evaluation.scorers.make_scorer`, or a function of answer and row.
        answer_key: column with the reference, for a scorer given by name.
        neutral_rows: prompts on which the student should go on answering as the base does.
        max_new_tokens: length limit of an answer; default: the run's.

    Raises:
        ConfigError: there is no such scorer. DataError: rows that cannot be scored, all in one report.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        scorer: str | Scorer = "contains",
        *,
        answer_key: str = "answer",
        neutral_rows: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int | None = None,
    ):
        self.rows = list(rows)
        self.scorer = make_scorer(scorer, answer_key=answer_key) if isinstance(scorer, str) else scorer
        self.neutral_rows = list(neutral_rows or ())
        self.max_new_tokens = max_new_tokens
        if not self.rows:
            raise ConfigError("RecoveredGapCallback got no rows to score answers on")
        check_scorable(self.rows, self.scorer)
        self.known: Evaluation | None = None  # what base and teacher answer to this rank's rows
        self.neutral: list[tuple[list[int], list[int]]] | None = None

    def prepare(self, trainer: RunTrainer) -> None:
        """Let base and teacher answer.

        Raises:
            ConfigError: there is no gap, but the best checkpoint is to be chosen by it.
        """
        collator = trainer.contexts
        if not isinstance(collator, DataCollatorForPrivilegedGKD):
            raise ConfigError(
                f"RecoveredGapCallback needs the run's own collator, this is a {type(collator).__name__}; leave out "
                "data_collator"
            )
        for rows in (self.rows, self.neutral_rows):
            if rows:
                validate_rows(rows, collator)
        if trainer.is_world_process_zero():
            logger.info("base and teacher answer %d held-out rows …", len(self.rows))
        columns = ("base", "teacher")
        self.known = self._answer(trainer, columns)
        if self.neutral_rows:
            self.neutral = continuations(trainer.model, collator, _share(trainer, self.neutral_rows))
        scores = self._scores(trainer, self.known, columns)
        if trainer.is_world_process_zero():
            logger.info(
                "%d held-out rows: base %.3f, base with PI (teacher) %.3f",
                len(self.rows),
                scores["base"],
                scores["teacher"],
            )
        if recovered_gap(scores["base"], scores["teacher"], scores["base"]) is None:
            found = (
                f"no gap to recover on the {len(self.rows)} held-out rows: the teacher with PI scores "
                f"{scores['teacher']:.3f}, the base {scores['base']:.3f}"
            )
            if str(trainer.args.metric_for_best_model).removeprefix("eval_") == "recovered":
                raise ConfigError(
                    f"metric_for_best_model is eval_recovered, but there is {found}. Try another scorer, look at what "
                    "the teacher sees and says (pgkd inspect --preflight), or choose by eval_student."
                )
            if trainer.is_world_process_zero():
                logger.warning("There is %s; eval_recovered is left out.", found)

    def measure(self, trainer: RunTrainer) -> dict[str, float]:
        """The metrics of an evaluation, over the rows of all ranks."""
        if self.known is None:
            self.prepare(trainer)
        columns = ("base", "teacher", "student")
        scores = self._scores(trainer, self._answer(trainer, columns), columns)
        metrics = {f"eval_{name}": score for name, score in scores.items()}
        recovered = recovered_gap(scores["base"], scores["teacher"], scores["student"])
        if recovered is not None:
            metrics["eval_recovered"] = recovered
        metrics.update(self._nats(trainer))
        if self.neutral is not None:
            kl = tokens = 0.0
            if self.neutral:
                drift = measure_drift(trainer.model, trainer.contexts, continued=self.neutral)
                kl, tokens = drift.kl * drift.tokens, drift.tokens
            kl, tokens = _sums(trainer, [kl, tokens])
            metrics["eval_drift"] = kl / tokens
        return metrics

    def _nats(self, trainer: RunTrainer) -> dict[str, float]:
        """The recovered gap in nats on the teacher's answers, over the rows of all ranks; nothing without a gap."""
        sums = [0.0] * 4
        if self.known is not None and any(self.known.privileged):
            answers = self.known.completions["teacher"]
            nats = recovered_nats(trainer.model, trainer.contexts, self.known.rows, answers, samples=0)
            sums = [value * nats.tokens for value in (nats.base, nats.teacher, nats.student, 1.0)]
        base, teacher, student, tokens = _sums(trainer, sums)
        if not base - teacher > SMALLEST_GAP * tokens:
            return {}
        return {"eval_recovered_nats": (base - student) / (base - teacher)}

    def _answer(self, trainer: RunTrainer, columns: Sequence[str]) -> Evaluation | None:
        """This rank's share of the rows, answered and scored; None without any."""
        rows = _share(trainer, self.rows)
        if not rows:
            return None
        return evaluate(
            trainer.model,
            trainer.contexts,
            rows,
            self.scorer,
            max_new_tokens=self.max_new_tokens or trainer.args.max_new_tokens,
            columns=columns,
            known=self._still_known(trainer),
            bootstrap_samples=0,
            student=trainer.student_weights,
            teacher=trainer.teacher.weights if trainer.teacher is not None else None,
        )

    def _still_known(self, trainer: RunTrainer) -> Evaluation | None:
        """What base and teacher said at the start; a teacher that moves (shared, ema) is asked each time."""
        if self.known is None or trainer.teacher is None or trainer.teacher.fixed:
            return self.known
        names = ("answers", "scores", "lengths", "truncated", "completions")
        without: dict[str, Any] = {
            name: {k: v for k, v in getattr(self.known, name).items() if k != "teacher"} for name in names
        }
        return dataclasses.replace(self.known, **without)

    def _scores(self, trainer: Any, result: Evaluation | None, columns: Sequence[str]) -> dict[str, float]:
        """Mean score by column over the rows of all ranks; `result` has those of this rank."""
        own = [sum(result.scores[name]) if result is not None else 0.0 for name in columns]
        return {name: total / len(self.rows) for name, total in zip(columns, _sums(trainer, own))}


def _share(trainer: Any, rows: list[Any]) -> list[Any]:
    """This rank's rows."""
    return rows[trainer.accelerator.process_index :: trainer.accelerator.num_processes]


def _sums(trainer: Any, values: Sequence[float]) -> list[float]:
    """The sum of each value over all ranks."""
    own = torch.tensor([values], dtype=torch.float64, device=trainer.args.device)
    return trainer.accelerator.gather(own).sum(0).tolist()
