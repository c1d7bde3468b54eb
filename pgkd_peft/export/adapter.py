"""Find everything that belongs to a trained adapter: its weights, its base, and how the base was held in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import BitsAndBytesConfig

from ..config import QUANTIZATIONS, compute_dtype
from ..errors import ConfigError, ModelError, explained, read_object
from ..model.adapters import load_adapter, refuse_broken_numbers
from ..model.cpu import guard_cpu_linear4bit
from ..model.frozen import FrozenCheck
from ..model.load import bnb_config, load_base, tensor_shapes
from ..model.lora import BASE_CHANGING_INITS, check_values
from ..run.folder import ADAPTER_CONFIG, ADAPTER_FILE, RESULTS_FILE, RUN_FILE, SUMMARY_FILE, find_in_run
from ..run.jsonl import read_json

ASSUMED_QUANTIZATION = "nf4"  # what training uses when nobody says otherwise


# What is read of run.json, of those that are not plain text to be shown.
INFO_TYPES: dict[str, type] = {
    "config": dict,
    "automatic": dict,
    "held_out": dict,
    "quantization_config": dict,
    "versions": dict,
    "base_quantization": str,
    "base_digest": str,
    "compute_dtype": str,
    "holdout_prompts": str,
}


@dataclass(frozen=True)
class AdapterRun:
    """An adapter on disk, and the base under it as training held it.

    Attributes:
        folder: holds adapter_model.safetensors and adapter_config.json.
        base: local directory of the base's config and weights.
        base_name: the base as adapter_config.json names it (a Hub id or a path).
        quantization: nf4, int8 or none (or another 4-bit type that run.json has the settings of).
        quantization_config: the bitsandbytes settings behind it, None for "none".
        prequantized: the base's own files are already quantized.
        dtype: of the weights that are not quantized, and of those that are before they were quantized.
        assumed: one sentence for each thing that no file says and that was therefore assumed.
        info: run.json, {} when there is none.
        results: eval_results.json, else the demo's summary.json (base, teacher, student, recovered, n, drift), else {}.
    """

    folder: Path
    adapter_config: dict[str, Any]
    base: Path
    base_name: str
    quantization: str
    quantization_config: BitsAndBytesConfig | None
    prequantized: bool
    dtype: torch.dtype
    assumed: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    run_folder: Path | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that quantized weights are dequantized to in a forward."""
        if self.quantization_config is not None and self.quantization_config.load_in_4bit:
            return self.quantization_config.bnb_4bit_compute_dtype
        return self.dtype


