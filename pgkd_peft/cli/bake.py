"""`pgkd bake`: from a document or a system prompt alone to a trained and measured adapter."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bake import pipeline, read
from ..bake.split import MOST_WORDS, Passage, split_documents, word_count
from ..errors import ConfigError, DataError, explained, read_object
from ..run.checkpoint import clear_run_folder, explain_full_disk, is_saved, refuse_foreign
from ..run.folder import (
    ASKED_FILE,
    BAKE_FILE,
    BAKE_NEUTRAL_FILE,
    COVERAGE_FILE,
    QUESTIONS_FILE,
    RUN_FILE,
)
from ..run.jsonl import read_json, write_json
from ..run.place import locked
from .arguments import TRAIN_ARGUMENTS, Parser, parse_train, read_recipe
from .bake_training import train_and_judge
from .trl_names import translate_flags, translate_recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.console import Console

    from ..bake.keep import Keeper
    from ..bake.questions import Question
    from ..config import PrivilegedGKDConfig
    from .arguments import DataArguments, ModelArguments

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


def main(argv: Sequence[str]) -> int:
    args, train_flags = parse(argv)
    return bake(args, train_flags)


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


def bake(args: BakeArguments, train_flags: list[str]) -> int:
    """The body of :func:`main`."""
    passages = read_passages(args)
    requests = read.requests(args.requests) if args.requests else []
    data, model, config = parse_train([*train_flags, "--dataset_name", "bake"], prog="pgkd bake")
    folder = Path(str(config.output_dir))
    if args.more and data.overwrite:
        raise ConfigError("--more goes on from the bake that --overwrite would remove; give one of them")
    if data.overwrite and data.resume:
        raise ConfigError("--resume and --overwrite exclude each other; keep one.")
    with explain_full_disk(folder), locked(folder):
        if args.more:
            return more(args, train_flags, passages, requests)
        return bake_all(args, train_flags, passages, requests, (data, model, config))


def bake_all(
    args: BakeArguments,
    train_flags: list[str],
    passages: Sequence[Passage],
    requests: Sequence[str],
    parsed: tuple[DataArguments, ModelArguments, PrivilegedGKDConfig],
) -> int:
    """A bake from its beginning, or from where it was interrupted."""
    from rich.console import Console

    data, model, config = parsed
    folder = Path(str(config.output_dir))
    before = {} if data.overwrite else read_json(folder / BAKE_FILE)
    state = begin(args, passages, requests, model, before, folder)
    if not data.overwrite:
        check_folder(folder)
    budget = pipeline.Budget(args.minutes * 60 if args.minutes else None)
    plan = pipeline.Plan(args.wanted, args.anchors, requests, is_prompt=args.is_prompt, seed=config.seed)
    job = Job(args, passages, model, config, folder, state, plan, budget, Console(), data.overwrite)
    questions, keeper, student = write_questions(job)
    if args.dry_run:
        job.console.print(f"Read and edit {folder / QUESTIONS_FILE}; the same command without --dry_run trains.")
        return 0
    train_and_judge(job, train_flags, questions, keeper, student)
    return 0


def check_folder(folder: Path) -> None:
    """Raises ConfigError where there is nothing to go on with: a finished bake, a run that is none, others' files."""
    if is_finished(folder):
        raise ConfigError(
            f"the bake in {str(folder)!r} is finished. --more asks about what was not taken over, --overwrite begins "
            "anew, pgkd report shows it."
        )
    if (folder / RUN_FILE).is_file() and not (folder / BAKE_FILE).is_file():
        raise ConfigError(f"{str(folder)!r} holds a run that is no bake. Use another --output_dir, or --overwrite.")
    refuse_foreign(folder)


def is_finished(folder: Path) -> bool:
    """Whether the bake was trained, and judged as well."""
    return is_saved(folder) and (folder / COVERAGE_FILE).is_file()


def read_passages(args: BakeArguments) -> list[Passage]:
    """What is taught; a system prompt is one passage."""
    if args.system_prompt is not None:
        return [Passage(0, SYSTEM_PROMPT, (), read.prompt_text(args.system_prompt))]
    passages = split_documents(read.documents(args.document or []), most_words=args.passage_words)
    if not passages:
        raise DataError("the documents hold no passage of a few words; there is nothing to ask about")
    return passages


