"""Inject faults into real runs of a tiny model and write what a user sees to FAULTS.md, beside this file.

    python tests/faults/make_table.py

Takes about two minutes on one core. Mounting a 2 MiB file system, for the full disk, needs root.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import runs  # noqa: E402
import torch  # noqa: E402
from malformed import malformed_rows  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny import ROWS, VOCAB, save_tiny  # noqa: E402

from pgkd_peft.errors import PGKDError  # noqa: E402
from pgkd_peft.run.checkpoint import check_run_folder, last_complete_checkpoint  # noqa: E402

TABLE = HERE / "FAULTS.md"
STEPS = {"max_steps": 7, "save_steps": 2}


class Table:
    def __init__(self, work: Path):
        self.work = work
        self.rows: list[tuple[str, str, str]] = []

    def add(self, fault: str, seen: str, lost: str) -> None:
        seen = re.sub(r"\s+", " ", seen.replace(str(self.work), "…")).strip()
        self.rows.append((fault, seen, lost))
        print(f"- {fault}\n    {seen}\n    lost: {lost}", flush=True)

    def write(self) -> None:
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
        lines = [
            "# What happens when something goes wrong",
            "",
            "Written by `python tests/faults/make_table.py` from real runs of a tiny model: seven optimizer steps, a "
            f"checkpoint every second one, on the CPU; {versions}. `…` stands for the run's directory.",
            "",
            "| fault injected | what the user sees | what was lost |",
            "|---|---|---|",
        ]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def said(action: Any) -> str:
    """The message of a named error; anything else is a bug and ends this script."""
    try:
        action()
    except PGKDError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was refused")


def same_as(reference: Path, out: Path) -> bool:
    return runs.contents(out / "checkpoint-7") == runs.contents(reference / "checkpoint-7")


def kills(table: Table, base: str, reference: Path) -> None:
    for phase, step in (("rollout", 3), ("backward", 5), ("save", 4), ("rename", 6)):
        step = first_on_policy(reference, step) if phase == "rollout" else step
        out = table.work / f"kill-{phase}"
        killed = runs.run(base, out, settings=STEPS, fault=(phase, step))
        assert killed["exitcode"] == -9
        seen = "nothing: SIGKILL gives no time. The run folder: " + ", ".join(
            sorted(p.name for p in out.iterdir() if p.is_dir())
        )
        refused = said(lambda out=out: check_run_folder(out))
        last = Path(last_complete_checkpoint(out)).name
        resumed = runs.run(base, out, settings=STEPS, resume=True)
        assert "error" not in resumed, resumed["log"][-2000:]
        exact = "bit for bit the uninterrupted run" if same_as(reference, out) else "NOT the uninterrupted run"
        where = {"save": "while a checkpoint is written", "rename": "between writing and renaming a checkpoint"}
        lost = f"the work since {last}; resumed from it, the end is {exact}"
        table.add(
            f"SIGKILL {where.get(phase, 'in ' + phase)}, step {step}", f"{seen}. A new start says: {refused}", lost
        )


def first_on_policy(reference: Path, at_least: int) -> int:
    from pgkd_peft.rollout import window_generator

    for step in range(at_least, 7):
        if torch.rand((), generator=window_generator(42, step, 0)) < runs.SETTINGS["lmbda"]:
            return step
    raise AssertionError("no step of the run rolls out")


def signals(table: Table, base: str, reference: Path) -> None:
    for name in ("sigint", "sigterm"):
        out = table.work / name
        stopped = runs.run(base, out, settings=STEPS, fault=(name, 2))
        runs.run(base, out, settings=STEPS, resume=True)
        exact = "bit for bit the uninterrupted run" if same_as(reference, out) else "NOT the uninterrupted run"
        table.add(
            f"{name.upper()} in step 3",
            f"{stopped['error']}: {stopped['message']}",
            f"nothing; resumed, the end is {exact}",
        )


def full_disk(table: Table, base: str) -> None:
    disk = table.work / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if done.returncode:
        table.add("disk full while saving", "not run: mounting a small file system was not permitted", "-")
        return
    try:
        runs.make_trainer(base, str(disk / "out"), settings={**STEPS, "max_steps": 2}).train()
        with (disk / "filler").open("wb", buffering=0) as filler:
            space = os.statvfs(disk)
            filler.write(b"x" * (space.f_bavail * space.f_frsize - 50 * 1024))
        seen = said(
            lambda: runs.make_trainer(base, str(disk / "out"), settings=STEPS).train(resume_from_checkpoint=True)
        )
        assert last_complete_checkpoint(disk / "out") == str(disk / "out" / "checkpoint-2")
        table.add("disk full while saving", seen, "the steps since checkpoint-2, which is intact")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def damaged(table: Table, base: str, reference: Path) -> None:
    for name, harm in (("optimizer.pt", "cut in half"), ("adapter_model.safetensors", "one bit flipped")):
        out = Path(shutil.copytree(reference, table.work / f"damaged-{name}"))
        path = out / "checkpoint-6" / name
        shutil.rmtree(out / "checkpoint-7")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data[: len(data) // 2] if harm == "cut in half" else data)
        resumed = runs.run(base, out, settings=STEPS, resume=True)
        warning = next(line for line in resumed["log"].splitlines() if "passed over" in line)
        exact = "bit for bit the uninterrupted run" if same_as(reference, out) else "NOT the uninterrupted run"
        lost = f"the steps since checkpoint-4; resumed from it, the end is {exact}"
        table.add(
            f"{name} of the last checkpoint {harm}", warning.partition(":pgkd_peft.run.checkpoint:")[2] or warning, lost
        )
    out = Path(shutil.copytree(reference, table.work / "planted"))
    torch.save({"state": _Planted(table.work / "gone-off")}, out / "checkpoint-7" / "optimizer.pt")
    (out / "checkpoint-7" / "manifest.json").unlink()
    trainer = runs.make_trainer(base, str(out), settings={**STEPS, "max_steps": 9})
    seen = said(lambda: trainer.train(resume_from_checkpoint=True))
    assert not (table.work / "gone-off").exists()
    table.add("optimizer.pt replaced by a pickle that runs code", seen, "nothing; the code did not run")


class _Planted:
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def other_models(table: Table, base: str, reference: Path) -> None:
    moved = Path(shutil.copytree(base, table.work / "base-kept"))
    path = Path(base) / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    out = Path(shutil.copytree(reference, table.work / "changed-base"))
    trainer = runs.make_trainer(base, str(out), settings={**STEPS, "max_steps": 9})
    table.add(
        "one weight of the base changed on disk between runs",
        said(lambda: trainer.train(resume_from_checkpoint=True)),
        "nothing; the resume is refused",
    )
    shutil.copy(moved / "model.safetensors", path)

    other = save_tiny(table.work / "other", hidden_size=96, seed=2)
    trainer = runs.make_trainer(other, str(out), settings={**STEPS, "max_steps": 9})
    table.add(
        "checkpoint of another base",
        said(lambda: trainer.train(resume_from_checkpoint=True)),
        "nothing; the resume is refused",
    )
    adapter = Path(shutil.copytree(reference / "checkpoint-7", table.work / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = other
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    table.add(
        "adapter folder that names a base of another width",
        said(lambda: runs.make_trainer(base, str(table.work / "o2"), settings=STEPS, model=str(adapter))),
        "nothing; refused before training",
    )
    wide = save_tiny(table.work / "wide", vocab_size=VOCAB + 16, seed=3)
    settings = {**STEPS, "share_student_as_teacher": False}
    table.add(
        "separate teacher with another vocabulary",
        said(lambda: runs.make_trainer(base, str(table.work / "o3"), settings=settings, teacher_model=wide)),
        "nothing; refused before training",
    )


def in_the_run(table: Table, base: str) -> None:
    trainer = runs.make_trainer(base, str(table.work / "nan"), settings=STEPS)
    next(p for n, p in trainer.model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    table.add(
        "non-finite adapter weights", said(trainer.train), "the steps since the last checkpoint; the batch is kept"
    )

    from transformers import TrainerCallback

    class Merge(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.merge_adapter()
            model.unmerge_adapter()

    settings = {**STEPS, "base_quantization": "nf4"}
    trainer = runs.make_trainer(base, str(table.work / "merge"), settings=settings, callbacks=[Merge()])
    table.add(
        "a callback merges the adapter into the 4-bit base and out again",
        said(trainer.train),
        "the steps since the last checkpoint: their teacher was not the base",
    )

    import pgkd_peft.trainer as module

    original = module.score_teacher

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    module.score_teacher = full
    try:
        trainer = runs.make_trainer(base, str(table.work / "oom"), settings=STEPS)
        table.add("out of memory in the teacher pass", said(trainer.train), "the steps since the last checkpoint")
    finally:
        module.score_teacher = original


def bad_rows(table: Table, base: str) -> None:
    """Each malformed row beside good ones: refused by name, or trained; anything else ends this script."""
    settings = {"save_strategy": "no", "rollout_log_steps": 0, "lmbda": 0.0, "per_device_train_batch_size": 4}
    rows, accepted, messages = malformed_rows(200), [], []
    for number, row in enumerate(rows):
        data = [ROWS[0], row, ROWS[1]]
        try:
            runs.make_trainer(base, str(table.work / "rows"), settings=settings, train_dataset=data)
        except PGKDError as error:
            messages.append(str(error))
            if "row 1" not in str(error):
                raise AssertionError(f"row {number} {row!r} is refused without its number: {error}") from error
        except Exception as error:
            raise AssertionError(f"row {number} {row!r} crashed: {type(error).__name__}: {error}") from error
        else:
            accepted.append(row)
    steps = -(-len(accepted) // 8)  # each of them once
    trainer = runs.make_trainer(
        base, str(table.work / "rows"), settings={**settings, "max_steps": steps}, train_dataset=accepted
    )
    trainer.train()
    seen = f"{len(messages)} refused by name, {len(accepted)} usable and trained on, 0 tracebacks. The first: "
    table.add(
        f"{len(rows)} generated malformed rows, each between good ones",
        seen + messages[0],
        "nothing; rows are refused before a model is loaded",
    )


def main() -> None:
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    table = Table(work)
    try:
        base = save_tiny(work / "base")
        reference = work / "reference"
        outcome = runs.run(base, reference, settings=STEPS)
        assert "error" not in outcome, outcome["log"][-2000:]
        kills(table, base, reference)
        signals(table, base, reference)
        full_disk(table, base)
        damaged(table, base, reference)
        other_models(table, base, reference)
        in_the_run(table, base)
        bad_rows(table, base)
        table.write()
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