def read_run(
    adapter: str,
    *,
    quantization: str | None = None,
    base_model: str | None = None,
    log: Callable[[str], None] = print,
) -> AdapterRun:
    """Read an adapter's folder (or Hub id) and find its base.

    Args:
        adapter: a run folder, a checkpoint inside one, or a Hub id.
        quantization: nf4, int8 or none; overrides what run.json says.
        base_model: a local directory or Hub id; overrides what adapter_config.json says.

    Raises:
        ModelError: no adapter there, one that only a pickle holds, no LoRA, or a base that cannot be found.
        ConfigError: an unknown quantization.
    """
    folder = _adapter_folder(adapter)
    config = read_object(folder / ADAPTER_CONFIG)
    _check_adapter_config(config, folder)
    tensor_shapes(folder / ADAPTER_FILE)  # whole, before anything is loaded
    refuse_broken_numbers(folder / ADAPTER_FILE)
    path = find_in_run(folder, RUN_FILE)
    info = read_object(path, "Copy that of a checkpoint of the run over it.") if path is not None else {}
    run_folder = path.parent if path is not None else None
    for key, kind in INFO_TYPES.items():
        if info.get(key) is not None and not isinstance(info[key], kind):
            raise ModelError(
                f"{run_folder}/{RUN_FILE} is damaged: {key} is {info[key]!r}, expected is a {kind.__name__}."
            )
    # Whatever is judged writes eval_results.json; the demo's own summary may be older than the last judgement.
    found = next(filter(None, (find_in_run(folder, name) for name in (RESULTS_FILE, SUMMARY_FILE))), None)
    results = read_json(found) if found is not None else {}  # a damaged one may be what is to be replaced
    base_name = base_model or config.get("base_model_name_or_path")
    if not base_name or not isinstance(base_name, str):
        raise ModelError(f"{folder / ADAPTER_CONFIG} names no base model (base_model_name_or_path). Give --base-model.")
    base = find_base(base_name, revision=None if base_model else config.get("revision"))

    assumed: list[str] = []
    dtype = getattr(torch, str(info.get("compute_dtype") or ""), None)
    if not isinstance(dtype, torch.dtype):
        dtype = compute_dtype()
        assumed.append(f"the compute dtype of training was {str(dtype).removeprefix('torch.')}")
    own_config = read_object(base / "config.json").get("quantization_config")
    if own_config is not None:
        quantization, quantization_config = _own_quantization(own_config, base_name, quantization)
    else:
        quantization, quantization_config = _run_quantization(info, quantization, dtype, assumed)
    for sentence in assumed:
        log(f"ASSUMED (no run.json says so): {sentence}.")
    return AdapterRun(
        folder=folder,
        adapter_config=config,
        base=base,
        base_name=str(base_name),
        quantization=quantization,
        quantization_config=quantization_config,
        prequantized=own_config is not None,
        dtype=dtype,
        assumed=tuple(assumed),
        info=info,
        results=results,
        run_folder=run_folder,
    )


def _run_quantization(
    info: dict[str, Any], asked: str | None, dtype: torch.dtype, assumed: list[str]
) -> tuple[str, BitsAndBytesConfig | None]:
    name = asked or info.get("base_quantization")
    if name is None:
        name = ASSUMED_QUANTIZATION
        assumed.append(
            f"the base was quantized to {name} in training (if it was not, give --quantization none or int8)"
        )
    settings = info.get("quantization_config")
    if settings and name == info.get("base_quantization"):
        return name, _bitsandbytes_config(settings)
    if name not in QUANTIZATIONS:
        raise ConfigError(f"--quantization is {name!r}; accepted are {', '.join(QUANTIZATIONS)}")
    return name, bnb_config(name, dtype)


def _own_quantization(own: dict[str, Any], base: str, asked: str | None) -> tuple[str, BitsAndBytesConfig | None]:
    """The settings of a base whose files are already quantized."""
    if own.get("quant_method") not in (None, "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        raise ModelError(
            f"base {base!r} is stored in {own['quant_method']!r} format; only plain and bitsandbytes weights can be "
            "merged. Give the unquantized model with --base-model."
        )
    config = _bitsandbytes_config(own)
    name = "int8" if config.load_in_8bit else "nf4"
    if asked not in (None, name):
        raise ConfigError(
            f"--quantization is {asked!r}, but the files of base {base!r} are already {name}; leave it out"
        )
    return name, config


def _bitsandbytes_config(settings: dict[str, Any]) -> BitsAndBytesConfig:
    known = {k: v for k, v in settings.items() if not k.startswith("_") and k != "quant_method"}
    with explained("the quantization settings of the base (quantization_config) cannot be read"):
        return BitsAndBytesConfig(**known)


