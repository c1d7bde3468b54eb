"""What a chat template's source says about it: the variables it reads, and whether it writes today's date."""

from __future__ import annotations

import difflib
import re
from datetime import date
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ConfigError

_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"}


def source_of(tokenizer: Any) -> str:
    """The source of all the tokenizer's chat templates."""
    template = tokenizer.chat_template or ""
    return "\n".join(template.values()) if isinstance(template, dict) else template


def variables(source: str) -> set[str] | None:
    """The variables that a template reads; None where its source cannot be parsed here."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)  # a tag of Transformers
    try:
        return meta.find_undeclared_variables(environment.parse(source))
    except TemplateError:
        return None


def day_of(text: str | None) -> date:
    """The day that templates write as today's.

    Raises:
        ConfigError: the text is not YYYY-MM-DD.
    """
    try:
        return date.fromisoformat(text) if text else date.today()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"template_date is {text!r}; give a day like 2026-01-31") from error


def writes_date(source: str) -> bool:
    """Whether a template asks what day it is."""
    return "strftime_now" in source


def with_date(source: str, day: date) -> str:
    """The template with `day` in the place of today's, so that all prompts of a run hold the same.

    A macro takes the place of Transformers' function: what the template passes to it may be a variable.
    """
    found = {letter: day.strftime(f"%{letter}") for letter in "aAwdbBmyYHIpMSfjUWuVGcxXzZ"}
    pairs = [("%%", "\ue000")]  # a mark that no text has
    pairs += [(f"%-{letter}", words.lstrip("0") or "0") for letter, words in found.items()]
    pairs += [(f"%{letter}", words) for letter, words in found.items()]
    pairs += [("\ue000", "%")]
    text = " | ".join(["format", *(f"replace({code!r}, {words!r})" for code, words in pairs)])
    # The expression at the end keeps the template's first line break, which a block would take away.
    return "{% macro strftime_now(format) %}{{ " + text + " }}{% endmacro %}{{ '' }}" + source


def near_variable(name: str, read: set[str]) -> str | None:
    """The variable of the template that `name` may stand for."""
    near = difflib.get_close_matches(name, sorted(read - _GIVEN), 1)
    return near[0] if near else None


def unread_variable(name: str, read: set[str]) -> str:
    """What to say of a variable that the template does not read."""
    near = near_variable(name, read)
    others = ", ".join(sorted(read - _GIVEN - {"bos_token", "eos_token"})) or "none"
    hint = f"; did you mean {near!r}?" if near else ""
    return f"the chat template never reads the variable {name!r}{hint} (it reads: {others})"


def date_note(source: str, read: set[str] | None, today: date, pinned: bool) -> str | None:
    """A line that says that prompts hold the date, and how to pin it; None for a template without one."""
    if not writes_date(source):
        return None
    if pinned:
        return f"the chat template writes the date into prompts, which is pinned to {today}"
    named = ", or with `date_string` in chat_template_kwargs" if "date_string" in (read or ()) else ""
    return (
        f"the chat template writes today's date ({today}) into prompts: a run that is resumed or evaluated on another "
        f"day reads other prompts; pin it with --template_date {today}{named}"
    )
