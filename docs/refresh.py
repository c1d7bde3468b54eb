"""Makes what is made by program: docs/api.md, the table in docs/architectures.md, the outputs in docs/walkthrough.md,
the notebook's stored outputs, the README's pictures.

    python docs/refresh.py api            docstrings -> api.md (a test checks that it is up to date)
    python docs/refresh.py architectures  results of `make zoo` -> the tables in architectures.md, and TESTED in
                                          pgkd_peft/conformance.py (checked as well)
    python docs/refresh.py walkthrough    runs the walkthrough's commands in a fresh clone, and stores what they print
    python docs/refresh.py notebook       runs the notebook with its own settings, and stores its outputs
    python docs/refresh.py pictures RUN   draws the README's pictures from the folder of a run of the demo (Chromium)

Of what commands print, the folders that they ran in are left out; nothing else is changed.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
API = ROOT / "docs" / "api.md"
WALKTHROUGH = ROOT / "docs" / "walkthrough.md"
ARCHITECTURES = ROOT / "docs" / "architectures.md"
CONFORMANCE = ROOT / "pgkd_peft" / "conformance.py"
ZOO = ROOT / "tests" / "benchmarks" / "results" / "zoo.jsonl"
NOTEBOOK = ROOT / "examples" / "privileged_gkd_colab.ipynb"

# What a user's own program calls, by module. Everything else is how it is done.
PUBLIC = {
    "trainer": ["PrivilegedSelfDistillTrainer"],
    "config": ["PrivilegedGKDConfig"],
    "data.collator": ["DataCollatorForPrivilegedGKD"],
    "evaluation.gap_callback": ["RecoveredGapCallback"],
    "data.named": ["load_named"],
    "data.load": ["load_rows", "map_columns"],
    "data.check": ["validate_rows", "DataReport"],
    "view.inspect": ["inspect_rows"],
    "evaluation.answers": [
        "evaluate",
        "Evaluation",
        "recovered_gap",
        "bootstrap_recovered",
        "measure_drift",
        "Drift",
        "leakage",
    ],
    "evaluation.scorers": ["make_scorer"],
    "divergence": ["linear_jsd"],
    "model.adapters": ["adapter_state"],
    "model.load": ["load_base", "load_tokenizer", "attach_lora", "default_lora"],
    "model.demo": ["demo_model_path"],
    "export.merge": ["merge_adapter"],
    "export.publish": ["export_adapter"],
    "view.report": ["write_report"],
}
ERRORS = ("errors", "trainer", "run.memory", "run.interrupt", "export.merge")

# ---- api.md --------------------------------------------------------------------------------------------------------


def api_markdown() -> str:
    """The public names with their signatures and docstrings."""
    parts = [
        "# API reference",
        "Made from the docstrings by `python docs/refresh.py api`. Names of `pgkd_peft` itself come first; the others "
        "are imported from their module, e.g. `from pgkd_peft.evaluation.answers import evaluate`. The command "
        "line has its own help: `pgkd COMMAND --help`.",
    ]
    for module, names in PUBLIC.items():
        found = _definitions(module)
        for name in names:
            shown = f"pgkd_peft.{name}" if _is_top_level(name) else f"pgkd_peft.{module}.{name}"
            parts += [f"## `{shown}`", *_entry(found[name], _source(module))]
    parts += ["## Errors", "All of them are a `PGKDError`, which is a `ValueError`, unless their base says otherwise."]
    lines = []
    for module in ERRORS:
        for name, node in _definitions(module).items():
            if isinstance(node, ast.ClassDef) and name.endswith(("Error", "Interrupted")):
                bases = ", ".join(ast.unparse(base) for base in node.bases)
                first = (ast.get_docstring(node) or "").split("\n\n")[0]
                lines.append(f"* `pgkd_peft.{module}.{name}({bases})`: {_inline(' '.join(first.split()))}")
    return "\n\n".join(part for part in parts if part) + "\n\n" + "\n".join(lines) + "\n"


def _source(module: str) -> str:
    return (ROOT / "pgkd_peft" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")


def _definitions(module: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    body = ast.parse(_source(module)).body
    return {node.name: node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


def _is_top_level(name: str) -> bool:
    return f'"{name}",' in _source("__init__")


def _entry(node: ast.ClassDef | ast.FunctionDef, source: str) -> Iterator[str]:
    """A definition as Markdown: signature, docstring, and of a class its settings and public methods."""
    function = node
    if isinstance(node, ast.ClassDef):
        methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
        function = next((child for child in methods if child.name == "__init__"), node)
    if isinstance(function, ast.FunctionDef):
        yield f"```python\n{_signature(function, source, node.name)}\n```"
    yield from _docstring(node)
    if not isinstance(node, ast.ClassDef):
        return
    fields = list(_settings(node))
    if fields:
        yield "\n".join(["| field | default | meaning |", "|---|---|---|", *fields])
    for child in methods:
        documented = ast.get_docstring(child)
        if documented and not child.name.startswith("_"):
            heading = documented.split("\n\n")[0]
            yield f"**`{child.name}`** {_inline(' '.join(heading.split()))}"


def _signature(function: ast.FunctionDef, source: str, name: str) -> str:
    """As it stands in the source, without `self`."""
    lines = source.splitlines()[function.lineno - 1 : function.body[0].lineno - 1]
    text = inspect.cleandoc("\n".join(lines))
    text = text[: text.rindex(":")] if function.body[0].lineno > function.lineno else text
    text = re.sub(r"^def \w+", name, text)
    text = re.sub(r"\(\s*self,?\s*", lambda match: "(\n    " if "\n" in match.group() else "(", text, count=1)
    return text.removesuffix(" -> None")


def _docstring(node: ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    """Paragraphs; the sections Args, Returns, Raises and Attributes as lists."""
    for block in re.split(r"\n\n+", ast.get_docstring(node) or ""):
        heading, _, rest = block.partition("\n")
        if heading in ("Args:", "Returns:", "Raises:", "Attributes:"):
            yield f"**{heading.removesuffix(':')}**"
            yield "\n".join(_items(textwrap.dedent(rest)))
        elif heading.startswith(">>>"):
            yield f"```python\n{block}\n```"
        else:
            yield _inline(block)


def _items(text: str) -> Iterator[str]:
    """One line an item; what is indented belongs to the item above it."""
    items: list[str] = []
    for line in text.splitlines():
        if line.startswith(" ") and items:
            items[-1] += ("\n  " if line.strip().startswith("* ") else " ") + line.strip()
        else:
            items.append(line.strip())
    for item in items:
        match = re.match(r"([\w, ]+?|``\w+``): (.*)", item, flags=re.S)
        if match is None:
            yield f"* {_inline(item)}"
            continue
        text = re.sub(r"^\* ", "\n  * ", match[2])  # the item is a list itself
        yield f"* `{match[1].replace('`', '')}`: {_inline(text)}".replace(": \n", ":\n")


def _settings(node: ast.ClassDef) -> Iterator[str]:
    """The fields of a dataclass that carry help, as rows of a table."""
    for child in node.body:
        if not (isinstance(child, ast.AnnAssign) and isinstance(child.value, ast.Call)):
            continue
        given = {keyword.arg: keyword.value for keyword in child.value.keywords}
        if "metadata" in given:
            told = ast.literal_eval(given["metadata"].values[given["metadata"].keys.index(_key(given["metadata"]))])
            yield f"| `{ast.unparse(child.target)}` | `{ast.unparse(given['default'])}` | {told.replace('|', '/')} |"


def _key(metadata: ast.Dict) -> ast.expr:
    return next(key for key in metadata.keys if isinstance(key, ast.Constant) and key.value == "help")


def _inline(text: str) -> str:
    """reStructuredText's marks as Markdown's."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


