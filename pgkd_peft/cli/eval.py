"""`pgkd eval`: base, base with PI, student, student with PI on held-out rows; drift on neutral prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.named import load_named, split_of
from ..errors import ConfigError, DataError, read_text
from ..evaluation.controls import CONTROLS, check_controls
from ..run.place import check_writable
from .arguments import Parser, column_templates, read_recipe
from .train import RECIPE_FILE, recipe_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.table import Table

    from ..data.collator import DataCollatorForPrivilegedGKD
    from ..evaluation.answers import Drift, Evaluation
    from ..export.adapter import AdapterRun

RESULTS_FILE = "eval_results.json"
ANSWERS_FILE = "eval_answers.jsonl"

DESCRIPTION = """Judge a trained adapter on rows that it was not trained on: how much of what the privileged information
(PI) gives the base has the student taken up (the recovered gap), and how far has it moved from the base elsewhere."""


@dataclass
class EvalArguments:
    """What to judge on, and how. Defaults come from the run folder: its data's test split, its placement of PI."""

    _argument_group_name = "evaluation"

    dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out rows: as --dataset_name of pgkd train. Default: that of the run."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Default: train for a single file, else the run's dataset_test_split."}
    )
    columns: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Column templates, as for pgkd train. Default: those of the run."}
    )
    scorer: str | None = field(
        default=None,
        metadata={
            "help": "exact, contains, regex, numeric, choice, or module:function for one of your own. Default: that of "
            "the run, else contains."
        },
    )
    answer_key: str | None = field(
        default=None,
        metadata={
            "help": "Column with the reference; without it the final assistant message. Default: that of the run, "
            "else answer."
        },
    )
    group_key: str | None = field(
        default=None, metadata={"help": "Column that marks rows which belong together, for the bootstrap interval."}
    )
    controls: list[str] | None = field(
        default=None,
        metadata={
            "help": "Controls to compare with, e.g. shuffled,no_pi,sft (or offline): the run trained again with one "
            "thing taken away, see --control of pgkd train. Missing ones are trained first, into RUN_DIR/controls."
        },
    )
    neutral_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts on which the student should answer as the base does: drift. Default: those of the run."
        },
    )
    neutral_dataset_split: str | None = field(
        default=None, metadata={"help": "Split of neutral_dataset_name. Default: that of the run, else train."}
    )
    text_file: str | None = field(default=None, metadata={"help": "A text whose perplexity is measured."})
    limit: int | None = field(default=None, metadata={"help": "Only the first n rows."})
    max_new_tokens: int = field(default=64, metadata={"help": "Length limit of an answer."})
    hint_phrases: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions of answers that speak of the hint, instead of the usual."}
    )
    seed: int = field(default=0, metadata={"help": "Of the bootstrap."})
    show: int = field(default=4, metadata={"help": "Answers to show side by side."})
    out: str | None = field(default=None, metadata={"help": f"Where to write {RESULTS_FILE}; default: the adapter's."})
    base_model: str | None = field(default=None, metadata={"help": "The base, when it is no longer where it was."})
    base_quantization: str | None = field(
        default=None, metadata={"help": "How to load the base: nf4, int8 or none. Default: as in training."}
    )

    def __post_init__(self) -> None:
        self.columns = column_templates(self.columns)
        if self.controls is not None:
            self.controls = check_controls(self.controls)
        for phrase in self.hint_phrases or ():
            try:
                re.compile(phrase)
            except re.error as error:
                raise ConfigError(f"hint_phrases: {phrase!r} is not a regular expression: {error}") from error
        if self.text_file is not None and not Path(self.text_file).is_file():
            raise ConfigError(f"text_file is {self.text_file!r}, which is no file")
        for name, least in (("max_new_tokens", 1), ("limit", 1), ("show", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be {least} or more")


def main(argv: Sequence[str]) -> int:
    """Evaluate an adapter; results go to the console, to eval_results.json and into the model card."""
    rest = list(argv)
    adapter = rest.pop(0) if rest and not rest[0].startswith("-") else None
    (args,) = Parser([EvalArguments], "pgkd eval ADAPTER", DESCRIPTION).parse(rest)
    if adapter is None:
        raise ConfigError("missing is the adapter: pgkd eval ADAPTER [options], e.g. the run folder of a training")
    return run_eval(adapter, args)


def run_eval(adapter: str, args: EvalArguments) -> int:
    """The body of :func:`main`. Rows and references are checked before the model is loaded."""
    from rich.console import Console

    from ..data.check import validate_rows
    from ..evaluation.answers import HINT_PHRASES, evaluate, measure_drift, perplexity
    from ..evaluation.scorers import check_scorable, make_scorer
    from ..export.adapter import read_run
    from ..model.adapters import adapter_state, load_adapter
    from .controls import find_controls

    console = Console()
    run = read_run(adapter, quantization=args.base_quantization, base_model=args.base_model, log=console.print)
    out = Path(args.out or run.folder / RESULTS_FILE)
    check_writable(out, "--out", file=True)
    collator = collator_of(run)
    take_from_recipe(args, run_recipe(run))
    scorer = make_scorer(str(args.scorer), answer_key=str(args.answer_key))
    rows = held_out_rows(run, args)
    validate_rows(rows, collator)
    check_scorable(rows, scorer)
    if args.group_key is not None and any(args.group_key not in row for row in rows):
        raise DataError(f"group_key is {args.group_key!r}, a column that the rows do not have")
    neutral = None
    if args.neutral_dataset_name is not None:
        split = split_of(args.neutral_dataset_name, args.neutral_dataset_split or "train")
        neutral = list(load_named(args.neutral_dataset_name, split=split))
        validate_rows(neutral, collator)
    text = text_ids(args.text_file, collator) if args.text_file else None
    controls = find_controls(run, args.controls) if args.controls else []
    for control in controls:
        if control.finished:
            console.print(f"control {control.name}: {control.folder} is trained already")
        else:
            console.print(f"\ntraining the control {control.name} ({CONTROLS[control.name]}) in {control.folder}")
            control.train()

    model = load_student(run)
    settings: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "group_key": args.group_key,
        "phrases": args.hint_phrases or HINT_PHRASES,
        "seed": args.seed,
    }
    result = evaluate(model, collator, rows, scorer, **settings)
    if neutral is not None:
        add_drift(result, measure_drift(model, collator, neutral))
    if text is not None:
        for name, which in (("base", "disabled"), ("student", "shared")):
            with adapter_state(model, which) as weights:
                result.extra[f"perplexity_{name}"] = perplexity(weights, text)

    compared: dict[str, Evaluation] = {}
    for control in controls:
        load_adapter(model, control.folder)
        three = ("base", "teacher", "student")
        compared[control.name] = evaluate(model, collator, rows, scorer, columns=three, known=result, **settings)
        if neutral is not None:
            add_drift(compared[control.name], measure_drift(model, collator, neutral))
    if compared:
        result.extra["controls"] = {name: control_summary(other) for name, other in compared.items()}

    show(result, console, args.show)
    if run.info.get("control"):
        result.extra["control"] = run.info["control"]
        console.print(f"[bold]This is the control {run.info['control']} of a run, not the run itself.[/]")
    told = {"scorer": args.scorer, "max_new_tokens": args.max_new_tokens, "seed": args.seed, "adapter": adapter}
    write_results(result, out, told)
    update_card(run.folder / "README.md", result, told)
    console.print(f"Results: {out}; every answer: {answers_file(out)}")
    return 0


def text_ids(path: str, collator: DataCollatorForPrivilegedGKD) -> list[int]:
    """The tokens of a text whose perplexity is to be measured.

    Raises:
        PGKDError: it cannot be read, or is too short.
    """
    text = read_text(path, "text_file")
    ids: list[int] = collator.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise DataError(f"text_file {path!r} has {len(ids)} tokens; a perplexity needs two at least.")
    return ids


def add_drift(result: Evaluation, drift: Drift) -> None:
    result.extra.update(drift=drift.kl, drift_details=asdict(drift))


def control_summary(result: Evaluation) -> dict[str, Any]:
    """Of a control what concerns its student: base and teacher are those of the run."""
    summary = result.summary()
    return {**summary, "columns": {"student": summary["columns"]["student"]}}


def held_out_rows(run: AdapterRun, args: EvalArguments) -> list[Mapping[str, Any]]:
    """The rows to judge on: those that were asked for, else the test split of the data that the run was told of."""
    recipe = run_recipe(run)
    name = args.dataset_name or recipe.get("eval_dataset_name") or recipe.get("dataset_name")
    if name is None:
        raise ConfigError("nothing says which rows to judge on; give --dataset_name FILE")
    split = args.dataset_split or split_of(name, recipe.get("dataset_test_split", "test"))
    columns = args.columns
    if columns is None and name in (recipe.get("dataset_name"), recipe.get("eval_dataset_name")):
        columns = recipe.get("columns")
    rows = load_named(
        name,
        split=split,
        config_name=args.dataset_config or recipe.get("dataset_config"),
        columns=columns if isinstance(columns, dict) else None,
        privileged_key=privileged_key(run),
    )
    return list(rows)[: args.limit]


def take_from_recipe(args: EvalArguments, recipe: Mapping[str, Any]) -> None:
    """What was not said is as the run had it, and else the usual."""
    usual = {"scorer": "contains", "answer_key": "answer", "neutral_dataset_name": None, "neutral_dataset_split": None}
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, recipe.get(name) or value)


