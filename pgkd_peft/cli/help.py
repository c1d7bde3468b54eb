"""How `--help` reads: one spelling a flag, what its value is, and a default only where it tells something."""

from __future__ import annotations

import argparse

_TOO_MANY = 60  # characters of choices


class HelpFormatter(argparse.HelpFormatter):
    """argparse's, where a flag stands once (both ``--max_steps`` and ``--max-steps`` are taken), beside its ``--no_``
    form where it has one, and "(default: None)" nowhere."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names: dict[str, str] = {}
        for flag in action.option_strings:
            names.setdefault(flag.replace("-", "_"), flag)
        if action.default is True and _takes_bool(action):
            names["no"] = f"--no_{action.dest}"
        return f"{', '.join(names.values())} {_value(action)}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        silent = default in (None, "", argparse.SUPPRESS) or default is False or default == []
        if not action.option_strings or silent or "default" in text.lower() or "%(" in text:
            return action.help
        shown = ", ".join(map(str, default)) if isinstance(default, list) else str(getattr(default, "value", default))
        return f"{text} (default: {'true' if default is True else shown.replace('%', '%%')})"

    def add_argument(self, action: argparse.Action) -> None:
        if not isinstance(action, argparse._StoreFalseAction):  # --no_x of a setting that is on: stands beside --x
            super().add_argument(action)


def _takes_bool(action: argparse.Action) -> bool:
    return getattr(action.type, "__name__", "") == "string_to_bool"


def _value(action: argparse.Action) -> str:
    """What follows the flag; "" for a switch."""
    if action.nargs == 0 or (_takes_bool(action) and action.nargs == "?"):
        return ""
    if action.metavar is not None:
        name = str(action.metavar)
    elif action.choices is not None or _takes_bool(action):
        name = "{" + ",".join(map(str, action.choices or ("true", "false"))) + "}"
        name = name if len(name) <= _TOO_MANY else "NAME"
    else:
        name = {"int": "N", "float": "X"}.get(getattr(action.type, "__name__", ""), "VALUE")
    return f"{name} [{name} ...]" if action.nargs == "+" else name
