"""The Ollama Modelfile of an exported GGUF file: its chat template in Go's language, and what ends an answer.

Ollama reads no Jinja. What a chat template writes around the turns is read off its own output, put together again, and
compared with that output on several conversations: what cannot be written as a loop over turns is left out and said.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..data.collator import stop_ids
from .gguf_format import adds_bos

MODELFILE = "Modelfile"
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
_PROBES = (  # roles of the conversations that the pieces must render as the template does
    (USER,),
    (USER, ASSISTANT, USER),
    (SYSTEM, USER),
    (SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER),
)


@dataclass(frozen=True)
class Turns:
    """A chat template as text around turns: role -> (before, after).

    Attributes:
        start: what stands before the first turn of a conversation without a system turn.
        answer: the generation prompt.
        around: of user and assistant, and of system where the template has such a turn.
    """

    start: str
    answer: str
    around: dict[str, tuple[str, str]]

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """What the pieces make of a conversation, ready for an answer."""
        text = "" if messages[0]["role"] == SYSTEM else self.start
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + self.answer

    def as_go(self) -> str:
        """For Ollama: a loop over ``.Messages``; ``.System`` is empty in a conversation without a system turn."""
        start = f"{{{{ if not .System }}}}{self.start}{{{{ end }}}}" if self.start else ""
        branches = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for role, (before, after) in self.around.items()
        )
        return f"{start}{{{{ range .Messages }}}}{{{{ {branches}{{{{ end }}}}{{{{ end }}}}{self.answer}"


def read_turns(tokenizer: PreTrainedTokenizerBase, *, without_bos: bool) -> tuple[Turns | None, list[str]]:
    """What the chat template writes around turns, and a sentence for each thing that could not be read off it.

    Args:
        without_bos: the runtime puts the BOS token before every prompt itself, so the template must not.
    """
    if not tokenizer.chat_template:
        return None, ["the tokenizer has no chat template"]
    bos = tokenizer.bos_token if without_bos and isinstance(tokenizer.bos_token, str) else ""

    def render(messages: Sequence[dict[str, str]], answer: bool = True) -> str:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
        return str(text).removeprefix(bos)

    try:
        turns = _turns(render)
        _check(turns, render)
    except Exception as error:  # a template is a program of its own: it may raise anything
        return None, [f"the chat template cannot be written as a loop over turns ({error or type(error).__name__})"]
    try:
        with_system = Turns(turns.start, turns.answer, {SYSTEM: _system(render, turns), **turns.around})
        _check(with_system, render)
    except Exception as error:
        told = str(error) or type(error).__name__
        return turns, [f"a system turn is left out of the template: it is no turn of its own there ({told})"]
    return with_system, []


def _turns(render: Any) -> Turns:
    """The pieces of conversations of user and assistant. Raises ValueError where there are no such pieces."""
    user, answer, again = (_turn(role, i) for i, role in enumerate((USER, ASSISTANT, USER)))
    after_user = _after(render([user], False), user)
    prompt = _cut(_after(render([user]), user), after_user)
    before, between = _around(render([user, answer, again]), user, answer)
    _, last = _around(render([user, answer, again]), answer, again)
    before_answer = _cut(between, after_user)
    after_answer = _after(render([user, answer], False), answer)
    before_user = _cut(last, after_answer)
    if not before.endswith(before_user):
        raise ValueError("the first user turn begins otherwise than the later ones")
    start = before[: len(before) - len(before_user)]
    return Turns(start, prompt, {USER: (before_user, after_user), ASSISTANT: (before_answer, after_answer)})


def _system(render: Any, turns: Turns) -> tuple[str, str]:
    system, user = _turn(SYSTEM, 0), _turn(USER, 1)
    before, between = _around(render([system, user]), system, user)
    before_user = turns.around[USER][0]
    if not between.endswith(before_user):
        raise ValueError("it stands inside the user's turn")
    return before, between[: len(between) - len(before_user)]


def _check(turns: Turns, render: Any) -> None:
    texts = [*itertools.chain((turns.start, turns.answer), *turns.around.values())]
    if any(sign in text for text in texts for sign in ("{{", "}}", '"""')):
        raise ValueError("its text has signs that mean something to Ollama")
    for roles in _PROBES:
        messages = [_turn(role, i) for i, role in enumerate(roles)]
        if set(roles) <= turns.around.keys() and turns.render(messages) != render(messages):
            raise ValueError(f"it renders {', '.join(roles)} in another way")


def _turn(role: str, number: int) -> dict[str, str]:
    return {"role": role, "content": f"Content{number}of{role}."}


def _after(text: str, turn: dict[str, str]) -> str:
    _, found, after = text.partition(turn["content"])
    if not found:
        raise ValueError(f"the {turn['role']}'s words are not in what it renders")
    return after


def _around(text: str, first: dict[str, str], second: dict[str, str]) -> tuple[str, str]:
    """What stands before the first turn's words, and between them and the second's."""
    before, found, rest = text.partition(first["content"])
    between, also, _ = rest.partition(second["content"])
    if not found or not also:
        raise ValueError(
            f"the words of {first['role']} and {second['role']} are not in what it renders, in their order"
        )
    return before, between


def _cut(text: str, beginning: str) -> str:
    if not text.startswith(beginning):
        raise ValueError("a turn ends otherwise where another follows")
    return text[len(beginning) :]


def stop_texts(tokenizer: PreTrainedTokenizerBase, base: Path) -> list[str]:
    """The tokens that end an answer, as text: those that end a rollout in training."""
    generation = GenerationConfig.from_pretrained(base) if (base / "generation_config.json").is_file() else None
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in stop_ids(tokenizer, generation)]


def modelfile(file: str, tokenizer: PreTrainedTokenizerBase, base: Path) -> tuple[str, list[str]]:
    """The text of a Modelfile for the GGUF `file` beside it, and sentences about what it lacks."""
    turns, missing = read_turns(tokenizer, without_bos=adds_bos(tokenizer))
    lines = [f"FROM ./{file}"]
    lines += [f"# Not here: {' '.join(sentence.split())}." for sentence in missing]
    if turns is not None:
        lines += ["# Turns of text alone: no tools, no thinking switch.", f'TEMPLATE """{turns.as_go()}"""']
    for text in stop_texts(tokenizer, base):
        if '"' in text or "\n" in text:
            missing.append(f"the stop token {text!r} cannot be written in a Modelfile")
        else:
            lines.append(f'PARAMETER stop "{text}"')
    return "\n".join(lines) + "\n", missing
