"""The real vLLM server, on the CPU: `make vllm` makes its environment and runs this; elsewhere it is left out.

SmolLM2-135M in 16 bits on both sides, the made-up facts. What is measured is appended to
tests/benchmarks/results/vllm.jsonl.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from runs import free_port
from safetensors.torch import load_file, save_file
from vllm_server import PYTHON, RealVLLM

from pgkd_peft import PrivilegedGKDConfig, PrivilegedSelfDistillTrainer
from pgkd_peft.cli.main import main as cli
from pgkd_peft.data.named import load_named
from pgkd_peft.engines.merged import RolloutEngine
from pgkd_peft.engines.proof import RolloutMismatchError
from pgkd_peft.engines.server import RolloutServerError, Sampling
from pgkd_peft.model.demo import demo_model_path
from pgkd_peft.model.load import base_of
from pgkd_peft.rollout import generate
from pgkd_peft.rows import rows_of

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not PYTHON, reason="run by make vllm")]

RESULTS = Path(__file__).parent / "benchmarks" / "results" / "vllm.jsonl"
STEPS = 10
# Greedy, bf16: share of tokens before the first that differs; one near-tie ends a completion. Two runs gave 0.88 and
# 0.82, the base instead of the student 0.31 and 0.32.
SAME_TOKENS = 0.7


@pytest.fixture(scope="module")
def base() -> str:
    return demo_model_path()


@pytest.fixture(scope="module")
def server(base, tmp_path_factory):
    with RealVLLM(base, free_port(), tmp_path_factory.mktemp("server") / "log") as server:
        yield server


def record(**measured: Any) -> None:
    row = {
        "time": time.strftime("%Y-%m-%d %H:%M"),
        **measured,
        "model": "SmolLM2-135M-Instruct",
        "cpu": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": version("peft"),
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(row)


def make(model: str, out: Path, url: str, **settings: Any) -> PrivilegedSelfDistillTrainer:
    common: dict[str, Any] = {
        "rollout_engine": "server",
        "rollout_server_url": [url],
        "base_quantization": "none",
        "privileged_placement": "user",
        "privileged_template": "{question}\nAnswer in one short sentence with this fact: {privileged}",
        "lmbda": 1.0,
        "beta": 0.0,
        "temperature": 1.0,
        "max_new_tokens": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    lora = {} if (Path(model) / "adapter_config.json").is_file() else {"peft_config": LoraConfig(r=16, lora_alpha=32)}
    if lora:
        lora["peft_config"].target_modules = "all-linear"
    return PrivilegedSelfDistillTrainer(
        model=model,
        args=PrivilegedGKDConfig(output_dir=str(out), **{**common, **settings}),
        train_dataset=load_named("builtin:facts"),
        **lora,
    )


def prompts_of(trainer: PrivilegedSelfDistillTrainer, count: int) -> list[list[int]]:
    rows = load_named("builtin:facts_heldout").select(range(count))
    return [row.prompt for row in rows_of(trainer.contexts(list(rows)))]


def same_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Tokens before the first that differs, of all."""
    same = 0
    for a, b in zip(ours, theirs):
        same += next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return same / sum(map(len, ours))


def greedy(trainer: Any, prompts: list[list[int]], which: str) -> list[list[int]]:
    settings = {"max_new_tokens": 20, "stop_ids": trainer.stop_ids, "pad_id": trainer.pad_id}
    with trainer.student_weights() if which == "student" else trainer.teacher.weights() as model:
        return generate(model, prompts, **settings)


