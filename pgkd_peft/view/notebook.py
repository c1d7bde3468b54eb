"""The live view in Jupyter and Colab: one output that is replaced in place, plain HTML and SVG, no widgets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.tokens import visible
from ..run.meters import PHASES
from .progress import SMALL, Watch
from .words import clock

if TYPE_CHECKING:
    from ..trainer import PrivilegedSelfDistillTrainer

EVERY = 0.5
"""Seconds between two pictures, at least: each is sent to the browser and kept in the notebook."""
MOST_POINTS = 200
COLOURS = dict(zip(PHASES, ("#2a9fb8", "#c98a1b", "#3a9d5d")))
LINE, TRACK = "#7c6cf0", "rgba(127,127,127,.25)"  # readable on white and on black; text has the notebook's own colour


class NotebookView(Watch):
    """Progress, curves of the last steps and the newest rollout, where the cell's output is."""

    def __init__(self, trainer: PrivilegedSelfDistillTrainer):
        super().__init__(trainer)
        self._display: Any = None
        self._shown = 0.0

    def start(self) -> None:
        from IPython.display import HTML, display

        self._display = display(HTML(self.html()), display_id=True)
        self._shown = time.perf_counter()

    def changed(self) -> None:
        if self._display is not None and time.perf_counter() - self._shown >= EVERY:
            self._draw()

    def stop(self) -> None:
        """Draw a last time. Doing it twice does no harm."""
        if self._display is not None:
            if self.status != "done":
                self.status = f"stopped while {self.status}"
            self._draw()
            self._display = None

    def _draw(self) -> None:
        from IPython.display import HTML

        self._display.update(HTML(self.html()))
        self._shown = time.perf_counter()

    # ---- the picture -----------------------------------------------------------------------------------------------

    def html(self) -> str:
        """The view as it is now."""
        share = self.step / self.max_steps if self.max_steps else 0.0
        times = f"{clock(self.pace.elapsed)} gone"
        if self.pace.seconds_a_step is not None:
            left = clock(self.pace.left(self.max_steps - self.step))
            times += f" · {left} left · {self.pace.seconds_a_step:.2f} s/step"
        name = escape(visible(Path(str(self.trainer.args.output_dir)).name))
        parts = [
            f"<div><b>{name}</b> · step {self.step}/{self.max_steps} · {escape(self.status)} · "
            f"epoch {self.epoch:.2f} · {times}</div>",
            f'<div style="height:6px;border-radius:3px;background:{TRACK};margin:6px 0 10px">'
            f'<div style="height:6px;border-radius:3px;width:{100 * share:.1f}%;background:{LINE}"></div></div>',
        ]
        shown = (("divergence", "divergence, nats/token", ".4f"), *SMALL)
        cells = [chart(label, self.history[key], form) for key, label, form in shown if self.history.get(key)]
        if cells:
            grid = "display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:8px 16px"
            parts.append(f'<div style="{grid}">{"".join(cells)}</div>')
        parts += [self._phases(), self._rollout()]
        return f'<div style="font:13px/1.45 system-ui,sans-serif;max-width:900px">{"".join(parts)}</div>'

    def _phases(self) -> str:
        seconds = self.phase_seconds
        total = sum(seconds.values())
        if not total:
            return ""
        bar = "".join(
            f'<div style="width:{100 * value / total:.1f}%;background:{COLOURS[name]}"></div>'
            for name, value in seconds.items()
        )
        legend = " &nbsp; ".join(
            f'<span style="color:{COLOURS[name]}">●</span> {name} {value:.2f} s' for name, value in seconds.items()
        )
        return f'<div style="display:flex;height:5px;margin:12px 0 4px">{bar}</div><div>{legend}</div>'

    def _rollout(self) -> str:
        if self.rollout is None:
            return ""
        prompt, answer = (" ".join(visible(text).split()) for text in self.rollout)
        prompt = "…" + prompt[-300:] if len(prompt) > 300 else prompt
        answer = answer[:600] + "…" if len(answer) > 600 else answer
        return (
            f'<div style="margin-top:12px"><b>rollout</b> <span style="opacity:.65">{escape(prompt)}</span><br>'
            f'<i dir="auto">{escape(answer) or "(empty)"}</i></div>'
        )


def chart(label: str, values: Sequence[float], form: str) -> str:
    """A small curve with its name, its last value, and the lowest and highest under it."""
    points = list(values)
    if len(points) > MOST_POINTS:
        points = [values[round(i * (len(values) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]
    low, high = min(values), max(values)
    span, steps = (high - low) or 1.0, max(1, len(points) - 1)
    places = [f"{100 * i / steps:.1f},{28 - 26 * (value - low) / span:.1f}" for i, value in enumerate(points)]
    if len(places) == 1:
        places.append(f"100.0,{places[0].partition(',')[2]}")
    place = " ".join(places)
    return (
        f'<div><div style="display:flex;justify-content:space-between"><span style="opacity:.65">{escape(label)}</span>'
        f'<b>{values[-1]:{form}}</b></div><svg viewBox="0 0 100 30" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}" style="display:block;width:100%;height:34px"><polyline points="{place}" '
        f'fill="none" stroke="{LINE}" stroke-width="1.5" vector-effect="non-scaling-stroke"/></svg>'
        f'<div style="opacity:.5;font-size:11px">{low:{form}} to {high:{form}}</div></div>'
    )
