"""A plain 16-bit copy of the student that writes rollouts; and the choice between it and the PEFT model itself."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from ..model.adapters import STUDENT, adapter_state, switchable_layers
from ..model.load import base_of, dequantized_weight


class MergedCopy:
    """A plain 16-bit copy of the student: linear weights are dequant(W) + delta, added in float32, cast last.

    Embeddings, norms, biases, the head and every other tensor without LoRA are shared with the base. The base is only
    ever read.
    """

    def __init__(self, student: PeftModel, dtype: torch.dtype):
        reason = not_mergeable(student)
        if reason:
            raise ConfigError(f"rollout_engine='merged' cannot be used: {reason}. Use rollout_engine='adapter'.")
        base = base_of(student)
        # A deep copy of the modules that keeps every tensor where it is.
        shared = {id(t): t for t in (*base.parameters(), *base.buffers())}
        for module in base.modules():
            shared.update({id(p): p for p in module._parameters.values() if p is not None})
        hooked = base.__dict__.pop("forward", None)  # a patched forward is bound to the base: the copy has its class's
        try:
            self.model = copy.deepcopy(base, shared)
        finally:
            if hooked is not None:
                base.__dict__["forward"] = hooked
        self.pairs: list[tuple[LoraLayer, nn.Linear]] = []
        for name, source in _linears(base):
            inner = source.get_base_layer() if isinstance(source, LoraLayer) else source
            # without initial values: drawing them would use up random numbers that a resumed run does not draw
            shape = _shape(inner)
            linear = nn.utils.skip_init(nn.Linear, *shape, bias=False, device=inner.weight.device, dtype=dtype)
            linear.bias = inner.bias
            if isinstance(source, LoraLayer):
                self.pairs.append((source, linear))
            else:
                linear.weight.data.copy_(dequantized_weight(source))
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, linear)
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def refresh(self) -> nn.Module:
        """Bring the linear weights up to date with the student's; once an optimizer step."""
        for source, linear in self.pairs:
            delta = source.get_delta_weight(STUDENT).float()
            turned = isinstance(source.get_base_layer(), Conv1D)
            # into the delta, which is new: the dense weight of a float32 base is the base's own tensor
            linear.weight.copy_((delta.T if turned else delta).add_(dequantized_weight(source.get_base_layer())))
        return self.model


def _linears(base: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that a merged copy holds anew: those with LoRA, and the quantized ones without."""
    import bitsandbytes as bnb

    found: list[tuple[str, nn.Module]] = []
    for name, module in base.named_modules():
        quantized = isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
        if isinstance(module, LoraLayer) or (quantized and not name.endswith("base_layer")):
            found.append((name, module))
    return found


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer; GPT-2's Conv1D holds its weight the other way round."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def not_mergeable(student: PeftModel) -> str | None:
    """Why this adapter cannot be added to dense weights, or None."""
    config = student.peft_config[STUDENT]
    if getattr(config, "use_dora", False):
        return "DoRA rescales the weights instead of adding to them"
    for layer in switchable_layers(student):
        if not isinstance(layer, LoraLayer):
            return "the adapter trains whole modules (modules_to_save or trainable tokens)"
        if not isinstance(layer.get_base_layer(), (nn.Linear, Conv1D)):
            return f"LoRA sits on a {type(layer.get_base_layer()).__name__}, which is no linear layer"
    return None


class RolloutEngine:
    """Writes completions with the student's current weights.

    Args:
        student: the PeftModel that trains.
        engine: ``adapter``, ``merged`` or ``auto`` (merged where its copy takes less than half of the free memory).
        dtype: of the merged copy's linear weights.

    Attributes:
        name: the engine that was taken.
        reason: why, in words, for the log.
    """

    def __init__(self, student: PeftModel, engine: str, dtype: torch.dtype):
        self.student = student
        self.name, self.reason = choose_engine(student, engine)
        self.copy = MergedCopy(student, dtype) if self.name == "merged" else None

    @contextlib.contextmanager
    def model(self) -> Iterator[nn.Module]:
        """The model to generate with, up to date with the student."""
        if self.copy is not None:
            yield self.copy.refresh()
        else:
            with adapter_state(self.student, "shared") as model:
                yield model


def merged_bytes(student: PeftModel) -> int:
    """Extra memory of a merged copy: two bytes for each weight of each linear layer that it holds anew."""
    layers = [m.get_base_layer() if isinstance(m, LoraLayer) else m for _, m in _linears(base_of(student))]
    return sum(2 * math.prod(_shape(layer)) for layer in layers)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on `device`."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil

    return psutil.virtual_memory().available


def choose_engine(student: PeftModel, engine: str) -> tuple[str, str]:
    """Which engine to take, and why."""
    if engine != "auto":
        return engine, "as asked"
    reason = not_mergeable(student)
    if reason:
        return "adapter", reason
    needed, free = merged_bytes(student), free_bytes(next(student.parameters()).device)
    words = f"a merged copy takes {needed / 2**30:.2f} GiB of {free / 2**30:.1f} GiB free"
    return ("merged", words) if needed < free / 2 else ("adapter", words + ", more than half")
