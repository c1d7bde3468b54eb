"""What each architecture of zoo.py must pass: our numbers against the library's own model, one unpadded row at a time.

The oracle is a plain Transformers model of the same files with the LoRA added to its weights by hand (of a quantized
base: with the weights that bitsandbytes' own function gives back). Everything is float32, so errors are those of
rounding, or faults.

    python tests/zoo_checks.py [NAME ...]     checks, prints, and writes tests/benchmarks/results/zoo.jsonl
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import random
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
import zoo
from conftest import perturb
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from pgkd_peft import conformance, rollout
from pgkd_peft.engines.merged import MergedCopy, not_mergeable
from pgkd_peft.errors import PGKDError
from pgkd_peft.export.merge import merge_adapter
from pgkd_peft.model.adapters import adapter_state
from pgkd_peft.model.architecture import auto_class, fused_experts, lora_targets, shares
from pgkd_peft.model.caches import why_not_shared
from pgkd_peft.model.load import base_of
from pgkd_peft.prefix import SHORTEST, TeacherMemory
from pgkd_peft.rollout import generate, window_generator
from pgkd_peft.rows import Row
from pgkd_peft.scoring import score_teacher

RESULTS = Path(__file__).parent / "benchmarks" / "results" / "zoo.jsonl"
NEW = 8  # tokens of a rollout


def ids(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(6, 260), k=count)


def some_rows() -> list[Row]:
    """Rows of many lengths: two behind one system prompt, one by itself, one without PI."""
    system = ids(SHORTEST + 9, 1)
    return [
        Row(ids(5, 2), system + ids(7, 3), ids(6, 4), True, 0),
        Row(ids(23, 5), system + ids(3, 6), ids(9, 7), True, 0),
        Row(ids(9, 8), ids(14, 9), ids(4, 10), True, 0),
        Row(ids(30, 11), ids(30, 11), ids(5, 12), False, 0),
    ]


# ---- the oracle ------------------------------------------------------------------------------------------------------


def plain_model(path: str, student: nn.Module, *, lora: bool) -> nn.Module:
    """The library's model of these files, in float32 and eval mode, with the student's LoRA added to its weights."""
    model = auto_class(transformers.AutoConfig.from_pretrained(path)).from_pretrained(path, dtype=torch.float32).eval()
    for name, module in base_of(student).named_modules():
        inner = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if name.endswith("base_layer") or not isinstance(module, (LoraLayer, bnb.nn.Linear4bit)):
            continue
        plain = model.get_submodule(name)
        turned = isinstance(plain, Conv1D)
        with torch.no_grad():
            if isinstance(inner, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(inner.weight.data, inner.weight.quant_state).float()
                plain.weight.copy_(weight.T if turned else weight)
            if isinstance(module, LoraLayer) and lora:
                delta = module.scaling["default"] * (module.lora_B["default"].weight @ module.lora_A["default"].weight)
                plain.weight.add_(delta.T if turned else delta)
    return model.requires_grad_(False)


def plain_logits(model: nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """(C, V) in float64, of one unpadded forward."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].double()


def plain_rollout(model: nn.Module, prompt: list[int], uniforms: torch.Tensor, stops: set[int]) -> list[int]:
    """Sampled at temperature 1 by a plain loop, the whole row read anew for every token."""
    out: list[int] = []
    with torch.no_grad():
        while len(out) < NEW and not (out and out[-1] in stops):
            last = model(input_ids=torch.tensor([prompt + out]), use_cache=False).logits[0, -1].double()
            running = last.softmax(-1).cumsum(-1)
            out.append(int((running <= uniforms[len(out)] * running[-1]).sum()))
    return out


