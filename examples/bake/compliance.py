"""Does an answer keep the rules of terse.md and rules.md? Scorers for `pgkd eval`, run from this folder:

pgkd eval RUN --dataset_name requests_heldout.jsonl --privileged_file rules.md --scorer compliance:rules
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def terse(answer: str, row: Mapping[str, Any]) -> float:
    """1 for one sentence that ends, else 0."""
    return float(_is_one_sentence(answer.strip()))


def rules(answer: str, row: Mapping[str, Any]) -> float:
    """1 where all four hold, else 0: one sentence, no question mark, at most fifteen words, a full stop at the end."""
    text = answer.strip()
    return float(_is_one_sentence(text) and "?" not in text and len(text.split()) <= 15 and text.endswith("."))


def _is_one_sentence(text: str) -> bool:
    return text.endswith((".", "!", "?")) and re.search(r"[.!?]\s+\S", text) is None and "\n" not in text
