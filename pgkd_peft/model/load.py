"""Load the one base model (quantized), its tokenizer and its LoRA."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from ..config import QUANTIZATIONS, compute_dtype
from ..errors import ConfigError, ModelError, explained, read_object, refuse_pointer
from .architecture import NOT_QUANTIZED, auto_class, dequantizing, lora_targets, quantized_file_method
from .cpu import guard_cpu_linear4bit
from .lora import check_lora, check_names

logger = logging.getLogger(__name__)


JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")

# ---- files -----------------------------------------------------------------------------------------------------------


def check_source(name: str, what: str = "model") -> None:
    """That a name which can only be a local path is a folder, and its weights and settings are whole files.

    Raises:
        ModelError: there is no such folder, or a file in it is cut off, damaged or a Git LFS pointer.
    """
    folder = Path(name)
    if folder.is_dir():
        for file in JSON_FILES:
            if (folder / file).is_file():
                read_object(folder / file)
        for path in sorted(folder.glob("*.safetensors")):
            tensor_shapes(path)
    elif folder.exists():
        raise ModelError(f"{what} {name!r} is a file; give the folder that holds it.")
    elif not name or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(
            f"{what} {name!r} does not exist. Give a local folder that holds config.json and the weights, or a Hub id."
        )


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a safetensors file; its header alone is read.

    Raises:
        ModelError: it cannot be read: missing, cut off, damaged, a Git LFS pointer.
    """
    refuse_pointer(path)
    advice = "It is cut off or damaged; download or copy it again."
    with explained(f"{path} cannot be read", advice=advice), safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


# ---- the base --------------------------------------------------------------------------------------------------------


def bnb_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The bitsandbytes settings behind ``base_quantization``: NF4 with double quantization as in QLoRA
    (arXiv:2305.14314, section 3), LLM.int8() (arXiv:2208.07339), or None."""
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    raise ModelError(f"quantization is {quantization!r}; accepted are {', '.join(QUANTIZATIONS)}")


def load_base(
    name_or_path: str,
    *,
    quantization: str = "nf4",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    device: str | torch.device | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    **model_kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model once, quantized by default, frozen, in eval mode.

    Args:
        name_or_path: a local directory or a Hub id.
        quantization: nf4, int8 or none; ignored when `quantization_config` is given.
        dtype: of the weights that are not quantized, and the compute dtype of those that are. Default:
            :func:`compute_dtype`.
        device: where to put it, quantized or not, unless `model_kwargs` holds a ``device_map``. Default: the current
            CUDA device if there is one, else the CPU.
        quantization_config: bitsandbytes settings that replace those of `quantization`.
        model_kwargs: passed on to ``AutoModelForCausalLM.from_pretrained`` (of a model that is registered as
            image-text alone: to that class, for its text).

    Raises:
        ModelError: unknown quantization, a path that holds no model, or files that lack weights or are quantized in
            another way.
    """
    check_source(name_or_path)
    dtype = dtype or compute_dtype()
    where = {"trust_remote_code": trust_remote_code, "revision": revision}
    config = model_kwargs.pop("config", None) or _read_config(name_or_path, {**where, **_only_where(model_kwargs)})
    if quantization_config is None:
        quantization_config = bnb_config(quantization, dtype)
        if quantization_config is not None and config.model_type in NOT_QUANTIZED:
            skipped = [*NOT_QUANTIZED[config.model_type], "lm_head"]
            quantization_config.llm_int8_skip_modules = skipped
    quantization_config = _settle_quantization(name_or_path, config, quantization_config)
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    if quantization_config is not None:
        model_kwargs["quantization_config"] = quantization_config
        model_kwargs.setdefault("device_map", {"": device})
    model_kwargs["ignore_mismatched_sizes"] = True  # refused below, by name
    with explained(f"model {name_or_path!r} cannot be loaded"):
        model, loading = auto_class(config).from_pretrained(
            name_or_path, config=config, dtype=dtype, output_loading_info=True, **where, **model_kwargs
        )
    _check_all_loaded(name_or_path, model, loading)
    if model_kwargs.get("device_map") is None:
        model.to(device)
    guard_cpu_linear4bit(model)
    model.requires_grad_(False)
    return model.eval()


def quantization_name(settings: dict[str, Any] | None) -> str:
    """What bitsandbytes settings are called: none, int8, or the 4-bit type (nf4, fp4)."""
    if not settings:
        return "none"
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        return "int8"
    return str(settings.get("bnb_4bit_quant_type", "nf4"))


def _read_config(name: str, where: dict[str, Any]) -> Any:
    with explained(f"model {name!r} cannot be loaded"):
        return AutoConfig.from_pretrained(name, **where)


