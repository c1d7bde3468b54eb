"""Draws docs/front.svg: recovered gap against drift; a dot a run with its intervals, a larger one a mean over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 40, 58
LOW, HIGH = -0.05, 1.1  # of the recovered gap
COLOURS = {
    "pi": "#0969da",
    "bake": "#bf3989",
    "takeover": "#8250df",
    "offline": "#1a7f37",
    "sft": "#bc4c00",
    "shuffled": "#6e7781",
    "no_pi": "#afb8c1",
}
NAMES = {
    "pi": "the PI",
    "bake": "a bake of the text",
    "takeover": "PI, mixed rollouts",
    "offline": "PI, no rollouts",
    "sft": "plain SFT",
    "shuffled": "PI of other rows",
    "no_pi": "no PI",
}
STYLE = """
    .paper { fill: #ffffff; stroke: #d0d7de } .ink { fill: #1f2328 } .soft { fill: #59636e; font-size: 12px }
    .grid { stroke: #d8dee4; stroke-width: 1 }
    @media (prefers-color-scheme: dark) {
      .paper { fill: #0d1117; stroke: #3d444d } .ink { fill: #e6edf3 } .soft { fill: #9da7b3 } .grid { stroke: #30363d }
    }
"""


def front(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The picture as SVG text.

    Args:
        runs: by condition (METHOD or METHOD@LEARNING_RATE) lines of results/front.jsonl; empty for an empty picture.
    """
    drifts = [end for lines in runs.values() for line in lines for end in (line["drift"], *line["drift_interval"])]
    first = math.floor(math.log10(max(min(drifts, default=0.01), 1e-4)))
    last = max(math.ceil(math.log10(max(drifts, default=1.0))), first + 1)

    def x(drift: float) -> float:
        share = (math.log10(max(drift, 10.0**first)) - first) / (last - first)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(gap: float) -> float:
        share = (min(max(gap, LOW), HIGH) - LOW) / (HIGH - LOW)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    parts = [*_axes(x, y, first, last)]
    for name, lines in runs.items():
        method, _, rate = name.partition("@")
        colour = COLOURS[method]
        for line in lines:
            at_x, at_y = x(line["drift"]), y(line["recovered"])
            for ends in (
                [(x(end), at_y) for end in line["drift_interval"]],
                [(at_x, y(end)) for end in line["recovered_interval"] or ()],
            ):
                if ends:
                    (x1, y1), (x2, y2) = ends
                    parts.append(
                        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-opacity="0.4"/>'
                    )
            parts.append(f'<circle cx="{at_x}" cy="{at_y}" r="2.5" fill="{colour}" fill-opacity="0.6"/>')
        mean_x = x(statistics.mean(line["drift"] for line in lines))
        mean_y = y(statistics.mean(line["recovered"] for line in lines))
        parts.append(f'<circle cx="{mean_x}" cy="{mean_y}" r="5.5" fill="{colour}"/>')
        if rate:
            parts.append(f'<text class="soft" x="{mean_x + 9}" y="{mean_y - 6}">at {rate}</text>')
    methods = [name for name in NAMES if any(run.partition("@")[0] == name for run in runs)]
    at = LEFT
    for name in methods:
        parts.append(f'<circle cx="{at + 5}" cy="20" r="5" fill="{COLOURS[name]}"/>')
        parts.append(f'<text class="soft" x="{at + 14}" y="24">{NAMES[name]}</text>')
        at += 26 + 6 * len(NAMES[name])
    if not runs:
        parts.append(
            f'<text class="soft" x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">not measured yet</text>'
        )
    seeds = sorted({line["seed"] for lines in runs.values() for line in lines})
    title = "Recovered gap on unseen phrasings of the facts against drift on neutral prompts"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif" '
        'font-size="13">\n'
        f"  <title>{title}; {len(seeds)} seeds</title>\n  <style>{STYLE}  </style>\n  "
        + "\n  ".join(parts)
        + "\n</svg>\n"
    )


def _axes(x: Any, y: Any, first: int, last: int) -> list[str]:
    parts = [f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="6"/>']
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for power in range(first, last + 1):
        for step in (1, 2, 5) if power < last else (1,):
            value = step * 10.0**power
            parts.append(f'<line class="grid" x1="{x(value)}" y1="{TOP}" x2="{x(value)}" y2="{bottom}"/>')
            parts.append(f'<text class="soft" x="{x(value)}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
    for value in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y(value)}" x2="{right}" y2="{y(value)}"/>')
        parts.append(f'<text class="soft" x="{LEFT - 8}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>')
    parts.append(
        f'<text class="ink" x="{(LEFT + right) / 2}" y="{HEIGHT - 14}" text-anchor="middle">'
        "drift on neutral prompts, nats/token (log)</text>"
    )
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text class="ink" x="18" y="{middle}" text-anchor="middle" transform="rotate(-90 18 {middle})">'
        "recovered gap</text>"
    )
    return parts
