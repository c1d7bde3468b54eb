"""What an evaluation found: on the console, in the results file, and in the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.controls import CONTROLS
from ..run.console import answers
from ..run.folder import ANSWERS_FILE, RESULTS_FILE
from ..run.jsonl import read_json, write_json, write_lines, write_whole
from ..view.words import LABELS, rows_called

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..evaluation.answers import Drift, Evaluation


def add_drift(result: Evaluation, drift: Drift) -> None:
    result.extra.update(drift=drift.kl, drift_details=asdict(drift))


def control_summary(result: Evaluation) -> dict[str, Any]:
    """Of a control what concerns its student: base and teacher are those of the run."""
    summary = result.summary()
    return {**summary, "columns": {"student": summary["columns"]["student"]}}


def show(result: Evaluation, console: Any, examples: int) -> None:
    """The result table, the recovered gap, the controls, and a few answers side by side."""
    from rich.table import Table

    summary = result.summary()
    table = Table(title=rows_called(summary))
    table.add_column("")
    for name in (*(["score"] if result.scores else []), "tokens", "cut off", "speaks of the hint", "copied from PI"):
        table.add_column(name, justify="right")
    for name, column in summary["columns"].items():
        table.add_row(LABELS[name], *([score_cell(column)] if result.scores else []), *details(column))
    console.print(table)
    if result.scores:
        console.print(recovered_line(summary))
    if "nats" in summary:
        console.print(f"without labels: {summary['nats']['sentence']}")
    if "drift" in summary:
        moved = summary["drift_details"]
        console.print(
            f"drift: {summary['drift']:.4f} nats/token KL(base || student) over {moved['tokens']} tokens of "
            f"{moved['prompts']} neutral prompts; top-1 agreement {moved['top1_agreement']:.3f}"
        )
    if "perplexity_base" in summary:
        console.print(f"perplexity: base {summary['perplexity_base']:.2f}, student {summary['perplexity_student']:.2f}")
    if "controls" in summary:
        console.print(controls_table(summary))
    if examples:
        console.print(answers_shown(result, examples, console.width))


def score_cell(column: Mapping[str, Any]) -> str:
    return "–" if column["score"] is None else f"{column['score']:.3f}"


def details(column: Mapping[str, Any]) -> list[str]:
    """Length and leakage of a column's answers, as the tables have them."""
    return [
        f"{column['length_tokens']:.1f}",
        f"{column['truncated']:.2f}",
        f"{column['hint_share']:.2f}",
        "" if column["pi_overlap"] is None else f"{column['pi_overlap']:.2f}",
    ]


def controls_table(summary: Mapping[str, Any]) -> Table:
    """The student of this run and those of its controls."""
    from rich.table import Table

    table = Table(title="Trained again with one thing taken away: the student's score")
    table.add_column("")
    names = ("score", "recovered gap", *(["drift"] if "drift" in summary else []))
    for name in (*names, "tokens", "cut off", "of the hint", "copied"):
        table.add_column(name, justify="right")
    for name, of in {"this run": summary, **summary["controls"]}.items():
        column = of["columns"]["student"]
        cells = [score_cell(column), recovered_cell(of), *([f"{of['drift']:.4f}"] if "drift" in of else [])]
        table.add_row(name, *cells, *details(column))
    return table


def recovered_cell(summary: Mapping[str, Any]) -> str:
    """The recovered gap with its interval, as short as a table wants it."""
    if summary["recovered"] is None:
        return "no gap"
    between = summary["recovered_interval"]
    return f"{summary['recovered']:.2f}" + (f" ({between[0]:.2f} to {between[1]:.2f})" if between else "")


def recovered_line(summary: Mapping[str, Any]) -> str:
    if summary["recovered"] is None:
        return "recovered gap: none to recover, the teacher with PI is not better than the base"
    line = f"recovered gap: {summary['recovered']:.3f}"
    if summary["recovered_interval"]:
        low, high = summary["recovered_interval"]
        groups = "" if summary["groups"] == summary["n"] else f" in {summary['groups']} groups"
        level = summary["recovered_interval_level"]
        line += f" ({level:.0%} interval {low:.2f} to {high:.2f}, n={summary['n']}{groups}, bootstrap)"
    return line


