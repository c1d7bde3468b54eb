"""Is it the PI? A recipe against its controls (pgkd_peft/controls.py), over seeds, each training in its own process.

    python tests/benchmarks/controls.py --config recipes/facts_cpu.yaml --seeds 0 1 2 --controls shuffled no_pi sft \\
        --group_key fact_id --neutral_dataset_name builtin:neutral_heldout
    python tests/benchmarks/controls.py --config recipes/asdiv_cpu.yaml --controls sft offline shuffled --scorer numeric
    python tests/benchmarks/controls.py --config recipes/facts_cpu.yaml --seeds 0 --max_steps 2     # a try

What this script does not know (--max_steps 2) goes to `pgkd train` of every condition. Runs are kept in
OUT/seedS, their controls in OUT/seedS/controls/NAME; what is finished there is not trained again, and a seed that was
evaluated with the same settings is not evaluated again, so an interrupted table goes on where it stopped. One JSON line
a (seed, condition) is appended to tests/benchmarks/results/controls.jsonl; the condition `pi` is the recipe itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

RESULTS = Path(__file__).parent / "results" / "controls.jsonl"
EVAL_FLAGS = (
    "scorer",
    "answer_key",
    "group_key",
    "neutral_dataset_name",
    "dataset_name",
    "dataset_split",
    "max_new_tokens",
    "limit",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe of the run itself")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--controls", nargs="+", default=["shuffled", "no_pi", "sft"])
    parser.add_argument("--out", help="folder of the runs; default: runs/controls/RECIPE")
    parser.add_argument("--results", default=str(RESULTS), help="file to append to (%(default)s)")
    parser.add_argument("--table", action="store_true", help="only print the table of what is in OUT")
    for flag in EVAL_FLAGS:
        parser.add_argument(f"--{flag}", help="of pgkd eval" + ("; default: the recipe's" if "tokens" in flag else ""))
    args, train_flags = parser.parse_known_args()
    out = Path(args.out or Path("runs") / "controls" / Path(args.config).stem)
    recipe = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
    eval_flags = {flag: getattr(args, flag) for flag in EVAL_FLAGS if getattr(args, flag) is not None}
    eval_flags.setdefault("max_new_tokens", str(recipe.get("max_new_tokens", 128)))

    if not args.table:
        check_same(out, {"recipe": Path(args.config).read_text(encoding="utf-8"), "train_flags": train_flags})
        for seed in args.seeds:
            folder = out / f"seed{seed}"
            common = ["--config", args.config, "--seed", str(seed), "--output_dir", str(folder), *train_flags]
            train(folder, common)
            for control in args.controls:
                train(folder / "controls" / control, [*common, "--control", control])
            lines = judge(folder, args.controls, eval_flags)
            if lines:
                Path(args.results).parent.mkdir(parents=True, exist_ok=True)
                with Path(args.results).open("a", encoding="utf-8") as file:
                    file.writelines(
                        json.dumps({"recipe": args.config, "train_flags": train_flags, **line}) + "\n" for line in lines
                    )
            print(table(out, args.seeds, args.controls), flush=True)
    print(table(out, args.seeds, args.controls))


def pgkd(*argv: str) -> None:
    print("$ pgkd", *argv, flush=True)
    done = subprocess.run([sys.executable, "-m", "pgkd_peft", *argv], check=False)
    if done.returncode:
        sys.exit(f"`pgkd {argv[0]}` ended with exit code {done.returncode}; run this again to go on from here")


def check_same(out: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix runs of other settings with those that are in `out`."""
    path = out / "settings.json"
    before = read(path) or settings
    for name, value in settings.items():
        if before[name] != value:
            what = "another text" if name == "recipe" else f"{before[name]}, now {value}"
            sys.exit(f"{out} holds runs of other settings ({name}: {what}); give another --out, or delete that folder")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def train(folder: Path, argv: list[str]) -> None:
    """Train in a process of its own, unless that is done; go on from a checkpoint where there is one."""
    if read(folder / "run.json").get("finished"):
        print(f"{folder} is trained already", flush=True)
        return
    pgkd("train", *argv, "--resume" if list(folder.glob("checkpoint-*/manifest.json")) else "--overwrite")


def judge(folder: Path, controls: list[str], flags: dict[str, str]) -> list[dict[str, Any]]:
    """Evaluate a run and its controls in one process; returns one line a condition, [] if that was done before."""
    results, marker = folder / "eval_results.json", folder / "controls_table.json"
    asked = {"controls": sorted(controls), **flags}
    if read(marker) == asked and results.is_file():
        print(f"{folder} is evaluated already", flush=True)
        return []
    given = [part for flag, value in flags.items() for part in (f"--{flag}", value)]
    pgkd("eval", str(folder), *given, "--show", "0", *(["--controls", *controls] if controls else []))
    marker.write_text(json.dumps(asked) + "\n", encoding="utf-8")
    return conditions(folder, controls)


def conditions(folder: Path, controls: list[str]) -> list[dict[str, Any]]:
    """What is known of a seed's run and of its controls."""
    results = read(folder / "eval_results.json")
    lines = []
    for name, result in {"pi": results, **results.get("controls", {})}.items():
        if name != "pi" and name not in controls:
            continue
        info = read(folder if name == "pi" else folder / "controls" / name, "run.json")
        student = result["columns"]["student"]
        lines.append(
            {
                "condition": name,
                "seed": info["seed"],
                "n": result["n"],
                "groups": result["groups"],
                **{key: result[key] for key in ("base", "teacher")},
                "score": result["student"],
                **{key: result.get(key) for key in ("recovered", "recovered_interval", "drift")},
                **{key: student[key] for key in ("length_tokens", "truncated", "hint_share", "pi_overlap")},
                "scorer": results["scorer"],
                "max_new_tokens": results["max_new_tokens"],
                "steps": info.get("steps"),
                "seconds": info["seconds"],
                "peak_memory_mib": info["peak_memory_mib"],
                **{key: info[key] for key in ("device", "threads", "versions", "pgkd_peft", "git_revision")},
                "dataset_fingerprint": info["dataset_fingerprint"],
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    return lines


def table(out: Path, seeds: list[int], controls: list[str]) -> str:
    """Means over the seeds that are evaluated, as Markdown; in brackets the lowest and the highest."""
    lines: list[dict[str, Any]] = []
    for seed in seeds:
        if read(out / f"seed{seed}" / "eval_results.json"):
            lines += conditions(out / f"seed{seed}", controls)
    if not lines:
        return f"nothing is evaluated in {out} yet"
    first = lines[0]

    def cell(values: list[float | None], form: str) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return "–"
        spread = f" ({min(known):{form}} to {max(known):{form}})" if len(known) > 1 else ""
        return f"{statistics.mean(known):{form}}{spread}"

    rows = [
        f"{first['n']} held-out rows; scorer {first['scorer']}; mean over seeds (lowest to highest). "
        f"base {first['base']:.3f}, teacher {first['teacher']:.3f}",
        "",
        "| condition | seeds | score | recovered gap | drift, nats/token | answer tokens | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("pi", *controls):
        own = [line for line in lines if line["condition"] == name]
        if own:
            cells = (
                cell([line[key] for line in own], form)
                for key, form in (
                    ("score", ".3f"),
                    ("recovered", ".2f"),
                    ("drift", ".3f"),
                    ("length_tokens", ".1f"),
                    ("seconds", ".0f"),
                )
            )
            rows.append(f"| {name} | {' '.join(str(line['seed']) for line in own)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def read(path: Path, name: str = "") -> dict[str, Any]:
    path = path / name if name else path
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


if __name__ == "__main__":
    main()
