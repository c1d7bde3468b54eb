"""Alarms in the log: signs that a run is going wrong, each with what to do. A sign is reported once a run."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from transformers import Trainer, TrainerCallback

logger = logging.getLogger(__name__)

WINDOW = 5  # optimizer steps with rollouts that a mean is taken over
LENGTH_FACTOR = 2.0  # completions this many times longer or shorter than at the start
TRUNCATED = 0.5  # share of rollouts that never reached a stop token
COLLAPSED = 0.3  # student's entropy against its own at the start, and against the teacher's
NO_EFFECT = 2e-4  # nats; below it, PI changes nothing but rounding


class HealthCallback(TrainerCallback):
    """Watches lengths and token counts after every optimizer step, entropies and divergence at every log.

    Attributes:
        alarms: kind of alarm -> its message, of this run so far.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.alarms: dict[str, str] = {}
        self.lengths: deque[float] = deque(maxlen=WINDOW)
        self.truncated: deque[float] = deque(maxlen=WINDOW)
        self.first_length: float | None = None
        self.first_entropy: float | None = None
        self.logs = 0

    def alarm(self, kind: str, message: str, step: int) -> None:
        if kind not in self.alarms:
            self.alarms[kind] = message
            if self.trainer.is_world_process_zero():
                logger.warning("Alarm at step %d: %s", step, message)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = self.trainer.last_rows
        if rows and not any(row.kept for row in rows):
            self.alarm(
                "no tokens",
                "not one token to train on in this step. Every completion is empty, shorter than "
                f"skip_first_tokens={args.skip_first_tokens}, or left out as truncated "
                f"(mask_truncated_completions={args.mask_truncated_completions}).",
                state.global_step,
            )
        written = [row for row in rows if row.generated]
        if not written:
            return
        self.lengths.append(sum(len(row.completion) for row in written) / len(written))
        self.truncated.append(sum(row.truncated for row in written) / len(written))
        if len(self.lengths) < WINDOW:
            return
        length, truncated = sum(self.lengths) / WINDOW, sum(self.truncated) / WINDOW
        if self.first_length is None:
            self.first_length = length
        if truncated > TRUNCATED:
            self.alarm(
                "truncated",
                f"{truncated:.0%} of the rollouts never end within max_new_tokens={args.max_new_tokens}. Raise it, or "
                "leave them out of the loss with mask_truncated_completions=True.",
                state.global_step,
            )
        if length > LENGTH_FACTOR * self.first_length:
            self.alarm(
                "longer",
                f"completions have grown from {self.first_length:.0f} to {length:.0f} tokens. Look at the rollouts "
                "(rollout_log_steps) for repetition; lower learning_rate, or raise beta towards 1.",
                state.global_step,
            )
        elif length < self.first_length / LENGTH_FACTOR:
            self.alarm(
                "shorter",
                f"completions have shrunk from {self.first_length:.0f} to {length:.0f} tokens. If the PI does not ask "
                "for short answers, lower learning_rate, or mix in reference answers with lmbda below 1.",
                state.global_step,
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or "student_entropy" not in logs:
            return
        self.logs += 1
        entropy, teacher_entropy = logs["student_entropy"], logs["teacher_entropy"]
        if self.first_entropy is None:
            self.first_entropy = entropy
        if entropy < COLLAPSED * self.first_entropy and entropy < COLLAPSED * teacher_entropy:
            self.alarm(
                "entropy",
                f"the student's entropy has collapsed from {self.first_entropy:.3f} to {entropy:.3f} nats a token, the "
                f"teacher's is {teacher_entropy:.3f}. Lower learning_rate, lower beta towards 0 (forward KL keeps "
                "what the teacher may say), or mix in reference answers with lmbda below 1.",
                state.global_step,
            )
        if self.logs > 1:
            return
        beta = args.beta
        scale = beta * (1 - beta) if 0 < beta < 1 and not args.normalize_beta else 1.0
        if not logs.get("privileged_rows"):
            self.alarm(
                "no PI",
                f"no row so far has PI in {args.privileged_key!r}: the teacher knows no more than the student, so "
                "there is nothing to learn. Check the column's name (privileged_key).",
                state.global_step,
            )
        elif logs["divergence"] < NO_EFFECT * scale:
            self.alarm(
                "no effect",
                f"teacher and student agree to {logs['divergence']:.1e} nats a token although "
                f"{logs['privileged_rows']:.0%} of the rows have PI: it changes nothing. Look at what the teacher "
                "reads (pgkd inspect); try another privileged_placement, or PI that the answer depends on.",
                state.global_step,
            )
