"""Whose weights answer as teacher; the context manager that sets them; the proof that the base stayed frozen."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from .errors import ConfigError, FrozenBaseError, ModelError
from .model.adapters import (
    STUDENT,
    adapter_tensors,
    add_frozen_adapter,
    copy_adapter,
    eval_mode,
    is_switchable,
    switchable_layers,
)
from .model.ema import EMA, ProductAverage
from .model.load import base_of

INITIAL = "initial"

PROBE_TOKENS = 16
PROBE_TOLERANCE = 0.02  # relative; a few units in the last place of bfloat16


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


class Teacher:
    """The teacher of a run: ``with teacher.weights() as model: ...`` runs `model` as the teacher.

    ``initial`` and ``ema`` are kept as second, frozen adapters of these names in the same PeftModel.

    Args:
        model: the student, a PeftModel.
        which: ``disabled``, ``shared``, ``initial`` or ``ema`` (see :class:`PrivilegedGKDConfig`).
        separate: another model that answers instead; `which` is then not looked at.
        ema_decay: of ``ema`` (see :mod:`pgkd_peft.model.ema`).

    Raises:
        ConfigError: `which` is not available for this model.
    """

    def __init__(
        self,
        model: PeftModel,
        which: str = "disabled",
        *,
        separate: nn.Module | None = None,
        ema_decay: float = 0.99,
    ):
        self.model = model
        self.separate = separate
        self.which = which
        self.average: ProductAverage | None = None
        if separate is not None:
            return
        if which in (INITIAL, EMA):
            self._check_second_adapter()
        if which == INITIAL:
            config = copy.deepcopy(model.peft_config[STUDENT])
            add_frozen_adapter(model, INITIAL, config)
            copy_adapter(model, STUDENT, INITIAL)
        elif which == EMA:
            self.average = ProductAverage(model, ema_decay)

    def _check_second_adapter(self) -> None:
        config = self.model.peft_config[STUDENT]
        if config.bias != "none":
            reason = f"bias={config.bias!r} trains biases of the base, of which there is only one set"
        elif getattr(config, "target_parameters", None):
            reason = "target_parameters allow one adapter only"
        else:
            return
        raise ConfigError(
            f"teacher_adapter={self.which!r} needs a second adapter beside the one that trains, but {reason}. "
            "Remove it from the LoraConfig, or use teacher_adapter='shared'."
        )

    @property
    def fixed(self) -> bool:
        """Whether the teacher stays the same during the run."""
        return self.separate is not None or self.which in ("disabled", INITIAL)

    @contextlib.contextmanager
    def weights(self) -> Iterator[nn.Module]:
        """The model to call as teacher: eval mode, no gradient, restored afterwards."""
        with torch.no_grad():
            if self.separate is not None:
                yield self.separate.eval()
            else:
                with adapter_state(self.model, self.which) as model:
                    yield model

    def save(self, path: str) -> None:
        """Write the second adapter, where there is one, as safetensors."""
        if self.separate is None and self.which in (INITIAL, EMA):
            tensors = {k: t.detach().contiguous() for k, t in adapter_tensors(self.model, self.which).items()}
            save_file(tensors, path, metadata={"teacher_adapter": self.which})

    @torch.no_grad()
    def load(self, path: str) -> None:
        """Take over what :meth:`save` wrote.

        Raises:
            ModelError: it does not fit this model.
        """
        if self.separate is not None or self.which not in (INITIAL, EMA):
            return
        own, saved = adapter_tensors(self.model, self.which), load_file(path)
        for name in sorted(own.keys() | saved.keys()):
            if name not in own or name not in saved or own[name].shape != saved[name].shape:
                raise ModelError(f"{path} does not belong to this model: {name} is missing or has another shape")
            own[name].copy_(saved[name])


class AverageCallback(TrainerCallback):
    """Moves the ``ema`` teacher on after every optimizer step, and notes what its rank cut off."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            lost = self.trainer.teacher.average.update()
            self.trainer.add_to_log("ema_cut_off", lost)


def check_same_vocabulary(
    student: nn.Module, teacher: nn.Module, tokenizer: Any = None, teacher_tokenizer: Any = None
) -> None:
    """A separate teacher must speak of the same tokens as the student, with the same shape of logits.

    Raises:
        ModelError: names what differs.
    """
    sizes = [base_of(m).get_output_embeddings().weight.shape[0] for m in (student, teacher)]
    names = [
        str(getattr(base_of(m).config, "_name_or_path", "")) or type(base_of(m)).__name__ for m in (student, teacher)
    ]
    caps = [getattr(base_of(m).config.get_text_config(), "final_logit_softcapping", None) for m in (student, teacher)]
    if caps[0] != caps[1]:
        raise ModelError(
            f"the teacher {names[1]!r} caps its logits at {caps[1]}, the student {names[0]!r} at {caps[0]} "
            "(final_logit_softcapping). One loss cannot use both; take a teacher of the same family."
        )
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the teacher {names[1]!r} has a vocabulary of {sizes[1]:,} tokens, the student {names[0]!r} one of "
            f"{sizes[0]:,}. Their distributions cannot be compared token by token; take a teacher of the same family "
            "and vocabulary."
        )
    if tokenizer is not None and teacher_tokenizer is not None:
        own, other = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
        differ = sorted(
            (t for t in own.keys() | other.keys() if own.get(t) != other.get(t)), key=lambda t: own.get(t, -1)
        )
        if differ:
            token = differ[0]
            raise ModelError(
                f"the tokenizers of teacher {names[1]!r} and student {names[0]!r} differ in {len(differ):,} tokens, "
                f"e.g. {token!r} is {other.get(token)} for the teacher and {own.get(token)} for the student. Take a "
                "teacher with the student's tokenizer."
            )


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
    """A digest of every weight that must not change, taken at the start and compared later.

    Covers parameters and buffers that belong to the base, in their packed form, the constants of 4-bit quantization
    (block scales, nested scales, code books), a separate teacher and the adapter ``initial``: about 1 s per GB. With
    :meth:`take_probe` also what a fixed teacher says, which sees more than weights: hooks, modes, active adapters.

    Args:
        model: the student.
        teacher: the run's teacher, where there is one.
    """

    def __init__(self, model: nn.Module, teacher: Teacher | None = None):
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
    trained: set[int] = set()
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
