"""PI made from the rollout: a function of the user's looks at the student's answers and says what the teacher reads.

As in SDPO the teacher then knows what came of the answer that it grades: a failed test's output, a judge's critique,
the user's next turn. It is opt-in, as code is run: ``module:function``, or ``path/to/file.py:function``.

    def feedback(row, answers):   # the data row, and the student's answers to it as text
        return ["" if passes(answer) else "A test fails: ..." for answer in answers]

It returns one PI an answer (a string or a list of messages; empty or None: no feedback), or one for all of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ConfigError, DataError
from ..rows import Row
from .collator import DataCollatorForPrivilegedGKD

Feedback = Callable[[Mapping[str, Any], list[str]], Any]


def load_feedback(spec: str) -> Feedback:
    """The function behind ``module:function`` or ``file.py:function``.

    Raises:
        ConfigError: there is no such module, file or function.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise ConfigError(f"feedback is {spec!r}; give module:function or path/to/file.py:function")
    try:
        function = getattr(load_module(source), name)
    except (ImportError, AttributeError, OSError) as error:
        raise ConfigError(f"feedback is {spec!r}: {error}") from error
    if not callable(function):
        raise ConfigError(f"feedback is {spec!r}, which is a {type(function).__name__} and no function")
    return function


def load_module(source: str) -> ModuleType:
    """A module by its name, or by its path if that ends in ``.py``; runs its code."""
    if not source.endswith(".py"):
        return importlib.import_module(source)
    made = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert made is not None
    assert made.loader is not None
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


def with_feedback(
    rows: Sequence[Row],
    sources: Sequence[Mapping[str, Any]],
    feedback: Feedback,
    collator: DataCollatorForPrivilegedGKD,
    *,
    without: str = "anchor",
) -> list[Row]:
    """Rows whose teacher reads what `feedback` says of the student's answer, in place of the PI of the data.

    Args:
        rows: after the rollout; rows of one source (``num_generations`` > 1) stand together.
        sources: the data row of each.
        without: what becomes of a row without feedback: ``anchor`` (the teacher reads what the student reads) or
            ``skip`` (it is left out; where none has any, one row stays that does not count, so that there is a step).

    Raises:
        ConfigError: `without` is neither. DataError: what the function returned cannot be used as PI.
    """
    if without not in ("anchor", "skip"):
        raise ConfigError(f"feedback_without is {without!r}; accepted are anchor, skip")
    made: list[Row] = []
    first = 0
    while first < len(rows):
        last = first + 1
        while last < len(rows) and sources[last] is sources[first]:
            last += 1
        made += _of_one_source(rows[first:last], sources[first], feedback, collator, without)
        first = last
    return made or [_standing_in(rows[0])]


def _standing_in(row: Row) -> Row:
    return replace(row, teacher_prompt=row.prompt, has_privileged=False, privileged_tokens_cut=0, counts=False)


def _of_one_source(
    rows: Sequence[Row],
    source: Mapping[str, Any],
    feedback: Feedback,
    collator: DataCollatorForPrivilegedGKD,
    without: str,
) -> list[Row]:
    answers = [collator.tokenizer.decode(row.completion, skip_special_tokens=True).strip() for row in rows]
    said = feedback(dict(source), answers)
    one_each = isinstance(said, (list, tuple)) and len(said) == len(rows) and not isinstance(said[0], Mapping)
    texts = list(said) if one_each else [said] * len(rows)
    key, made = collator.builder.privileged_key, []
    for row, privileged in zip(rows, texts):
        try:
            encoded = collator.check_length(collator.encode({**source, key: privileged}))
        except DataError as error:
            raise DataError(f"what the feedback function returned cannot be used as PI: {error}") from error
        contexts = encoded["contexts"]
        if contexts.has_privileged or without == "anchor":
            made.append(
                Row(
                    row.prompt,
                    encoded["teacher_ids"],
                    row.completion,
                    contexts.has_privileged,
                    contexts.privileged_tokens_cut,
                    generated=row.generated,
                    truncated=row.truncated,
                    logprobs=row.logprobs,
                    server=row.server,
                    source=row.source,
                )
            )
    return made
