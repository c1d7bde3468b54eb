"""Watching a run: a live view in a terminal, one in a notebook, plain lines elsewhere."""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
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
from transformers import PrinterCallback, ProgressCallback
from transformers import trainer as transformers_trainer

from ..data.tokens import visible
from ..run.console import drawing_on, shared_console
from ..run.jsonl import is_number
from ..run.meters import PHASES
from .notebook import NotebookView
from .progress import SMALL, Pace, View, Watch
from .words import clock

if TYPE_CHECKING:
    from ..base_trainer import RunTrainer
    from ..trainer import PrivilegedSelfDistillTrainer

SPARKS = "▁▂▃▄▅▆▇█"
STYLES = dict(zip(PHASES, ("cyan", "yellow", "green")))


def install(trainer: RunTrainer, console: Console | None = None) -> View:
    """Replace the Trainer's progress bar by what suits where it runs: :class:`LiveView` in a terminal,
    :class:`~pgkd_peft.view.notebook.NotebookView` in Jupyter and Colab, :class:`PlainLines` elsewhere and with
    ``disable_tqdm``. A bar that somebody has taken away is replaced by nothing; a view that is there already stays.

    Returns:
        The view; its ``stop`` is to be called when training ends, by an exception as well.
    """
    there = trainer.callback_handler.callbacks
    for callback in there:
        if isinstance(callback, View):
            return callback
    bar = transformers_trainer.DEFAULT_PROGRESS_CALLBACK
    bars = [callback for callback in there if isinstance(callback, (bar, ProgressCallback, PrinterCallback))]
    for callback in bars:
        trainer.remove_callback(callback)
    console = console or shared_console()
    view: View
    if not bars:
        return View()
    if trainer.args.disable_tqdm or not hasattr(trainer, "last_rows"):  # the control sft has no rollouts to show
        view = PlainLines()
    elif bar is not ProgressCallback:  # Transformers has found itself in a notebook
        view = NotebookView(trainer)
    else:
        live = console.is_terminal and not console.is_dumb_terminal
        view = LiveView(trainer, console) if live else PlainLines()
    trainer.add_callback(view)
    return view


