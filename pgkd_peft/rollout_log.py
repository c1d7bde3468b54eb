"""Readable rollouts: the student's and the teacher's answer to the same prompt, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .rollout import generate
from .rows import Row
from .run.folder import COMPLETIONS_FILE
from .run.jsonl import append_lines
from .trace import append_traces, trace_rows


class RolloutLogCallback(TrainerCallback):
    """Every ``rollout_log_steps`` optimizer steps: a table on the console, a line a prompt in completions.jsonl,
    and every token's divergence in traces.jsonl, for the report.

    Both answers are greedy, so that they differ by what the models know and not by the dice: the student reads its own
    prompt with its current weights, the teacher reads the prompt with PI.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.rollout_log_steps or not self.trainer.is_world_process_zero():
            return
        rows = _distinct(self.trainer.last_rows)[: args.rollout_log_samples]
        records = self.answer(rows, state.global_step)
        append_lines(Path(args.output_dir) / COMPLETIONS_FILE, records)
        append_traces(args.output_dir, trace_rows(self.trainer, rows), state.global_step)
        show(records, args.rollout_log_max_chars)

    def answer(self, rows: list[Row], step: int) -> list[dict[str, Any]]:
        """What student and teacher say to these rows' prompts."""
        trainer, tokenizer = self.trainer, self.trainer.processing_class
        settings: dict[str, Any] = {
            "max_new_tokens": trainer.args.rollout_log_max_new_tokens,
            "stop_ids": trainer.stop_ids,
            "pad_id": trainer.pad_id,
        }
        with trainer.engine.model() as model:
            student = generate(model, [row.prompt for row in rows], **settings)
        with trainer.teacher.weights() as model:
            teacher = generate(model, [row.teacher_prompt for row in rows], **settings)
        return [
            {
                "step": step,
                "prompt": tokenizer.decode(row.prompt),
                "teacher_prompt": tokenizer.decode(row.teacher_prompt),
                "student": tokenizer.decode(own, skip_special_tokens=True).strip(),
                "teacher": tokenizer.decode(better, skip_special_tokens=True).strip(),
                "rollout": tokenizer.decode(row.completion, skip_special_tokens=True).strip(),
                "has_privileged": row.has_privileged,
            }
            for row, own, better in zip(rows, student, teacher)
        ]


def _distinct(rows: list[Row]) -> list[Row]:
    """One row a prompt, rows with PI first: they are what there is to see."""
    first = {tuple(row.prompt): row for row in reversed(rows)}
    return sorted(first.values(), key=lambda row: not row.has_privileged)


def show(records: list[dict[str, Any]], max_chars: int) -> None:
    """Print a table of rollouts to the console."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def cut(text: str, *, tail: bool = False) -> Text:
        if len(text) > max_chars:
            text = "…" + text[-max_chars:] if tail else text[:max_chars] + "…"
        return Text("".join(c if c.isprintable() or c == "\n" else "�" for c in text))

    table = Table(title=f"Rollouts at step {records[0]['step']}" if records else "No rollouts", show_lines=True)
    for column in ("prompt", "student (no PI)", "teacher (PI)"):
        table.add_column(column, ratio=1, overflow="fold")
    for record in records:
        table.add_row(cut(record["prompt"], tail=True), cut(record["student"]), cut(record["teacher"]))
    Console().print(table)
