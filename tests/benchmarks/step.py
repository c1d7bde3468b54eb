"""Whole optimizer steps: ours against TRL's trainers on the same work, each in its own process.

    python tests/benchmarks/step.py --quick                     # one setting, every trainer
    python tests/benchmarks/step.py                             # batch 4 and 8, bf16 and NF4, num_generations 4
    python tests/benchmarks/step.py --model qwen-7b --device cuda --new-tokens 512 --privileged-tokens 1024
    python tests/benchmarks/step.py --shared 50 1500 6000 --batch 8 --quantization none \\
        --trainer pgkd pgkd-no-cache sdft floor
    python tests/benchmarks/step.py --epochs 3 --rows 24 --privileged-tokens 1000 --batch 8 --quantization none \\
        --trainer pgkd pgkd-no-cache sdft

Same work: the same prompts, PI where the trainer knows PI (GKDTrainer and DistillationTrainer do not, so they do less),
exactly `--new-tokens` sampled tokens a row, LoRA r=16 on all linear layers, the same base dtype and quantization (the
guard of pgkd_peft.model.cpu for everyone on CPU), AdamW, no clipping. Time is from the end of one optimizer step to
the end of the next, the first left out; memory is the peak resident set of the process (CUDA: peak allocated).
`floor` is no trainer but the bare matrix products of a step of ours on dense 16-bit weights, phase by phase; it reads a
shared PI once. One JSON line a run is appended to tests/benchmarks/results/step.jsonl.

`--shared N` gives all rows one PI of N words in the system turn (for SDFT: its privileged context). `--epochs` comes to
the same rows again, each with a PI of its own, and reports the mean seconds of a step epoch by epoch, for ours the
teacher's seconds too. `pgkd-no-cache` is ours reading every prompt whole, as it was before prompts were read once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "step.jsonl"
TRAINERS = ("pgkd", "pgkd-no-cache", "floor", "gkd", "gkd-no-checkpointing", "sdft", "distillation")
SHAPES = {  # Qwen2.5's architecture configs, random weights: speed and memory do not depend on what a model knows
    "qwen-1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "qwen-7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 4, bf16, three steps")
    parser.add_argument("--trainer", nargs="*", default=list(TRAINERS), choices=TRAINERS)
    parser.add_argument("--model", default="smollm2-135m", choices=["smollm2-135m", *SHAPES])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--quantization", nargs="*", default=["none", "nf4"], choices=["none", "nf4"])
    parser.add_argument("--generations", type=int, nargs="*", default=[1])
    parser.add_argument("--prompt-tokens", type=int, default=60)
    parser.add_argument("--privileged-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--shared", type=int, nargs="*", default=[0], help="words of one PI for all rows; 0: one each")
    parser.add_argument("--epochs", type=int, default=1, help="times that the same rows come; steps follow from --rows")
    parser.add_argument("--rows", type=int, default=24, help="rows of an epoch, with --epochs")
    parser.add_argument("--checkpointing", action="store_true", help="ours and SDFT with gradient checkpointing")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(run_one(json.loads(args.one))), flush=True)
        return
    if args.quick:
        args.batch, args.quantization, args.steps = [4], ["none"], 3
    rows = []
    for quantization in args.quantization:
        for batch in args.batch:
            for generations in args.generations:
                for shared, trainer in itertools.product(args.shared, args.trainer):
                    if generations > 1 and trainer not in ("pgkd", "pgkd-no-cache", "floor", "sdft"):
                        continue
                    row = measure(setting(args, trainer, quantization, batch, generations, shared))
                    rows.append(row)
                    show(rows)
                    RESULTS.parent.mkdir(exist_ok=True)
                    with RESULTS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")


def setting(
    args: argparse.Namespace, trainer: str, quantization: str, batch: int, generations: int, shared: int
) -> dict[str, Any]:
    names = ("model", "device", "prompt_tokens", "privileged_tokens", "new_tokens", "steps", "checkpointing", "threads")
    return {
        "trainer": trainer,
        "quantization": quantization,
        "batch": batch,
        "generations": generations,
        "shared": shared,
        "epochs": args.epochs,
        **{name: getattr(args, name) for name in names},
        **({"steps": args.epochs * -(-args.rows // batch), "rows": args.rows} if args.epochs > 1 else {}),
    }


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run one trainer in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TRL_EXPERIMENTAL_SILENCE": "1"}
    command = [sys.executable, __file__, "--one", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {
            **job,
            "error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}",
        }
    return {**job, **json.loads(lines[-1].removeprefix("RESULT "))}


def show(rows: list[dict[str, Any]]) -> None:
    """The last row as a table line, with its ratio to ours in the same setting."""
    row = rows[-1]
    same = ("quantization", "batch", "generations", "shared", "epochs")
    ours = [r for r in rows if r["trainer"] == "pgkd" and all(r[k] == row[k] for k in same) and "seconds" in r]
    where = f"{row['quantization']:<5} batch {row['batch']}" + (f", {row['shared']} shared" if row["shared"] else "")
    if "error" in row:
        print(f"{row['trainer']:<22} {where}  {row['error']}", flush=True)
        return
    ratio = row["seconds"] / ours[-1]["seconds"] if ours else 1.0
    print(
        f"{row['trainer']:<22} {where} x {row['generations']}  "
        f"{row['seconds']:7.2f} s/step ({ratio:5.1f}x ours)  {row['tokens_per_second']:7.1f} tokens/s  "
        f"peak {row['peak_mib']:7.0f} MiB  rollout {row['rollout_seconds']:.2f} s"
        + "".join(f"  {p} {row[f'{p}_seconds']:.2f} s" for p in ("teacher", "student") if f"{p}_seconds" in row)
        + (f"  epoch by epoch {row['seconds_by_epoch']}" if "seconds_by_epoch" in row else ""),
        flush=True,
    )


# ---- inside the child process --------------------------------------------------------------------------------------


def run_one(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(job["threads"])
    path = model_path(job["model"])
    if job["trainer"] == "floor":
        return {**floor(path, job), **environment_of(job)}
    with tempfile.TemporaryDirectory() as scratch:
        trainer, generated = BUILDERS[job["trainer"]](path, job, scratch)
        ticks = count_steps(trainer)
        if job["trainer"] == "pgkd-no-cache":
            read_everything(trainer)
        trainer.train()
        seconds = [later - earlier for earlier, later in itertools.pairwise(ticks)]
        rows = job["batch"] * job["generations"]
        median = statistics.median(seconds)
        result: dict[str, Any] = {
            "seconds": round(median, 3),
            "seconds_all": [round(s, 3) for s in seconds],
            "tokens_per_second": round(rows * job["new_tokens"] / median, 1),
            "rollout_seconds": round(generated(), 3),
            "peak_mib": round(peak_mib(job["device"]), 1),
        }
        if job["epochs"] > 1:
            # the first step has no beginning; its epoch counts without it
            an_epoch = job["steps"] // job["epochs"]
            cuts = [0, *(an_epoch * (i + 1) - 1 for i in range(job["epochs"]))]
            result["seconds_by_epoch"] = [round(statistics.mean(seconds[a:b]), 3) for a, b in itertools.pairwise(cuts)]
        if job["trainer"].startswith("pgkd"):
            logs = [entry for entry in trainer.state.log_history if "seconds_student" in entry]
            if job["epochs"] > 1:
                parts = [logs[i * an_epoch : (i + 1) * an_epoch] for i in range(job["epochs"])]
                result["teacher_seconds_by_epoch"] = [
                    round(sum(entry["seconds_teacher"] for entry in part), 3) for part in parts
                ]
            logs = logs[1:]
            for phase in ("rollout", "teacher", "student"):
                values = [entry[f"seconds_{phase}"] for entry in logs]
                result[f"{phase}_seconds"] = round(statistics.median(values), 3)
            result["completion_length"] = logs[-1]["completion_length"]
    return {**result, **environment_of(job)}


def read_everything(trainer: Any) -> None:
    """Ours without what is read once: every prompt of every row anew."""
    from pgkd_peft import rollout, scoring

    trainer.memory = None
    for module in (scoring, rollout):
        module.why_not_shared = lambda model: "the benchmark says so"


def floor(path: str, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the matrix products that a step of ours cannot do without; attention and everything else left out."""
    import torch
    from torch import nn

    model = base_model(path, {**job, "quantization": "none"})
    top = model.get_output_embeddings()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not top]
    rows, new = job["batch"] * job["generations"], job["new_tokens"]
    prompt, privileged = job["batch"] * job["prompt_tokens"], job["batch"] * job["privileged_tokens"]

    def through(tokens: int, *, back: bool = False) -> None:
        for w in weights:
            blank = w.new_ones(tokens, w.shape[0 if back else 1])
            torch.mm(blank, w if back else w.t())

    def head(tokens: int, times: int = 1) -> None:
        for _ in range(times):
            torch.mm(top.weight.new_ones(tokens, top.weight.shape[1]), top.weight.t())

    def rollout() -> None:
        through(prompt)
        for _ in range(new):
            head(rows)
            through(rows)

    def teacher() -> None:
        through(prompt + (0 if job["shared"] else privileged) + rows * new)  # a shared PI was read before

    def student() -> None:
        tokens = rows * (job["prompt_tokens"] + new)
        through(tokens)
        through(tokens, back=True)
        head(rows * new, times=3)  # both sides, and the gradient back

    seconds: dict[str, float] = {}
    for phase in (rollout, teacher, student):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            with torch.no_grad():
                phase()
            if job["device"] == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds[f"{phase.__name__}_seconds"] = round(statistics.median(times), 3)
    total = sum(seconds.values())
    return {
        "seconds": round(total, 3),
        "tokens_per_second": round(rows * new / total, 1),
        "peak_mib": round(peak_mib(job["device"]), 1),
        **seconds,
    }


