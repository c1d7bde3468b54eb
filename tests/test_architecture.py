"""A module imports only from those above it in the flow; public names are where they are said to be."""

from __future__ import annotations

import ast
from pathlib import Path

import pgkd_peft

PACKAGE = Path(pgkd_peft.__file__).parent


def imports_of(path: Path) -> set[str]:
    """Names of the package's modules that `path` imports (those under TYPE_CHECKING left out)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.dump(test.test)
        for node in ast.walk(test)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and id(node) not in typing_only and node.module:
            found.add(node.module)
    return found


def test_imports_form_no_cycle():
    graph = {path.stem: imports_of(path) for path in PACKAGE.rglob("*.py") if path.stem != "__init__"}
    assert len(graph) >= 15
    done: set[str] = set()
    while True:
        ready = {name for name, needs in graph.items() if name not in done and (needs & set(graph)) <= done}
        if not ready:
            break
        done |= ready
    assert sorted(set(graph) - done) == []


def test_the_flow_points_one_way():
    flow = ["errors", "context", "collator", "scoring", "rollout", "trainer", "train_command", "cli"]
    for i, name in enumerate(flow):
        assert not imports_of(PACKAGE / f"{name}.py") & set(flow[i + 1 :]), name


def test_context_needs_no_torch():
    for name in ("context", "messages", "columns", "errors"):
        assert "torch" not in {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }


def test_public_names():
    for name in ("PrivilegedGKDConfig", "PrivilegedSelfDistillTrainer", "DataCollatorForPrivilegedGKD"):
        assert name in pgkd_peft.__all__
        assert getattr(pgkd_peft, name).__name__ == name
