"""Whose weights answer as teacher; the context manager that sets them; the proof that the base stayed frozen."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .errors import ConfigError, FrozenBaseError
from .model import base_of

STUDENT = "default"  # PEFT's name of the one adapter that trains


def switchable_layers(model: nn.Module) -> list[nn.Module]:
    """Every layer that an adapter changes: LoRA layers and copies of modules that are trained whole."""
    return [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


@contextlib.contextmanager
def adapter_state(model: nn.Module, which: str) -> Iterator[nn.Module]:
    """Inside, `model` is in eval mode and answers with another set of weights; afterwards everything is as before.

    Adapter switches, active adapters, train/eval mode of every module and ``requires_grad`` of every parameter are put
    back, also when the body raises and when contexts are nested. Leave it before a student forward that needs
    gradients: with activation checkpointing the recomputation must meet the adapter that the forward met.

    Args:
        which: ``"disabled"`` (the base alone), ``"shared"`` (the weights that are active now) or an adapter's name.
    """
    layers = switchable_layers(model)
    switches = [(layer, layer.disable_adapters, list(layer.active_adapters)) for layer in layers]
    training = [(module, module.training) for module in model.modules()]
    requires_grad = [(param, param.requires_grad) for param in model.parameters()]
    try:
        for layer in layers:
            if which == "disabled":
                layer.enable_adapters(False)
            else:
                if which != "shared":
                    layer.set_adapter([which])
                layer.enable_adapters(True)
        model.eval()
        yield model
    finally:
        for layer, disabled, active in switches:
            layer.set_adapter(active)
            layer.enable_adapters(not disabled)
        for module, was_training in training:
            module.training = was_training
        for param, needed in requires_grad:
            param.requires_grad_(needed)


class Teacher:
    """The teacher of a run: ``with teacher.weights() as model: ...`` runs `model` as the teacher.

    Args:
        model: the student, a PeftModel.
        which: ``disabled``, ``shared``, ``initial`` or ``ema`` (see :class:`PrivilegedGKDConfig`).
        separate: another model that answers instead; `which` is then not looked at.

    Raises:
        ConfigError: `which` is not available for this model.
    """

    def __init__(self, model: PeftModel, which: str = "disabled", *, separate: nn.Module | None = None):
        self.model = model
        self.separate = separate
        self.which = which
        if separate is None and which not in ("disabled", "shared"):
            raise ConfigError(f"teacher_adapter={which!r} is not available yet; use 'disabled' or 'shared'.")

    @contextlib.contextmanager
    def weights(self) -> Iterator[nn.Module]:
        """The model to call as teacher: eval mode, no gradient, restored afterwards."""
        with torch.no_grad():
            if self.separate is not None:
                yield self.separate.eval()
            else:
                with adapter_state(self.model, self.which) as model:
                    yield model


def starting_adapter_warning(model: PeftModel) -> str | None:
    """A sentence when the student does not start at the base, so that a disabled adapter is not its starting point."""
    config = model.peft_config[model.active_adapter]
    assert isinstance(config, LoraConfig)
    moved = [
        name
        for name, param in model.named_parameters()
        if (".lora_B." in name or ".lora_embedding_B." in name) and bool(param.detach().any())
    ]
    if moved:
        reason = "the adapter that training starts from is not zero"
    elif config.bias != "none":
        reason = f"bias={config.bias!r} trains biases of the base itself, which stay when the adapter is disabled"
    elif isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("gaussian", "orthogonal"):
        reason = f"init_lora_weights={config.init_lora_weights!r} changes the base weights"
    else:
        return None
    return (
        f"teacher_adapter='disabled', but {reason}: the teacher is not the model that training starts from, and the "
        "student would be taught to forget the difference. Use teacher_adapter='initial' to continue from it."
    )


class FrozenCheck:
    """A digest of every base weight, taken at the start and compared later.

    Covers parameters and buffers that belong to the base, in their packed form, and the constants of 4-bit
    quantization (block scales, nested scales, code books): about 1 s per GB.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.digests = self._measure()

    def _measure(self) -> dict[str, str]:
        return {name: _digest(tensor) for name, tensor in _base_tensors(self.model)}

    @property
    def digest(self) -> str:
        """One digest of the whole base, hexadecimal."""
        total = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.digests.items()):
            total.update(f"{name}={value};".encode())
        return total.hexdigest()

    def verify(self, when: str) -> None:
        """Compare with the start.

        Raises:
            FrozenBaseError: some base weight has changed; the message names the tensors.
        """
        now = self._measure()
        changed = sorted(name for name in self.digests.keys() | now.keys() if self.digests.get(name) != now.get(name))
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise FrozenBaseError(
                f"the frozen base has changed ({when}): {', '.join(changed[:5])}{more}. Teacher and student no longer "
                "share the weights that training started from, so the run is stopped. Something outside the trainer "
                "wrote to the base (a merge_adapter() into quantized weights, an optimizer over all parameters, a "
                "callback); start again from the last checkpoint without it."
            )


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    trained = set()
    for layer in switchable_layers(model):
        own = (
            layer.adapter_layer_names
            if isinstance(layer, BaseTunerLayer)
            else ("modules_to_save", "trainable_tokens_delta")
        )
        for attribute in own:
            container = getattr(layer, attribute, None)
            if isinstance(container, nn.Module):
                trained.update(id(p) for p in container.parameters())
                trained.update(id(b) for b in container.buffers())
            elif isinstance(container, dict):
                trained.update(id(p) for p in container.values())
        if isinstance(layer, BaseTunerLayer):
            for attribute in layer.adapter_layer_names:
                container = getattr(layer, attribute, None)
                if isinstance(container, nn.ParameterDict):
                    trained.update(id(p) for p in container.values())
    base = base_of(model)
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        if id(tensor) in trained or tensor.requires_grad:
            continue
        name = name.replace(".base_layer", "")
        yield name, tensor
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            yield f"{name} (scales)", state.absmax
            if state.nested:
                yield f"{name} (nested scales)", state.state2.absmax
                yield f"{name} (nested offset)", state.offset
            yield f"{name} (code)", state.code


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    return hashlib.blake2b(data.numpy(), digest_size=16).hexdigest()
