"""`pgkd merge` and `pgkd export`: from the run folder to what others can use."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .help import CommandParser

if TYPE_CHECKING:
    from ..export.verify import Score


def _parser(command: str, description: str, out_help: str) -> CommandParser:
    """What merge and export have in common."""
    parser = CommandParser(prog=f"pgkd {command}", description=description)
    parser.add_argument("adapter", metavar="ADAPTER", help="run folder, a checkpoint in it, or a Hub id")
    parser.add_argument("--out", required=True, help=out_help)
    parser.add_argument(
        "--base",
        default="dequantized",
        choices=["dequantized", "original"],
        help="add the adapter to the weights that training computed with, or to the base's own files (%(default)s)",
    )
    parser.add_argument("--prompts", metavar="FILE", help="prompts to verify on; default: the run's held-out ones")
    parser.add_argument("--tolerance", type=float, metavar="NATS", help="highest mean KL a token that passes")
    parser.add_argument("--no-verify", "--no_verify", action="store_true", help="write without measuring")
    parser.add_argument("--quantization", choices=["nf4", "int8", "none"], help="of the base in training, when unknown")
    parser.add_argument("--base-model", "--base_model", help="the base, when it is no longer where it was")
    parser.add_argument("--push-to-hub", "--push_to_hub", metavar="ID", help="upload the result to this repository")
    parser.add_argument(
        "--trust-remote-code", "--trust_remote_code", action="store_true", help="run code that comes with the base"
    )
    parser.add_argument("--score-data", "--score_data", metavar="DATA", help="rows to score the models on, as well")
    parser.add_argument("--scorer", default="contains", help="for --score-data, as in pgkd eval (%(default)s)")
    return parser


def merge(argv: Sequence[str]) -> int:
    """`pgkd merge`; returns 1 when the result is not the model that was trained."""
    parser = _parser(
        "merge",
        "Add an adapter to its base, write a plain 16-bit checkpoint, and measure that it is the model that was "
        "trained. Exit code 1 when it is not.",
        "folder to make",
    )
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"], help="of the result (%(default)s)")
    parser.add_argument("--compare", action="store_true", help="measure both bases and recommend one")
    parser.add_argument("--force", action="store_true", help="replace an earlier merge; allow --requantize")
    parser.add_argument("--requantize", choices=["nf4", "int8"], help="quantize the result again (loses the adapter)")
    args = parser.parse_args(argv)

    from ..export.merge import merge_adapter

    return _made(merge_adapter, args, "dtype", "compare", "force", "requantize")


def export(argv: Sequence[str]) -> int:
    """`pgkd export`; returns 1 when a merged GGUF is not the model that was trained."""
    parser = _parser(
        "export",
        "Write an adapter for others: cleaned for publication (peft), or for llama.cpp and Ollama (gguf-lora: the "
        "adapter alone, gguf: the merged model).",
        "folder to make; for the GGUF formats a .gguf file",
    )
    parser.add_argument("--format", default="peft", choices=["peft", "gguf-lora", "gguf"], help="(%(default)s)")
    parser.add_argument(
        "--gguf-type",
        "--gguf_type",
        default="f16",
        type=str.lower,
        choices=["f16", "q8_0", "f32", "q4_k_m", "q5_k_m"],
        help="of gguf (%(default)s); the K-quants by llama.cpp's own quantizer, where one is installed",
    )
    parser.add_argument("--base-id", "--base_id", help="Hub id of a base that is only a local directory")
    args = parser.parse_args(argv)

    from ..export.publish import export_adapter

    return _made(export_adapter, args, "format", "gguf_type", "base_id")


def _made(make: Callable[..., Any], args: argparse.Namespace, *own: str) -> int:
    """Call `make` with what both commands have and its `own` arguments; returns the exit code."""
    from ..export.merge import VerificationError

    names = ("base", "prompts", "tolerance", "quantization", "base_model", "push_to_hub", "trust_remote_code", *own)
    if args.score_data and (args.no_verify or getattr(args, "format", "gguf") != "gguf"):
        raise ConfigError("--score-data is read by the measurement of a merged model; leave it or --no-verify out")
    score = task_score(args.score_data, args.scorer) if args.score_data else None
    given = {name: getattr(args, name) for name in names}
    try:
        make(args.adapter, args.out, verify=not args.no_verify, score=score, **given)
    except VerificationError as error:
        print(f"pgkd: {error}", file=sys.stderr)
        return 1
    return 0


def task_score(data: str, spec: str) -> Score:
    """A score of (model, tokenizer): the mean over the rows of `data`, answered greedily without PI.

    Raises:
        PGKDError: the rows cannot be read or scored.
    """
    from ..data.named import load_named
    from ..evaluation.scorers import check_scorable, make_scorer

    rows = list(load_named(data))
    scorer = make_scorer(spec)
    check_scorable(rows, scorer)

    def score(model: Any, tokenizer: Any) -> float:
        from ..evaluation.answers import student_score

        return student_score(model, tokenizer, rows, scorer)

    return score