def run_recipe(run: AdapterRun) -> dict[str, Any]:
    """What the run was told, from its folder; {} when it was not trained by `pgkd train`."""
    folder = recipe_folder(run.folder)
    return read_recipe(str(folder / RECIPE_FILE), use_env=False) if folder is not None else {}


def privileged_key(run: AdapterRun) -> str:
    return str(run.info.get("config", {}).get("privileged_key", "privileged_messages"))


def collator_of(run: AdapterRun) -> DataCollatorForPrivilegedGKD:
    """The collator that the run trained with, from its tokenizer and run.json; the defaults where that says nothing."""
    from ..data.collator import DataCollatorForPrivilegedGKD
    from ..model.load import load_tokenizer

    source = run.folder if (run.folder / "tokenizer_config.json").is_file() else run.base
    names = ("privileged_key", "max_privileged_length", "privileged_placement", "privileged_template")
    settings = {name: value for name, value in run.info.get("config", {}).items() if name in names}
    settings["max_length"] = None  # of an answer only the prompt is read here
    return DataCollatorForPrivilegedGKD(load_tokenizer(str(source)), **settings)


def load_student(run: AdapterRun) -> PeftModel:
    """The adapter on its base, as training held it.

    Raises:
        ModelError: it cannot be loaded, or the base is another one than in training.
    """
    from ..export.adapter import check_base, load_trained

    model = load_trained(run)
    check_base(model, run)
    return model


