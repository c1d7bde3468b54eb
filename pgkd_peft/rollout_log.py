"""Readable rollouts: the student's and the teacher's answer to the same prompt, side by side; and token by token the
divergence and what each would have said.

Shapes: N completion tokens of one row, V vocabulary, K kept candidates.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .compare import Reading, compare, read
from .data.tokens import decode, question, special_texts, token_texts, visible
from .model.adapters import adapter_state
from .rollout import generate
from .rows import Row
from .run.console import answers, shared_console
from .run.folder import COMPLETIONS_FILE, FINAL_TRACE_FILE, TRACE_FILE
from .run.jsonl import append_lines, write_lines


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
        rows = distinct(self.trainer.last_rows)[: args.rollout_log_samples]
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
                "question": question(tokenizer, row.prompt),
                "prompt": tokenizer.decode(row.prompt),
                "teacher_prompt": tokenizer.decode(row.teacher_prompt),
                "student": tokenizer.decode(own, skip_special_tokens=True).strip(),
                "teacher": tokenizer.decode(better, skip_special_tokens=True).strip(),
                "rollout": tokenizer.decode(row.completion, skip_special_tokens=True).strip(),
                "has_privileged": row.has_privileged,
            }
            for row, own, better in zip(rows, student, teacher)
        ]


def distinct(rows: list[Row]) -> list[Row]:
    """One row a prompt, rows with PI first: they are what there is to see."""
    first = {tuple(row.prompt): row for row in reversed(rows)}
    return sorted(first.values(), key=lambda row: not row.has_privileged)


def show(records: list[dict[str, Any]], max_chars: int) -> None:
    """Print rollouts to the console, above the view of the run where there is one."""

    def cut(text: str, *, tail: bool = False) -> str:
        if len(text) > max_chars:
            text = "…" + text[-max_chars:] if tail else text[:max_chars] + "…"
        return visible(text)

    console = shared_console()
    headings = ("prompt", "student (no PI)", "teacher (PI)")
    rows = [(cut(r["question"], tail=True), cut(r["student"]), cut(r["teacher"])) for r in records]
    title = f"Rollouts at step {records[0]['step']}" if records else "No rollouts"
    console.print(answers(title, headings, rows, console.width))


# ---- token by token -------------------------------------------------------------------------------------------------

TOP = 5


def trace_rows(trainer: Any, rows: Sequence[Row], *, top: int = TOP) -> list[dict[str, Any]]:
    """What happens at each completion token of `rows`, with the weights as they are now.

    Costs one forward without gradient of the student and one of the teacher over these rows, and the head over their
    completion tokens, in chunks of ``loss_chunk_mib``.

    Returns:
        One dict of plain JSON types a row: ``question`` (what is asked, for people), ``prompt``, ``teacher_prompt``
        (text, special tokens visible), ``special`` (the texts of those tokens), ``has_privileged``, ``truncated``,
        ``generated``, and lists with one entry a completion token: ``tokens`` (text), ``divergence`` (nats, as the loss
        measures it, but never clipped), ``in_loss``, ``student_p`` and ``teacher_p`` (probability of the token),
        ``student_top`` and ``teacher_top`` (the `top` likeliest tokens as [text, probability]).
    """
    tokenizer = trainer.processing_class
    records = []
    student, teacher = read_both(trainer, rows)
    for i, row in enumerate(rows):
        mine, theirs = student.some([i]), teacher.some([i])
        divergence = token_divergence(trainer, mine, theirs, beta=trainer.beta)
        student_p, student_top = _candidates(trainer, mine, row.completion, top)
        teacher_p, teacher_top = _candidates(trainer, theirs, row.completion, top)
        kept = set(range(len(row.completion))[row.keep])
        records.append(
            {
                "question": question(tokenizer, row.prompt),
                "prompt": decode(tokenizer, row.prompt),
                "teacher_prompt": decode(tokenizer, row.teacher_prompt),
                "special": special_texts(tokenizer, row.teacher_prompt),
                "has_privileged": row.has_privileged,
                "truncated": row.truncated,
                "generated": row.generated,
                "tokens": token_texts(tokenizer, row.completion),
                "divergence": [round(value, 5) for value in divergence.tolist()],
                "in_loss": [i in kept for i in range(len(row.completion))],
                "student_p": student_p,
                "teacher_p": teacher_p,
                "student_top": student_top,
                "teacher_top": teacher_top,
            }
        )
    return records


def read_both(trainer: Any, rows: Sequence[Row]) -> tuple[Reading, Reading]:
    """How the student, after its own prompt, and the teacher, after its, read every completion token."""
    with adapter_state(trainer.model, "shared") as model:
        own = [(row.prompt, row.completion) for row in rows]
        student = read(model, own, trainer.pad_id, head=trainer.head)
    with trainer.teacher.weights() as model:
        better = [(row.teacher_prompt, row.completion) for row in rows]
        return student, read(model, better, trainer.pad_id, head=trainer.teacher_head)


def token_divergence(trainer: Any, student: Reading, teacher: Reading, *, beta: float) -> torch.Tensor:
    """The loss's divergence (N,) in nats, without its clip; `beta` 0 is KL(teacher || student)."""
    args = trainer.args
    return compare(
        teacher,
        student,
        beta=beta,
        temperature=args.loss_temperature,
        normalize=args.normalize_beta,
        top_k=args.loss_top_k,
        chunk_mib=args.loss_chunk_mib,
    ).divergence


