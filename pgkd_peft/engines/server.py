"""Rollouts by a vLLM server: prompts go as token ids, token ids and their log-probabilities come back.

The protocol is that of ``vllm serve --enable-lora``. A request that names an adapter which a server does not hold is
refused by it, and never answered by the base.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import PGKDError, reason

TRIES = 5
WAIT = 1.0  # seconds before the second try; doubled each time
QUICK = 30.0  # seconds for an answer that takes no decoding
RETRIED = (408, 425, 429)  # beside 500 and above
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would not find localhost

# The same text must be the same ids on both sides: words, digits, spaces and letters that tokenizers treat differently.
PROBE = "Zwölf  Boxkämpfer,\n\t12345 + 67.8 = ? naïve 東京 🙂 <|im_start|>user"


class RolloutServerError(PGKDError):
    """A server that writes rollouts cannot be used as it was started, does not answer, or answers what cannot be."""


class _Refused(Exception):
    """What a server said no to; asking again would not help."""

    def __init__(self, status: int, message: str):
        self.status, self.message = status, message
        super().__init__(f"{message} (HTTP {status})")


@dataclass(frozen=True)
class Written:
    """A completion, the log-probability of each of its tokens (nats, at temperature 1) there, and by which server."""

    ids: list[int]
    logprobs: list[float]
    server: int


class Server:
    """One server, as far as rollouts need it.

    Args:
        number: among the servers of the run.
        url: without ``/v1``.
        timeout: seconds for an answer that takes decoding.
    """

    def __init__(self, number: int, url: str, timeout: float):
        self.number, self.url, self.timeout = number, url, timeout
        self.base = ""  # the name that it gives its base model
        self.wait = WAIT

    def call(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
        tries: int = TRIES,
        stop: threading.Event | None = None,
    ) -> str:
        """POST `body`, or GET; asked again where the server is busy, broken or away.

        Args:
            tries: with one, every answer that is no success is a no.

        Raises:
            RolloutServerError: it does not answer. _Refused: it says no.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['VLLM_API_KEY']}"
        stop = stop or threading.Event()
        why = ""
        for attempt in range(tries):
            if attempt and stop.wait(self.wait * 2 ** (attempt - 1)):
                break
            try:
                request = urllib.request.Request(self.url + path, data, headers)
                with DIRECT.open(request, timeout=timeout or self.timeout) as reply:
                    return reply.read().decode("utf-8", "replace")
            except urllib.error.HTTPError as error:
                status, message = error.code, _message_of(error)
                if tries == 1 or (status < 500 and status not in RETRIED):
                    raise _Refused(status, message) from error
                why = f"{message} (HTTP {status})"
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut short
                cause = getattr(error, "reason", None)  # of a URLError
                why = reason(cause if isinstance(cause, BaseException) else error)
        times = "once" if tries == 1 else f"{tries} times"
        raise RolloutServerError(f"the rollout server {self.url} does not answer: {why} ({path}, asked {times})")

    def post(self, path: str, body: dict[str, Any], **options: Any) -> dict[str, Any]:
        return self._object(self.call(path, body, **options))

    def _object(self, text: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise RolloutServerError(
                f"{self.url} does not speak vLLM's protocol: it answers {text[:80]!r}. Give the address that `vllm "
                "serve` prints, without a path."
            )
        return value

    def look(self) -> int | None:
        """Find the base model's name; returns the tokens that prompt and completion may have together, if it says so.

        Raises:
            RolloutServerError: it does not answer, or is no vLLM server.
        """
        try:
            models = self._object(self.call("/v1/models", timeout=QUICK, tries=2)).get("data")
        except _Refused as no:
            key = " Put its key into the environment as VLLM_API_KEY." if no.status in (401, 403) else ""
            raise RolloutServerError(
                f"rollout_server_url {self.url} is no vLLM server that can be used: {no}.{key}"
            ) from no
        bases = [card for card in models or [] if isinstance(card, dict) and not card.get("parent")]
        if not bases:
            raise RolloutServerError(f"rollout_server_url {self.url} serves no model (/v1/models is {models!r}).")
        self.base = str(bases[0].get("id"))
        length = bases[0].get("max_model_len")
        return int(length) if length else None

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises RolloutServerError where the same text has other token ids there."""
        try:
            reply = self.post("/tokenize", {"model": self.base, "prompt": PROBE, "add_special_tokens": False})
        except _Refused:  # switched off
            return
        own = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        if reply.get("tokens") is not None and list(reply["tokens"]) != list(own):
            raise RolloutServerError(
                f"{self.url} serves {self.base!r}, whose tokenizer gives other token ids than that of the model which "
                "trains. Serve the same base model."
            )

    def load(self, name: str, folder: Path, rank: int, stop: threading.Event | None = None) -> None:
        """Let it load the adapter in `folder`.

        Raises:
            RolloutServerError: it cannot; the message says what to start it with.
        """
        try:
            self.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, tries=1, stop=stop)
        except _Refused as no:
            advice = self._advice(no, folder, rank)
            raise RolloutServerError(f"the rollout server {self.url} does not load the adapter: {no}.{advice}") from no

    def would_load(self, name: str, folder: Path, rank: int) -> None:
        """Raises RolloutServerError where it says why it would take no adapter with the settings in `folder`, which
        holds no weights. What else it says of that is no matter."""
        try:
            self.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, tries=1)
        except _Refused as no:
            advice = self._advice(no, folder, rank)
            if advice:
                raise RolloutServerError(f"the rollout server {self.url} loads no adapter: {no}.{advice}") from no
        else:
            self.unload(name)

    def _advice(self, no: _Refused, folder: Path, rank: int) -> str:
        said, advice = no.message, ""
        if "max_lora_rank" in said:
            advice = f" Start it with --max-lora-rank {rank} or more, or train with a smaller lora_r."
        elif "not enabled" in said:
            advice = f" Start it with --enable-lora --max-lora-rank {rank}."
        elif "No adapter found" in said:
            advice = (
                f" It does not find {folder}: trainer and server must see one folder under one path, and the server's "
                "user must be allowed to read it. Name one with rollout_server_folder."
            )
        elif no.status in (404, 405):
            advice = (
                " Start it with --enable-lora and, in its environment, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True: without "
                "it there is no /v1/load_lora_adapter."
            )
        return advice

    def unload(self, name: str) -> None:
        """Let it forget an adapter; that it cannot is no harm."""
        with suppress(_Refused, RolloutServerError):
            self.call("/v1/unload_lora_adapter", {"lora_name": name}, timeout=QUICK, tries=1)

    def complete(
        self, model: str, prompt: Sequence[int], seed: int, settings: Sampling, stop: threading.Event
    ) -> Written:
        """One completion by `model`, the base's name or an adapter's."""
        body = {"model": model, "prompt": list(prompt), "seed": seed, **settings.fields()}
        try:
            reply = self.post("/v1/completions", body, stop=stop)
        except _Refused as no:
            again = " It no longer holds the adapter that it was sent: was it started anew?" if no.status == 404 else ""
            raise RolloutServerError(f"the rollout server {self.url} refuses a request: {no}.{again}") from no
        return self._checked(reply, prompt, settings)

    def _checked(self, reply: dict[str, Any], prompt: Sequence[int], settings: Sampling) -> Written:
        try:
            choice = reply["choices"][0]
            logprobs = choice["logprobs"]
            ids = choice.get("token_ids")
            if ids is None:  # before vLLM 0.10.2
                ids = [int(token.removeprefix("token_id:")) for token in logprobs["tokens"]]
            values = [float(value) for value in logprobs["token_logprobs"]]
            made = Written([int(token) for token in ids], values, self.number)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise RolloutServerError(
                f"{self.url} answers without token ids and their log-probabilities; rollouts need a vLLM server of "
                "version 0.10.2 or newer."
            ) from error
        read = choice.get("prompt_token_ids")
        if read is not None and list(read) != list(prompt):
            raise RolloutServerError(f"{self.url} has read another prompt than it was sent, {len(read)} tokens long.")
        end = next((i for i, token in enumerate(made.ids) if token in settings.stop_ids), settings.max_new_tokens - 1)
        if len(made.ids) != end + 1 or len(made.logprobs) != end + 1:
            raise RolloutServerError(
                f"{self.url} ended a completion after {len(made.ids)} tokens ({choice.get('finish_reason')!r}) where "
                f"the run's stop tokens and max_new_tokens={settings.max_new_tokens} end it after {end + 1}. Start it "
                "with --generation-config vllm, and a --max-model-len that holds prompt and completion."
            )
        return made


@dataclass(frozen=True)
class Sampling:
    """How the run samples: from the whole softmax at `temperature`, nothing else, whatever the model's
    ``generation_config`` says at the server."""

    temperature: float
    max_new_tokens: int
    stop_ids: frozenset[int]

    def fields(self) -> dict[str, Any]:
        """Of the request; every value that a server would otherwise take from its own defaults."""
        return {
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": 1,
            "stop_token_ids": sorted(self.stop_ids),
            "ignore_eos": True,  # the stop ids are all there are
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
        }


def _message_of(error: urllib.error.HTTPError) -> str:
    """What the body of an HTTP error says."""
    try:
        text = error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        value = json.loads(text)
        value = value.get("error", value)
        said = value if isinstance(value, str) else value.get("message") or value.get("detail") or text
    except (ValueError, AttributeError):
        said = text
    return " ".join(str(said).split())[:600].rstrip(".") or str(error.reason)
