"""What :func:`pgkd_peft.view.report.collect` found -> one HTML page.

Everything that comes from the run (prompts, answers, names) is data: it reaches the page escaped, or as JSON that the
page's own script writes with ``textContent``. The page's content security policy lets no other script run and nothing
be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from ..evaluation.controls import CONTROLS
from ..run.jsonl import is_number
from .report_plots import Course, escape, gap_against_drift, gap_of_each, is_interval
from .words import LABELS, duration, rows_called

ASSETS = files("pgkd_peft") / "assets" / "report"


def render(data: Mapping[str, Any], coverage: str = "") -> str:
    """The page as text; `coverage` is a section of it, for a bake."""
    body = {
        "results": results_section(data["results"]),
        "gaps": gaps_section(data),
        "coverage": coverage,
        "answers": answers_section(data["answers"]),
        "facts": facts_section(data["run"]),
    }
    shown = {name: data[name] for name in ("metrics", "traces", "final")}
    return page(f"{data['name']} · pgkd report", header(data), fill("run.html", body), shown)


def fill(template: str, parts: Mapping[str, str]) -> str:
    """An asset with ``{{name}}`` replaced."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], asset(template))


def page(name: str, head: str, body: str, shown: Mapping[str, Any]) -> str:
    """The page around `body`; `shown` is what its script draws."""
    script = asset("report.js")
    library = asset("uPlot.iife.min.js")
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src '{csp_hash(library)}' '{csp_hash(script)}'"
    )
    parts = {
        "title": escape(name),
        "policy": policy,
        "style": asset("uPlot.min.css") + asset("report.css"),
        "header": head,
        "body": body,
        "data": script_json(shown),
        "license": " ".join(asset("uPlot-LICENSE.txt").split()).replace("--", "- -"),
        "library": library,
        "script": script,
    }
    return fill("template.html", parts)


def asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def csp_hash(script: str) -> str:
    """A script's hash, as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no character in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub(r"[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def number(value: Any, form: str = ".3f") -> str:
    return format(value, form) if is_number(value) else "–"


def header(data: Mapping[str, Any]) -> str:
    """Title, what was trained, and the numbers that matter."""
    run, metrics = data["run"], data["metrics"]
    config = run.get("config") or {}
    result: Mapping[str, Any] = next((r for r in data["results"] if r["name"] == "this run"), {})
    words = [
        str(run.get("base_model", "")).rstrip("/").rpartition("/")[2],
        {"none": "16-bit base"}.get(str(run.get("base_quantization")), str(run.get("base_quantization") or "")),
        f"control: {run['control']}" if run.get("control") else "",
        f"teacher: {run['teacher_adapter']}" if run.get("teacher_adapter") else "",
        f"{run['dataset_rows']} rows" if run.get("dataset_rows") else "",
        f"seed {run['seed']}" if "seed" in run else "",
    ]
    tiles: list[tuple[str, str, str]] = []
    if is_number(result.get("recovered_nats")):
        interval = result.get("recovered_nats_interval")
        note = "of what the PI changes, on the teacher's answers"
        if is_interval(interval):
            note = f"95% interval {interval[0]:.2f} to {interval[1]:.2f}, {note}"
        tiles.append(("recovered, in nats", number(result["recovered_nats"], ".2f"), note))
    if result.get("recovered") is not None:
        interval = result.get("recovered_interval")
        note = f"n = {result['n']}" if is_number(result.get("n")) else ""
        if is_interval(interval):
            level = result.get("recovered_interval_level")
            note = f"{number(level, '.0%')} interval {interval[0]:.2f} to {interval[1]:.2f}, {note}"
        tiles.append(("recovered gap", number(result["recovered"], ".2f"), note))
    elif gaps := [(m["eval_recovered"], m["step"]) for m in metrics if "eval_recovered" in m]:
        best = max(gaps, key=lambda gap: gap[0])
        tiles.append(
            ("recovered gap", f"{gaps[-1][0]:.2f}", f"while training; highest {best[0]:.2f} at step {best[1]:g}")
        )
    curve = [(m["step"], m["divergence"]) for m in metrics if "divergence" in m]
    if curve:
        tiles.append(("divergence", f"{curve[-1][1]:.3f}", f"nats/token, {curve[0][1]:.3f} at step {curve[0][0]:g}"))
    if is_number(result.get("drift")):
        tiles.append(("drift", f"{result['drift']:.4f}", "nats/token from the base, on neutral prompts"))
    if metrics:
        planned = config.get("max_steps")
        of = f"of {planned}" if is_number(planned) and planned > 0 else ""
        tiles.append(("steps", f"{metrics[-1]['step']:g}", of))
    if is_number(run.get("seconds")) and run["seconds"]:
        tiles.append(("time", duration(run["seconds"]), str(run.get("device", ""))))
    cells = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd><p>{escape(note)}</p></div>'
        for name, value, note in tiles
    )
    about = " · ".join(escape(word) for word in words if word)
    words_on_loss = f'<p class="loss">{escape(run["divergence"])}</p>' if run.get("divergence") else ""
    return f'<h1>{escape(data["name"])}</h1><p class="about">{about}</p>{words_on_loss}<dl class="tiles">{cells}</dl>'


def results_section(results: Sequence[Mapping[str, Any]]) -> str:
    """The gap as a picture, the table with controls, and each column's details."""
    if not results:
        return '<p class="empty">No evaluation in this folder yet: run <code>pgkd eval</code> on it.</p>'
    names = [(key, label) for key, label in LABELS.items() if any(is_number(r.get(key)) for r in results)]
    heads = "".join(f'<th scope="col">{escape(label)}</th>' for _, label in names)
    rows = []
    for result in results:
        cells = "".join(cell(key.replace("_", " "), number(result.get(key))) for key, _ in names)
        interval = result.get("recovered_interval")
        between = ""
        if is_interval(interval):
            between = f" <small>{interval[0]:.2f} to {interval[1]:.2f}</small>"
        gap = f"<b>{number(result.get('recovered'), '.2f')}</b>{between}"
        rows.append(
            f'<tr><th scope="row">{escape(title(result["name"]))}</th>'
            f"{cell('recovered gap', gap)}{cells}"
            f"{cell('n', number(result.get('n'), 'g'))}{cell('drift', number(result.get('drift'), '.4f'))}</tr>"
        )
    table = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Scores"><table class="stacks"><thead><tr><th></th>'
        f'<th scope="col">recovered gap</th>{heads}<th scope="col">n</th><th scope="col">drift</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    nats = results[0].get("nats")
    told = nats.get("sentence") if isinstance(nats, Mapping) else None
    sentence = f'<p class="muted without-labels">Without labels: {escape(told)}.</p>' if told else ""
    first = results[0]
    rows_told = (
        f'<p class="muted">{escape(rows_called(first))}</p>'
        if "trained_on" in first and is_number(first.get("n"))
        else ""
    )
    return gap_bar(first) + (table if names else "") + rows_told + sentence + details_table(results)


