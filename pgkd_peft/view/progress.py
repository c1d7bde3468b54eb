"""What a run is doing now, for whatever shows it: the newest numbers, their history, the newest rollout, the pace."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..data.tokens import question
from ..run.jsonl import is_number
from ..run.meters import PHASES

if TYPE_CHECKING:
    from ..trainer import PrivilegedSelfDistillTrainer

SMALL = (  # (metric, its name, format): the curves beside the divergence
    ("eval_recovered", "recovered gap", ".2f"),
    ("eval_student", "score, held out", ".2f"),
    ("eval_drift", "drift", ".3f"),
    ("student_entropy", "entropy, student", ".2f"),
    ("teacher_entropy", "entropy, teacher", ".2f"),
    ("top1_agreement", "agreement", ".0%"),
    ("completion_length", "length (tokens)", ".0f"),
    ("truncated_completions", "cut off", ".0%"),
    ("grad_norm", "gradient norm", ".2g"),
    ("tokens_per_second", "tokens/s", ".0f"),
)


class Pace:
    """Seconds a step, over the last twenty, and what is left."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.ends: deque[float] = deque([self.started], maxlen=21)

    def step(self) -> None:
        self.ends.append(time.perf_counter())

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @property
    def seconds_a_step(self) -> float | None:
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1) if len(self.ends) > 1 else None

    def left(self, steps: int) -> float | None:
        return None if self.seconds_a_step is None else self.seconds_a_step * steps


class View(TrainerCallback):
    """What shows a training. This one shows nothing."""

    def stop(self) -> None:
        """The run has ended, or broken off; called once or more."""


class Watch(View):
    """Follows a run; a subclass shows it.

    Attributes:
        history: every number that was logged, by name, in the order of logging.
        rollout: what was asked newest, and the student's completion.
        status: starting, training, evaluating, saved or done.
    """

    def __init__(self, trainer: PrivilegedSelfDistillTrainer):
        self.trainer = trainer
        self.history: dict[str, list[float]] = defaultdict(list)
        self.rollout: tuple[str, str] | None = None
        self.status = "starting"
        self.step = self.max_steps = 0
        self.epoch = 0.0
        self.pace = Pace()

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds of each phase a step, as last logged; 0 before that."""
        return {name: self.history.get(f"seconds_{name}", [0.0])[-1] for name in PHASES}

    def start(self) -> None:
        """The run begins."""

    def changed(self) -> None:
        """Something is new."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pace = Pace()
        self._see(state)
        if state.is_world_process_zero:
            self.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.status = "training"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pace.step()
        self._see(state)
        rows = self.trainer.last_rows
        if rows:
            row = next((row for row in rows if row.has_privileged), rows[0])
            tokenizer = self.trainer.processing_class
            self.rollout = (
                question(tokenizer, row.prompt),
                tokenizer.decode(row.completion, skip_special_tokens=True).strip(),
            )
        self.changed()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.status = "evaluating"
        self.changed()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.status = "saved"
        self.changed()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._see(state)
        for name, value in (logs or {}).items():
            if is_number(value):
                self.history[name].append(float(value))
        self.changed()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.status = "done"
        self._see(state)
        self.stop()

    def _see(self, state: Any) -> None:
        self.step, self.max_steps, self.epoch = state.global_step, state.max_steps, state.epoch or 0.0
