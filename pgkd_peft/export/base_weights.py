"""Read a base model's safetensors files tensor by tensor, and say what bitsandbytes makes of a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors import safe_open
from transformers import BitsAndBytesConfig

from ..errors import ModelError, read_object
from ..model.load import tensor_shapes


class BaseWeights:
    """The safetensors files of a model, plain or bitsandbytes; read one tensor at a time, never mapped as a whole.

    Args:
        folder: holds model.safetensors, or its shards and their index.

    Raises:
        ModelError: no safetensors files, or only pickled ones.
    """

    def __init__(self, folder: Path):
        self._file_of: dict[str, Path] = {}
        self._shape_of: dict[str, tuple[int, ...]] = {}
        for path in _weight_files(folder):
            for key, shape in tensor_shapes(path).items():
                self._file_of[key], self._shape_of[key] = path, shape
        # bitsandbytes keeps a weight's statistics beside it: X.weight.absmax, X.weight.quant_map, ... or X.SCB
        self._statistics: dict[str, list[str]] = {}
        for key in self._file_of:
            owner, separator, _ = key.rpartition(".weight.")
            if not separator and key.endswith((".SCB", ".weight_format")):
                owner = key.rpartition(".")[0]
            if owner and f"{owner}.weight" in self._file_of:
                self._statistics.setdefault(f"{owner}.weight", []).append(key)

    def keys(self) -> list[str]:
        """Names of the weights, in the order of the files; quantization statistics are left out."""
        statistics = {key for keys in self._statistics.values() for key in keys}
        return [key for key in self._file_of if key not in statistics]

    def shape(self, key: str) -> tuple[int, ...]:
        """As stored: a 4-bit weight is a column of bytes."""
        return self._shape_of[key]

    def read(self, key: str) -> torch.Tensor:
        """One tensor in memory of its own. The file is unmapped again, so its pages do not stay resident."""
        with safe_open(self._file_of[key], "pt") as file:
            return file.get_tensor(key).clone()

    def is_quantized(self, key: str) -> bool:
        return key in self._statistics

    def dequantized(self, key: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A weight (out, in) that is stored quantized, in float32, as a layer that computes in `dtype` uses it."""
        data = self.read(key).to(device)
        statistics = {name: self.read(name) for name in self._statistics[key]}
        scales = statistics.get(key.removesuffix("weight") + "SCB")
        if scales is not None:
            return bnb.functional.int8_vectorwise_dequant(data, scales.to(device)).float()
        return _dequantize_4bit(data, bnb.functional.QuantState.from_dict(statistics, device=device), dtype)


def quantization_roundtrip(weight: torch.Tensor, config: BitsAndBytesConfig, dtype: torch.dtype) -> torch.Tensor:
    """What a bitsandbytes layer computes with once it was given `weight` (out, in): float32 on the same device.

    A 4-bit forward dequantizes to its compute dtype, `dtype`; LLM.int8() scales its integers in float32.
    """
    if config.load_in_8bit:
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half().contiguous())
        return bnb.functional.int8_vectorwise_dequant(codes, scales).float()
    packed: Any = bnb.nn.Params4bit(
        weight.contiguous(),
        requires_grad=False,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
    )
    packed = packed.to(weight.device)  # quantizes
    return _dequantize_4bit(packed.data, packed.quant_state, dtype)


def _dequantize_4bit(data: torch.Tensor, state: bnb.functional.QuantState, dtype: torch.dtype) -> torch.Tensor:
    state.dtype = dtype
    return bnb.functional.dequantize_4bit(data, state).float()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} has no weight_map, so it is no index of shards")
        names = sorted({str(name) for name in weight_map.values()})
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif any(folder.glob("*.bin")):
        raise ModelError(
            f"base model {str(folder)!r} has only pickled weights (.bin), which are not read because loading them can "
            "run any code. Save the model with save_pretrained, which writes safetensors."
        )
    else:
        raise ModelError(f"base model {str(folder)!r} has neither model.safetensors nor an index of shards")
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"base model {str(folder)!r} lists the shard {name}, which is not there")
    return [folder / name for name in names]