def answers_shown(result: Evaluation, count: int, width: int) -> RenderableType:
    """`count` rows, spread over the set: prompt, base, teacher and student, with what was right in green; side by side,
    on a console of less than 110 columns one under the other."""
    from rich.text import Text

    from ..data.tokens import visible

    step = max(1, result.n // count)
    rows = []
    for i in list(range(0, result.n, step))[:count]:
        said = [
            Text(visible(texts[i][:300]), style="green" if result.scores and result.scores[name][i] >= 1 else "")
            for name, texts in result.answers.items()
        ]
        rows.append([visible(result.prompts[i][-300:]), *said])
    return answers("Answers side by side", ["prompt", *(LABELS[name] for name in result.answers)], rows, width)


def update_card(path: Path, result: Evaluation, settings: Mapping[str, Any]) -> None:
    """Put the results into the model card, in place of those of the same scorer that it has; without a card nothing."""
    if not path.is_file():
        return
    summary = result.summary()
    title = f"## Evaluation ({settings['scorer'] or 'without labels'})"
    lines = [title, "", f"{rows_called(summary)}, greedy, at most {settings['max_new_tokens']} tokens.", ""]
    lines += ["| | score | tokens | speaks of the hint |", "|---|---|---|---|"]
    for name, column in summary["columns"].items():
        lines.append(
            f"| {LABELS[name]} | {score_cell(column)} | {column['length_tokens']:.1f} | {column['hint_share']:.2f} |"
        )
    if result.scores:
        lines += ["", recovered_line(summary).capitalize() + "."]
    if "nats" in summary:
        lines += ["", f"Without labels: {summary['nats']['sentence']}."]
    if summary.get("controls"):
        lines += ["", "Trained again with one thing taken away:", ""]
        lines += ["| | score | recovered gap | drift | tokens | speaks of the hint |", "|---|---|---|---|---|---|"]
        for name, of in {"student": summary, **summary["controls"]}.items():
            column = of["columns"]["student"]
            moved = f"{of['drift']:.4f}" if "drift" in of else ""
            lines.append(
                f"| {f'{name}: {CONTROLS[name]}' if name in CONTROLS else 'this run'} | {score_cell(column)} | "
                f"{recovered_cell(of)} | {moved} | {column['length_tokens']:.1f} | {column['hint_share']:.2f} |"
            )
    if "drift" in summary:
        lines += ["", f"Drift on neutral prompts: {summary['drift']:.4f} nats/token KL(base || student)."]
    card = path.read_text(encoding="utf-8", errors="replace")
    before, found, after = card.partition(title + "\n")
    rest = after[after.index("\n## ") :] if found and "\n## " in after else ""
    write_whole(path, f"{before.rstrip()}\n\n" + "\n".join(lines) + "\n" + rest)


def write_results(result: Evaluation, path: Path, settings: Mapping[str, Any]) -> Path:
    """The summary as JSON at `path`, and every answer beside it, one line a row; returns where.

    Results of a part of the rows (``limit`` in `settings`) never replace those of all: they go to a file of their own.
    """
    if settings.get("limit") and is_full(path):
        path = path.with_name(f"{path.stem}_first_{settings['limit']}.json")
    write_json(path, {**result.summary(), **settings})
    write_lines(answers_file(path), result.records())
    return path


def is_full(path: Path) -> bool:
    """Whether a results file holds results of all rows."""
    return bool(found := read_json(path)) and not found.get("limit")


def answers_file(results: Path) -> Path:
    """Where the answers behind a results file lie."""
    return results.with_name(ANSWERS_FILE) if results.name == RESULTS_FILE else results.with_suffix(".answers.jsonl")
