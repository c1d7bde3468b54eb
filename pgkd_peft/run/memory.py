"""Running out of memory: noticed on every device, and explained by the phase that it happened in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..errors import PGKDError, reason

ADVICE = {
    "rollout": "lower max_new_tokens, num_generations or max_length, or set rollout_engine='adapter', which holds no "
    "second copy of the linear layers",
    "teacher": "lower max_privileged_length, max_length or max_new_tokens",
    "student": "halve per_device_train_batch_size and double gradient_accumulation_steps (the result stays the same), "
    "keep gradient_checkpointing on, or lower max_length, max_new_tokens or loss_chunk_mib",
}


class OutOfMemoryError(PGKDError):
    """Memory ran out; the message says in which phase of a step, and what to lower."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch (on a GPU or the CPU) or of Python is about memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextlib.contextmanager
def memory_for(phase: str) -> Iterator[None]:
    """Name the phase (a key of ``ADVICE``) when memory runs out inside.

    Raises:
        OutOfMemoryError: instead of PyTorch's own.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory in the {phase} phase: {ADVICE[phase]}. ({reason(error)})") from error