def gaps_section(data: Mapping[str, Any]) -> str:
    """The gap against drift, and the gap of each group of rows; "" without either."""
    results = data["results"]
    while_training = [
        (m["eval_drift"], m["eval_recovered"], f"step {m['step']:g}")
        for m in data["metrics"]
        if is_number(m.get("eval_drift")) and is_number(m.get("eval_recovered"))
    ]
    paths = [Course("this run, while training", while_training)] if while_training else []
    for result in results:
        if is_number(result.get("drift")) and is_number(result.get("recovered")):
            point = (result["drift"], result["recovered"], "judged at the end")
            paths.append(Course(title(result["name"]), [point], place=len(paths)))
    parts = [gap_against_drift(paths), *(groups_box(result) for result in results[:1])]
    parts = [part for part in parts if part]
    if not parts:
        return ""
    return f'<section aria-labelledby="h-gaps"><h2 id="h-gaps">What was learnt where</h2>{"".join(parts)}</section>'


def groups_box(result: Mapping[str, Any]) -> str:
    """The recovered gap of each group of the evaluation's rows."""
    nats = result.get("nats")
    in_nats = nats.get("by_group") if isinstance(nats, Mapping) else None
    for entries, note in (
        (result.get("by_group"), "95% interval of the student's score (Wilson), base and teacher as measured."),
        (in_nats, "In nats on the teacher's answers; 95% interval by bootstrap over the group's rows, from five on."),
    ):
        usable = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
        if drawn := gap_of_each(usable, f"Recovered gap of each group of rows, least first. {note}"):
            return drawn
    return ""


def cell(label: str, inner: str) -> str:
    """A cell that says on a narrow screen, where a table's rows are stacked, what it holds; `inner` is HTML."""
    return f'<td data-label="{escape(label)}"><span>{inner}</span></td>'


def title(name: str) -> str:
    """What to call a result: a control by what it takes away as well."""
    return f"{name}: {CONTROLS[name]}" if name in CONTROLS else name


