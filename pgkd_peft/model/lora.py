"""Which LoRA settings can train here, found out before a model is loaded, and which modules their names mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import ConfigError, ModelError, explained
from .architecture import LINEAR

# These write to the base weights as well: A and B mean nothing on the plain base, which is the teacher.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_lora(config: PeftConfig | Mapping[str, Any], source: str = "the LoRA settings") -> None:
    """Refuse, by name, what cannot be trained or merged later.

    Args:
        config: what is to be attached, or the contents of an adapter_config.json.
        source: where it comes from, for the message.

    Raises:
        ModelError: it is no LoRA, so that nothing could be disabled to get the teacher back.
        ConfigError: a setting cannot train; the message names it.
    """
    if isinstance(config, PeftConfig) and not isinstance(config, LoraConfig):
        raise ModelError(
            f"peft_config is a {type(config).__name__}; only LoRA (peft.LoraConfig, DoRA and rsLoRA included) "
            "can be switched off to give the teacher. Pass a LoraConfig."
        )
    settings = config.to_dict() if isinstance(config, LoraConfig) else config
    kind = settings.get("peft_type")
    if kind is not None and str(getattr(kind, "value", kind)) != "LORA":
        raise ModelError(f"{source} is a {kind} adapter; only LORA (DoRA, rsLoRA) can be trained here.")
    task = settings.get("task_type")
    if task is not None and str(getattr(task, "value", task)) != "CAUSAL_LM":
        raise ConfigError(f"{source}: task_type is {task!s}; only CAUSAL_LM writes text. Remove it (lora_task_type).")
    check_values(settings, source)
    if settings.get("bias") not in (None, "none"):
        raise ConfigError(
            f"{source}: bias={settings['bias']!r} trains biases of the base itself, which is the teacher and must stay "
            "as it is. Use bias='none' (lora_bias=True gives the adapter biases of its own)."
        )
    trained = ("target_modules", "target_parameters", "modules_to_save", "trainable_token_indices")
    if settings.get("target_modules") is not None and not any(settings.get(name) for name in trained):
        raise ConfigError(f"{source}: target_modules is empty, so nothing would train. Name modules, or 'all-linear'.")
    init = settings.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise ConfigError(
            f"{source}: init_lora_weights={init!r} changes the base weights, which are the teacher and must stay as "
            "they are; the adapter could not be merged into the plain base either. Use True, 'gaussian' or "
            "'orthogonal'."
        )
    if settings.get("layer_replication"):
        raise ConfigError(
            f"{source}: layer_replication doubles layers of the base, so the student is no longer the teacher's model, "
            "and no file of the base has them to merge into. Remove it."
        )


def check_values(settings: Mapping[str, Any], source: str, *, trains: bool = True) -> None:
    """Raises ConfigError for numbers, patterns and names that no LoRA can have; one that is only to be used may scale
    its product by 0."""
    targets = settings.get("target_modules")
    if targets is not None and not isinstance(targets, (str, list, tuple, set)):
        raise ConfigError(f"{source}: target_modules is {targets!r}; it must be a list of names, or one text.")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(name) or {}, Mapping):
            raise ConfigError(f"{source}: {name} is {settings[name]!r}; it must map module names to numbers.")
    ranks = {"r": settings.get("r", 8), **{f"rank_pattern[{k}]": v for k, v in _mapping(settings, "rank_pattern")}}
    alphas = {"lora_alpha": settings.get("lora_alpha", 8)}
    alphas |= {f"alpha_pattern[{k}]": v for k, v in _mapping(settings, "alpha_pattern")}
    for name, value in ranks.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{source}: {_flag(name)} is {value!r}; it must be a whole number, 1 or more.")
    for name, value in alphas.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        if not is_number or (trains and value == 0):
            raise ConfigError(f"{source}: {name} is {value!r}; it must be a number, more than 0.")
    dropout = settings.get("lora_dropout", 0.0)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ConfigError(f"{source}: lora_dropout is {dropout!r}; it must be 0 or more and less than 1.")


def _mapping(settings: Mapping[str, Any], name: str) -> Iterable[tuple[str, Any]]:
    value = settings.get(name)
    return value.items() if isinstance(value, Mapping) else ()


def _flag(name: str) -> str:
    return "lora_r (r)" if name == "r" else name


def _names(value: Any) -> list[str]:
    """The module names that a setting lists; none for a regular expression or "all-linear"."""
    return [str(name) for name in value] if isinstance(value, (list, tuple, set)) else []


def check_names(model: nn.Module, config: LoraConfig) -> None:
    """That every name in the settings means some module of the model: PEFT is content when one of them does, and says
    nothing of the others.

    Raises:
        ConfigError: a name that matches nothing, with the names there are.
    """
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for field, there in (
        ("target_modules", modules),
        ("modules_to_save", modules),
        ("exclude_modules", modules),
        ("target_parameters", parameters),
    ):
        for name in _names(getattr(config, field, None)):
            if not any(other == name or other.endswith(f".{name}") for other in there):
                head = model.get_output_embeddings()  # type: ignore[operator]
                linear = {
                    n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, LINEAR) and m is not head
                }
                raise ConfigError(
                    f"{field} has {name!r}, which no module of {type(model).__name__} is called. Its linear layers are "
                    f"{', '.join(sorted(linear))}."
                )
    layers = config.layers_to_transform
    for layer in [layers] if isinstance(layers, int) else layers or ():
        if not any(f".{layer}." in name for name in modules):
            raise ConfigError(f"layers_to_transform has {layer}, a layer that {type(model).__name__} does not have.")
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    tokens = config.trainable_token_indices
    rows = embedding.weight.shape[0]
    for token in [i for ids in tokens.values() for i in ids] if isinstance(tokens, dict) else tokens or ():
        if not 0 <= token < rows:
            raise ConfigError(f"trainable_token_indices has {token}, but the embedding has {rows} rows.")


def check_names_of(name: str, config: LoraConfig, **source: Any) -> None:
    """As :func:`check_names`, of a model that is not loaded yet: built from its config, without memory for weights."""
    with explained(f"model {name!r} cannot be loaded"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, **source))
    check_names(model, config)
