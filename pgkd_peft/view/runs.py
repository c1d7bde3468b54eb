"""Many runs as one table: the settings in which they differ, and what came of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..run.console import SIDE_BY_SIDE
from ..run.folder import METRICS_FILE, RESULTS_FILE, RUN_FILE, is_checkpoint
from ..run.jsonl import is_number, read_json, read_lines, read_run

RESULTS = {
    "score": "score",
    "recovered": "recovered",
    "recovered_nats": "in nats",
    "drift": "drift",
    "divergence": "divergence",
    "seconds": "seconds",
}
"""Columns of the table; ``recovered_nats`` is the recovered gap without labels, and shown where a run has it."""
INTERVALS = {"recovered": "interval", "recovered_nats": "nats_interval"}
# Settings that say where a run was, or how it was watched, and not what it did.
_NOT_SETTINGS = (
    *("output_dir", "logging_dir", "run_name", "overwrite", "hub_model_id", "disable_tqdm", "report_to"),
    *("logging_steps", "rollout_log_steps", "save_steps", "save_total_limit"),
    "activation_checkpointing",  # the same as gradient_checkpointing
)
_HIGH_IS_GOOD = ("score", "recovered", "recovered_nats")


def find_runs(folder: str | Path) -> list[dict[str, Any]]:
    """One record a run below `folder` (``run.json``; controls of a run are runs of their own), checkpoints left out.

    Raises:
        ConfigError: there is no such folder, or no run in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"{str(root)!r} is no folder; give one that holds runs, e.g. pgkd runs runs")
    runs = runs_below(root)
    if not runs:
        raise ConfigError(f"no run was found below {str(root)!r}: no {RUN_FILE}, which pgkd train writes at its start")
    return runs


def runs_below(root: Path) -> list[dict[str, Any]]:
    """As :func:`find_runs`; [] where there is none."""
    paths = sorted(path for path in root.rglob(RUN_FILE) if not _is_part(path.parent.name))
    return [_record(path, root) for path in paths]


def _is_part(name: str) -> bool:
    """Whether a folder belongs to the run above it: a checkpoint, or one that is being written."""
    return is_checkpoint(name) or name.startswith(".")


def _record(path: Path, root: Path) -> dict[str, Any]:
    run, results = read_run(path), read_json(path.parent / RESULTS_FILE)
    logged = [line["divergence"] for line in read_lines(path.parent / METRICS_FILE) if "divergence" in line]
    columns = results.get("columns")
    student = columns.get("student") if isinstance(columns, dict) else None
    settings = {key: value for key, value in (run.get("config") or {}).items() if key not in _NOT_SETTINGS}
    settings["base_model"] = Path(str(run.get("base_model"))).name
    return {
        "run": str(path.parent.relative_to(root)) if path.parent != root else root.name,
        "folder": str(path.parent),
        "finished": bool(run.get("finished")),
        "settings": settings,
        "score": _number(student.get("score")) if isinstance(student, dict) else None,
        "recovered": _number(results.get("recovered")),
        "interval": _interval(results.get("recovered_interval")),
        "recovered_nats": _number(results.get("recovered_nats")),
        "nats_interval": _interval(results.get("recovered_nats_interval")),
        "drift": _number(results.get("drift")),
        "divergence": _number(logged[-1]) if logged else None,
        "steps": _number(run.get("steps")),
        "seconds": _number(run.get("seconds")),
    }


def _number(value: Any) -> float | None:
    """A result as it should be; None for what else an edited or damaged file holds."""
    return value if is_number(value) else None


def _interval(value: Any) -> list[float] | None:
    return value if isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) else None


def differing(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The settings that do not have the same value in all runs."""
    names = sorted({name for run in runs for name in run["settings"]})
    return [name for name in names if len({repr(run["settings"].get(name)) for run in runs}) > 1]


def sort_runs(runs: list[dict[str, Any]], by: str | None) -> list[dict[str, Any]]:
    """Best first for scores, smallest first for everything else; runs without a value last.

    Raises:
        ConfigError: no run has such a column or setting.
    """
    if by is None:
        return runs
    known = {"run", *RESULTS, *(name for run in runs for name in run["settings"])}
    if by not in known:
        raise ConfigError(f"--sort is {by!r}; accepted are {', '.join(sorted(RESULTS))}, run, or a setting's name")

    def value(run: dict[str, Any]) -> Any:
        return run[by] if by in run else run["settings"].get(by)

    some = [run for run in runs if value(run) is not None]
    numbers = all(is_number(value(run)) for run in some)
    some.sort(key=(lambda run: value(run)) if numbers else (lambda run: str(value(run))), reverse=by in _HIGH_IS_GOOD)
    return some + [run for run in runs if value(run) is None]


def table(runs: Sequence[dict[str, Any]], width: int = SIDE_BY_SIDE) -> Any:
    """A line a run, and the differing settings beside its name, or, in less than 110 columns, below the table."""
    from rich import box
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    settings, wide = differing(runs), width >= SIDE_BY_SIDE
    shown = Table(
        box=box.SIMPLE,
        pad_edge=wide,
        padding=(0, 1) if wide else (0, 1, 0, 0),
        caption="settings that are the same in all runs are left out" if wide and len(runs) > 1 else None,
    )
    shown.add_column("run", overflow="fold")
    if settings and wide:
        shown.add_column("what differs", overflow="fold", min_width=20)
    columns = [name for name in RESULTS if name not in INTERVALS or any(run[name] is not None for run in runs)]
    for name in columns:
        shown.add_column(RESULTS[name], justify="right", no_wrap=True)
    below: list[Any] = []
    for run in runs:
        cells = [run["run"] + ("" if run["finished"] else " (not finished)")]
        differs = [f"{setting}={cell(run['settings'].get(setting))}" for setting in settings]
        if settings and wide:
            cells.append("\n".join(differs))
        elif settings:
            below += [Text(f"{run['run']}:"), Padding(Text(", ".join(differs)), (0, 0, 0, 2))]
        for column in columns:
            interval = run[INTERVALS[column]] if column in INTERVALS else None
            cells.append(result(column, run[column]) + (f"\n{cell(interval)}" if interval else ""))
        shown.add_row(*map(Text, cells))
    return Group(shown, *([Text("What differs:"), *below] if below else []))


def result(column: str, value: Any) -> str:
    """A result as the table has it."""
    return "–" if value is None else f"{value:.0f}" if column == "seconds" else f"{value:.3f}"


def cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value)):
        return f"{value[0]:.2f} to {value[1]:.2f}"
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
