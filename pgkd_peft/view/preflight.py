"""What a preflight has found, in words and tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..data.tokens import visible
from ..evaluation.preflight import NOTHING_TO_LEARN, Cost, Effect
from ..run.memory import ADVICE
from .words import duration

# A phase -> what to do when it runs out of memory.
TO_LOWER = {**ADVICE, "rest": "lower lora_r (the adapter's optimizer states)"}


def verdict(effect: Effect | None) -> tuple[str, bool]:
    """One sentence on what there is to learn, and whether it is a warning."""
    if effect is None:
        return "No row has PI: the teacher reads what the student reads, and nothing will be learnt.", True
    if effect.kl < NOTHING_TO_LEARN:
        return (
            f"Nothing to learn: with the PI the teacher says what the student says anyway (KL {effect.kl:.2g} nats a "
            "token). Look at the PI with `pgkd inspect`: is it there, is it new to the model, does it bear on the "
            "answer? Try another privileged_placement."
        ), True
    if effect.scores is not None and effect.scores[1] <= effect.scores[0]:
        return (
            f"The PI changes the answers but not their score (without {effect.scores[0]:.2f}, with "
            f"{effect.scores[1]:.2f}, n={effect.rows}): there is no gap to recover on these rows. A larger model may "
            "make use of the PI, or another privileged_placement."
        ), True
    return "The PI changes what the teacher says: there is something to learn.", False


def show_effect(effect: Effect | None, console: Console) -> None:
    """Print what the PI does."""
    sentence, warn = verdict(effect)
    body: list[Any] = []
    if effect is not None:
        lines = [
            f"KL(teacher with PI || student) {effect.kl:.3f} nats a token, over {effect.tokens} tokens of "
            f"{effect.rows} greedy answers",
            f"{effect.top_share:.0%} of it in the top 1 % of tokens",
        ]
        if effect.scores is not None:
            without, with_pi = effect.scores
            lines.append(f"score (contains) without PI {without:.2f}, with PI {with_pi:.2f}, n={effect.rows}")
        table = Table(box=None, expand=True, header_style="bold", padding=(0, 1))
        for name in ("last turn", "student, without PI", "teacher, with PI"):
            table.add_column(name, ratio=1, overflow="fold")
        for prompt, own, better in effect.answers:
            table.add_row(Text(_end(prompt)), Text(_start(own)), Text(_start(better)))
        body = [Text("\n".join(lines)), Text(), table, Text()]
    body.append(Text(sentence, style="bold red" if warn else "bold green"))
    console.print(Panel(Group(*body), title="does the PI help?", title_align="left"))


def _start(text: str) -> str:
    return visible(text if len(text) <= 160 else text[:160] + "…")


def _end(text: str) -> str:
    return visible(text if len(text) <= 100 else "…" + text[-100:])


def cost_verdict(cost: Cost) -> tuple[str, bool]:
    """One sentence on whether the run fits, and whether it is a warning."""
    if cost.failed is not None:
        return f"It does not fit: out of memory in the phase {cost.failed}. What to do: {TO_LOWER[cost.failed]}.", True
    phase, peak = max(cost.peak.items(), key=lambda item: item[1])
    share = peak / cost.limit
    if share > 0.9:
        return (
            f"It hardly fits: {peak:,.0f} of {cost.limit:,.0f} MiB in the phase {phase}. To be safe: {TO_LOWER[phase]}."
        ), True
    return f"It fits: at most {peak:,.0f} of {cost.limit:,.0f} MiB ({share:.0%}), in the phase {phase}.", False


def show_cost(cost: Cost, config: Any, console: Console) -> None:
    """Print seconds and memory by phase, and the estimate for the whole run."""
    table = Table(box=None, header_style="bold", padding=(0, 2))
    table.add_column("phase")
    for name in ("seconds a step", "longest rows, no stop", "peak MiB there"):
        table.add_column(name, justify="right")

    def cell(values: dict[str, float], name: str, form: str) -> str:
        return format(values[name], form) if name in values else "–"

    for name in TO_LOWER:
        table.add_row(
            name, cell(cost.typical, name, ".2f"), cell(cost.worst, name, ".2f"), cell(cost.peak, name, ",.0f")
        )
    typical, worst = sum(cost.typical.values()), sum(cost.worst.values())
    table.add_row("all", f"{typical:.2f}", f"{worst:.2f}" if worst else "–", "", style="bold")
    body: list[Any] = [table, Text()]
    if typical:
        line = f"{cost.steps:,} steps: about {duration(typical * cost.steps)}"
        if worst:
            line += f", {duration(worst * cost.steps)} if every step were the longest"
        body.append(Text(line + " (evaluation and saving not counted)"))
    sentence, warn = cost_verdict(cost)
    body.append(Text(sentence, style="bold red" if warn else "bold green"))
    console.print(Panel(Group(*body), title="memory and time", title_align="left"))