def _only_where(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that say where files are, which the config needs too."""
    names = ("subfolder", "cache_dir", "token", "gguf_file", "local_files_only", "code_revision")
    return {name: model_kwargs[name] for name in names if name in model_kwargs}


def _settle_quantization(name: str, config: Any, wanted: Any) -> Any:
    """The quantization that is asked for, against the one that the files have.

    Raises:
        ModelError: the files are quantized in a way that nothing here can train on, or not as asked.
    """
    method = quantized_file_method(config)
    if method is None:
        return wanted
    if method.startswith("bitsandbytes"):
        _check_stored(name, config, wanted)
        return wanted
    dense = dequantizing(method)
    if dense is None:
        raise ModelError(
            f"the files of {name!r} are quantized as {method!r}, on which no LoRA of this tool can be trained and "
            "merged. Give the unquantized model; it is quantized while it is loaded."
        )
    if isinstance(wanted, BitsAndBytesConfig):
        raise ModelError(
            f"the files of {name!r} are quantized as {method!r} already, which base_quantization=nf4 or int8 cannot "
            "quantize again. Set base_quantization to none, which loads them dequantized to 16 bits, or give a 16-bit "
            "copy of the model."
        )
    return wanted if wanted is not None else dense


def _check_stored(name: str, config: Any, asked: BitsAndBytesConfig | None) -> None:
    """Files that bitsandbytes has quantized already are asked for in just that quantization.

    Raises:
        ModelError: names both, and what to set.
    """
    stored = config.quantization_config if isinstance(config.quantization_config, dict) else None
    stored = stored if stored is not None else config.quantization_config.to_dict()
    there, wanted = quantization_name(stored), quantization_name(asked.to_dict() if asked is not None else None)
    if there != wanted:
        known = f"set base_quantization to {there}" if there in QUANTIZATIONS else "take the unquantized model"
        raise ModelError(
            f"the files of base {name!r} are quantized to {there} already, but {wanted} is asked for; {known}."
        )


def _check_all_loaded(name: str, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Every weight came from the files, where what is missing or of another shape would be random numbers; and no layer
    of the files was left out. (Heads and towers that this architecture does not have may be there.)"""
    own = {re.sub(r"\d+", "#", key) for key, _ in model.named_parameters(remove_duplicate=False)}
    left = sorted(key for key in loading.get("unexpected_keys") or () if re.sub(r"\d+", "#", key) in own)
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ModelError(
            f"the files of {name!r} hold {', '.join(left[:3])}{more}, layers that config.json does not have, so a part "
            "of the model would be left out. Use the config.json that belongs to these weights."
        )
    wrong = [key if isinstance(key, str) else str(key[0]) for key in loading.get("mismatched_keys") or ()]
    for what, keys in (("lack", sorted(loading.get("missing_keys") or ())), ("hold in another shape", sorted(wrong))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ModelError(
                f"the files of {name!r} {what} {', '.join(keys[:3])}{more}, which would be random numbers. Is the "
                "download complete, and is config.json that of these weights?"
            )


def load_tokenizer(
    name_or_path: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a pad token (its EOS where it has none of its own) and padding on the left.

    `chat_template`, a Jinja text, replaces the tokenizer's own.

    Raises:
        ModelError: there is no tokenizer, or it has no chat template.
    """
    check_source(name_or_path)
    with explained(f"no tokenizer can be loaded from {name_or_path!r}"):
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, revision=revision, padding_side="left"
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return prepare_tokenizer(tokenizer)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give it a pad token, and make sure that it can render conversations."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError("the tokenizer has neither a pad token nor an EOS token; set tokenizer.pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template, so it is a base model. "
            "Use the instruct model, or give a template with --chat_template_path FILE.jinja."
        )
    return tokenizer


DEFAULT_LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}


def default_lora(model: PreTrainedModel | None = None) -> LoraConfig:
    """r=16, alpha=32, every linear layer of the text model but the head, no dropout.

    All linear layers as in QLoRA (arXiv:2305.14314, section 4); alpha = 2r and no dropout: the teacher is this very
    model without dropout, so dropout would only add noise to the divergence. What `model` has that a LoRA cannot train
    (:func:`lora_targets`) is left out.
    """
    targets = lora_targets(model)[0] if model is not None else "all-linear"
    return LoraConfig(**DEFAULT_LORA, target_modules=targets, task_type="CAUSAL_LM")


def attach_lora(model: PreTrainedModel, peft_config: PeftConfig | None = None) -> PeftModel:
    """Wrap `model` with a LoRA (the default one when none is given), its weights in float32.

    Raises:
        ConfigError, ModelError: see :func:`~pgkd_peft.model.lora.check_lora`, and what PEFT cannot attach.
    """
    if peft_config is None:
        return get_peft_model(model, default_lora(model))
    check_lora(peft_config)
    assert isinstance(peft_config, LoraConfig)
    check_names(model, peft_config)
    with explained("the LoRA of peft_config (lora_target_modules ...) cannot be attached", ConfigError):
        return get_peft_model(model, peft_config)


def base_of(model: nn.Module) -> PreTrainedModel:
    """The Transformers model inside a PeftModel (or the model itself)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


@torch.no_grad()
def dequantized_weight(module: nn.Module) -> torch.Tensor:
    """The dense weight (out, in) in float32 that a Linear, Conv1D, Linear4bit or Linear8bitLt computes with.

    A 4-bit weight is dequantized by bitsandbytes to the dtype that it was quantized from, as its forward does.
    """
    import bitsandbytes as bnb

    weight = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    if isinstance(module, bnb.nn.Linear8bitLt):
        scales = module.state.SCB if module.state.SCB is not None else weight.SCB
        data = module.state.CB if module.state.CB is not None else weight.data
        return bnb.functional.int8_vectorwise_dequant(data, scales).float()
    return (weight.data.T if isinstance(module, Conv1D) else weight.data).float()
