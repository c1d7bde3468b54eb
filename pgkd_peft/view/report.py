"""`pgkd report DIR`: one HTML page that tells a run's story, or that of all runs in a folder, without a network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..run.folder import (
    ANSWERS_FILE,
    COMPLETIONS_FILE,
    COVERAGE_FILE,
    FINAL_TRACE_FILE,
    METRICS_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    RUN_FILE,
    STATE_FILE,
    SUMMARY_FILE,
    TRACE_FILE,
)
from ..run.jsonl import is_number, read_coverage, read_json, read_lines, read_run, write_whole
from ..run.place import check_writable, writing
from .report_coverage import coverage_section
from .report_page import render
from .report_runs import render_runs
from .runs import runs_below
from .words import inserted, spread

MOST_STEPS = 40
"""Traced steps that the page holds; of more, evenly spread ones."""
MOST_POINTS = 2000
MOST_LOGGED = 24
_WORDS = re.compile(r"<[^<>\s]+>|\w+|\s+|.")
JUDGED = ("base", "teacher", "student", "recovered_nats")
"""What an evaluation has at least one of; without labels there are no scores."""


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, or of all runs in a folder that is none itself; returns where.

    Raises:
        ConfigError: `run_dir` is no run folder, and there is none in it.
    """
    run_dir = Path(run_dir)
    if is_run(run_dir):
        data = collect(run_dir)
        page = render(data, coverage_section(data["coverage"]))
    else:
        page = overlay(run_dir)
    out = Path(out) if out is not None else run_dir / REPORT_FILE
    check_writable(out, "--out", file=True)
    with writing(out, "--out"):
        write_whole(out, page)
    return out


def is_run(folder: Path) -> bool:
    """Whether something of one run lies in the folder itself."""
    names = (RUN_FILE, METRICS_FILE, SUMMARY_FILE, TRACE_FILE, STATE_FILE)
    return any((folder / name).is_file() for name in names) or any(folder.glob("eval*.json"))


def overlay(folder: Path) -> str:
    """The page of all runs below a folder."""
    if not folder.is_dir() or not (runs := runs_below(folder)):
        collect(folder)  # says what is missing
    return render_runs(folder.resolve().name, [{**run, "metrics": read_metrics(Path(run["folder"]))} for run in runs])


# ---- the run folder ------------------------------------------------------------------------------------------------


