"""The weights of a merged model, one tensor at a time: the base as training held it, plus what the adapter adds.

Memory stays bounded by the largest tensor: the base is read from safetensors tensor by tensor, quantized and
dequantized alone, and each adapted layer is merged in float32 by PEFT's own formula, whatever kind of LoRA it is. For
that the model is built once with phantom weights (right shapes, no memory), only to carry the adapter's layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from ..errors import ModelError, explained
from ..model.adapters import check_adapter_tensors
from ..model.architecture import auto_class
from ..model.load import base_of, tensor_shapes
from ..run.folder import ADAPTER_FILE
from .adapter import AdapterRun
from .base_weights import BaseWeights, quantization_roundtrip

ADAPTER = "default"  # the name that PEFT gives to an only adapter
BASES = ("dequantized", "original")
_WRAPPERS = {"base_layer", "original_module", "modules_to_save", "token_adapter", ADAPTER}


@dataclass
class MergedTensor:
    """One tensor of the merged model.

    Attributes:
        key: its name in the base's files.
        base: the weight without the adapter; float32 where it was quantized or is adapted, else as stored.
        merged: with the adapter, float32; `base` itself where the adapter does not touch it.
        linear: an adapted weight of a linear layer, the kind that 4-bit quantization holds.
    """

    key: str
    base: torch.Tensor
    merged: torch.Tensor
    linear: bool = False

    @property
    def adapted(self) -> bool:
        return self.merged is not self.base


class MergedWeights:
    """The tensors of base + adapter, in the names and the order of the base's files.

    Args:
        run: the adapter and its base.
        base: "dequantized", the values that training computed with (16-bit rounding included), or "original", the
            weights as the base's files hold them.
        device: where to quantize. Default: the GPU if there is one, as in training. (Adding is done on the CPU.)

    Attributes:
        config: of the base, without its quantization settings.
        layers, overrides: the adapter's layers by module name, and the weights it replaces by parameter name.
        untied: the adapter made input embedding and head, which the base ties, differ; the merged model keeps both.

    Raises:
        ModelError: an adapter of a kind that has no merged form, or that does not fit the base.
    """

    def __init__(
        self,
        run: AdapterRun,
        *,
        base: str = "dequantized",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ):
        assert base in BASES, base
        if base == "original" and run.prequantized:
            raise ModelError(
                f"base {run.base_name!r} is stored quantized, so it has no original weights to merge into. Use --base "
                "dequantized, or give the unquantized model with --base-model."
            )
        self.run, self.base = run, base
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with explained(f"base {run.base_name!r} cannot be read"):
            self.config = AutoConfig.from_pretrained(run.base, trust_remote_code=trust_remote_code)
        self.config.__dict__.pop("quantization_config", None)
        self._files = BaseWeights(run.base)
        self._quantized = _quantized_modules(self.config, run, trust_remote_code)
        model = _phantom_model(self.config, trust_remote_code)
        self._shape_of = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self._conv1d = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        self._in_float32 = _kept_in_float32(model, run.dtype)
        self._tied = _tied_pair(model)
        prefix, renamings = model.base_model_prefix, _renamings(model)
        self.layers, self.overrides = _adapter_parts(model, run)
        self._name_of = self._match_names(prefix, renamings)
        self._key_of = {name: key for key, name in self._name_of.items()}
        self.untied = self._embedding_and_head_differ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of every tensor of the merged model, in order."""
        shapes = {}
        for key in self._files.keys():  # noqa: SIM118 - no dict
            name = self._name_of.get(key)
            if self._tied is None or name != self._tied[1]:  # a tied head is written below, or not at all
                shapes[key] = self._shape_of[name] if name is not None else self._files.shape(key)
        if self.untied and self._tied is not None:
            shapes[self._tied[1]] = self._shape_of[self._tied[1]]
        return shapes

    def tensors(self, keys: list[str] | None = None) -> Iterator[MergedTensor]:
        """The tensors of these keys (default: all), one at a time, on the CPU."""
        for key in self.shapes() if keys is None else keys:
            name = self._tied[1] if self._tied and key == self._tied[1] else self._name_of.get(key)
            yield self._tensor(key, name)

    def _tensor(self, key: str, name: str | None) -> MergedTensor:
        source = self._tied[0] if self._tied and name == self._tied[1] else name
        base = self._base_tensor(self._key_of[source] if source is not None else key, source)
        if name is None:
            return MergedTensor(key, base, base)
        module, _, kind = name.rpartition(".")
        layer, override = self.layers.get(module), self.overrides.get(name)
        lora_bias = _lora_bias(layer) if layer is not None and kind == "bias" else None
        if kind == "bias" and lora_bias is None:
            layer = None
        if layer is None and override is None:
            return MergedTensor(key, base, base)
        base = base.float()
        merged = base if override is None else override.float()
        if lora_bias is not None:
            merged = merged + lora_bias
        elif layer is not None:
            merged = _merge_weight(layer, merged, name)
        return MergedTensor(key, base, merged, linear=kind == "weight" and type(layer) is LoraLinear)

    def _base_tensor(self, key: str, name: str | None) -> torch.Tensor:
        """The base's tensor: as stored for "original", else the very values that training computed with."""
        run = self.run
        if self._files.is_quantized(key):
            return self._files.dequantized(key, run.compute_dtype, self.device).cpu()
        tensor = self._files.read(key)
        if self.base == "original" or name is None or not tensor.is_floating_point():
            return tensor
        module, _, kind = name.rpartition(".")
        if module not in self._quantized or kind != "weight":
            return tensor if self._in_float32 & set(name.split(".")) else tensor.to(run.dtype)
        assert run.quantization_config is not None
        transposed = module in self._conv1d  # Conv1D keeps (in, out) and is quantized as (out, in)
        weight = (tensor.T if transposed else tensor).to(self.device, run.dtype)
        held = quantization_roundtrip(weight, run.quantization_config, run.compute_dtype).cpu()
        return held.T.contiguous() if transposed else held

    def _match_names(self, prefix: str, renamings: list[WeightRenaming]) -> dict[str, str]:
        """Key in the files -> parameter of the model; files may lack the model's prefix, or have one too many, or hold
        the names that Transformers renames when it loads them (Gemma 3, Qwen3.5)."""
        found = {}
        for key in self._files.keys():  # noqa: SIM118 - no dict
            renamed, _ = rename_source_key(key, renamings, [])
            for plain in (key, renamed):
                names = (plain, f"{prefix}.{plain}", plain.removeprefix(f"{prefix}."))
                name = next((name for name in names if name in self._shape_of), None)
                if name is not None:
                    found[key] = name
                    break
        needed = {f"{module}.weight" for module in (*self.layers, *self._quantized)} | set(self.overrides)
        if self._tied:
            needed = {self._tied[0] if name == self._tied[1] else name for name in needed}
        missing = sorted(needed - set(found.values()))
        if missing:
            raise ModelError(
                f"the files of base {self.run.base_name!r} hold no tensor for {', '.join(missing[:3])}"
                f"{' ...' if len(missing) > 3 else ''}: the architecture stores its weights under other names than it "
                "uses them, which merging tensor by tensor cannot follow. Merge it in memory with PEFT."
            )
        for key, name in found.items():
            shape = self._files.shape(key)
            if shape != self._shape_of[name] and not self._files.is_quantized(key):
                raise ModelError(
                    f"{key} is {shape} in the files of the base, but config.json says {self._shape_of[name]}"
                )
        return found

    def _embedding_and_head_differ(self) -> bool:
        if self._tied is None:
            return False
        touched = [n for n in self._tied if n.rpartition(".")[0] in self.layers or n in self.overrides]
        if not touched:
            return False
        embedding, head = (self._tensor(name, name).merged for name in self._tied)
        return not torch.equal(embedding, head)


