"""The commands that come next; printed after a training, a merge or an export."""

from __future__ import annotations

import shlex
from pathlib import Path

from .adapter import AdapterRun

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank (MaxLoRARanks of its config/lora.py, 0.32)."""


def next_lines(commands: list[tuple[str, str]]) -> str:
    """Commands, each with a word on what it does, under one another."""
    return "\n".join(["Next:", *(f"  {command}   # {what}" for command, what in commands)])


def next_pgkd(*commands: str) -> str:
    """Our own commands, under one another; what they do stands in `pgkd -h`."""
    return "Next: " + "\n      ".join(commands)


def after_training(folder: str | Path, text: str | None = None) -> tuple[str, ...]:
    """Of a run.

    Args:
        text: the file with what the teacher read, where one file is all of it.
    """
    run, merged = shlex.quote(str(folder)), shlex.quote(f"{str(folder).rstrip('/')}-merged")
    read = f" --privileged_file {shlex.quote(text)}" if text is not None else ""
    return f"pgkd chat {run}{read}", f"pgkd report {run}", f"pgkd merge {run} --out {merged}"


def after_merge(target: Path) -> list[tuple[str, str]]:
    """Of a merged checkpoint."""
    folder = shlex.quote(str(target))
    return [
        (f"pgkd chat {folder}", "talk to it"),
        (f"vllm serve {folder} --served-model-name {shlex.quote(target.name)}", "an OpenAI-compatible server"),
        (f"hf upload ORG/{shlex.quote(target.name)} {folder}", "the Hub"),
    ]


def after_gguf(target: Path, modelfile: Path, run: AdapterRun) -> list[tuple[str, str]]:
    """Of a merged GGUF file."""
    name = ollama_name(target)
    return [
        (f"llama-server -m {shlex.quote(str(target))} --jinja --port 8080", "llama.cpp: OpenAI-compatible, and a page"),
        (f"ollama create {name} -f {shlex.quote(str(modelfile))} && ollama run {name}", "Ollama"),
        *_vllm(run, run.folder, run.base_name),
    ]


def after_gguf_lora(target: Path) -> list[tuple[str, str]]:
    """Of an adapter in GGUF."""
    file = shlex.quote(str(target))
    return [(f"llama-server -m BASE.gguf --lora {file} --jinja --port 8080", "llama.cpp, on a GGUF of its base")]


def after_peft(target: Path, identity: str, run: AdapterRun) -> list[tuple[str, str]]:
    """Of an adapter that was cleaned for publication."""
    return [
        (f"hf upload ORG/{shlex.quote(target.name)} {shlex.quote(str(target))}", "the Hub"),
        *_vllm(run, target, identity),
    ]


def _vllm(run: AdapterRun, folder: Path, base: str) -> list[tuple[str, str]]:
    """Serve the base, and the adapter in `folder` as a model of its own beside it; vLLM adds A and B, nothing else."""
    if any(run.adapter_config.get(name) for name in ("use_dora", "modules_to_save", "lora_bias")):
        return []
    ranks = [run.adapter_config["r"], *(run.adapter_config.get("rank_pattern") or {}).values()]
    rank = next((allowed for allowed in VLLM_RANKS if allowed >= max(ranks)), max(ranks))
    module = shlex.quote(f"{ollama_name(folder)}={folder}")
    command = f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {rank} --lora-modules {module}"
    return [(command, "vLLM: the adapter, on its base in 16 bits")]


def ollama_name(path: Path) -> str:
    """A model name of lower-case letters, digits, dots, dashes and underscores."""
    name = "".join(sign if sign.isascii() and (sign.isalnum() or sign in "._-") else "-" for sign in path.stem.lower())
    return name.strip("._-") or "model"
