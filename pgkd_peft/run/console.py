"""The package's own lines on the console."""

from __future__ import annotations

import logging

logger = logging.getLogger("pgkd_peft")  # the run's own log lines


def show_log_lines(*, main_process: bool = True) -> None:
    """Let the package's log lines reach stderr, unless the program has set up logging itself.

    Without this Python shows warnings only, and what was loaded, which divergence is minimised and what was cut would
    be said to nobody. On ranks other than the first only warnings are shown.
    """
    log = logger
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO if main_process else logging.WARNING)
