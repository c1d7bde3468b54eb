"""`pgkd eval`: base, base with PI, student, student with PI on held-out rows; drift on neutral prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import NoSplitError
from ..data.holdout import trained_on
from ..data.load import give_privileged
from ..data.named import load_named, split_of
from ..errors import ConfigError, DataError, read_text
from ..evaluation.controls import CONTROLS, check_controls
from ..evaluation.scorers import make_scorer
from ..run.console import shared_console
from ..run.folder import (
    CARD_FILE,
    HOLDOUT_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    TOKENIZER_CONFIG,
    TRAINED_FILE,
)
from ..run.place import check_writable, writing
from .arguments import Parser, column_templates, read_recipe, subject
from .judge import add_groups, add_nats, choose_scorer
from .results import (
    add_drift,
    answers_file,
    control_summary,
    show,
    update_card,
    write_results,
)
from .train import recipe_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.console import Console

    from ..data.collator import DataCollatorForPrivilegedGKD
    from ..evaluation.answers import Evaluation
    from ..export.adapter import AdapterRun
    from .controls import ControlRun


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
    privileged_file: str | None = field(
        default=None,
        metadata={"help": "A .txt or .md file with the PI of rows that come without PI. Default: that of the run."},
    )
    scorer: str | None = field(
        default=None,
        metadata={
            "help": "exact, contains, regex, numeric, choice, or one of your own: module:function or file.py:function. "
            "Default: that of the run, else contains where the rows have a reference."
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
        default=None,
        metadata={"help": "Column that marks rows which belong together, for the bootstrap. Default: that of the run."},
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
    limit: int | None = field(
        default=None,
        metadata={"help": "Only the first n rows. Such results never replace those of all rows."},
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Length limit of an answer. Default: that of the run."}
    )
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
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the base, where it needs its own."}
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
    adapter, rest = subject(argv)
    (args,) = Parser([EvalArguments], "pgkd eval ADAPTER", DESCRIPTION).parse(rest)
    if adapter is None:
        raise ConfigError("missing is the adapter: pgkd eval ADAPTER [options], e.g. the run folder of a training")
    return run_eval(adapter, args)


def run_eval(adapter: str, args: EvalArguments) -> int:
    """The body of :func:`main`. Rows and references are checked before the model is loaded."""
    from ..data.check import validate_rows
    from ..evaluation.answers import HINT_PHRASES, evaluate, measure_drift
    from ..export.adapter import read_run
    from ..model.adapters import load_adapter
    from .controls import find_controls

    console = shared_console()
    run = read_run(adapter, quantization=args.base_quantization, base_model=args.base_model, log=console.print)
    out = Path(args.out or run.folder / RESULTS_FILE)
    check_writable(out, "--out", file=True)
    collator = collator_of(run, trust_remote_code=args.trust_remote_code)
    asked_for_groups = args.group_key is not None
    take_from_run(args, run)
    if args.scorer is not None:
        make_scorer(args.scorer)
    rows, all_rows = held_out_rows(run, args)
    validate_rows(rows, collator)
    args.scorer, scorer = choose_scorer(args.scorer, rows, str(args.answer_key))
    if args.group_key is not None and any(args.group_key not in row for row in rows):
        if asked_for_groups:
            raise DataError(f"group_key is {args.group_key!r}, a column that the rows do not have")
        args.group_key = None
    neutral = None
    if args.neutral_dataset_name is not None:
        split = split_of(args.neutral_dataset_name, args.neutral_dataset_split or "train")
        neutral = list(load_named(args.neutral_dataset_name, split=split))
        validate_rows(neutral, collator)
    text = text_ids(args.text_file, collator) if args.text_file else None
    controls = find_controls(run, args.controls) if args.controls else []
    train_missing(controls, console)

    model = load_student(run, trust_remote_code=args.trust_remote_code)
    settings: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "group_key": args.group_key,
        "phrases": args.hint_phrases or HINT_PHRASES,
        "seed": args.seed,
    }
    result = evaluate(model, collator, rows, scorer, **settings)
    add_nats(result, model, collator, args.group_key, args.seed)
    add_groups(result, args.group_key, args.seed)
    result.extra["trained_on"] = trained_on(run_folder(run) / TRAINED_FILE, rows, privileged_key(run))
    if neutral is not None:
        add_drift(result, measure_drift(model, collator, neutral))
    if text is not None:
        add_perplexity(result, model, text)

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
    say_what_it_is(run, result, console)
    told = {"scorer": args.scorer, "max_new_tokens": args.max_new_tokens, "seed": args.seed, "adapter": adapter}
    if len(rows) < all_rows:
        told["limit"] = len(rows)
    with writing(out, "--out"):
        written = write_results(result, out, told)
        if written == out:
            update_card(run.folder / CARD_FILE, result, told)
    if written != out:
        console.print(f"{out} holds the results of all rows and stays as it is, as does the model card.")
    out = written
    console.print(f"Results: {out}; every answer: {answers_file(out)}")
    return 0


def say_what_it_is(run: AdapterRun, result: Evaluation, console: Console) -> None:
    """What the table cannot say: another teacher than the base, or a control."""
    taught = run.info.get("teacher_adapter") or "disabled"
    if taught != "disabled":
        console.print(
            f"The run's teacher was {taught!r}; the column base with PI shows the base itself, which taught nobody.",
            markup=False,
        )
    if run.info.get("control"):
        result.extra["control"] = run.info["control"]
        console.print(f"[bold]This is the control {run.info['control']} of a run, not the run itself.[/]")


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


def train_missing(controls: Sequence[ControlRun], console: Console) -> None:
    """Train the controls that are not trained yet."""
    for control in controls:
        if control.finished:
            console.print(f"control {control.name}: {control.folder} is trained already")
        else:
            console.print(f"\ntraining the control {control.name} ({CONTROLS[control.name]}) in {control.folder}")
            control.train()


def add_perplexity(result: Evaluation, model: PeftModel, ids: Sequence[int]) -> None:
    """Perplexity of base and student on a text."""
    from ..evaluation.answers import perplexity
    from ..model.adapters import adapter_state

    for name, which in (("base", "disabled"), ("student", "shared")):
        with adapter_state(model, which) as weights:
            result.extra[f"perplexity_{name}"] = perplexity(weights, ids)


def held_out_rows(run: AdapterRun, args: EvalArguments) -> tuple[list[Mapping[str, Any]], int]:
    """The rows to judge on, and how many there are without ``--limit``: those that were asked for, else those that the
    run held out, else the test split of its data, else (there is nothing better) those that it was trained on."""
    recipe = run_recipe(run)
    kept: Mapping[str, Any] = run.info.get("held_out") or {}
    if args.dataset_name is None and kept.get("holdout_rows") and (run_folder(run) / HOLDOUT_FILE).is_file():
        rows = list(load_named(str(run_folder(run) / HOLDOUT_FILE), privileged_key=privileged_key(run)))
        return rows[: args.limit], len(rows)
    name = args.dataset_name or kept.get("dataset_name") or recipe.get("eval_dataset_name")
    if name is None and (name := recipe.get("dataset_name")) is None:
        raise ConfigError("nothing says which rows to judge on; give --dataset_name FILE")
    columns = args.columns
    of_the_run = (recipe.get("dataset_name"), recipe.get("eval_dataset_name"), kept.get("dataset_name"))
    if columns is None and name in of_the_run:
        columns = recipe.get("columns")
    told = args.dataset_split or (kept.get("split") if name == kept.get("dataset_name") else None)
    how: dict[str, Any] = {
        "config_name": args.dataset_config or recipe.get("dataset_config"),
        "columns": columns if isinstance(columns, dict) else None,
        "privileged_key": privileged_key(run),
    }
    try:
        dataset = load_named(name, split=told or split_of(name, recipe.get("dataset_test_split", "test")), **how)
    except NoSplitError:
        if told is not None or args.dataset_name is not None:
            raise
        dataset = load_named(name, split=recipe.get("dataset_train_split", "train"), **how)
    file = args.privileged_file or recipe.get("privileged_file")
    if file is not None:
        dataset = give_privileged(dataset, file, how["privileged_key"], unless_given=args.privileged_file is None)
    rows = list(dataset)
    return rows[: args.limit], len(rows)


def take_from_run(args: EvalArguments, run: AdapterRun) -> None:
    """What was not said is as the run had it, and else the usual."""
    recipe = run_recipe(run)
    usual = {
        "scorer": None,
        "answer_key": "answer",
        "group_key": None,
        "neutral_dataset_name": None,
        "neutral_dataset_split": None,
    }
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, recipe.get(name) or value)
    if args.max_new_tokens is None:
        args.max_new_tokens = int(run.info.get("config", {}).get("max_new_tokens") or 64)


def run_folder(run: AdapterRun) -> Path:
    """The folder of the run that an adapter folder, or a checkpoint, belongs to."""
    return recipe_folder(run.folder) or run.folder


def run_recipe(run: AdapterRun) -> dict[str, Any]:
    """What the run was told, from its folder; {} when it was not trained by `pgkd train`."""
    folder = recipe_folder(run.folder)
    return read_recipe(str(folder / RECIPE_FILE), use_env=False) if folder is not None else {}


def privileged_key(run: AdapterRun) -> str:
    return str(run.info.get("config", {}).get("privileged_key", "privileged_messages"))


def collator_of(run: AdapterRun, *, trust_remote_code: bool = False) -> DataCollatorForPrivilegedGKD:
    """The collator that the run trained with, from its tokenizer and run.json; the defaults where that says nothing."""
    from ..data.collator import DataCollatorForPrivilegedGKD
    from ..model.load import load_tokenizer
    from ..model.student import text_config

    source = run.folder if (run.folder / TOKENIZER_CONFIG).is_file() else run.base
    tokenizer = load_tokenizer(str(source), trust_remote_code=trust_remote_code)
    # of an answer only the prompt is read here, so no length is too long
    limits = {
        "max_length": None,
        "vocabulary": getattr(text_config(str(run.base), trust_remote_code), "vocab_size", None),
    }
    return DataCollatorForPrivilegedGKD.from_settings(tokenizer, run.info.get("config", {}), **limits)


def load_student(run: AdapterRun, *, trust_remote_code: bool = False) -> PeftModel:
    """The adapter on its base, as training held it.

    Raises:
        ModelError: it cannot be loaded, or the base is another one than in training.
    """
    from ..export.adapter import check_base, load_trained

    model = load_trained(run, trust_remote_code=trust_remote_code)
    check_base(model, run)
    return model