# ---- architectures.md ----------------------------------------------------------------------------------------------


def architectures(text: str) -> str:
    """The page with its tables made anew, one for each kind of architecture."""
    lines = [json.loads(line) for line in ZOO.read_text(encoding="utf-8").splitlines()]

    def table(match: re.Match[str]) -> str:
        rows = [_architecture(line) for line in lines if line["kind"] == match[1]]
        head = ["| model_type | result | LoRA on | in 4 bits | remarks |", "|---|---|---|---|---|"]
        return f"<!-- {match[1]} -->\n" + "\n".join([*head, *rows]) + "\n<!-- end -->"

    text = re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, text, flags=re.S)
    versions = ", ".join(f"{name} {version}" for name, version in lines[-1]["versions"].items())
    greens, refused = (sum(line["result"] == kind for line in lines) for kind in ("green", "refused"))
    counts = f"{len(lines)} architectures: {greens} green, {refused} refused by name ({versions})."
    return re.sub(r"^\d+ architectures: .*$", counts, text, flags=re.M)


def tested(source: str) -> str:
    """The source of conformance.py with the model types that are green."""
    lines = [json.loads(line) for line in ZOO.read_text(encoding="utf-8").splitlines()]
    green = sorted({line["model_type"] for line in lines if line["result"] == "green"})
    names = textwrap.fill(" ".join(green), 119, initial_indent="    ", subsequent_indent="    ")
    return re.sub(r'(TESTED = frozenset\(\n    """\n).*?(\n    """)', rf"\g<1>{names}\g<2>", source, flags=re.S)


