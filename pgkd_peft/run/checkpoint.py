"""Checkpoints that are whole or absent, that are checked before they are loaded, and from which resuming is exact.

A checkpoint is written to a hidden folder beside its place, listed with a digest of every file in ``manifest.json``,
flushed to disk and renamed: a kill or a full disk at any moment leaves the previous checkpoint as it was, and a half
of one is never found. Beyond what Transformers saves, it holds the teacher's second adapter and each rank's sums since
the last log. Rollouts and the draws of ``lmbda`` are seeded by the step, so nothing of them is pending.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, ModelError, read_object, reason
from .folder import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    BAKE_FILE,
    CHAT_TEMPLATES,
    COMPLETIONS_FILE,
    MANIFEST,
    ROLLOUT_FOLDER,
    RUN_FILE,
    STATE_FILE,
    is_checkpoint,
    is_run_file,
)
from .jsonl import read_json, write_json
from .place import DISK, is_about_writing

logger = logging.getLogger(__name__)

NEEDED = (ADAPTER_FILE, ADAPTER_CONFIG, "optimizer.pt", "scheduler.pt", STATE_FILE)
HIDDEN = (".saving-", ".replaced-", ".deleting-")


# ---- finding and checking ------------------------------------------------------------------------------------------


def checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints in a run folder, newest (highest step) first."""
    folder = Path(run_dir)
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.is_dir() and is_checkpoint(p.name)]
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
        entries = json.loads(manifest.read_text(encoding="utf-8"))["files"] if manifest.is_file() else {}
        files = {str(name): (entry["bytes"], entry["blake2b"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{manifest} is damaged.") from None
    for name in sorted({*NEEDED, *files}):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing.")
        size, digest = files.get(name, (None, None))
        if size is not None and path.stat().st_size != size:
            raise CheckpointError(f"{path} is damaged: it has {path.stat().st_size:,} bytes, {size:,} were written.")
        if digest is not None and _digest(path) != digest:
            raise CheckpointError(f"{path} is damaged: its contents are not what was written.")
    state = read_state(folder)
    if not isinstance(state.get("global_step"), int):
        raise CheckpointError(f"{folder / STATE_FILE} is damaged: it has no global_step.")


def read_state(folder: Path) -> dict[str, Any]:
    """What Transformers keeps of a run's progress in a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return read_object(folder / STATE_FILE)
    except ModelError as error:
        raise CheckpointError(f"{folder / STATE_FILE} is damaged: {error}") from error


def is_saved(run_dir: str | os.PathLike) -> bool:
    """Whether a training came to its end and all of it is in the run folder; ``run.json`` is written last."""
    folder = Path(run_dir)
    return bool(read_json(folder / RUN_FILE).get("finished")) and (folder / ADAPTER_FILE).is_file()


def finished_at(run_dir: str | os.PathLike, checkpoint: str | os.PathLike, args: Any) -> str | None:
    """Why a run that is to go on from `checkpoint` has come to its end already, as a sentence; None when it has not.

    Args:
        args: the settings of the run that is to go on; `max_steps` or `num_train_epochs` say where it ends.
    """
    state, info = read_state(Path(checkpoint)), read_json(Path(run_dir) / RUN_FILE)
    step, epoch = state["global_step"], state.get("epoch") or 0.0
    by_steps = args.max_steps > 0
    reached = step >= args.max_steps if by_steps else epoch >= args.num_train_epochs - 1e-6
    settings: Any = info.get("config")
    stopped = info.get("finished") and all(  # before that, by early stopping
        isinstance(settings, dict) and settings.get(name) == getattr(args, name)
        for name in ("max_steps", "num_train_epochs")
    )
    if not reached and not stopped:
        return None
    ends = f"max_steps is {args.max_steps}" if by_steps else f"num_train_epochs is {args.num_train_epochs:g}"
    more = "max_steps" if by_steps else "num_train_epochs"
    return (
        f"the run in {str(run_dir)!r} is finished: it is at step {step}, epoch {epoch:g}, and {ends}. Nothing was "
        f"changed. To train on, raise {more}; to use it: pgkd eval {shlex.quote(str(run_dir))}"
    )


def check_run_folder(
    output_dir: str | os.PathLike, *, resume: str | bool = False, overwrite: bool = False, clear: bool = True
) -> str | None:
    """Decide what happens with a folder that may hold a run already.

    Args:
        resume: continue the run there, from its last checkpoint or from the one of this folder.
        overwrite: remove what a run has left there (checkpoints, adapter, logs; other files stay).
        clear: do so now; else the caller does, with :func:`clear_run_folder`, once the new run is sure to start.

    Returns:
        The checkpoint to resume from, or None for a new run.

    Raises:
        ConfigError: a run is there and neither was asked for, or there is nothing to resume.
    """
    folder = Path(output_dir)
    if resume and overwrite:
        raise ConfigError("--resume (or --resume_from_checkpoint) and --overwrite exclude each other; keep one.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {str(folder)!r} is a file; give a folder.")
    if resume:
        return find_checkpoint(folder, resume)
    if int(os.environ.get("RANK", "0")) > 0:  # the first process decides
        return None
    old = [p.name for p in reversed(checkpoints(folder))]
    old += [name for name in (RUN_FILE, ADAPTER_FILE, COMPLETIONS_FILE) if (folder / name).is_file()]
    if old and not overwrite:
        last = next(iter(checkpoints(folder)), None)
        go_on = f"--resume to continue from {last.name}, " if last else ""
        raise ConfigError(
            f"output_dir {str(folder)!r} holds a run already ({', '.join(old)}). Use {go_on}--overwrite to delete it, "
            "or another --output_dir."
        )
    if not old and not overwrite:
        refuse_foreign(folder)
    if overwrite and clear:
        clear_run_folder(folder)
    return None


def refuse_foreign(output_dir: str | os.PathLike) -> None:
    """Raises ConfigError for a folder with files that a run would write over (a README.md, a model's tokenizer), but
    which no run has written."""
    folder = Path(output_dir)
    ours = any((folder / name).is_file() for name in (RUN_FILE, BAKE_FILE))
    found = sorted(p.name for p in folder.iterdir() if is_run_file(p.name)) if folder.is_dir() and not ours else []
    if found:
        raise ConfigError(
            f"output_dir {str(folder)!r} holds {', '.join(found)}, which a run would write over, but no {RUN_FILE}: it "
            "is no run's. Use another --output_dir, or --overwrite to have that deleted."
        )


def clear_run_folder(output_dir: str | os.PathLike) -> None:
    """Remove what a run has left in its folder; other files stay."""
    folder = Path(output_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        ours = is_checkpoint(path.name) or path.name == CHAT_TEMPLATES or path.name.startswith(HIDDEN)
        ours = ours or path.name == ROLLOUT_FOLDER
        if path.is_dir() and ours:
            shutil.rmtree(path)
        elif path.is_file() and is_run_file(path.name):
            path.unlink()


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
    write_json(folder / MANIFEST, {"files": files})
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
    """A folder to write files to, which then replace those of `folder` one by one, each of them whole; ``run.json``,
    which says that a run is finished, comes last.

    Raises:
        CheckpointError: they cannot be written.
    """
    target = Path(folder)
    staged = target / ".saving-model"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        yield str(staged)
        for path in sorted(staged.iterdir(), key=lambda path: path.name == RUN_FILE):
            _sync(path)
            if path.is_dir():  # of chat templates; a folder with something in it is not replaced
                shutil.rmtree(target / path.name, ignore_errors=True)
            path.replace(target / path.name)
    except Exception as error:
        if not is_about_writing(error):
            raise
        raise CheckpointError(cannot_write(folder, error)) from error
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
    """Turn "no space left" and "read-only" into a message that says what is safe and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise CheckpointError(cannot_write(folder, error)) from error


def cannot_write(folder: str | os.PathLike, error: BaseException) -> str:
    last = next(iter(checkpoints(folder)), None)
    safe = f"{last} is intact: free some space and continue from it with --resume." if last else "Free some space."
    return f"the run's files cannot be written to {folder} ({reason(error)}). {safe}"


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
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
