"""Rollouts by vLLM servers: prompts go as token ids, token ids and their log-probabilities come back.

The protocol is that of ``vllm serve --enable-lora``. Before an optimizer step's rollouts the adapter, and nothing else,
is written to a folder that trainer and servers both see, and every server loads it. It has a new name and a new path
each time: under one name, a server may answer from prefixes that it has read with the earlier weights, and one that
was told to load in place reads the files again for every token. A request that names an adapter which a server does not
hold is refused by it, and never answered by the base.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..config import PrivilegedGKDConfig
from ..errors import ConfigError, PGKDError, reason
from ..model.adapters import STUDENT
from ..model.load import DEFAULT_LORA
from ..model.student import is_adapter_folder
from ..run.checkpoint import checkpoints
from ..run.folder import ADAPTER_CONFIG, ADAPTER_FILE, ROLLOUT_FOLDER
from .merged import not_mergeable

T = TypeVar("T")

IN_FLIGHT = (
    64  # requests that one process has open at one server; the server itself decides how many it decodes at once
)
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


class RolloutServers:
    """The servers of a run, and the adapter that they hold. Ranks share them; the first one sends the adapter.

    Args:
        args: the run's settings.

    Attributes:
        name: of the adapter that was sent last.
        accelerator: set when there is one; until then this process is alone.
    """

    def __init__(self, args: PrivilegedGKDConfig):
        assert args.rollout_server_url is not None
        self.servers = [
            Server(number, url, args.rollout_server_timeout) for number, url in enumerate(args.rollout_server_url)
        ]
        self.output_dir = str(args.output_dir)
        folder = args.rollout_server_folder or Path(self.output_dir) / ROLLOUT_FOLDER
        self.folder = Path(folder).absolute()
        self.rank = args.process_index
        self.accelerator: Any = None
        self.run = 0  # a number that the names of this process's adapters begin with
        self.sent = 0
        self.name = ""
        self.under_way = False  # whether there is a run to go on with

    # ---- before a model is loaded ----------------------------------------------------------------------------------

    def check(self, tokenizer: PreTrainedTokenizerBase, longest: int, lora: LoraConfig | None) -> None:
        """That each server answers, has the tokenizer and the room, and loads adapters of this rank.

        Args:
            longest: tokens of the longest prompt and its completion.
            lora: settings of the adapter; None where they are not known yet.

        Raises:
            RolloutServerError, ConfigError: names the server and what to start it with.
        """
        for server in self.servers:
            room = server.look()
            if room is not None and longest > room:
                raise RolloutServerError(
                    f"the longest prompt and max_new_tokens are {longest} tokens together, and {server.url} takes "
                    f"{room}. Start it with --max-model-len {longest}, or lower max_length or max_new_tokens."
                )
            server.check_tokens(tokenizer)
        if lora is not None:
            check_servable(lora)
            if self.rank == 0:
                self._try_to_load(lora)

    def _try_to_load(self, lora: LoraConfig) -> None:
        """The settings of the run's adapter without its weights: what a server refuses of them, it refuses now."""
        folder = self._new_folder("check")
        targets = lora.target_modules if isinstance(lora.target_modules, str) else sorted(lora.target_modules or ())
        settings = {"peft_type": "LORA", "r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": targets}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        save_file({}, folder / ADAPTER_FILE)
        name = f"pgkd-check-{os.getpid()}"
        try:
            for server in self.servers:
                server.would_load(name, folder, lora.r)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self._remove_empty()

    def _new_folder(self, name: str) -> Path:
        """An empty folder that other users can read."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for made in (self.folder, folder):
            made.chmod(0o755)
        return folder

    def _remove_empty(self) -> None:
        with suppress(OSError):  # not empty, or gone
            self.folder.rmdir()

    # ---- once an optimizer step --------------------------------------------------------------------------------------

    def begin(self, student: PeftModel, accelerator: Any) -> None:
        """All ranks have come together: they agree on how adapters are called, and the servers take the first one.

        Raises:
            ConfigError: vLLM would not serve this student. RolloutServerError: see :meth:`sync`.
        """
        check_servable(student.peft_config[STUDENT])
        why = not_mergeable(student)
        if why:
            raise ConfigError(f"rollout_engine='server' cannot be used: {why}. Use rollout_engine='adapter'.")
        self.accelerator = accelerator
        if self.rank == 0 and self.folder == Path(self.output_dir).absolute() / ROLLOUT_FOLDER:
            shutil.rmtree(self.folder, ignore_errors=True)  # what a run that was killed has left
        own = torch.tensor([int.from_bytes(os.urandom(3))], device=accelerator.device)
        self.run = int(accelerator.gather(own)[0])
        self.sync(student)

    def sync(self, student: PeftModel) -> None:
        """Send the student's adapter as it is now to every server; of all ranks, the first one does.

        Raises:
            RolloutServerError: a server does not take it.
        """
        previous, self.sent = self.name, self.sent + 1
        self.name = f"pgkd-{self.run:06x}-{self.sent}"
        self._together(lambda: self._send(student, previous) if self.rank == 0 else None)

    def _send(self, student: PeftModel, previous: str) -> None:
        folder = self._new_folder(self.name)
        student.save_pretrained(str(folder), selected_adapters=[STUDENT])
        for path in folder.iterdir():
            path.chmod(0o644)
        rank = student.peft_config[STUDENT].r
        self._run([(server, partial(server.load, self.name, folder, rank)) for server in self.servers])
        self._forget(previous)

    def _forget(self, name: str) -> None:
        if name:
            for server in self.servers:
                server.unload(name)
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def close(self) -> None:
        """At the end of training: the servers and the disk are as before."""
        if self.rank == 0 and self.name:
            self._forget(self.name)
            self._remove_empty()
        self.name = ""

    def write(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: Sampling, *, base: bool = False
    ) -> list[Written]:
        """A completion a prompt, by the adapter that was sent last or, with `base`, without one.

        Prompt i goes to server i modulo their number, counted from the rank; each has a seed of its own, so what it
        becomes does not hang on what else is decoded beside it, up to rounding in the server.

        Raises:
            RolloutServerError: a server does not answer, on this rank or another. Nothing of the step was counted.
        """
        jobs = []
        for i, (prompt, seed) in enumerate(zip(prompts, seeds)):
            server = self.servers[(i + self.rank) % len(self.servers)]
            name = server.base if base else self.name
            jobs.append((server, partial(server.complete, name, prompt, seed, settings)))
        return self._together(lambda: self._run(jobs))

    def _run(self, jobs: Sequence[tuple[Server, Callable[[threading.Event], T]]]) -> list[T]:
        """The jobs, at most :data:`IN_FLIGHT` at a server; the first that fails ends all."""
        stop = threading.Event()
        with ExitStack() as stack:
            pools = {server: stack.enter_context(ThreadPoolExecutor(IN_FLIGHT)) for server in self.servers}
            futures: list[Future[T]] = [pools[server].submit(job, stop) for server, job in jobs]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                failed = [error for future in done if (error := future.exception()) is not None]
                if failed:
                    raise failed[0]
                return [future.result() for future in futures]
            finally:
                stop.set()
                for future in futures:
                    future.cancel()

    def _together(self, do: Callable[[], T]) -> T:
        """`do` on this rank; where it fails on one, all stop: the others would wait for it."""
        failure: RolloutServerError | None = None
        result: T | None = None
        try:
            result = do()
        except RolloutServerError as error:
            failure = error
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            failed = torch.tensor([int(failure is not None)], device=self.accelerator.device)
            if self.accelerator.gather(failed).any() and failure is None:
                failure = RolloutServerError("another rank has lost its rollout server")
        if failure is not None:
            raise RolloutServerError(f"{str(failure).rstrip('.')}. {self._how_to_go_on()}".rstrip()) from failure
        return result  # type: ignore[return-value]

    def _how_to_go_on(self) -> str:
        if not self.under_way:
            return ""
        last = next(iter(checkpoints(self.output_dir)), None)
        if last is None:
            return "There is no checkpoint yet (save_steps): run the same command with --overwrite when it is back."
        return (
            f"Nothing of this step was counted. When the server is back, go on from {last}: the same command with "
            "--resume, or train(resume_from_checkpoint=True)."
        )


class ServersLetGo(TrainerCallback):
    """At the end of training the rollout servers forget the adapter."""

    def __init__(self, servers: RolloutServers):
        self.servers = servers

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.servers.close()


def connect(
    args: PrivilegedGKDConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt_lengths: Sequence[int],
    model: Any,
    peft_config: PeftConfig | None,
) -> RolloutServers | None:
    """The servers of the run, asked what can be asked before a model is loaded; None with another engine, and where
    the student writes nothing.

    Raises:
        RolloutServerError, ConfigError: see :meth:`RolloutServers.check`.
    """
    if args.rollout_engine != "server" or args.lmbda == 0:
        return None
    if isinstance(model, PeftModel):
        peft_config = model.peft_config.get(STUDENT)
    elif is_adapter_folder(model):
        peft_config = LoraConfig.from_pretrained(model)
    elif peft_config is None:
        peft_config = LoraConfig(**DEFAULT_LORA, target_modules="all-linear")
    servers = RolloutServers(args)
    longest = max(prompt_lengths, default=0) + args.max_new_tokens
    servers.check(tokenizer, longest, peft_config if isinstance(peft_config, LoraConfig) else None)
    return servers


def check_servable(lora: LoraConfig) -> None:
    """Raises ConfigError for LoRA settings that vLLM does not serve, or would serve as something else."""
    for name in (
        *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"),
        *("rank_pattern", "alpha_pattern"),  # older servers read one rank and one alpha
    ):
        if getattr(lora, name, None):
            raise ConfigError(
                f"rollout_engine is 'server', and vLLM serves no LoRA with {name}={getattr(lora, name)!r}. Remove it, "
                "or use rollout_engine='adapter'."
            )


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
