"""How `--help` reads: one spelling a flag, what its value is, and a default only where it tells something."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from ..errors import ConfigError

# What a first run is told, in this order; inherited settings in our words, where TRL's do not say what happens here;
# and what nobody needs to give.
FIRST = (
    "help",
    "config",
    "model_name_or_path",
    "dataset_name",
    "output_dir",
    "max_steps",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "max_new_tokens",
    "lmbda",
    "beta",
    "resume",
    "overwrite",
)
HELP = {
    "model_name_or_path": "The base: a folder, a Hub id or builtin:SmolLM2-135M-Instruct; or an adapter to train on.",
    "output_dir": "The run folder: adapter, model card, logs and results. Default: trainer_output.",
    "learning_rate": "Peak rate of AdamW.",
    "max_steps": "Optimizer steps; wins over num_train_epochs (3).",
    "per_device_train_batch_size": "Rows of a micro-batch, on each GPU.",
    "gradient_accumulation_steps": "Micro-batches of an optimizer step.",
    "max_length": "Most tokens of a conversation with its answer; a longer row is an error (see skip_long_prompts).",
    "max_new_tokens": "Most tokens of an answer that is written.",
    "lmbda": "Share of the steps that train on the student's own answers; the others take those of the data.",
    "beta": "The divergence: 0 is forward KL(teacher || student), 1 reverse KL, between them Jensen-Shannon.",
    "temperature": "Of sampling the student's answers.",
    "seq_kd": "Where the data's answers would be taken, the teacher writes them, reading the PI.",
    "teacher_model_name_or_path": "Another model as teacher, with share_student_as_teacher false.",
}
CHOSEN = {
    "gradient_checkpointing",
    "learning_rate",
    "logging_steps",
    "lr_scheduler_type",
    "max_steps",
    "normalize_beta",
    "privileged_placement",
    "rollout_log_steps",
    "warmup_steps",
}
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


class CommandParser(argparse.ArgumentParser):
    """argparse without abbreviations, whose complaints are :class:`ConfigError`."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")
