"""Write GGUF files for llama.cpp and Ollama: the merged model, or the LoRA adapter alone; and read them back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft.tuners.lora.layer import Linear as LoraLinear
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, ModelError
from .gguf_format import Architecture, add_vocabulary, import_gguf
from .merged_weights import ADAPTER, MergedWeights

TYPES = ("f16", "q8_0", "f32")
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}


@dataclass(frozen=True)
class GGUFSummary:
    """What was written and read back.

    Attributes:
        tensors: their number.
        rounding: |stored - exact| / |exact| over all tensors together; 0 where nothing was rounded.
        types: of a K-quant: how many matrices stand in which type.
    """

    path: Path
    tensors: int
    bytes: int
    rounding: float
    types: dict[str, int] | None = None


def write_gguf_model(
    weights: MergedWeights,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    type_: str,
    *,
    name: str,
    log: Callable[[str], None] = lambda _: None,
) -> GGUFSummary:
    """Write the merged model as one GGUF file, tensor by tensor, and compare the file with what was meant.

    Matrices are stored in `type_` (f16, q8_0 or f32; q8_0 needs rows that are a multiple of 32 long, others stay f16),
    everything else in float32, rounded once from the float32 sum.

    Raises:
        ModelError: an architecture, tensor or tokenizer that has no GGUF form here, named.
    """
    gguf = import_gguf()
    architecture = Architecture(weights.config)
    shapes = weights.shapes()
    keys = {key: architecture.tensor_name(key) for key in shapes}
    kinds = {key: _kind(shape, type_) for key, shape in shapes.items()}
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[type_]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    architecture.add_settings(writer)
    add_vocabulary(writer, tokenizer, weights.config.vocab_size)
    factors = architecture.rope_factors()
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for key, shape in shapes.items():
        stored = gguf.quants.quant_shape_to_byte_shape(shape, kinds[key]) if kinds[key] == _q8() else shape
        dtype = {_q8(): np.uint8, gguf.GGMLQuantizationType.F16: np.float16}.get(kinds[key], np.float32)
        nbytes = int(np.prod(stored)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(keys[key], stored, np.dtype(dtype), nbytes, raw_dtype=kinds[key])

    digests, error, norm = {}, 0.0, 0.0
    with _Partial(path) as partial:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
            digests["rope_freqs.weight"] = _digest(factors)
        for tensor in weights.tensors():
            exact = architecture.reorder_rows(tensor.key, tensor.merged.float().numpy())
            data = gguf.quants.quantize(exact, kinds[tensor.key])
            difference = gguf.quants.dequantize(data, kinds[tensor.key]) - exact
            if not np.isfinite(difference).all():
                raise ModelError(f"{tensor.key} overflows {type_}; use --gguf-type f32")
            error += float(np.square(difference, dtype=np.float64).sum())
            norm += float(np.square(exact, dtype=np.float64).sum())
            writer.write_tensor_data(data)
            digests[keys[tensor.key]] = _digest(data)
        writer.close()
        _read_back(partial, digests)
    log(f"Read {path} back: {len(digests)} tensors as written")
    return GGUFSummary(path, len(digests), path.stat().st_size, (error / norm) ** 0.5)


def write_gguf_lora(weights: MergedWeights, path: Path, *, name: str) -> GGUFSummary:
    """Write the adapter as a GGUF LoRA (general.type adapter, adapter.type lora) in float32, and read it back.

    llama.cpp scales every layer by adapter.lora.alpha / rank. Where a layer's scale is another (rsLoRA, rank and alpha
    patterns), the ratio is multiplied into its B.

    Raises:
        ModelError: an adapter that is more than A and B on linear layers (DoRA, biases, embeddings, saved modules), or
            an architecture without a GGUF form here.
    """
    gguf = import_gguf()
    architecture = Architecture(weights.config)
    if weights.overrides:
        raise ModelError(
            f"the adapter replaces whole weights ({', '.join(sorted(weights.overrides)[:3])}), which a GGUF LoRA "
            "cannot hold. Export the merged model: --format gguf."
        )
    alpha = float(weights.run.adapter_config["lora_alpha"])
    tensors: dict[str, np.ndarray] = {}
    for module, layer in weights.layers.items():
        if type(layer) is not LoraLinear or layer.lora_variant or layer.lora_bias[ADAPTER]:
            kind = (
                "DoRA"
                if getattr(layer, "lora_variant", None)
                else "a bias"
                if type(layer) is LoraLinear
                else "no Linear"
            )
            raise ModelError(
                f"{module} has {kind}, which a GGUF LoRA cannot hold. Export the merged model: --format gguf."
            )
        key = f"{module}.weight"
        if key not in weights.shapes():
            raise ModelError(
                f"{module} shares its weight with the embedding, so llama.cpp has no tensor to adapt there"
            )
        a, b = (
            part[ADAPTER].weight.detach().float().numpy() for part in (layer.lora_A, layer.lora_B)
        )  # (r, in), (out, r)
        b = architecture.reorder_rows(key, b) * np.float32(layer.scaling[ADAPTER] * len(a) / alpha)
        tensors[f"{architecture.tensor_name(key)}.lora_a"] = np.ascontiguousarray(a)
        tensors[f"{architecture.tensor_name(key)}.lora_b"] = np.ascontiguousarray(b)
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name)
    for tensor_name, array in tensors.items():
        writer.add_tensor(tensor_name, array)
    with _Partial(path) as partial:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _read_back(partial, {tensor_name: _digest(array) for tensor_name, array in tensors.items()})
    return GGUFSummary(path, len(tensors), path.stat().st_size, 0.0)


def _q8() -> Any:
    return import_gguf().GGMLQuantizationType.Q8_0


def _kind(shape: tuple[int, ...], type_: str) -> Any:
    kinds = import_gguf().GGMLQuantizationType
    if len(shape) < 2 or type_ == "f32":
        return kinds.F32
    return kinds.Q8_0 if type_ == "q8_0" and shape[-1] % 32 == 0 else kinds.F16


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def _read_back(path: Path, digests: dict[str, str]) -> None:
    """Every tensor, found by name in the file, holds the bytes that were meant for it."""
    stored = {tensor.name: _digest(tensor.data) for tensor in import_gguf().GGUFReader(path).tensors}
    if stored != digests:
        wrong = sorted(n for n in {*stored, *digests} if stored.get(n) != digests.get(n))
        raise ModelError(f"{path} does not read back as it was written: {', '.join(wrong[:3])}")


class _Partial:
    """Write under a temporary name; the file takes its own only when all went well."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(path.name + ".partial")

    def __enter__(self) -> Path:
        if self.path.exists():
            raise ConfigError(f"--out {self.path} exists already; give another file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.partial.replace(self.path)
        else:
            self.partial.unlink(missing_ok=True)
