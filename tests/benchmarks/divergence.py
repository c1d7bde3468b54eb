"""The divergence, forward and backward: ours against every peer, each measurement in its own process.

    python tests/benchmarks/divergence.py --quick                       # two settings
    python tests/benchmarks/divergence.py                               # the whole grid; hours on a CPU
    python tests/benchmarks/divergence.py --n 4096 --vocab 151936 --d 4096 --device cuda --chunk-mib 2048

Methods
    floor       the three matrix products alone: both projections, and the gradient of the logits back
    ours        pgkd_peft.divergence.linear_jsd
    trainer     the same inside PrivilegedSelfDistillTrainer.training_step, with all that stands around it there but the
                model: a backbone that returns the rows, under accelerate's wrappers (autocast, outputs in float32)
    gkd         full logits in the head's dtype, then trl's GKDTrainer.generalized_jsd_loss
    gkd_fp32    the same after logits.float(), which is what a trainer with bf16=True hands to that loss
    trl         trl.kernels.chunked_divergence
    liger       liger-kernel's chunked JSD as it is set by default (torch.compile), and liger_eager without a compiler
                (pip install --no-deps liger-kernel)

Student and teacher share a head and lie some tenths of a nat apart. Seconds are the best of several runs after one to
warm up, wall clock, and beside it the processor's; memory is the peak above what is resident before (CUDA: allocated);
errors are against float64 on 64 positions: of the summed divergence, and the worst row's of the gradient (norm of the
difference / norm). One JSON line a measurement is appended to tests/benchmarks/results/divergence.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "divergence.jsonl"
CHECKED = 64  # positions that are compared with float64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="N=512, V=151936 and 49152, d=576, every method")
    parser.add_argument("--method", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--n", type=int, nargs="*", default=[256, 1024, 4096], help="positions")
    parser.add_argument("--vocab", type=int, nargs="*", default=[49_152, 151_936])
    parser.add_argument("--d", type=int, nargs="*", default=[576, 2048, 4096], help="hidden width")
    parser.add_argument("--dtype", nargs="*", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--beta", type=float, nargs="*", default=[0.5])
    parser.add_argument("--chunk-mib", type=float, default=64, help="of ours")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-gib", type=float, help="skip methods that need more memory; default: what is available")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a measurement may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(run_one(json.loads(args.one))), flush=True)
        return
    if args.quick:
        args.n, args.vocab, args.d = [512], [151_936, 49_152], [576]
    for n, vocab, d, dtype, beta in (
        (n, vocab, d, dtype, beta)
        for dtype in args.dtype
        for beta in args.beta
        for d in args.d
        for vocab in args.vocab
        for n in args.n
    ):
        print(f"\nN={n} V={vocab} d={d} {dtype} beta={beta} on {args.device}, {args.threads} threads", flush=True)
        rows: list[dict[str, Any]] = []
        for method in args.method:
            job = {"method": method, "n": n, "vocab": vocab, "d": d, "dtype": dtype, "beta": beta}
            job |= {name: getattr(args, name) for name in ("device", "threads", "repeats", "chunk_mib")}
            rows.append(measure(job, args.max_gib, args.timeout))
            show(rows)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")


def measure(job: dict[str, Any], max_gib: float | None, timeout: float) -> dict[str, Any]:
    """Run one method in a process of its own."""
    need = needed_gib(job)
    if job["device"] == "cpu" and need > (free := available_gib() if max_gib is None else max_gib):
        return {**job, "error": f"left out: needs about {need:.0f} GiB, {free:.0f} are there"}
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TRL_EXPERIMENTAL_SILENCE": "1"}
    command = [sys.executable, __file__, "--one", json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {**job, "error": f"not done after {timeout:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        error = done.stderr.strip().splitlines()
        return {**job, "error": error[-1] if error else f"exit {done.returncode}"}
    return {**job, **json.loads(lines[-1].removeprefix("RESULT "))}


def needed_gib(job: dict[str, Any]) -> float:
    """A rough upper bound of a method's memory, so that a grid does not take the machine down."""
    n, vocab, d = job["n"], job["vocab"], job["d"]
    size = 4 if job["dtype"] == "float32" else 2
    known = {"floor": 2 * size, "gkd": 14 * size, "gkd_fp32": 60, "ours": 0, "trainer": 0, "trl": 0}
    copies = known.get(job["method"], 14 * size)
    tile = min(n, 4096) * 32_768 * 4 * 12 if job["method"] == "trl" else 0
    weight = vocab * d * size * (1 if job["method"] in ("floor", "ours", "trainer", "trl") else 3)
    return (copies * n * vocab + tile + weight) / 2**30 + 1.5


def available_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 2**20
    return float("inf")


