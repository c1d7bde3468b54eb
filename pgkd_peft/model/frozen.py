"""The proof that the base stayed frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainerCallback

from ..errors import FrozenBaseError
from .adapters import (
    INITIAL,
    adapter_tensors,
    switchable_layers,
)
from .load import base_of

PROBE_TOKENS = 16


PROBE_TOLERANCE = 0.02  # relative; a few units in the last place of bfloat16


class FrozenCheck:
    """A digest of every weight that must not change, taken at the start and compared later.

    Covers parameters and buffers that belong to the base, in their packed form, the constants of quantization (4-bit:
    block scales, nested scales, code books; int8: row scales), a separate teacher and the adapter ``initial``: about
    1 s per GB. With :meth:`take_probe` also what a fixed teacher says, which sees more than weights: hooks, modes,
    active adapters.

    Args:
        model: the student.
        teacher: the run's teacher, where there is one.
    """

    def __init__(self, model: nn.Module, teacher: Any = None):
        self.model = model
        self.teacher = teacher
        self.digests = self._measure()
        self.probe: torch.Tensor | None = None

    def _measure(self) -> dict[str, str]:
        found = {name: _digest(tensor) for name, tensor in _base_tensors(self.model)}
        if self.teacher is not None and self.teacher.separate is not None:
            separate = _base_tensors(self.teacher.separate)
            found.update({f"teacher: {name}": _digest(tensor) for name, tensor in separate})
        elif self.teacher is not None and self.teacher.which == INITIAL:
            found.update({n: _digest(t) for n, t in adapter_tensors(self.model, INITIAL).items()})
        return found

    @property
    def digest(self) -> str:
        """One digest of the student's whole base, hexadecimal."""
        total = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.digests.items()):
            if not name.startswith("teacher: ") and f".{INITIAL}." not in name:
                total.update(f"{name}={value};".encode())
        return total.hexdigest()

    def restart(self) -> None:
        """Take the digests anew, after weights were loaded on purpose."""
        self.digests = self._measure()

    def take_probe(self) -> None:
        """Remember what a fixed teacher says about a few tokens."""
        self.probe = self._say()

    def _say(self) -> torch.Tensor | None:
        if self.teacher is None or not self.teacher.fixed:
            return None
        with self.teacher.weights() as model:
            base = base_of(model)
            device = base.get_input_embeddings().weight.device
            ids = torch.arange(PROBE_TOKENS, device=device)[None] * 7919 % base.get_input_embeddings().weight.shape[0]
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return outputs.logits[0].float().cpu()  # (PROBE_TOKENS, V)

    def verify(self, when: str, *, probe: bool = False) -> None:
        """Compare with the start.

        Raises:
            FrozenBaseError: some frozen weight has changed, or a fixed teacher no longer says what it said; the
                message names the tensors.
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
        if probe and self.probe is not None:
            said = self._say()
            assert said is not None
            moved = float((said - self.probe).norm() / self.probe.norm())
            if not moved <= (0.0 if self.probe_is_exact else PROBE_TOLERANCE):
                raise FrozenBaseError(
                    f"the teacher no longer says what it said at the start ({when}): its logits for a fixed probe "
                    f"moved by {moved:.1e}, relatively, although no weight changed. A hook, a patched forward or an "
                    "adapter that was switched on in the base does that; what was trained since is not sound."
                )

    @property
    def probe_is_exact(self) -> bool:
        """On the CPU the same forward gives the same bits; a GPU's kernels may differ in rounding."""
        return next(self.model.parameters()).device.type == "cpu"


class ProbeCallback(TrainerCallback):
    """Takes the probe when the model is ready to train (prepared, and resumed where it resumes)."""

    def __init__(self, frozen: FrozenCheck):
        self.frozen = frozen

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.frozen.take_probe()


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    base, trained = base_of(model), _trained(model)
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
    for name, module in base.named_modules():
        state = getattr(module, "state", None)  # Linear8bitLt: its first forward moves the scales there from the weight
        scales = getattr(state, "SCB", None)
        if scales is None:
            scales = getattr(getattr(module, "weight", None), "SCB", None)
        if scales is not None:
            yield f"{name.replace('.base_layer', '')}.weight (scales)", scales


def _trained(model: nn.Module) -> set[int]:
    """Identities of the adapters' own parameters and buffers, whichever of them is active."""
    found: set[int] = set()
    for layer in switchable_layers(model):
        names: tuple[str, ...] = ("modules_to_save", "trainable_tokens_delta")
        if isinstance(layer, BaseTunerLayer):
            names = layer.adapter_layer_names
        for container in (getattr(layer, name, None) for name in names):
            if isinstance(container, nn.Module):
                found.update(id(tensor) for tensor in (*container.parameters(), *container.buffers()))
            elif isinstance(container, dict):
                found.update(id(tensor) for tensor in container.values())
    return found


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    return hashlib.blake2b(data.numpy(), digest_size=16).hexdigest()
