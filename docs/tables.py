"""What the files of tests/benchmarks/results say, as tables and as single figures; figures.py puts them into pages.

demo.json is the summary.json of `make demo`, copied.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "benchmarks" / "results"
FACTS, SIQA = "recipes/facts_cpu.yaml", "recipes/siqa_cpu.yaml"


def lines(name: str) -> list[dict[str, Any]]:
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


# ---- how figures are written ---------------------------------------------------------------------------------------


def spread(values: Iterable[float], form: str) -> str:
    """The lowest to the highest, once where both are written alike."""
    shown = [format(value, form) for value in sorted(values)]
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def mean(values: Sequence[float], form: str) -> str:
    """The mean, with the lowest to the highest in brackets where there are several that differ."""
    between = spread(values, form)
    return format(statistics.mean(values), form) + (f" ({between})" if "to" in between else "")


def listing(values: Iterable[float], form: str) -> str:
    """a, b and c"""
    shown = [format(value, form) for value in values]
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = ["".join(f"| {cell} " if cell else "| " for cell in row) + "|" for row in (head, *rows)]
    return "\n".join([cells[0], "|---" * len(head) + "|", *cells[1:]])


# ---- blocks --------------------------------------------------------------------------------------------------------


def conditions(recipe: str) -> dict[str, list[dict[str, Any]]]:
    """The lines of controls.jsonl of a recipe as it is, by condition; of a seed that was run again the last."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines("controls.jsonl"):
        if line["recipe"] == recipe and not line["train_flags"]:
            found.setdefault(line["condition"], {})[line["seed"]] = line
    return {name: [by_seed[seed] for seed in sorted(by_seed)] for name, by_seed in found.items()}


