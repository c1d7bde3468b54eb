"""`pgkd chat`: talk to base, base with PI and student side by side, or to a merged model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.tokens import visible
from ..errors import ConfigError, DataError, ModelError, read_text
from ..run.console import SIDE_BY_SIDE
from ..run.folder import ADAPTER_CONFIG
from .arguments import Parser, subject

DESCRIPTION = """Talk to a trained adapter (a run folder) or to a merged model. Of an adapter three answers are shown:
the base, the base with the privileged information (--privileged), and the student, which reads none."""
HEADINGS = {"base": "base", "teacher": "base with PI", "student": "student", "merged": "merged model"}


@dataclass
class ChatArguments:
    """What is asked, and how it is answered."""

    message: str | None = field(default=None, metadata={"help": "Ask this and end; without it, talk."})
    system: str | None = field(default=None, metadata={"help": "A system turn that all of them read."})
    privileged: str | None = field(default=None, metadata={"help": "The PI that the base with PI reads, as text."})
    privileged_file: str | None = field(default=None, metadata={"help": "The PI, from a text file."})
    max_new_tokens: int = field(default=256, metadata={"help": "Length limit of an answer."})
    temperature: float = field(default=0.0, metadata={"help": "0: the likeliest token each time."})
    web: bool = field(default=False, metadata={"help": "Talk on a page that this machine alone can open (gradio)."})
    port: int | None = field(default=None, metadata={"help": "Of --web; default: the first free one from 7860."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    base_model: str | None = field(default=None, metadata={"help": "The base, when it is no longer where it was."})
    base_quantization: str | None = field(
        default=None, metadata={"help": "How to load the base: nf4, int8 or none. Default: as in training."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the base, where it needs its own."}
    )

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.message is not None and not self.message.strip():
            raise ConfigError("message is empty; write what to ask")
        if self.message is not None and self.web:
            raise ConfigError("message and web are both given: the page asks, or the message is asked; keep one")
        if self.port is not None and (not self.web or not 1 <= self.port <= 65535):
            raise ConfigError(f"port is {self.port}; it goes with --web, from 1 to 65535")
        if self.privileged_file is not None:
            if self.privileged is not None:
                raise ConfigError("privileged and privileged_file are both given; keep one")
            self.privileged = read_text(self.privileged_file, "privileged_file")


class Speaker:
    """One column: a model that answers, what it reads, and the conversation that it has had."""

    def __init__(self, name: str, model: Any, weights: Callable[[], Any], encode: Callable[[list[dict]], list[int]]):
        self.name = name
        self.model = model
        self.weights = weights
        self.encode = encode
        self.messages: list[dict[str, str]] = []

    def answer(self, text: str, settings: dict[str, Any], show: Callable[[str], None]) -> str:
        """Ask `text` next in this speaker's own conversation; `show` is called with what there is so far."""
        import torch
        from transformers import TextStreamer

        class Stream(TextStreamer):
            so_far = ""

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                self.so_far += text
                show(self.so_far)

        self.messages.append({"role": "user", "content": text})
        ids = torch.tensor([self.encode(self.messages)], device=self.model.device)
        stream = Stream(settings["tokenizer"], skip_prompt=True, skip_special_tokens=True)
        with torch.no_grad(), self.weights():
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings["generation"],
                streamer=stream,
            )
        self.messages.append({"role": "assistant", "content": stream.so_far})
        return stream.so_far


def main(argv: Sequence[str]) -> int:
    model, rest = subject(argv)
    (args,) = Parser([ChatArguments], "pgkd chat MODEL", DESCRIPTION).parse(rest)
    if model is None:
        raise ConfigError("missing is the model: pgkd chat RUN [options], a run folder or a merged model's folder")
    return chat(model, args)


