"""What a step measures: sums that stay on the device where they arise, read once a log; and the phases' seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

PHASES = ("rollout", "teacher", "student")

# Every name that is ever summed, in the order in which ranks exchange them.
NAMES = (
    *("windows", "rows", "on_policy", "generated", "truncated", "completion_tokens", "loss_tokens"),
    *("privileged_rows", "privileged_tokens_cut"),
    *("divergence", "student_entropy", "teacher_entropy", "top1_agreement", "sampled_logprob"),
    *(f"seconds_{phase}" for phase in PHASES),
    *("ema_cut_off", "taken_over"),
    *("rollout_mismatch", "proven_tokens"),
)


class Meters:
    """Sums since the last log, of training and of evaluation apart.

    Args:
        device: where a step runs; on a GPU the phases are timed by events, so that the host does not wait for them.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._sums: dict[str, dict[str, Any]] = {"train": {}, "eval": {}}
        self._events: list[tuple[str, str, Any, Any]] = []

    def add(self, mode: str, **values: float | torch.Tensor) -> None:
        """Add to the sums of `mode` ("train", "eval"); tensors are summed in float64 without being read."""
        sums = self._sums[mode]
        for name, value in values.items():
            assert name in NAMES, name
            if isinstance(value, torch.Tensor):
                value = value.detach().sum().double()
            sums[name] = sums.get(name, 0.0) + value

    @contextlib.contextmanager
    def timed(self, mode: str, phase: str) -> Iterator[None]:
        """Count the seconds that the body takes, on the device, as those of a phase of the step."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            yield
            self.add(mode, **{f"seconds_{phase}": time.perf_counter() - start})
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((mode, phase, start, end))

    def read(self, mode: str) -> dict[str, float]:
        """The sums as numbers: the one place where the host waits for the device."""
        for owner, phase, start, end in self._events:
            end.synchronize()
            self.add(owner, **{f"seconds_{phase}": start.elapsed_time(end) / 1000})
        self._events.clear()
        return {name: float(value) for name, value in self._sums[mode].items()}

    def reset(self, mode: str, sums: dict[str, float] | None = None) -> None:
        """Begin anew, or go on from what a checkpoint holds."""
        self._sums[mode] = dict(sums or {})


def over_ranks(sums: dict[str, float], accelerator: Any) -> dict[str, float]:
    """The sums of all ranks; what no rank has measured stays out."""
    if accelerator.num_processes == 1:
        return sums
    pairs = [[sums.get(name, 0.0), float(name in sums)] for name in NAMES]
    own = torch.tensor([pairs], dtype=torch.float64, device=accelerator.device)
    total = accelerator.gather(own).sum(0).tolist()
    return {name: value for name, (value, ranks) in zip(NAMES, total) if ranks}


def means_of(sums: dict[str, float]) -> dict[str, float]:
    """Sums since the last log -> what is logged."""
    means: dict[str, float] = {}

    def mean(name: str, over: str, source: str | None = None) -> None:
        if sums.get(over):
            means[name] = sums.get(source or name, 0.0) / sums[over]

    for name in ("divergence", "student_entropy", "teacher_entropy", "top1_agreement", "sampled_logprob"):
        mean(name, "loss_tokens")
    mean("rollout_mismatch", "proven_tokens")
    mean("completion_length", "rows", "completion_tokens")
    mean("truncated_completions", "generated", "truncated")
    mean("on_policy", "rows")
    mean("privileged_rows", "rows")
    if "taken_over" in sums:
        mean("taken_over", "completion_tokens")
    seconds = [f"seconds_{phase}" for phase in PHASES]
    for name in (*seconds, "ema_cut_off"):
        if name in sums:
            mean(name, "windows")
    if sums.get("rows"):
        means["privileged_tokens_cut"] = sums.get("privileged_tokens_cut", 0.0)
        means["loss_tokens"] = sums.get("loss_tokens", 0.0)
    total = sum(sums.get(name, 0.0) for name in seconds)
    if total:
        means["tokens_per_second"] = sums.get("completion_tokens", 0.0) / total
    return means
