"""Loading a checkpoint into a run that it belongs to."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainerCallback

from ..errors import CheckpointError, ModelError, PGKDError, explained, read_object, reason
from ..model.frozen import FrozenCheck
from ..model.load import base_of, quantization_name
from ..model.student import is_adapter_folder
from ..trl_compat import set_log_progress
from .folder import RUN_FILE, find_in_run, progress_name
from .jsonl import read_json

logger = logging.getLogger(__name__)


def refuse_other_base(student: PeftModel, model: Any) -> None:
    """Raises ModelError where `model`, which the student comes from, is an adapter's folder, and its ``run.json`` says
    that it was trained on other weights, held as these are."""
    if not is_adapter_folder(model):
        return
    path, base = find_in_run(Path(model), RUN_FILE), base_of(student)
    info = read_json(path) if path is not None else {}
    dtype = str(base.get_input_embeddings().weight.dtype).removeprefix("torch.")
    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    alike = (info.get("base_quantization"), info.get("compute_dtype")) == (quantization_name(quantization), dtype)
    alike = alike and str(info.get("device")).startswith("CPU") == (base.device.type == "cpu")
    if alike and info.get("base_digest") and FrozenCheck(student).digest != info["base_digest"]:
        raise ModelError(
            f"the adapter {model} was trained on another base: the weights of {base.name_or_path!r} have another "
            f"digest than {path} holds. An adapter means nothing on other weights; bring the old base back."
        )


def check_belongs(folder: Path, now: dict[str, Any]) -> None:
    """Whether a checkpoint's ``run.json`` was written by a run on this base with this teacher and this data.

    Args:
        now: what ``run.json`` says of the present run.

    Raises:
        CheckpointError: the base or the teacher is another one. Other differences are warned about.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        logger.warning("%s is missing, so nothing says on which base the checkpoint was trained.", path)
        return
    then = read_object(path)
    if then.get("base_digest") != now["base_digest"]:
        if then.get("base_model") != now["base_model"]:
            what = f"it was trained on {then.get('base_model')!r}, this run loads {now['base_model']!r}"
        elif then.get("base_quantization") != now["base_quantization"]:
            what = f"its base was held as {then.get('base_quantization')}, this run's as {now['base_quantization']}"
        elif then.get("compute_dtype") != now["compute_dtype"]:
            what = f"its base was held in {then.get('compute_dtype')}, this run's in {now['compute_dtype']}"
        else:
            what = f"the weights of {now['base_model']!r} have changed since (digest {str(then.get('base_digest'))[:8]}"
            what += f", now {now['base_digest'][:8]})"
        raise CheckpointError(
            f"{folder} cannot be resumed: {what}. An adapter means nothing on other weights; bring the old base back, "
            "or start a new run."
        )
    if then.get("teacher_adapter") != now["teacher_adapter"]:
        raise CheckpointError(
            f"{folder} cannot be resumed with teacher_adapter={now['teacher_adapter']!r}: it was trained with "
            f"{then.get('teacher_adapter')!r}. Set that, or start a new run from the adapter (--model {folder})."
        )
    if then.get("dataset_fingerprint") != now.get("dataset_fingerprint"):
        logger.warning("The data are not those that %s was trained on; the order of the rows is a new one.", folder)
    ignored = {"output_dir", "logging_dir", "resume_from_checkpoint", "run_name", "overwrite_output_dir"}
    settings: Any = then.get("config")
    settings = settings if isinstance(settings, dict) else {}
    config = {key: (value, now["config"].get(key)) for key, value in settings.items() if key not in ignored}
    changed = [f"{key} (was {old!r}, is {new!r})" for key, (old, new) in config.items() if str(old) != str(new)]
    if changed:
        logger.warning(
            "Settings differ from those of %s, so the run goes on differently: %s", folder, "; ".join(changed)
        )


@contextlib.contextmanager
def readable_state(folder: str | None) -> Iterator[None]:
    """Around what Transformers loads with ``weights_only``: a file that holds anything but tensors is refused."""
    try:
        yield
    except PGKDError:
        raise
    except Exception as error:
        text = reason(error).partition(". ")[0]
        raise CheckpointError(
            f"the optimizer, scheduler or random state in {folder} cannot be read, so it is damaged or was written by "
            f"someone else ({text}). Resume from another checkpoint, or start a new run from its adapter."
        ) from error


class Continue(TrainerCallback):
    """Once, when a resumed run begins: take up the sums since the last log."""

    def __init__(self, trainer: Trainer, folder: Path):
        self.trainer = trainer
        self.path = folder / progress_file(trainer)
        self.progress: dict[str, Any] | None = None
        if self.path.is_file():
            with explained(f"{self.path} is damaged", CheckpointError):
                progress = read_object(self.path)
                self.progress = {
                    "loss": float(progress["loss"]),
                    "last_logged": int(progress["last_logged"]),
                    "sums": {str(key): float(value) for key, value in progress["sums"].items()},
                }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.remove_callback(self)
        progress = self.progress
        if progress is None:
            logger.warning(
                "%s is missing: was the number of processes another one? The run goes on differently.", self.path
            )
            return
        set_log_progress(trainer, progress)
        trainer.meters.reset("train", progress["sums"])


def progress_file(trainer: Trainer) -> str:
    return progress_name(trainer.accelerator.process_index)