class PlainLines(View):
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

    It takes the lower half of the terminal, so that what is printed and logged can be read above it.

    Call :meth:`stop` when training ends by an exception: the cursor must come back.
    """

    def __init__(self, trainer: PrivilegedSelfDistillTrainer, console: Console | None = None):
        super().__init__(trainer)
        self.console = console or shared_console()
        self._live: Live | None = None
        self._handlers: list[tuple[logging.StreamHandler, Any]] = []
        self._shared = contextlib.ExitStack()

    # ---- the terminal ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take over the lower part of the terminal; what is printed or logged meanwhile appears above."""
        if self._live is not None:
            return
        stderr = sys.stderr
        self._shared.enter_context(drawing_on(self.console))
        self._live = Live(
            get_renderable=self.render, console=self.console, refresh_per_second=2, vertical_overflow="crop"
        )
        # Drawn here first: a print that met the first draw of Rich's own thread would both start on one line.
        self._live.start(refresh=True)
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
        self._shared.close()
        atexit.unregister(self.stop)

    # ---- the picture -----------------------------------------------------------------------------------------------

    def render(self) -> RenderableType:
        """The view as it is now, at most half as high as the terminal (but eight lines)."""
        width = self.console.width - 4
        room = max(8, self.console.height // 2) - 2  # lines inside the border
        parts: list[RenderableType] = [self._progress(narrow=width < 70)]
        room -= 2
        phases = self._phases(width)
        rollout = self._rollout(width, lines=3 if room > 14 else 2 if room > 6 else 0)
        room -= len(rollout) + (phases is not None)
        if self.history.get("divergence"):
            parts += self._curves(width, room)
        parts += [phases] if phases is not None else []
        parts += rollout
        title = f"[bold]pgkd[/] · {visible(Path(str(self.trainer.args.output_dir)).name).replace('[', '(')}"
        return Panel(Group(*parts), title=title, title_align="left", border_style="dim")

    def _progress(self, narrow: bool) -> RenderableType:
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        share = self.step / self.max_steps if self.max_steps else 0.0
        bar = ProgressBar(total=max(1, self.max_steps), completed=self.step, complete_style="green")
        pace, left = self.pace.seconds_a_step, self.pace.left(self.max_steps - self.step)
        words = [self.status] if narrow else [self.status, f"epoch {self.epoch:.2f}"]
        words.append(f"{clock(self.pace.elapsed)} gone")
        if pace is not None:
            words += [f"{clock(left)} left", f"{pace:.2f} s/step"]
        grid.add_row(f"step {self.step}/{self.max_steps}", bar, f"{share:.0%}")
        return Group(grid, Text(" · ".join(words), style="dim", no_wrap=True, overflow="ellipsis"))

    def _curves(self, width: int, room: int) -> list[RenderableType]:
        """The divergence and the small curves in at most `room` lines; next to each other where there is the width."""
        small = [entry for entry in SMALL if self.history.get(entry[0])]
        if width >= 86 and room >= 7:
            left = (width - 3) // 2
            grid = Table.grid(padding=(0, 3, 0, 0))
            height = min(room - 2, max(4, len(small) - 1))
            grid.add_row(self._chart(left, height), self._sparklines(small[: room - 1], width - left - 3, 1))
            return [Text(), grid]
        columns = 2 if width >= 50 else 1
        lines = -(-len(small) // columns)
        chart = room - lines - 1  # of the divergence; what is left
        parts: list[RenderableType] = []
        if chart >= 3:
            parts.append(self._chart(width, min(chart, 6)))
            room -= 1 + min(chart, 6)
        else:
            parts.append(self._headline(width))
            room -= 1
        if room > 0 and small:
            parts.append(self._sparklines(small[: room * columns], width, columns))
        return parts

    def _headline(self, width: int) -> RenderableType:
        """The divergence in one line."""
        values = self.history["divergence"]
        unit = " nats/token " if width >= 40 else " "
        text = Text.assemble(
            ("divergence ", "bold"), (f"{values[-1]:.4f}", "bold magenta"), (unit, "dim"), no_wrap=True
        )
        return text.append(sparkline(values, max(1, width - text.cell_len)), style="magenta")

    def _chart(self, width: int, height: int) -> RenderableType:
        values = list(self.history["divergence"])
        low, high = min(values), max(values)
        labels = [f"{high:.3g}", *[""] * (height - 2), f"{low:.3g}"]
        margin = max(map(len, labels))
        rows = curve(values, max(4, width - margin - 1), height)
        text = Text.assemble(("divergence ", "bold"), (f"{values[-1]:.4f}", "bold magenta"), (" nats/token", "dim"))
        for label, row in zip(labels, rows):
            text.append(f"\n{label:>{margin}} ", style="dim").append(row, style="magenta")
        return text

    def _sparklines(self, entries: Sequence[tuple[str, str, str]], width: int, columns: int) -> RenderableType:
        """Name, curve and last value of each, filling one column of the table after the other."""
        gap, label, value = 3, 1 + max(len(name) for _, name, _ in entries), 7
        line = max(1, (width - gap * (columns - 1)) // columns - label - value)
        table = Table.grid(padding=0)
        for i in range(columns):
            if i:
                table.add_column(width=gap)
            table.add_column(width=label, no_wrap=True, style="dim")
            table.add_column(width=line, no_wrap=True, style="cyan")
            table.add_column(width=value, no_wrap=True, justify="right", style="bold")
        lines = -(-len(entries) // columns)
        for i in range(lines):
            cells: list[Text] = []
            for name, shown, form in entries[i::lines]:
                values = list(self.history[name])
                cells += [Text()] * bool(cells) + [Text(shown), Text(sparkline(values, line))]
                cells.append(Text(format(values[-1], form)))
            table.add_row(*cells)
        return table

    def _phases(self, width: int) -> Text | None:
        """Seconds a step of each phase, and their shares as a bar, in one line."""
        seconds = self.phase_seconds
        total = sum(seconds.values())
        if not total:
            return None
        text = Text(no_wrap=True)
        for name, style in STYLES.items():
            text.append("● ", style=style).append(f"{name} {seconds[name]:.2f} s  ")
        room = width - text.cell_len
        if room < len(STYLES):
            text.truncate(width, overflow="ellipsis")
            return text
        bar = Text()
        for name, style in STYLES.items():
            bar.append("━" * max(1, round(room * seconds[name] / total)), style=style)
        bar.truncate(room)
        return text.append_text(bar)

    def _rollout(self, width: int, lines: int) -> list[Text]:
        """The newest rollout in `lines` lines: what was asked, and the answer."""
        if self.rollout is None or not lines:
            return []
        asked, answer = (" ".join(visible(text).split()) for text in self.rollout)
        head = Text.assemble(("rollout ", "bold"), (asked, "dim"), no_wrap=True)
        head.truncate(width, overflow="ellipsis")
        shown = Text(answer or "(empty)", style="italic").wrap(self.console, width)
        cut = list(shown[: lines - 1])
        if len(shown) > len(cut):
            cut[-1] = Text(cut[-1].plain.rstrip()[: width - 1] + "…", style="italic")
        return [head, *cut]


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
