"""What the user passed -> one student (base + LoRA), its tokenizer, and perhaps a separate teacher."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..config import PrivilegedGKDConfig, compute_dtype
from ..errors import ConfigError, ModelError, explained, read_object, read_text
from .adapters import ADAPTER_FILE, STUDENT, load_adapter, refuse_broken_numbers
from .architecture import fused_experts, lora_targets, shares
from .cpu import guard_cpu_linear4bit, use_short_backward
from .head import check_head_frozen, refuse_trainable_head
from .load import attach_lora, base_of, check_source, load_base, load_tokenizer, prepare_tokenizer, tensor_shapes
from .lora import check_lora, check_names_of

logger = logging.getLogger(__name__)


def name_of(model: Any) -> str:
    """What to call a model in a message."""
    if isinstance(model, str):
        return model
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return name or type(model).__name__


def is_adapter_folder(model: Any) -> bool:
    return isinstance(model, str) and (Path(model) / "adapter_config.json").is_file()


def adapter_base(folder: str) -> str:
    """The base model that an adapter folder names."""
    base = read_object(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ModelError(f"{folder}/adapter_config.json names no base model (base_model_name_or_path)")
    return base


def find_tokenizer(model: Any, processing_class: Any, args: PrivilegedGKDConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that was passed, or the model's own, ready to render conversations."""
    if isinstance(processing_class, ProcessorMixin):
        raise ModelError("processing_class is a multimodal processor; pass its tokenizer (text only)")
    template = _read_template(args)
    if processing_class is not None:
        if template is not None:
            processing_class.chat_template = template
        return prepare_tokenizer(processing_class)
    source = name_of(model)
    if is_adapter_folder(model) and not (Path(model) / "tokenizer_config.json").is_file():
        source = adapter_base(model)
    return load_tokenizer(
        source, trust_remote_code=args.trust_remote_code, revision=_revision(model, args), chat_template=template
    )


def _read_template(args: PrivilegedGKDConfig) -> str | None:
    if args.chat_template_path is None:
        return None
    path = Path(args.chat_template_path)
    if not path.is_file() or path.suffix not in (".jinja", ".j2"):
        raise ConfigError(
            f"chat_template_path is {args.chat_template_path!r}; it must be an existing .jinja or .j2 file. (A "
            "template taken from another model would bring tokens that this base has never seen.)"
        )
    return read_text(path, "chat_template_path")