def gap_bar(result: Mapping[str, Any]) -> str:
    """Base, student and teacher on one line from 0 to 1."""
    scores = [result.get(key) for key in ("base", "teacher", "student")]
    if not all(is_number(score) and 0 <= score <= 1 for score in scores):
        return ""
    base, teacher, student = (100 * float(score) for score in scores if score is not None)
    marks = "".join(
        f'<span class="mark {name}" style="left:{place:.2f}%"><i></i><em>{name} {place / 100:.2f}</em></span>'
        for name, place in (("base", base), ("teacher", teacher), ("student", student))
    )
    low, high = min(base, student), max(base, student)
    return (
        f'<div class="gap" role="img" aria-label="score of base {base / 100:.2f}, student {student / 100:.2f}, '
        f'teacher {teacher / 100:.2f}"><div class="track"><span class="whole" style="left:{min(base, teacher):.2f}%;'
        f'width:{abs(teacher - base):.2f}%"></span><span class="part" style="left:{low:.2f}%;width:{high - low:.2f}%">'
        f"</span>{marks}</div></div>"
    )


def details_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Length and leakage of each column's answers, and of each control's student, where the evaluation has them."""
    columns = results[0].get("columns")
    if not isinstance(columns, Mapping) or not columns:
        return ""
    rows = [(LABELS.get(name, name), column) for name, column in columns.items()]
    for result in results[1:]:
        of = result.get("columns")
        if result["name"] in CONTROLS and isinstance(of, Mapping):
            rows.append((title(result["name"]), of.get("student")))
    names = {
        "length_tokens": ("answer tokens", ".1f"),
        "truncated": ("cut off", ".0%"),
        "hint_share": ("speaks of the hint", ".0%"),
        "pi_overlap": ("copied from PI", ".0%"),
    }
    heads = "".join(f'<th scope="col">{label}</th>' for label, _ in names.values())
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{number(column.get(key), form)}</td>" for key, (_, form) in names.items())
        + "</tr>"
        for name, column in rows
        if isinstance(column, Mapping)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Length and leakage"><table><thead><tr><th></th>'
        f"{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def answers_section(answers: Sequence[Mapping[str, Any]]) -> str:
    """All answers side by side, right ones marked; the page's script sorts and filters them by their scores."""
    if not answers:
        return '<p class="empty">No answers in this folder.</p>'
    cards = []
    for record in answers:
        cells, scores = [], ""
        labels = LABELS
        for key in sorted(record["answers"], key=lambda k: list(labels).index(k) if k in labels else 99):
            score = record["scores"].get(key)
            right = is_number(score) and score >= 1
            mark = "" if not is_number(score) else ' <b class="right">✓</b>' if right else ' <b class="wrong">✗</b>'
            text = escape(record["answers"][key]) or "<i>(empty)</i>"
            cells.append(f'<div><h4>{escape(labels.get(key, key))}{mark}</h4><p dir="auto">{text}</p></div>')
            if key in ("base", "student") and is_number(score):
                scores += f' data-{key}="{score:g}"'
        privileged = f'<p class="pi" dir="auto">PI: {escape(record["privileged"])}</p>' if record["privileged"] else ""
        prompt = f'<h3 dir="auto">{escape(record["prompt"])}</h3>'
        cards.append(
            f'<article class="answer"{scores}>{prompt}{privileged}<div class="cells">{"".join(cells)}</div></article>'
        )
    return "".join(cards)


def facts_section(run: Mapping[str, Any]) -> str:
    """What was trained on what, from run.json."""
    if not run:
        return '<p class="empty">There is no run.json in this folder.</p>'
    parameters, size = run.get("adapter_parameters"), run.get("adapter_bytes")
    memory = run.get("peak_memory_mib") or {}
    versions = {"pgkd-peft": run.get("pgkd_peft"), **(run.get("versions") or {})}
    facts = {
        "command": run.get("command"),
        "base model": run.get("base_model"),
        "base weights": f"{run.get('base_quantization')}, computing in {run.get('compute_dtype')}",
        "base digest": run.get("base_digest"),
        "control": title(str(run["control"])) if run.get("control") else None,
        "teacher": run.get("teacher_adapter"),
        "adapter": f"{parameters:,} parameters, {size / 2**20:.1f} MiB"
        if is_number(parameters) and is_number(size)
        else None,
        "data": f"{run.get('dataset_rows')} rows, {run.get('dataset_rows_with_privileged')} with PI, "
        f"{run.get('privileged_tokens_cut')} PI tokens cut",
        "data fingerprint": run.get("dataset_fingerprint"),
        "device": run.get("device"),
        "peak memory": ", ".join(f"{name} {number(value, ',.0f')} MiB" for name, value in memory.items()),
        "time": duration(run["seconds"]) if is_number(run.get("seconds")) else None,
        "seed": run.get("seed"),
        "git revision": run.get("git_revision"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v not in (None, ""))
    config = run.get("config") or {}
    settings = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in config.items())
    more = f"<details><summary>All {len(config)} settings</summary><dl class='facts'>{settings}</dl></details>"
    return f'<dl class="facts">{rows}</dl>{more if config else ""}'
