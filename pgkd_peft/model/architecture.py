"""What differs between architectures: where the text model is, what LoRA can train in it, dropout kept as a number."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from ..trl_compat import names_of_fused_experts

# Layers that are a product with their weight and nothing else.
LINEAR = (nn.Linear, Conv1D, bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
# PEFT refuses out_proj in these, in which some kernels read its weight without calling it.
_MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_ROUTERS = {"router", "gate"}
# Phi-MoE's router compares its scores with this number, in evaluation as well.
_NOT_NOISE = {"router_jitter_noise"}
# Modules, as patterns of Transformers, whose weight the model reads without calling them: gemma3n clamps altup's in
# place, Mamba's kernels take some.
NOT_QUANTIZED = {
    "gemma3n": [r".*\.altup"],
    "gemma3n_text": [r".*\.altup"],
    "mamba": ["mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"],
    "falcon_mamba": ["mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"],
    "jamba": ["mamba.dt_proj"],
    "mamba2": ["mixer.out_proj"],
    "nemotron_h": ["mixer.out_proj"],
    "falcon_h1": ["mamba.out_proj"],
}


def auto_class(config: PreTrainedConfig) -> Any:
    """AutoModelForCausalLM, or the image-text class of a checkpoint that is registered as nothing else.

    Only the text part of such a model is used.
    """
    if type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    ):
        return AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM  # whose error says what is accepted


def backbone_of(base: PreTrainedModel) -> nn.Module:
    """The model below the head; where `base_model` is the model itself (llama4), what it calls its model."""
    inner: nn.Module = base.base_model
    return base.model if inner is base else inner  # type: ignore[return-value]


def zero_dropout(model: nn.Module) -> list[str]:
    """Switch off the noise of training that is kept as a number, in modules and in configs: dropout
    (``self.attention_dropout = 0.1``) and the jitter of routers.

    LoRA's own dropout is left alone: it is a module. Returns what was changed.
    """
    changed = []
    for module_name, module in model.named_modules():
        for owner, where in ((module, module_name), (getattr(module, "config", None), f"{module_name}.config")):
            if owner is None or "lora_" in where:
                continue
            for holder in _with_sub_configs(owner):
                for name, value in list(vars(holder).items()):
                    noise = "drop" in name or ("jitter" in name and name not in _NOT_NOISE)
                    if noise and type(value) is float and value > 0 and "lora" not in name:
                        setattr(holder, name, 0.0)
                        changed.append(f"{where}.{name}".strip("."))
    return changed


def _with_sub_configs(holder: Any) -> list[Any]:
    if not isinstance(holder, PreTrainedConfig):
        return [holder]
    return [holder, *(value for value in vars(holder).values() if isinstance(value, PreTrainedConfig))]


def lora_targets(model: PreTrainedModel) -> tuple[str | list[str], list[str]]:
    """The default target modules, and what is left out in words.

    Every linear layer of the text model but the head. Left out are: vision and audio towers, which text never
    reaches; routers; experts (a LoRA of each would be a billion parameters, and fused ones are no linear layers);
    Mamba projections whose weight the fused kernel reads without calling the layer; gemma3n's altup.

    Raises:
        ModelError: there is nothing to train.
    """
    heads = {id(model.get_output_embeddings())}
    text = {id(module) for module in backbone_of(model).get_decoder().modules()} if _has_decoder(model) else None
    parents = dict(model.named_modules())
    targets, left_out, reasons = [], [], set()
    fused = names_of_fused_experts(model)
    for name, module in parents.items():
        if not isinstance(module, LINEAR) or id(module) in heads:
            continue
        reason = _why_not(name, module, parents, model.config.model_type)
        if text is not None and id(module) not in text:
            reason = "vision, audio and projection towers (no text passes them)"
        elif reason is None and name.rpartition(".")[2] in fused:
            reason = "dense and shared MLPs (PEFT takes their names for the fused experts')"
        if reason:
            reasons.add(reason)
            left_out.append(name)
        else:
            targets.append(name)
    if fused_experts(model):
        reasons.add("experts (fused tensors, not linear layers)")
    if not targets:
        raise ModelError(f"{type(model).__name__} has no linear layer that a LoRA could train; give target_modules.")
    if not reasons:
        return "all-linear", []
    return _shortest(targets, left_out, parents), sorted(reasons)


def _has_decoder(model: PreTrainedModel) -> bool:
    return hasattr(backbone_of(model), "get_decoder")


def _why_not(name: str, module: nn.Module, parents: dict[str, nn.Module], model_type: str) -> str | None:
    parts = name.split(".")
    owner = parents[name.rpartition(".")[0]]
    if not is_linear(module) or _ROUTERS & set(parts[-2:]) or getattr(module, "out_features", 0) == 1:
        return "routers and gates"
    if "experts" in parts:
        return "experts (one LoRA each would be too many parameters)"
    if "altup" in parts:
        return "altup (it does not train)"
    if any(part.endswith("_adapter_list") for part in parts):
        return "adapters of the shared blocks (of each list a layer uses one)"
    mamba_block = "Mamba" in type(owner).__name__ and parts[-1] in ("out_proj", "dt_proj", "x_proj")
    if mamba_block or (model_type in _MAMBA_TYPES and parts[-1] == "out_proj"):
        return "out_proj, dt_proj and x_proj of Mamba blocks (the fused kernel bypasses their LoRA)"
    return None


def _shortest(targets: list[str], left_out: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """Last names where they match no module that is left out (PEFT matches endings), full names otherwise."""
    taken = {name.rpartition(".")[2] for name in modules if name not in set(targets)}
    return sorted({leaf if (leaf := name.rpartition(".")[2]) not in taken else name for name in targets})


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is a product with its weight, and nothing else: not so the routers that are subclasses of Linear
    (Llama 4, Phi-MoE). Falcon's adds its bias in another way, and no more."""
    return type(module) in LINEAR or type(module).__name__ == "FalconLinear"