def _revision(model: Any, args: PrivilegedGKDConfig) -> str | None:
    return (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None


def context_length(model: Any, args: PrivilegedGKDConfig) -> int | None:
    """Positions that the model has (``max_position_embeddings``), read before its weights are; None where it says
    nothing."""
    return getattr(text_config_for(model, args), "max_position_embeddings", None)


def embedding_rows(model: Any, args: PrivilegedGKDConfig) -> int | None:
    """Rows of the model's embedding: token ids must be below it. Read before the weights are, from the config; None
    where it says nothing."""
    if isinstance(model, torch.nn.Module):
        return int(base_of(model).get_input_embeddings().weight.shape[0])
    return getattr(text_config_for(model, args), "vocab_size", None)


def text_config_for(model: Any, args: PrivilegedGKDConfig) -> Any:
    """:func:`text_config` as these arguments would load the model."""
    return text_config(model, args.trust_remote_code, _revision(model, args))


def text_config(model: Any, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The config of the text part of a model, or of one on disk (an adapter's: of its base); None where there is none
    to be read."""
    config: Any = getattr(model, "config", None)
    if isinstance(model, str):
        try:
            config = AutoConfig.from_pretrained(
                adapter_base(model) if is_adapter_folder(model) else model,
                trust_remote_code=trust_remote_code,
                **({} if revision is None else {"revision": revision}),
            )
        except (OSError, ValueError):  # what is wrong with it is said when it is loaded
            return None
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def hidden_size(model: torch.nn.Module) -> int:
    """Width of the model's hidden states."""
    return int(base_of(model).get_input_embeddings().weight.shape[1])


def training_dtype(args: PrivilegedGKDConfig) -> torch.dtype:
    """The dtype of a base loaded for these arguments: float16 or bfloat16 as the run trains, float32 with neither."""
    if args.fp16:
        return torch.float16
    return compute_dtype() if args.bf16 else torch.float32


def build_student(
    model: Any,
    args: PrivilegedGKDConfig,
    peft_config: PeftConfig | None,
    quantization_config: BitsAndBytesConfig | None,
) -> tuple[PeftModel, str]:
    """The model that trains, and one line that says what was loaded.

    `model` is a path or Hub id (loaded quantized), an adapter folder (training continues from it), a Transformers
    model, or a PeftModel.

    Raises:
        ModelError, ConfigError: it cannot be used as asked.
    """
    loaded = ""
    refuse_trainable_head(peft_config)
    if isinstance(model, str):
        adapter = model if is_adapter_folder(model) else None
        if adapter is not None and not (Path(adapter) / "adapter_model.safetensors").is_file():
            raise ModelError(f"{adapter} has no adapter_model.safetensors; adapters are read from safetensors alone.")
        if adapter is not None and peft_config is not None:
            raise ConfigError(f"{adapter!r} is an adapter, which brings its own LoRA settings; remove peft_config.")
        base = adapter_base(adapter) if adapter else model
        check_before_loading(base, adapter, args, peft_config)
        model = load_quantized(base, args, quantization_config)
        what = "given settings" if quantization_config is not None else args.base_quantization
        loaded = f"base {base} loaded once ({what}, {str(training_dtype(args)).removeprefix('torch.')}); "
        if adapter:
            model = _continue_from(model, adapter)
            guard_cpu_linear4bit(model)
            check_head_frozen(model)
            return model, f"{loaded}training continues from the adapter {adapter}"
    elif quantization_config is not None:
        raise ConfigError(
            "quantization_config is only used when model is a path or Hub id; this one is loaded already."
        )
    elif args.model_init_kwargs:
        raise ConfigError("model_init_kwargs is only used when model is a path or Hub id; it is loaded already.")
    if isinstance(model, PeftModel):
        _check_peft_model(model, peft_config)
        check_head_frozen(model)
        guard_cpu_linear4bit(model)
        use_short_backward(base_of(model), args.device)
        return model, f"training the given PeftModel, {_lora_in_words(model)}"
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"model is a {type(model).__name__}; pass a path, a Hub id, a Transformers model or a PeftModel"
        )
    guard_cpu_linear4bit(model)
    left_out = lora_targets(model)[1] if peft_config is None else []
    if not loaded:
        use_short_backward(model, args.device)
    student = attach_lora(model, peft_config)
    check_head_frozen(student)
    if peft_config is not None:
        return student, loaded + _lora_in_words(student)
    targets = "all linear layers" + (f" but {'; '.join(left_out)}" if left_out else "")
    return student, f"{loaded}default {_lora_in_words(student, targets)}"


def check_before_loading(
    base: str, adapter: str | None, args: PrivilegedGKDConfig, peft_config: PeftConfig | None
) -> None:
    """Refuse the adapter's settings before the base is loaded, which can take minutes.

    Raises:
        ConfigError, ModelError: they cannot train on this base.
    """
    check_source(base)
    if adapter is not None:
        check_lora(read_object(Path(adapter) / "adapter_config.json"), f"{adapter}/adapter_config.json")
        refuse_trainable_head(LoraConfig.from_pretrained(adapter))
        tensor_shapes(Path(adapter) / ADAPTER_FILE)
        refuse_broken_numbers(Path(adapter) / ADAPTER_FILE)
    elif peft_config is not None:
        check_lora(peft_config)
        refuse_trainable_head(peft_config)
        assert isinstance(peft_config, LoraConfig)
        trust = (args.model_init_kwargs or {}).get("trust_remote_code", args.trust_remote_code)
        check_names_of(base, peft_config, trust_remote_code=trust, revision=_revision(base, args))


def _lora_in_words(student: PeftModel, targets: str | None = None) -> str:
    """The adapter, and what share of the base it adapts; its target modules in words, or their number."""
    lora = student.peft_config[STUDENT]
    assert isinstance(lora, LoraConfig)
    adapted, quantized = shares(student)
    experts = sum(param.numel() for param in fused_experts(student))
    words = (
        f"LoRA r={lora.r}, alpha={lora.lora_alpha}, {targets or f'{len(lora.target_modules or ())} target modules'}, "
        f"dropout {lora.lora_dropout:g}: {student.num_parameters(only_trainable=True):,} trainable parameters; "
        f"LoRA on {adapted:.0%} of the base's weights, {quantized:.0%} quantized"
    )
    return words + (f"; {experts:,} weights of fused experts stay as they are, in 16 bits" if experts else "")


def _continue_from(model: PreTrainedModel, adapter: str) -> PeftModel:
    """The base with an adapter from a folder, every tensor of it loaded."""
    advice = "Was it trained on another one? base_model_name_or_path in its adapter_config.json says which is loaded."
    with explained(f"the adapter {adapter} does not fit its base {name_of(model)!r}", advice=advice):
        student = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    load_adapter(student, Path(adapter))  # PEFT only warns of missing tensors
    return student


def _check_peft_model(model: PeftModel, peft_config: PeftConfig | None) -> None:
    if peft_config is not None:
        raise ConfigError("model is a PeftModel and peft_config is given too; drop one of them.")
    if list(model.peft_config) != [STUDENT]:
        raise ModelError(
            f"the PeftModel holds the adapters {list(model.peft_config)}; exactly one, named {STUDENT!r}, can train."
        )
    check_lora(model.peft_config[STUDENT], "the PeftModel's config")
    if not any(param.requires_grad for param in model.parameters()):
        raise ModelError(
            "nothing in the PeftModel trains; load it with PeftModel.from_pretrained(..., is_trainable=True)"
        )


def load_quantized(
    name: str, args: PrivilegedGKDConfig, quantization_config: BitsAndBytesConfig | None, *, teacher: bool = False
) -> PreTrainedModel:
    """Load a base as the arguments say (`model_init_kwargs`, or `teacher_model_init_kwargs` for a teacher)."""
    kwargs = dict((args.teacher_model_init_kwargs if teacher else args.model_init_kwargs) or {})
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype.removeprefix("torch."), dtype)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ConfigError(f"dtype is {dtype!r}; accepted are auto, bfloat16, float16, float32.")
    quantization_config = kwargs.pop("quantization_config", quantization_config)
    model = load_base(
        name,
        quantization=args.base_quantization,
        dtype=dtype or training_dtype(args),
        trust_remote_code=kwargs.pop("trust_remote_code", args.trust_remote_code),
        device=args.device,
        quantization_config=quantization_config,
        **kwargs,
    )
    if not teacher and "attn_implementation" not in kwargs:
        use_short_backward(model, args.device)
    return model
