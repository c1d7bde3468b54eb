"""The output head, as the divergence needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError
from .adapters import adapter_state
from .load import base_of


class Head:
    """The output head as the divergence needs it: weight and bias, or a callable where the head itself trains.

    Args:
        teacher: None for the student's head, else the ``teacher_adapter`` whose head it is.
    """

    def __init__(self, model: nn.Module, *, teacher: str | None = None):
        base = base_of(model)
        module = base.get_output_embeddings()
        if module is None:
            raise ModelError(f"{type(base).__name__} has no output head to compare distributions with")
        inner = getattr(module, "base_layer", getattr(module, "original_module", module))
        if teacher == "disabled":  # the head below LoRA, or the original behind modules_to_save
            module = inner
        elif teacher is not None and inner is not module:
            module = _in_state(module, teacher)
        self.bias: torch.Tensor | None = None
        self.weight: Any = module
        if type(module) is nn.Linear:
            self.weight, self.bias = module.weight, module.bias
        self.softcap, self.scale = logit_shape(base)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model's own forward makes of hidden states (R, D): (R, V)."""
        if isinstance(self.weight, torch.Tensor):
            logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        else:
            logits = self.weight(hidden)
        logits = logits.float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _in_state(head: nn.Module, which: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """An adapted head that answers with the adapter `which`."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with adapter_state(head, which):
            return head(hidden)

    return forward


def logit_shape(base: PreTrainedModel) -> tuple[float | None, float]:
    """(soft cap, scale) that the model's own forward applies after its head.

    Gemma caps (``final_logit_softcapping``), Cohere multiplies (``logit_scale``), Falcon-H1 multiplies
    (``lm_head_multiplier``), Granite divides (``logits_scaling``; HyperCLOVA X multiplies by it).
    """
    config = base.config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
            break
    else:
        scaling = getattr(config, "logits_scaling", None)
        scale = 1.0 if scaling is None else float(scaling if config.model_type == "hyperclovax" else 1 / scaling)
    return getattr(config, "final_logit_softcapping", None), scale
