"""`pgkd inspect`: what the student and the teacher will really read, before anything is trained.

Everything shown is decoded from the ids that the run's own collator makes; only a tokenizer is needed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..config import PrivilegedGKDConfig
from ..data.check import DataReport, has_markup, leaked, validate_rows
from ..data.collator import DataCollatorForPrivilegedGKD
from ..data.tokens import Piece, pieces, visible
from ..errors import DataError
from ..run.console import SIDE_BY_SIDE
from .words import inserted

SAMPLE = 256  # rows with PI that are rendered in another placement
STYLES = {"text": "", "pi": "bold yellow", "loss": "green", "out": "red", "special": "cyan"}
MARKS = {"pi": ("⟦PI:", "⟧"), "out": ("⟦not in the loss:", "⟧")}  # where there is no colour
BARS = "▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class RowView:
    """One row as the run will use it. Lengths are in tokens.

    Attributes:
        number: of the row in the data set, from 0.
        student, teacher, completion: the ids as text; PI is marked in the teacher's, what is outside the loss in the
            completion's.
        in_loss: completion tokens that count in the loss.
        notes: what a user should look at, one line each.
    """

    number: int
    student: list[Piece]
    teacher: list[Piece]
    completion: list[Piece]
    student_tokens: int
    teacher_tokens: int
    completion_tokens: int
    in_loss: int
    privileged_tokens: int
    privileged_tokens_cut: int
    notes: list[str]


def view_row(
    number: int, row: Mapping[str, Any], collator: DataCollatorForPrivilegedGKD, config: PrivilegedGKDConfig
) -> RowView:
    """A row as the run will use it.

    Raises:
        DataError: the row cannot be used.
    """
    encoded = collator.check_length(collator.encode(row))
    tokenizer, contexts = collator.tokenizer, encoded["contexts"]
    student_ids, teacher_ids, completion_ids = (encoded[f"{k}_ids"] for k in ("student", "teacher", "completion"))
    special = set(tokenizer.all_special_ids)
    added = inserted(student_ids, teacher_ids, special.__contains__)
    teacher_roles = ["text"] * len(teacher_ids)
    teacher_roles[added] = ["pi"] * (added.stop - added.start)
    skipped = min(config.skip_first_tokens, len(completion_ids))
    completion_roles = ["out"] * skipped + ["loss"] * (len(completion_ids) - skipped)

    notes = []
    if leaked(contexts, encoded["student_text"]):
        notes.append("leak: the PI stands in the student's prompt as well, so there is nothing to distill")
    if contexts.privileged_tokens_cut:
        notes.append(
            f"cut: {contexts.privileged_tokens_cut} of "
            f"{contexts.privileged_tokens + contexts.privileged_tokens_cut} PI tokens are over max_privileged_length"
        )
    if not contexts.has_privileged:
        notes.append("no PI: the teacher reads what the student reads (an anchor against forgetting)")
    if has_markup(contexts, tokenizer.all_special_tokens):
        notes.append("markup: the text of the row itself holds special tokens, which act as markup")
    if completion_ids and skipped == len(completion_ids):
        notes.append(f"no loss: skip_first_tokens={config.skip_first_tokens} leaves nothing of this answer")
    return RowView(
        number=number,
        student=pieces(tokenizer, student_ids, ["text"] * len(student_ids)),
        teacher=pieces(tokenizer, teacher_ids, teacher_roles),
        completion=pieces(tokenizer, completion_ids, completion_roles),
        student_tokens=len(student_ids),
        teacher_tokens=len(teacher_ids),
        completion_tokens=len(completion_ids),
        in_loss=len(completion_ids) - skipped,
        privileged_tokens=contexts.privileged_tokens,
        privileged_tokens_cut=contexts.privileged_tokens_cut,
        notes=notes,
    )


def choose_rows(report: DataReport, count: int) -> list[int]:
    """Numbers of `count` usable rows to show: one of every kind (PI, cut, leak, markup, no answer) before a second of
    any, the rarest kind first."""
    leaks, markup = set(report.leaks), set(report.markup)
    kinds = [
        (
            report.privileged_tokens[i] > 0,
            report.privileged_tokens_cut[i] > 0,
            number in leaks,
            number in markup,
            report.completion_lengths[i] == 0,
        )
        for i, number in enumerate(report.kept)
    ]
    rows_of_kind, seen = Counter(kinds), Counter[tuple[bool, ...]]()
    order = []
    for number, kind in zip(report.kept, kinds):
        order.append((seen[kind], rows_of_kind[kind], number))
        seen[kind] += 1
    return sorted(number for *_, number in sorted(order)[:count])


def inspect_rows(
    rows: Any,
    collator: DataCollatorForPrivilegedGKD,
    config: PrivilegedGKDConfig,
    console: Console,
    *,
    count: int = 4,
) -> int:
    """Show `count` rows and the totals of all of them.

    Returns:
        0, or 2 when some rows cannot be used; all of them are then listed at the end.
    """

    def validate(some: Any) -> DataReport:
        return validate_rows(
            some,
            collator,
            require_completion=config.lmbda < 1.0 and not config.seq_kd,
            skip_long=config.skip_long_prompts,
            max_rows_listed=100,
        )

    fault: DataError | None = None
    numbers = list(range(len(rows)))
    try:
        report = validate(rows)
    except DataError as error:
        fault = error
        numbers = sorted(set(numbers) - set(error.rows)) if error.rows else []
        if numbers:  # the others, without warnings, whose row numbers would not be those of the data set
            report = replace(validate([rows[i] for i in numbers]), warnings=[])
    if numbers:
        console.print(_settings_lines(collator, config))
        console.print(_legend(console))
        for i in choose_rows(report, count):
            console.print(show_row(view_row(numbers[i], rows[numbers[i]], collator, config), collator, config, console))
        console.print(show_totals(report, collator, config, console))
        with_pi = [i for i, tokens in enumerate(report.privileged_tokens) if tokens][:SAMPLE]
        some = [rows[numbers[report.kept[i]]] for i in with_pi]
        for line in sharing_lines([report.teacher_prompts[i] for i in with_pi], some, collator):
            console.print(Text(visible(line)))
    if fault is not None:
        console.print(Text(visible(str(fault)), style="bold red"))
        return 2
    return 0


def sharing_lines(
    teacher_prompts: Sequence[Sequence[int]],
    rows: Sequence[Mapping[str, Any]],
    collator: DataCollatorForPrivilegedGKD,
) -> list[str]:
    """What share of the teacher's tokens is read once because rows with PI begin alike, and whether the placement
    ``system`` would make it much more.

    Args:
        teacher_prompts: token ids of the rows with PI.
        rows: those rows themselves, to be rendered in the other placement.
    """
    from ..prefix import share_read_once  # brings the model libraries

    if not rows:
        return []
    share = share_read_once(teacher_prompts)
    line = f"rows that begin alike: {share:.0%} of the teacher's prompt tokens need not be read again"
    builder = collator.builder
    if builder.placement == "system":
        return [line]
    other = DataCollatorForPrivilegedGKD(
        collator.tokenizer,
        privileged_key=builder.privileged_key,
        max_length=None,
        max_privileged_length=builder.max_privileged_length,
        privileged_placement="system",
    )
    if other.builder.placement != "system":  # the chat template has no system turn
        return [line]
    better = share_read_once([other.encode(row)["teacher_ids"] for row in rows])
    if better < share + 0.2:
        return [line]
    shared = "nothing is shared" if share < 0.05 else f"only {share:.0%} of the teacher's tokens are read once"
    return [
        f"the PI stands behind the question, so {shared}; with placement system {better:.0%} of the teacher's tokens "
        "would be read once (--privileged_placement system)"
    ]


def _settings_lines(collator: DataCollatorForPrivilegedGKD, config: PrivilegedGKDConfig) -> Text:
    builder = collator.builder
    lines = [f"PI from the column {builder.privileged_key!r}, placement {builder.placement!r}"]
    lines += builder.notes
    if config.lmbda == 1.0:
        lines.append("lmbda=1: in training the student's own rollouts take the place of the answers shown here")
    elif config.lmbda > 0:
        lines.append(
            f"lmbda={config.lmbda:g}: in {config.lmbda:.0%} of the steps rollouts take the place of the answers"
        )
    if config.seq_kd and config.lmbda < 1.0:
        lines.append("seq_kd: in the other steps the teacher writes the answers, from its own prompt")
    lines.append(config.divergence_in_words())
    return Text(visible("\n".join(lines)), style="dim")


def _coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _legend(console: Console) -> Text:
    if not _coloured(console):
        return Text("PI stands in ⟦PI:…⟧, answer tokens outside the loss in ⟦not in the loss:…⟧; prompts never count.")
    entries = [
        ("PI", "pi"),
        ("special tokens", "special"),
        ("in the loss", "loss"),
        ("answer token outside the loss", "out"),
    ]
    legend = Text(" · ").join(Text(name, style=STYLES[role]) for name, role in entries)
    return legend.append(" · prompts never count in the loss", style="dim")


def styled(parts: Sequence[Piece], console: Console) -> Text:
    """Pieces as one text: roles by colour, or by marks where there is no colour."""
    text = Text()
    coloured = _coloured(console)
    for i, piece in enumerate(parts):
        opening, closing = ("", "") if coloured else MARKS.get(piece.role, ("", ""))
        if opening and (i == 0 or parts[i - 1].role != piece.role):
            text.append(opening)
        style = f"{STYLES[piece.role]} {STYLES['special'] if piece.special and piece.role == 'text' else ''}".strip()
        if piece.special and piece.role != "text":
            style += " italic"
        shown = visible(piece.text)
        if i == len(parts) - 1 and shown.endswith("\n"):  # the generation prompt's last line break is a token too
            shown = shown[:-1] + "↵"
        text.append(shown, style=style)
        if closing and (i == len(parts) - 1 or parts[i + 1].role != piece.role):
            text.append(closing)
    return text


def show_row(
    view: RowView, collator: DataCollatorForPrivilegedGKD, config: PrivilegedGKDConfig, console: Console
) -> RenderableType:
    """One row: the three texts and what there is to count."""
    answer = styled(view.completion, console) if view.completion else Text("(none: a rollout is written)", style="dim")
    parts = [
        (f"student prompt · {view.student_tokens} tokens", styled(view.student, console)),
        (f"teacher prompt · {view.teacher_tokens} tokens", styled(view.teacher, console)),
        (f"answer · {view.completion_tokens} tokens, {view.in_loss} in the loss", answer),
    ]
    used = view.student_tokens + view.completion_tokens
    budget = "no limit" if collator.max_length is None else f"{collator.max_length} ({used / collator.max_length:.0%})"
    limit = collator.builder.max_privileged_length
    share = f" ({view.privileged_tokens / limit:.0%})" if limit else ""
    counts = f"conversation {used} of {budget} · PI {view.privileged_tokens} of {limit}{share}"
    footer = Text(counts, style="dim")
    for note in view.notes:
        footer.append("\n" + note, style="" if note.startswith("no PI") else "bold red")
    title = f"row {view.number}"
    if not console.is_terminal:
        lines: list[RenderableType] = [Text(f"\n=== {title} ===")]
        for heading, text in parts:
            lines += [Text(f"--- {heading}"), text]
        return Group(*lines, Text("---"), footer)
    if console.width >= SIDE_BY_SIDE:
        table = Table(show_edge=False, expand=True, padding=(0, 1), header_style="bold", box=None)
        for (heading, _), ratio in zip(parts, (3, 4, 3)):
            table.add_column(heading, ratio=ratio, overflow="fold")
        table.add_row(*(text for _, text in parts))
        return Panel(Group(table, Text(), footer), title=title, title_align="left", border_style="dim")
    stacked: list[RenderableType] = []
    for heading, text in parts:
        stacked += [Text(heading, style="bold"), text, Text()]
    return Panel(Group(*stacked, footer), title=title, title_align="left", border_style="dim")


def show_totals(
    report: DataReport, collator: DataCollatorForPrivilegedGKD, config: PrivilegedGKDConfig, console: Console
) -> RenderableType:
    """Totals and histograms over the whole set."""
    conversation = [p + c for p, c in zip(report.prompt_lengths, report.completion_lengths)]
    totals = Table(box=None, show_edge=False, padding=(0, 2), header_style="bold")
    totals.add_column("tokens")
    for name in ("sum", "median", "longest", "limit"):
        totals.add_column(name, justify="right")
    for name, values, limit in (
        ("student prompt", report.prompt_lengths, None),
        ("teacher prompt", report.teacher_prompt_lengths, None),
        ("answer", [n for n in report.completion_lengths if n], None),
        ("conversation", conversation, collator.max_length),
        ("PI, after cutting", [n for n in report.privileged_tokens if n], collator.builder.max_privileged_length),
    ):
        middle = sorted(values)[len(values) // 2] if values else 0
        cells = (sum(values), middle, max(values, default=0))
        totals.add_row(name, *(f"{cell:,}" for cell in cells), "" if limit is None else f"{limit:,}")
    counted = [n - min(config.skip_first_tokens, n) for n in report.completion_lengths]
    lines = [
        f"{report.rows:,} rows: {report.rows_with_privileged:,} with PI, {report.prompt_only:,} without an answer, "
        f"{len(report.skipped_long):,} skipped as too long",
        f"PI in the student's prompt (leaks): {len(report.leaks):,} rows · PI cut: {report.rows_cut:,} rows, "
        f"{sum(report.privileged_tokens_cut):,} tokens · answer tokens in the loss: {sum(counted):,}",
    ]
    charts = [
        ("conversation (tokens)", histogram(conversation)),
        ("PI (tokens)", histogram(report.privileged_tokens)),
        ("answer (tokens)", histogram(report.completion_lengths)),
    ]
    if console.width >= SIDE_BY_SIDE:
        grid = Table.grid(padding=(0, 4))
        grid.add_row(*(Group(Text(heading, style="bold"), Text(chart)) for heading, chart in charts))
        drawn: RenderableType = grid
    else:
        drawn = Group(*(Group(Text(heading, style="bold"), Text(chart), Text()) for heading, chart in charts))
    warnings = [Text(f"warning: {visible(warning)}", style="bold red") for warning in report.warnings]
    body = Group(Text("\n".join(lines)), Text(), totals, Text(), drawn, *warnings)
    if not console.is_terminal:
        return Group(Text("\n=== all rows ==="), body)
    return Panel(body, title="all rows", title_align="left")


def histogram(values: Sequence[int], bins: int = 8) -> str:
    """Counts of whole numbers as bars, one line a bin."""
    if not values:
        return "no rows"
    low, high = min(values), max(values)
    step = max(1, -(-(high - low + 1) // bins))
    counts = Counter((value - low) // step for value in values)
    edges = [(low + i * step, min(high, low + (i + 1) * step - 1)) for i in range((high - low) // step + 1)]
    labels = [f"{a}" if a == b else f"{a}–{b}" for a, b in edges]
    wide, top = max(map(len, labels)), max(counts.values())
    return "\n".join(f"{label:>{wide}} {bar(counts[i] / top, 20)} {counts[i]}" for i, label in enumerate(labels))


def bar(share: float, width: int) -> str:
    """A bar of `share` of `width` columns, padded with spaces; never empty for a share above 0."""
    eighths = max(1 if share > 0 else 0, round(share * width * 8))
    text = BARS[-1] * (eighths // 8) + (BARS[eighths % 8 - 1] if eighths % 8 else "")
    return text.ljust(width)


def make_console(no_color: bool = False) -> Console:
    """Colour in a terminal, plain text of any width elsewhere."""
    if sys.stdout.isatty():
        return Console(no_color=no_color, highlight=False, color_system=None if no_color else "auto")
    return Console(width=120, color_system=None, highlight=False)
