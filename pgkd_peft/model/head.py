"""The output head of a model, as the divergence needs it."""

from __future__ import annotations

import re

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError, ModelError
from .load import base_of

NAMES = ("lm_head", "embed_out")  # what Transformers' models call their output head
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # what their configs call its cap


class Head:
    """The frozen output head: what the hidden states are multiplied with, and what is done to the logits then.

    Attributes:
        weight: (V, D), or the module itself where its weight is quantized.
        bias: (V,) or None.
        softcap, scale: see :func:`logit_shape`.

    Raises:
        ModelError: the model has no output head.
    """

    def __init__(self, model: nn.Module):
        base = base_of(model)
        module = base.get_output_embeddings()
        if module is None:
            raise ModelError(f"{type(base).__name__} has no output head to compare distributions with")
        plain = type(module) is nn.Linear
        self.weight: torch.Tensor | nn.Module = module.weight if plain else module
        self.bias: torch.Tensor | None = module.bias if plain else None
        # a 4-bit layer multiplies in its compute dtype whatever it is given, and answers in the dtype it was given
        self.dtype: torch.dtype | None = module.weight.dtype if plain else getattr(module, "compute_dtype", None)
        self.softcap, self.scale = logit_shape(base)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model's own forward makes of hidden states (R, D): (R, V)."""
        if isinstance(self.weight, torch.Tensor):
            logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        else:
            logits = self.weight(hidden)
        logits = logits.float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def rows(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Hidden states in the dtype that the model's own head is given them."""
        return hidden_ND if self.dtype is None else hidden_ND.to(self.dtype)


def check_head_frozen(model: nn.Module) -> None:
    """Refuse a student whose adapter trains the output head in whatever way.

    Raises:
        ConfigError: it does.
    """
    module = base_of(model).get_output_embeddings()
    if module is not None and any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(head_trains("the adapter (its target_modules, modules_to_save, bias or token indices)"))


def head_trains(what: str) -> str:
    return (
        f"{what} would train the model's output head. One frozen head, shared by teacher and student, is what the "
        "divergence rests on. Take the head's name out of target_modules and modules_to_save (target_modules="
        "'all-linear' leaves it out), and use bias='none'."
    )


def refuse_trainable_head(config: PeftConfig | None) -> None:
    """Refuse, before a model is loaded, LoRA settings that name the output head.

    Raises:
        ConfigError: names the setting, what it holds and the fix.
    """
    if config is None:
        return
    for head in NAMES:
        named = re.compile(rf"(.*\.)?{head}(\..*)?")
        for setting in ("modules_to_save", "target_parameters"):
            for value in getattr(config, setting, None) or ():
                if named.fullmatch(value):
                    raise ConfigError(head_trains(f"{setting}={getattr(config, setting)!r}"))
        targets = getattr(config, "target_modules", None)
        if targets and targets != "all-linear" and check_target_module_exists(config, head):
            shown = repr(targets if isinstance(targets, str) else sorted(targets))
            raise ConfigError(head_trains(f"target_modules={shown}"))


def logit_shape(base: PreTrainedModel) -> tuple[float | None, float]:
    """(soft cap, scale) that the model's own forward applies after its head.

    Gemma caps (``final_logit_softcapping``; RecurrentGemma and xLSTM under names of their own), Cohere multiplies
    (``logit_scale``), Falcon-H1 multiplies (``lm_head_multiplier``), Granite divides (``logits_scaling``; HyperCLOVA X
    multiplies by it).
    """
    config = base.config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
            break
    else:
        scaling = getattr(config, "logits_scaling", None)
        scale = 1.0 if scaling is None else float(scaling if config.model_type == "hyperclovax" else 1 / scaling)
    caps = (getattr(config, name, None) for name in SOFT_CAPS)
    return next((cap for cap in caps if cap is not None), None), scale
