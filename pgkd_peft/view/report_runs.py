"""All runs of a folder on one page: what differs, what came of it, their curves over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..run.jsonl import is_number
from .report_page import cell as labelled
from .report_page import fill, page
from .report_plots import Course, escape, gap_against_drift, gap_of_each
from .runs import INTERVALS, RESULTS, cell, differing
from .runs import result as in_table
from .words import duration


def render_runs(name: str, runs: Sequence[dict[str, Any]]) -> str:
    """The page as text.

    Args:
        name: of the folder.
        runs: records of :func:`pgkd_peft.view.runs.find_runs`, each with its ``metrics``.
    """
    unfinished = sum(not run["finished"] for run in runs)
    about = f"{len(runs)} runs" + (f", {unfinished} of them not finished" if unfinished else "")
    head = f'<h1>{escape(name)}</h1><p class="about">{about}</p>'
    body = fill("runs.html", {"table": table(runs), "gaps": gaps(runs)})
    shown = {
        "metrics": [],
        "traces": [],
        "final": [],
        "runs": [{"name": r["run"], "metrics": r["metrics"]} for r in runs],
    }
    return page(f"{name} · pgkd report", head, body, shown)


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A row a run: the settings that differ, and the results."""
    settings = differing(runs)
    columns = [name for name in RESULTS if any(run[name] is not None for run in runs)]
    heads = "".join(f'<th scope="col">{escape(RESULTS[name])}</th>' for name in columns)
    what = '<th scope="col" class="settings">what differs</th>' if settings else ""
    rows = []
    for place, run in enumerate(runs):
        colour = f'<i class="dot last run-{place % 8}"></i>'
        note = "" if run["finished"] else " <small>not finished</small>"
        differs = ", ".join(f"{name}={cell(run['settings'].get(name))}" for name in settings)
        cells = "".join(labelled(RESULTS[name], result(run, name)) for name in columns)
        rows.append(
            f'<tr><th scope="row">{colour} {escape(run["run"])}{note}</th>'
            + (f'<td class="settings">{escape(differs)}</td>' if settings else "")
            + f"{cells}</tr>"
        )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Runs"><table class="runs stacks"><thead>'
        f"<tr><th></th>{what}{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def result(run: Mapping[str, Any], name: str) -> str:
    value = run[name]
    if name == "seconds" and is_number(value):
        return escape(duration(value))
    interval = run[INTERVALS[name]] if name in INTERVALS else None
    return escape(in_table(name, value)) + (f" <small>{escape(cell(interval))}</small>" if interval else "")


def gaps(runs: Sequence[Mapping[str, Any]]) -> str:
    """The gap against drift, and each run's gap with its interval; "" where no run was judged."""
    paths = []
    for place, run in enumerate(runs):
        points = [
            (m["eval_drift"], m["eval_recovered"], f"step {m['step']:g}")
            for m in run["metrics"]
            if is_number(m.get("eval_drift")) and is_number(m.get("eval_recovered"))
        ]
        if is_number(run["drift"]) and is_number(run["recovered"]):
            points.append((run["drift"], run["recovered"], "judged at the end"))
        paths.append(Course(run["run"], points, place))
    parts = [gap_against_drift(paths)]
    for name, note in (
        ("recovered", "Recovered gap of each run on the rows that it was judged on, with its 95% interval."),
        ("recovered_nats", "Recovered gap in nats on the teacher's answers, with its 95% interval."),
    ):
        entries = [
            {"group": run["run"], "recovered": run[name], "interval": run[INTERVALS[name]], "place": place}
            for place, run in enumerate(runs)
            if run[name] is not None
        ]
        parts.append(gap_of_each(entries, note, "run"))
    drawn = "".join(parts)
    return f'<section aria-labelledby="h-gaps"><h2 id="h-gaps">What was learnt</h2>{drawn}</section>' if drawn else ""
