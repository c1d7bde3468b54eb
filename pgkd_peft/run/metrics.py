"""Every log of a run as a line of its ``metrics.jsonl``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .folder import METRICS_FILE, STEP_FILES
from .jsonl import append_lines, drop_after


class MetricsFileCallback(TrainerCallback):
    """Every log of the run as a line in ``metrics.jsonl`` of its folder, with ``step`` and ``time`` (Unix seconds).

    When a run is resumed, the lines after its step are dropped from this and the other logs of its folder; when one
    begins anew, all of them. Evaluations before a training begins are written nowhere.
    """

    def __init__(self) -> None:
        self.begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = True
        if state.is_world_process_zero:
            for name in STEP_FILES:
                drop_after(Path(args.output_dir) / name, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if self.begun and state.is_world_process_zero and logs:
            record = {"step": state.global_step, "time": round(time.time(), 3), **logs}
            append_lines(Path(args.output_dir) / METRICS_FILE, [record])
