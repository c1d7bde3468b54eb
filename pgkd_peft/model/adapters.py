"""The adapters inside a PeftModel: which layers they change, and how another, frozen one is added."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_FILE
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import nn

from ..errors import CheckpointError, ModelError, explained, refuse_pointer

STUDENT = "default"  # PEFT's name of the one adapter that trains


def switchable_layers(model: nn.Module) -> list[nn.Module]:
    """Every layer that an adapter changes: LoRA layers and copies of modules that are trained whole."""
    return [module for module in model.modules() if is_switchable(module)]


def is_switchable(module: nn.Module) -> bool:
    """Whether an adapter changes this layer, and can be switched off in it."""
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


@contextlib.contextmanager
def eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """No dropout and no activation checkpointing inside; the mode of every module is put back afterwards.

    Args:
        modules: all of a model's: only the given ones change, not those inside them.
    """
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def adapter_tensors(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of the adapter `name`, by their full names."""
    return {key: param for key, param in model.named_parameters() if name in key.split(".")}


def add_frozen_adapter(model: PeftModel, name: str, config: LoraConfig) -> None:
    """Add an adapter that never trains; what is active and what trains stays, and no random number is used up."""
    config = copy.deepcopy(config)
    config.inference_mode, config.lora_dropout = True, 0.0
    config.init_lora_weights = True  # an initialisation such as PiSSA would change the base weights once more
    trains = {key: param.requires_grad for key, param in model.named_parameters()}
    modes = {key: module.training for key, module in model.named_modules()}
    with torch.random.fork_rng():
        model.add_adapter(name, config)
    for key, param in model.named_parameters():
        param.requires_grad_(trains.get(key, False))
    for key, module in model.named_modules():
        module.training = modes.get(key, False)


@torch.no_grad()
def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Copy every parameter of one adapter to another of the same shape."""
    targets = adapter_tensors(model, target)
    for key, param in adapter_tensors(model, source).items():
        targets[".".join(target if part == source else part for part in key.split("."))].copy_(param)


INITIAL = "initial"


@contextlib.contextmanager
def adapter_state(model: nn.Module, which: str) -> Iterator[nn.Module]:
    """Inside, `model` is in eval mode and answers with another set of weights; afterwards everything is as before.

    Adapter switches, active adapters, train/eval mode of every module and ``requires_grad`` of every parameter are put
    back, also when the body raises and when contexts are nested. Leave it before a student forward that needs
    gradients: with activation checkpointing the recomputation must meet the adapter that the forward met.

    Args:
        which: ``"disabled"`` (the base alone), ``"shared"`` (the weights that are active now) or an adapter's name.
    """
    modules = list(model.modules())  # walking a model is slow: 8 ms for SmolLM2-135M
    layers = [module for module in modules if is_switchable(module)]
    switches = [(layer, layer.disable_adapters, list(layer.active_adapters)) for layer in layers]
    requires_grad = [(p, p.requires_grad) for module in modules for p in module._parameters.values() if p is not None]
    with eval_mode(modules):
        try:
            for layer in layers:
                if which == "disabled":
                    layer.enable_adapters(False)
                else:
                    if which != "shared":
                        layer.set_adapter([which])
                    layer.enable_adapters(True)
            yield model
        finally:
            for layer, disabled, active in switches:
                if list(layer.active_adapters) != active:
                    layer.set_adapter(active)
                if layer.disable_adapters != disabled:
                    layer.enable_adapters(not disabled)
            for param, needed in requires_grad:
                if param.requires_grad != needed:
                    param.requires_grad_(needed)


def refuse_broken_numbers(path: Path) -> None:
    """Raises ModelError for an adapter file whose numbers no layer could add: no fractions, NaN, infinite ones."""
    for name, tensor in load_file(path).items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"{path} is no adapter that can be used: {name} holds {kind}, not floating-point numbers.")
        if not torch.isfinite(tensor.float()).all():
            raise ModelError(
                f"{path} is broken: {name} holds NaN or infinite numbers, so the run that wrote it went wrong. Use an "
                "earlier checkpoint."
            )


@torch.no_grad()
def load_adapter(model: PeftModel, folder: Path, to: str = "this run's adapter") -> None:
    """Load the student's adapter from safetensors, all of it and exactly.

    PEFT renames keys of some architectures (Laguna's) once more when it loads them, and leaves out in silence what it
    then has no place for; so every tensor is copied by its own name.

    Args:
        to: what the file should fit, for the message.

    Raises:
        CheckpointError: the file is missing or damaged, or its tensors are not those of this adapter.
    """
    path = folder / ADAPTER_FILE
    with explained(f"{path} cannot be read", CheckpointError):
        refuse_pointer(path)
        saved = load_file(path)
    check_adapter_tensors(model, path, {name: tuple(tensor.shape) for name, tensor in saved.items()}, to)
    set_peft_model_state_dict(model, saved, adapter_name=STUDENT)
    for name, tensor in own_tensors(model).items():
        tensor.copy_(saved[name])


def own_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The student's adapter by the names of its file: the model's own memory, no copies."""
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, adapter_name=STUDENT, save_embedding_layers=False
    )
    return tensors


def check_adapter_tensors(
    model: PeftModel, path: Path, saved: Mapping[str, tuple[int, ...]], to: str = "this run's adapter"
) -> None:
    """That a file holds the tensors of the student's adapter, all of them, in their shapes, and no others.

    PEFT only warns of what is missing, and leaves it as it was drawn at random. Weights of the base that PEFT saved
    beside the adapter (an embedding that was resized) may be there.

    Args:
        saved: name -> shape, as the file has them.
        to: what the file should fit, for the message.

    Raises:
        CheckpointError: names the first tensor that is missing, too many, or of another shape.
    """
    own = own_tensors(model)
    base = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = [name for name in own if name not in saved]
    more = [name for name in saved if name not in own and name not in base]
    said = f"{path} does not fit {to}: "
    if not saved or len(missing) == len(own):
        example = f" ({next(iter(saved))} ..., where {next(iter(own))} ... are wanted)" if saved and own else ""
        raise CheckpointError(f"{said}no tensor of it fits this base{example}. Was it trained on another one?")
    if missing:
        rest = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{said}{missing[0]} is missing{rest}. Was target_modules changed, or the file cut?")
    if more:
        rest = f" (and {len(more) - 1} more)" if len(more) > 1 else ""
        raise CheckpointError(f"{said}{more[0]}{rest} belongs to no layer of it. Was target_modules changed?")
    for name, tensor in own.items():
        if saved[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"{said}{name} is {saved[name]}, expected is {tuple(tensor.shape)}. Use the rank and the base that it "
                "was trained with."
            )
