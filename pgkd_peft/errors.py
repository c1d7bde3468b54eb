"""What a user can do wrong, as exceptions.

All of them are ``ValueError``s, so code that already catches what TRL or Transformers raise keeps working. The command
line prints such an error without a traceback and exits with code 2.
"""

from __future__ import annotations

import json


class PGKDError(ValueError):
    """A mistake the user can mend; the message names what was given, what is accepted and what to do."""


class ConfigError(PGKDError):
    """A field or flag has a value that cannot work."""


class DataError(PGKDError):
    """One or more data rows cannot be used.

    Args:
        message: the report, one line a row.
        rows: 0-based numbers of the rows that are at fault.
    """

    def __init__(self, message: str, rows: tuple[int, ...] = ()):
        super().__init__(message)
        self.rows = rows


class ModelError(PGKDError):
    """The model, tokenizer or adapter cannot be used as asked."""


class CheckpointError(PGKDError):
    """A checkpoint cannot be written, read, or used for this run."""


class FrozenBaseError(PGKDError):
    """The base weights, which must never change, have changed."""


def first_line(error: BaseException) -> str:
    """The gist of another library's error, in one line."""
    if isinstance(error, json.JSONDecodeError) and error.lineno == 1:
        return f"{error.msg} (column {error.colno})"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
