"""Does feedback alone teach a format? The checker's score before and after, on questions that were not trained on.

    python tests/benchmarks/feedback.py --seeds 0 1 2
    python tests/benchmarks/feedback.py --seeds 0 --max_steps 30        # the rest goes to `pgkd train`

Trains examples/feedback/in_short.yaml by `pgkd train` and asks the held-out questions of the same folder: the base,
the base that is told what the checker said of its answer (the teacher), and the student, who is told nothing. One JSON
line a run is appended to results/feedback.jsonl; what the file has with the same settings is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from front import HERE, read_lines, settings, train

RECIPE = "examples/feedback/in_short.yaml"
ANSWERS_SHOWN = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", default="runs/feedback", help="folder of the runs (%(default)s)")
    parser.add_argument("--results", default=str(HERE / "results" / "feedback.jsonl"))
    args, more = parser.parse_known_args()
    told = settings(RECIPE, "pi", more)
    for seed in args.seeds:
        key = {"recipe": RECIPE, "seed": seed, "told": told}
        if any(all(line[name] == value for name, value in key.items()) for line in read_lines(Path(args.results))):
            print(f"seed {seed} is in {args.results} already", flush=True)
            continue
        name = "-".join([*(part.strip("-") for part in more), f"seed{seed}"])
        line = {**key, **judge(train(Path(args.out) / name, RECIPE, told, seed))}
        with Path(args.results).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps({name: line[name] for name in ("seed", "base", "teacher", "score", "recovered")}), flush=True)


def judge(folder: Path) -> dict[str, Any]:
    """The scores of base, told base and student on the held-out questions."""
    from pgkd_peft.cli.eval import EvalArguments, collator_of, held_out_rows, load_student, take_from_run
    from pgkd_peft.data.feedback import load_feedback
    from pgkd_peft.evaluation.answers import evaluate
    from pgkd_peft.evaluation.scorers import make_scorer
    from pgkd_peft.export.adapter import read_run

    run = read_run(str(folder))
    args = EvalArguments()
    take_from_run(args, run)
    config, collator, model = run.info["config"], collator_of(run), load_student(run)
    plain, _ = held_out_rows(run, EvalArguments(dataset_name=str(Path(RECIPE).parent), dataset_split="test"))
    scorer, say = make_scorer(str(args.scorer)), load_feedback(config["feedback"])
    how = {"max_new_tokens": args.max_new_tokens}
    base = evaluate(model, collator, plain, scorer, columns=("base",), **how)
    rows = [
        {**row, collator.builder.privileged_key: say(dict(row), [answer])[0]}
        for row, answer in zip(plain, base.answers["base"])
    ]
    result = evaluate(model, collator, rows, scorer, columns=("base", "teacher", "student"), **how)
    summary, info = result.summary(), run.info
    return {
        **{name: summary[name] for name in ("n", "base", "teacher")},
        "score": summary["student"],
        **{name: summary[name] for name in ("recovered", "recovered_interval")},
        "answers": result.answers["student"][:ANSWERS_SHOWN],
        "max_new_tokens": args.max_new_tokens,
        **{name: info[name] for name in ("steps", "seconds", "peak_memory_mib", "device", "threads", "versions")},
        "load": round(os.getloadavg()[0], 1),
        **{name: info[name] for name in ("pgkd_peft", "git_revision", "dataset_fingerprint")},
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