def environment_of(job: dict[str, Any]) -> dict[str, Any]:
    from importlib.metadata import version

    from pgkd_peft.run.info import device_name, git_revision

    names = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    return {
        "machine": device_name(),
        "versions": {name: version(name) for name in names},
        "git_revision": git_revision(),
        "date": time.strftime("%Y-%m-%d"),
    }


def model_path(name: str) -> str:
    from pgkd_peft.model.demo import cache_dir, demo_model_path

    demo = demo_model_path()
    if name == "smollm2-135m":
        return demo
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    target = cache_dir() / f"random-{name}"
    if not (target / "config.json").is_file():
        import torch

        heads = {"num_key_value_heads": 4 if name == "qwen-7b" else 2}
        config = Qwen2Config(vocab_size=152_064, tie_word_embeddings=name != "qwen-7b", **SHAPES[name], **heads)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # where numbers are drawn in no time
            model = Qwen2ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        model.generation_config.eos_token_id = 2
        AutoTokenizer.from_pretrained(demo).save_pretrained(target)
        model.save_pretrained(target)
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return str(target)


def texts(job: dict[str, Any], tokenizer: Any) -> list[tuple[str, str]]:
    """(question, PI) for each prompt of a step: real words, cut to about the asked number of tokens."""
    words = ["the", "river", "town", "keeps", "a", "record", "of", "each", "winter", "flood", "and", "every", "bridge"]

    def text(start: int, tokens: int) -> str:
        out = [words[(start + i) % len(words)] for i in range(tokens)]
        return tokenizer.decode(tokenizer(" ".join(out), add_special_tokens=False)["input_ids"][:tokens])

    overhead = 35  # the template's own turns
    count = job.get("rows") or job["batch"] * job["steps"]
    shared = " ".join(words[(i * i) % len(words)] for i in range(job["shared"]))
    return [
        (f"{i}. " + text(i, job["prompt_tokens"] - overhead), shared or f"{i}. " + text(i, job["privileged_tokens"]))
        for i in range(count)
    ]


