"""Prompts that begin alike are read once; what a fixed teacher has read is kept from step to step.

A plan (:class:`Prefixes`) is made of the prompts alone: a tree of the beginnings that several rows, or several visits
of one row, have in common. Each beginning is read by itself, after the beginning that it goes on from, never together
with other rows. So its cache has the same bits whether it was kept or is read again, and a run that is resumed, or has
another budget, computes what it would have computed.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import psutil
import torch
from torch import nn

from .config import PrivilegedGKDConfig
from .data.check import DataReport
from .model.caches import Layers, bytes_of_one, cut, put_together, read_on, why_not_shared
from .model.load import base_of
from .rows import Row
from .teacher import Teacher

SHORTEST = 32  # tokens; a shorter beginning is read with its row faster than it is copied
GIB = 2**30


@dataclass(eq=False)
class Prefix:
    """A beginning that is read once: tokens `start` to `end` of every prompt below it.

    Attributes:
        ids: those tokens.
        parent: the beginning before it, which ends at `start`.
        uses: how often a prompt below it is read in the whole run.
        children: by their first `SHORTEST` tokens, which tell them apart.
        order: place in the plan.
    """

    ids: array
    start: int
    parent: Prefix | None
    uses: int
    order: int
    children: dict[tuple[int, ...], Prefix] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    def chain(self) -> list[Prefix]:
        """The beginnings from the first token to here."""
        return [*(self.parent.chain() if self.parent else []), self]


class Prefixes:
    """Where prompts begin alike, and the caches of those beginnings.

    Args:
        prompts: token ids.
        visits: how often each is read in a run; one number for all, or one each.

    Attributes:
        nodes: the beginnings, each behind its parent.
        tokens: prompt tokens of all visits.
    """

    def __init__(self, prompts: Iterable[Sequence[int]], visits: int | Sequence[int] = 1):
        counts: dict[bytes, int] = {}
        self.tokens = 0
        for i, prompt in enumerate(prompts):
            times = visits if isinstance(visits, int) else visits[i]
            if not times:
                continue
            key = array("i", prompt[:-1]).tobytes()  # the last token predicts the first of the completion
            counts[key] = counts.get(key, 0) + times
            self.tokens += times * len(prompt)
        self.nodes: list[Prefix] = []
        self.roots: dict[tuple[int, ...], Prefix] = {}
        self._live: dict[Prefix, Layers] = {}  # of this call, on the model's device
        self._kept: dict[Prefix, Layers] = {}  # from step to step, in host memory, without their parents' positions
        if counts:
            self._grow(sorted((array("i", key), times) for key, times in counts.items()))

    def _grow(self, prompts: list[tuple[array, int]]) -> None:
        todo: list[tuple[int, int, int, Prefix | None]] = [(0, len(prompts), 0, None)]
        while todo:
            low, high, same, parent = todo.pop()
            first, last = prompts[low][0], prompts[high - 1][0]  # sorted: what these share, all between share
            end = _common(first, last, same)
            start = parent.end if parent else 0
            uses = sum(times for _, times in prompts[low:high])
            if end - start >= SHORTEST and uses > 1:
                node = Prefix(first[start:end], start, parent, uses, len(self.nodes))
                (parent.children if parent else self.roots)[tuple(node.ids[:SHORTEST])] = node
                self.nodes.append(node)
                parent = node
            at = low
            for token, group in groupby(prompts[low:high], key=lambda item: item[0][end] if len(item[0]) > end else -1):
                size = sum(1 for _ in group)
                if token >= 0 and (size > 1 or prompts[at][1] > 1):
                    todo.append((at, at + size, end, parent))
                at += size

    def find(self, prompt: Sequence[int]) -> Prefix | None:
        """The longest planned beginning of a prompt, of which at least the last token is left to read."""
        node, children = None, self.roots
        while True:
            start = node.end if node else 0
            child = children.get(tuple(prompt[start : start + SHORTEST]))
            if child is None or child.end >= len(prompt) or list(child.ids) != list(prompt[start : child.end]):
                return node
            node, children = child, child.children

    def read(self, model: nn.Module, node: Prefix) -> Layers:
        """The model's cache after a beginning (one row); read, or taken from what was kept."""
        if node in self._live:
            return self._live[node]
        device = next(model.parameters()).device
        if node in self._kept:
            layers = put_together([self._kept[part] for part in node.chain()], device)
        else:
            before = self.read(model, node.parent) if node.parent else None
            layers = read_on(model, before, node.ids, node.start)
            if self.keeps(node):
                self._kept[node] = cut(layers, node.start, "cpu")
        self._live[node] = layers
        return layers

    def forget(self, needed: Iterable[Prefix] = ()) -> None:
        """Drop what this call holds, but for the beginnings that are still `needed`, and theirs."""
        keep = {part for node in needed for part in node.chain()}
        self._live = {node: layers for node, layers in self._live.items() if node in keep}

    def keeps(self, node: Prefix) -> bool:
        """Whether a beginning is kept after the call that reads it."""
        return False


