"""The house: folders in layers, no circle, the method at the root, and every module where CONTRIBUTING says it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import pgkd_peft

PACKAGE = Path(pgkd_peft.__file__).parent
ROOT = PACKAGE.parent

# Lowest first: a module imports from its own layer and from those before it. Files of the root that every layer may
# use stand before the folders; all others of the root are the method.
LAYERS = (
    *("errors", "trl_compat", "config_checks", "config", "rows"),
    *("model", "data", "run", "engines", "the method", "evaluation", "view", "export", "bake", "cli"),
)
MOST_FILES_AT_THE_ROOT = 20
MOST_LINES_OF_A_FUNCTION = 70


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; a folder stands for its ``__init__``."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "assets" and parts not in (("__init__",), ("__main__",)):
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports_of(name: str, path: Path) -> set[str]:
    """The package's modules that a module imports, also inside functions and under TYPE_CHECKING."""
    known = modules()
    found = set()
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        above = package[: len(package) - (node.level - 1)]
        source = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{source}.{alias.name}".lstrip(".")
            found |= {inner} & set(known) or {source} & set(known)
    return found - {name}


def layer(name: str) -> int:
    top = name.split(".")[0]
    return LAYERS.index(top if top in LAYERS else "the method")


GRAPH = {name: imports_of(name, path) for name, path in modules().items()}


def test_the_files_themselves_were_read():
    assert len(GRAPH) > 60
    assert sum(map(len, GRAPH.values())) > 150


def test_imports_form_no_circle():
    done: set[str] = set()
    while ready := {name for name, needs in GRAPH.items() if name not in done and needs <= done}:
        done |= ready
    assert sorted(set(GRAPH) - done) == []


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_go_one_way(name):
    assert {needed for needed in GRAPH[name] if layer(needed) > layer(name)} == set()


def test_the_root_is_the_method():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_FILES_AT_THE_ROOT
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert folders == set(LAYERS[5:]) - {"the method"}


@pytest.mark.parametrize("folder", sorted(path.parent for path in PACKAGE.glob("*/__init__.py")))
def test_a_folder_says_what_lives_there(folder):
    assert len(ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or "") > 60


def test_every_module_says_what_it_does():
    silent = [name for name, path in modules().items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_every_module_stands_in_contributing():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`([\w/]+\.py)`", text))
    files = {str(path.relative_to(PACKAGE)) for path in modules().values() if path.stem != "__init__"}
    assert files - told == set(), "not told"
    assert {name for name in told if not name.startswith("tests/")} - files == set(), "told, but gone"


def code_lines(function: ast.AST, text: str) -> int:
    """Lines of a function that are code: no docstring, no comment, no blank line, no signature."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    lines = text.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def test_no_function_is_longer_than_a_screen():
    long = {}
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count = code_lines(node, text)
                if count > MOST_LINES_OF_A_FUNCTION:
                    long[f"{name}.{node.name}"] = count
    assert long == {}


@pytest.mark.parametrize("name", ["data.contexts", "data.row", "data.columns", "errors", "cli.main"])
def test_what_is_text_only_needs_no_torch(name):
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    names = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    names |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "torch" not in names


def test_public_names():
    for name in ("PrivilegedGKDConfig", "PrivilegedSelfDistillTrainer", "DataCollatorForPrivilegedGKD"):
        assert name in pgkd_peft.__all__
        assert getattr(pgkd_peft, name).__name__ == name
    from pgkd_peft.divergence import linear_jsd

    assert callable(linear_jsd)
