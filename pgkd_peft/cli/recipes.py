"""`pgkd recipes`: what comes with the package, and a copy to change."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from ..data.named import shipped
from ..errors import ConfigError
from .help import CommandParser


def main(argv: Sequence[str]) -> int:
    """List the recipes, or copy one to a file or folder."""
    parser = CommandParser(
        prog="pgkd recipes",
        usage="pgkd recipes [cp NAME [TO]]",
        description="Without arguments: list the recipes. With cp: copy one (to the current folder), to be changed.",
    )
    parser.add_argument("action", nargs="?", choices=["cp"], metavar="cp", help="copy one")
    parser.add_argument("name", nargs="?", metavar="NAME", help="as in the list")
    parser.add_argument("to", nargs="?", default=".", metavar="TO", help="a file or folder")
    args = parser.parse_args(argv)
    if args.action is None:
        print(listing())
        return 0
    if args.name is None:
        raise ConfigError(f"name a recipe: pgkd recipes cp NAME; there are: {', '.join(sorted(everything()))}")
    print(copy(args.name, Path(args.to)))
    return 0


def recipes() -> dict[str, Path]:
    """The recipes of `pgkd train` by name (the file's name without its ending)."""
    return {path.stem: path for path in sorted(shipped("recipes").glob("*.yaml"))}


def everything() -> dict[str, Path]:
    """Those, and the recipes of `pgkd bake` as ``bake/NAME``."""
    bakes = {f"bake/{path.stem}": path for path in sorted(shipped("recipes").glob("bake/*.yaml"))}
    return {**recipes(), **bakes}


def purpose(path: Path) -> str:
    """The first sentence of a recipe's header."""
    header = []
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        if not line.startswith("#") or line.strip() == "#":
            break
        header.append(line.lstrip("# "))
    return " ".join(header).split(". ")[0].rstrip(".") + "."


def listing() -> str:
    """All recipes with what they are for, and the command that runs one."""
    found = everything()
    indent = max(map(len, found)) + 4
    lines = [
        textwrap.fill(purpose(path), 120, initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent)
        for name, path in found.items()
    ]
    last = ["pgkd recipes cp NAME && pgkd train --config NAME.yaml", "(of bake/NAME: pgkd bake --config NAME.yaml)"]
    return "\n".join([*lines, "", *last])


def copy(name: str, to: Path) -> Path:
    """Copy a recipe; a file that is there already is never overwritten.

    Raises:
        ConfigError: no such recipe, or the file exists.
    """
    found = everything()
    name = name.removesuffix(".yaml")
    if name not in found:
        near = get_close_matches(name, found, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there is no recipe {name!r}{hint} There are: {', '.join(found)}")
    target = to / found[name].name if to.is_dir() else to
    if target.exists():
        raise ConfigError(f"{target} exists; name another file, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found[name], target)
    target.chmod(0o755)  # a script, also where the installation dropped that
    return target