def common(job: dict[str, Any], scratch: str) -> dict[str, Any]:
    return {
        "output_dir": scratch,
        "max_steps": job["steps"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-5,
        "use_cpu": job["device"] == "cpu",
    }


def base_model(path: str, job: dict[str, Any]) -> Any:
    from pgkd_peft.model.load import load_base

    return load_base(path, quantization=job["quantization"], device=job["device"])


def timed_generate(trainer: Any, steps: int) -> Any:
    """Seconds a step that a TRL trainer spends in `generate`, the first call left out."""
    spent: list[float] = []
    for model in {id(m): m for m in (trainer.model, trainer.model.get_base_model())}.values():
        inner = model.generate

        def generate(*args: Any, _inner: Any = inner, _outer: bool = model is trainer.model, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = _inner(*args, **kwargs)
            if _outer:
                spent.append(time.perf_counter() - start)
            return out

        model.generate = generate
    return lambda: sum(spent[1:]) / max(1, steps - 1)


def build_pgkd(path: str, job: dict[str, Any], scratch: str) -> tuple[Any, Any]:
    from datasets import Dataset

    from pgkd_peft import PrivilegedGKDConfig, PrivilegedSelfDistillTrainer
    from pgkd_peft.model.load import load_tokenizer

    tokenizer = load_tokenizer(path)
    rows = [
        {"messages": [{"role": "user", "content": q}], "privileged_messages": [{"role": "user", "content": pi}]}
        for q, pi in texts(job, tokenizer)
    ]
    args = PrivilegedGKDConfig(
        **common(job, scratch),
        lmbda=1.0,
        temperature=1.0,
        per_device_train_batch_size=job["batch"],
        num_generations=job["generations"],
        max_new_tokens=job["new_tokens"],
        max_privileged_length=max(job["privileged_tokens"] + 8, 4 * job["shared"]),
        privileged_placement="system" if job["shared"] else "messages",
        gradient_checkpointing=job["checkpointing"],
        base_quantization=job["quantization"],
    )
    trainer = PrivilegedSelfDistillTrainer(model=path, args=args, train_dataset=Dataset.from_list(rows))
    trainer.stop_ids = []  # every row samples exactly max_new_tokens
    return trainer, lambda: 0.0


def build_gkd(path: str, job: dict[str, Any], scratch: str) -> tuple[Any, Any]:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from pgkd_peft.model.load import default_lora, load_tokenizer

    tokenizer = load_tokenizer(path)
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "Yes."}]}
        for q, _ in texts(job, tokenizer)
    ]
    extra = {"gradient_checkpointing": False} if job["trainer"] == "gkd-no-checkpointing" else {}
    args = GKDConfig(
        **common(job, scratch),
        lmbda=1.0,
        temperature=0.99,  # 1.0 only prints advice
        per_device_train_batch_size=job["batch"],
        max_new_tokens=job["new_tokens"],
        max_length=1024 + job["privileged_tokens"],
        **extra,
    )
    trainer = GKDTrainer(
        model=base_model(path, job),
        teacher_model=base_model(path, job),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=default_lora(),
    )
    trainer.generation_config.min_new_tokens = job["new_tokens"]
    trainer.generation_kwargs["min_new_tokens"] = job["new_tokens"]
    return trainer, timed_generate(trainer, job["steps"])


