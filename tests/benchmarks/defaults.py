"""What the defaults reach where a recipe was tuned: of the recipe only model, data set and columns are kept.

    python tests/benchmarks/defaults.py                       # terse and siqa, seed 0, some 25 minutes on two cores
    python tests/benchmarks/defaults.py --sets terse --seeds 0 1 2

Everything else is left to the settings that nobody gave; of siqa a quarter of the rows is taken, for three epochs of
all 1,544 take more than an hour on two cores. Judged as the recipe's own header says, on rows of the split
`test`. One JSON line a run into results/defaults.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from pgkd_peft.data.named import load_named

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SCORERS = "pgkd_peft.evaluation.scorers:"
SETS = {
    "terse": ("recipes/chatterbot_terse.yaml", ["--scorer", SCORERS + "at_most_five_words", "--max_new_tokens", "32"]),
    "siqa": ("recipes/siqa_cpu.yaml", ["--scorer", SCORERS + "right_option_alone", "--max_new_tokens", "32"]),
}
KEPT = ("model_name_or_path", "dataset_name", "dataset_test_split", "columns")
FEWER = {"siqa": 386}


def run_once(name: str, seed: int, scratch: Path) -> dict:
    recipe, judged_by = SETS[name]
    whole = yaml.safe_load((ROOT / recipe).read_text(encoding="utf-8"))
    told = {key: whole[key] for key in KEPT}
    if name in FEWER:
        (folder := scratch / "data").mkdir()
        told |= {"dataset_name": str(folder), "dataset_test_split": "test"}
        for split, count in (("train", FEWER[name]), ("test", None)):
            rows = load_named(whole["dataset_name"], split=split)
            rows.select(range(count or len(rows))).to_json(folder / f"{split}.jsonl")
    config, run, out = scratch / "told.yaml", scratch / "run", scratch / "eval.json"
    config.write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")
    pgkd = [sys.executable, "-m", "pgkd_peft"]
    subprocess.run([*pgkd, "train", "--config", config, "--output_dir", run, "--seed", str(seed)], check=True)
    subprocess.run([*pgkd, "eval", run, *judged_by, "--out", out, "--show", "0"], check=True)
    judged, info = json.loads(out.read_text()), json.loads((run / "run.json").read_text())
    return {
        "name": name,
        "recipe": recipe,
        "told": list(told),
        "rows": FEWER.get(name),
        "seed": seed,
        **{key: judged.get(key) for key in ("base", "teacher", "student", "recovered", "recovered_interval", "n")},
        "scorer": judged_by[1],
        **{key: info[key] for key in ("automatic", "steps", "seconds", "peak_memory_mib")},
        **{key: info[key] for key in ("device", "threads", "versions")},
        "load": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", default=str(HERE / "results/defaults.jsonl"))
    args = parser.parse_args()
    for name, seed in itertools.product(args.sets, args.seeds):
        with tempfile.TemporaryDirectory(prefix="defaults_") as scratch:
            line = run_once(name, seed, Path(scratch))
        with Path(args.out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
