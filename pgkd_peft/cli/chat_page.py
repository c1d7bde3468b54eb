"""`pgkd chat --web`: the same talk as a page on this machine, its columns side by side, made with gradio."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..data.contexts import privileged_as_text
from ..data.row import parsed_or_none
from ..data.tokens import visible
from ..errors import ConfigError
from ..run.folder import HOLDOUT_FILE, RUN_FILE, find_in_run
from ..run.jsonl import read_json, read_lines

if TYPE_CHECKING:
    from pathlib import Path

ADDRESS = "127.0.0.1"  # this machine alone: whoever reaches the page can use the model
PORTS = range(7860, 7880)
EXAMPLES = 6
CSS = "footer {display: none !important}"


class Speaker(Protocol):
    """One column; see :class:`pgkd_peft.cli.chat.Speaker`."""

    messages: list[dict[str, str]]

    def answer(self, text: str, settings: dict[str, Any], show: Callable[[str], None]) -> str: ...


def import_gradio() -> Any:
    """Raises ConfigError where it is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # a page on this machine tells nobody
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(
            "--web makes its page with gradio, which is not installed. Run: pip install gradio"
        ) from error
    return gradio


def pieces(speaker: Speaker, text: str, settings: dict[str, Any]) -> Iterator[str]:
    """What the speaker has answered so far, again and again, while it answers in a thread."""
    said: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            speaker.answer(text, settings, said.put)
            said.put(None)
        except BaseException as error:
            said.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (piece := said.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        thread.join()  # also when the page was closed: the next question needs the model


class Talk:
    """The conversations of one page: what gradio's events call.

    Args:
        speakers: share one model, so only one answers at a time.
        set_privileged: tells the base with PI what it reads.
    """

    def __init__(
        self, speakers: Sequence[Speaker], settings: dict[str, Any], set_privileged: Callable[[str], None] | None = None
    ):
        self.speakers, self.settings, self.set_privileged = speakers, settings, set_privileged
        self.beginning = [list(speaker.messages) for speaker in speakers]
        self.lock = threading.Lock()

    def begin(self) -> list[list[dict[str, str]]]:
        """The conversations of a new page, one a speaker."""
        return [list(messages) for messages in self.beginning]

    def ask(self, text: str, privileged: str, held: list[list[dict[str, str]]]) -> Iterator[list[list[dict[str, str]]]]:
        """All conversations as they grow, ``held`` first. It is brought up to date when all have answered."""
        if not text.strip():
            yield held
            return
        with self.lock:
            if self.set_privileged is not None:
                self.set_privileged(privileged)
            shown = [[*messages, {"role": "user", "content": text}] for messages in held]
            yield shown
            for i, speaker in enumerate(self.speakers):
                speaker.messages = list(held[i])
                asked = shown[i]
                for piece in pieces(speaker, text, self.settings):
                    shown[i] = [*asked, {"role": "assistant", "content": piece}]
                    yield shown
                shown[i] = list(speaker.messages)
            yield shown


def examples_of(folder: Path) -> list[list[str]]:
    """The first held-out questions of the run in `folder`, each with its PI as text."""
    path, run_file = (find_in_run(folder, name) for name in (HOLDOUT_FILE, RUN_FILE))
    config = read_json(run_file).get("config", {}) if run_file is not None else {}
    privileged_key = config.get("privileged_key", "privileged_messages")
    found: list[list[str]] = []
    for record in read_lines(path) if path is not None else []:
        row = parsed_or_none(record, privileged_key)
        asked = [message for message in row.messages if message["role"] != "system"] if row is not None else []
        if row is not None and len(asked) == 1 and len(found) < EXAMPLES:
            found.append([str(asked[0]["content"]), privileged_as_text(row.privileged)])
    return found


def page(talk: Talk, title: str, headings: list[str], privileged: str, examples: list[list[str]]) -> Any:
    """The page as gradio's Blocks: a column a speaker, under them the question and the PI."""
    gradio = import_gradio()
    with gradio.Blocks(title=f"pgkd chat {title}", fill_width=True) as blocks:
        gradio.Markdown(f"### {visible(title)}")
        held = gradio.State(talk.begin())
        with gradio.Row():
            columns = [
                gradio.Chatbot(label=heading, height="45vh", min_width=260, render_markdown=False, buttons=["copy"])
                for heading in headings
            ]
        question = gradio.Textbox(label="Message", placeholder="Ask all of them", lines=1, autofocus=True)
        told = gradio.Textbox(
            privileged,
            label="Privileged information, read by the base with PI alone",
            lines=2,
            max_lines=12,
            visible=talk.set_privileged is not None,
        )
        with gradio.Row():
            send = gradio.Button("Ask", variant="primary")
            again = gradio.Button("New conversation")
        if examples:
            gradio.Examples(examples, [question, told], label="Held-out questions of the run, with their PI")

        def reply(text: str, privileged: str, held: list[Any]) -> Iterator[tuple[Any, ...]]:
            for shown in talk.ask(text, privileged or "", held):
                yield ("", shown, *([m for m in messages if m["role"] != "system"] for messages in shown))

        for event in (question.submit, send.click):
            event(
                reply, [question, told, held], [question, held, *columns], concurrency_limit=1, concurrency_id="model"
            )
        again.click(lambda: (talk.begin(), *([] for _ in columns)), None, [held, *columns])
    return blocks


def server(blocks: Any, port: int | None) -> tuple[Any, socket.socket]:
    """A web server for the page, and the socket that it listens on: of this machine alone.

    Gradio's own launch() first calls its page through whatever proxy is set, and gives up when that is slow.

    Raises:
        ConfigError: the port is in use.
    """
    gradio = import_gradio()
    import uvicorn  # these three come with gradio
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    listening = _listen(port)
    plain = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no font from outside
    app = FastAPI()
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[ADDRESS, "localhost"])  # no other site's page in a browser
    gradio.mount_gradio_app(
        app, blocks, path="/", server_name=ADDRESS, footer_links=[], theme=plain, css=CSS, ssr_mode=False
    )
    return uvicorn.Server(uvicorn.Config(app, log_level="warning")), listening


def serve(blocks: Any, port: int | None) -> None:
    """Show the page until Ctrl-C."""
    web, listening = server(blocks, port)
    print(f"http://{ADDRESS}:{listening.getsockname()[1]} on this machine; Ctrl-C ends", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        web.run(sockets=[listening])


def _listen(port: int | None) -> socket.socket:
    """A socket on the port, or on the first free one of PORTS."""
    for number in (port,) if port is not None else PORTS:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((ADDRESS, number))
            listening.listen()  # whoever comes before the page is up waits
        except OSError:
            listening.close()
        else:
            return listening
    told = port if port is not None else f"{PORTS.start} to {PORTS.stop - 1}"
    raise ConfigError(f"--port {told} is in use on this machine; give another with --port")