def build_sdft(path: str, job: dict[str, Any], scratch: str) -> tuple[Any, Any]:
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    from pgkd_peft.model.load import default_lora, load_tokenizer

    tokenizer = load_tokenizer(path)
    rows = [{"prompt": [{"role": "user", "content": q}], "privileged_context": pi} for q, pi in texts(job, tokenizer)]
    args = SDFTConfig(
        **common(job, scratch),
        per_device_train_batch_size=job["batch"],
        gradient_accumulation_steps=job["generations"],  # batch prompts x generations rows a step, `batch` at a time
        num_generations=job["generations"],
        max_completion_length=job["new_tokens"],
        max_prompt_length=None,
        temperature=1.0,
        teacher_model_kind="base",
        distillation_mode="full_logits",
        gradient_checkpointing=job["checkpointing"],
        generation_kwargs={"min_new_tokens": job["new_tokens"]},
    )
    trainer = SDFTTrainer(
        model=base_model(path, job),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=default_lora(),
    )
    return trainer, timed_generate(trainer, job["steps"])


def build_distillation(path: str, job: dict[str, Any], scratch: str) -> tuple[Any, Any]:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    from pgkd_peft.model.load import default_lora, load_tokenizer

    tokenizer = load_tokenizer(path)
    rows = [{"prompt": [{"role": "user", "content": q}]} for q, _ in texts(job, tokenizer)]
    args = DistillationConfig(
        **common(job, scratch),
        per_device_train_batch_size=job["batch"],
        max_completion_length=job["new_tokens"],
        temperature=1.0,
        beta=0.5,
        gradient_checkpointing=job["checkpointing"],
        generation_kwargs={"min_new_tokens": job["new_tokens"]},
    )
    trainer = DistillationTrainer(
        model=base_model(path, job),
        teacher_model=base_model(path, job),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=default_lora(),
    )
    return trainer, timed_generate(trainer, job["steps"])


BUILDERS = {
    "pgkd": build_pgkd,
    "pgkd-no-cache": build_pgkd,
    "gkd": build_gkd,
    "gkd-no-checkpointing": build_gkd,
    "sdft": build_sdft,
    "distillation": build_distillation,
}


def count_steps(trainer: Any) -> list[float]:
    """The times at which optimizer steps end."""
    from transformers import TrainerCallback

    ticks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ticks.append(time.perf_counter())

    trainer.add_callback(Clock())
    return ticks


def peak_mib(device: str) -> float:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