def _architecture(line: dict) -> str:
    """One row: what is right, what is not offered, what is refused and why."""
    checks, remarks = line["checks"], []
    if line["result"] == "refused":
        said = checks["start"].removeprefix("refused: ")
        remarks.append(re.split(r" Teacher and student|\. Take a", said)[0].rstrip("."))
    if checks.get("start nf4", "ok") != "ok":
        remarks.append(f"NF4 {checks['start nf4']}")
    if line.get("own prompts"):
        remarks.append(f"prompts are not shared: {line['own prompts']}")
    if (said := checks.get("merged", "ok")) != "ok":
        remarks.append(f"rollouts by the adapter engine alone: {said.removeprefix('not offered: ')}")
    if checks.get("peft", "ok") != "ok":
        remarks.append("PEFT alone loads this adapter wrongly: merge it, or load it with pgkd")
    if line.get("left out"):
        remarks.append("no LoRA on " + "; ".join(line["left out"]))
    shares = [f"{line[name]:.0%}" if name in line else "" for name in ("adapted", "nf4")]
    return (
        f"| `{line['name']}` | {line['result']} | {shares[0]} | {shares[1]} | {'. '.join(remarks).replace('|', '/')} |"
    )


# ---- what commands print -------------------------------------------------------------------------------------------


