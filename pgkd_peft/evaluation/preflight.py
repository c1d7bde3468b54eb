"""`pgkd inspect --preflight`: does the PI help, and will the run fit? With the model, before it is trained.

Two measurements on the recipe's own trainer: per-token KL of the teacher with PI against the student that starts, on
the student's own greedy answers; and a few real optimizer steps, clocked phase by phase, the last one with the
longest rows and rollouts that never stop.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from transformers import PrinterCallback, TrainerCallback

from ..model.adapters import adapter_state
from ..rollout import generate
from ..rollout_log import read_both, token_divergence
from ..rows import Row, rows_of
from ..run.memory import OutOfMemoryError, is_out_of_memory
from ..trainer import PrivilegedSelfDistillTrainer
from .scorers import Scorer, make_scorer

NOTHING_TO_LEARN = 0.01
"""Mean KL in nats a token below which the PI changes next to nothing: rounding in bfloat16 alone makes 1e-3, and a
fact that a model does not know makes 0.1 and more."""
SAMPLED_ROWS = 8


@dataclass
class Effect:
    """What the PI does to the model that starts, over `rows` sampled rows with PI.

    Attributes:
        kl: mean KL(teacher with PI || student) in nats a token of the student's greedy answers.
        top_share: share of the divergence in the top 1 % of tokens.
        answers: (prompt, student's answer, teacher's answer) of each row, greedy.
        scores: mean score of student and teacher, where the rows can be scored.
    """

    rows: int
    tokens: int
    kl: float
    top_share: float
    answers: list[tuple[str, str, str]]
    scores: tuple[float, float] | None


@dataclass
class Cost:
    """What optimizer steps need.

    Attributes:
        typical, worst: seconds a step by phase; `worst` has the longest rows, none of which stops by itself.
        peak: MiB by phase, in the worst step: allocated on a GPU, resident memory of the process on a CPU.
        limit: MiB there are.
        steps: optimizer steps of the recipe.
        failed: the phase that ran out of memory, or None.
    """

    typical: dict[str, float] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)
    limit: float = 0.0
    steps: int = 0
    failed: str | None = None


def probe_args(config: Any, folder: str) -> Any:
    """The recipe's settings for a few steps that leave nothing behind."""
    args = copy.copy(config)
    args.output_dir, args.report_to, args.push_to_hub = folder, [], False
    args.max_steps = 3 if torch.cuda.is_available() else 2  # on a GPU the first step only warms up
    args.eval_strategy = type(args.eval_strategy)("no")
    args.save_strategy = type(args.save_strategy)("no")
    args.load_best_model_at_end = False
    args.train_sampling_strategy = "sequential"
    args.disable_tqdm, args.rollout_log_steps, args.mask_truncated_completions = True, 0, False
    args.logging_strategy = type(args.logging_strategy)("no")
    args.resume_from_checkpoint = None
    return args


# ---- does the PI help? ---------------------------------------------------------------------------------------------


def measure_effect(trainer: ProbeTrainer, rows: Any, scorer: Scorer | None) -> Effect | None:
    """What the PI does on sampled rows; None when no row has PI."""
    generator = torch.Generator().manual_seed(trainer.args.seed)
    with_pi: list[tuple[Any, Row]] = []
    for i in torch.randperm(len(rows), generator=generator).tolist():
        row = rows_of(trainer.data_collator([rows[i]]))[0]
        if row.has_privileged:
            with_pi.append((rows[i], row))
        if len(with_pi) == SAMPLED_ROWS:
            break
    if not with_pi:
        return None
    raw, some = [r for r, _ in with_pi], [r for _, r in with_pi]
    settings: dict[str, Any] = {
        "max_new_tokens": trainer.args.max_new_tokens,
        "stop_ids": trainer.stop_ids,
        "pad_id": trainer.pad_id,
    }
    with adapter_state(trainer.model, "shared") as model:
        own = generate(model, [row.prompt for row in some], **settings)
    with trainer.teacher.weights() as model:
        better = generate(model, [row.teacher_prompt for row in some], **settings)
    for row, completion in zip(some, own):
        row.completion = completion
    values = token_divergence(trainer, *read_both(trainer, some), beta=0.0)
    tokenizer = trainer.processing_class
    texts = [[tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers] for answers in (own, better)]
    scores = None
    if scorer is not None:
        mine, theirs = (sum(scorer(text, row) for text, row in zip(answers, raw)) / len(raw) for answers in texts)
        scores = (mine, theirs)
    prompts = [trainer.data_collator.builder.build(row).student[-1]["content"] for row in raw]
    return Effect(
        rows=len(some),
        tokens=len(values),
        kl=float(values.mean()),
        top_share=top_share(values.tolist()),
        answers=list(zip(prompts, *texts)),
        scores=scores,
    )


