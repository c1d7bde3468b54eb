"""What the user passed -> one student (base + LoRA), its tokenizer, and perhaps a separate teacher."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..config import PrivilegedGKDConfig
from ..data.collator import DataCollatorForPrivilegedGKD
from ..data.files import to_dataset
from ..data.load import DataReport, validate_rows
from ..errors import ConfigError, ModelError
from ..run.resume import load_adapter
from ..teacher import adapter_state
from .adapters import STUDENT
from .cpu import use_short_backward
from .load import (
    attach_lora,
    base_of,
    compute_dtype,
    first_line,
    guard_cpu_linear4bit,
    load_base,
    load_tokenizer,
    prepare_tokenizer,
)

logger = logging.getLogger(__name__)


def check_teacher(model: Any, teacher_model: Any, args: PrivilegedGKDConfig) -> None:
    """Refuse a teacher that contradicts ``share_student_as_teacher``.

    Raises:
        ConfigError: names both models and what to change.
    """
    teacher = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    same = teacher is None or teacher is model or (isinstance(teacher, str) and teacher == name_of(model))
    if args.share_student_as_teacher and not same:
        raise ConfigError(
            f"share_student_as_teacher=True, but the student is {name_of(model)!r} and teacher_model is "
            f"{name_of(teacher)!r}. To share one base, pass the same model or no teacher_model; to learn from the "
            "other model, set share_student_as_teacher=False."
        )
    if not args.share_student_as_teacher:
        if teacher is None:
            raise ConfigError(
                "share_student_as_teacher=False needs a teacher: pass teacher_model (or --teacher_model_name_or_path)."
            )
        if args.teacher_adapter != "disabled":
            raise ConfigError(
                f"teacher_adapter={args.teacher_adapter!r} chooses among the student's own weights, but "
                "share_student_as_teacher=False brings another model. Remove one of the two."
            )


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
    base = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
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
    return path.read_text(encoding="utf-8")


def _revision(model: Any, args: PrivilegedGKDConfig) -> str | None:
    return (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None


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
    if isinstance(model, str):
        adapter = model if is_adapter_folder(model) else None
        if adapter is not None and not (Path(adapter) / "adapter_model.safetensors").is_file():
            raise ModelError(f"{adapter} has no adapter_model.safetensors; adapters are read from safetensors alone.")
        if adapter is not None and peft_config is not None:
            raise ConfigError(f"{adapter!r} is an adapter, which brings its own LoRA settings; remove peft_config.")
        base = adapter_base(adapter) if adapter else model
        model = load_quantized(base, args, quantization_config)
        what = "given settings" if quantization_config is not None else args.base_quantization
        loaded = f"base {base} loaded once ({what}, {str(training_dtype(args)).removeprefix('torch.')}); "
        if adapter:
            model = _continue_from(model, adapter)
            guard_cpu_linear4bit(model)
            return model, f"{loaded}training continues from the adapter {adapter}"
    elif quantization_config is not None:
        raise ConfigError(
            "quantization_config is only used when model is a path or Hub id; this one is loaded already."
        )
    elif args.model_init_kwargs:
        raise ConfigError("model_init_kwargs is only used when model is a path or Hub id; it is loaded already.")
    if isinstance(model, PeftModel):
        _check_peft_model(model, peft_config)
        guard_cpu_linear4bit(model)
        return model, "training the given PeftModel"
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"model is a {type(model).__name__}; pass a path, a Hub id, a Transformers model or a PeftModel"
        )
    guard_cpu_linear4bit(model)
    student = attach_lora(model, peft_config)
    lora = student.peft_config[STUDENT]
    which = "LoRA" if peft_config is not None else "default LoRA"
    targets = "all linear layers" if peft_config is None else f"{len(lora.target_modules or ())} target modules"
    return student, (
        f"{loaded}{which} r={lora.r}, alpha={lora.lora_alpha}, {targets}, dropout {lora.lora_dropout:g}: "
        f"{student.num_parameters(only_trainable=True):,} trainable parameters"
    )


def _continue_from(model: PreTrainedModel, adapter: str) -> PeftModel:
    """The base with an adapter from a folder, every tensor of it loaded."""
    try:
        student = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    except (RuntimeError, ValueError) as error:
        mismatch = next(
            (line.strip() for line in str(error).splitlines() if "mismatch" in line), first_line(error)
        ).rstrip(".")
        raise ModelError(
            f"the adapter {adapter} does not fit its base {name_of(model)!r}: {mismatch}. Was it trained on "
            "another one? base_model_name_or_path in its adapter_config.json says which base is loaded."
        ) from error
    load_adapter(student, Path(adapter))  # PEFT only warns of missing tensors
    return student


def _check_peft_model(model: PeftModel, peft_config: PeftConfig | None) -> None:
    if peft_config is not None:
        raise ConfigError("model is a PeftModel and peft_config is given too; drop one of them.")
    if list(model.peft_config) != [STUDENT]:
        raise ModelError(
            f"the PeftModel holds the adapters {list(model.peft_config)}; exactly one, named {STUDENT!r}, can train."
        )
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
        dtype = None if dtype == "auto" else getattr(torch, dtype)
    quantization_config = kwargs.pop("quantization_config", quantization_config)
    model = load_base(
        name,
        quantization=args.base_quantization,
        dtype=dtype or training_dtype(args),
        trust_remote_code=kwargs.pop("trust_remote_code", args.trust_remote_code),
        device=None if torch.cuda.is_available() and not args.use_cpu else "cpu",
        quantization_config=quantization_config,
        **kwargs,
    )
    if not teacher and "attn_implementation" not in kwargs:
        use_short_backward(model)
    return model


def build_separate_teacher(
    teacher_model: Any, args: PrivilegedGKDConfig, quantization_config: BitsAndBytesConfig | None
) -> PreTrainedModel:
    """Another model as teacher, loaded once, quantized as the student's base."""
    teacher = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    if isinstance(teacher, str):
        teacher = load_quantized(teacher, args, quantization_config, teacher=True)
    guard_cpu_linear4bit(teacher)
    return teacher.requires_grad_(False).eval()


def teacher_tokenizer(teacher_model: Any, args: PrivilegedGKDConfig) -> PreTrainedTokenizerBase | None:
    """The separate teacher's own tokenizer, where it was named by path or Hub id."""
    teacher = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    if not isinstance(teacher, str):
        return None
    try:
        return AutoTokenizer.from_pretrained(teacher, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError):  # weights without a tokenizer
        return None


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


def checked_rows(
    dataset: Any, collator: Any, args: PrivilegedGKDConfig, name: str
) -> tuple[Dataset | IterableDataset, DataReport | None]:
    """The dataset, all its rows found usable, and what was found; None where rows can only be checked one by one."""
    if dataset is None:
        raise ConfigError(f"{name} is missing; pass a datasets.Dataset with a 'messages' column.")
    if isinstance(dataset, IterableDataset) or not isinstance(collator, DataCollatorForPrivilegedGKD):
        return dataset, None
    report = validate_rows(
        dataset,
        collator,
        require_completion=args.lmbda < 1.0 and not args.seq_kd,
        skip_long=args.skip_long_prompts,
    )
    if not isinstance(dataset, Dataset):
        dataset = to_dataset(dataset)
    return (dataset.select(report.kept) if report.skipped_long else dataset), report