def on_server(trainer: Any, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    sampling = Sampling(settings.pop("temperature", 0.0), settings.pop("tokens", 20), frozenset(trainer.stop_ids))
    return [each.ids for each in trainer.servers.write(prompts, list(range(len(prompts))), sampling, **settings)]


@pytest.fixture(scope="module")
def trained(base, server, tmp_path_factory):
    """Ten steps, every one on the server's rollouts."""
    out = tmp_path_factory.mktemp("trained") / "out"
    trainer = make(base, out, server.url)
    names = []
    sync = trainer.servers.sync
    trainer.servers.sync = lambda student: (sync(student), names.append(trainer.servers.name))
    trainer.train()
    trainer.save_model()
    return trainer, out, names


def test_ten_steps_each_proven(trained):
    trainer, _, names = trained
    mismatch = [entry["rollout_mismatch"] for entry in trainer.state.log_history if "rollout_mismatch" in entry]
    assert len(mismatch) == len(set(names)) == STEPS
    assert max(mismatch) <= trainer.proof.tolerance
    moved = sum(float(p.detach().abs().sum()) for n, p in trainer.model.named_parameters() if "lora_B" in n)
    assert moved > 0
    record(
        what="ten steps, bf16",
        mismatch=[round(value, 5) for value in mismatch],
        floor=round(trainer.proof.floor, 5),
        tolerance=round(trainer.proof.tolerance, 5),
        divergence=[round(e["divergence"], 4) for e in trainer.state.log_history if "divergence" in e],
        seconds_rollout=[round(e["seconds_rollout"], 2) for e in trainer.state.log_history if "seconds_rollout" in e],
    )


def test_greedy_answers_are_our_own_in_bf16(trained):
    trainer, _, _ = trained
    prompts = prompts_of(trainer, 12)
    trainer.servers.sync(trainer.model)
    share = same_share(greedy(trainer, prompts, "student"), on_server(trainer, prompts))
    base = same_share(greedy(trainer, prompts, "student"), on_server(trainer, prompts, base=True))
    record(what="greedy, bf16", same_tokens=round(share, 4), base_instead=round(base, 4), prompts=len(prompts))
    assert share >= SAME_TOKENS
    assert base < share


def test_greedy_answers_are_our_own_in_float32(base, trained, tmp_path):
    _, adapter, _ = trained
    with RealVLLM(base, free_port(), tmp_path / "log", dtype="float32") as server:
        exact = {"bf16": False, "model_init_kwargs": {"dtype": "float32"}}
        trainer = make(str(adapter), tmp_path / "out", server.url, **exact)
        prompts = prompts_of(trainer, 12)
        ours, theirs = greedy(trainer, prompts, "student"), on_server(trainer, prompts)
        record(what="greedy, float32", same_tokens=round(same_share(ours, theirs), 4), floor=trainer.proof.floor)
        assert theirs == ours
        assert greedy(trainer, prompts, "teacher") != ours


def test_a_lora_that_is_switched_off_is_caught_within_a_step(base, server, tmp_path):
    """Another request puts an adapter of zeros into the slot that the trainer has filled."""
    trainer = make(base, tmp_path / "out", server.url)
    sync = trainer.servers.sync

    def emptied(student: Any) -> None:
        sync(student)
        if trainer.state.global_step == 5:
            zeros = tmp_path / "zeros"
            shutil.copytree(trainer.servers.folder / trainer.servers.name, zeros)
            path = zeros / "adapter_model.safetensors"
            save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)
            body = {"lora_name": trainer.servers.name, "lora_path": str(zeros), "load_inplace": True}
            trainer.servers.servers[0].call("/v1/load_lora_adapter", body)

    trainer.servers.sync = emptied
    with pytest.raises(RolloutMismatchError, match="They are the base's own") as error:
        trainer.train()
    assert trainer.state.global_step == 5
    record(what="LoRA switched off before step 6", caught_at=trainer.state.global_step + 1, said=str(error.value))


def test_a_server_that_is_killed_in_a_rollout_and_started_again(base, tmp_path):
    server = RealVLLM(base, free_port(), tmp_path / "log").start().wait()
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer = make(base, tmp_path / "out", server.url, **settings)
    call = trainer.servers.servers[0].call

    def killed(path: str, body: Any = None, **options: Any) -> str:
        if trainer.state.global_step == 2 and path == "/v1/completions":
            server.kill()
        return call(path, body, **options)

    trainer.servers.servers[0].call = killed
    with pytest.raises(RolloutServerError, match="checkpoint-2") as error:
        trainer.train()
    with server.start().wait():
        resumed = make(base, tmp_path / "out", server.url, **settings)
        resumed.train(resume_from_checkpoint=True)
    losses = [entry["step"] for entry in resumed.state.log_history if "loss" in entry]
    assert losses == [1, 2, 3, 4]
    said = str(error.value).replace(str(tmp_path), "")
    record(what="killed in the rollout of step 3, resumed", steps=losses, said=said)


def test_speed_beside_our_own_engines(trained):
    trainer, _, _ = trained
    trainer.servers.sync(trainer.model)
    for count in (4, 16):
        prompts = prompts_of(trainer, count)
        seconds: dict[str, float] = {}
        for name in ("server", "merged", "adapter"):
            if name == "server":
                on_server(trainer, prompts, temperature=1.0, tokens=2)
                start = time.perf_counter()
                made = on_server(trainer, prompts, temperature=1.0, tokens=32)
            else:
                dtype = base_of(trainer.model).get_input_embeddings().weight.dtype
                engine = RolloutEngine(trainer.model, name, dtype)
                start = time.perf_counter()
                with engine.model() as model:
                    made = generate(
                        model,
                        prompts,
                        max_new_tokens=32,
                        stop_ids=trainer.stop_ids,
                        pad_id=trainer.pad_id,
                        temperature=1.0,
                    )
            seconds[name] = sum(map(len, made)) / (time.perf_counter() - start)
        record(what="tokens/s", prompts=count, **{name: round(value, 1) for name, value in seconds.items()})


def test_a_bake_whose_questions_a_real_server_writes(base, server, tmp_path):
    """Here the same small model; a larger one is what `--writer_url` is for."""
    out = tmp_path / "run"
    facts = Path(__file__).parents[1] / "examples/bake/facts.md"
    flags = ["--model_name_or_path", base, "--document", str(facts), "--output_dir", str(out), "--questions", "6"]
    flags += ["--anchors", "48", "--dry_run", "true", "--writer_url", f"{server.url}/v1", "--writer_model", base]
    assert cli(["bake", *flags]) == 0
    found = [json.loads(line) for line in (out / "questions.jsonl").read_text("utf-8").splitlines()]
    written = [each for each in found if each["passage"] is not None]
    kept = [each for each in written if each["use"] in ("train", "heldout")]
    assert len({each["passage"] for each in kept}) > 5
    record(what="questions of a bake", written=len(written), kept=len(kept), examples=[q["question"] for q in kept[:3]])
