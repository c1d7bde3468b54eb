"""What the package knows of other libraries' insides is still there: a new release fails here, by name."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

from pgkd_peft.trl_compat import INSIDES, Inside


def source_of(owner: str) -> tuple[object, str]:
    """The class or module, and its source with that of its bases in the same library."""
    module, _, name = owner.rpartition(".")
    try:
        found = importlib.import_module(owner)
        return found, inspect.getsource(found)
    except ModuleNotFoundError:
        found = getattr(importlib.import_module(module), name)
    library = owner.split(".")[0]
    bases = [base for base in inspect.getmro(found) if base.__module__.split(".")[0] == library]
    return found, "\n".join(inspect.getsource(base) for base in bases)


def is_there(inside: Inside) -> bool:
    found, source = source_of(inside.owner)
    return hasattr(found, inside.name) or re.search(rf"\b{re.escape(inside.name)}\b", source) is not None


@pytest.mark.parametrize("inside", INSIDES, ids=lambda inside: f"{inside.owner}.{inside.name}")
def test_it_is_still_there(inside):
    assert is_there(inside), (
        f"{inside.owner}.{inside.name}, read in {inside.read_in}, is gone; needed for: {inside.why}"
    )


def test_what_is_gone_would_be_noticed():
    assert not is_there(Inside("transformers.Trainer", "_no_such_attribute", "0", ""))


def test_hooks_are_still_called():
    """An overridden private method that nobody calls any more would be as good as gone."""
    _, source = source_of("transformers.Trainer")
    for inside in INSIDES:
        if inside.owner == "transformers.Trainer" and inside.name not in ("_tr_loss", "_total_loss_scalar"):
            assert re.search(rf"self\.{inside.name}\b", source), inside.name
