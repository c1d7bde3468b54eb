"""K-quants of a GGUF file by llama.cpp's own quantizer, in a process of its own: its failed assertions end a process.

The quantizer is the program ``llama-quantize`` where one is on the PATH, else the function ``llama_model_quantize`` of
the library that the package llama-cpp-py-sync brings.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError

K_QUANTS = {"q4_k_m": "Q4_K_M", "q5_k_m": "Q5_K_M"}
"""Our names, and llama.cpp's."""

INSTALL = "pip install llama-cpp-py-sync, or put llama.cpp's program llama-quantize on the PATH"


def quantizer() -> list[str]:
    """The command that is called with source, target and type.

    Raises:
        ModelError: there is none on this machine.
    """
    program = shutil.which("llama-quantize")
    if program is not None:
        return [program]
    if find_spec("llama_cpp_py_sync") is not None:
        return [sys.executable, "-m", __name__]
    raise ModelError(f"K-quants are made by llama.cpp's own quantizer, and none is installed: {INSTALL}.")


def quantize(source: Path, target: Path, type_: str) -> None:
    """Write `target`, the GGUF file `source` (f16 or f32) in a type of :data:`K_QUANTS`.

    Raises:
        ModelError: no quantizer, or it failed; with the last lines that it said.
    """
    command = [*quantizer(), str(source.resolve()), str(target.resolve()), K_QUANTS[type_]]
    here = Path(__file__).resolve().parents[2]  # so that the child finds this package as we did
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=here)
    if result.returncode != 0 or not target.is_file():
        target.unlink(missing_ok=True)
        said = "\n".join((result.stdout + result.stderr).strip().splitlines()[-5:])
        raise ModelError(f"{command[0]} (exit {result.returncode}) made no {K_QUANTS[type_]} of {source}:\n{said}")


def compare_files(source: Path, target: Path) -> tuple[float, dict[str, int]]:
    """How far the weights of a quantized file are from those that it was made from.

    Returns:
        |quantized - source| / |source| over all tensors together, and how many matrices stand in which type: rows that
        are no multiple of 256 long have no K type, llama.cpp gives them another.

    Raises:
        ModelError: a tensor is missing, has another shape, or is not finite.
    """
    from .gguf_format import import_gguf  # here, since the process that quantizes needs no transformers

    gguf = import_gguf()
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    after = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    if before.keys() != after.keys():
        raise ModelError(f"{target} has other tensors than {source}: {sorted(before.keys() ^ after.keys())[:3]}")
    error = norm = 0.0
    types: Counter[str] = Counter()
    for name, tensor in after.items():
        exact, stored = _values(gguf, before[name]), _values(gguf, tensor)
        if exact.shape != stored.shape or not np.isfinite(stored).all():
            raise ModelError(f"{target}: {name} is not what was quantized ({stored.shape}, {exact.shape} before)")
        error += float(np.square(stored - exact, dtype=np.float64).sum())
        norm += float(np.square(exact, dtype=np.float64).sum())
        if len(tensor.shape) > 1:
            types[tensor.tensor_type.name] += 1
    return (error / norm) ** 0.5, dict(types.most_common())


def _values(gguf: Any, tensor: Any) -> np.ndarray:
    values: np.ndarray = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return values


def _main(source: str, target: str, type_: str) -> int:
    """What ``llama-quantize`` does, by the library; the exit code."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib  # its README's way to functions of llama.h

    library, ffi = get_lib(), get_ffi()
    library.llama_backend_init()
    params = ffi.new("llama_model_quantize_params *", library.llama_model_quantize_default_params())
    params.ftype = int(getattr(library, f"LLAMA_FTYPE_MOSTLY_{type_}"))
    return int(library.llama_model_quantize(source.encode(), target.encode(), params))


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
