"""Feedback on small programs: each answer is run against the row's tests, in a process of its own with limits.

A row has `messages` (the task) and `tests`, lines of Python such as "assert double(3) == 6". The teacher is shown what
went wrong; an answer that passes gets no feedback. Use it as `--feedback examples/feedback/small_programs.py:feedback`.

The limits (seconds, memory, an empty folder, no inherited environment) stop accidents, not attacks: run code of a
model that you do not trust inside a container.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tempfile

SECONDS = 3
MEMORY = 512 * 2**20
_FENCED = re.compile(r"```(?:python)?\n(.*?)(?:```|\Z)", re.DOTALL)


def feedback(row, answers):
    """One text an answer: the error of its tests, or "" where they pass."""
    return [failure(program(answer), row["tests"]) for answer in answers]


def program(answer):
    """The code of an answer: its fenced block, else all of it."""
    found = _FENCED.search(answer)
    return found.group(1) if found else answer


def failure(code, tests):
    """What goes wrong when `tests` are run after `code`; "" when nothing does."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", f"{code}\n{tests}\n"],
                cwd=folder,
                env={},
                capture_output=True,
                text=True,
                timeout=SECONDS + 1,
                preexec_fn=_limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"The program did not end within {SECONDS} seconds."
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip().splitlines() or ["it was stopped"])[-1]
    return f"The tests were:\n{tests}\nThe program failed: {last[:300]}"


def _limit():
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
