"""pgkd-peft: teach a language model, on one GPU, what used to stand in its prompt.

One quantized base model is teacher and student. The teacher reads the conversation together with privileged
information (PI); the student, the same base with a LoRA adapter, reads it without, and learns to answer alike.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .run import console as _console

# trl.experimental warns at import that it may change; pyproject.toml therefore pins TRL's minor version.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# bitsandbytes looks for an optional inference kernel on the Hub at import, and warns when it is not there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import PrivilegedGKDConfig
    from .data.collator import DataCollatorForPrivilegedGKD
    from .evaluation.gap_callback import RecoveredGapCallback
    from .trainer import PrivilegedSelfDistillTrainer

_HOME = {
    "PrivilegedGKDConfig": "config",
    "PrivilegedSelfDistillTrainer": "trainer",
    "RecoveredGapCallback": "evaluation.gap_callback",
    "DataCollatorForPrivilegedGKD": "data.collator",
}

__all__ = [
    "DataCollatorForPrivilegedGKD",
    "PrivilegedGKDConfig",
    "PrivilegedSelfDistillTrainer",
    "RecoveredGapCallback",
    "__version__",
]


def _view(trainer: Any) -> Any:
    """What shows a training, see :func:`pgkd_peft.view.terminal.install`."""
    return import_module(".view.terminal", __name__).install(trainer)


_console.make_view = _view


def __getattr__(name: str) -> Any:  # torch is only imported when a name that needs it is asked for
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
