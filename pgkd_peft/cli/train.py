"""`pgkd train`: arguments -> data -> trainer -> adapter."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import PrivilegedGKDConfig
from ..data.files import NoSplitError
from ..data.holdout import hold_out, trained_prompts
from ..data.load import give_privileged
from ..data.named import data_path, load_named, own_held_out, split_of
from ..errors import ConfigError, DataError, RunFinished, explained
from ..export.next_steps import after_training, next_pgkd
from ..run.checkpoint import check_run_folder, clear_run_folder, explain_full_disk, finished_at, is_saved
from ..run.console import fitted
from ..run.folder import CARD_FILE, HOLDOUT_FILE, RECIPE_FILE, RUN_FILE, TRAINED_FILE, find_in_run
from ..run.jsonl import read_json, read_run, write_lines, write_whole
from ..run.place import locked
from .arguments import (
    DataArguments,
    ModelArguments,
    lora_config,
    parse_train,
    quantization_config,
)
from .judge import judge

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

    from ..evaluation.sft_control import SFTControlTrainer
    from ..trainer import PrivilegedSelfDistillTrainer

logger = logging.getLogger(__name__)

HOLDOUT_ROWS = 64
ROLLOUT_LOG_STEPS = 25
NOT_IN_RECIPE = ("resume", "overwrite", "resume_from_checkpoint", "hub_token")

DESCRIPTION = """Train a LoRA adapter on one base model, so that it answers without privileged information (PI) as the
base answers with it. Any option can stand in a YAML recipe (--config), and overrides it as a flag."""


def main(argv: Sequence[str]) -> int:
    """Train, and judge on the held-out rows; adapter, model card, results and logs are in `output_dir` afterwards."""
    data, model, config = parse_train(argv, description=DESCRIPTION)
    try:
        trainer, held_out = run_training(data, model, config)
    except RunFinished as finished:
        print(finished)
        return 0
    if not trainer.is_world_process_zero():
        return 0
    folder = str(config.output_dir)
    best = trainer.state.best_model_checkpoint
    if config.load_best_model_at_end and best is not None:
        print(f"\nBest checkpoint: {Path(best).name}, {config.metric_for_best_model} {trainer.state.best_metric:.4g}")
    if held_out is not None and data.control is None:
        with explain_full_disk(folder):
            judge(trainer, held_out, data)
    print(fitted(f"\nThe adapter, its model card, run.json and the logs are in {folder}", sys.stdout))
    if data.control is not None:
        run = shlex.quote(str(Path(folder).parent.parent))
        print(f"It is the control {data.control!r}.")
        print(next_pgkd(f"pgkd eval {run} --controls {data.control}"))
    else:
        print(next_pgkd(f"pgkd eval {shlex.quote(folder)}", *after_training(folder)))
    return 0


def train(
    data: DataArguments, model: ModelArguments, config: PrivilegedGKDConfig, callbacks: list[Any] | None = None
) -> PrivilegedSelfDistillTrainer | SFTControlTrainer:
    """:func:`run_training` without the held-out rows."""
    return run_training(data, model, config, callbacks)[0]


def run_training(
    data: DataArguments,
    model: ModelArguments,
    config: PrivilegedGKDConfig,
    callbacks: list[Any] | None = None,
    student: PeftModel | None = None,
) -> tuple[PrivilegedSelfDistillTrainer | SFTControlTrainer, Dataset | None]:
    """Load the data, train, save: the run itself, or the control of it that `data` names; and its held-out rows.

    Nothing in the run folder changes before data, model and the checkpoint to go on from are accepted.

    Args:
        student: the model of `model`, where it is loaded already.

    Raises:
        PGKDError: a mistake in the arguments or the data, found before the model is loaded.
        RunFinished: the run to be resumed is at its end already; nothing was touched.
        RunInterrupted: a signal ended the run after a checkpoint was saved.
    """
    assert config.output_dir is not None
    if data.control is not None:
        from ..evaluation.controls import control_settings

        control_settings(data.control, config)
    with explain_full_disk(config.output_dir), locked(config.output_dir):
        return _run(data, model, config, callbacks or [], student)


def _run(
    data: DataArguments,
    model: ModelArguments,
    config: PrivilegedGKDConfig,
    callbacks: list[Any],
    student: PeftModel | None,
) -> tuple[PrivilegedSelfDistillTrainer | SFTControlTrainer, Dataset | None]:
    folder = Path(str(config.output_dir))
    resume = config.resume_from_checkpoint or data.resume
    checkpoint = check_run_folder(folder, resume=resume, overwrite=data.overwrite, clear=False)
    if checkpoint:
        choose_as_before(config, folder)
        stop_if_finished(folder, checkpoint, model, config)
    train_dataset, held_out = load_datasets(data, config)
    if held_out is None and config.eval_strategy != "no":
        reason = config.automatic["held-out rows"][1]
        raise ConfigError(
            f"eval_strategy is {str(config.eval_strategy.value)!r}, but there are no rows to evaluate on ({reason}); "
            "give --eval_dataset_name FILE, or --holdout_rows N"
        )
    if config.is_open("rollout_log_steps"):
        every = min(ROLLOUT_LOG_STEPS, config.max_steps) if config.max_steps > 0 else ROLLOUT_LOG_STEPS
        config.choose("rollout_log_steps", every, "so that one can read what the student says")

    callbacks = [*callbacks, *evaluation_callbacks(data, config, held_out)]
    trainer = make_trainer(data, model, config, train_dataset, held_out, callbacks, student)
    trainer.run_info.control, trainer.run_info.held_out = data.control, data.held_out

    def begin() -> None:
        if data.overwrite:
            clear_run_folder(folder)
        write_recipe(folder / RECIPE_FILE, data.told)
        write_holdout(folder / HOLDOUT_FILE, held_out)
        write_whole(folder / TRAINED_FILE, trained_prompts(train_dataset, config.privileged_key))

    trainer.run_info.when_begun.append(begin)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except RunFinished:
        if is_saved(folder):
            raise
        logger.warning("All steps were trained, but the adapter was not saved; that is done now.")
        from ..model.adapters import load_adapter

        best = trainer.state.best_model_checkpoint
        if config.load_best_model_at_end and best is not None:
            load_adapter(trainer.model, folder / Path(best).name)
        begin()
    trainer.run_info.finished = True
    trainer.save_model()
    if data.control is not None and trainer.is_world_process_zero():
        mark_card(folder / CARD_FILE, data.control)
    if config.push_to_hub:
        with explained(f"the run is in {folder}, but cannot be pushed to the Hub", ConfigError):
            trainer.push_to_hub(dataset_name=data.dataset_name)
    return trainer, held_out


def stop_if_finished(folder: Path, checkpoint: str, model: ModelArguments, config: PrivilegedGKDConfig) -> None:
    """Say so before data and model are loaded, where that is sure: the same base, and the adapter is there.

    Raises:
        RunFinished: the run is at its end.
    """
    info = read_json(folder / RUN_FILE)
    if is_saved(folder) and info.get("base_model") == model.model_name_or_path:
        done = finished_at(folder, checkpoint, config)
        if done is not None:
            raise RunFinished(done)


def choose_as_before(config: PrivilegedGKDConfig, folder: Path) -> None:
    """A run that goes on keeps what was chosen for it when it began."""
    for name, choice in read_run(folder / RUN_FILE).get("automatic", {}).items():
        is_choice = isinstance(choice, dict) and {"value", "reason"} <= choice.keys()
        if name in PrivilegedGKDConfig.__dataclass_fields__ and is_choice and config.is_open(name):
            config.choose(name, choice["value"], choice["reason"])
            config.given = config.given | {name}


def make_trainer(
    data: DataArguments,
    model: ModelArguments,
    config: PrivilegedGKDConfig,
    train_dataset: Dataset,
    held_out: Dataset | None,
    callbacks: list[Any],
    student: PeftModel | None = None,
) -> PrivilegedSelfDistillTrainer | SFTControlTrainer:
    """The trainer of the run, or of its control; of the model that is loaded already, where there is a `student`."""
    common: dict[str, Any] = {
        "args": config,
        "train_dataset": train_dataset,
        "eval_dataset": held_out if config.eval_strategy != "no" else None,
        "callbacks": callbacks,
    }
    to_load: dict[str, Any] = {
        "peft_config": lora_config(model),
        "quantization_config": quantization_config(model, config),
    }
    if data.control == "sft":
        from ..evaluation.sft_control import SFTControlTrainer

        return SFTControlTrainer(str(model.model_name_or_path), **common, **to_load)
    from ..model.student import find_tokenizer
    from ..trainer import PrivilegedSelfDistillTrainer

    name, teacher = model.model_name_or_path, config.teacher_model_name_or_path
    if student is None:
        return PrivilegedSelfDistillTrainer(model=name, teacher_model=teacher, **common, **to_load)
    tokenizer = find_tokenizer(name, None, config)
    init_kwargs, config.model_init_kwargs = config.model_init_kwargs, None  # used already, when it was loaded
    trainer = PrivilegedSelfDistillTrainer(model=student, teacher_model=teacher, processing_class=tokenizer, **common)
    trainer.args.model_init_kwargs = init_kwargs
    return trainer


def evaluation_callbacks(data: DataArguments, config: PrivilegedGKDConfig, held_out: Dataset | None) -> list[Any]:
    """What scores answers at evaluations, and what stops the run by it, where the arguments ask for that.

    Raises:
        DataError: held-out rows that cannot be scored, all in one report.
    """
    neutral = None
    if data.neutral_dataset_name is not None:  # also where `pgkd eval` alone will ask for it
        neutral = load_named(
            data.neutral_dataset_name, split=split_of(data.neutral_dataset_name, data.neutral_dataset_split)
        )
    if config.eval_strategy == "no" or held_out is None:
        return []
    callbacks: list[Any] = []
    if data.scorer is not None:
        from ..evaluation.gap_callback import RecoveredGapCallback

        callbacks.append(
            RecoveredGapCallback(list(held_out), data.scorer, answer_key=data.answer_key, neutral_rows=neutral)
        )
    if data.early_stopping_patience is not None:
        from transformers import EarlyStoppingCallback

        callbacks.append(EarlyStoppingCallback(data.early_stopping_patience))
    return callbacks


def load_datasets(data: DataArguments, config: PrivilegedGKDConfig) -> tuple[Dataset, Dataset | None]:
    """The rows to train on (of a control: as it has them), and the rows to judge on; None where there are none.

    Held out are the rows that the arguments name, else those that the data set brings with it, else some that are
    split off before training; where they come from is noted in `data.held_out`.

    Raises:
        DataError: the data cannot be read or mapped.
    """

    def load(name: str | None, split: str) -> Dataset:
        assert name is not None
        rows = load_named(
            name,
            split=split,
            config_name=data.dataset_config,
            columns=data.columns if isinstance(data.columns, dict) else None,
            privileged_key=config.privileged_key,
        )
        if data.privileged_file is not None:
            rows = give_privileged(rows, data.privileged_file, config.privileged_key)
        return rows

    train_dataset = load(data.dataset_name, data.dataset_train_split)
    if data.eval_dataset_name is not None:
        name, split = data.eval_dataset_name, split_of(data.eval_dataset_name, data.dataset_test_split)
        held_out: Dataset | None = load(name, split)
        data.held_out = {"dataset_name": name, "split": split}
    else:
        train_dataset, held_out = _own_or_split_off(data, config, train_dataset, load)
    if held_out is not None and data.eval_limit is not None:
        held_out = held_out.select(range(min(data.eval_limit, len(held_out))))
    if data.control is not None:
        from ..evaluation.controls import control_rows

        train_dataset = control_rows(data.control, train_dataset, config)
    return train_dataset, held_out


def _own_or_split_off(
    data: DataArguments, config: PrivilegedGKDConfig, rows: Dataset, load: Callable[[str, str], Dataset]
) -> tuple[Dataset, Dataset | None]:
    """The held-out rows that the data set brings, or some of `rows`; and the rows that are left to train on."""
    assert data.dataset_name is not None
    if (own := own_held_out(data.dataset_name, data.dataset_test_split)) and data.holdout_rows is None:
        try:
            held_out = load(*own)
        except DataError as error:
            local = Path(data_path(data.dataset_name)).exists()  # what a file says is whole; the Hub's client says less
            asked = "dataset_test_split" in data.told and config.eval_strategy != "no"
            if asked or (local and not isinstance(error, NoSplitError)):
                raise
        else:
            data.held_out = {"dataset_name": own[0], "split": own[1]}
            config.automatic["held-out rows"] = (len(held_out), f"those of {own[0]}, split {own[1]}")
            return rows, held_out
    split = hold_out(rows, config.privileged_key, group_key=data.group_key, count=data.holdout_rows, seed=config.seed)
    count = len(split.held_out) if split.held_out is not None else 0
    data.held_out = {"holdout_rows": count}
    config.automatic["held-out rows"] = (count, split.reason)
    return split.train, split.held_out


def write_holdout(path: Path, held_out: Dataset | None) -> None:
    """The rows to judge on, of a large set the first; a merge of this run is measured on their conversations."""
    if held_out is not None and "messages" in held_out.column_names:
        write_lines(path, held_out.select(range(min(len(held_out), HOLDOUT_ROWS))))


def write_recipe(path: Path, told: Mapping[str, Any]) -> None:
    """What the run was told, as a recipe that trains the same again."""
    import yaml

    recipe = {key: value for key, value in told.items() if key not in NOT_IN_RECIPE}
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    write_whole(path, "#!/usr/bin/env -S pgkd train --config\n# What the run in this folder was told.\n" + text)


def recipe_folder(adapter: Path) -> Path | None:
    """The folder with the recipe of the run that an adapter folder (or checkpoint) belongs to; None without one."""
    recipe = find_in_run(adapter, RECIPE_FILE)
    return recipe.parent if recipe is not None else None


def mark_card(path: Path, control: str) -> None:
    """Say at the top of a control's model card that it is one."""
    if not path.is_file():
        return
    from ..evaluation.controls import CONTROLS

    card = path.read_text(encoding="utf-8", errors="replace")
    head, found, rest = card.partition("\n# ")
    title, _, body = rest.partition("\n")
    note = (
        f"**This is the control `{control}` ({CONTROLS[control]}) of a run, trained to compare with, not to be used.**"
    )
    write_whole(path, f"{head}{found}{title}\n\n{note}\n{body}" if found else f"{note}\n\n{card}")
