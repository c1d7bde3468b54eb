"""How things are called and written everywhere: columns of an evaluation, seconds, and what one text has more than
another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

LABELS = {
    "base": "base",
    "teacher": "base with PI (teacher)",
    "student": "student",
    "student_with_pi": "student with PI",
}
"""The columns of an evaluation, in their order."""


def rows_called(summary: Mapping[str, Any]) -> str:
    """What may be said of the rows: held out, trained on, or neither where that is not known."""
    n, trained = summary["n"], summary.get("trained_on", 0)
    if trained is None:
        return f"{n} rows (nothing says whether they were trained on)"
    if trained == 0:
        return f"{n} held-out row{'s' if n != 1 else ''}"
    return f"{n} rows that were trained on" if trained == n else f"{n} rows, {trained} of them trained on"


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def clock(seconds: float | None) -> str:
    """1:05 or 2:03:09; ? for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def inserted(student: Sequence[Any], teacher: Sequence[Any], begins: Callable[[Any], bool]) -> slice:
    """The part of the teacher's prompt (characters, or token ids) that is not in the student's: what lies between
    their common beginning and their common end. Where it could begin at several places, as between two like turns, it
    begins with an item for which `begins` is true, if that is possible."""
    shorter = min(len(student), len(teacher))
    start = next((i for i in range(shorter) if student[i] != teacher[i]), shorter)
    most = shorter - start
    tail = next((i for i in range(most) if student[-1 - i] != teacher[-1 - i]), most)
    stop = len(teacher) - tail
    if tail == most and start < stop and not begins(teacher[start]):
        # a pure insertion can slide to the left while the item before it equals its last one
        for shift in range(1, start + 1):
            if teacher[start - shift] != teacher[stop - shift]:
                break
            if begins(teacher[start - shift]):
                return slice(start - shift, stop - shift)
    return slice(start, stop)