@torch.no_grad()
def _candidates(
    trainer: Any, reading: Reading, completion: list[int], top: int
) -> tuple[list[float], list[list[list[Any]]]]:
    """Each token's own probability, and the likeliest tokens there as [text, probability]."""
    own: list[float] = []
    likeliest: list[list[list[Any]]] = []
    head, hidden = reading.head, torch.cat(reading.hidden)
    vocabulary = head.weight.shape[0] if isinstance(head.weight, torch.Tensor) else 2**17
    rows = max(1, int(trainer.args.loss_chunk_mib * 2**20 // (vocabulary * 8)))
    for start in range(0, len(hidden), rows):
        chunk = hidden[start : start + rows]
        probs = torch.softmax(head.logits(chunk) / trainer.args.loss_temperature, dim=-1)  # (chunk, V)
        ids = torch.tensor(completion[start : start + rows], device=probs.device)
        own += [round(p, 5) for p in probs.gather(1, ids[:, None]).squeeze(1).tolist()]
        values, index = probs.topk(min(top, probs.shape[-1]), dim=-1)  # (chunk, K)
        for row_values, row_index in zip(values.tolist(), index.tolist()):
            texts = [decode(trainer.processing_class, [i]) for i in row_index]
            likeliest.append([[text, round(p, 5)] for text, p in zip(texts, row_values)])
    return own, likeliest


def write_final_traces(trainer: Any, rows: Sequence[Row], *, held_out: bool = False) -> None:
    """The trained student's own greedy answers to the prompts of `rows`, token by token, into
    ``final_traces.jsonl`` of the run folder, in place of what is there.

    Args:
        held_out: whether the rows were kept from training.
    """
    args = trainer.args
    with trainer.student_weights() as model:
        written = generate(
            model,
            [row.prompt for row in rows],
            max_new_tokens=args.max_new_tokens,
            stop_ids=trainer.stop_ids,
            pad_id=trainer.pad_id,
        )
    answered = [replace(row.answered(ids, trainer.stop_ids), keep=slice(0, None)) for row, ids in zip(rows, written)]
    found = {"step": trainer.state.global_step, "held_out": held_out}
    records = ({**found, **record} for record in trace_rows(trainer, answered))
    write_lines(Path(args.output_dir) / FINAL_TRACE_FILE, records)


def append_traces(folder: str | os.PathLike, records: Iterable[dict[str, Any]], step: int) -> None:
    """Add records to the run folder's ``traces.jsonl``, each with its step."""
    append_lines(Path(folder) / TRACE_FILE, ({"step": step, **record} for record in records))
