"""The user's files as text: Markdown and plain text as they are, PDF, DOCX and HTML through `markitdown`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from ..data.files import BrokenRow, read_prompts
from ..data.row import check_unicode, load_json, parse_messages
from ..errors import DataError, reason, refuse_pointer
from ..run.folder import BAKE_FILE, RUN_FILE, is_checkpoint, is_run_file

logger = logging.getLogger(__name__)

TEXT = (".md", ".markdown", ".txt", ".rst", "")
REQUESTS = (*TEXT, ".jsonl")
CONVERTED = (".pdf", ".docx", ".html", ".htm", ".pptx")
_KNOWN = {suffix for suffix in (*TEXT, *CONVERTED) if suffix}


def documents(paths: Sequence[str]) -> list[tuple[str, str]]:
    """(name, text) of every file; of a folder all files of a known kind below it, sorted, without hidden ones
    and what runs have written.

    Raises:
        DataError: a file is missing, empty, no text, or of a kind that cannot be read; a folder holds none.
    """
    files: list[tuple[str, Path]] = []
    for given in paths:
        path = Path(given)
        if os.path.isdir(given):  # False, not an error, for what no file can be called
            found, left_out = _below(path)
            if not found:
                raise DataError(f"--document {given!r} is a folder without a document ({', '.join(sorted(_KNOWN))})")
            if others := [str(p.relative_to(path)) for p in left_out]:
                shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
                logger.warning("Left out of %s, as they are no documents: %s.", given, shown)
            files += [(str(p.relative_to(path)), p) for p in found]
        elif os.path.isfile(given):
            files.append((path.name, path))
        else:
            raise DataError(f"--document {given!r} does not exist; give text files, or a folder of them")
    return [(name, read_text(path)) for name, path in files]


def _below(top: Path) -> tuple[list[Path], list[Path]]:
    """(documents below a folder, what is left out there), sorted. A hidden folder, or one that holds a run, is left out
    as a whole; where the folder itself holds one, its files are."""
    found: list[Path] = []
    others: list[Path] = []
    is_run = _holds_run(top)
    for place, folders, names in os.walk(top):
        here = Path(place)
        written = is_run and here == top
        for name in [*folders]:
            if name.startswith(".") or (written and is_checkpoint(name)) or _holds_run(here / name):
                folders.remove(name)
                others.append(here / name)
        for path in (here / name for name in names):
            ours = path.name.startswith(".") or (written and is_run_file(path.name))
            if path.is_file():
                (found if path.suffix.lower() in _KNOWN and not ours else others).append(path)
    return sorted(found), sorted(others)


def _holds_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (RUN_FILE, BAKE_FILE))


def read_text(path: Path, kinds: Sequence[str] = TEXT) -> str:
    """One file as text.

    Raises:
        DataError: it is empty, binary, or of a kind that cannot be read.
    """
    if path.suffix.lower() in CONVERTED:
        text = _converted(path)
    elif path.suffix.lower() in kinds:
        text = utf8_text(path)
    else:
        accepted = ", ".join(suffix for suffix in (*kinds, *CONVERTED) if suffix)
        raise DataError(f"{path}: {path.suffix} cannot be read; accepted are {accepted}")
    if not text.strip():
        raise DataError(f"{path} is empty; there is nothing to teach in it")
    return text


def utf8_text(path: Path) -> str:
    """What a file of text says, without the mark that some editors put first.

    Raises:
        DataError: it is binary, or not UTF-8.
    """
    refuse_pointer(path)
    raw = path.read_bytes()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    if b"\0" in raw:
        raise DataError(f"{path} is a binary file, no text; accepted are {', '.join((*TEXT[:-1], *CONVERTED))}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from error


def _converted(path: Path) -> str:
    try:
        from markitdown import MarkItDown
    except ImportError as error:
        raise DataError(
            f"{path}: {path.suffix} files are read through markitdown, which is not installed: "
            'pip install "pgkd-peft[documents]"'
        ) from error
    try:
        return MarkItDown().convert(str(path)).text_content
    except Exception as error:
        raise DataError(f"{path} cannot be converted to text: {reason(error)}") from error


def prompt_text(given: str) -> str:
    """A system prompt: the file of that name, else the words themselves.

    Raises:
        DataError: it is empty, or looks like a file that is not there.
    """
    check_unicode(given, "--system_prompt")
    path = Path(given)
    if os.path.isfile(given):  # False, not an error, for words too long to be a name
        return read_text(path).strip()
    if "\n" not in given and " " not in given and (path.suffix.lower() in TEXT[:-1] or "/" in given):
        raise DataError(f"--system_prompt {given!r} does not exist; give a text file, or the prompt itself")
    if not given.strip():
        raise DataError("--system_prompt is empty; give a text file, or the prompt itself")
    return given.strip()


def requests(path: str) -> list[str]:
    """The user's own requests: a line each, of Markdown a list item (or paragraph) each, or JSONL with ``messages``, of
    which the last user turn is taken; how many have more than that is logged.

    Raises:
        DataError: names the line that cannot be used.
    """
    file = Path(path)
    if not os.path.isfile(path):
        raise DataError(f"--requests {path!r} does not exist; give a text file with a request a line, or JSONL")
    found = []
    text = read_text(file, REQUESTS)
    if file.suffix.lower() in (".md", ".markdown"):
        rows = read_prompts(file)
        broken = [row for row in rows if isinstance(row, BrokenRow)]
        if broken or not rows:
            raise DataError(f"--requests: {broken[0] if broken else f'{path} holds no request, only headings'}")
        return [row["messages"][0]["content"] for row in rows]
    longer = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if file.suffix.lower() != ".jsonl":
            found.append(line.strip())
            continue
        try:
            turns = parse_messages(load_json(line)["messages"], "messages")
            said = [turn["content"] for turn in turns if turn["role"] == "user"]
            found.append(said[-1].strip())
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if "without text" in str(error):
                raise DataError(
                    f"{path}, line {number}: the request is empty; write one, or delete the line"
                ) from error
            because = f" ({error})" if isinstance(error, ValueError) else ""
            raise DataError(
                f'{path}, line {number}: give {{"messages": [{{"role": "user", "content": "..."}}]}} in every '
                f"line{because}"
            ) from error
        longer += len(turns) - (turns[-1]["role"] == "assistant") > 1
    if longer:
        logger.warning(
            "%s: %d of %d requests have other turns before the last question (or a system turn), which are left out.",
            path,
            longer,
            len(found),
        )
    return found
