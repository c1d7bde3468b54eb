"""Loading a checkpoint into a run that it belongs to, and the part of the trainer that writes and reads checkpoints."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState

from ..errors import CheckpointError, PGKDError, RunFinished, explained, read_object, reason
from ..model.adapters import load_adapter
from .checkpoint import (
    STATE_FILE,
    TEACHER_FILE,
    cannot_write,
    finished_at,
    is_about_writing,
    publish,
    remove_leftovers,
    rotate,
    write_manifest,
)

logger = logging.getLogger(__name__)


def check_belongs(folder: Path, now: dict[str, Any]) -> None:
    """Whether a checkpoint's ``run.json`` was written by a run on this base with this teacher and this data.

    Args:
        now: what ``run.json`` says of the present run.

    Raises:
        CheckpointError: the base or the teacher is another one. Other differences are warned about.
    """
    path = folder / "run.json"
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
def _readable(folder: str | None) -> Iterator[None]:
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


def trim_log(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines log that are later than `step`: they will be written again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):  # the half line of a killed process
            continue
    if len(kept) < len(lines):
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(path)


# ---- in the trainer ------------------------------------------------------------------------------------------------


class CheckpointMixin:
    """The part of the trainer that writes and reads checkpoints; stands before the Transformers trainer."""

    _staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)  # type: ignore[misc]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else it is pushed from its final place
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write to a hidden folder, rename, then delete what is beyond ``save_total_limit``.

        Raises:
            CheckpointError: it cannot be written; the previous one is intact.
        """
        me: Trainer = self  # type: ignore[assignment]
        run_dir = Path(super()._get_output_dir(trial))  # type: ignore[misc]
        name = f"checkpoint-{me.state.global_step}"
        staging = run_dir / f".saving-{name}"
        if me.args.should_save:
            remove_leftovers(run_dir)
        me.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self._save_more(staging / name)
            me.accelerator.wait_for_everyone()
            if me.args.should_save:
                write_manifest(staging / name)
                publish(staging / name, run_dir / name)
        except Exception as error:
            if not is_about_writing(error):
                raise
            raise CheckpointError(cannot_write(run_dir, error)) from error
        finally:
            self._staging = None
            if me.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        if me.args.should_save:
            best = Path(me.state.best_model_checkpoint or name).name
            rotate(run_dir, me.args.save_total_limit, {name, best})
        me.accelerator.wait_for_everyone()
        if me.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def _save_more(self, folder: Path) -> None:
        """What Transformers does not know of: the teacher's adapter, and what was summed up since the last log."""
        me: Trainer = self  # type: ignore[assignment]
        progress = {
            "loss": me._tr_loss.item(),
            "last_logged": me._globalstep_last_logged,
            "sums": dict(me._sums["train"]),
        }
        (folder / _progress_file(me)).write_text(json.dumps(progress) + "\n", encoding="utf-8")
        if not me.args.should_save:
            return
        me.teacher.save(str(folder / TEACHER_FILE))
        best = me.state.best_model_checkpoint
        if best is not None and Path(best).parent == self._staging:
            assert self._staging is not None
            me.state.best_model_checkpoint = str(self._staging.parent / Path(best).name)
            me.state.save_to_json(str(folder / STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        me: Trainer = self  # type: ignore[assignment]
        folder = Path(resume_from_checkpoint)
        check_belongs(folder, me.run_info.collect())
        load_adapter(me.model, folder)
        done = finished_at(str(me.args.output_dir), folder, me.args)
        if done is not None:
            me.state = TrainerState.load_from_json(str(folder / STATE_FILE))
            raise RunFinished(done)
        self._load_rng_state(str(folder))  # seen to be readable before anything is written; loaded again in its place
        if (folder / TEACHER_FILE).is_file():
            me.teacher.load(str(folder / TEACHER_FILE))
            me.frozen.restart()
        me.add_callback(_Continue(me, folder))


class _Continue(TrainerCallback):
    """Once, when a resumed run begins: take up the sums since the last log, and cut logs back to the checkpoint."""

    def __init__(self, trainer: Trainer, folder: Path):
        self.trainer = trainer
        self.path = folder / _progress_file(trainer)
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
        if trainer.is_world_process_zero():
            trim_log(Path(args.output_dir) / "completions.jsonl", state.global_step)
        progress = self.progress
        if progress is None:
            logger.warning(
                "%s is missing: was the number of processes another one? The run goes on differently.", self.path
            )
            return
        trainer._tr_loss = torch.tensor(progress["loss"], device=args.device)
        trainer._total_loss_scalar = -progress["loss"]  # train_loss is about the steps of this call alone
        trainer._globalstep_last_logged = progress["last_logged"]
        trainer._sums["train"] = defaultdict(float, progress["sums"])


def _progress_file(trainer: Trainer) -> str:
    return f"progress_{trainer.accelerator.process_index}.json"
