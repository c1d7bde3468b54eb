"""SIGTERM, SIGHUP (a closed terminal) and Ctrl-C: finish the step, save a checkpoint, say how to go on."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from .folder import checkpoint_name

logger = logging.getLogger(__name__)


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


class RunInterrupted(KeyboardInterrupt):
    """A signal ended the run after a checkpoint was saved; the message says how to continue.

    Attributes:
        signum: the signal; a shell expects the exit code 128 + signum (130 for Ctrl-C, 143 for SIGTERM).
        checkpoint: the checkpoint that was saved.
    """

    def __init__(self, signum: int, checkpoint: str, step: int, steps: int):
        self.signum = signum
        self.checkpoint = checkpoint
        super().__init__(
            f"{signal.Signals(signum).name}: stopped after step {step} of {steps}; saved {checkpoint}. Continue with "
            "the same command and --resume, or train(resume_from_checkpoint=True)."
        )


class _StopCallback(TrainerCallback):
    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.signum = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signum = self.signum
        if self.trainer.accelerator.num_processes > 1:  # a signal may reach one process only
            signum = int(self.trainer.accelerator.gather(torch.tensor([signum], device=args.device)).max())
            self.signum = signum
        if signum:
            control.should_save = control.should_training_stop = True


@contextlib.contextmanager
def interruptible(trainer: Trainer) -> Iterator[None]:
    """Inside, the first of ``SIGNALS`` lets the step end and saves; a second one acts as it would without us.

    Raises:
        RunInterrupted: at the end, when a signal came.
    """
    callback = _StopCallback(trainer)
    previous: dict[int, Any] = {}

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    def stop(signum: int, frame: Any) -> None:
        callback.signum = signum
        restore()
        _leave_dead_terminal()
        logger.warning("%s: finishing this step, then saving. Once more stops at once.", signal.Signals(signum).name)

    trainer.add_callback(callback)
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            ignored = signal.getsignal(signum) == signal.SIG_IGN
            if not ignored or signum in (signal.SIGTERM, signal.SIGINT):  # under nohup a closed terminal is nothing
                previous[signum] = signal.signal(signum, stop)
    try:
        yield
    finally:
        restore()
        trainer.remove_callback(callback)
    if callback.signum:
        state = trainer.state
        saved = Path(trainer.args.output_dir) / checkpoint_name(state.global_step)
        raise RunInterrupted(callback.signum, str(saved), state.global_step, state.max_steps)


def _leave_dead_terminal() -> None:
    """Once its terminal is closed, every line that the run prints would end it before it has saved."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
