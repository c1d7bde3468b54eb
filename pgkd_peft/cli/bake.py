"""`pgkd bake`: from a document or a system prompt alone to a trained and measured adapter."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bake import pipeline, read
from ..bake.split import Passage, split_documents, word_count
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
from .arguments import parse_train
from .bake_arguments import SYSTEM_PROMPT, BakeArguments, Job, grouped, parse
from .bake_training import train_and_judge

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.console import Console

    from ..bake.keep import Keeper
    from ..bake.questions import Question
    from ..config import PrivilegedGKDConfig
    from .arguments import DataArguments, ModelArguments


def main(argv: Sequence[str]) -> int:
    args, train_flags = parse(argv)
    return bake(args, train_flags)


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
            return more(args, train_flags, passages, requests, (model, config))
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
    return ask_and_train(job, train_flags)


def ask_and_train(job: Job, train_flags: list[str], earlier: Sequence[Question] = ()) -> int:
    """Questions, and where that is not all that was asked for the training; of `earlier` questions as well."""
    questions, keeper, student = write_questions(job)
    if job.args.dry_run:
        job.console.print(f"Read and edit {job.folder / QUESTIONS_FILE}; the same command without --dry_run trains.")
        return 0
    train_and_judge(job, train_flags, [*earlier, *questions], keeper, student)
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
    from ..run.resume import refuse_other_base
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
    if job.adapter is not None:
        refuse_other_base(student, str(job.adapter))
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


def more(
    args: BakeArguments,
    train_flags: list[str],
    passages: Sequence[Passage],
    requests: Sequence[str],
    parsed: tuple[ModelArguments, PrivilegedGKDConfig],
) -> int:
    """Ask about the pale passages with openings not used yet, and train on from the newest adapter, in a folder below
    that of the bake."""
    from rich.console import Console

    from ..bake import coverage

    model, config = parsed
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
    kept = [q for q in earlier if q.use in ("train", "anchor", "heldout")]  # so that what was learnt stays
    return ask_and_train(job, [*flags, "--model_name_or_path", str(newest)], kept)


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
