"""What each way of shipping an adapter keeps: python tests/benchmarks/export_table.py ADAPTER [--prompts FILE]

Measures, against the trained model (adapter on the base as training held it), every base x dtype of a merge, the two
GGUF types, and the model that merging into 4-bit weights gives; prints a markdown table and writes export_table.json.
With --facts (rows with `messages` and `answer`, as in examples/data/facts_heldout.jsonl) also the share of greedy
answers that contain the answer, and with --teacher SCORE the recovered gap from it and from the base's own score.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GgufConfig

from pgkd_peft.data.collator import stop_ids
from pgkd_peft.export.adapter import read_run
from pgkd_peft.export.card import table
from pgkd_peft.export.gguf import write_gguf_model
from pgkd_peft.export.merged_weights import BASES, MergedWeights
from pgkd_peft.export.verify import TrainedModel, read_prompts
from pgkd_peft.export.write import DTYPES, tokenizer_folder, write_checkpoint
from pgkd_peft.model.load import base_of, load_base
from pgkd_peft.rollout import generate


def contains_score(file: str, max_new_tokens: int):
    """Share of greedy answers that contain the row's `answer`, whatever its case."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]

    def score(model: Any, tokenizer: Any) -> float:
        prompts = []
        for row in rows:
            turns = [turn for turn in row["messages"] if turn["role"] != "assistant"]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        stops = stop_ids(tokenizer, base_of(model).generation_config)
        answers = generate(model, prompts, max_new_tokens=max_new_tokens, stop_ids=stops, pad_id=0)
        texts = [tokenizer.decode(ids, skip_special_tokens=True).lower() for ids in answers]
        return sum(row["answer"].lower() in text for row, text in zip(rows, texts)) / len(rows)

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("--prompts", help="to measure on; default: the run's held-out ones, else a neutral set")
    parser.add_argument("--facts", help="JSONL rows to score answers on")
    parser.add_argument("--teacher", type=float, help="score of the base with privileged information on --facts")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("export_table.json"))
    args = parser.parse_args()
    run = read_run(args.adapter)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(run))
    score = contains_score(args.facts, args.max_new_tokens) if args.facts else None
    held = load_base(str(run.base), quantization=run.quantization, dtype=run.dtype) if score else None
    base_score = score(held, tokenizer) if score else None
    del held
    work = Path(tempfile.mkdtemp(prefix="export-table-"))
    rows: list[dict[str, Any]] = []

    def add(name: str, dtype: str, fidelity: Any, **more: Any) -> None:
        row = {"base": name, "dtype": dtype, **fidelity.as_dict(), **more}
        if score is not None and args.teacher is not None and base_score is not None:
            row["recovered"] = (row["score"] - base_score) / (args.teacher - base_score)
        rows.append(row)
        print(json.dumps(row), flush=True)

    try:
        with TrainedModel(
            run, tokenizer, read_prompts(run, args.prompts), max_new_tokens=args.max_new_tokens, score=score
        ) as trained:
            for base in BASES:
                weights = MergedWeights(run, base=base)
                for dtype in DTYPES:
                    started = time.time()
                    cast, four_bit = write_checkpoint(weights, work / dtype, dtype)
                    numbers = {"share": cast.share, "noise": cast.noise, "seconds": time.time() - started}
                    add(base, dtype, trained.measure(work / dtype), **numbers)
                merged_4bit = load_base(str(work / "fp32"), quantization="nf4", dtype=torch.bfloat16)
                merged_4bit.save_pretrained(work / "nf4")
                fidelity = trained.measure(work / "nf4")
                add(f"{base}, merged into nf4", "nf4", fidelity, share=four_bit.share, noise=four_bit.noise)
                for kind in ("f16", "q8_0") if base == "dequantized" else ():
                    file = work / f"{kind}.gguf"
                    rounding = write_gguf_model(weights, tokenizer, file, kind, name="model").rounding
                    gguf = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
                    fidelity = trained.measure(work, config=weights.config, dtype=torch.float32, **gguf)
                    add(base, f"GGUF {kind}", fidelity, rounding=rounding)
                for name in (*DTYPES, "nf4"):
                    shutil.rmtree(work / name)
            facts = {
                "adapter_effect": trained.adapter_effect,
                "arithmetic_floor": trained.arithmetic_floor,
                "base_matches": trained.base_matches,
                "trained_score": trained.score,
                "base_score": base_score,
                "prompts": trained.prompts.source,
            }
    finally:
        shutil.rmtree(work)
    args.out.write_text(json.dumps({"rows": rows, **facts}, indent=2) + "\n", encoding="utf-8")
    columns = ["base", "dtype", "kl_mean", "kl_p99", "kl_max", "top1_agreement", "share", "noise", "score", "recovered"]
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    print("\n" + table(columns, rows) + "\n")
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()))


if __name__ == "__main__":
    main()
