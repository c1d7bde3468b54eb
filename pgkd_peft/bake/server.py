"""Questions written by any OpenAI-compatible server, which helps where the base is small."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import ConfigError, PGKDError, reason
from .ask import Task, tidy

IN_FLIGHT = 8
TRIES = 5
INSTRUCTION = (
    "You write what a user might ask who has not seen the text below. Write exactly one {kind} question that the text "
    "answers. Name what it is about, and do not speak of a text or document. Begin with {opening!r}. Reply with the "
    "question alone."
)


class WriterError(PGKDError):
    """The server that writes questions does not answer; what was written so far is kept."""


class ServerWriter:
    """Questions from ``{url}/chat/completions``.

    Args:
        url: up to and including ``/v1``.
        model: its name there.
        key_env: environment variable with the key; a local server needs none.
    """

    def __init__(self, url: str, model: str, *, key_env: str = "OPENAI_API_KEY"):
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ConfigError(
                'writer_url needs the client of OpenAI\'s protocol: pip install "pgkd-peft[writer]"'
            ) from error
        key = os.environ.get(key_env) or "none"
        self.client = OpenAI(base_url=url, api_key=key, timeout=120.0, max_retries=0)
        self.url = url
        self.model = model
        self.wait = 1.0  # seconds before the second try; doubled each time

    def questions(self, tasks: Sequence[Task], earlier: dict[int, list[str]], path: tuple[int, ...]) -> list[str]:
        """A question a task, at most :data:`IN_FLIGHT` requests at a time.

        Raises:
            WriterError: the server is away; call again when it is back.
        """
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            return list(pool.map(lambda task: self._ask(task, earlier.get(task.passage.number, [])), tasks))

    def _ask(self, task: Task, earlier: Sequence[str]) -> str:
        known = "".join(f"\n- {question}" for question in earlier[-20:])
        text = f"Text:\n{task.passage.privileged}" + (f"\n\nAlready asked:{known}" if known else "")
        messages: list[Any] = [
            {"role": "system", "content": INSTRUCTION.format(kind=task.kind, opening=task.opening)},
            {"role": "user", "content": text},
        ]
        for attempt in range(TRIES):
            try:
                reply = self.client.chat.completions.create(
                    model=self.model, messages=messages, max_tokens=80, temperature=0.8
                )
                return tidy(reply.choices[0].message.content or "")
            except Exception as error:
                if getattr(error, "status_code", 500) in (400, 401, 403, 404) or attempt == TRIES - 1:
                    raise WriterError(
                        f"--writer_url {self.url}: {reason(error)} What was written so far is kept: run the same "
                        "command again when it answers."
                    ) from error
                time.sleep(self.wait * 2**attempt)
        raise AssertionError
