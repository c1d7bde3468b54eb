"""Controls: the same training with one thing taken away, so that a result can be laid to the privileged information.

    shuffled   each row's PI is another row's: is it the content of the PI that teaches?
    no_pi      the teacher reads what the student reads: what does the training do by itself?
    sft        plain fine-tuning on the rows' reference answers: would their text alone have done it?
    offline    lmbda = 0, the reference answers only: what do the student's own answers add?

Everything else (base, LoRA, rows, steps, batch, learning rate, seed) is as the run itself has it. A control's folder is
``controls/NAME`` in the run's folder, and its ``run.json`` names it.
"""

from __future__ import annotations

import difflib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.contexts import privileged_as_text
from ..data.row import parsed_or_none
from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from ..config import PrivilegedGKDConfig

CONTROLS = {
    "shuffled": "PI of other rows",
    "no_pi": "no PI",
    "sft": "SFT on the answers",
    "offline": "answers only (lmbda 0)",
}
"""A control's name, and what a table calls it."""
FOLDER = "controls"


def check_controls(names: Iterable[str]) -> list[str]:
    """The names, each once, split at commas.

    Raises:
        ConfigError: there is no such control.
    """
    found = list(dict.fromkeys(name.strip() for text in names for name in text.split(",") if name.strip()))
    for name in found:
        if name not in CONTROLS:
            near = difflib.get_close_matches(name, CONTROLS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"there is no control {name!r}{hint} Accepted are {', '.join(CONTROLS)}.")
    if not found:
        raise ConfigError(f"controls is empty; accepted are {', '.join(CONTROLS)}, separated by commas or spaces.")
    return found


def control_folder(run_folder: str | Path, name: str) -> Path:
    """Where the control `name` of a run lives."""
    return Path(run_folder) / FOLDER / name


def control_settings(name: str, config: PrivilegedGKDConfig) -> None:
    """Change a run's settings to those of its control: its own folder, nothing pushed, and ``lmbda`` 0 if offline.

    Raises:
        ConfigError: the run is that control already.
    """
    check_controls([name])
    if name == "offline":
        if config.lmbda == 0.0 and not config.seq_kd:
            raise ConfigError("control offline is this run itself: its lmbda is 0. Leave offline out.")
        config.lmbda, config.seq_kd = 0.0, False
    config.output_dir = str(control_folder(str(config.output_dir), name))
    config.push_to_hub = False
    if config.run_name is not None:
        config.run_name += f"-{name}"


def control_rows(name: str, rows: Dataset, config: PrivilegedGKDConfig) -> Dataset:
    """The rows that the control `name` trains on. (Rows that cannot be used at all are left to the training's own
    report, which lists them together.)

    Raises:
        DataError: the control is impossible on these rows, or no different from the run; says what to do.
    """
    from ..data.files import encode_column, ranges

    key = config.privileged_key
    parsed = [parsed_or_none(row, key) for row in rows]
    if name in ("sft", "offline"):
        missing = [i for i, row in enumerate(parsed) if row is not None and row.answer is None]
        if missing:
            raise DataError(
                f"control {name} trains on reference answers, which {len(missing)} of {len(rows)} rows do not have "
                f"(rows {ranges(missing)}, counted from 0). Add an assistant message to the end of their `messages`, "
                f"or leave {name} out.",
                rows=tuple(missing),
            )
        return rows
    texts = [privileged_as_text(row.privileged) if row is not None else "" for row in parsed]
    with_pi = [i for i, text in enumerate(texts) if text]
    if not with_pi:
        raise DataError(f"control {name}: no row has PI in {key!r}, so it is this run itself. Leave {name} out.")
    if name == "no_pi":
        return rows.remove_columns([c for c in (key, "teacher_chat_template_kwargs") if c in rows.column_names])
    order = list(range(len(rows)))
    for i, source in zip(with_pi, deranged([texts[i] for i in with_pi], config.seed)):
        order[i] = with_pi[source]
    own = list(rows[key])
    values, feature = encode_column([own[i] for i in order])
    return rows.remove_columns([key]).add_column(key, values, feature=feature)


def deranged(texts: Sequence[str], seed: int) -> list[int]:
    """A random order in which no place keeps its text: place i gets the text of place ``order[i]``.

    Raises:
        DataError: there is none, because one text fills more than half of the places.
    """
    common, count = Counter(texts).most_common(1)[0]
    if 2 * count > len(texts):
        all_or = "all" if count == len(texts) else f"{count} of the"
        raise DataError(
            f"control shuffled gives each row the PI of another, different one, but {all_or} {len(texts)} rows with PI "
            f"have the same ({common[:60]!r}). Leave shuffled out."
        )
    dice = random.Random(seed)
    order = list(range(len(texts)))
    dice.shuffle(order)
    for i, own in enumerate(texts):
        if texts[order[i]] == own:
            # Swap with a place that neither has this text nor holds it. There is one: at least `count` places have
            # another text, and at most count - 1 of them hold this one, since this place does too.
            j = i
            while own in (texts[j], texts[order[j]]):
                j = dice.randrange(len(texts))
            order[i], order[j] = order[j], order[i]
    return order