def _renamings(model: PreTrainedModel) -> list[WeightRenaming]:
    """What Transformers renames between the files of this architecture and its modules; nothing that it recomputes."""
    return [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]


def _phantom_model(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The model with weights that have the right shape but take no memory (one zero, expanded); ties are kept."""
    with explained(f"no causal language model can be made of {config.name_or_path!r}"), torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    phantoms: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                phantom = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
                phantom.is_phantom = True  # type: ignore[attr-defined]  # a copy that PEFT makes has it no more
                module._parameters[name] = phantoms.setdefault(id(parameter), phantom)
    return model.eval()


def _is_phantom(parameter: nn.Parameter) -> bool:
    """Not by the memory that it takes: a parameter of one number takes as much as a real one."""
    return getattr(parameter, "is_phantom", False)


def _quantized_modules(config: PreTrainedConfig, run: AdapterRun, trust_remote_code: bool) -> set[str]:
    """Names of the modules that bitsandbytes replaces in this model: asked of Transformers, not guessed."""
    if run.quantization_config is None:
        return set()
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    before = {name: type(module) for name, module in model.named_modules()}
    quantizer = AutoHfQuantizer.from_config(run.quantization_config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    return {name for name, module in model.named_modules() if before.get(name, type(module)) is not type(module)}


def _kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Parts of parameter names that Transformers loads in float32 whatever dtype is asked for."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return names


def _tied_pair(model: PreTrainedModel) -> tuple[str, str] | None:
    """Names of input embedding and head, when they share one weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or embedding.weight is not head.weight:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return f"{names[id(embedding)]}.weight", f"{names[id(head)]}.weight"


def _adapter_parts(
    model: PreTrainedModel, run: AdapterRun
) -> tuple[dict[str, BaseTunerLayer], dict[str, torch.Tensor]]:
    """Attach the adapter; returns its layers by module name, and the weights that it replaces by parameter name."""
    with explained(f"the adapter {run.folder} does not fit base {run.base_name!r}"):
        peft_model = PeftModel.from_pretrained(model, run.folder, low_cpu_mem_usage=True)
    path = run.folder / ADAPTER_FILE
    check_adapter_tensors(peft_model, path, tensor_shapes(path), f"base {run.base_name!r}")
    layers: dict[str, BaseTunerLayer] = {}
    overrides: dict[str, torch.Tensor] = {}
    saved = load_file(run.folder / ADAPTER_FILE)
    adapted = base_of(peft_model)
    for path, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer):
            layers[_plain_name(path)] = _checked_layer(module, path)
    for path, parameter in list(adapted.named_parameters(remove_duplicate=False)):
        parts = path.split(".")
        if any(part.startswith(("lora_", "trainable_tokens_")) for part in parts):
            # PEFT may have cast it to the 16 bits of the layer that it sits on, or not found it; the file has all of it
            key = "base_model.model." + path.replace(f".{ADAPTER}", "")
            tensor = saved.get(key, saved.get(key.removesuffix(".weight"), parameter.data)).float()
            _put(adapted, path, tensor)
        elif not _is_phantom(parameter):
            overrides[_plain_name(path)] = parameter.data
    if not layers and not overrides:
        raise ModelError(f"the adapter {run.folder} targets no module of base {run.base_name!r}")
    return layers, overrides