def begin(
    args: BakeArguments,
    passages: Sequence[Passage],
    requests: Sequence[str],
    model: ModelArguments,
    before: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """What stands in ``bake.json``, compared with what an interrupted bake has left there.

    Raises:
        ConfigError: the folder holds a bake of something else.
    """
    subject = taught(passages, model)
    digest = digest_of(*subject, list(requests), args.wanted, args.anchors, args.writer_model)
    if before and before.get("digest") != digest:
        raise ConfigError(
            f"{str(folder)!r} holds a bake of another text, or into another model, or with other --requests, "
            "--questions, --anchors or --writer_model. Use another --output_dir, or begin anew with --overwrite (of "
            "--more: remove that folder)."
        )
    kind = "system prompt" if args.is_prompt else "document"
    sources = sorted({passage.source for passage in passages})
    digests = {"digest": digest, "taught": digest_of(*subject)}
    return before or {**digests, "passages": len(passages), "kind": kind, "sources": sources}


def taught(passages: Sequence[Passage], model: ModelArguments) -> tuple[list[str], str]:
    """What is taught to which model."""
    return [passage.privileged for passage in passages], str(model.model_name_or_path)


def digest_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def progress(console: Any) -> Iterator[Any]:
    """A bar with the seconds left, where there is a terminal; plain lines elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    if not console.is_terminal:
        yield lambda done, total, what: console.print(f"{what}: call {done} of about {total}", highlight=False)
        return
    columns = (TextColumn("{task.description:>8}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        tasks: dict[str, Any] = {}

        def tick(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield tick


def write_questions(job: Job) -> tuple[list[Question], Keeper, PeftModel]:
    """Ask and judge, or take up what an earlier call and the user's edits have left; nothing is written before the
    model is there, which then trains as well."""
    import torch
    from peft import LoraConfig
    from transformers import set_seed

    from ..bake.ask import BaseWriter
    from ..bake.keep import LEAST_GAP, Keeper
    from ..bake.server import ServerWriter
    from ..data.collator import DataCollatorForPrivilegedGKD
    from ..engines.merged import RolloutEngine
    from ..model.adapters import load_adapter
    from ..model.load import base_of
    from ..model.student import build_student, context_length, embedding_rows, find_tokenizer
    from .arguments import lora_config, quantization_config

    args, passages, config, state, console = job.args, job.passages, job.config, job.state, job.console
    name = str(job.model.model_name_or_path)
    questions = None if job.anew else pipeline.known_questions(job.folder, len(passages))
    is_asked = questions is not None and not state.get("asking")
    server = None
    if args.writer_url and not is_asked:
        server = ServerWriter(args.writer_url, str(args.writer_model), key_env=args.writer_key_env)
    tokenizer = find_tokenizer(name, None, config)
    longest = max(len(tokenizer(p.privileged, add_special_tokens=False)["input_ids"]) for p in passages)
    config.max_privileged_length = max(config.max_privileged_length, longest + 8)
    limit = context_length(name, config)
    collator = DataCollatorForPrivilegedGKD.from_config(tokenizer, config, limit, embedding_rows(name, config))
    privileged = {passage.number: passage.privileged for passage in passages}
    check_texts(collator, passages, job.plan.requests)
    words = sum(word_count(p.text) for p in passages)
    console.print(f"{len(passages)} passage{'s'[: len(passages) != 1]}, {words} words", highlight=False)
    # A fresh LoRA adds nothing, so what the rollout engine writes with is the base: where a 16-bit copy fits, without
    # dequantizing every weight for every token.
    set_seed(config.seed)  # of the LoRA, as the trainer does it
    lora = lora_config(job.model)
    if job.adapter is not None:
        lora = LoraConfig.from_pretrained(str(job.adapter), inference_mode=False)
    student, loaded = build_student(name, config, lora, quantization_config(job.model, config))
    console.print(loaded, highlight=False, markup=False)
    accept(job)
    engine = RolloutEngine(student, config.rollout_engine, base_of(student).get_input_embeddings().weight.dtype)
    with torch.no_grad(), engine.model() as model, progress(console) as tick:
        writer = BaseWriter(model, collator)
        keeper = Keeper(
            model,
            collator,
            privileged,
            max_new_tokens=config.max_new_tokens,
            least_gap=LEAST_GAP if args.gap_filter else None,
            facts=not args.is_prompt,
            seed=config.seed,
        )
        if questions is not None and is_asked:
            questions = pipeline.judge(job.folder, questions, keeper)
        else:
            state["asking"] = True  # what is read in after a kill is not whole
            write_json(job.folder / BAKE_FILE, state)
            asker = server or writer
            asking = pipeline.Asking(job.folder, passages, asker, writer, keeper, job.plan, job.budget, tick)
            questions = asking.run(questions or [])
            del state["asking"]
            write_json(job.folder / BAKE_FILE, state)
    console.print(f"{pipeline.counted(questions)} [{job.budget.spent:.0f} s]", highlight=False, markup=False)
    keeper.model = None  # type: ignore[assignment]  # the engine's copy is let go of
    if job.adapter is not None:
        load_adapter(student, job.adapter)
    return questions, keeper, student


def accept(job: Job) -> None:
    """Make the folder ready, now that the model is there."""
    if job.anew:
        for name in (ASKED_FILE, QUESTIONS_FILE, BAKE_FILE, COVERAGE_FILE, BAKE_NEUTRAL_FILE):
            (job.folder / name).unlink(missing_ok=True)
        for path in rounds_of(job.folder)[1:]:
            shutil.rmtree(path, ignore_errors=True)
        clear_run_folder(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.folder / BAKE_FILE, job.state)


def check_texts(collator: Any, passages: Sequence[Passage], requests: Sequence[str]) -> None:
    """Every passage, and the user's own requests with whichever passage they may go to, must fit into the model's
    context with an answer, and into its vocabulary.

    Raises:
        DataError: names the first that does not, and what to do.
    """
    from ..bake.keep import encoded_by_name
    from ..data.collator import PrivilegedTooLongError

    question = "What would a rather long question about it be, in about twenty words?"
    key = collator.builder.privileged_key
    for passage in passages:
        what = f"passage {passage.number} of {passage.source} ({passage.text[:40]!r} …)"
        row = {"messages": [{"role": "user", "content": question}], key: passage.privileged}
        try:
            encoded_by_name(collator, row, what)
        except PrivilegedTooLongError as error:
            length = len(collator.encode(row)["teacher_ids"])
            is_prompt = passage.source == SYSTEM_PROMPT
            fix = "Shorten it." if is_prompt else "Break it into lines or sentences, or give --passage_words less."
            raise DataError(
                f"{what} has {length} tokens with a question; with an answer of {collator.max_new_tokens} that is more "
                f"than the {collator.context_length} of the model. {fix}"
            ) from error
    longest = max((passage.privileged for passage in passages), key=len)
    for request in requests:
        row = {"messages": [{"role": "user", "content": request}], key: longest}
        encoded_by_name(collator, row, f"the request {request[:40]!r}")


def more(args: BakeArguments, train_flags: list[str], passages: Sequence[Passage], requests: Sequence[str]) -> int:
    """Ask about the pale passages with openings not used yet, and train on from the newest adapter, in a folder below
    that of the bake."""
    from rich.console import Console

    from ..bake import coverage

    flags = [*train_flags, "--dataset_name", "bake"]
    _, model, config = parse_train(flags, prog="pgkd bake")
    folder = Path(str(config.output_dir))
    if not is_finished(folder):
        raise ConfigError(f"--more goes on from a finished bake, and there is none in {str(folder)!r}")
    if read_json(folder / BAKE_FILE).get("taught") != digest_of(*taught(passages, model)):
        raise ConfigError(
            f"{str(folder)!r} holds a bake of another text, or into another model; --more goes on from it"
        )
    finished = [path for path in rounds_of(folder) if is_finished(path)]
    newest, number = finished[-1], len(finished)
    target = more_folder(folder, number)
    console = Console()
    path = newest / COVERAGE_FILE
    advice = "Remove it; the same command without --more judges again."
    with explained(f"{path} is damaged", ConfigError, advice):
        rest = coverage.pale(read_object(path, advice))
    if not rest:
        console.print(
            f"every passage was taken over by {coverage.PALE:.0%} or more; there is nothing pale to ask about"
        )
        return 0
    flags = [*without_lora(train_flags, newest, console), "--output_dir", str(target)]
    _, model, config = parse_train([*flags, "--dataset_name", "bake"], prog="pgkd bake")
    state = begin(args, passages, requests, model, read_json(target / BAKE_FILE), target)
    earlier = [q for path in finished for q in pipeline.known_questions(path, len(passages)) or []]
    asked = {question.question for question in earlier}
    budget = pipeline.Budget(args.minutes * 60 if args.minutes else None)
    plan = pipeline.Plan(
        args.wanted,
        args.anchors,
        [request for request in requests if request not in asked],
        first_round=args.wanted * number,
        only=rest,
        is_prompt=args.is_prompt,
        seed=config.seed + number,
    )
    job = Job(args, passages, model, config, target, state, plan, budget, console, adapter=newest)
    questions, keeper, student = write_questions(job)
    if args.dry_run:
        console.print(f"Read and edit {target / QUESTIONS_FILE}; the same command without --dry_run trains.")
        return 0
    kept = [q for q in earlier if q.use in ("train", "anchor", "heldout")]  # so that what was learnt stays
    flags += ["--model_name_or_path", str(newest)]
    train_and_judge(job, flags, [*kept, *questions], keeper, student)
    return 0


def rounds_of(folder: Path) -> list[Path]:
    """The folders of a bake and of each `--more` after it, as far as they are there."""
    found = [folder]
    while (path := more_folder(folder, len(found))).is_dir():
        found.append(path)
    return found


def more_folder(folder: Path, number: int) -> Path:
    """Where the `--more` of this number, from 1, is written."""
    return folder / ("more" if number == 1 else f"more-{number}")


def without_lora(flags: Sequence[str], adapter: Path, console: Console) -> list[str]:
    """The flags without those of a LoRA: an adapter that is trained on brings its own."""
    parts = grouped(flags)
    dropped = [part for part in parts if part[0].startswith(("--lora_", "--use_rslora", "--use_dora"))]
    if dropped:
        names = ", ".join(part[0].partition("=")[0] for part in dropped)
        console.print(f"{names}: left aside, {adapter} is trained on with its own LoRA", highlight=False, markup=False)
    return [text for part in parts if part not in dropped for text in part]
