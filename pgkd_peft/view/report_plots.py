"""Pictures of the report that need no script: boxes placed in percent, so that text keeps its size at any width."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from ..run.jsonl import is_number

MOST_GROUPS = 40
"""Groups that are shown at once; the others are folded away."""


@dataclass
class Course:
    """One way through the picture: a run while it trained, or one result.

    Attributes:
        points: (drift, recovered gap, what the point is), in their order.
        place: of its colour among the report's colours of runs.
    """

    name: str
    points: list[tuple[float, float, str]] = field(default_factory=list)
    place: int = 0


def escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def is_interval(value: Any) -> TypeGuard[Sequence[float]]:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value))


def gap_against_drift(paths: Sequence[Course]) -> str:
    """The recovered gap (up) against drift (to the right): a line a run, its last point filled; "" without a point."""
    paths = [path for path in paths if path.points]
    if not paths:
        return ""
    most = max(drift for path in paths for drift, _, _ in path.points)
    xs = ticks(0.0, most or 0.01)
    gaps = [gap for path in paths for _, gap, _ in path.points]
    ys = ticks(min(0.0, *gaps), max(1.0, *gaps))

    def place(drift: float, gap: float) -> tuple[float, float]:
        return 100 * drift / xs[-1], 100 * (1 - (gap - ys[0]) / (ys[-1] - ys[0]))

    lines, dots = [], []
    for path in paths:
        places = [place(drift, gap) for drift, gap, _ in path.points]
        colour = f"run-{path.place % 8}"
        if len(places) > 1:
            way = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
            lines.append(f'<polyline class="{colour}" points="{way}"/>')
        for i, ((x, y), (drift, gap, what)) in enumerate(zip(places, path.points)):
            last = " last" if i == len(places) - 1 else ""
            told = f"{path.name}, {what}: recovered gap {gap:.2f}, drift {drift:.4f} nats/token"
            dots.append(
                f'<i class="dot {colour}{last}" style="left:{x:.2f}%;top:{y:.2f}%" title="{escape(told)}" role="img" '
                f'aria-label="{escape(told)}"></i>'
            )
    across = "".join(f'<span class="x" style="left:{place(x, 0)[0]:.2f}%">{x:g}</span>' for x in xs)
    up = "".join(f'<span class="y" style="top:{place(0, y)[1]:.2f}%">{y:g}</span>' for y in ys)
    grid = "".join(f'<b style="top:{place(0, y)[1]:.2f}%"></b>' for y in ys)
    legend = "".join(
        f'<li><i class="dot last run-{path.place % 8}"></i> {escape(path.name)}: gap {path.points[-1][1]:.2f} at drift '
        f"{path.points[-1][0]:.4f}</li>"
        for path in paths
    )
    return (
        '<figure class="chart drift"><figcaption>recovered gap against drift <span>up is learnt, to the right is '
        'forgotten</span></figcaption><div class="plot"><em class="y-name">recovered gap</em>'
        f'<div class="area">{grid}<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(lines)}</svg>{''.join(dots)}{up}{across}</div>"
        f'<em class="x-name">drift on neutral prompts, nats/token</em></div><ul class="legend">{legend}</ul></figure>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose `low` to `high`, about four steps of them."""
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def gap_of_each(entries: Sequence[Mapping[str, Any]], note: str, what: str = "group") -> str:
    """A line an entry (``group``, ``n``, ``recovered``, ``interval``): its gap as a point, its interval as a bar; the
    least recovered first. "" without an entry that has a gap."""
    with_gap = sorted((e for e in entries if is_number(e.get("recovered"))), key=lambda e: e["recovered"])
    if not with_gap:
        return ""
    ends = [end for e in with_gap for end in (e["interval"] if is_interval(e.get("interval")) else [e["recovered"]])]
    low, high = max(-1.0, min(0.0, *ends, *ends)), min(2.0, max(1.0, *ends, *ends))

    def place(gap: float) -> float:
        return 100 * (min(high, max(low, gap)) - low) / (high - low)

    def line(entry: Mapping[str, Any]) -> str:
        interval, between = entry.get("interval"), ""
        bar = f'<i class="zero" style="left:{place(0):.2f}%"></i><i class="zero" style="left:{place(1):.2f}%"></i>'
        if is_interval(interval):
            left, right = map(place, interval)
            bar += f'<i class="whisker" style="left:{left:.2f}%;width:{right - left:.2f}%"></i>'
            between = f" <small>{interval[0]:.2f} to {interval[1]:.2f}</small>"
        colour = f" run-{entry['place'] % 8}" if "place" in entry else ""
        bar += f'<i class="dot last{colour}" style="left:{place(entry["recovered"]):.2f}%"></i>'
        n = f" <small>n={entry['n']}</small>" if is_number(entry.get("n")) else ""
        return (
            f'<li><span class="name" dir="auto">{escape(entry["group"])}{n}</span><span class="range">{bar}</span>'
            f'<span class="value">{entry["recovered"]:.2f}{between}</span></li>'
        )

    marks = "".join(f'<span style="left:{place(gap):.2f}%">{gap:g}</span>' for gap in (0.0, 1.0))
    head = (
        f'<li class="axis"><span>{escape(what)}</span><span class="range">{marks}</span><span>recovered gap</span></li>'
    )
    lines = [line(entry) for entry in with_gap]
    more = lines[MOST_GROUPS:]
    rest = (
        f'<details><summary>{len(more)} more</summary><ul class="groups">{"".join(more)}</ul></details>' if more else ""
    )
    without = len(entries) - len(with_gap)
    told = f" {without} without a gap are left out: the teacher is not better than the base there." if without else ""
    return (
        f'<div class="box"><p class="muted">{escape(note)}{told}</p><ul class="groups">{head}'
        f"{''.join(lines[:MOST_GROUPS])}</ul>{rest}</div>"
    )