def plain_jsd(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """beta*KL(T||M) + (1-beta)*KL(S||M) of each row of logits, from probabilities."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    middle = beta * q + (1 - beta) * p
    return (beta * q * (q / middle).log() + (1 - beta) * p * (p / middle).log()).sum(-1)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


# ---- the checks ------------------------------------------------------------------------------------------------------


class Checked:
    """One architecture, saved in `folder`; `done` holds what each check found: "ok", or why not."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.done: dict[str, str] = {}
        self.facts: dict[str, Any] = {"name": name, "kind": next(k for k, group in zoo.KINDS.items() if name in group)}
        self.base = zoo.save(name, folder / "base")
        self.trainer: Any = None

    def check(self, what: str, function: Callable[[], str | None]) -> bool:
        """Run one check and note how it went; True if it is passed."""
        try:
            self.done[what] = function() or "ok"
        except PGKDError as error:
            self.done[what] = f"refused: {str(error).splitlines()[0]}"
        except AssertionError as error:
            self.done[what] = f"WRONG: {str(error).splitlines()[0]}"
        except Exception as error:  # the table is of whatever happens
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = str(error).splitlines()[0] if str(error) else ""
            self.done[what] = f"CRASH: {type(error).__name__}: {said} ({Path(where.filename).name}:{where.lineno})"
            self.trace = traceback.format_exc()
        return self.done[what] == "ok"

    def run(self) -> None:
        if not self.check("start", lambda: self.start("none")):
            return
        self.numbers("")
        self.check("training", self.training)
        self.check("peft", self.peft)
        self.check("merge", lambda: self.merge("none", "original"))
        if self.check("start nf4", lambda: self.start("nf4")):
            self.numbers(" nf4")
            self.check("training nf4", self.training_nf4)
            self.check("merge nf4", lambda: self.merge("nf4", "dequantized"))

    def numbers(self, which: str) -> None:
        student = self.trainer.model
        self.check("null" + which, self.null)
        perturb(student, 0.05)
        self.teacher_plain = plain_model(self.base, student, lora=False)
        self.student_plain = plain_model(self.base, student, lora=True)
        self.check("aligned" + which, self.aligned)
        self.wanted: list[list[int]] = []
        self.check("adapter" + which, lambda: self.rollouts("adapter"))
        self.check("merged" + which, lambda: self.rollouts("merged"))
        if not which:
            self.check("prefix", self.prefix)

    def start(self, quantization: str) -> None:
        """The trainer is made, and the check at its start passes in full."""
        self.trainer = zoo.trainer_of(
            self.base,
            self.folder / quantization,
            quantization=quantization,
            engine="adapter" if quantization == "none" else "auto",
            **({"max_steps": 2, "save_strategy": "steps", "save_steps": 1} if quantization == "none" else {}),
        )
        student = self.trainer.model
        conformance.check_model(student, self.trainer.processing_class, always=True)
        base = base_of(student)
        self.facts["model_type"] = base.config.model_type
        self.facts["adapted"], self.facts[quantization] = (round(share, 3) for share in shares(student))
        self.facts["experts"] = sum(p.numel() for p in fused_experts(student))
        self.facts["left out"] = lora_targets(zoo.zoo_model(self.name))[1]
        self.facts["own prompts"] = why_not_shared(student) or ""

    def null(self) -> None:
        """Teacher and student that read the same say the same, in training mode."""
        rows = [Row(row.prompt, row.prompt, row.completion, False, 0) for row in some_rows()]
        loss = float(self.loss_of(rows).detach())
        assert abs(loss) < 1e-9, f"{loss:.2g} nats between two equal models"

    def loss_of(self, rows: list[Row]) -> torch.Tensor:
        """As a training step has it: the teacher's states, then the student in training mode."""
        trainer = self.trainer
        with trainer.teacher.weights() as teacher:
            score_teacher(teacher, rows, trainer.pad_id, rows_at_once=len(rows))
        trainer.model.train()
        return trainer.compute_loss(trainer.model, trainer.batch_of(rows), num_items_in_batch=len(rows))

    def aligned(self) -> None:
        """Loss and gradient of a batch in training mode against plain forwards."""
        rows, student = some_rows(), self.trainer.model
        self.context_matters(rows[0])
        student.zero_grad()
        loss = self.loss_of(rows)
        loss.backward()
        plain = self.student_plain
        layers = {name: m for name, m in base_of(student).named_modules() if isinstance(m, LoraLayer)}
        weights = {name: plain.get_submodule(name).weight.requires_grad_(True) for name in layers}
        wanted = torch.zeros((), dtype=torch.float64)
        for row in rows:
            with torch.no_grad():
                teacher = plain_logits(self.teacher_plain, row.teacher_prompt, row.completion)
            logits = plain_logits(plain, row.prompt, row.completion)
            wanted = wanted + plain_jsd(logits, teacher, self.trainer.beta).sum() / len(rows)
        wanted.backward()
        plain.requires_grad_(False)
        error = abs(float(loss.detach()) / float(wanted.detach()) - 1)
        assert error < 1e-4, f"loss {float(loss):.6g}, by plain forwards {float(wanted):.6g}"
        found_all, wanted_all = [], []
        for name, layer in layers.items():
            a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
            gradient = weights[name].grad
            if gradient is None:
                gradient = torch.zeros_like(weights[name])
            if isinstance(plain.get_submodule(name), Conv1D):
                gradient = gradient.T
            for parameter, own in ((a, scale * b.T @ gradient), (b, scale * gradient @ a.T)):
                assert parameter.grad is not None, f"{name}: no gradient"
                found_all.append(parameter.grad.flatten())
                wanted_all.append(own.detach().flatten())
        for name, layer in layers.items():
            assert layer.lora_A["default"].weight.grad.abs().max() > 0, f"{name}: LoRA that never trains"
        error = off(torch.cat(found_all), torch.cat(wanted_all))
        assert error < 1e-3, f"gradient off by {error:.2g}"
        student.zero_grad()
        plain.zero_grad()

    def context_matters(self, row: Row) -> None:
        """Else nothing here could fail: an early token and the PI change what is said."""
        before = plain_logits(self.teacher_plain, row.teacher_prompt, row.completion)
        changed = [*row.teacher_prompt[:-4], 9, *row.teacher_prompt[-3:]]
        assert off(plain_logits(self.teacher_plain, changed, row.completion), before) > 1e-4, "no context"
        assert off(plain_logits(self.student_plain, row.teacher_prompt, row.completion), before) > 1e-3, "no LoRA"

    def rollouts(self, engine: str) -> str | None:
        """Two sampled completions a prompt, that end at different times, against a plain loop."""
        student, prompts = self.trainer.model, [row.prompt for row in some_rows()]
        if engine == "merged" and (reason := not_mergeable(student)):
            return f"not offered: {reason}"
        stops = set(range(6, 260, 4))
        settings = {"max_new_tokens": NEW, "stop_ids": sorted(stops), "pad_id": 0, "temperature": 1.0, "copies": 2}
        if engine == "merged":
            found = generate(MergedCopy(student, torch.float32).refresh(), prompts, seed=3, **settings)
        else:
            with adapter_state(student, "shared") as model:
                found = generate(model, prompts, seed=3, **settings)
        uniforms = torch.rand(2 * len(prompts), NEW, generator=window_generator(3), dtype=torch.float64)
        wanted = self.wanted = self.wanted or [
            plain_rollout(self.student_plain, prompts[i // 2], uniforms[i], stops) for i in range(2 * len(prompts))
        ]
        assert len({len(one) for one in wanted}) > 1, "all rows end together"
        assert found == wanted, f"rollouts differ in {sum(f != w for f, w in zip(found, wanted))} of {len(wanted)} rows"
        return None

    def prefix(self) -> str | None:
        """Beginnings that are read once, or remembered, give what a whole row gives; so do rollouts behind them."""
        rows, trainer = some_rows(), self.trainer
        with torch.no_grad():
            wanted = [plain_logits(self.teacher_plain, row.teacher_prompt, row.completion) for row in rows]
        kept = None
        with trainer.teacher.weights() as teacher:
            memory = TeacherMemory([row.teacher_prompt for row in rows], epochs=3)
            memory.keep_within(0.1, teacher, 64)
            for each in (None, memory, memory):
                for row in rows:
                    row.teacher_hidden = None
                score_teacher(teacher, rows, trainer.pad_id, memory=each)
                states = [row.teacher_hidden for row in rows]
                worst = max(off(trainer.head.logits(found), want) for found, want in zip(states, wanted))
                assert worst < 1e-4, f"off by {worst:.2g} {'with' if each else 'without'} the memory"
                if each is not None:
                    assert kept is None or all(map(torch.equal, kept, states)), "remembered in other bits"
                    kept = states
            with patched(rollout, "WORTH_A_FORWARD", SHORTEST):
                found = generate(
                    teacher,
                    [row.teacher_prompt for row in rows],
                    max_new_tokens=NEW,
                    stop_ids=[],
                    pad_id=0,
                    temperature=1.0,
                    seed=4,
                )
        uniforms = torch.rand(len(rows), NEW, generator=window_generator(4), dtype=torch.float64)
        wanted = [
            plain_rollout(self.teacher_plain, row.teacher_prompt, each, set()) for row, each in zip(rows, uniforms)
        ]
        assert found == wanted, "rollouts differ"
        reason = why_not_shared(trainer.model)
        return f"not shared: {reason}" if reason else None

    def training(self) -> None:
        """Two steps, saved; and resumed from the first: the same adapter."""
        with torch.no_grad():
            for name, parameter in self.trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        self.trainer.train()
        self.trainer.save_model()
        final = {key: value.clone() for key, value in self.trainer.model.state_dict().items() if "lora_" in key}
        untrained = [key for key, value in final.items() if "lora_B" in key and not value.any()]
        assert not untrained, f"LoRA that never trains: {untrained[:3]}"
        again = zoo.trainer_of(
            self.base, self.folder / "none", engine="adapter", max_steps=2, save_strategy="steps", save_steps=1
        )
        again.train(resume_from_checkpoint=str(self.folder / "none" / "checkpoint-1"))
        for key, value in again.model.state_dict().items():
            if "lora_" in key:
                assert torch.allclose(value, final[key], atol=1e-6), f"resumed otherwise: {key}"

    def peft(self) -> str | None:
        """The saved adapter, put on the base by PEFT alone."""
        plain = plain_model(self.base, self.trainer.model, lora=False)
        wanted = plain_model(self.base, self.trainer.model, lora=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = PeftModel.from_pretrained(plain, str(self.folder / "none")).eval()
        with torch.no_grad():
            for row in some_rows():
                want, have = (plain_logits(model, row.prompt, row.completion) for model in (wanted, found))
                if off(have, want) > 1e-4:
                    return "not offered: PEFT itself loads the adapter of this architecture wrongly"
        return None

    def training_nf4(self) -> None:
        self.trainer.train()
        self.trainer.save_model()

    def merge(self, quantization: str, base: str) -> None:
        """The merged files, loaded by the library, give what the trained adapter gives."""
        out = self.folder / f"merged-{quantization}"
        prompts = self.folder / "prompts.txt"
        prompts.write_text("One, two, three\n")
        merge_adapter(
            str(self.folder / quantization),
            str(out),
            base=base,
            dtype="fp32",
            prompts=str(prompts),
            max_new_tokens=4,
            log=lambda _: None,
        )
        wanted = plain_model(self.base, self.trainer.model, lora=True)
        config = transformers.AutoConfig.from_pretrained(out)
        found = auto_class(config).from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            for row in some_rows():
                want, have = (plain_logits(model, row.prompt, row.completion) for model in (wanted, found))
                assert off(have, want) < 1e-4, f"merged model off by {off(have, want):.2g}"


@contextlib.contextmanager
def patched(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def outcome(done: dict[str, str]) -> str:
    """green: all numbers are right, what is not offered is said; refused: by name at the start; else red."""
    if any(said.startswith(("WRONG", "CRASH")) for said in done.values()):
        return "red"
    if done["start"].startswith("refused"):
        return "refused"
    late = [what for what, said in done.items() if said.startswith("refused") and what != "start nf4"]
    return "red" if late else "green"


def check(name: str, folder: Path) -> dict[str, Any]:
    """Everything on one architecture; its line of the table."""
    checked = Checked(name, folder)
    with contextlib.redirect_stdout(io.StringIO()):
        checked.run()
    if "--trace" in sys.argv and hasattr(checked, "trace"):
        print(checked.trace)
    return {**checked.facts, "result": outcome(checked.done), "checks": checked.done}


def main(names: list[str]) -> int:
    """Check, print, and put the lines of these architectures into the file; returns how many are red."""
    names = [name for name in names if not name.startswith("--")] or list(zoo.ALL)
    transformers.logging.set_verbosity_error()
    red = 0
    for name in names:
        try:
            with tempfile.TemporaryDirectory() as folder:
                line = check(name, Path(folder))
        except Exception as error:
            line = {"name": name, "result": "red", "checks": {"model": f"CRASH: {type(error).__name__}: {error}"}}
        red += line["result"] == "red"
        wrong = {what: said for what, said in line["checks"].items() if said != "ok"}
        print(f"{name}: {line['result']} {json.dumps(wrong) if wrong else ''}", flush=True)
        write(line)
        gc.collect()
    return red


def write(line: dict[str, Any]) -> None:
    """Put one line into the file, in the place of an older one of that architecture, in the order of the zoo."""
    versions = {module: sys.modules[module].__version__ for module in ("transformers", "torch", "peft", "bitsandbytes")}
    lines = {old["name"]: old for old in results()}
    lines[line["name"]] = {**line, "versions": versions}
    order = [name for name in zoo.ALL if name in lines]
    RESULTS.write_text("".join(json.dumps(lines[name], ensure_ascii=False) + "\n" for name in order), encoding="utf-8")


def results() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()] if RESULTS.is_file() else []


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]) > 0)
