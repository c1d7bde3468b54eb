"""What leaves the machine: model cards with the measured numbers, no local paths, and the push to the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..errors import ConfigError, explained
from ..run.card import (
    DEMO_NOTE,
    base_id,
    introduction,
    is_demo,
    use_section,
    without_local_paths,
)
from .adapter import AdapterRun


def hub_id(run: AdapterRun) -> str | None:
    """The id under which others find this adapter's base, or None if it is only a local directory."""
    return base_id(run.base_name, run.base)


def training_section(run: AdapterRun) -> str:
    """What the run says about itself: results, data, command; empty where there is no run.json or summary.json."""
    results, info = run.results, run.info
    lines = []
    if results:
        lines += ["", "## What training reached", "", "| | score |", "| --- | --- |"]
        labels = {
            "base": "base, without privileged information",
            "teacher": "teacher: base, with privileged information",
            "student": "student: base + adapter, without it",
            "recovered": "**recovered gap**, (student - base) / (teacher - base)",
            "drift": "drift on neutral prompts, KL to the base in nats/token",
        }
        lines += [f"| {label} | {number(results[key])} |" for key, label in labels.items() if key in results]
        if "n" in results:
            lines.append(f"\nMeasured on n = {results['n']} held-out questions.")
    facts = {
        "Data fingerprint": info.get("dataset_fingerprint"),
        "Base in training": f"{run.quantization}, computed in {str(run.compute_dtype).removeprefix('torch.')}",
        "Command": f"`{without_local_paths(_command(info['command']))}`" if info.get("command") else None,
    }
    lines += ["", "## How it was trained", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items() if value]
    lines += [f"- Assumed, because no file says it: {sentence}." for sentence in run.assumed]
    return "\n".join(lines) + "\n"


def _command(command: Any) -> str:
    return " ".join(map(str, command)) if isinstance(command, (list, tuple)) else str(command)


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(columns: list[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A markdown table; a cell that a row lacks is a dash."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(number(row.get(c, "–")) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def adapter_card(run: AdapterRun, identity: str) -> str:
    """The README.md of a published adapter: what it is, what it reached, how it was trained, how to load it."""
    settings = run.quantization_config.to_dict() if run.quantization_config is not None else None
    note = DEMO_NOTE if is_demo(run.base) else ""
    head = introduction(identity, ["pgkd", "lora"], run.folder.name)
    dtype = str(run.compute_dtype).removeprefix("torch.")
    return head + note + training_section(run) + use_section(identity, dtype, settings)


def push(path: Path, repo_id: str) -> str:
    """Upload a folder, or one file, to the model repository `repo_id` (made if it is missing); returns its address.

    Raises:
        ConfigError: a malformed id, no permission, or no connection.
    """
    api = HfApi()
    folder, only = (path, None) if path.is_dir() else (path.parent, [path.name])
    advice = f"The result stays in {path}; log in with `hf auth login` and check that you may write to that repository."
    with explained(f"--push-to-hub {repo_id}", ConfigError, advice):
        repo = api.create_repo(repo_id, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, allow_patterns=only, commit_message=f"Upload {path.name}"
        )
    return str(repo)