def _common(a: Sequence[int], b: Sequence[int], start: int) -> int:
    """The first position from `start` on where two rows differ, or the shorter one ends."""
    shorter = min(len(a), len(b))
    if a[start:shorter] == b[start:shorter]:
        return shorter
    return next(i for i in range(start, shorter) if a[i] != b[i])


class TeacherMemory(Prefixes):
    """What a fixed teacher has read in a run: prefixes of its prompts, and hidden states of answers that stay.

    Made once from all the prompts. What is planned depends on them and on `epochs` alone; what is kept, on the budget.

    Args:
        prompts: the teacher's, of every row.
        epochs: how often the run comes to a row.
        copies: rollouts of a row that are read each time (``num_generations``); 0: none (``lmbda`` = 0).
        answers: the data's own completions where they are read too (``lmbda`` < 1), else None.
        whole: True for rows that are read whole each time, for they have no PI.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        epochs: int = 1,
        *,
        copies: int = 1,
        answers: Sequence[Sequence[int]] | None = None,
        whole: Sequence[bool] | None = None,
    ):
        # (prompt, answer) -> (tokens of the prompt, of the answer), of the answers that are read once
        self._answers: dict[tuple[bytes, bytes], tuple[int, int]] = {}
        if answers is not None and epochs > 1:
            self._answers = {
                _key(p, a): (len(p), len(a))
                for i, (p, a) in enumerate(zip(prompts, answers))
                if a and not (whole is not None and whole[i])
            }
        self._answers_kept: set[tuple[bytes, bytes]] = set()
        self._worth_keeping: set[Prefix] = set()
        self._hidden: dict[tuple[bytes, bytes], tuple[slice, torch.Tensor]] = {}
        self._read_again = 0 if copies else epochs - 1  # times that only an answer would make the teacher read
        visits = [epochs * max(1, copies)] * len(prompts)
        for i, prompt in enumerate(prompts):
            if whole is not None and whole[i]:
                visits[i] = 0
            elif not copies and answers is not None and _key(prompt, answers[i]) in self._answers:
                visits[i] = 1
        super().__init__(prompts, visits)
        self.tokens = epochs * max(1, copies) * sum(len(prompt) for prompt in prompts)
        self.budget_gib = 0.0

    @torch.no_grad()
    def keep_within(self, budget_gib: float, model: nn.Module, width: int) -> str:
        """Choose what to keep in at most `budget_gib` of host memory: answers first, then the beginnings that save
        most tokens a byte.

        Args:
            model: the teacher.
            width: D of its hidden states.

        Returns:
            One line that says what share of the teacher's prompt tokens is not read again.
        """
        left = budget_gib * GIB
        self.budget_gib, self._answers_kept, self._worth_keeping = budget_gib, set(), set()
        for key, (_, tokens) in self._answers.items():
            needed = tokens * width * next(model.parameters()).element_size()
            if needed <= left:
                left -= needed
                self._answers_kept.add(key)
        reason = why_not_shared(model)
        if reason:
            self.nodes, self.roots = [], {}
        if self.nodes:
            fixed, each = bytes_of_one(model)
            needs = {node: fixed + each * len(node.ids) for node in self.nodes}
            for node in sorted(self.nodes, key=lambda n: (-(n.uses - 1) * len(n.ids) / needs[n], n.start, n.order)):
                if needs[node] <= left and (node.parent is None or node.parent in self._worth_keeping):
                    left -= needs[node]
                    self._worth_keeping.add(node)
        return self._in_words(reason, left / GIB)

    def _in_words(self, reason: str | None, left_gib: float) -> str:
        kept = self._saved(self._worth_keeping, self._answers_kept)
        best = self._saved(self.nodes, self._answers)
        words = f"of the {self.tokens:,} prompt tokens of this run the teacher need not read {kept:.0%} again"
        if self._answers:
            words += f" ({len(self._answers_kept):,} of {len(self._answers):,} answers are read once)"
        if reason:
            words += f"; no prompts are shared, for {reason}"
        held = f"{self.budget_gib - left_gib:.2f} GiB of teacher_cache_gib={self.budget_gib:.2f}"
        if len(self._worth_keeping) < len(self.nodes) or len(self._answers_kept) < len(self._answers):
            return (
                f"{words}; {held} hold {len(self._worth_keeping):,} of {len(self.nodes):,} beginnings, "
                f"with more it would be {best:.0%}"
            )
        return f"{words}; {held}"

    def _saved(self, nodes: Iterable[Prefix], answers: Iterable[tuple[bytes, bytes]]) -> float:
        """The share of the run's prompt tokens that is not read when these are kept."""
        saved = sum((node.uses - 1) * len(node.ids) for node in nodes)
        saved += self._read_again * sum(self._answers[key][0] for key in answers)
        return saved / max(1, self.tokens)

    def keeps(self, node: Prefix) -> bool:
        return node in self._worth_keeping

    def recall(self, row: Row, device: torch.device) -> bool:
        """Give a row the hidden states that were kept for its answer; False if there are none."""
        found = (
            None if row.generated or not self._hidden else self._hidden.get(_key(row.teacher_prompt, row.completion))
        )
        if found is None or found[0] != row.keep:
            return False
        row.teacher_hidden = found[1].to(device)
        return True

    def stays(self, row: Row) -> bool:
        """Whether a row's completion is the data's own and comes again: it is then read by itself, so that its hidden
        states are the same bits in every step."""
        return bool(self._answers) and not row.generated and _key(row.teacher_prompt, row.completion) in self._answers

    def remember(self, row: Row) -> None:
        """Keep a row's hidden states, in their own dtype, where the budget has room for them."""
        key = _key(row.teacher_prompt, row.completion)
        if key in self._answers_kept and row.teacher_hidden is not None:
            self._hidden[key] = (row.keep, row.teacher_hidden.detach().cpu())