def _put(model: PreTrainedModel, path: str, tensor: torch.Tensor) -> None:
    owner, _, name = path.rpartition(".")
    holder = model.get_submodule(owner)
    new = nn.Parameter(tensor, requires_grad=False)
    if isinstance(holder, (nn.ParameterDict, nn.ParameterList)):
        holder[name] = new
    else:
        setattr(holder, name, new)


def _plain_name(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _checked_layer(layer: BaseTunerLayer, path: str) -> BaseTunerLayer:
    if type(layer) not in (LoraLinear, LoraEmbedding, TrainableTokensLayer):
        raise ModelError(f"{path} is a {type(layer).__name__}, which this merge does not know; merge it with PEFT")
    variant = getattr(layer, "lora_variant", {}).get(ADAPTER)
    if variant is not None and not isinstance(variant, (DoraLinearVariant, DoraEmbeddingVariant)):
        raise ModelError(f"{path} is a {type(variant).__name__}: its function has no merged form")
    if _lora_bias(layer) is not None and getattr(layer.get_base_layer(), "bias", None) is None:
        raise ModelError(f"{path} was trained with lora_bias, but the base layer has no bias to add it to")
    return layer


def _lora_bias(layer: BaseTunerLayer) -> torch.Tensor | None:
    """What the adapter adds to the base layer's bias (out,), if it was trained with ``lora_bias=True``."""
    if not isinstance(layer, LoraLinear) or not layer.lora_bias[ADAPTER]:
        return None
    bias: torch.Tensor = layer.lora_B[ADAPTER].bias.data  # type: ignore[assignment]
    return bias * layer.scaling[ADAPTER]


def _merge_weight(layer: BaseTunerLayer, weight: torch.Tensor, name: str) -> torch.Tensor:
    """A layer's weight after PEFT merged its adapter into it in float32; the layer itself is left as it was."""
    base_layer = layer.get_base_layer()
    phantoms = dict(base_layer.named_parameters(recurse=False))
    try:
        base_layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        if "bias" in phantoms:  # lora_bias would be added to it in place
            base_layer.bias = nn.Parameter(torch.zeros(phantoms["bias"].shape), requires_grad=False)
        layer.merge(safe_merge=False, adapter_names=[ADAPTER])
        merged = base_layer.weight.data
    finally:
        for kind, parameter in phantoms.items():
            setattr(base_layer, kind, parameter)
        layer.merged_adapters.clear()
    if not torch.isfinite(merged).all():
        raise ModelError(f"{name} is not finite after the adapter was added: the adapter is broken")
    return merged