def collect(run_dir: Path) -> dict[str, Any]:
    """What a run folder holds: ``name``, ``run``, ``metrics`` (by step), ``results``, ``traces``, ``final``
    (traces of the trained student), ``answers``, ``coverage``.

    Raises:
        ConfigError: there is no such folder, or nothing of a run in it.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: no such folder; give the output_dir of a training, e.g. pgkd report runs/demo")
    run = read_run(run_dir / RUN_FILE)
    metrics = read_metrics(run_dir)
    traces = read_lines(run_dir / TRACE_FILE)
    results = read_results(run_dir)
    if not (run or metrics or traces or results):
        raise ConfigError(
            f"{run_dir} is no run folder: there is no run.json, metrics.jsonl, summary.json or traces.jsonl in it, "
            "and no run below it"
        )
    return {
        "name": run_dir.resolve().name,
        "run": run,
        "metrics": metrics,
        "results": results,
        "traces": choose_traces(traces),
        "final": choose_traces(read_lines(run_dir / FINAL_TRACE_FILE)),
        "answers": read_answers(run_dir),
        "coverage": read_coverage(run_dir / COVERAGE_FILE),
    }


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """What was logged, one dict a step: from metrics.jsonl, else from the newest trainer_state.json."""
    records = read_lines(run_dir / METRICS_FILE)
    if not records:
        states = [*run_dir.glob(f"checkpoint-*/{STATE_FILE}"), *run_dir.glob(STATE_FILE)]
        histories = [read_json(path).get("log_history") or [] for path in states]
        records = max(histories, key=lambda h: max((r.get("step", 0) for r in h), default=-1), default=[])
    by_step: dict[float, dict[str, float]] = {}
    for record in records:
        if is_number(record.get("step")) and "train_runtime" not in record:
            numbers = {key: value for key, value in record.items() if is_number(value)}
            by_step.setdefault(record["step"], {}).update(numbers)
    steps = sorted(by_step)
    if len(steps) > MOST_POINTS:  # rows of an evaluation are kept
        wanted = set(spread(steps, MOST_POINTS))
        steps = [s for s in steps if s in wanted or any(key.startswith("eval_") for key in by_step[s])]
    return [by_step[step] for step in steps]


def read_results(run_dir: Path) -> list[dict[str, Any]]:
    """Evaluations in the folder, each with its ``name``: eval*.json, else the demo's summary.json, and the `controls`
    in them."""
    found: list[dict[str, Any]] = []
    paths = sorted(run_dir.glob("eval*.json"))
    if run_dir / RESULTS_FILE not in paths:  # a summary is of the demo's end, and may be older
        paths.append(run_dir / SUMMARY_FILE)
    for path in paths:
        result = read_json(path)
        if any(is_number(result.get(key)) for key in JUDGED):
            numbers = [result.get(key) for key in JUDGED]
            if numbers not in [[other.get(key) for key in JUDGED] for other in found]:
                name = "this run" if path.name in (SUMMARY_FILE, RESULTS_FILE) else path.stem
                found.append({**result, "name": str(result.get("name", name))})
        controls = result.get("controls")
        if isinstance(controls, Mapping):
            controls = [{"name": key, **value} for key, value in controls.items() if isinstance(value, Mapping)]
        for control in controls if isinstance(controls, list) else []:
            if isinstance(control, Mapping) and dict(control) not in found:
                found.append({"name": "control", **control})
    return sorted(found, key=lambda result: result["name"] != "this run")


def read_answers(run_dir: Path) -> list[dict[str, Any]]:
    """Answers to read: the evaluation's, else those of the last rollout log. Each has ``prompt`` and ``answers``."""
    records = [r for r in read_lines(run_dir / ANSWERS_FILE) if isinstance(r.get("answers"), dict)]
    if records:
        return [
            {
                "prompt": str(record.get("prompt", "")),
                "privileged": str(record.get("privileged", "")),
                "answers": {str(key): str(value) for key, value in record["answers"].items()},
                "scores": record.get("scores") if isinstance(record.get("scores"), dict) else {},
            }
            for record in records
        ]
    logged = read_lines(run_dir / COMPLETIONS_FILE)
    last = max((r["step"] for r in logged if is_number(r.get("step"))), default=None)
    return [
        {
            "prompt": str(record.get("question") or record.get("prompt", "")),
            "privileged": "",
            "answers": {"student": str(record.get("student", "")), "teacher": str(record.get("teacher", ""))},
            "scores": {},
        }
        for record in logged
        if last is not None and record.get("step") == last
    ][:MOST_LOGGED]


def choose_traces(traces: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The traces that the page shows, with the place of the PI in the teacher's prompt."""
    lists = ("tokens", "divergence", "student_top", "teacher_top", "student_p", "teacher_p", "in_loss")
    usable = [
        trace
        for trace in traces
        if is_number(trace.get("step"))
        and all(isinstance(trace.get(key), list) and len(trace[key]) == len(trace["tokens"]) for key in lists)
        and trace["tokens"]
    ]
    wanted = set(spread(sorted({trace["step"] for trace in usable}), MOST_STEPS))
    chosen = []
    for trace in usable:
        if trace["step"] in wanted:
            student, teacher = str(trace.get("prompt", "")), str(trace.get("teacher_prompt", ""))
            words = _WORDS.findall(teacher)
            own = inserted(_WORDS.findall(student), words, lambda word: word.startswith("<"))
            parts = ["".join(part) for part in (words[: own.start], words[own], words[own.stop :])]
            chosen.append({**trace, "prompt": student, "teacher_prompt": parts})
    return sorted(chosen, key=lambda trace: trace["step"])
