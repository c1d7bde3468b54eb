"""The arguments of `pgkd bake`: its own, and those that go on to the training."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bake import pipeline
from ..bake.split import MOST_WORDS, Passage
from ..errors import ConfigError
from .arguments import TRAIN_ARGUMENTS, Parser, read_recipe
from .trl_names import translate_flags, translate_recipe

if TYPE_CHECKING:
    from rich.console import Console

    from ..config import PrivilegedGKDConfig
    from .arguments import ModelArguments

SYSTEM_PROMPT = "system prompt"  # the source of its passage
DESCRIPTION = """Teach a model a document, or a system prompt, from its text alone: questions about it are written and
sifted, an adapter is trained to answer them without the text, and what it took over is measured. All settings of
`pgkd train` can be given too (`pgkd train --help`)."""

# What the documents' template says: the base reads the text before the question, so equal texts are read once.
DOCUMENT_TEMPLATE = "Text: {privileged}\n\nAnswer from the text. {question}"
# Settings of `pgkd train` that a bake has values of its own for; giving one wins.
SETTINGS: dict[str, Any] = {
    "beta": 0.0,  # forward KL: put probability on the words of the text
    "temperature": 0.7,  # of rollouts: a small model's samples at 1.0 are noise, which the teacher would then grade
    "max_new_tokens": 32,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "linear",
    "save_steps": 25,
    "save_total_limit": 1,
    "logging_steps": 5,
    "report_to": "none",
}


@dataclass
class BakeArguments:
    """What is taught, and how it is asked about."""

    _argument_group_name = "bake"

    document: list[str] | None = field(
        default=None,
        metadata={"help": "Markdown or text files, or a folder; PDF, DOCX, HTML with pgkd-peft[documents]."},
    )
    system_prompt: str | None = field(default=None, metadata={"help": "A system prompt: a file, or the words."})
    requests: str | None = field(
        default=None, metadata={"help": "Your own requests, a line each, or JSONL with messages; they come first."}
    )
    questions: int | None = field(
        default=None, metadata={"help": "Questions to write: a passage of a document (20), or a prompt in all (320)."}
    )
    anchors: int = field(
        default=144,
        metadata={"help": "Everyday requests to write, some 48 at a time, on which the model is to stay as it is."},
    )
    minutes: float | None = field(default=None, metadata={"help": "Bound of the whole bake; it does what fits."})
    dry_run: bool = field(default=False, metadata={"help": "Stop at questions.jsonl, to read and edit it."})
    more: bool = field(
        default=False, metadata={"help": "Of a finished bake: ask about what was not taken over, and train on."}
    )
    gap_filter: bool = field(
        default=True, metadata={"help": "Leave out questions whose answer the base gives without the text as well."}
    )
    passage_words: int = field(default=MOST_WORDS, metadata={"help": "Longest passage, in words."})
    writer_url: str | None = field(
        default=None,
        metadata={"help": "An OpenAI-compatible server that writes the questions about a document, up to /v1."},
    )
    writer_model: str | None = field(default=None, metadata={"help": "The model's name at writer_url."})
    writer_key_env: str = field(default="OPENAI_API_KEY", metadata={"help": "Environment variable with its key."})

    def __post_init__(self) -> None:
        fewest = 0 if self.requests is not None else 1
        for name, least in (("questions", fewest), ("anchors", 0), ("passage_words", 5)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be {least} or more")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise ConfigError(f"minutes is {self.minutes}; give a number above 0")
        if (self.document is None) == (self.system_prompt is None):
            raise ConfigError(
                "give what to teach: --document FILE [FILE ...] or --system_prompt FILE_OR_TEXT"
                + (", not both" if self.document else "")
            )
        if (self.writer_url is None) != (self.writer_model is None):
            raise ConfigError("writer_url and writer_model belong together; give both, or neither")
        if self.writer_url is not None and self.is_prompt:
            raise ConfigError("with system_prompt the model itself writes the requests; leave out writer_url")

    @property
    def is_prompt(self) -> bool:
        return self.system_prompt is not None

    @property
    def wanted(self) -> int:
        return self.questions if self.questions is not None else (320 if self.is_prompt else 20)

    @property
    def text_file(self) -> str | None:
        """The file with all of the text, where it is one file of plain text."""
        files = [self.system_prompt] if self.system_prompt is not None else self.document or []
        if len(files) != 1 or not files[0].endswith((".md", ".txt")) or "\n" in files[0]:
            return None
        return files[0] if Path(files[0]).is_file() else None


def parse(argv: Sequence[str]) -> tuple[BakeArguments, list[str]]:
    """Our own arguments, and the flags for `pgkd train`; a recipe may hold both.

    Raises:
        ConfigError: something is unknown, unfit or missing.
    """
    own_values = ", ".join(f"{name} {value}" for name, value in SETTINGS.items())
    parser = Parser(
        [BakeArguments],
        "pgkd bake",
        DESCRIPTION,
        needed=("--model_name_or_path MODEL --output_dir DIR", "(--document FILE ... | --system_prompt FILE)"),
        epilog=f"Of the settings of `pgkd train` a bake has values of its own for: {own_values}.",
    )
    if any(flag in ("-h", "--help") for flag in argv):
        parser.parse(["--help"])
    told = _told(argv)
    if "dataset_name" in told:
        raise ConfigError("dataset_name is for rows of your own (pgkd train); a bake writes them itself")
    own = [f.name for f in fields(BakeArguments) if f.name in told]
    (args,) = parser.parse([part for name in own for part in told.pop(name)])
    defaults = {**SETTINGS, "privileged_placement": "system"}
    if not args.is_prompt:
        defaults |= {"privileged_placement": "user", "privileged_template": DOCUMENT_TEMPLATE}
    if "privileged_placement" in told:
        defaults.pop("privileged_template", None)
    told |= {name: [f"--{name}", str(value)] for name, value in defaults.items() if name not in told}
    return args, [part for flag in told.values() for part in flag]


def _told(argv: Sequence[str]) -> dict[str, list[str]]:
    """What recipe and flags say, by our own names (with underscores, not TRL's): each as the flag with its values."""
    known = frozenset(action.dest for action in Parser([BakeArguments, *TRAIN_ARGUMENTS], "pgkd bake")._actions)
    flags: dict[str, list[str]] = {}
    for flag in grouped(translate_flags(argv, known)):
        if not _FLAG.fullmatch(flag[0]):
            raise ConfigError(f"unexpected argument {flag[0]!r}; values follow a flag, as in --document FILE")
        name, equals, value = flag[0][2:].partition("=")
        name = name.replace("-", "_")
        values = [value] if equals else flag[1:]
        if name == "document":
            flags[name] = [*flags.get(name, ["--document"]), *values]
        elif name == "no_gap_filter":
            flags["gap_filter"] = ["--gap_filter", "false", *values]
        else:
            flags[name] = [f"--{name}{equals}{value}", *flag[1:]]
    if "config" not in flags:
        return flags
    path = flags.pop("config")[-1].removeprefix("--config").removeprefix("=")
    recipe = translate_recipe(read_recipe(path), known)
    settings = {str(key).replace("-", "_"): value for key, value in recipe.items() if value is not None}
    return {**{name: _as_flag(name, value) for name, value in settings.items()}, **flags}


_FLAG = re.compile(r"--\w[\w-]*(=.*)?", re.DOTALL)


def grouped(argv: Sequence[str]) -> list[list[str]]:
    """Each flag with the values behind it."""
    groups: list[list[str]] = []
    for text in argv:
        if _FLAG.fullmatch(text) or not groups:
            groups.append([text])
        else:
            groups[-1].append(text)
    return groups


def _as_flag(name: str, value: Any) -> list[str]:
    """A recipe's setting as a flag."""
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]


@dataclass
class Job:
    """What is asked about, and where it is written.

    Attributes:
        folder: the run's, or of `--more` one below it.
        state: what stands in its ``bake.json``.
        anew: what is in the folder is to go.
        adapter: of a finished bake, which training goes on from; the questions are the base's all the same.
    """

    args: BakeArguments
    passages: Sequence[Passage]
    model: ModelArguments
    config: PrivilegedGKDConfig
    folder: Path
    state: dict[str, Any]
    plan: pipeline.Plan
    budget: pipeline.Budget
    console: Console
    anew: bool = False
    adapter: Path | None = None
