"""Runs of a tiny model in processes of their own, which can be killed at a chosen place, and what they left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

# Seven rows, so that neither the batch nor the accumulation window divides the epoch.
SETTINGS = {
    "lmbda": 0.5,
    "temperature": 1.0,
    "max_new_tokens": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 7,
    "logging_steps": 3,
    "save_steps": 2,
    "learning_rate": 0.01,
    "warmup_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "base_quantization": "none",
    "bf16": False,
    "rollout_log_steps": 2,
    "rollout_log_max_new_tokens": 4,
}


def rows() -> list[dict[str, Any]]:
    from tiny import ROWS

    return [*ROWS, *ROWS[:3]]


def make_trainer(base: str, out: str, *, settings: dict[str, Any] | None = None, model: Any = None, **kwargs: Any):
    """A trainer with a LoRA that has dropout, so that the random state matters."""
    import torch
    from peft import LoraConfig

    from pgkd_peft import PrivilegedGKDConfig, PrivilegedSelfDistillTrainer

    torch.set_num_threads(1)
    settings = {**SETTINGS, "output_dir": out, **(settings or {})}
    dropout, only = settings.pop("_dropout", 0.2), settings.pop("_rows", None)
    lora = LoraConfig(
        r=2, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    kwargs.setdefault("train_dataset", rows() if only is None else [rows()[i] for i in only])
    if model is None:
        kwargs.setdefault("peft_config", lora)
    return PrivilegedSelfDistillTrainer(
        model=base if model is None else model, args=PrivilegedGKDConfig(**settings), **kwargs
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(trainer: Any, phase: str, step: int) -> None:
    """Kill this process (or do `phase`'s harm) when optimizer step `step` (from 0) gets there."""
    import pgkd_peft.base_trainer as base_trainer
    import pgkd_peft.trainer as module

    def hook(owner: Any, name: str, after: bool = False) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == step and not after:
                die()
            result = original(*args, **kwargs)
            if trainer.state.global_step == step:
                die()
            return result

        setattr(owner, name, wrapped)

    if phase == "rollout":
        hook(module, "generate", after=True)
    elif phase == "teacher":
        hook(module, "score_teacher")
    elif phase == "backward":
        hook(trainer.accelerator, "backward")
    elif phase == "between":  # after the forward and backward of a micro-batch
        hook(trainer, "training_step", after=True)
    elif phase == "save":  # adapter written, optimizer not
        hook(trainer, "_save_optimizer_and_scheduler")
    elif phase == "rename":  # all written, not in its place
        hook(base_trainer, "publish")
    elif phase == "renamed":
        hook(base_trainer, "publish", after=True)
    elif phase in ("sigterm", "sigint", "sighup", "nohup"):
        if phase == "sighup":  # the tests themselves may run under nohup
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if phase == "nohup":
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signum = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT}.get(phase, signal.SIGHUP)
        original = trainer.training_step

        def signalled(*args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == step:
                trainer.state.signalled = True
                os.kill(os.getpid(), signum)
                trainer.training_step = original
            return original(*args, **kwargs)

        trainer.training_step = signalled
    else:
        raise ValueError(phase)


def child(result: str, base: str, out: str, settings: dict, fault: tuple | None, resume: Any, env: dict) -> None:
    """Train; write what happened to the file `result`."""
    os.environ.update(env)
    sys.stdout = sys.stderr = open(result + ".log", "w", buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    import logging

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    outcome: dict[str, Any] = {}
    try:
        trainer = make_trainer(base, out, settings=settings)
        if fault is not None:
            arm(trainer, *fault)
        trainer.train(resume_from_checkpoint=resume)
        outcome["state"] = trainer.state.log_history
        outcome["completions"] = [row.completion for row in trainer.last_rows]
    except BaseException as error:
        traceback.print_exc()
        outcome["error"] = type(error).__name__
        outcome["message"] = str(error)
        outcome["signum"] = getattr(error, "signum", None)
    Path(result).write_text(json.dumps(outcome), encoding="utf-8")


def context() -> Any:
    """Processes forked from a server that has imported everything already: a second each instead of eight."""
    ctx = multiprocessing.get_context("forkserver")
    paths = [str(HERE), str(HERE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(p for p in paths if p))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ctx.set_forkserver_preload(["pgkd_peft.trainer", "tiny", "runs", "bitsandbytes"])
    return ctx


def start(base, out, *, settings=None, fault=None, resume=None, env=None, result=None) -> tuple[Any, str]:
    """Start a run; returns its process and the file that will hold its outcome."""
    result = result or f"{out}.result"
    Path(result).unlink(missing_ok=True)
    process = context().Process(target=child, args=(result, base, str(out), settings or {}, fault, resume, env or {}))
    process.start()
    return process, result


def finish(process: Any, result: str) -> dict[str, Any]:
    """Wait for a run; what it said, and its ``exitcode`` (-9: killed)."""
    process.join(240)
    assert process.exitcode is not None, "the run hangs"
    path = Path(result)
    outcome = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    log = Path(result + ".log")
    return {"exitcode": process.exitcode, "log": log.read_text(encoding="utf-8") if log.is_file() else "", **outcome}


def run_two(base, out, **kwargs: Any) -> list[dict[str, Any]]:
    """The same run on two processes, as ``accelerate launch`` or ``torchrun`` would start it."""
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    faults = kwargs.pop("faults", (None, None))
    started = [
        start(
            base,
            out,
            result=f"{out}.result{rank}",
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            fault=faults[rank],
            **kwargs,
        )
        for rank in range(2)
    ]
    return [finish(*each) for each in started]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run(base, out, **kwargs: Any) -> dict[str, Any]:
    return finish(*start(base, out, **kwargs))


# ---- comparing -----------------------------------------------------------------------------------------------------


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A loss log without what depends on the clock or on the call."""
    kept = []
    for entry in history:
        if "train_runtime" not in entry:
            kept.append({k: v for k, v in entry.items() if "second" not in k and "runtime" not in k})
    return kept


def contents(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint that training goes on from, as plain values."""
    import torch
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for name in ("adapter_model.safetensors", "teacher.safetensors"):
        if (checkpoint / name).is_file():
            found[name] = {k: v.tolist() for k, v in load_file(checkpoint / name).items()}
    for name in ("optimizer.pt", "scheduler.pt"):
        found[name] = _plain(torch.load(checkpoint / name, weights_only=True))
    found["log"] = timeless(json.loads((checkpoint / "trainer_state.json").read_text())["log_history"])
    progress = json.loads((checkpoint / "progress_0.json").read_text())
    progress["sums"] = {k: v for k, v in progress["sums"].items() if "second" not in k}
    found["progress"] = progress
    return found


def _plain(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
