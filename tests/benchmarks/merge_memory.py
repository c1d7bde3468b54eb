"""Peak memory of merging a 7B-shaped model: python tests/benchmarks/merge_memory.py [--layers N] [--folder DIR]

Writes a random Llama-2-7B-shaped bf16 checkpoint and a random rank-16 adapter (needs 27 GB of disk for both models,
removed at the end), merges in a process of its own, without the verification, which would load both models whole, and
prints and appends peak resident memory and time. Every layer holds the same random numbers: merging does not care.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results" / "merge_memory.jsonl"
WIDTH, INNER, HEADS, VOCAB, RANK = 4096, 11008, 32, 32000, 16
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
CHILD = """
import json, resource, sys, time
import torch
torch.set_num_threads(int(sys.argv[3]))
from pgkd_peft.export.merge import merge_adapter
imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.time()
report = merge_adapter(sys.argv[1], sys.argv[2], verify=False, log=lambda line: print(line, file=sys.stderr))
print(json.dumps({
    "seconds": time.time() - started,
    "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "rss_after_imports_gib": imported / 2**20,
    "surviving_share": report.surviving_share,
    "four_bit_share": report.four_bit_share,
}))
"""


def write_base(folder: Path, layers: int) -> float:
    """A checkpoint with one shard a layer and one for the rest; returns its size in billions of parameters."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    random = {
        name: torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16) for name, shape in SHAPES.items()
    }
    norm = torch.ones(WIDTH, dtype=torch.bfloat16)
    weight_map = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> int:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        return sum(t.numel() for t in tensors.values())

    parameters = 0
    for i in range(layers):
        tensors = {f"model.layers.{i}.{name}.weight": weight for name, weight in random.items()}
        tensors |= {
            f"model.layers.{i}.{n}.weight": norm.clone() for n in ("input_layernorm", "post_attention_layernorm")
        }
        parameters += save(f"model-{i:05d}.safetensors", tensors)
    head = torch.randn(VOCAB, WIDTH, generator=generator).mul_(0.02).to(torch.bfloat16)
    rest = {"model.embed_tokens.weight": head, "lm_head.weight": head.clone(), "model.norm.weight": norm.clone()}
    parameters += save("model-rest.safetensors", rest)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return parameters / 1e9


def write_adapter(folder: Path, base: Path, layers: int) -> None:
    folder.mkdir()
    tensors = {}
    for i in range(layers):
        for name, (rows, columns) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns) * 0.01
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK) * 0.002
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": [name.split(".")[1] for name in SHAPES],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps({"base_quantization": "nf4", "compute_dtype": "bfloat16"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of 32; memory hardly depends on it, time does")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where there is room (default: a temporary directory)")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="merge-memory-", dir=args.folder))
    try:
        billions = write_base(work / "base", args.layers)
        write_adapter(work / "run", work / "base", args.layers)
        command = [sys.executable, "-c", CHILD, str(work / "run"), str(work / "out"), str(args.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        size = sum(path.stat().st_size for path in (work / "out").glob("*.safetensors"))
    finally:
        shutil.rmtree(work)
    row = {
        "date": time.strftime("%Y-%m-%d"),
        "parameters_billion": round(billions, 2),
        "layers": args.layers,
        "output_gb": round(size / 1e9, 2),
        "threads": args.threads,
        "machine": platform.processor() or platform.machine(),
        "torch": version("torch"),
        "bitsandbytes": version("bitsandbytes"),
        **json.loads(done.stdout.splitlines()[-1]),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=2))
    assert row["peak_rss_gib"] < 6, "merging a 7B must stay under 6 GB"


if __name__ == "__main__":
    main()
