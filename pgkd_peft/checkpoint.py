"""Checkpoints that are whole or absent, that are checked before they are loaded, and from which resuming is exact.

A checkpoint is written to a hidden folder beside its place, listed with a digest of every file in ``manifest.json``,
flushed to disk and renamed: a kill or a full disk at any moment leaves the previous checkpoint as it was, and a half
of one is never found. Beyond what Transformers saves, it holds the teacher's second adapter and each rank's sums since
the last log. Rollouts and the draws of ``lmbda`` are seeded by the step, so nothing of them is pending.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

from .adapters import STUDENT
from .errors import ConfigError, PGKDError

if TYPE_CHECKING:
    from .trainer import PrivilegedSelfDistillTrainer

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
TEACHER_FILE = "teacher.safetensors"
MANIFEST = "manifest.json"
STATE_FILE = "trainer_state.json"
NEEDED = (ADAPTER_FILE, "adapter_config.json", "optimizer.pt", "scheduler.pt", STATE_FILE)
HIDDEN = (".saving-", ".replaced-", ".deleting-")

# What a run leaves in its folder, so that --overwrite removes this and nothing else.
RUN_FILES = (
    "run.json",
    "completions.jsonl",
    "summary.json",
    "report.html",
    "README.md",
    ADAPTER_FILE,
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "training_args.bin",
)


class CheckpointError(PGKDError):
    """A checkpoint cannot be written, read, or used for this run."""


# ---- finding and checking ------------------------------------------------------------------------------------------


def checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints in a run folder, newest (highest step) first."""
    folder = Path(run_dir)
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def last_complete_checkpoint(run_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint that is whole; a damaged one is passed over with a warning. None where there is none."""
    for folder in checkpoints(run_dir):
        try:
            verify(folder)
        except CheckpointError as error:
            logger.warning("%s It is passed over.", error)
        else:
            return str(folder)
    return None


def verify(folder: str | os.PathLike) -> None:
    """Check that a checkpoint is complete and that no file of it has changed since it was written.

    Raises:
        CheckpointError: names the folder, the file and what is wrong with it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder, so it is no checkpoint.")
    manifest = folder / MANIFEST
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"] if manifest.is_file() else {}
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{manifest} is damaged.") from None
    for name in sorted({*NEEDED, *files}):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing.")
        if name in files and path.stat().st_size != files[name]["bytes"]:
            raise CheckpointError(
                f"{path} is damaged: it has {path.stat().st_size:,} bytes, {files[name]['bytes']:,} were written."
            )
        if name in files and _digest(path) != files[name]["blake2b"]:
            raise CheckpointError(f"{path} is damaged: its contents are not what was written.")


def check_run_folder(output_dir: str | os.PathLike, *, resume: bool = False, overwrite: bool = False) -> str | None:
    """Decide what happens with a folder that may hold a run already.

    Args:
        resume: continue the run there.
        overwrite: remove what a run has left there (checkpoints, adapter, logs; other files stay).

    Returns:
        The checkpoint to resume from, or None for a new run.

    Raises:
        ConfigError: a run is there and neither was asked for, or there is nothing to resume.
    """
    folder = Path(output_dir)
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; keep one.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {str(folder)!r} is a file; give a folder.")
    if resume:
        return find_checkpoint(folder, True)
    if int(os.environ.get("RANK", "0")) > 0:  # the first process decides
        return None
    old = [p.name for p in reversed(checkpoints(folder))]
    old += [name for name in ("run.json", ADAPTER_FILE, "completions.jsonl") if (folder / name).is_file()]
    if old and not overwrite:
        last = next(iter(checkpoints(folder)), None)
        go_on = f"--resume to continue from {last.name}, " if last else ""
        raise ConfigError(
            f"output_dir {str(folder)!r} holds a run already ({', '.join(old)}). Use {go_on}--overwrite to delete it, "
            "or another --output_dir."
        )
    if overwrite and folder.is_dir():
        for path in folder.iterdir():
            if path.is_dir() and (re.fullmatch(r"checkpoint-\d+", path.name) or path.name.startswith(HIDDEN)):
                shutil.rmtree(path)
            elif path.is_file() and (path.name in RUN_FILES or re.fullmatch(r"failed_batch_step\d+\.json", path.name)):
                path.unlink()
    return None


def find_checkpoint(run_dir: str | os.PathLike, resume: str | os.PathLike | bool | None) -> str | None:
    """What ``train(resume_from_checkpoint=resume)`` loads: a folder that was verified, or None.

    Raises:
        CheckpointError: the one that was named is damaged.
        ConfigError: True, but there is none that is whole.
    """
    if resume is None or resume is False:
        return None
    if resume is not True:
        verify(resume)
        return str(resume)
    found = last_complete_checkpoint(run_dir)
    if found is None:
        raise ConfigError(
            f"there is nothing to resume in {str(run_dir)!r}: no complete checkpoint (checkpoint-N). Start without "
            "--resume; save_steps says how often one is written."
        )
    return found


# ---- writing -------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path) -> None:
    """List every file of a finished checkpoint, and see to it that they reach the disk."""
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST):
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "blake2b": _digest(path)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    _sync(folder / MANIFEST)


