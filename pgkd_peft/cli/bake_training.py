"""The training of a bake: rows -> steps that fit into its time -> what was taken over."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..bake import pipeline
from ..export.next_steps import after_training, next_pgkd
from ..run.checkpoint import checkpoints, is_saved
from ..run.folder import (
    BAKE_FILE,
    BAKE_HELDOUT_FILE,
    BAKE_NEUTRAL_FILE,
    BAKE_TRAIN_FILE,
    COVERAGE_FILE,
    RESULTS_FILE,
    RUN_FILE,
)
from ..run.jsonl import read_json, write_json, write_lines
from .arguments import parse_train

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

    from ..bake.keep import Keeper
    from ..bake.questions import Question
    from .arguments import DataArguments
    from .bake_arguments import Job

EPOCHS = 4.0
LEAST_STEPS = 100
# The rule's rate is one for a whole run; this one falls to zero and so begins higher. At a width of 576 that is the
# 2e-3 which the facts recipe found by hand.
RATE_FACTOR = 1.5
SHARE_OF_TRAINING = 0.9  # of --minutes: after it there is only judging


def train_and_judge(
    job: Job, train_flags: Sequence[str], questions: Sequence[Question], keeper: Keeper, student: PeftModel
) -> None:
    """Rows -> training -> what was taken over, in nats, by passage, and what moved elsewhere.

    Args:
        keeper: what has judged the questions.
        student: the model that has written them, its adapter as training begins with it.
    """
    from ..bake import coverage
    from ..evaluation.answers import measure_drift
    from ..view.report import write_report
    from .judge import judge

    passages, folder, state, budget, console = job.passages, job.folder, job.state, job.budget, job.console
    train_rows, held_out, neutral = pipeline.rows_of(questions, keeper)
    for file, rows in ((BAKE_TRAIN_FILE, train_rows), (BAKE_HELDOUT_FILE, held_out), (BAKE_NEUTRAL_FILE, neutral)):
        write_lines(folder / file, rows)
    flags = [*train_flags, "--dataset_name", str(folder / BAKE_TRAIN_FILE)]
    flags += ["--eval_dataset_name", str(folder / BAKE_HELDOUT_FILE)] if held_out else ["--holdout_rows", "0"]
    flags += ["--max_privileged_length", str(keeper.collator.builder.max_privileged_length)]
    flags += rate_and_steps(job, flags, student, len(train_rows))
    data, trainer, held_out_rows = trained(job, flags, student)
    if not trainer.is_world_process_zero():
        return
    drift = measure_drift(trainer.model, trainer.contexts, neutral) if neutral else None
    if held_out_rows is not None:
        judge(trainer, held_out_rows, data, drift)
    privileged = {passage.number: passage.privileged for passage in passages}
    found = coverage.measure(
        trainer.model, trainer.contexts, passages, privileged, questions, max_new_tokens=trainer.args.max_new_tokens
    )
    if state.get("kind") == "system prompt" and not budget.is_over(1.0):
        found["rules"] = coverage.rule_by_rule(
            trainer.model, trainer.contexts, passages[0], questions, max_new_tokens=trainer.args.max_new_tokens
        )
    if drift is not None:
        state["drift"] = drift.kl
        results = {**read_json(folder / RESULTS_FILE), "drift": drift.kl, "drift_details": asdict(drift)}
        write_json(folder / RESULTS_FILE, results)  # also where no row was held out to be judged
    rest = coverage.pale(found)
    write_json(folder / BAKE_FILE, {**state, "seconds": round(budget.spent, 1), "pale": rest})
    write_json(folder / COVERAGE_FILE, {**found, "kind": state.get("kind")})  # last: with it the bake is finished
    console.print(f"\nThe whole bake took {budget.spent:.0f} s. On a page: {write_report(folder)}", highlight=False)
    if rest:
        told = f"{len(rest)} of {len(passages)} passages were hardly taken over"
        console.print(f"{told}: the same command with --more asks about them again", highlight=False)
    console.print(next_pgkd(*after_training(folder, job.args.text_file)), highlight=False, markup=False, soft_wrap=True)


def rate_and_steps(job: Job, flags: list[str], student: PeftModel, rows: int) -> list[str]:
    """Flags for the learning rate and the number of steps, where they are not given; the steps are kept in `state`."""
    given = {flag[2:].split("=")[0] for flag in flags if flag.startswith("--")}
    _, _, config = parse_train(flags, prog="pgkd bake")
    chosen: list[str] = []
    if "learning_rate" not in given:
        chosen += ["--learning_rate", str(learning_rate(student))]
    if not given & {"max_steps", "num_train_epochs"}:
        if "max_steps" not in job.state:
            window = config.per_device_train_batch_size * config.gradient_accumulation_steps
            wanted = max(LEAST_STEPS, round(EPOCHS * rows / window))
            job.state["max_steps"] = steps_that_fit(job, [*flags, *chosen], student, wanted)
            write_json(job.folder / BAKE_FILE, job.state)
        chosen += ["--max_steps", str(job.state["max_steps"])]
    return chosen


def trained(job: Job, flags: list[str], student: PeftModel) -> tuple[DataArguments, Any, Dataset | None]:
    """(arguments, trainer at its end, held-out rows); what an earlier call has trained is not trained again."""
    from ..model.adapters import load_adapter
    from .train import choose_as_before, load_datasets, make_trainer, run_training

    data, model_args, config = parse_train(flags, prog="pgkd bake")
    if is_saved(job.folder):
        choose_as_before(config, job.folder)
        train_dataset, held_out = load_datasets(data, config)
        trainer = make_trainer(data, model_args, config, train_dataset, held_out, [], student)
        load_adapter(trainer.model, job.folder)
        return data, trainer, held_out
    goes_on = bool(checkpoints(job.folder)) and not data.overwrite
    flags = [*flags, "--resume", str(goes_on)]
    if not goes_on and (job.folder / RUN_FILE).is_file():
        flags += ["--overwrite", "true"]
    data, model_args, config = parse_train(flags, prog="pgkd bake")
    return data, *run_training(data, model_args, config, [deadline(job.budget, job.console)], student)


def deadline(budget: pipeline.Budget, console: Any) -> Any:
    """Ends the training when the share of ``--minutes`` that it has is used up, whatever was measured before."""
    from transformers import TrainerCallback

    class Deadline(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if budget.is_over(SHARE_OF_TRAINING) and state.global_step < state.max_steps:
                control.should_training_stop = True
                console.print(f"the time is up: stopped after step {state.global_step} of {state.max_steps}")

    return Deadline()


def learning_rate(student: PeftModel) -> float:
    """The rule for a LoRA of this width (:func:`~pgkd_peft.model.rates.lora_learning_rate`), as the peak of a fall."""
    from ..model.rates import lora_learning_rate
    from ..model.student import hidden_size

    return float(f"{RATE_FACTOR * lora_learning_rate(hidden_size(student)):.3g}")


def steps_that_fit(job: Job, flags: list[str], student: PeftModel, wanted: int) -> int:
    """As many steps as are wanted; under ``--minutes`` as many of them as a measured step leaves time for."""
    budget = job.budget
    if budget.seconds is None:
        return wanted
    from transformers import TrainerCallback

    from ..model.load import base_of
    from .train import run_training

    probe = job.folder / ".probe"
    quick = ["--output_dir", str(probe), "--max_steps", "6", "--save_strategy", "no", "--overwrite", "true"]
    quick += ["--logging_steps", "1000", "--rollout_log_steps", "0", "--lmbda", "1.0", "--resume", "false"]
    data, model_args, config = parse_train([*flags, *quick, "--disable_tqdm", "true"], prog="pgkd bake")
    before, ends = budget.spent, []
    begins_with = {param: param.detach().clone() for param in student.parameters() if param.requires_grad}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(budget.spent)

    try:
        run_training(data, model_args, config, [Clock()], student)
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    for param, value in begins_with.items():
        param.data.copy_(value)
        param.grad = None
    base_of(student).gradient_checkpointing_disable()  # the run decides anew
    step = (ends[-1] - ends[0]) / (len(ends) - 1)  # the first one warms up
    load = ends[0] - before
    left = SHARE_OF_TRAINING * budget.seconds - budget.spent - load
    fits = max(1, int(left / step))
    steps = min(wanted, fits)
    job.console.print(
        f"a step takes {step:.1f} s; {max(0.0, left):.0f} s are left for training: {steps} of {wanted} steps",
        highlight=False,
    )
    return steps
