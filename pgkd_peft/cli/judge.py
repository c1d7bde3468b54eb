"""The judgement at the end of `pgkd train`, and what it shares with `pgkd eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.collator import DataCollatorForPrivilegedGKD
from ..data.holdout import trained_on
from ..errors import DataError
from ..evaluation.scorers import Scorer, check_scorable, make_scorer
from ..run.console import shared_console
from ..run.folder import CARD_FILE, RESULTS_FILE, TRAINED_FILE
from .results import add_drift, answers_file, show, update_card, write_results

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from ..base_trainer import RunTrainer
    from ..evaluation.answers import Drift, Evaluation
    from .arguments import DataArguments

MOST_ROWS = 64
"""Held-out rows that the end of a training judges; `pgkd eval` judges all."""
TRACED_ROWS = 8
"""Held-out rows whose answers the report shows token by token."""


def choose_scorer(
    name: str | None, rows: Sequence[Mapping[str, Any]], answer_key: str
) -> tuple[str | None, Scorer | None]:
    """The scorer of that name; without a name `contains`, or none where the rows have nothing to score against.

    Raises:
        DataError: rows that the named scorer cannot score.
    """
    scorer = make_scorer(name or "contains", answer_key=answer_key)
    try:
        check_scorable(rows, scorer)
    except DataError:
        if name is not None:
            raise
        return None, None
    return name or "contains", scorer


def add_nats(
    result: Evaluation, model: nn.Module, collator: DataCollatorForPrivilegedGKD, group_key: str | None, seed: int
) -> None:
    """The recovered gap in nats on the teacher's answers, which needs no labels; nothing where no row has PI."""
    from ..evaluation.nats import recovered_nats

    if not any(result.privileged):
        return
    groups = [row[group_key] for row in result.rows] if group_key else None
    nats = recovered_nats(model, collator, result.rows, result.completions["teacher"], groups=groups, seed=seed)
    result.extra.update(
        recovered_nats=nats.recovered,
        recovered_nats_interval=[nats.interval.low, nats.interval.high] if nats.interval else None,
        nats={**nats.summary(), "sentence": nats.sentence()},
    )


def add_groups(result: Evaluation, group_key: str | None, seed: int) -> None:
    """The recovered gap of each group of rows; nothing without groups or scores."""
    from ..evaluation.groups import recovered_by_group

    if group_key is not None and result.scores:
        base, teacher, student = (result.scores[name] for name in ("base", "teacher", "student"))
        names = [row[group_key] for row in result.rows]
        result.extra["by_group"] = recovered_by_group(base, teacher, student, names, seed=seed)


def add_final_traces(trainer: RunTrainer, rows: Sequence[Mapping[str, Any]]) -> None:
    """What the trained student says to held-out rows, token by token, for the report."""
    from ..rollout_log import write_final_traces
    from ..rows import rows_of
    from ..view.words import spread

    if trainer.teacher is not None and rows:
        write_final_traces(trainer, rows_of(trainer.contexts(spread(rows, TRACED_ROWS))), held_out=True)


def judge(trainer: RunTrainer, held_out: Dataset, data: DataArguments, drift: Drift | None = None) -> None:
    """Base, teacher and student on the held-out rows, at the end of a training: console, results file, model card;
    with them the drift, where it was measured."""
    from ..data.check import validate_rows
    from ..evaluation.answers import evaluate

    config, collator, console = trainer.args, trainer.contexts, shared_console()
    rows = list(held_out)[:MOST_ROWS]
    try:
        validate_rows(rows, collator)
        name, scorer = choose_scorer(data.scorer, rows, data.answer_key)
    except DataError as error:
        console.print(f"The held-out rows cannot be judged: {error}", markup=False)
        return
    console.print(f"\nJudging {len(rows)} of {len(held_out)} held-out rows …")
    group_key = data.group_key if data.group_key in held_out.column_names else None
    result = evaluate(
        trainer.model,
        collator,
        rows,
        scorer,
        max_new_tokens=config.max_new_tokens,
        columns=("base", "teacher", "student"),
        group_key=group_key,
        student=trainer.student_weights,
        teacher=trainer.teacher.weights if trainer.teacher is not None else None,
    )
    add_nats(result, trainer.model, collator, group_key, seed=0)
    add_groups(result, group_key, seed=0)
    add_final_traces(trainer, rows)
    if drift is not None:
        add_drift(result, drift)
    folder = Path(str(config.output_dir))
    result.extra["trained_on"] = trained_on(folder / TRAINED_FILE, rows, config.privileged_key)
    show(result, console, 2)
    told = {"scorer": name, "max_new_tokens": config.max_new_tokens, "seed": 0, "adapter": str(folder)}
    if len(rows) < len(held_out):
        told["limit"] = len(rows)
    out = write_results(result, folder / RESULTS_FILE, told)
    update_card(folder / CARD_FILE, result, told)
    console.print(f"Results: {out}; every answer: {answers_file(out)}")