def show(rows: list[dict[str, Any]]) -> None:
    row = rows[-1]
    if "error" in row:
        print(f"  {row['method']:<12} {row['error']}", flush=True)
        return
    ratios = ""
    for other in ("floor", "ours"):
        found = [r for r in rows if r["method"] == other and "seconds" in r]
        if found and row["method"] != other:
            ratios += f"  {row['seconds'] / found[0]['seconds']:6.2f} x {other}"
            ratios += f" ({row['cpu_seconds'] / found[0]['cpu_seconds']:.2f})"
    bound = ""
    if row["method"] in ("ours", "trainer"):
        bound = f" (bound {2 * row['chunk_mib'] + row['n'] * row['d'] * 8 / 2**20:.0f})"
    print(
        f"  {row['method']:<12} {row['seconds']:8.3f} s (processor {row['cpu_seconds']:8.3f} s)  "
        f"+{row['extra_mib']:7.0f} MiB{bound}  error of value {row['value_error']:.1e}, of gradient "
        f"{row['gradient_error']:.1e}{ratios}",
        flush=True,
    )


# ---- inside the child process ----------------------------------------------------------------------------------------


def run_one(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(job["threads"])
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, scale: float) -> torch.Tensor:
        values = torch.empty(rows, job["d"], dtype=dtype)
        for part in values.split(4096):
            part.copy_(torch.randn(part.shape, generator=generator) * scale)
        return values.to(device)

    weight = normal(job["vocab"], 3 / job["d"] ** 0.5)
    student = normal(job["n"], 1.0)
    teacher = student + normal(job["n"], 0.3)
    method = METHODS[job["method"]](weight, job)

    def sync() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def run(rows: int) -> tuple[float, torch.Tensor]:
        hidden = student[:rows].clone().requires_grad_()
        value, gradient = method(hidden, teacher[:rows])
        sync()
        return value, gradient

    checked = min(CHECKED, job["n"])
    value, gradient = run(checked)
    expected_value, expected_gradient = reference(student[:checked], teacher[:checked], weight, job["beta"])
    before = reset_peak(device)
    run(job["n"])
    extra = peak(device) - before
    seconds, processor = [], []
    for _ in range(job["repeats"]):
        start, start_processor = time.perf_counter(), time.process_time()
        run(job["n"])
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_processor)
    difference = (gradient.double().cpu() - expected_gradient).norm(dim=-1) / expected_gradient.norm(dim=-1)
    floor = job["method"] == "floor"  # it computes no divergence
    return {
        "seconds": round(min(seconds), 4),
        "seconds_all": [round(s, 4) for s in seconds],
        "cpu_seconds": round(min(processor), 4),
        "extra_mib": round(extra / 2**20, 1),
        "value_error": 0.0 if floor else abs(value / expected_value - 1),
        "gradient_error": 0.0 if floor else difference.max().item(),
        **about_this_machine(),
    }


