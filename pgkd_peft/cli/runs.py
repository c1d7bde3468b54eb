"""`pgkd runs`: the runs of a folder as one table."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..run.console import shared_console
from .help import CommandParser


def main(argv: Sequence[str]) -> int:
    from ..view.runs import find_runs, sort_runs, table

    parser = CommandParser(
        prog="pgkd runs",
        description="All runs below a folder: the settings in which they differ, score, recovered gap with its "
        "interval, drift, divergence and seconds.",
    )
    parser.add_argument("folder", nargs="?", default="runs", help="folder that holds runs, at any depth")
    parser.add_argument("--sort", metavar="COLUMN", help="a result or a setting; scores best first")
    parser.add_argument("--json", action="store_true", help="print the records as JSON instead")
    args = parser.parse_args(list(argv))
    runs = sort_runs(find_runs(args.folder), args.sort)
    if args.json:
        print(json.dumps(runs, indent=2, default=str))
    else:
        console = shared_console()
        console.print(table(runs, console.width))
    return 0