def clean(text: str, folder: str) -> str:
    """What a terminal shows in the end: no escape codes, no progress bars, no folders of this machine."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = text.replace("\r\n", "\n").split("\n")
    lines = [line.rpartition("\r")[2] for line in lines if not re.search(r"\d+%\|.*\|", line)]
    return without_folders("\n".join(lines), folder)


def without_folders(text: str, folder: str) -> str:
    """The text with paths relative to `folder`, and ~ for the home directory."""
    for there in {folder, os.path.realpath(folder)}:
        text = text.replace(there + "/", "").replace(there, ".")
    return text.replace(str(Path.home()), "~")


def shorten(text: str, first: int = 14, last: int = 46) -> str:
    """The first and the last lines of a long output."""
    lines = [line.rstrip() for line in text.split("\n")]
    return "\n".join(lines if len(lines) <= first + last else [*lines[:first], "[...]", *lines[-last:]])


def walkthrough(text: str) -> str:
    """The text with its ```console blocks run anew: after a line `$ command` stands what the command printed."""
    with tempfile.TemporaryDirectory() as folder:
        clone = f"{folder}/pgkd-peft"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), clone], check=True)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": clone, "COLUMNS": "110", "HF_HUB_OFFLINE": "1"}

        def run_block(match: re.Match[str]) -> str:
            shown = []
            for command in re.findall(r"^\$ (.*)", match[1], flags=re.M):
                print(f"$ {command}", flush=True)
                done = subprocess.run(
                    ["bash", "-c", command],
                    cwd=clone,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    check=False,
                )
                printed = shorten(clean(done.stdout, clone).strip("\n"))
                shown.append(f"$ {command}\n{printed}" if printed else f"$ {command}")
            return "```console\n" + "\n".join(shown) + "\n```"

        return re.sub(r"^```console\n(.*?)^```", run_block, text, flags=re.S | re.M)


def notebook() -> None:
    """Run the notebook in an empty folder and store its outputs in it."""
    import nbformat
    from nbclient import NotebookClient

    stored = nbformat.read(NOTEBOOK, 4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(stored, timeout=7200, kernel_name="python3", resources=resources).execute()
        for cell in stored.cells:
            cell.metadata.pop("execution", None)
            if cell.cell_type == "code":
                cell.outputs = list(_joined(cell.outputs))
        text = nbformat.writes(stored)
        NOTEBOOK.write_text(without_folders(text, folder) + "\n", encoding="utf-8")


def _joined(outputs: list) -> Iterator:
    """Successive pieces of one stream as one output."""
    last = None
    for output in outputs:
        if last is not None and output.output_type == "stream" and last.get("name") == output.name:
            last.text += output.text
            continue
        if last is not None:
            yield last
        last = output
    if last is not None:
        yield last


# ---- pictures ------------------------------------------------------------------------------------------------------

PICTURES = ROOT / "examples" / "images"
WIDTH = 900  # pixels, about what GitHub shows a README in: there the picture keeps its size
COLUMNS = 84  # of a terminal's picture: at 17 px a monospaced letter is a little over 10 px wide
TERMINAL = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #16161a; color: #dcdce2; }}
pre {{ margin: 0; padding: 14px 18px; font: 17px/1.17 "DejaVu Sans Mono", monospace; }}
i.dots {{ display: inline-block; width: 1ch; height: 1.17em; vertical-align: top; font-style: normal; }}
i.dots b {{ display: inline-block; font-weight: 400; transform: scaleX(.82); transform-origin: 0 0; }}
</style><pre>{code}</pre>"""


def pictures(run: Path) -> None:
    """inspect.png, live.png and report.png, each WIDTH pixels wide."""
    from rich.terminal_theme import MONOKAI

    from pgkd_peft.view.report import write_report

    with tempfile.TemporaryDirectory() as folder:
        for name, draw in (("inspect", draw_inspect), ("live", lambda console: draw_live(console, run))):
            console = recording()
            draw(console)
            text = console.export_html(theme=MONOKAI, inline_styles=True, code_format=TERMINAL)
            text = re.sub(r"([\u2800-\u28ff])", r'<i class="dots"><b>\1</b></i>', text)  # few fonts have them narrow
            page = Path(folder) / f"{name}.html"
            page.write_text(text, encoding="utf-8")
            lines = text.split("<pre>")[1].split("╭─ all rows ")[0].rstrip("\n").count("\n")
            photograph(page, PICTURES / f"{name}.png", 20 + round(lines * 17 * 1.17))
        photograph(write_report(run, Path(folder) / "report.html"), PICTURES / "report.png", 935)


def recording() -> Any:
    from rich.console import Console

    return Console(
        record=True, file=io.StringIO(), width=COLUMNS, height=64, force_terminal=True, color_system="truecolor"
    )


def draw_inspect(console: Any) -> None:
    """What `pgkd inspect` prints of two rows of the demo's, with PI and without; the totals below are cut off."""
    import pgkd_peft.cli.inspect as command

    command.make_console = lambda no_color=False: console
    command.main(["--config", str(ROOT / "recipes" / "facts_cpu.yaml"), "--rows", "2"])


def draw_live(console: Any, run: Path) -> None:
    """The terminal as it was at the run's last rollout log: the rollouts, and the view below them."""
    from types import SimpleNamespace

    from pgkd_peft.rollout_log import show
    from pgkd_peft.run.console import drawing_on
    from pgkd_peft.run.jsonl import is_number, read_json, read_lines
    from pgkd_peft.view.progress import Pace
    from pgkd_peft.view.terminal import LiveView

    logged = read_lines(run / "completions.jsonl")
    step = logged[-1]["step"]
    seen = [line for line in read_lines(run / "metrics.jsonl") if line["step"] <= step and "train_runtime" not in line]
    view = LiveView(SimpleNamespace(args=SimpleNamespace(output_dir=run)), console)  # type: ignore[arg-type]
    for line in seen:
        for name, value in line.items():
            if is_number(value):
                view.history[name].append(value)
    steps = read_json(run / "run.json")["config"]["max_steps"]
    view.step, view.max_steps, view.epoch, view.status = step, steps, seen[-1]["epoch"], "training"
    view.rollout = (logged[-1]["question"], logged[-1]["rollout"])
    seconds = (seen[-1]["time"] - seen[0]["time"]) / (seen[-1]["step"] - seen[0]["step"])

    class AsItWas(Pace):
        elapsed = seconds * step
        seconds_a_step = seconds

    view.pace = AsItWas()
    with drawing_on(console):
        show([record for record in logged if record["step"] == step], 240)
    console.print(view.render())


def photograph(page: Path, picture: Path, height: int) -> None:
    """The page in Chromium, WIDTH x `height` pixels of it."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("pictures are drawn by Chromium, which is not installed")
    quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
    switches = ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars", *quiet, "virtual-time-budget=5000")
    flags = [f"--{switch}" for switch in (*switches, f"window-size={WIDTH},{height}", f"screenshot={picture}")]
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *flags, f"--user-data-dir={profile}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    print(picture)


def main(what: str, run: str | None = None) -> None:
    if what == "pictures" and run is not None:
        pictures(Path(run))
    elif what == "api":
        API.write_text(api_markdown(), encoding="utf-8")
    elif what == "architectures":
        ARCHITECTURES.write_text(architectures(ARCHITECTURES.read_text(encoding="utf-8")), encoding="utf-8")
        CONFORMANCE.write_text(tested(CONFORMANCE.read_text(encoding="utf-8")), encoding="utf-8")
    elif what == "walkthrough":
        WALKTHROUGH.write_text(walkthrough(WALKTHROUGH.read_text(encoding="utf-8")), encoding="utf-8")
    elif what == "notebook":
        notebook()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:3]) if len(sys.argv) > 1 else sys.exit(__doc__)
