"""Bakes, judged with labels that the bake never saw: one JSON line a run into results/bake.jsonl.

    python tests/benchmarks/bake.py --seeds 0 1 2 --minutes 10
    python tests/benchmarks/bake.py --questions 5 10 20 40       # a passage
    python tests/benchmarks/bake.py --no-gap-filter
    python tests/benchmarks/bake.py --anchors 0
    python tests/benchmarks/bake.py --human                      # the 60 human questions alone: the ceiling
    python tests/benchmarks/bake.py --subject base_files --minutes 10   # a document that Debian ships
    python tests/benchmarks/bake.py --subject rules terse --minutes 10  # system prompts

The judges: of the facts the 40 human questions of builtin:facts_heldout, of the document ten questions that were
written before the first run (does the answer hold the word?), of the prompts 20 requests (does the answer keep the
rules? examples/bake/compliance.py); and the drift on builtin:neutral_heldout, which has a system turn of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from pgkd_peft.run.info import device_name

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def human_questions(path: Path) -> str:
    rows = [json.loads(line) for line in (ROOT / "examples/data/facts_train.jsonl").read_text().splitlines()]
    path.write_text("".join(row["messages"][-2]["content"] + "\n" for row in rows if row.get("privileged_messages")))
    return str(path)


TEXTS = ROOT / "examples/bake"
DOCUMENTS = {
    "facts": (TEXTS / "facts.md", "builtin:facts_heldout", ["--group_key", "fact_id"]),
    "base_files": (Path("/usr/share/doc/base-files/README"), str(TEXTS / "base_files_questions.jsonl"), []),
}


def judged_by(subject: str, scratch: Path) -> tuple[list[str], list[str]]:
    """What is baked, and how it is judged: flags of `pgkd bake` and of `pgkd eval`."""
    if subject in DOCUMENTS:
        document, rows, more = DOCUMENTS[subject]
        return ["--document", str(document)], ["--dataset_name", rows, "--scorer", "contains", *more]
    prompt, rows = TEXTS / f"{subject}.md", scratch / "rows.jsonl"
    requests = [json.loads(line) for line in (TEXTS / "requests_heldout.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "privileged_messages": prompt.read_text()}) for row in requests]
    rows.write_text("\n".join(lines) + "\n")
    told = ["--dataset_name", str(rows), "--scorer", f"compliance:{subject}"]
    return ["--system_prompt", str(prompt)], told


def bake_once(args: argparse.Namespace, subject: str, questions: int | None, seed: int, scratch: Path) -> dict:
    """Bake and judge; the line for the results file."""
    run = scratch / "run"
    what, told = judged_by(subject, scratch)
    flags = ["--model_name_or_path", args.model, *what]
    flags += ["--output_dir", str(run), "--seed", str(seed), "--anchors", str(args.anchors), *args.more]
    flags += ["--requests", human_questions(scratch / "own.txt"), "--questions", "0"] if args.human else []
    flags += [] if args.human or questions is None else ["--questions", str(questions)]
    flags += ["--gap_filter", "false"] if args.no_gap_filter else []
    flags += ["--minutes", str(args.minutes)] if args.minutes else []
    pgkd = [sys.executable, "-m", "pgkd_peft"]
    subprocess.run([*pgkd, "bake", *flags], check=True)
    told += ["--neutral_dataset_name", "builtin:neutral_heldout", "--out", str(scratch / "eval.json"), "--show", "0"]
    subprocess.run([*pgkd, "eval", str(run), *told], check=True, env=os.environ | {"PYTHONPATH": f"{ROOT}:{TEXTS}"})
    judged, own = json.loads((scratch / "eval.json").read_text()), json.loads((run / "eval_results.json").read_text())
    records = [json.loads(line) for line in (run / "questions.jsonl").read_text().splitlines()]
    state = json.loads((run / "bake.json").read_text())
    names = ("base", "teacher", "student", "recovered", "recovered_interval", "n", "drift")
    return {
        "subject": subject,
        "seed": seed,
        **{name: judged.get(name) for name in names},
        "length_tokens": {name: round(column["length_tokens"], 1) for name, column in judged["columns"].items()},
        "recovered_nats": own.get("recovered_nats"),
        "recovered_nats_interval": own.get("recovered_nats_interval"),
        "own_drift": state.get("drift"),
        "seconds": state.get("seconds"),
        "steps": json.loads((run / "run.json").read_text()).get("steps"),
        "written": len(records),
        **{use: sum(r["use"] == use for r in records) for use in ("train", "heldout", "anchor", "dropped")},
        "questions": None if args.human else questions,
        "anchors_asked": args.anchors,
        "human": args.human,
        "gap_filter": not args.no_gap_filter,
        "minutes": args.minutes,
        "more": args.more,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--subject", nargs="+", choices=[*DOCUMENTS, "terse", "rules"], default=["facts"])
    parser.add_argument("--questions", type=int, nargs="+", default=[None])
    parser.add_argument("--anchors", type=int, default=144)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--no-gap-filter", action="store_true")
    parser.add_argument("--human", action="store_true")
    parser.add_argument("--keep", action="store_true", help="do not remove the run folders")
    parser.add_argument("--out", default=str(HERE / "results/bake.jsonl"))
    args, args.more = parser.parse_known_args()
    for subject, questions, seed in itertools.product(args.subject, args.questions, args.seeds):
        folder = Path(tempfile.mkdtemp(prefix="bake_"))
        try:
            line = bake_once(args, subject, questions, seed, folder)
        finally:
            if not args.keep:
                shutil.rmtree(folder)
        with Path(args.out).open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line))


if __name__ == "__main__":
    main()