def fused_experts(model: nn.Module) -> list[nn.Parameter]:
    """Expert weights kept as one tensor for all experts: no LoRA reaches them and bitsandbytes leaves them alone."""
    return [
        param
        for name, param in model.named_parameters()
        if param.dim() == 3 and "experts" in name.split(".") and "lora_" not in name
    ]


def shares(model: nn.Module) -> tuple[float, float]:
    """(share of the base's weights under LoRA, share that is quantized), counted in weights."""
    total = adapted = quantized = 0
    for name, module in model.named_modules():
        for kind, param in module._parameters.items():
            if param is None or "lora_" in name or ".modules_to_save" in name:
                continue
            bits4 = isinstance(param, bnb.nn.Params4bit)
            count = param.numel() * (2 * param.element_size() if bits4 and param.quant_state is not None else 1)
            total += count
            if kind == "weight" and name.endswith(".base_layer"):
                adapted += count
            if bits4 or isinstance(param, bnb.nn.Int8Params):
                quantized += count
    return adapted / max(total, 1), quantized / max(total, 1)


def warn_of_long_rope(config: PreTrainedConfig) -> str | None:
    """What to say of a model whose frequencies depend on the longest row of a batch (longrope), else None."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    long = [kind for kind in kinds if kind.get("rope_type", kind.get("type")) == "longrope"]
    if not long:
        return None
    limit = long[0].get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    return (
        f"this model changes its position frequencies beyond {limit or 'its original length of'} tokens (longrope), "
        "for all rows of a batch at once: a short row beside a long one is read differently than alone. Set "
        "max_length to stay below."
    )


def quantized_file_method(config: PreTrainedConfig) -> str | None:
    """The quantization method of a checkpoint's own files, as its config.json names it."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return str(getattr(method, "value", method))


def dequantizing(method: str) -> Any | None:
    """Settings that turn the files of this method into 16-bit weights, where Transformers can."""
    kinds = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    return kinds[method](dequantize=True) if method in kinds else None
