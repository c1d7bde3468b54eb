"""The command `pgkd`. Nothing heavy is imported here: a command's own module is, when it runs.

Exit codes: 0 done; 1 a result that must not be used (a merge that failed its verification); 2 a mistake in what was
asked for, told without a traceback; 128 + n stopped by signal n after saving.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """A command: where its function is, and what it does in one line."""

    where: str
    help: str


# The function gets the arguments after the command's name, and returns an exit code (None is 0).
COMMANDS = {
    "demo": Command("pgkd_peft.cli.demo:main", "teach a real 135M model made-up facts: minutes, no network"),
    "bake": Command("pgkd_peft.cli.bake:main", "teach a document or a system prompt, from its text alone"),
    "train": Command("pgkd_peft.cli.train:main", "train an adapter on your own rows"),
    "inspect": Command("pgkd_peft.cli.inspect:main", "see the rows as student and teacher will; no training"),
    "recipes": Command("pgkd_peft.cli.recipes:main", "list settings to start from, or copy them"),
    "eval": Command("pgkd_peft.cli.eval:main", "base, teacher, student on held-out rows: what was learnt, forgotten"),
    "chat": Command("pgkd_peft.cli.chat:main", "ask base, base with the text, and student"),
    "report": Command("pgkd_peft.cli.report:main", "a run, or all runs, as one HTML page"),
    "runs": Command("pgkd_peft.cli.runs:main", "all runs of a folder as one table"),
    "merge": Command("pgkd_peft.cli.export:merge", "adapter -> plain 16-bit model, measured to be what was trained"),
    "export": Command("pgkd_peft.cli.export:export", "adapter -> cleaned for publication, or GGUF"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args[0] in ("--version", "-V"):
        from .. import __version__

        print(f"pgkd-peft {__version__}")
        return 0
    command = COMMANDS.get(args[0])
    if command is None:
        near = get_close_matches(args[0], COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        return _complain(f"unknown command {args[0]!r}{hint} `pgkd --help` lists them.")
    from ..errors import PGKDError

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    # What these libraries will rename one day is nothing that a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\b")
    _print_anything()
    try:
        module, _, name = command.where.partition(":")
        code = getattr(importlib.import_module(module), name)(args[1:]) or 0
        sys.stdout.flush()  # a reader that has gone is noticed here, not when Python ends
        return code
    except PGKDError as error:
        return _complain(str(error))
    except SystemExit as done:  # argparse, after --help or with its own complaint; rich, when the reader has gone
        if isinstance(done.__context__, BrokenPipeError):
            return _reader_gone()
        return done.code if isinstance(done.code, int) else 2
    except KeyboardInterrupt as error:
        if str(error):
            with contextlib.suppress(OSError):  # the terminal may have been closed
                print(error, file=sys.stderr, flush=True)
        return 128 + getattr(error, "signum", 2)
    except BrokenPipeError:
        return _reader_gone()
    except Exception as error:
        return _unexpected(error)


def _print_anything() -> None:
    """Where the console's encoding lacks a character (ASCII, cp1252), print its escape instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _reader_gone() -> int:
    """Of our output: `pgkd inspect ... | head`. What is still to be written goes nowhere, at Python's end as well."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    return 141


def _unexpected(error: Exception) -> int:
    """What no command foresaw: of the system or of a library (a file, a setting) a line, of our own code a traceback.

    ``PGKD_TRACEBACK=1`` shows the traceback of the former as well.
    """
    from ..errors import reason

    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).is_relative_to(Path(__file__).parent.parent)
    if os.environ.get("PGKD_TRACEBACK") or (ours and not isinstance(error, OSError)):
        traceback.print_exception(error)
        return 1 if ours else 2
    if isinstance(error, OSError):
        return _complain(reason(error))
    where = "/".join(Path(last.filename).parts[-3:])
    return _complain(
        f"{type(error).__name__} in {where}, line {last.lineno}: {reason(error)} (PGKD_TRACEBACK=1 shows the traceback)"
    )


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pgkd COMMAND [options]",
            "",
            "Teach a language model what used to stand in its prompt. The base that reads",
            "that text (privileged information, PI) is the teacher; the same base with a",
            "LoRA adapter and without the text is the student, which learns to answer alike.",
            "",
            *lines,
            "",
            "`pgkd COMMAND --help` tells more; `pgkd --version` the version.",
        ]
    )


def _complain(message: str) -> int:
    with contextlib.suppress(OSError):
        print(f"pgkd: {message}", file=sys.stderr, flush=True)
    return 2
