"""The reference answer behind its prompt: what the generation prompt opened is what the answer goes on from.

One rule over prompt and answer: a thinking block is opened once and closed once, the row's thoughts stand in it and the
answer behind it. A row for which neither the template's text nor the row's own keeps the rule is refused.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import DataError
from .contexts import ContextBuilder, Contexts
from .shown import THINKING, closer, common_length, holds, split_thoughts

# `<x>` `</x>`, `<|x|>` `<|/x|>`, `<|x>` `<x|>`, `[X]` `[/X]`, `<|START_X|>` `<|END_X|>`
_TAG = re.compile(r"<\|?/?[A-Za-z][\w:.-]*\|?>|<\|/[\w:.-]+\|>|\[/?[A-Z_]+\]")
_NO_THOUGHTS = "\n{}\n\n"  # ends a thinking block that the generation prompt opened and the answer does not fill


def closes_tag(tag: str) -> bool:
    """Whether a token closes a tag that stands around an answer, and so not its turn."""
    return tag.startswith(("</", "<|/", "[/", "<|END_RESPONSE", "<|END_THINKING", "<|END_ACTION")) and tag != "</s>"


def answer_text(builder: ContextBuilder, contexts: Contexts, prompt: str) -> tuple[str | None, str]:
    """What the template writes for the answer after `prompt` (None where that cannot be told), and what `prompt` opens.

    Raises:
        DataError: the generation prompt and past answers begin in different ways.
    """
    assert contexts.answer is not None
    bare = builder.render(contexts.student, contexts.tools, contexts.chat_template_kwargs, add_generation_prompt=False)
    full = builder.render(
        [*contexts.student, contexts.answer],
        contexts.tools,
        contexts.chat_template_kwargs,
        add_generation_prompt=False,
    )
    shared = common_length(bare, prompt)
    opening = prompt[shared:]
    if bare == prompt:  # no generation prompt, or one that is always there
        last = contexts.student[-1]["content"].strip()
        opening = prompt[prompt.rindex(last) + len(last) :] if last and last in prompt else ""
        opening = opening if _TAG.search(opening) else ""
    if full.startswith(prompt):
        text = full[len(prompt) :]
        _check_header(opening if bare != prompt else "", bare == prompt, text, contexts.answer)
        return text, opening
    if bare == prompt or not full.startswith(bare[:shared]):
        shared = len(prompt) - len(opening)
        if not full.startswith(prompt[:shared]):
            _check_elsewhere(opening, full, contexts.answer)
            return None, opening
    return _go_on(prompt[shared:], full[shared:]), opening


def _check_elsewhere(opening: str, full: str, answer: dict[str, Any]) -> None:
    """Check the opening where the template writes the turns before an answer in another way than before a generation
    prompt (a system text that stands with the last question, for one)."""
    words = split_thoughts(answer)[1].strip()
    before = full[: full.rindex(words)] if words and words in full else None
    plain = _TAG.sub("", opening).strip()
    if before is not None and plain and plain not in before[-2 * len(opening) - 40 :]:
        raise _differ(opening, before[-40:])


def _go_on(opening: str, answer: str) -> str | None:
    """`answer`, a past answer's turn, without what `opening` has of it already."""
    common = common_length(opening, answer)
    tag_start = max(opening.rfind("<", 0, common), opening.rfind("[", 0, common))
    if tag_start >= 0 and not re.search(r"[>\]]", opening[tag_start:common]):
        common = tag_start  # do not part in the middle of a tag
    left, rest = opening[common:].strip(), answer[common:]
    tags = _TAG.findall(left)
    named = next((tag for tag in THINKING if left.endswith(tag)), "")
    if _TAG.sub("", _thoughtless(left).removesuffix(named)).strip():
        raise _differ(left, rest[:40])
    opened: list[str] = []
    for tag in tags:
        if opened and tag == closer(opened[-1]):
            opened.pop()
        elif closes_tag(tag):
            if not rest.lstrip().startswith(tag):
                return None  # the prompt has closed a block that the answer fills
            rest = rest.lstrip()[len(tag) :].lstrip("\n")
        else:
            opened.append(tag)
    for tag in reversed(opened):
        if tag not in THINKING and closer(tag) not in answer:
            return None
        if not rest.lstrip("\n").startswith(closer(tag)):
            rest = _NO_THOUGHTS.format(closer(tag)) + rest.lstrip("\n")
    return rest


def thinking_fault(opening: str, text: str, thoughts: str, words: str) -> str:
    """What is wrong with the thinking blocks of an answer `text` behind a prompt that ends with `opening`; "" if
    nothing is."""
    whole = opening + text
    left_open = (tag for tag in _TAG.findall(opening) if closer(tag) in text and closer(tag) not in opening)
    for tag in {*THINKING, *left_open}:
        end = closer(tag)
        events = re.findall(f"{re.escape(tag)}|{re.escape(end)}", whole)
        if not events or (events == [end] and end in opening):  # DeepSeek's mark of an answer without thoughts
            continue
        if events != [tag, end]:
            off = " (the generation prompt closes an empty one: thinking is switched off)" if end in opening else ""
            return (
                f"prompt and answer would have the thinking tags {' '.join(events)}, not one block {tag} {end}{off}; "
                "take the thoughts out of the answer, or set the template's variables so that they fit"
            )
        if tag not in THINKING and holds(whole.partition(tag)[2].partition(end)[0], words):
            continue  # a tag around the answer itself
        inside, _, behind = whole.partition(tag)[2].partition(end)
        if thoughts and holds(whole, thoughts) and not holds(inside, thoughts):
            return f"the answer's thoughts would stand outside of {tag} {end}; write them into `reasoning_content`"
        if words.strip() and not holds(behind, words) and holds(inside, words):
            return f"the answer would stand inside of {tag} {end}"
    return ""


def continue_opening(opening: str, answer: dict[str, Any]) -> str:
    """An answer's own text as it follows a prompt that may have opened a thinking block already."""
    content = answer["content"]
    opened = opening.rstrip()
    tag = next((tag for tag in THINKING if opened.endswith(tag)), None)
    if tag is None:
        return content
    end = closer(tag)
    if end not in content:
        thoughts, words = split_thoughts(answer)
        return thoughts.strip("\n") + _NO_THOUGHTS.format(end) + (words if words == content else words.lstrip("\n"))
    return content.lstrip().removeprefix(tag).removeprefix(opening[len(opened) :])


def _check_header(opening: str, no_opening: bool, text: str, answer: dict[str, Any]) -> None:
    """Refuse a template without a generation prompt whose answers begin with a role header."""
    if not no_opening:
        return
    words = split_thoughts(answer)[1].strip()
    header = text[: text.index(words)] if words and words in text else ""
    if re.search(r"assistant|model|bot|gpt|\bai\b", _thoughtless(header), re.IGNORECASE):
        raise DataError(
            f"the chat template writes no generation prompt, so the answer would begin with {header!r}, which is not "
            "its text; add `{% if add_generation_prompt %}` with that text to the end of the template"
        )


def _thoughtless(text: str) -> str:
    for tag in THINKING:
        text = re.sub(f"{re.escape(tag)}.*?{re.escape(closer(tag))}", "", text, flags=re.DOTALL)
    return text


def _differ(left: str, rest: str) -> DataError:
    return DataError(
        f"the chat template's generation prompt goes on with {left!r} where its past answers have {rest!r}, so it is "
        "not known how an answer follows; drop the answer (prompt-only row), or use another template"
    )
