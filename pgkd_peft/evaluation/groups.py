"""The recovered gap of each group of rows: what was learnt of this fact, of that kind of question."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import Any

from .answers import bootstrap_recovered, recovered_gap

LEAST_ROWS = 5
"""Rows below which a bootstrap over them says nothing."""


def recovered_by_group(
    base: Sequence[float],
    teacher: Sequence[float],
    student: Sequence[float],
    groups: Sequence[Hashable],
    *,
    least: Sequence[float] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One dict a group, in the order of their first rows: ``group``, ``n``, mean scores, ``recovered``, ``interval``.

    Groups are small: of two right answers in two a bootstrap would make certainty. Where all scores lie in 0 to 1 the
    interval is therefore Wilson's of the student's mean score (for scores that are not 0 or 1 it is too wide rather
    than too narrow), with base and teacher as they were measured; elsewhere (nats) it is a bootstrap over the group's
    rows, and None below :data:`LEAST_ROWS` of them. ``recovered`` and ``interval`` are None where the teacher is not
    better than the base.

    Args:
        least: of each row, by how much the teacher must be better to be called so; a group needs their sum.
    """
    members: dict[Hashable, list[int]] = {}
    for i, name in enumerate(groups):
        members.setdefault(name, []).append(i)
    shares = all(0.0 <= score <= 1.0 for scores in (base, teacher, student) for score in scores)
    found = []
    for name, rows in members.items():
        scores = [[column[i] for i in rows] for column in (base, teacher, student)]
        before, with_pi, after = (math.fsum(column) / len(rows) for column in scores)
        enough = least is None or with_pi - before > math.fsum(least[i] for i in rows) / len(rows)
        recovered = recovered_gap(before, with_pi, after) if enough else None
        interval = None
        if recovered is not None and shares:
            interval = [(end - before) / (with_pi - before) for end in wilson(after, len(rows))]
        elif recovered is not None and len(rows) >= LEAST_ROWS:
            drawn = bootstrap_recovered(*scores, seed=seed)
            interval = [drawn.low, drawn.high] if drawn is not None else None
        found.append(
            {
                "group": str(name),
                "n": len(rows),
                "base": before,
                "teacher": with_pi,
                "student": after,
                "recovered": recovered,
                "interval": interval,
            }
        )
    return found


def wilson(mean: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of `n`."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