def column(runs: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [run[name] for run in runs]


def facts_controls() -> str:
    names = {"pi": "the PI", "shuffled": "PI of other rows", "no_pi": "no PI"}
    names |= {"sft": "plain SFT on the reference answers", "offline": "the PI, no rollouts (`lmbda: 0`)"}
    runs = conditions(FACTS)
    head = ("the demo's training with", "right answers", "recovered gap", "drift on neutral prompts, nats/token")
    return table(
        head,
        (
            (
                what,
                f"{statistics.mean(column(runs[name], 'score')):.3f}",
                mean(column(runs[name], "recovered"), ".2f"),
                mean(column(runs[name], "drift"), ".2f"),
            )
            for name, what in names.items()
            if name in runs
        ),
    )


def siqa_controls() -> str:
    names = {"pi": "the PI, own rollouts in half of the steps", "offline": "the PI, no rollouts (`lmbda: 0`)"}
    names |= {"shuffled": "PI of other rows", "sft": "plain SFT on the reference answers"}
    runs = conditions(SIQA)
    rows = (
        (what, mean(column(runs[name], "score"), ".3f"), mean(column(runs[name], "recovered"), ".2f"))
        for name, what in names.items()
    )
    return table(("trained with", "right answers", "recovered gap"), rows)


SUBJECTS = {
    "facts": "20 facts as prose, nothing else; 40 human questions",
    "base_files": "the README of Debian's base-files; 10 questions written before",
    "rules": "a system prompt of four rules that code checks; 20 unseen requests",
    "terse": "a system prompt of four worked examples of one short sentence; 20 unseen requests",
}


def bakes() -> str:
    """The newest run of each subject and seed with the tool's own questions."""
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for line in lines("bake.jsonl"):
        plain = not line["human"] and line["gap_filter"] and line["questions"] is None and not line["more"]
        if line.get("subject") in SUBJECTS and plain and line["minutes"]:
            runs[line["subject"], line["seed"]] = line
    order = sorted(runs, key=lambda key: (list(SUBJECTS).index(key[0]), key[1]))
    return table(("baked", *BAKE_HEAD), ((SUBJECTS[key[0]], *_bake_cells(key[1], runs[key])) for key in order))


BAKE_HEAD = (
    *("seed", "seconds", "steps", "base / with the text / student", "recovered", "in nats", "tokens an answer"),
    "drift",
)
ANCHORS = 144  # asked for by default
FIXED_STEPS = ["--max_steps", "120"]  # of the ablations, which no clock ends


def bake_ablations() -> str:
    """The bakes of the facts that differ in one thing, all of the same number of steps."""
    runs: dict[str, dict[str, Any]] = {}
    for line in lines("bake.jsonl"):
        if line.get("subject") == "facts" and line["more"] == FIXED_STEPS:
            what = "the 60 human questions" if line["human"] else "as it is"
            what = "no gap filter" if not line["gap_filter"] else what
            what = f"{line['anchors_asked']} anchors asked for" if line["anchors_asked"] != ANCHORS else what
            what = "no anchors" if not line["anchors_asked"] else what
            what = f"{line['questions']} questions a passage asked for" if line["questions"] is not None else what
            runs[what] = line
    rows = ((what, str(run["train"]), str(run["anchor"]), *_bake_cells(run["seed"], run)) for what, run in runs.items())
    return table(("facts", "questions", "anchors", *BAKE_HEAD), rows) if runs else "Not measured yet."


def _bake_cells(seed: int, run: Mapping[str, Any]) -> tuple[str, ...]:
    interval = run.get("recovered_interval")
    between = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    recovered = "-" if run["recovered"] is None else f"{run['recovered']:.2f}{between}"
    nats = "-" if run["recovered_nats"] is None else f"{run['recovered_nats']:.2f}"
    scores = " / ".join(f"{run[name]:.2f}" for name in ("base", "teacher", "student"))
    drift = "-" if run["drift"] is None else f"{run['drift']:.2f}"
    tokens = run.get("length_tokens", {})
    lengths = " / ".join(f"{tokens[name]:.0f}" for name in ("base", "teacher", "student")) if tokens else "-"
    return str(seed), f"{run['seconds']:.0f}", str(run["steps"]), scores, recovered, nats, lengths, drift


STEP_COLUMNS = {
    "bf16, batch 4, PI 300": ("none", 4, 1, 300),
    "NF4, batch 4, PI 300": ("nf4", 4, 1, 300),
    "bf16, batch 8, PI 300": ("none", 8, 1, 300),
    "bf16, batch 4 x 4 rollouts, PI 1,000": ("none", 4, 4, 1000),
}
TRAINERS = {
    "pgkd": "pgkd-peft",
    "sdft": "TRL SDFTTrainer",
    "distillation": "TRL DistillationTrainer (no PI)",
    "gkd-no-checkpointing": "TRL GKDTrainer, checkpointing off (no PI)",
    "gkd": "TRL GKDTrainer, its defaults (no PI)",
    "floor": "the bare matrix products of a step",
}


def step_lines(trainer: str, setting: tuple[str, int, int, int]) -> list[dict[str, Any]]:
    """The newest day's runs of a cell of the step table, for a host is not as fast every day; those with a shared PI,
    several epochs or on a GPU are other cells."""
    names = ("quantization", "batch", "generations", "privileged_tokens")
    found = [
        line
        for line in lines("step.jsonl")
        if tuple(line[name] for name in names) in STEP_COLUMNS.values()
        and (line["device"], line["model"]) == ("cpu", "smollm2-135m")
        and not line.get("shared")
        and line.get("epochs", 1) == 1
        and "seconds" in line
    ]
    day = max(line["date"] for line in found)
    here = (*setting, trainer, day)
    return [line for line in found if tuple(line[name] for name in (*names, "trainer", "date")) == here]


def step_table() -> str:
    def cell(trainer: str, setting: tuple[str, int, int, int]) -> str:
        found = step_lines(trainer, setting)
        if not found:
            return ""
        memory = "" if trainer == "floor" else f", {max(column(found, 'peak_mib')) / 1024:.1f} GiB"
        return f"{spread(column(found, 'seconds'), '.1f')} s{memory}"

    rows = ([what, *(cell(name, setting) for setting in STEP_COLUMNS.values())] for name, what in TRAINERS.items())
    return table(["", *STEP_COLUMNS], rows)


ONCE = {
    "pgkd": "pgkd-peft",
    "pgkd-no-cache": "pgkd-peft, reading everything each time",
    "sdft": "TRL SDFTTrainer",
    "floor": "the bare matrix products of a step",
}


def read_once(trainer: str, *, epochs: int) -> dict[int, dict[str, Any]]:
    """The last bf16 run of batch 8 with a shared PI, by its words; with several epochs, of rows with their own (0)."""
    return {
        line["shared"]: line
        for line in lines("step.jsonl")
        if (line["trainer"], line["quantization"], line["batch"], line.get("epochs", 1)) == (trainer, "none", 8, epochs)
        and (line["device"], line["model"]) == ("cpu", "smollm2-135m")
        and bool(line.get("shared")) == (epochs == 1)
        and "seconds" in line
    }


def shared_table() -> str:
    """One PI for all rows, by its length."""
    runs = {trainer: read_once(trainer, epochs=1) for trainer in ONCE}
    lengths = sorted({words for found in runs.values() for words in found})

    def cell(trainer: str, words: int) -> str:
        if words not in runs[trainer]:
            return ""
        line = runs[trainer][words]
        memory = "" if trainer == "floor" else f", {line['peak_mib'] / 1024:.1f} GiB"
        return f"{line['seconds']:.1f} s{memory}"

    rows = ([what, *(cell(name, words) for words in lengths)] for name, what in ONCE.items())
    return table(["", *(f"PI of {words:,} words" for words in lengths)], rows)


def epochs_table() -> str:
    """A PI of its own for each row, epoch by epoch."""
    rows = []
    for name, what in ONCE.items():
        for line in read_once(name, epochs=3).values():
            teacher = line.get("teacher_seconds_by_epoch", [])
            cells = [f"{seconds:.1f} s" for seconds in line["seconds_by_epoch"]]
            cells = [f"{cell} ({its:.1f} s)" for cell, its in zip(cells, teacher)] or cells
            rows.append([what, *cells, f"{line['peak_mib'] / 1024:.1f} GiB"])
    head = ["a step (teacher's seconds in the epoch)", "first epoch", "second", "third", "peak memory"]
    return table(head, rows)


METHODS = {
    "ours": "pgkd-peft",
    "liger": "Liger's chunked JSD, compiled",
    "gkd": "GKD's formula on bf16 logits",
    "gkd_fp32": "GKD's formula on fp32 logits",
    "trl": "TRL's chunked kernel",
    "floor": "the three bare matrix products",
}


def divergence_lines() -> list[dict[str, Any]]:
    setting = ("cpu", 512, 576, "bfloat16", 0.5)
    names = ("device", "n", "d", "dtype", "beta")
    found = [line for line in lines("divergence.jsonl") if tuple(line[name] for name in names) == setting]
    return [line for line in found if "seconds" in line]


def divergence_table() -> str:
    """Of several runs of a cell the last; of one day, the newest on which all were measured."""
    found = divergence_lines()
    all_cells = {(method, vocab) for method in METHODS for vocab in (151936, 49152)}
    days = {line["date"] for line in found}
    whole = max(
        day for day in days if all_cells <= {(line["method"], line["vocab"]) for line in found if line["date"] == day}
    )
    last = {(line["method"], line["vocab"]): line for line in found if line["date"] == whole}

    def cells(method: str, vocab: int) -> list[str]:
        line = last[method, vocab]
        if method == "floor":
            return [f"{line['seconds']:.1f} s", "", ""]
        mib = line["extra_mib"]
        memory = f"{mib:.0f} MiB" if mib < 256 else f"{mib / 1024:.1f} GiB"
        error = 100 * line["gradient_error"]
        return [f"{line['seconds']:.1f} s", memory, f"{error:.1f} %" if error < 1 else f"{error:.0f} %"]

    rows = ([what, *cells(name, 151936), *cells(name, 49152)] for name, what in METHODS.items())
    return table(["", "V=151,936", "", "", "V=49,152", "", ""], rows)


def export() -> dict[str, Any]:
    return json.loads((RESULTS / "export_table.json").read_text(encoding="utf-8"))


def export_table() -> str:
    found = {(row["base"], row["dtype"]): row for row in export()["rows"]}
    groups = {
        "dequantized base, bf16 (default)": [("dequantized", "bf16")],
        "dequantized base, fp16 or fp32": [("dequantized", "fp16"), ("dequantized", "fp32")],
        "dequantized base, GGUF Q8_0": [("dequantized", "GGUF q8_0")],
        "original base, bf16, fp16 or fp32": [("original", dtype) for dtype in ("bf16", "fp16", "fp32")],
        "dequantized base, back into NF4, as merging into 4-bit weights does": [
            ("dequantized, merged into nf4", "nf4")
        ],
        "original base, quantized to NF4 anew": [("original, merged into nf4", "nf4")],
    }

    def kl(value: float) -> str:
        if value < 1e-8:
            return "< 1e-8"
        return f"{value:.3f}" if value > 1e-3 else f"{value:.1e}".replace("e-0", "e-")

    def each(values: Iterable[str]) -> str:
        shown = list(values)
        return ", ".join(shown if len(set(shown)) > 1 else shown[:1])

    def percent(share: float) -> str:
        return f"{100 * share:.{4 if share > 0.99 else 2}g} %"

    rows = []
    for what, keys in groups.items():
        group = [found[key] for key in keys]
        kept = each(percent(row["share"]) for row in group if "share" in row and "anew" not in what)
        rows.append(
            (
                what,
                each(kl(row["kl_mean"]) for row in group),
                each(f"{100 * row['top1_agreement']:.3g} %" for row in group),
                kept,
                each(f"{40 * row['score']:.0f}" for row in group),
                each(f"{row['recovered']:.3f}" for row in group),
            )
        )
    head = ("merged", "KL to the trained model, nats/token", "top-1 agreement", "delta kept", "right answers")
    return table((*head, "recovered gap"), rows)


STYLE = "recipes/chatterbot_terse.yaml"


def front_lines(recipe: str = FACTS) -> dict[str, list[dict[str, Any]]]:
    """The lines of front.jsonl of a recipe as it is but for the condition, by condition."""
    judged_on = {FACTS: "builtin:facts_phrasings", STYLE: None}[recipe]
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines("front.jsonl"):
        usual = line["judged_on"]["dataset_name"] == judged_on
        if recipe == FACTS:
            usual &= line["told"].get("max_steps", 110) == 110
        if line["recipe"] == recipe and usual:
            found.setdefault(line["condition"], {})[line["seed"]] = line
    return {name: [by_seed[seed] for seed in sorted(by_seed)] for name, by_seed in found.items()}


METHOD_WORDS = {
    "pi": "the PI",
    "bake": "the facts' text alone (`pgkd bake`, its own questions, ten minutes)",
    "sft": "plain SFT on the reference answers",
    "offline": "the PI, no rollouts (`lmbda: 0`)",
    "takeover": "the PI, mixed rollouts (`teacher_takeover: 0.2`)",
    "shuffled": "PI of other rows",
    "no_pi": "no PI",
}


def front_table(recipe: str = FACTS, score: str = "right answers") -> str:
    head = ("trained with", "learning rate", "seeds", score, "recovered gap", "drift, nats/token")
    runs = front_lines(recipe)
    order = sorted(
        runs, key=lambda name: (list(METHOD_WORDS).index(name.split("@")[0]), -runs[name][0]["learning_rate"])
    )
    rows = (
        (
            METHOD_WORDS[name.split("@")[0]],
            f"{runs[name][0]['learning_rate']:.0e}".replace("e-0", "e-"),
            " ".join(str(run["seed"]) for run in runs[name]),
            mean(column(runs[name], "score"), ".3f"),
            mean(column(runs[name], "recovered"), ".2f"),
            mean(column(runs[name], "drift"), ".3f"),
        )
        for name in order
    )
    return table(head, rows) if runs else "Not measured yet."


def style_table() -> str:
    return front_table(STYLE, "answers of at most five words")


def defaults_table() -> str:
    """What a recipe's model, data and columns reach with nothing else said, beside the recipe."""
    named = {"terse": "a style, 208 rows (`chatterbot_terse`)", "siqa": "Social IQa, 386 of its rows (`siqa_cpu`)"}
    single = {line["name"]: line for line in lines("single_runs.jsonl")}
    tuned = {
        "terse": f"{single['terse']['recovered']:.2f}",
        "siqa": mean(column(conditions(SIQA)["pi"], "recovered"), ".2f"),
    }
    head = ("", "base / with the PI / student", "recovered gap", "of the recipe", "steps", "seconds")
    rows = []
    for line in lines("defaults.jsonl"):
        low, high = line["recovered_interval"]
        scores = " / ".join(f"{line[name]:.2f}" for name in ("base", "teacher", "student"))
        gap = f"{line['recovered']:.2f} ({low:.2f} to {high:.2f}, n={line['n']})"
        cells = (scores, gap, tuned[line["name"]], str(line["steps"]), f"{line['seconds']:.0f}")
        rows.append((named[line["name"]], *cells))
    return table(head, rows) if rows else "Not measured yet."


def feedback_table() -> str:
    head = ("seed", "base", "base that reads the feedback", "student, told nothing", "recovered gap", "steps")
    rows = []
    for line in lines("feedback.jsonl"):
        low, high = line["recovered_interval"] or ("–", "–")
        gap = "–" if line["recovered"] is None else f"{line['recovered']:.2f} ({low:.2f} to {high:.2f})"
        scores = [f"{line[name]:.3f}" for name in ("base", "teacher", "score")]
        rows.append((str(line["seed"]), *scores, gap, str(line["steps"])))
    return table(head, rows) if rows else "Not measured yet."


def deploy_table() -> str:
    """The newest line of each type, in the order of size."""
    last = {line["type"]: line for line in lines("deploy.jsonl")}
    head = (
        "GGUF",
        "MB",
        "KL to the trained model, nats/token",
        "top-1 agreement",
        "right by llama.cpp",
        "recovered gap",
    )
    rows = (
        (
            name.upper(),
            f"{line['megabytes']:.0f}",
            f"{line['kl_mean']:.1g}" if line["kl_mean"] < 1e-3 else f"{line['kl_mean']:.3f}",
            f"{100 * line['top1_agreement']:.1f} %",
            f"{line['right'] * line['n']:.0f} of {line['n']}",
            f"{line['recovered']:.2f}",
        )
        for name, line in sorted(last.items(), key=lambda item: -item[1]["megabytes"])
    )
    if not last:
        return "Not measured yet."
    one = next(iter(last.values()))
    trained = ("as trained", "", "", "", f"{one['trained']['student'] * one['n']:.0f} of {one['n']}")
    return table(head, [(*trained, f"{one['trained']['recovered']:.2f}"), *rows])


BLOCKS: dict[str, Callable[[], str]] = {
    "bakes": bakes,
    "bake ablations": bake_ablations,
    "facts controls": facts_controls,
    "siqa controls": siqa_controls,
    "steps": step_table,
    "shared": shared_table,
    "epochs": epochs_table,
    "divergence": divergence_table,
    "export": export_table,
    "front": front_table,
    "style": style_table,
    "defaults": defaults_table,
    "feedback": feedback_table,
    "deploy": deploy_table,
}


def figures() -> dict[str, Any]:
    """Every figure that a sentence has, by the name of its placeholder."""
    demo = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    facts, siqa = conditions(FACTS), conditions(SIQA)
    single = {line["name"]: line for line in lines("single_runs.jsonl")}
    table_of_exports, first = export(), next(iter(STEP_COLUMNS.values()))
    ours, floor = step_lines("pgkd", first), step_lines("floor", first)
    reach = [abs(run["recovered"] - end) for run in siqa["pi"] for end in run["recovered_interval"]]
    values: dict[str, Any] = {
        **{f"demo_{name}": demo[name] for name in ("base", "teacher", "student", "recovered", "n", "drift")},
        "demo_low": demo["recovered_interval"][0],
        "demo_high": demo["recovered_interval"][1],
        "sft_drift_times": statistics.mean(column(facts["sft"], "drift"))
        / statistics.mean(column(facts["pi"], "drift")),
        "export_right": 40 * table_of_exports["trained_score"],
        "export_adapter": table_of_exports["adapter_effect"],
        "merge_gib": lines("merge_memory.jsonl")[-1]["peak_rss_gib"],
        "siqa_reach": max(reach),
    }
    for name, runs in (("facts", facts["pi"]), ("siqa", siqa["pi"])):
        values |= {f"{name}_{key}": statistics.mean(column(runs, key)) for key in ("base", "teacher")}
        values |= {f"{name}_scores": listing(column(runs, "score"), ".3f")}
        values |= {f"{name}_recovered": listing(column(runs, "recovered"), ".2f")}
        values |= {f"{name}_seconds": spread(column(runs, "seconds"), ".0f")}
        values |= {f"{name}_gib": max(run["peak_memory_mib"]["process"] for run in runs) / 1024}
    values["facts_drift"] = spread(column(facts["pi"], "drift"), ".2f")
    for line in single.values():
        values |= {f"{line['name']}_{key}": value for key, value in line.items()}
        if "recovered_interval" in line:
            values |= {f"{line['name']}_{end}": line["recovered_interval"][i] for i, end in enumerate(("low", "high"))}
    vllm = {line["what"] + str(line.get("prompts", "")): line for line in lines("vllm.jsonl")}  # the newest of each
    values["vllm_low"], values["vllm_high"] = (
        min(vllm["ten steps, bf16"]["mismatch"]),
        max(vllm["ten steps, bf16"]["mismatch"]),
    )
    values["vllm_floor"] = vllm["ten steps, bf16"]["floor"]
    values["vllm_same"], values["vllm_base"] = (
        100 * vllm["greedy, bf1612"][name] for name in ("same_tokens", "base_instead")
    )
    values |= {f"vllm_{name}": vllm["tokens/s16"][name] for name in ("server", "merged", "adapter")}
    through = {line["method"]: line for line in divergence_lines() if line["vocab"] == 49152}
    values["trainer_times"] = through["trainer"]["cpu_seconds"] / through["floor"]["cpu_seconds"]
    values["trainer_error"] = 100 * through["trainer"]["gradient_error"]
    for name in ("pgkd", "sdft"):
        values[f"step_{name}"] = spread(
            column(step_lines(name, STEP_COLUMNS["NF4, batch 4, PI 300"]), "seconds"), ".1f"
        )
    (merged,) = (row for row in table_of_exports["rows"] if (row["base"], row["dtype"]) == ("dequantized", "bf16"))
    values["merge_kl"] = f"{merged['kl_mean']:.1e}".replace("e-0", "e-")
    values |= {f"defaults_{line['name']}": line["recovered"] for line in lines("defaults.jsonl")}
    for name, runs in (("ours", ours), ("floor", floor)):
        for part in ("rollout", "teacher", "student"):
            values[f"{name}_{part}"] = spread(column(runs, f"{part}_seconds"), ".1f")
    return values
