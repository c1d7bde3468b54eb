"""Running out of memory: noticed on every device, and explained by the phase that it happened in."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from ..errors import PGKDError, reason

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

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


def in_halves(run: Callable[[list[Item]], None], items: list[Item]) -> None:
    """``run(items)``; where memory runs out, the first half and then the second, down to one item."""
    enough = True
    try:
        run(items)
    except (RuntimeError, MemoryError) as error:
        if len(items) == 1 or not is_out_of_memory(error):
            raise
        enough = False
    if enough:
        return
    # only now, without the error, is what it held on to free
    torch.cuda.empty_cache()
    logger.warning("Out of memory with %d rows at once; going on with half as many.", len(items))
    in_halves(run, items[: len(items) // 2])
    in_halves(run, items[len(items) // 2 :])
