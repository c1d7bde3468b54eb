"""The package's own lines on the console, and the one console that they are written on."""

from __future__ import annotations

import contextlib
import logging
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

logger = logging.getLogger("pgkd_peft")  # the run's own log lines

SIDE_BY_SIDE = 110
"""Columns that a terminal needs for answers next to each other."""

make_view: Callable[[Any], Any] | None = None
"""Puts what shows a training in the place of the Trainer's progress bar, and returns it. The package sets this (see its
``__init__``): views are above the method, and the method starts them."""

_drawn_on: Console | None = None


def shared_console() -> Console:
    """The console that a view is drawn on, while there is one, else a new one.

    Rich consoles do not know of each other: a second one writes into the first one's live view, and what it wrote is
    painted over.
    """
    from rich.console import Console

    return _drawn_on or Console(highlight=False)


@contextlib.contextmanager
def drawing_on(console: Console) -> Iterator[None]:
    """Inside, :func:`shared_console` is `console`."""
    global _drawn_on
    before, _drawn_on = _drawn_on, console
    try:
        yield
    finally:
        _drawn_on = before


def answers(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]], width: int) -> RenderableType:
    """Texts next to each other, a table row for each of `rows`; below :data:`SIDE_BY_SIDE` columns one under the other.

    Args:
        headings: of the texts of a row; the first is that of the prompt.
        rows: texts (rich Text or str) in the order of `headings`.
        width: of the console, in columns.
    """
    from rich.table import Table
    from rich.text import Text

    if width >= SIDE_BY_SIDE:
        table = Table(title=title, show_lines=True, title_style="bold")
        for heading in headings:
            table.add_column(heading, ratio=1, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
        return table
    table = Table(
        title=title, show_header=False, box=None, padding=(0, 1, 0, 0), title_style="bold", title_justify="left"
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for row in rows:
        for heading, cell in zip(headings, row):
            table.add_row(heading, Text(cell) if isinstance(cell, str) else cell)
        table.add_row()
    return table


class _Wrapped(logging.Formatter):
    """Messages broken between words where a terminal would break them anywhere; whole in files and pipes."""

    def __init__(self, handler: logging.StreamHandler):
        super().__init__("%(message)s")
        self.handler = handler

    def format(self, record: logging.LogRecord) -> str:
        return fitted(super().format(record), self.handler.stream)


def fitted(text: str, stream: Any) -> str:
    """The text as `stream` should get it: :func:`wrapped` for a terminal, else as it is."""
    isatty = getattr(stream, "isatty", None)
    return wrapped(text, shutil.get_terminal_size().columns) if isatty is not None and isatty() else text


def wrapped(text: str, width: int) -> str:
    """Each line that is longer than `width` broken between words; what follows is indented by two more."""
    lines = []
    for line in text.split("\n"):
        if len(line) <= width or width < 20:
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())] + "  "
        lines += textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
        )
    return "\n".join(lines)


def show_log_lines(*, main_process: bool = True) -> None:
    """Let the package's log lines reach stderr, unless the program has set up logging itself.

    Without this Python shows warnings only, and what was loaded, which divergence is minimised and what was cut would
    be said to nobody. On ranks other than the first only warnings are shown.
    """
    log = logger
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(_Wrapped(handler))
        log.addHandler(handler)
        log.propagate = False
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO if main_process else logging.WARNING)
