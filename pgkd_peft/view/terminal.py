"""Watching a run: a live view in a terminal, one in a notebook, plain lines elsewhere; and its metrics as a file."""

from __future__ import annotations

import atexit
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers import trainer as transformers_trainer

from ..data.tokens import visible
from ..run.folder import METRICS_FILE, STEP_FILES
from ..run.jsonl import append_lines, drop_after, is_number
from .notebook import NotebookView
from .progress import PHASES, SMALL, Pace, Watch
from .words import clock

if TYPE_CHECKING:
    from ..trainer import PrivilegedSelfDistillTrainer

SPARKS = "▁▂▃▄▅▆▇█"
STYLES = dict(zip(PHASES, ("cyan", "yellow", "green")))


class MetricsFileCallback(TrainerCallback):
    """Every log of the run as a line in ``metrics.jsonl`` of its folder, with ``step`` and ``time`` (Unix seconds).

    When a run is resumed, the lines after its step are dropped from this and the other logs of its folder.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            for name in STEP_FILES:
                drop_after(Path(args.output_dir) / name, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            record = {"step": state.global_step, "time": round(time.time(), 3), **logs}
            append_lines(Path(args.output_dir) / METRICS_FILE, [record])


def install(trainer: PrivilegedSelfDistillTrainer, console: Console | None = None) -> TrainerCallback:
    """Replace the Trainer's progress bar by what suits where it runs: :class:`LiveView` in a terminal,
    :class:`~pgkd_peft.view.notebook.NotebookView` in Jupyter and Colab, :class:`PlainLines` elsewhere and with
    ``disable_tqdm``."""
    bar = transformers_trainer.DEFAULT_PROGRESS_CALLBACK
    for kind in (bar, ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    console = console or Console(highlight=False)
    callback: TrainerCallback
    if trainer.args.disable_tqdm or not hasattr(trainer, "last_rows"):  # the control sft has no rollouts to show
        callback = PlainLines()
    elif bar is not ProgressCallback:  # Transformers has found itself in a notebook
        callback = NotebookView(trainer)
    else:
        live = console.is_terminal and not console.is_dumb_terminal
        callback = LiveView(trainer, console) if live else PlainLines()
    trainer.add_callback(callback)
    return callback


class PlainLines(TrainerCallback):
    """One line a log, for files and pipes."""

    def __init__(self) -> None:
        self.pace = Pace()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pace = Pace()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pace.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not (state.is_world_process_zero and logs):
            return
        width = len(str(state.max_steps))
        head = f"step {state.global_step:>{width}}/{state.max_steps}"
        if "train_runtime" in logs:
            print(f"{head}  done in {clock(logs['train_runtime'])}", flush=True)
            return
        parts = [head, *metric_parts(logs)]
        if self.pace.seconds_a_step is not None and not any(key.startswith("eval_") for key in logs):
            parts.append(f"{self.pace.seconds_a_step:.2f} s/step")
            parts.append(f"{clock(self.pace.left(state.max_steps - state.global_step))} left")
        print("  ".join(parts), flush=True)


def metric_parts(logs: Mapping[str, Any]) -> list[str]:
    """What one line says of a log: of an evaluation every number, of a training step the important ones."""
    if any(key.startswith("eval_") for key in logs):
        hidden = ("runtime", "per_second", "seconds", "privileged", "loss_tokens", "on_policy")
        return [
            f"{key} {value:.4g}"
            for key, value in logs.items()
            if key.startswith("eval_") and is_number(value) and not any(part in key for part in hidden)
        ]
    trained = "divergence" if "divergence" in logs else "loss"  # the SFT control logs a loss alone
    shown = (
        (trained, trained + " {:.4f}"),
        ("student_entropy", "entropy {:.2f}"),
        ("top1_agreement", "agreement {:.0%}"),
        ("completion_length", "length {:.0f}"),
        ("truncated_completions", "cut off {:.0%}"),
        ("rollout_mismatch", "mismatch {:.3f}"),
        ("grad_norm", "gradient {:.2g}"),
        ("learning_rate", "lr {:.2g}"),
        ("tokens_per_second", "{:.0f} tokens/s"),
    )
    return [form.format(logs[name]) for name, form in shown if is_number(logs.get(name))]


class LiveView(Watch):
    """Progress, curves of the last steps and the newest rollout, redrawn in place twice a second.

    Call :meth:`stop` when training ends by an exception: the cursor must come back.
    """

    def __init__(self, trainer: PrivilegedSelfDistillTrainer, console: Console | None = None):
        super().__init__(trainer)
        self.console = console or Console(highlight=False)
        self._live: Live | None = None
        self._handlers: list[tuple[logging.StreamHandler, Any]] = []

    # ---- the terminal ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take over the lower part of the terminal; what is printed or logged meanwhile appears above."""
        if self._live is not None:
            return
        stderr = sys.stderr
        self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=2)
        self._live.start()
        atexit.register(self.stop)
        for logger in [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]:
            for handler in logger.handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is stderr:
                    self._handlers.append((handler, handler.setStream(sys.stderr)))

    def stop(self) -> None:
        """Draw a last time and give the terminal back. Doing it twice does no harm."""
        live, self._live = self._live, None
        if live is None:
            return
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()
        live.stop()
        atexit.unregister(self.stop)

    # ---- the picture -----------------------------------------------------------------------------------------------

    def render(self) -> RenderableType:
        """The view as it is now."""
        wide = self.console.width >= 90
        width = self.console.width - 4
        parts: list[RenderableType] = [self._progress()]
        if self.history.get("divergence"):
            left = (width - 3) // 2 if wide else width
            chart, small = self._chart(left), self._sparklines(width - left - 3 if wide else width)
            if wide:
                grid = Table.grid(padding=(0, 3, 0, 0))
                grid.add_row(chart, small)
                parts += [Text(), grid]
            else:
                parts += [Text(), chart, Text(), small]
            parts += [Text(), self._phases(width)]
        if self.rollout is not None and self.console.height >= 24:
            parts += [Text(), *self._rollout(width)]
        title = f"[bold]pgkd[/] · {visible(Path(str(self.trainer.args.output_dir)).name).replace('[', '(')}"
        return Panel(Group(*parts), title=title, title_align="left", border_style="dim")

    def _progress(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        share = self.step / self.max_steps if self.max_steps else 0.0
        bar = ProgressBar(total=max(1, self.max_steps), completed=self.step, complete_style="green")
        pace, left = self.pace.seconds_a_step, self.pace.left(self.max_steps - self.step)
        times = f"{clock(self.pace.elapsed)} gone"
        if pace is not None:
            times += f" · {clock(left)} left · {pace:.2f} s/step"
        grid.add_row(f"step {self.step}/{self.max_steps}", bar, f"{share:.0%}")
        return Group(grid, Text(f"{self.status} · epoch {self.epoch:.2f} · {times}", style="dim"))

    def _chart(self, width: int, height: int = 7) -> RenderableType:
        values = list(self.history["divergence"])
        low, high = min(values), max(values)
        labels = [f"{high:.3g}", *[""] * (height - 2), f"{low:.3g}"]
        margin = max(map(len, labels))
        rows = curve(values, max(4, width - margin - 1), height)
        text = Text.assemble(("divergence ", "bold"), (f"{values[-1]:.4f}", "bold magenta"), (" nats/token", "dim"))
        for label, row in zip(labels, rows):
            text.append(f"\n{label:>{margin}} ", style="dim").append(row, style="magenta")
        return text

    def _sparklines(self, width: int) -> RenderableType:
        table = Table.grid(padding=(0, 2, 0, 0))
        labels = [label for name, label, _ in SMALL if self.history.get(name)]
        columns = max(6, width - max(map(len, labels), default=0) - 11)
        for name, label, form in SMALL:
            values = list(self.history.get(name, ()))
            if values:
                line = Text(sparkline(values, columns), style="cyan", no_wrap=True)
                table.add_row(Text(label, style="dim"), line, Text(format(values[-1], form), style="bold"))
        return table

    def _phases(self, width: int) -> RenderableType:
        seconds = self.phase_seconds
        total = sum(seconds.values())
        if not total:
            return Text()
        text = Text()
        for name, style in STYLES.items():
            text.append("━" * max(1, round(width * seconds[name] / total)), style=style)
        text.truncate(width)
        legend = Text("\n")
        for name, style in STYLES.items():
            legend.append("● ", style=style).append(f"{name} {seconds[name]:.2f} s   ")
        return text.append_text(legend)

    def _rollout(self, width: int) -> list[RenderableType]:
        assert self.rollout is not None
        prompt, answer = (" ".join(visible(text).split()) for text in self.rollout)
        room = 3 * width
        prompt = "…" + prompt[-(width - 10) :] if len(prompt) > width - 10 else prompt
        answer = answer[: room - 1] + "…" if len(answer) > room else answer
        return [Text.assemble(("rollout ", "bold"), (prompt, "dim")), Text(answer or "(empty)", style="italic")]


def resample(values: Sequence[float], points: int) -> list[float]:
    """At most `points` values, each the mean of an equal share of the given ones."""
    count = min(points, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as blocks of eight heights, lowest to highest; a constant is drawn low."""
    points = resample(values, width)
    low, high = min(points), max(points)
    span = high - low
    return "".join(SPARKS[round((value - low) / span * 7) if span else 0] for value in points)


def curve(values: Sequence[float], width: int, height: int) -> list[str]:
    """A line through the values in braille dots (2 x 4 a character), highest value at the top: `height` lines of
    `width` characters."""
    across, down = width * 2, height * 4
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    points = resample(values, across)
    heights = [round((value - low) / span * (down - 1)) for value in points]
    cells = [[0] * width for _ in range(height)]
    bits = ((0x40, 0x80), (0x04, 0x20), (0x02, 0x10), (0x01, 0x08))  # from the lowest dot of a character upwards
    previous = heights[0]
    for x in range(across):
        place = x * (len(points) - 1) / max(1, across - 1)
        i = min(int(place), len(points) - 1)
        j = min(i + 1, len(points) - 1)
        y = round(heights[i] + (heights[j] - heights[i]) * (place - i))
        for dot in range(min(previous, y) + (previous < y), max(previous, y) + (previous <= y)) if x else (y,):
            cells[height - 1 - dot // 4][x // 2] |= bits[dot % 4][x % 2]
        cells[height - 1 - y // 4][x // 2] |= bits[y % 4][x % 2]
        previous = y
    return ["".join(chr(0x2800 + cell) for cell in row) for row in cells]
