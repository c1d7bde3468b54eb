"""The adapters inside a PeftModel: which layers they change, and how another, frozen one is added."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

STUDENT = "default"  # PEFT's name of the one adapter that trains


def switchable_layers(model: nn.Module) -> list[nn.Module]:
    """Every layer that an adapter changes: LoRA layers and copies of modules that are trained whole."""
    return [module for module in model.modules() if is_switchable(module)]


def is_switchable(module: nn.Module) -> bool:
    """Whether an adapter changes this layer, and can be switched off in it."""
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


@contextmanager
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
