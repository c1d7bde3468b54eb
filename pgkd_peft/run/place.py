"""The place that a run or a result is written to: whether it can be, and whether another process is at work there."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from ..errors import ConfigError, PGKDError, reason

LOCK_FILE = ".lock"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def check_writable(path: str | os.PathLike, flag: str, *, file: bool = False) -> None:
    """Refuse a place that nothing can be written to, before the work whose results would be lost.

    Args:
        path: a folder that is there or can be made, or a file in one.
        flag: the flag or setting that names it.
        file: it is to be a file.

    Raises:
        ConfigError: names both, and what the operating system says.
    """
    place = Path(path).absolute()
    try:
        str(place).encode()
    except UnicodeEncodeError:  # bytes of another encoding; libraries cannot write there
        raise ConfigError(
            f"{flag} {str(path)!r} cannot be written: its name is not text in the encoding of this terminal. Set "
            "PYTHONUTF8=1, or give a name in ASCII."
        ) from None
    if file and place.is_dir():
        raise ConfigError(f"{flag} {str(path)!r} is a folder; give a file.")
    if file and place.exists() and not place.is_file():  # /dev/null would be replaced
        raise ConfigError(f"{flag} {str(path)!r} is a device or a pipe; give a file.")
    while not place.is_dir():
        if place.is_symlink() and not place.exists():
            raise ConfigError(
                f"{flag} {str(path)!r} cannot be written: {place} is a link to nothing. Give another place."
            )
        if place.exists() and not (file and place == Path(path).absolute()):
            raise ConfigError(f"{flag} {str(path)!r} cannot be written: {place} is a file. Give another place.")
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag} {str(path)!r} cannot be written: {place}: {error.strerror or reason(error)}. Give another place."
        ) from error


def is_about_writing(error: BaseException) -> bool:
    """Each library has its own way to say that a file cannot be written: tokenizers raises a bare Exception, NumPy an
    OSError without a number. (A reader of our output that has gone is none of them.)"""
    if isinstance(error, BrokenPipeError):
        return False
    return isinstance(error, (OSError, SafetensorError)) or any(
        text in str(error) for text in ("os error", "PytorchStreamWriter", "No space left", "unexpected pos")
    )


@contextlib.contextmanager
def writing(path: str | os.PathLike, flag: str) -> Iterator[None]:
    """Around what writes a result: a disk that is full or goes away becomes an error that names the place.

    Args:
        flag: the flag or setting that names the place.

    Raises:
        ConfigError: names both, and what the operating system says.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, PGKDError) or not is_about_writing(error):
            raise
        raise ConfigError(
            f"{flag} {str(path)!r} cannot be written ({reason(error)}). Free some space, or give another place."
        ) from error


def make_readable(path: Path) -> None:
    """Let everybody on the machine read a file, or a folder with all that is in it: a server has a user of its own."""
    for part in (path, *path.rglob("*")) if path.is_dir() else (path,):
        part.chmod(0o755 if part.is_dir() else 0o644)


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other processes out of a run folder: a lock file with this process's id and host stands there meanwhile.

    A lock whose process has ended (a kill leaves it behind) is taken over. Within one process it can be nested; of
    several ranks the first holds it.

    Raises:
        ConfigError: another process is at work in the folder, or it cannot be written to.
    """
    path = Path(folder) / LOCK_FILE
    me = _process(os.getpid())
    if int(os.environ.get("RANK", "0")) > 0 or _read(path) == me:
        yield
        return
    check_writable(folder, "output_dir")
    new = [parent for parent in path.parents if not parent.exists()]
    try:
        with writing(folder, "output_dir"):
            path.parent.mkdir(parents=True, exist_ok=True)
        _take(path, me)
        yield
    finally:
        if _read(path) == me:
            path.unlink()
        with contextlib.suppress(OSError):  # something is in it now
            for parent in new:
                parent.rmdir()


def _take(path: Path, me: dict[str, Any]) -> None:
    """Make the lock file, in one step for whoever looks; over one that is stale, but never over a live one."""
    own = path.with_name(f"{LOCK_FILE}-{me['host']}-{me['pid']}")
    try:
        own.write_text(json.dumps(me) + "\n", encoding="utf-8")
    except OSError:  # a full disk
        own.unlink(missing_ok=True)
        raise
    try:
        for _ in range(2):
            with contextlib.suppress(FileExistsError):
                os.link(own, path)
                return
            _refuse_live(path)
            path.unlink(missing_ok=True)
        raise ConfigError(f"output_dir {str(path.parent)!r} was just entered by another process. Give another one.")
    except OSError as error:  # a file system without hard links
        if path.exists():
            raise ConfigError(f"{path} cannot be replaced: {reason(error)}.") from error
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def _refuse_live(path: Path) -> None:
    owner = _read(path)
    if owner is None or (owner.get("host") == socket.gethostname() and not _is_alive(owner)):
        return  # damaged, or left by a process that was killed
    raise ConfigError(
        f"output_dir {str(path.parent)!r} is in use by process {owner.get('pid')} on {owner.get('host')}. Wait for it, "
        f"stop it, or give another --output_dir. (If that process is gone for good, delete {path}.)"
    )


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the process that took the lock still runs; its start time tells it from a later one of the same id."""
    try:
        return bool(abs(psutil.Process(int(owner["pid"])).create_time() - float(owner["started"])) < 2)
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


@functools.cache
def _process(pid: int) -> dict[str, Any]:
    return {"pid": pid, "host": socket.gethostname(), "started": psutil.Process(pid).create_time()}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None