def reference(student: Any, teacher: Any, weight: Any, beta: float) -> tuple[float, Any]:
    """Summed divergence and its gradient in float64, from probabilities."""
    import torch

    def probabilities(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.double()
        return torch.cat([hidden @ part.double().T for part in weight.split(8192)], dim=-1).softmax(dim=-1)

    s, t = probabilities(student), probabilities(teacher)
    if beta == 0:
        terms, slope = t * (t / s).log(), -t / s
    elif beta == 1:
        terms, slope = s * (s / t).log(), (s / t).log() + 1
    else:
        m = beta * t + (1 - beta) * s
        terms = beta * t * (t / m).log() + (1 - beta) * s * (s / m).log()
        slope = (1 - beta) * (s / m).log()
    gradient = s * (slope - (s * slope).sum(-1, keepdim=True))
    starts = range(0, weight.shape[0], 8192)
    rows = sum(gradient[:, i : i + 8192] @ weight[i : i + 8192].double() for i in starts)
    return terms.sum().item(), rows.cpu()


def reset_peak(device: Any) -> int:
    """Bytes in use now; the peak counts from here."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(device: Any) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status("VmHWM")


def status(field: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])


def about_this_machine() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from pgkd_peft.run.info import device_name, git_revision

    versions = {}
    for name in ("torch", "trl", "liger-kernel"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "machine": device_name(),
        "cpu": cpu,
        "bf16_instructions": torch.cpu._is_avx512_bf16_supported(),
        "versions": versions,
        "git_revision": git_revision(),
        "date": time.strftime("%Y-%m-%d"),
    }


# ---- methods: head and setting -> (student (N, D), teacher (N, D)) -> (summed divergence, gradient (N, D)) -----------

Method = Callable[[Any, Any], tuple[float, Any]]


def floor(weight: Any, job: dict[str, Any]) -> Method:
    def run(student: Any, teacher: Any) -> tuple[float, Any]:
        student = student.detach()
        logits = student @ weight.T
        other = teacher @ weight.T
        gradient = logits @ weight
        return float(other.shape[0]), gradient

    return run


def ours(weight: Any, job: dict[str, Any]) -> Method:
    from pgkd_peft.divergence import linear_jsd

    def run(student: Any, teacher: Any) -> tuple[float, Any]:
        loss = linear_jsd(student, teacher, weight, beta=job["beta"], chunk_mib=job["chunk_mib"]).divergence.sum()
        loss.backward()
        return loss.item(), student.grad

    return run


def trainer(weight: Any, job: dict[str, Any]) -> Method:
    import tempfile

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_outputs import BaseModelOutputWithPast

    from pgkd_peft import PrivilegedGKDConfig, PrivilegedSelfDistillTrainer

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny import ROWS, byte_tokenizer

    vocab, width = weight.shape
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=8, num_hidden_layers=1, tie_word_embeddings=True
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device=weight.device).to(weight.dtype)
    model.model.embed_tokens.weight = model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    for parameter in model.model.layers.parameters():
        torch.nn.init.ones_(parameter)
    trainer = PrivilegedSelfDistillTrainer(
        model=model,
        args=PrivilegedGKDConfig(
            output_dir=tempfile.mkdtemp(),
            lmbda=0.0,
            beta=job["beta"],
            normalize_beta=False,  # what is compared is the plain divergence
            loss_chunk_mib=job["chunk_mib"],
            bf16=job["dtype"] == "bfloat16",
            fp16=job["dtype"] == "float16",
            use_cpu=job["device"] == "cpu",
            gradient_checkpointing=False,
            per_device_train_batch_size=1,
            report_to="none",
        ),
        train_dataset=ROWS,
        processing_class=byte_tokenizer(),
    )
    prepared = trainer.accelerator.prepare_model(trainer.model)
    rows: dict[bool, Any] = {}

    def backbone(input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        hidden = rows[torch.is_grad_enabled()]  # (N, D); the teacher's without gradient
        before = hidden.new_zeros(input_ids.shape[1] - hidden.shape[0] - 1, width)
        return BaseModelOutputWithPast(last_hidden_state=torch.cat([before, hidden, hidden.new_zeros(1, width)])[None])

    model.model.forward = backbone

    def run(student: Any, teacher: Any) -> tuple[float, Any]:
        rows.update({True: student, False: teacher})
        prompt, completion = (torch.full((1, n), 10) for n in (4, len(student)))
        batch = {"prompts": prompt, "teacher_prompts": prompt, "completions": completion}
        for name in ("prompt", "teacher_prompt"):
            batch[f"{name}_attention_mask"] = torch.ones_like(prompt)
        batch["completion_mask"] = torch.ones_like(completion)
        loss = trainer.training_step(prepared, batch)  # the mean over positions, and so is the gradient
        scale = len(student) / (trainer.accelerator.scaler.get_scale() if job["dtype"] == "float16" else 1)
        return loss.item() * len(student), student.grad.float() * scale

    return run


def gkd(weight: Any, job: dict[str, Any], fp32: bool = False) -> Method:
    import torch
    from trl.experimental.gkd import GKDTrainer

    def run(student: Any, teacher: Any) -> tuple[float, Any]:
        logits = student @ weight.T
        with torch.no_grad():
            other = teacher @ weight.T
        if fp32:
            logits, other = logits.float(), other.float()
        loss = GKDTrainer.generalized_jsd_loss(logits[None], other[None], beta=job["beta"], reduction="sum")
        loss.backward()
        return loss.item(), student.grad

    return run


def gkd_fp32(weight: Any, job: dict[str, Any]) -> Method:
    return gkd(weight, job, fp32=True)


def trl(weight: Any, job: dict[str, Any]) -> Method:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run(student: Any, teacher: Any) -> tuple[float, Any]:
        loss = ChunkedDivergenceFunction.apply(student, weight, None, teacher, weight, None, job["beta"])[0].sum()
        loss.backward()
        return loss.item(), student.grad

    return run


def liger(weight: Any, job: dict[str, Any], compiled: bool = True) -> Method:
    import torch

    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        raise SystemExit(f"not installed ({error})") from None
    loss_of = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=job["beta"], compiled=compiled)

    def run(student: Any, teacher: Any) -> tuple[float, Any]:
        rows = student.shape[0]
        labels = torch.zeros(rows, dtype=torch.long, device=student.device)
        loss = loss_of(student, weight, teacher, weight, labels) * rows  # it returns the mean
        loss.backward()
        return loss.item(), student.grad

    return run


def liger_eager(weight: Any, job: dict[str, Any]) -> Method:
    return liger(weight, job, compiled=False)


METHODS = {m.__name__: m for m in (floor, ours, trainer, gkd, gkd_fp32, trl, liger, liger_eager)}

if __name__ == "__main__":
    main()
