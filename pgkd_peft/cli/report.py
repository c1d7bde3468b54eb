"""`pgkd report`: a run, or all runs of a folder, as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from ..run.folder import REPORT_FILE
from ..view.report import write_report
from .help import CommandParser


def main(argv: Sequence[str]) -> int:
    """`pgkd report DIR [--out FILE]`."""
    parser = CommandParser(
        prog="pgkd report",
        description="Write one self-contained HTML page about a run, or "
        "about all runs below a folder: the settings that differ, results, and their curves over each other.",
    )
    parser.add_argument("run_dir", metavar="DIR", help="output_dir of a training, or a folder that holds several")
    parser.add_argument("--out", metavar="FILE", help=f"default: DIR/{REPORT_FILE}")
    args = parser.parse_args(list(argv))
    path = write_report(args.run_dir, args.out)
    print(f"{path} ({path.stat().st_size / 1024:.0f} KiB, opens without a network)")
    return 0
