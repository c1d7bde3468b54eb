"""What llama.cpp answers with an exported adapter: python tests/benchmarks/deploy.py RUN [--types f16 q4_k_m]

Exports the run (a folder that `pgkd demo` wrote) as a merged GGUF of each type, each measured against the trained model
by the export itself (KL, top-1, recovered gap in nats), then lets llama.cpp (xllamacpp's server, the file's own chat
template, greedy) answer the demo's 40 held-out questions, and counts what is right as `pgkd eval` does. One JSON line a
type is appended to results/deploy.jsonl. Needs: pip install gguf xllamacpp, and for K-quants llama-cpp-py-sync or
llama.cpp's llama-quantize.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pgkd_peft.data.named import load_named
from pgkd_peft.evaluation.answers import recovered_gap
from pgkd_peft.evaluation.scorers import make_scorer
from pgkd_peft.export.card import table
from pgkd_peft.export.publish import GGUF_TYPES, export_adapter
from pgkd_peft.run.info import device_name

RESULTS = Path(__file__).parent / "results" / "deploy.jsonl"


def answers_of(file: Path, rows: list[dict[str, Any]], max_new_tokens: int, threads: int) -> list[str]:
    """What llama.cpp answers to the rows' questions, greedily."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.port = 512, 1, 0
    params.cpuparams.n_threads = threads
    server = xllamacpp.Server(params)
    answers = []
    for row in rows:
        turns = [turn for turn in row["messages"] if turn["role"] != "assistant"]
        request = {"messages": turns, "max_tokens": max_new_tokens, "temperature": 0.0, "cache_prompt": False}
        answer = server.handle_chat_completions(request)
        answers.append(answer["choices"][0]["message"]["content"])
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q5_k_m", "q4_k_m"], choices=GGUF_TYPES)
    parser.add_argument("--dataset", default="builtin:facts_heldout")
    parser.add_argument("--prompts", help="what the export measures on; default: the run's own held-out rows")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    rows = list(load_named(args.dataset))
    scorer = make_scorer("contains")
    judged = json.loads((Path(args.run) / "summary.json").read_text(encoding="utf-8"))
    lines = []
    for kind in args.types:
        with tempfile.TemporaryDirectory(prefix="deploy-") as folder:
            file = Path(folder) / f"{kind}.gguf"
            report = export_adapter(
                args.run, str(file), format="gguf", gguf_type=kind, prompts=args.prompts, tolerance=10.0
            )
            answers = answers_of(file, rows, args.max_new_tokens, args.threads)
        right = [scorer(answer, row) for answer, row in zip(answers, rows, strict=True)]
        score = sum(right) / len(right)
        assert report.fidelity is not None
        line = {
            "type": kind,
            "megabytes": round((report.bytes or 0) / 1e6, 1),
            "matrices": report.types,
            "rounding": report.rounding,
            **{name: report.fidelity[name] for name in ("kl_mean", "kl_p99", "top1_agreement", "tokens")},
            "recovered_nats": report.fidelity["recovered"],
            "recovered_nats_trained": report.trained["recovered"],
            "right": score,
            "n": len(rows),
            "recovered": recovered_gap(judged["base"], judged["teacher"], score),
            "trained": {name: judged[name] for name in ("base", "teacher", "student", "recovered")},
            "device": device_name(),
            "versions": {name: version(name) for name in ("torch", "transformers", "gguf", "xllamacpp")},
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }
        lines.append(line)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
    columns = ["type", "megabytes", "kl_mean", "top1_agreement", "recovered_nats", "right", "recovered"]
    print("\n" + table(columns, lines))


if __name__ == "__main__":
    main()