def _adapter_folder(adapter: str) -> Path:
    folder = Path(adapter)
    if not folder.is_dir():
        if folder.exists() or adapter.startswith((".", "/", "~")) or adapter.count("/") > 1:
            raise ModelError(f"adapter {adapter!r} is no directory. Give the run folder of a training, or a Hub id.")
        folder = _download(
            adapter, None, "adapter", ["*.json", "*.jsonl", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        )
    if (folder / ADAPTER_FILE).is_file() and (folder / ADAPTER_CONFIG).is_file():
        return folder
    if (folder / "adapter_model.bin").is_file():
        raise ModelError(
            f"{folder / 'adapter_model.bin'} is a pickle, which can run any code when it is loaded, so it is not read. "
            f"Convert it where you trust it: load it with PEFT and call save_pretrained, which writes {ADAPTER_FILE}."
        )
    missing = [name for name in (ADAPTER_FILE, ADAPTER_CONFIG) if not (folder / name).is_file()]
    nested = sorted(str(path.parent) for path in folder.glob(f"*/{ADAPTER_FILE}"))
    hint = f" Did you mean {nested[-1]}?" if nested else " Give the run folder that training wrote."
    raise ModelError(f"{adapter} has no {' and no '.join(missing)}.{hint}")


def find_base(name: str, *, revision: str | None = None) -> Path:
    """The local directory of a base model; a Hub id is downloaded (safetensors and text files only)."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise ModelError(
                f"the base model {name!r} of this adapter is not there (any more). Give its directory or Hub id "
                "with --base-model."
            )
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py"]
        folder = _download(name, revision, "base model", patterns)
    if not (folder / "config.json").is_file():
        raise ModelError(f"base model {str(folder)!r} has no config.json, so it is no Transformers model")
    return folder


def _download(repo: str, revision: str | None, what: str, patterns: list[str]) -> Path:
    with explained(f"{what} {repo!r} is no local directory, nor does the Hub give it"):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))


def _check_adapter_config(config: dict[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} holds a {config.get('peft_type')} adapter; only LORA (DoRA, rsLoRA) can be merged")
    check_values(config, str(folder / ADAPTER_CONFIG), trains=False)
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(BASE_CHANGING_INITS):
        raise ModelError(
            f"{folder} was initialised with {init!r}, which also changes the base weights, so its A and B do not fit "
            "the plain base. Save it with path_initial_model_for_weight_conversion (see PEFT's guide on PiSSA), which "
            "turns it into a plain LoRA, and use that."
        )
    if config.get("layer_replication"):
        raise ModelError(
            f"{folder} was trained with layer_replication, whose doubled layers no file of the base has; it can be "
            "used through PEFT alone."
        )


# ---- the model that was trained --------------------------------------------------------------------------------------


def load_trained(run: AdapterRun, *, trust_remote_code: bool = False) -> PeftModel:
    """The adapter on its base, as training held it, all its tensors loaded; in eval mode, on the GPU if there is one.

    Raises:
        PGKDError: base or adapter cannot be loaded, or the adapter does not fit.
    """
    base = load_base(
        str(run.base),
        quantization=run.quantization,
        quantization_config=run.quantization_config,
        dtype=run.dtype,
        trust_remote_code=trust_remote_code,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    with explained(f"the adapter {run.folder} does not fit base {run.base_name!r}"):
        model = PeftModel.from_pretrained(base, str(run.folder))
    load_adapter(model, run.folder, f"base {run.base_name!r}")
    guard_cpu_linear4bit(model)
    return model.eval()


def base_matches(model: PeftModel, run: AdapterRun) -> bool | None:
    """Whether the base as loaded here is, bit for bit, the one whose digest run.json holds; None where there is no
    digest, or where the run was trained on another kind of device, whose quantization kernels may round differently."""
    trained_on_cpu = str(run.info.get("device")).startswith("CPU")
    if not run.info.get("base_digest") or trained_on_cpu == torch.cuda.is_available():
        return None
    return FrozenCheck(model).digest == run.info["base_digest"]


def wrong_base(run: AdapterRun) -> str:
    """What is said when :func:`base_matches` is False."""
    return (
        f"the base {run.base_name!r} is not the one that the adapter was trained on: its weights have another digest "
        "than run.json holds. An adapter means nothing on other weights; bring the old base back (--base-model)."
    )


def check_base(model: PeftModel, run: AdapterRun) -> None:
    """Raises ModelError when the base is known to be another one than in training."""
    if base_matches(model, run) is False:
        raise ModelError(wrong_base(run))
