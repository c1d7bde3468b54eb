"""The rollout servers of a run: asked before a model is loaded, sent the adapter once an optimizer step.

The adapter, and nothing else, is written to a folder that trainer and servers both see, and every server loads it. It
has a new name and a new path each time: under one name, a server may answer from prefixes that it has read with the
earlier weights, and one that was told to load in place reads the files again for every token.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..config import PrivilegedGKDConfig
from ..errors import ConfigError
from ..model.adapters import STUDENT
from ..model.load import DEFAULT_LORA
from ..model.student import is_adapter_folder
from ..run.checkpoint import checkpoints
from ..run.folder import ADAPTER_CONFIG, ADAPTER_FILE, ROLLOUT_FOLDER
from .merged import not_mergeable
from .server import RolloutServerError, Sampling, Server, Written

T = TypeVar("T")

IN_FLIGHT = 64
"""Requests that one process has open at one server, which itself decides how many it decodes at once."""


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
