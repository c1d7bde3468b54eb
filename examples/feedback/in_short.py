"""Feedback on a format: an answer must begin with "In short:", and go on.

The teacher is told what the checker says of an answer that does not; one that passes gets no feedback. Use it as
`--feedback examples/feedback/in_short.py:feedback --feedback_without skip`, and to judge as
`--scorer examples/feedback/in_short.py:passes`. The recipe in_short.yaml does both.
"""

from __future__ import annotations

import re

FORMAT = re.compile(r"In short:\s+\S")
FAULT = 'Begin your answer with the words "In short:".'


def passes(answer, row):
    """1.0 for an answer in the format, else 0.0."""
    return float(FORMAT.match(answer) is not None)


def feedback(row, answers):
    """One text an answer: what to do better, or "" where it passes."""
    return ["" if passes(answer, row) else FAULT for answer in answers]
