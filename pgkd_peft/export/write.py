"""Write a merged model as a plain checkpoint, shard by shard; an interrupted merge goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import ModelError, explained, read_object
from ..model.load import bnb_config, check_source
from ..run.folder import ADAPTER_CONFIG, ADAPTER_FILE
from .adapter import AdapterRun
from .base_weights import quantization_roundtrip
from .merged_weights import MergedWeights
from .rounding import Surviving, row_sample

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARD_BYTES = 1 << 30  # of the output; what a merge holds in memory beside its largest tensor
STATE_FILE = "merge_state.json"
# What tokenizers are saved as: fast, slow, SentencePiece, tiktoken, code of their own; one chat template or several.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tokenization_*.py",
    "chat_template.*",
    "additional_chat_templates/*",
)


def write_checkpoint(
    weights: MergedWeights,
    folder: Path,
    dtype: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    log: Callable[[str], None] = lambda _: None,
) -> tuple[Surviving, Surviving]:
    """Write weights, config, tokenizer, chat template and generation config into `folder`.

    A shard is written under a temporary name, renamed when it is whole, and only then entered in the state file. A
    state file of another merge (other adapter, base, settings) makes this one start afresh.

    Args:
        dtype: bf16, fp16 or fp32.

    Returns:
        what survives of the adapter's change in the cast to `dtype`, and what would survive in 4 bits (on a sample of
        each linear layer).

    Raises:
        ModelError: a weight does not fit into the dtype, or the model not onto the disk.
    """
    shapes = weights.shapes()
    plan = _plan_shards(shapes, DTYPES[dtype].itemsize, shard_bytes)
    fingerprint = _fingerprint(weights, dtype, list(plan))
    done = _finished_shards(folder, fingerprint)
    missing = [key for name, keys in plan.items() if name not in done for key in keys]
    _check_room(folder, DTYPES[dtype].itemsize * sum(torch.Size(shapes[key]).numel() for key in missing))
    for name, keys in plan.items():
        if name not in done:
            done[name] = _write_shard(weights, keys, folder / name, DTYPES[dtype])
            _write_json(folder / STATE_FILE, {"fingerprint": fingerprint, "shards": done})
        log(f"  {name}: {len(keys)} tensors")
    _write_index(folder, plan)
    _write_config(weights, folder, dtype)
    copy_tokenizer(weights.run, folder)
    cast, four_bit = (Surviving.total(shard[part] for shard in done.values()) for part in ("cast", "four_bit"))
    return cast, four_bit


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, the merged model needs {needed / 1e9:.1f} GB more; make "
            "room, or give another --out (finished shards are kept)"
        )


def _write_shard(weights: MergedWeights, keys: list[str], path: Path, dtype: torch.dtype) -> dict[str, Any]:
    run = weights.run
    in_4_bits = run.quantization_config is not None and run.quantization_config.load_in_4bit
    nf4 = run.quantization_config if in_4_bits else bnb_config("nf4", torch.bfloat16)
    assert nf4 is not None
    cast, four_bit = Surviving(), Surviving()
    tensors = {}
    for tensor in weights.tensors(keys):
        result = tensor.merged.to(dtype) if tensor.merged.is_floating_point() else tensor.merged
        if result.is_floating_point() and not torch.isfinite(result).all():
            raise ModelError(f"{tensor.key} overflows {dtype}; use --dtype bf16 or fp32")
        if tensor.adapted:
            cast.add(tensor.base, tensor.merged, lambda t: t.to(dtype))
        if tensor.linear:
            four_bit.add(
                row_sample(tensor.base),
                row_sample(tensor.merged),
                lambda t: quantization_roundtrip(t, nf4, torch.float32),
            )
        tensors[tensor.key] = result.contiguous()
    partial = path.with_suffix(".tmp")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(path)
    return {"cast": cast.as_dict(), "four_bit": four_bit.as_dict()}


def _plan_shards(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int) -> dict[str, list[str]]:
    """File name -> keys, in order, each file within the limit unless a single tensor is larger."""
    groups: list[list[str]] = [[]]
    size = 0
    for key, shape in shapes.items():
        bytes_ = itemsize * int(torch.Size(shape).numel())
        if groups[-1] and size + bytes_ > limit:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += bytes_
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": keys for i, keys in enumerate(groups, 1)}


def _fingerprint(weights: MergedWeights, dtype: str, shards: list[str]) -> str:
    """Of all that the shards depend on: adapter, files of the base, how the base was held, what was asked for."""
    run = weights.run
    digest = hashlib.sha256()
    for name in (ADAPTER_FILE, ADAPTER_CONFIG):
        digest.update((run.folder / name).read_bytes())
    for path in sorted(run.base.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    settings = run.quantization_config.to_dict() if run.quantization_config is not None else None
    digest.update(json.dumps([weights.base, dtype, str(run.dtype), settings, shards], default=str).encode())
    return digest.hexdigest()


def _finished_shards(folder: Path, fingerprint: str) -> dict[str, Any]:
    """The shards that an interrupted merge of the same things left in `folder`; of anything else it is emptied."""
    state_file = folder / STATE_FILE
    if state_file.is_file():
        state = read_object(state_file)
        shards: dict[str, Any] = state.get("shards") or {}
        if state.get("fingerprint") == fingerprint and all((folder / name).is_file() for name in shards):
            return shards
    elif folder.exists() and any(folder.iterdir()):
        raise ModelError(f"{folder} is where an unfinished merge would stand, but no merge wrote it; move it away")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_json(state_file, {"fingerprint": fingerprint, "shards": {}})
    return {}


def _write_json(path: Path, content: Any) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _write_index(folder: Path, plan: dict[str, list[str]]) -> None:
    if len(plan) > 1:
        weight_map = {key: name for name, keys in plan.items() for key in keys}
        total = sum((folder / name).stat().st_size for name in plan)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_config(weights: MergedWeights, folder: Path, dtype: str) -> None:
    """The base's own config.json, unquantized, in the new dtype; its generation config; its code, if it has any."""
    base = weights.run.base
    config = read_object(base / "config.json")
    for key in ("quantization_config", "torch_dtype", "_name_or_path"):
        config.pop(key, None)
    config["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    if weights.untied:
        config["tie_word_embeddings"] = False
    _write_json(folder / "config.json", config)
    for path in (base / "generation_config.json", *base.glob("*.py")):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def tokenizer_folder(run: AdapterRun) -> Path:
    """Where the tokenizer and chat template are that the run saved, else those of the base."""
    folders = [folder for folder in (run.folder, run.run_folder) if folder is not None]
    return next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), run.base)


def copy_tokenizer(run: AdapterRun, folder: Path) -> None:
    """Every file of the run's tokenizer, all of its chat templates included."""
    source = tokenizer_folder(run)
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def read_tokenizer(run: AdapterRun, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The run's tokenizer.

    Raises:
        ModelError: it cannot be loaded.
    """
    folder = tokenizer_folder(run)
    check_source(str(folder))
    with explained(f"no tokenizer can be loaded from {str(folder)!r}"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