def _key(prompt: Sequence[int], completion: Sequence[int]) -> tuple[bytes, bytes]:
    return array("i", prompt).tobytes(), array("i", completion).tobytes()


def plan_teacher(
    teacher: Teacher, report: DataReport | None, args: PrivilegedGKDConfig, processes: int = 1
) -> tuple[TeacherMemory | None, str]:
    """The memory of a run's teacher and a line about it; None where the teacher changes, or the rows are not known
    before they come: beginnings are then shared within a step alone.

    Args:
        processes: of the run.
    """
    if not teacher.fixed or report is None:
        return None, ""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    epochs = args.num_train_epochs if args.max_steps <= 0 else args.max_steps * rows / max(1, report.rows)
    reads_answers = args.lmbda < 1.0 and not args.seq_kd
    memory = TeacherMemory(
        report.teacher_prompts,
        math.ceil(epochs),
        copies=0 if args.lmbda == 0.0 and reads_answers else args.num_generations,
        answers=report.answers if reads_answers else None,
        whole=[tokens == 0 for tokens in report.privileged_tokens],
    )
    model: Any = teacher.separate if teacher.separate is not None else teacher.model
    budget, note = args.teacher_cache_gib, ""
    if budget is None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        budget, note = psutil.virtual_memory().available / 4 / local / GIB, ", a quarter of the free host memory"
    with teacher.weights() as weights:
        line = memory.keep_within(budget, weights, base_of(model).config.get_text_config().hidden_size)
    return memory, line + note


def share_read_once(prompts: Sequence[Sequence[int]]) -> float:
    """The share of an epoch's prompt tokens that need not be read, because another row begins with them."""
    plan = Prefixes(prompts)
    return sum((node.uses - 1) * len(node.ids) for node in plan.nodes) / max(1, plan.tokens)
