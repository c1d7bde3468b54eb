"""The report's picture of a bake: the text itself, each paragraph coloured by how much of it was taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..run.jsonl import is_number
from .report_plots import escape


def coverage_section(coverage: Mapping[str, Any]) -> str:
    """A section of the page; "" for a run that was no bake."""
    passages = coverage.get("passages") or []
    if not passages:
        return ""
    shares = [p["recovered"] for p in passages if is_number(p.get("recovered"))]
    least = sum(share < 0.5 for share in shares) + len(passages) - len(shares)
    what = "prompt" if coverage.get("kind") == "system prompt" else "text"
    parts = [
        '<section aria-labelledby="h-coverage">',
        f'<h2 id="h-coverage">The {what}, and how much of it was taken over</h2>',
        '<p class="scale"><span>nothing</span><i class="cover"></i><span>all</span> · of what the passage changes in '
        "the teacher's answers, in nats; <b>?</b>: no question was kept</p>",
        f'<p class="muted">{len(passages)} passages, {least} of them under one half.</p>',
        '<div class="coverage">',
    ]
    source, headings = None, None
    for passage in passages:
        if passage["source"] != source and len({p["source"] for p in passages}) > 1:
            source = passage["source"]
            parts.append(f'<p class="source">{escape(source)}</p>')
        if passage["headings"] != headings:
            headings = passage["headings"]
            if headings:
                parts.append(f"<h3>{escape(' › '.join(headings))}</h3>")
        parts.append(_passage(passage))
    if rules := coverage.get("rules"):
        parts += ["<h3>Rule by rule: what each changes by itself</h3>", *map(_passage, rules)]
    return "\n".join([*parts, "</div>", "</section>"])


def _passage(passage: Mapping[str, Any]) -> str:
    share = passage.get("recovered")
    unknown = "changes little" if passage["questions"] else "?"
    label = f"{100 * share:.0f} %" if is_number(share) else unknown
    strength = min(1.0, max(0.0, share)) if is_number(share) else 0.0
    known = "known" if is_number(share) else "unknown"
    head = (
        f'<summary><span class="passage-text" dir="auto">{escape(passage["text"])}</span> <b>{label}</b></summary>'
        if passage["questions"]
        else f'<p><span class="passage-text" dir="auto">{escape(passage["text"])}</span> <b>{label}</b></p>'
    )
    body = "".join(_question(question) for question in passage["questions"])
    tag = "details" if passage["questions"] else "div"
    return f'<{tag} class="passage {known}" style="--share:{strength:.2f}">{head}{body}</{tag}>'


def _question(question: Mapping[str, Any]) -> str:
    share = question.get("recovered")
    told = f"{100 * share:.0f} %" if is_number(share) else "–"
    mark = "held out" if question.get("held_out") else "trained on"
    rows = "".join(
        f'<tr><th scope="row" class="{name}">{label}</th><td dir="auto">{escape(question[name])}</td></tr>'
        for name, label in (("base", "base"), ("teacher", "with the text"), ("student", "student"))
    )
    return (
        f'<div class="asked"><p dir="auto"><b>{escape(question["question"])}</b> '
        f"<small>{mark}, {told} taken over</small></p><table>{rows}</table></div>"
    )
