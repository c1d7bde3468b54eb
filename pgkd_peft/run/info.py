"""A run explains itself: ``run.json`` says what was trained on what, with which versions, at what cost."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Trainer, TrainerCallback

from .. import __version__
from ..data.check import DataReport
from ..model.adapters import STUDENT
from ..model.load import base_of, quantization_name
from ..rows import Row
from .folder import HOLDOUT_FILE, RUN_FILE, failed_batch_name
from .jsonl import write_json

logger = logging.getLogger(__name__)

SFT_IN_WORDS = "cross-entropy of the reference answers, without PI; mean over completion tokens, in nats"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")


class RunInfo:
    """Collects what ``run.json`` holds; written at the start, at every save and at the end of training."""

    def __init__(self, trainer: Trainer, loaded: str, report: DataReport | None):
        self.trainer = trainer
        self.loaded = loaded
        self.report = report
        self.control: str | None = None
        self.held_out: dict[str, Any] | None = None
        self.finished = False
        self.when_begun: list[Callable[[], None]] = []  # what else is written to the run folder then, before run.json
        self.started = 0.0
        self.seconds = 0.0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Write ``run.json`` when training begins and, with the time that the body took, at the end; nothing when it
        never begins, because a checkpoint to go on from was refused."""
        self.started = time.perf_counter()
        begin = _Begin(self)
        self.trainer.callback_handler.callbacks.insert(0, begin)  # before those that append to the run's logs
        try:
            yield
        finally:
            self.seconds = time.perf_counter() - self.started
            self.trainer.remove_callback(begin)
            if begin.begun:
                try:
                    self.write(self.trainer.args.output_dir)
                except OSError as error:  # must not hide what ended the run
                    logger.warning("run.json could not be brought up to date: %s", error)

    def collect(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        trainer, args = self.trainer, self.trainer.args
        base = base_of(trainer.model)
        quantization = getattr(base.config, "quantization_config", None)
        if quantization is not None and not isinstance(quantization, dict):
            quantization = quantization.to_dict()
        adapter = [p for p in trainer.model.parameters() if p.requires_grad]
        settings = args.to_dict()
        return {
            "pgkd_peft": __version__,
            "base_model": trainer.model.peft_config[STUDENT].base_model_name_or_path,
            "base_quantization": quantization_name(quantization),
            "quantization_config": quantization,
            "compute_dtype": str(base.get_input_embeddings().weight.dtype).removeprefix("torch."),
            "base_digest": trainer.frozen.digest,
            "loaded": self.loaded,
            "control": self.control,
            "divergence": args.divergence_in_words() if self.control != "sft" else SFT_IN_WORDS,
            "teacher_adapter": args.teacher_adapter if self.control != "sft" else None,
            "adapter_parameters": sum(p.numel() for p in adapter),
            "adapter_bytes": sum(p.numel() * p.element_size() for p in adapter),
            "dataset_fingerprint": self.report.fingerprint if self.report else None,
            "dataset_rows": self.report.rows if self.report else None,
            "dataset_rows_with_privileged": self.report.rows_with_privileged if self.report else None,
            "privileged_tokens_cut": sum(self.report.privileged_tokens_cut) if self.report else None,
            "holdout_prompts": HOLDOUT_FILE if (Path(str(args.output_dir)) / HOLDOUT_FILE).is_file() else None,
            "held_out": self.held_out,
            "command": command_line(sys.argv),
            "seed": args.seed,
            "automatic": {name: {"value": value, "reason": why} for name, (value, why) in args.automatic.items()},
            "config": {key: settings[key] for key in sorted(settings) if "token" not in key or key.endswith("tokens")},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "device": device_name(),
            "threads": torch.get_num_threads(),
            "git_revision": git_revision(),
            "steps": trainer.state.global_step,
            "seconds": round(self.seconds, 2),
            "finished": self.finished,
            "peak_memory_mib": peak_memory_mib(),
        }

    def write(self, folder: str | os.PathLike) -> None:
        if not self.trainer.is_world_process_zero():
            return
        write_json(Path(folder) / RUN_FILE, self.collect())

    def save_batch(self, rows: list[Row], tokenizer: Any) -> Path:
        """Write the rows of a batch that went wrong; returns where."""
        path = Path(self.trainer.args.output_dir) / failed_batch_name(self.trainer.state.global_step)
        records = [
            {
                "prompt": tokenizer.decode(row.prompt),
                "teacher_prompt": tokenizer.decode(row.teacher_prompt),
                "completion": tokenizer.decode(row.completion),
                "completion_ids": row.completion,
                "teacher_finite": row.teacher_hidden is None or bool(torch.isfinite(row.teacher_hidden).all()),
            }
            for row in rows
        ]
        write_json(path, records)
        return path


class _Begin(TrainerCallback):
    """Writes the first files of a run, when data, model and checkpoint were accepted and the first step is next."""

    def __init__(self, info: RunInfo):
        self.info = info
        self.begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = True
        if self.info.trainer.is_world_process_zero():
            for write in self.info.when_begun:
                write()
        self.info.write(args.output_dir)


def device_name() -> str:
    """The GPU's name, or the CPU's with its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"CPU {model}, {os.cpu_count()} cores"


def peak_memory_mib() -> dict[str, float]:
    """Peak resident memory of this process and, on a GPU, peak allocated device memory, in MiB."""
    peak = {"process": round(_peak_resident() / 2**20, 1)}
    if torch.cuda.is_available():
        peak["cuda"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak


def _peak_resident() -> int:
    """Bytes. Windows has no getrusage; psutil knows its peak working set."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def git_revision() -> str | None:
    """Revision of the git checkout that the run was started in, marked when it had uncommitted changes; else None."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")


def command_line(argv: Sequence[str]) -> str:
    """What was typed; ``python -m pgkd_peft`` is `pgkd`."""
    program = Path(argv[0])
    ours = program.name == "__main__.py" and program.parent.name == "pgkd_peft"
    return shlex.join(["pgkd" if ours else program.name, *argv[1:]])
