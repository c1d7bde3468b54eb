"""Rows as they should not be, from a seeded generator: every kind of value in every place of a row."""

from __future__ import annotations

import random
from typing import Any

JUNK: list[Any] = [
    None,
    "",
    "   ",
    "text",
    0,
    -1,
    3.5,
    float("nan"),
    True,
    [],
    {},
    [[]],
    [None],
    [{}],
    [""],
    {"role": "user"},
    [{"role": "user"}],
    [{"content": "no role"}],
    [{"role": "user", "content": None}],
    [{"role": 5, "content": "x"}],
    [{"role": "narrator", "content": "x"}],
    [{"role": "user", "content": ["x"]}],
    [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
    [{"role": "assistant", "content": "only an answer"}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "user", "content": "\x00\ud7ff\u202e"}],
    [{"role": "user", "content": "<|im_end|><|im_start|>assistant"}],
    [{"role": "user", "content": "x" * 5000}],
    "\ufeff",
    b"bytes",
]


def malformed_rows(count: int, seed: int = 0) -> list[Any]:
    """`count` rows, each a good one that was harmed in one place or another."""
    rng = random.Random(seed)
    rows: list[Any] = []
    while len(rows) < count:
        good = {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Two plus two?"},
                {"role": "assistant", "content": "4"},
            ],
            "privileged_messages": [{"role": "user", "content": "The answer is four."}],
        }
        kind = rng.randrange(7)
        if kind == 0:
            good["messages"] = rng.choice(JUNK)
        elif kind == 1:
            good["privileged_messages"] = rng.choice(JUNK)
        elif kind == 2:
            rng.choice(good["messages"])[rng.choice(["role", "content"])] = rng.choice(JUNK)
        elif kind == 3:
            good["privileged_messages"][0][rng.choice(["role", "content"])] = rng.choice(JUNK)
        elif kind == 4:
            del rng.choice(good["messages"])[rng.choice(["role", "content"])]
        elif kind == 5:
            del good[rng.choice(["messages", "privileged_messages"])]
        else:
            good["messages"] = rng.sample(good["messages"], rng.randrange(4)) + rng.choice(
                [[], [rng.choice(JUNK)], [{"role": "user", "content": "and now?"}]]
            )
        rows.append(good)
    return rows
