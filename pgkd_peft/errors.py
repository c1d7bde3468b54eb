"""What a user can do wrong, as exceptions; and the one place where another library's error becomes one of them.

All of them are ``ValueError``s, so code that already catches what TRL or Transformers raise keeps working. The command
line prints such an error without a traceback and exits with code 2.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REASON_LINES = 8  # of a long report: the first ones say what, the last one often why
REASON_LENGTH = 1200  # characters


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


class RunFinished(CheckpointError):
    """The run that was to be resumed has come to its end; nothing of it was touched."""


class FrozenBaseError(PGKDError):
    """The base weights, which must never change, have changed."""


def reason(error: BaseException) -> str:
    """Another library's whole message in one line, as much of it as a terminal holds, with the causes that it hides.

    Many messages have their reason behind the first line ("Error(s) in loading state_dict:", "… from one of:"), or only
    in the error that they were raised from.
    """
    said = _message(error)
    cause = error.__cause__
    for _ in range(3):
        if cause is None:
            break
        because = _message(cause)
        if because not in said and said not in because:
            said = f"{said.rstrip('.')}; because: {because}"
        cause = cause.__cause__
    return said if len(said) <= REASON_LENGTH else said[:REASON_LENGTH].rstrip() + " …"


def _message(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        return f"{error.msg} ({where})"
    if isinstance(error, OSError) and error.strerror:  # "[Errno 30] Read-only file system: 'x'" for people
        files = [str(name) for name in (error.filename, error.filename2) if name is not None]  # of a copy both
        return f"{' -> '.join(files)}: {error.strerror}" if files else error.strerror
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    lines = [line for line in lines if line.strip("-=^~ ")]
    if not lines:
        return type(error).__name__
    if isinstance(error, (KeyError, IndexError, AttributeError, TypeError)):  # a bare name says nothing alone
        lines[0] = f"{type(error).__name__}: {lines[0]}"
    if len(lines) > REASON_LINES:
        left_out = f"… {len(lines) - REASON_LINES} more lines …"
        lines = [*lines[: REASON_LINES - 1], left_out, lines[-1]]
    return " ".join(lines)


@contextlib.contextmanager
def explained(what: str, kind: type[PGKDError] = ModelError, advice: str = "") -> Iterator[None]:
    """Around a call into another library that meets a user's file, name or setting: what it raises becomes a `kind`.

    Memory that runs out, and what is a :class:`PGKDError` already, pass through.

    Args:
        what: names the file, flag or setting and what cannot be done with it ("model 'x' cannot be loaded").
        advice: what to do about it, as a sentence.

    Raises:
        PGKDError: of the given kind; `what`, the library's whole reason, `advice`.
    """
    try:
        yield
    except PGKDError:
        raise
    except Exception as error:
        if isinstance(error, (MemoryError, BrokenPipeError)) or "out of memory" in str(error):
            raise
        text = f"{what}: {reason(error)}"
        if advice:
            text = f"{text.rstrip('.')}. {advice}"
        raise kind(text) from error


# ---- reading what a user named ---------------------------------------------------------------------------------------


def refuse_pointer(path: Path) -> None:
    """Raises ModelError for the three lines of text that Git leaves in place of a large file."""
    with explained(f"{path} cannot be read"), path.open("rb") as file:
        pointer = file.read(40).startswith(b"version https://git-lfs")
    if pointer:
        raise ModelError(
            f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder, or download it."
        )


def wide_encoding(start: bytes) -> str | None:
    """The name of UTF-16 or UTF-32, with or without its mark, by the first bytes of a text; None for any other.

    Without a mark: such text has a 0 in every ASCII character (spaces, digits, commas), always on the same side.
    """
    for mark, name in ((b"\xff\xfe\x00\x00", "UTF-32"), (b"\x00\x00\xfe\xff", "UTF-32")):
        if start.startswith(mark):
            return name
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    lanes, full = [start[i::4].count(0) for i in range(4)], 0.9 * (len(start) // 4)
    for (empty, other), letters, name in (((2, 3), 0, "UTF-32LE"), ((0, 1), 3, "UTF-32BE")):
        if min(lanes[empty], lanes[other]) >= max(full, 1) and lanes[letters] < full / 2:
            return name
    high, low = start[0::2].count(0), start[1::2].count(0)
    if not high + low or 40 * max(high, low) < len(start) or max(high, low) < 4 * min(high, low):
        return None  # a stray one in other text
    return "UTF-16BE" if high > low else "UTF-16LE"


def read_text(path: str | Path, what: str) -> str:
    """The text of a file that a user named; `what` is the flag or setting that names it.

    Raises:
        ModelError: it cannot be read, or is not UTF-8 text.
    """
    refuse_pointer(Path(path))
    advice = "Save it as UTF-8 text."
    with explained(f"{what} {str(path)!r} cannot be read"), Path(path).open("rb") as file:
        kind = wide_encoding(file.read(4096))
    if kind is not None:
        raise ModelError(f"{what} {str(path)!r} is {kind} text. {advice[:-1]}: iconv -f {kind} -t UTF-8.")
    with explained(f"{what} {str(path)!r} cannot be read as UTF-8 text", advice=advice):
        return Path(path).read_text(encoding="utf-8-sig")  # with the mark that Windows editors put first, or without


def read_object(path: Path, advice: str = "") -> dict[str, Any]:
    """The object in a JSON file that must be there; `advice` is what to do where it is damaged, as a sentence.

    Raises:
        ModelError: it cannot be read, is no JSON, or holds something else.
    """
    text = read_text(path, "file")
    with explained(f"{path} cannot be read as JSON", advice=advice):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a JSON {type(content).__name__}, not an object. {advice}".rstrip(". "))
    return content
