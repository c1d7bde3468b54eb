"""Rows that are kept from training, so that there is something honest to judge on; and what was trained on.

Rows belong together when a column says so, or when they have the same PI, and always when they have the same prompt.
Such a group is trained on as a whole or held out as a whole.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .contexts import privileged_as_text
from .row import ParsedRow, parsed_or_none

if TYPE_CHECKING:
    from datasets import Dataset

LEAST_ROWS = 20
"""Rows with PI below which none is held out unless the user says how many: too few would be left to learn from."""
LEAST_GROUPS = 5
MOST_HELD_OUT = 64


@dataclass(frozen=True)
class Split:
    """Rows to train on, rows held out (None: none), and one sentence that says which."""

    train: Dataset
    held_out: Dataset | None
    reason: str


def usual_count(rows: int) -> int:
    """How many of `rows` rows with PI are held out when nobody says: a tenth, but not too few to tell anything."""
    if rows < LEAST_ROWS:
        return 0
    return min(MOST_HELD_OUT, max(rows // 10, min(8, rows // 5)))


def hold_out(
    dataset: Dataset,
    privileged_key: str,
    *,
    group_key: str | None = None,
    count: int | None = None,
    seed: int = 0,
) -> Split:
    """Split off about `count` rows with PI, in whole groups, drawn by `seed`.

    Args:
        group_key: column whose equal values mark rows that belong together; default: equal PI does, unless most rows
            share one, as they do a system prompt.
        count: default :func:`usual_count`; 0 holds nothing out.

    Raises:
        ConfigError: there is no such column, or nothing would be left to train on.
    """
    if group_key is not None and group_key not in dataset.column_names:
        raise ConfigError(f"group_key is {group_key!r}, a column that the rows do not have")
    parsed = [parsed_or_none(row, privileged_key) for row in dataset]
    with_pi = [i for i, row in enumerate(parsed) if row is not None and row.privileged]
    wanted = usual_count(len(with_pi)) if count is None else count
    if wanted == 0:
        few = f"{len(with_pi)} rows with PI are too few" if count is None else "as was asked for"
        return Split(dataset, None, f"none is held out: {few}")
    if count is not None and count >= len(with_pi) > 0:
        raise ConfigError(
            f"holdout_rows is {count}, but only {len(with_pi)} rows have PI; keep some of them to train on"
        )
    groups, what = _groups(parsed, with_pi, list(dataset[group_key]) if group_key is not None else None)
    candidates = [members for members in groups if any(i in set(with_pi) for i in members)]
    random.Random(seed).shuffle(candidates)
    chosen: list[int] = []
    taken = 0
    for members in candidates[:-1]:  # one group at least is trained on
        if len(chosen) >= wanted:
            break
        if chosen and len(chosen) + len(members) > 2 * wanted:
            continue
        chosen += members
        taken += 1
    if not chosen:
        if count is not None:
            raise ConfigError(f"holdout_rows is {count}, but all rows with PI belong together ({what}); set it to 0")
        return Split(dataset, None, f"none is held out: all rows with PI belong together ({what})")
    held = sorted(i for i in chosen if i in set(with_pi))
    out = set(chosen)
    rest = dataset.select([i for i in range(len(dataset)) if i not in out])
    return Split(rest, dataset.select(held), f"{taken} of {len(candidates)} groups ({what}), never trained on")


def _groups(parsed: list[ParsedRow | None], with_pi: list[int], marks: list[Any] | None) -> tuple[list[list[int]], str]:
    """The rows' numbers by group, and what made the groups."""
    parent = list(range(len(parsed)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(keys: Mapping[int, Hashable]) -> None:
        first: dict[Hashable, int] = {}
        for i, key in keys.items():
            parent[find(i)] = find(first.setdefault(key, i))

    join({i: prompt_digest(row) for i, row in enumerate(parsed) if row is not None})
    what = "rows of one prompt"
    if marks is not None:
        join({i: repr(mark) for i, mark in enumerate(marks) if mark is not None})
        what = "rows of one group"
    else:
        texts = {i: privileged_as_text(parsed[i].privileged) for i in with_pi}  # type: ignore[union-attr]
        counts: dict[str, int] = {}
        for text in texts.values():
            counts[text] = counts.get(text, 0) + 1
        if len(counts) >= LEAST_GROUPS and 2 * max(counts.values()) <= len(with_pi):
            join(texts)
            what = "rows of one PI"
    groups: dict[int, list[int]] = {}
    for i in range(len(parsed)):
        groups.setdefault(find(i), []).append(i)
    return list(groups.values()), what


def prompt_digest(row: ParsedRow) -> str:
    """Sixteen hex digits that tell the student's prompt: the conversation up to the answer, and its tools."""
    text = json.dumps([row.messages, row.tools, row.chat_template_kwargs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def digests(rows: Iterable[Any], privileged_key: str) -> list[str]:
    """:func:`prompt_digest` of each row; "" of one that cannot be read."""
    parsed = (parsed_or_none(row, privileged_key) for row in rows)
    return [prompt_digest(row) if row is not None else "" for row in parsed]


def trained_prompts(rows: Iterable[Any], privileged_key: str) -> str:
    """The prompts that are trained on, one digest a line: what :func:`trained_on` reads."""
    return "".join(f"{digest}\n" for digest in dict.fromkeys(digests(rows, privileged_key)))


def trained_on(path: Path, rows: Iterable[Any], privileged_key: str) -> int | None:
    """How many of `rows` have a prompt that was trained on; None where the run did not write down which were, or
    what it wrote is damaged."""
    try:
        known = set(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        return None
    if not all(re.fullmatch(r"[0-9a-f]{16}", digest) for digest in known):
        return None  # damaged
    return sum(digest in known for digest in digests(rows, privileged_key))