def top_share(values: Sequence[float]) -> float:
    """Share of the sum that lies in the largest 1 % of the values (at least one of them)."""
    ordered = sorted(values, reverse=True)
    total = sum(ordered)
    return sum(ordered[: max(1, math.ceil(0.01 * len(ordered)))]) / total if total > 0 else 0.0


def scorer_for(rows: Any) -> Scorer | None:
    """Scoring by `contains`, where the rows have a column with the reference."""
    return make_scorer("contains") if "answer" in rows.column_names else None


# ---- will it fit, and how long will it take? -----------------------------------------------------------------------


class Clock:
    """Seconds and peak memory by phase. Phases nest: time counts for the innermost."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak: dict[str, float] = defaultdict(float)
        self.stack = ["rest"]
        self.failed: str | None = None
        self._since = time.perf_counter()
        self._cuda = torch.cuda.is_available()
        self._process = psutil.Process(os.getpid())
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._switch()
        self.stack.append(name)
        try:
            yield
        except BaseException:
            self.failed = self.failed or name
            raise
        finally:
            self._switch()
            self.stack.pop()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Watches memory meanwhile (a CPU has no record of its peak that could be reset)."""
        self._since = time.perf_counter()
        watch = threading.Thread(target=self._watch, daemon=True)
        watch.start()
        try:
            yield
        finally:
            self._switch()
            self._stop.set()
            watch.join()

    def restart(self) -> None:
        """Forget what was measured."""
        self._switch()
        with self._lock:
            self.seconds.clear()
            self.peak.clear()

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds and peak MiB by phase until now."""
        self._switch()
        return dict(self.seconds), dict(self.peak)

    def _switch(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.stack[-1]] += now - self._since
        self._since = now
        self._note_memory()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def _note_memory(self) -> None:
        used = torch.cuda.max_memory_allocated() if self._cuda else self._process.memory_info().rss
        with self._lock:
            self.peak[self.stack[-1]] = max(self.peak[self.stack[-1]], used / 2**20)

    def _watch(self) -> None:
        while not self._cuda and not self._stop.wait(0.02):
            self._note_memory()


class StepClock(TrainerCallback):
    """Reads the clock at the end of each step."""

    def __init__(self, trainer: ProbeTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.steps.append(self.trainer.clock.read())


class ProbeTrainer(PrivilegedSelfDistillTrainer):
    """The trainer with a clock. The last of its ``max_steps`` steps is the worst case: no rollout stops by itself."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.clock = Clock()
        self.steps: list[tuple[dict[str, float], dict[str, float]]] = []  # (seconds, peak MiB) by phase

        self.remove_callback(PrinterCallback)
        self.add_callback(StepClock(self))

    def on_policy_step(self) -> bool:
        return self.lmbda > 0  # every probe step pays for its rollouts; the estimate takes lmbda of them

    def roll_out_and_score(self, rows: list[Row], **kwargs: Any) -> list[Row]:
        self.clock.restart()  # what came before belongs to no step
        if self.state.global_step == self.args.max_steps - 1:
            self.stop_ids = []
        with self.clock.phase("teacher"):
            return super().roll_out_and_score(rows, **kwargs)

    def roll_out(self, rows: list[Row], **kwargs: Any) -> list[Row]:
        with self.clock.phase("rollout"):
            return super().roll_out(rows, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.clock.phase("student"):
            return super().training_step(*args, **kwargs)


def measure_cost(trainer: ProbeTrainer, rows: Any, window: int) -> Cost:
    """Run the probe's steps: random rows, then the longest ones."""
    steps = trainer.args.max_steps
    lengths = [len(trainer.data_collator.encode(row)["teacher_ids"]) for row in rows]
    generator = torch.Generator().manual_seed(trainer.args.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    random = [order[i % len(order)] for i in range(window * (steps - 1))]
    longest = sorted(range(len(rows)), key=lengths.__getitem__)[-window:]
    trainer.train_dataset = rows.select(random + [longest[i % len(longest)] for i in range(window)])
    cost = Cost(limit=memory_limit())
    try:
        with trainer.clock.running():
            trainer.train()
    except (OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not isinstance(error, OutOfMemoryError) and not is_out_of_memory(error):
            raise
        cost.failed = trainer.clock.failed or "rest"
    measured = trainer.steps
    if len(measured) >= steps - 1:
        cost.typical = measured[steps - 2][0]
        if trainer.lmbda < 1.0 and not trainer.seq_kd:
            cost.typical["rollout"] = cost.typical.get("rollout", 0.0) * trainer.lmbda
    if len(measured) >= steps:
        cost.worst, cost.peak = measured[steps - 1]
    return cost


def memory_limit() -> float:
    """MiB that this process can have: what is free, and what it has already."""
    if torch.cuda.is_available():
        return (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / 2**20
    return (psutil.virtual_memory().available + psutil.Process().memory_info().rss) / 2**20
