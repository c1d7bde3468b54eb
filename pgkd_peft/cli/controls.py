"""The controls of a trained run: which are there, which have to be trained, and what each of them scores."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..config import PrivilegedGKDConfig
from ..data.check import fingerprint
from ..errors import ConfigError
from ..evaluation.controls import control_folder, control_rows, control_settings
from ..export.adapter import AdapterRun
from ..run.checkpoint import is_saved, last_complete_checkpoint
from ..run.folder import RECIPE_FILE, RUN_FILE
from ..run.jsonl import read_json
from .arguments import parse_train, read_recipe
from .train import NOT_IN_RECIPE, load_datasets, recipe_folder, train


@dataclass(frozen=True)
class ControlRun:
    """One control of a run.

    Attributes:
        name: one of :data:`~pgkd_peft.evaluation.controls.CONTROLS`.
        folder: where its adapter is, or will be.
        finished: it is trained.
        argv: the arguments of `pgkd train` that train it.
    """

    name: str
    folder: Path
    finished: bool
    argv: tuple[str, ...]

    def train(self) -> None:
        """Train it, from its last whole checkpoint where an interrupted training left one."""
        go_on = "--resume" if self.name != "sft" and last_complete_checkpoint(self.folder) else "--overwrite"
        train(*parse_train([*self.argv, go_on]))
        gc.collect()  # the trainer, its model and their callbacks hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def find_controls(run: AdapterRun, names: Sequence[str]) -> list[ControlRun]:
    """The controls of a run, finished or to be trained; all is checked without a model.

    Raises:
        ConfigError: the run's folder does not say how it was trained, its data are no longer the same, or a control
            there belongs to other settings or data.
        DataError: a control is impossible on the run's rows.
    """
    folder = recipe_folder(run.folder)
    if folder is None:
        raise ConfigError(
            f"controls are trained as the run was, but {run.folder} has no {RECIPE_FILE}, which `pgkd train` writes. "
            "Train them with --control NAME and judge each with `pgkd eval`."
        )
    if run.info.get("control"):
        raise ConfigError(f"{folder} is itself the control {run.info['control']!r}; give the folder of the run.")
    recipe = ("--config", str(folder / RECIPE_FILE), "--output_dir", str(folder), *chosen_flags(run.info))
    data, _, config = parse_train(recipe)
    rows, _ = load_datasets(data, config)
    if run.info.get("dataset_fingerprint") not in (None, fingerprint(rows, config.privileged_key)):
        raise ConfigError(
            f"the rows of {data.dataset_name} are no longer those that {folder} was trained on, so a control trained "
            "now would differ from it by more than its name says. Bring the old data back, or train the run again."
        )
    return [_find(name, folder, data.told, rows, copy.copy(config), (*recipe, "--control", name)) for name in names]


def chosen_flags(info: Mapping[str, Any]) -> list[str]:
    """What was chosen for a run, as flags, so that its controls have it too."""
    known = PrivilegedGKDConfig.__dataclass_fields__
    return [f"--{name}={choice['value']}" for name, choice in info.get("automatic", {}).items() if name in known]


def _find(
    name: str, folder: Path, told: Mapping[str, Any], rows: Dataset, config: PrivilegedGKDConfig, argv: tuple[str, ...]
) -> ControlRun:
    rows = control_rows(name, rows, config)
    control_settings(name, config)
    here = control_folder(folder, name)
    finished = is_saved(here)
    if finished:
        said = read_recipe(str(here / RECIPE_FILE), use_env=False)
        ours = {k: v for k, v in told.items() if k not in NOT_IN_RECIPE}
        differ = [k for k in {**ours, **said} if k not in ("output_dir", "control") and said.get(k) != ours.get(k)]
        if read_json(here / RUN_FILE).get("dataset_fingerprint") != fingerprint(rows, config.privileged_key):
            differ.append("the rows")
        if differ:
            raise ConfigError(
                f"{here} is the control of another run: it differs in {', '.join(differ)}. Delete that folder to have "
                "it trained anew."
            )
    return ControlRun(name, here, finished, argv)