def chat(model: str, args: ChatArguments) -> int:
    """The body of :func:`main`."""
    from rich.console import Console
    from transformers import set_seed

    console = Console()
    if sys.stdin is None and args.message is None and not args.web:
        raise ConfigError("standard input is closed, so there is nobody to talk to; give --message TEXT")
    if args.web:
        from .chat_page import import_gradio

        import_gradio()  # before a model is loaded
    is_merged = (Path(model) / "config.json").is_file() and not (Path(model) / ADAPTER_CONFIG).is_file()
    speakers, settings = _merged(model, args) if is_merged else _adapter(model, args, console)
    set_seed(args.seed)
    if args.web:
        return _on_a_page(model, speakers, settings, args, is_merged)
    if args.message is not None:
        say(speakers, args.message, settings, console)
        return 0
    console.print("Type a message; /reset begins anew, /quit or Ctrl-D ends.", style="dim")
    if not is_merged and args.privileged is None:
        console.print("--privileged TEXT adds the base with PI.", style="dim")
    while True:
        try:
            text = console.input("[bold]you>[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return 0
        if text == "/quit":
            return 0
        if text == "/reset":
            for speaker in speakers:
                speaker.messages = speaker.messages[: 1 if args.system else 0]
            console.print("A new conversation.", style="dim")
        elif text:
            before = [list(speaker.messages) for speaker in speakers]
            try:
                say(speakers, text, settings, console)
            except (KeyboardInterrupt, DataError) as ended:  # an answer, not the talk; it is as if nothing was asked
                for speaker, messages in zip(speakers, before):
                    speaker.messages = messages
                if isinstance(ended, DataError):
                    console.print(str(ended), style="red", markup=False)


def _on_a_page(
    model: str, speakers: list[Speaker], settings: dict[str, Any], args: ChatArguments, is_merged: bool
) -> int:
    """The body of ``--web``, until Ctrl-C."""
    from .chat_page import Talk, examples_of, page, serve

    def set_privileged(text: str) -> None:
        args.privileged = text

    talk = Talk(speakers, settings, None if is_merged else set_privileged)
    headings = [HEADINGS[speaker.name] for speaker in speakers]
    examples = [] if is_merged else examples_of(Path(model))
    serve(page(talk, Path(model).name, headings, args.privileged or "", examples), args.port)
    return 0


def _adapter(folder: str, args: ChatArguments, console: Any) -> tuple[list[Speaker], dict[str, Any]]:
    """Base, base with PI (where there is PI) and student, on one model."""
    from ..export.adapter import read_run
    from ..model.adapters import adapter_state
    from ..model.student import text_config
    from .eval import collator_of, load_student

    run = read_run(folder, quantization=args.base_quantization, base_model=args.base_model, log=console.print)
    if args.web:  # where the PI can be written on the page
        args.privileged = args.privileged or ""
    collator = collator_of(run, trust_remote_code=args.trust_remote_code)
    key = collator.builder.privileged_key
    limit = getattr(text_config(str(run.base), args.trust_remote_code), "max_position_embeddings", None) or sys.maxsize
    collator.builder.max_privileged_length = limit  # a whole document may be longer than what was trained with

    def reads(messages: list[dict], *, privileged: bool) -> list[int]:
        row = {"messages": messages, **({key: args.privileged} if privileged else {})}
        ids: list[int] = collator.encode(row)["teacher_ids" if privileged else "student_ids"]
        if privileged and len(ids) + args.max_new_tokens > limit:
            raise DataError(
                f"the conversation with the PI has {len(ids)} tokens, and an answer may have {args.max_new_tokens}; "
                f"the model's context is {limit}. Shorten the PI, /reset, or give --max_new_tokens less."
            )
        return ids

    reads([{"role": "user", "content": args.message or "Hello"}], privileged=args.privileged is not None)
    model = load_student(run, trust_remote_code=args.trust_remote_code)

    def column(name: str, which: str, *, privileged: bool = False) -> Speaker:
        return Speaker(name, model, lambda: adapter_state(model, which), lambda m: reads(m, privileged=privileged))

    speakers = [column("base", "disabled")]
    if args.privileged is not None:
        speakers.append(column("teacher", "disabled", privileged=True))
    speakers.append(column("student", "shared"))
    return _begin(speakers, args), _settings(model, collator.tokenizer, args)


def _merged(folder: str, args: ChatArguments) -> tuple[list[Speaker], dict[str, Any]]:
    import torch

    from ..model.load import load_base, load_tokenizer

    if args.privileged is not None:
        raise ConfigError(f"{folder!r} is a merged model: there is no base beside it that could read --privileged.")
    tokenizer = load_tokenizer(folder, trust_remote_code=args.trust_remote_code)
    if tokenizer.chat_template is None:
        raise ModelError(f"the tokenizer of {folder!r} has no chat template, so there is no way to talk to it")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_base(
        folder, quantization=args.base_quantization or "none", device=device, trust_remote_code=args.trust_remote_code
    )

    def reads(messages: list[dict]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    speakers = [Speaker("merged", model, contextlib.nullcontext, reads)]
    return _begin(speakers, args), _settings(model, tokenizer, args)


def _begin(speakers: list[Speaker], args: ChatArguments) -> list[Speaker]:
    for speaker in speakers:
        speaker.messages = [{"role": "system", "content": args.system}] if args.system else []
    return speakers


def _settings(model: Any, tokenizer: Any, args: ChatArguments) -> dict[str, Any]:
    """Decoding as in training: no top-k, top-p or penalty, whatever the model's own generation settings hold."""
    from transformers import GenerationConfig

    from ..data.collator import stop_ids
    from ..model.load import base_of

    sampling: dict[str, Any] = {"do_sample": False}
    if args.temperature:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    generation = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        eos_token_id=stop_ids(tokenizer, base_of(model).generation_config),
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    return {"tokenizer": tokenizer, "generation": generation}


def say(speakers: list[Speaker], text: str, settings: dict[str, Any], console: Any) -> None:
    """One question to all; answers appear as they are written."""
    if console.is_terminal and console.width >= SIDE_BY_SIDE and len(speakers) > 1:
        _side_by_side(speakers, text, settings, console)
        return
    for speaker in speakers:
        console.print(f"{HEADINGS[speaker.name]}:", style="bold")
        shown = 0

        def show(so_far: str) -> None:
            nonlocal shown
            sys.stdout.write(visible(so_far[shown:]))
            sys.stdout.flush()
            shown = len(so_far)

        speaker.answer(text, settings, show)
        console.print("\n")


def _side_by_side(speakers: list[Speaker], text: str, settings: dict[str, Any], console: Any) -> None:
    from rich.live import Live

    answers = dict.fromkeys((speaker.name for speaker in speakers), "")
    with Live(_table(answers), console=console, refresh_per_second=8) as live:
        for speaker in speakers:

            def show(so_far: str, name: str = speaker.name) -> None:
                answers[name] = so_far
                live.update(_table(answers))

            speaker.answer(text, settings, show)


def _table(answers: dict[str, str]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    for name in answers:
        table.add_column(HEADINGS[name], ratio=1, overflow="fold")
    table.add_row(*(Text(visible(answer)) for answer in answers.values()))
    return table
