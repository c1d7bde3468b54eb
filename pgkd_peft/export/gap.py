"""How much of what the PI changes is still in a model that was made from an adapter: the recovered gap in nats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.collator import DataCollatorForPrivilegedGKD
from ..evaluation.nats import Nats, answer_nll, recovered_nats, teacher_answers
from .adapter import AdapterRun


class TeacherAnswers:
    """The base's answers with PI to held-out rows, and how base, teacher and trained model read them.

    Rows without PI are left out; a file of prompts may have no others, and then there is nothing to measure.

    Args:
        rows: conversations, with PI in the run's own column.

    Attributes:
        nats: what the trained model has recovered (:mod:`pgkd_peft.evaluation.nats`); None before :meth:`read`, and
            where no row has PI.
    """

    def __init__(self, run: AdapterRun, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]):
        settings = run.info.get("config") or {}
        self.nats: Nats | None = None
        self._rows = [row for row in rows if row.get(settings.get("privileged_key", "privileged_messages"))]
        self._answers: list[list[int]] = []
        if self._rows:
            self.collator = DataCollatorForPrivilegedGKD.from_settings(tokenizer, settings, max_length=None)
            self._prompts = [self.collator.encode(row)["student_ids"] for row in self._rows]

    def write(self, model: nn.Module, max_new_tokens: int) -> None:
        """Let the base of `model`, a PeftModel, answer with PI, greedily."""
        if self._rows:
            self._answers = teacher_answers(model, self.collator, self._rows, max_new_tokens=max_new_tokens)

    def read(self, model: nn.Module) -> None:
        """Let base, teacher and trained model read the answers."""
        if self._rows:
            self.nats = recovered_nats(model, self.collator, self._rows, self._answers, samples=0)

    def recovered(self, model: nn.Module) -> float | None:
        """The recovered gap of another model, read without PI; None where there is no gap."""
        if self.nats is None or self.nats.recovered is None:
            return None
        nll = answer_nll(model, self._prompts, self._answers, self.collator.pad_token_id).sum() / self.nats.tokens
        return float((self.nats.base - nll) / (self.nats.base - self.nats.teacher))
