"""`pgkd inspect`: what student and teacher will really read, and with --preflight what a run will bring and cost."""

from __future__ import annotations

import argparse
import logging
import math
import signal
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ..automatic import settle_contexts, settle_training
from ..data.collator import DataCollatorForPrivilegedGKD
from ..errors import ConfigError
from ..evaluation.preflight import Cost, Effect, ProbeTrainer, measure_cost, measure_effect, probe_args, scorer_for
from ..model.student import context_length, embedding_rows, find_tokenizer, hidden_size
from ..view.inspect import inspect_rows, make_console
from ..view.preflight import show_cost, show_effect

HELP = """usage: pgkd inspect --model_name_or_path MODEL --dataset_name ROWS [--rows N]
                    [--preflight] [--no-color] [any flag of `pgkd train`]

What student and teacher will really read, decoded from the token ids of a run:
PI marked, answer tokens outside the loss coloured, special tokens visible;
budgets, cuts, leaks, totals over all rows; and every row that cannot be used.
Only the tokenizer is loaded.

  --rows N      rows to show, one of every kind first (default 4; 0: the totals
                alone)
  --preflight   load the model too: does the PI help, and what will the run need
                in memory and time?
  --no-color    marks instead of colours"""


def options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of `pgkd inspect` itself, and all others, which are those of `pgkd train`."""
    parser = argparse.ArgumentParser(prog="pgkd inspect", add_help=False, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--preflight", action="store_true")
    parser.add_argument("--no-color", "--no_color", action="store_true")
    own, rest = parser.parse_known_args(list(argv))
    if own.rows < 0:
        raise ConfigError(f"--rows is {own.rows}; give the number of rows to show, 0 for the totals alone.")
    return own, rest


def main(argv: Sequence[str]) -> int:
    """`pgkd inspect`; returns 0, or 2 when some rows cannot be used.

    Raises:
        PGKDError: the arguments, the data or the tokenizer cannot be used at all.
    """
    own, rest = options(argv)
    if {"-h", "--help"} & set(rest):
        print(HELP)
        return 0
    from ..cli.arguments import parse_train
    from ..cli.train import load_datasets

    data, model, config = parse_train(rest, prog="pgkd inspect")
    console = make_console(own.no_color)
    tokenizer = find_tokenizer(model.model_name_or_path, None, config)
    train_rows, eval_rows = load_datasets(data, config)
    context = context_length(model.model_name_or_path, config)
    vocabulary = embedding_rows(model.model_name_or_path, config)
    settle_contexts(config, tokenizer, [train_rows, eval_rows], context)
    collator = DataCollatorForPrivilegedGKD.from_config(tokenizer, config, context, vocabulary)
    code = inspect_rows(train_rows, collator, config, console, count=own.rows)
    if eval_rows is not None:
        console.print(Text("\nrows to evaluate on", style="bold"))
        code = max(code, inspect_rows(eval_rows, collator, config, console, count=0))
    if own.preflight and code == 0:
        run_preflight(data, model, config, train_rows, console)
    return code


class PreflightStopped(KeyboardInterrupt):
    """A signal ended the preflight.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(f"{signal.Signals(signum).name}: the preflight was stopped; nothing was trained or saved.")


def run_preflight(data: Any, model: Any, config: Any, rows: Any, console: Console) -> tuple[Effect | None, Cost]:
    """Load the recipe's model, measure, print. `data`, `model`, `config` are those of ``parse_train``."""
    from ..cli.arguments import lora_config, quantization_config

    with tempfile.TemporaryDirectory(prefix="pgkd-preflight-") as folder:

        def build(args: Any, dataset: Any) -> ProbeTrainer:
            return ProbeTrainer(
                model=model.model_name_or_path,
                teacher_model=args.teacher_model_name_or_path,
                args=args,
                train_dataset=dataset,
                peft_config=lora_config(model),
                quantization_config=quantization_config(model, args),
            )

        try:
            return preflight(build, config, rows, console, folder)
        except KeyboardInterrupt as stopped:  # RunInterrupted would name a checkpoint in the scratch folder
            raise PreflightStopped(getattr(stopped, "signum", signal.SIGINT)) from stopped


def preflight(
    build: Callable[[Any, Any], ProbeTrainer], config: Any, rows: Any, console: Console, folder: str
) -> tuple[Effect | None, Cost]:
    """Measure with the trainer that `build(args, dataset)` makes; `folder` is for what the probe writes."""
    args = probe_args(config, folder)
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps
    loud = logging.getLogger("pgkd_peft").level
    logging.getLogger("pgkd_peft").setLevel(logging.ERROR)
    try:
        trainer = build(args, rows)
        kept = trainer.train_dataset
        assert kept is not None
        effect = measure_effect(trainer, kept, scorer_for(kept))
        show_effect(effect, console)
        console.print(Text(f"Clocking {args.max_steps} optimizer steps of {window} rows …", style="dim"))
        cost = measure_cost(trainer, kept, window)
    finally:
        logging.getLogger("pgkd_peft").setLevel(loud)
    windows = math.ceil(len(kept) / (window * max(1, args.world_size)))
    settle_training(config, hidden_size(trainer.model), len(kept))
    cost.steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * windows)
    show_cost(cost, config, console)
    return effect, cost
