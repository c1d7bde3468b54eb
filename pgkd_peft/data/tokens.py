"""Token ids -> text that is safe to show: special tokens visible, control characters harmless."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

BROKEN = "�"  # what decoders write for bytes that are no whole character


class Piece(NamedTuple):
    """A run of tokens of one role, as text."""

    text: str
    role: str
    special: bool


def pieces(tokenizer: Any, ids: Sequence[int], roles: Sequence[str]) -> list[Piece]:
    """Text of `ids`, cut where the role (one a token) changes and around special tokens.

    A character whose bytes lie on both sides of a cut belongs to the later piece.
    """
    special = set(tokenizer.all_special_ids)
    found: list[Piece] = []
    start = at = 0
    for i in range(1, len(ids) + 1):
        kind = (roles[i - 1], ids[i - 1] in special)
        if i < len(ids) and (roles[i], ids[i] in special) == kind:
            continue
        text = decode(tokenizer, ids[:i])
        end = len(text) if i == len(ids) else len(text.rstrip(BROKEN))
        if end > at or i > start:
            found.append(Piece(text[at:end], *kind))
        start, at = i, max(at, end)
    return [piece for piece in found if piece.text]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """One text a token; joined they are the text of all. A token that only begins a character has text ""; the token
    that completes the character has it."""
    texts = []
    for i in range(len(ids)):
        start = max(0, i - 8)  # decoders look back a few tokens at most: a space, the bytes of one character
        before = decode(tokenizer, ids[start:i])
        after = decode(tokenizer, ids[start : i + 1])
        last = i == len(ids) - 1
        texts.append(after[len(before.rstrip(BROKEN)) : None if last else len(after.rstrip(BROKEN))])
    return texts


ROLES = ("system", "developer", "user", "human", "assistant", "model", "tool")


def turns(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, str]]:
    """A prompt as (role, text), for people: without its special tokens, and without turns that say nothing.

    A role is a word of :data:`ROLES` that stands between special tokens, alone or on a line of its own, or in the name
    of a special token; "" where no role can be told. Nothing is computed from this: it is guessed from the ids alone,
    as a collator may be of the user's own making.
    """
    special = special_ids(tokenizer)
    found: list[tuple[str, str]] = []
    role, start = "", 0
    for i in range(len(ids) + 1):
        if i < len(ids) and ids[i] not in special:
            continue
        text = decode(tokenizer, ids[start:i]).strip()
        first, _, rest = text.partition("\n")
        if first.strip().lower() in ROLES:
            role, text = first.strip().lower(), rest.strip()
        if text:
            found.append((role, text))
        if i < len(ids):
            named = re.sub(r"[^a-z]", "", decode(tokenizer, [ids[i]]).lower())
            role = named if named in ROLES else role
        start = i + 1
    return found


def special_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The texts of the special tokens among `ids`, each once."""
    return sorted({decode(tokenizer, [i]) for i in set(ids) & special_ids(tokenizer)})


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all tokens that are markup and not text: those with a name (bos, eos, ...), and those added as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def question(tokenizer: Any, ids: Sequence[int]) -> str:
    """The last turn of a prompt that is not the model's own, for people."""
    found = turns(tokenizer, ids)
    asked = [text for role, text in found if role not in ("assistant", "model", "system", "developer")]
    return (asked or [text for _, text in found] or [""])[-1]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Every token as text, special ones included, nothing tidied."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def visible(text: str) -> str:
    """Control characters as pictures or escapes: what a data set holds must not steer a terminal."""

    def show(char: str) -> str:
        if char in "\n" or char.isprintable():
            return char
        if char == "\t":
            return "    "
        return chr(0x2400 + ord(char)) if ord(char) < 0x20 else f"\\u{ord(char):04x}"

    return "".join(map(show, text))