def publish(staged: Path, final: Path) -> None:
    """Put a finished folder in its place, in one step for whoever looks."""
    old = final.with_name(f".replaced-{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    staged.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def rotate(run_dir: Path, limit: int | None, keep: set[str]) -> None:
    """Delete the oldest checkpoints beyond `limit`; those named in `keep` stay."""
    if not limit or limit <= 0:
        return
    every = checkpoints(run_dir)
    kept = [p for p in every if p.name in keep]
    others = [p for p in every if p.name not in keep]
    for path in others[max(0, limit - len(kept)) :]:
        hidden = path.with_name(f".deleting-{path.name}")
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def replacing(folder: str | os.PathLike) -> Iterator[str]:
    """A folder to write files to, which then replace those of `folder` one by one, each of them whole.

    Raises:
        CheckpointError: they cannot be written.
    """
    target = Path(folder)
    staged = target / ".saving-model"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        yield str(staged)
        for path in staged.iterdir():
            _sync(path)
            path.replace(target / path.name)
    except Exception as error:
        if not _is_about_writing(error):
            raise
        raise CheckpointError(_cannot_write(folder, error)) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def remove_leftovers(run_dir: str | os.PathLike) -> None:
    """Remove what a killed process had begun to write or to delete."""
    folder = Path(run_dir)
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(HIDDEN):
                replaced = path.name.removeprefix(".replaced-")
                if replaced != path.name and not (folder / replaced).exists():
                    path.rename(folder / replaced)  # killed between the two renames of publish()
                else:
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def explain_full_disk(folder: str | os.PathLike) -> Iterator[None]:
    """Turn "no space left" into a message that says what is safe and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(_cannot_write(folder, error)) from error


def _is_about_writing(error: Exception) -> bool:
    """Each library has its own way to say that a file cannot be written; tokenizers raises a bare Exception."""
    return isinstance(error, (OSError, SafetensorError)) or any(
        text in str(error) for text in ("os error", "PytorchStreamWriter", "No space left", "unexpected pos")
    )


def _cannot_write(folder: str | os.PathLike, error: BaseException) -> str:
    last = next(iter(checkpoints(folder)), None)
    safe = f"{last} is intact: free some space and continue from it with --resume." if last else "Free some space."
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the run's files cannot be written to {folder} ({text}). {safe}"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    total = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


# ---- loading -------------------------------------------------------------------------------------------------------


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
    then = json.loads(path.read_text(encoding="utf-8"))
    if then["base_digest"] != now["base_digest"]:
        if then["base_model"] != now["base_model"]:
            what = f"it was trained on {then['base_model']!r}, this run loads {now['base_model']!r}"
        elif then["base_quantization"] != now["base_quantization"]:
            what = f"its base was held as {then['base_quantization']}, this run's as {now['base_quantization']}"
        elif then["compute_dtype"] != now["compute_dtype"]:
            what = f"its base was held in {then['compute_dtype']}, this run's in {now['compute_dtype']}"
        else:
            what = f"the weights of {now['base_model']!r} have changed since (digest {then['base_digest'][:8]}, now "
            what += f"{now['base_digest'][:8]})"
        raise CheckpointError(
            f"{folder} cannot be resumed: {what}. An adapter means nothing on other weights; bring the old base back, "
            "or start a new run."
        )
    if then["teacher_adapter"] != now["teacher_adapter"]:
        raise CheckpointError(
            f"{folder} cannot be resumed with teacher_adapter={now['teacher_adapter']!r}: it was trained with "
            f"{then['teacher_adapter']!r}. Set that, or start a new run from the adapter (--model {folder})."
        )
    if then.get("dataset_fingerprint") != now.get("dataset_fingerprint"):
        logger.warning("The data are not those that %s was trained on; the order of the rows is a new one.", folder)
    ignored = {"output_dir", "logging_dir", "resume_from_checkpoint", "run_name", "overwrite_output_dir"}
    config = {key: (value, now["config"].get(key)) for key, value in then["config"].items() if key not in ignored}
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
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
        raise CheckpointError(
            f"the optimizer, scheduler or random state in {folder} cannot be read, so it is damaged or was written by "
            f"someone else ({text}). Resume from another checkpoint, or start a new run from its adapter."
        ) from error


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Load the student's adapter from safetensors, all of it.

    Raises:
        CheckpointError: the file is missing or damaged, or its tensors are not those of this adapter.
    """
    path = folder / ADAPTER_FILE
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    own = get_peft_model_state_dict(model, adapter_name=STUDENT, save_embedding_layers=False)
    for name, tensor in own.items():
        if name not in saved:
            raise CheckpointError(
                f"{path} does not fit this run's adapter: {name} is missing. Was target_modules changed?"
            )
        if saved[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path} does not fit this run's adapter: {name} is {tuple(saved[name].shape)}, expected is "
                f"{tuple(tensor.shape)}. Use the rank and the base that it was trained with."
            )
    set_peft_model_state_dict(model, saved, adapter_name=STUDENT)


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
        me: PrivilegedSelfDistillTrainer = self  # type: ignore[assignment]
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
            if not _is_about_writing(error):
                raise
            raise CheckpointError(_cannot_write(run_dir, error)) from error
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
        me: PrivilegedSelfDistillTrainer = self  # type: ignore[assignment]
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
        me: PrivilegedSelfDistillTrainer = self  # type: ignore[assignment]
        folder = Path(resume_from_checkpoint)
        check_belongs(folder, me.run_info.collect())
        load_adapter(me.model, folder)
        if (folder / TEACHER_FILE).is_file():
            me.teacher.load(str(folder / TEACHER_FILE))
            me.frozen.restart()
        me.add_callback(_Continue(me, folder))


class _Continue(TrainerCallback):
    """Once, when a resumed run begins: take up the sums since the last log, and cut logs back to the checkpoint."""

    def __init__(self, trainer: PrivilegedSelfDistillTrainer, folder: Path):
        self.trainer = trainer
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.remove_callback(self)
        if trainer.is_world_process_zero():
            trim_log(Path(args.output_dir) / "completions.jsonl", state.global_step)
        path = self.folder / _progress_file(trainer)
        if not path.is_file():
            logger.warning("%s is missing: was the number of processes another one? The run goes on differently.", path)
            return
        progress = json.loads(path.read_text(encoding="utf-8"))
        trainer._tr_loss = torch.tensor(progress["loss"], device=args.device)
        trainer._total_loss_scalar = -progress["loss"]  # train_loss is about the steps of this call alone
        trainer._globalstep_last_logged = progress["last_logged"]
        trainer._sums["train"] = defaultdict(float, progress["sums"])


def _progress_file(trainer: PrivilegedSelfDistillTrainer) -> str:
    return f"progress_{trainer.accelerator.process_index}.json"
