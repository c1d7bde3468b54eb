"""Load the one base model (quantized), its tokenizer and its LoRA; and the built-in demo model."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..config import QUANTIZATIONS, compute_dtype
from ..errors import ModelError, first_line
from .cpu import guard_cpu_linear4bit

logger = logging.getLogger(__name__)


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
        model_kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ModelError: unknown quantization, or a path that holds no model.
    """
    dtype = dtype or compute_dtype()
    if quantization_config is None:
        quantization_config = bnb_config(quantization, dtype)
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    if quantization_config is not None:
        model_kwargs["quantization_config"] = quantization_config
        model_kwargs.setdefault("device_map", {"": device})
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision, **model_kwargs
        )
    except OSError as error:
        raise ModelError(
            f"model {name_or_path!r} cannot be loaded: {first_line(error)} Give a local directory that holds "
            "config.json and the weights, or a Hub id that exists and that you may read."
        ) from error
    if model_kwargs.get("device_map") is None:
        model.to(device)
    guard_cpu_linear4bit(model)
    model.requires_grad_(False)
    return model.eval()


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
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, revision=revision, padding_side="left"
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer can be loaded from {name_or_path!r}: {first_line(error)}") from error
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


def default_lora() -> LoraConfig:
    """r=16, alpha=32, every linear layer but the head, no dropout.

    All linear layers as in QLoRA (arXiv:2305.14314, section 4); alpha = 2r and no dropout: the teacher is this very
    model without dropout, so dropout would only add noise to the divergence.
    """
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def attach_lora(model: PreTrainedModel, peft_config: PeftConfig | None = None) -> PeftModel:
    """Wrap `model` with a LoRA (the default one when none is given), its weights in float32.

    Raises:
        ModelError: the config is no LoRA, so that nothing could be disabled to get the teacher back.
    """
    peft_config = peft_config or default_lora()
    if not isinstance(peft_config, LoraConfig):
        raise ModelError(
            f"peft_config is a {type(peft_config).__name__}; only LoRA (peft.LoraConfig, DoRA and rsLoRA included) "
            "can be switched off to give the teacher. Pass a LoraConfig."
        )
    return get_peft_model(model, peft_config)


def base_of(model: nn.Module) -> PreTrainedModel:
    """The Transformers model inside a PeftModel (or the model itself)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


@torch.no_grad()
def dequantized_weight(module: nn.Module) -> torch.Tensor:
    """The dense weight (out, in) in float32 that a Linear, Linear4bit or Linear8bitLt computes with.

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
    return weight.data.float()
