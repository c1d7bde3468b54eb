"""Does an answer keep the rules of terse.md and rules.md? Scorers for `pgkd eval`, run from this folder:

pgkd eval RUN --dataset_name requests_heldout.jsonl --privileged_file rules.md --scorer compliance:rules
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def terse(answer: str, row: Mapping[str, Any]) -> float:
    """1 where there are one to four words, else 0."""
    return float(1 <= len(answer.split()) <= 4)


def rules(answer: str, row: Mapping[str, Any]) -> float:
    """1 where all four hold, else 0: one sentence, no question mark, at most fifteen words, a full stop at the end."""
    text = answer.strip()
    one_sentence = bool(text) and re.search(r"[.!?]\s+\S", text) is None and "\n" not in text
    return float(one_sentence and "?" not in text and len(text.split()) <= 15 and text.endswith("."))