LABELS = {
    "base": "base",
    "teacher": "base with PI (teacher)",
    "student": "student",
    "student_with_pi": "student with PI",
}


def show(result: Evaluation, console: Any, examples: int) -> None:
    """The result table, the recovered gap, the controls, and a few answers side by side."""
    from rich.table import Table

    summary = result.summary()
    table = Table(title=f"{result.n} held-out rows")
    table.add_column("")
    for name in ("score", "tokens", "cut off", "speaks of the hint", "PI 4-grams"):
        table.add_column(name, justify="right")
    for name, column in summary["columns"].items():
        table.add_row(LABELS[name], f"{column['score']:.3f}", *details(column))
    console.print(table)
    console.print(recovered_line(summary))
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
        console.print(answers_table(result, examples))


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
    for name in (*names, "tokens", "cut off", "of the hint", "4-grams"):
        table.add_column(name, justify="right")
    for name, of in {"this run": summary, **summary["controls"]}.items():
        column = of["columns"]["student"]
        cells = [f"{column['score']:.3f}", recovered_cell(of), *([f"{of['drift']:.4f}"] if "drift" in of else [])]
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


def answers_table(result: Evaluation, count: int) -> Table:
    """`count` rows, spread over the set: prompt, base, teacher and student, with what was right in green."""
    from rich.table import Table
    from rich.text import Text

    from ..data.tokens import visible

    table = Table(title="Answers side by side", show_lines=True)
    table.add_column("prompt", ratio=3)
    for name in result.answers:
        table.add_column(LABELS[name], ratio=3)
    step = max(1, result.n // count)
    for i in list(range(0, result.n, step))[:count]:
        cells = [
            Text(visible(answers[i][:300]), style="green" if result.scores[name][i] >= 1 else "")
            for name, answers in result.answers.items()
        ]
        table.add_row(Text(visible(result.prompts[i][-300:])), *cells)
    return table


def update_card(path: Path, result: Evaluation, settings: Mapping[str, Any]) -> None:
    """Put the results into the model card, in place of those of the same scorer that it has; without a card nothing."""
    if not path.is_file():
        return
    summary = result.summary()
    title = f"## Evaluation ({settings['scorer']})"
    lines = [title, "", f"{result.n} held-out rows, greedy, at most {settings['max_new_tokens']} tokens.", ""]
    lines += ["| | score | tokens | speaks of the hint |", "|---|---|---|---|"]
    for name, column in summary["columns"].items():
        lines.append(
            f"| {LABELS[name]} | {column['score']:.3f} | {column['length_tokens']:.1f} | {column['hint_share']:.2f} |"
        )
    lines += ["", recovered_line(summary).capitalize() + "."]
    if summary.get("controls"):
        lines += ["", "Trained again with one thing taken away:", ""]
        lines += ["| | score | recovered gap | drift | tokens | speaks of the hint |", "|---|---|---|---|---|---|"]
        for name, of in {"student": summary, **summary["controls"]}.items():
            column = of["columns"]["student"]
            moved = f"{of['drift']:.4f}" if "drift" in of else ""
            lines.append(
                f"| {f'{name}: {CONTROLS[name]}' if name in CONTROLS else 'this run'} | {column['score']:.3f} | "
                f"{recovered_cell(of)} | {moved} | {column['length_tokens']:.1f} | {column['hint_share']:.2f} |"
            )
    if "drift" in summary:
        lines += ["", f"Drift on neutral prompts: {summary['drift']:.4f} nats/token KL(base || student)."]
    card = path.read_text(encoding="utf-8")
    before, found, after = card.partition(title + "\n")
    rest = after[after.index("\n## ") :] if found and "\n## " in after else ""
    path.write_text(f"{before.rstrip()}\n\n" + "\n".join(lines) + "\n" + rest, encoding="utf-8")


def write_results(result: Evaluation, path: Path, settings: Mapping[str, Any]) -> None:
    """The summary as JSON at `path`, and every answer beside it, one line a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result.summary(), **settings}, indent=2) + "\n", encoding="utf-8")
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in result.records()]
    answers_file(path).write_text("".join(lines), encoding="utf-8")


def answers_file(results: Path) -> Path:
    """Where the answers behind a results file lie."""
    return results.with_name(ANSWERS_FILE) if results.name == RESULTS_FILE else results.with_suffix(".answers.jsonl")
