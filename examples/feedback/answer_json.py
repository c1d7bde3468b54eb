"""Feedback on a format: an answer must be JSON that a program can read, {"answer": "..."}.

The teacher is told what the program would say; an answer that passes gets no feedback. Use it as
`--feedback examples/feedback/answer_json.py:feedback --feedback_without skip`, and to judge as
`--scorer examples/feedback/answer_json.py:passes`. The recipe answer_json.yaml does both.
"""

from __future__ import annotations

import json

NO_JSON = 'Write your answer as JSON, like this: {"answer": "..."}'
OTHER_KEYS = 'The JSON must have "answer", and nothing else, like this: {"answer": "..."}'


def fault(answer):
    """What is wrong with an answer, for the one who wrote it; "" for a good one."""
    try:
        read = json.loads(answer)
    except ValueError:
        return NO_JSON
    good = isinstance(read, dict) and set(read) == {"answer"} and isinstance(read["answer"], str)
    return "" if good else OTHER_KEYS


def passes(answer, row):
    """1.0 for an answer in the format, else 0.0."""
    return float(fault(answer) == "")


def feedback(row, answers):
    """One text an answer."""
    return [fault(answer) for answer in answers]
