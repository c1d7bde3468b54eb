"""Before training: do hidden states and head give what the model's own forward gives, one unpadded row at a time?"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .errors import ModelError
from .model.adapters import adapter_state, switchable_layers
from .model.head import Head
from .model.load import base_of
from .rows import Row, pack
from .scoring import score_teacher

# Model types whose rows, dropout and padding the conformance suite has compared with plain forwards.
TESTED = frozenset(
    [
        "llama",
        "mistral",
        "ministral3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "olmo",
        "olmo2",
        "olmo3",
        "smollm3",
        "granite",
        "glm",
        "glm4",
        "cohere",
        "cohere2",
        "exaone4",
        "hunyuan_v1_dense",
        "ernie4_5",
        "gpt_neox",
        "seed_oss",
        "stablelm",
        "starcoder2",
        "nemotron",
        "helium",
        "opt",
    ]
)
TEXTS = ("The quick brown fox jumps over the lazy dog.", "One, two, three: what comes next in this row of numbers?")
# Mean KL in nats that rounding may explain: of float32, and of 16 bits with or without 4-bit weights.
TOLERANCE = {torch.float32: 1e-4}
TOLERANCE_16 = 0.05


@torch.no_grad()
def check_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, always: bool = False) -> None:
    """Compare two short rows with one plain forward a row, all with the adapter off.

    The head is probed on every model: scaled and capped head(hidden) must be the model's logits. A model type that the
    suite has not tested is read twice more: the two rows in one batch as the teacher is scored, and in training mode.

    Args:
        model: with :func:`add_hidden_states_forward`; left as it was, and no random number is used up.
        always: all checks, whatever the model type.

    Raises:
        ModelError: it would train on wrong numbers; names the architecture and what differs.
    """
    base = base_of(model)
    rows = [_row(text, tokenizer) for text in TEXTS]
    limit = min(base.get_input_embeddings().weight.shape[0], len(tokenizer))
    if any(not row.kept or max(row.teacher_prompt + row.completion) >= limit for row in rows):
        return  # a tokenizer that knows no Latin letters; ids beyond the embedding are refused row by row
    head = Head(model)
    device = next(model.parameters()).device
    with adapter_state(model, "disabled"):
        plain = [_plain_logits(base, row, device) for row in rows]
        alone = []
        for row in rows:
            packed = pack([row.teacher_prompt], [row], tokenizer.pad_token_id, device)
            alone.append(head.logits(model(**packed)))
    _compare(base, plain, alone, "its head, scale and soft-cap as they are known here do not give its own logits")
    if base.config.model_type in TESTED and not always:
        return
    with adapter_state(model, "disabled"):
        score_teacher(model, rows, tokenizer.pad_token_id)
    batched = [head.logits(row.teacher_hidden) for row in rows]
    _compare(base, plain, batched, "rows of a batch are read differently than alone (padding leaks)")
    packed = pack([row.teacher_prompt for row in rows], rows, tokenizer.pad_token_id, device)
    trained = _in_training(model, packed).split([len(row.kept) for row in rows])
    _compare(base, plain, [head.logits(part) for part in trained], "it is another function in training mode")


def _row(text: str, tokenizer: PreTrainedTokenizerBase) -> Row:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Row([], ids[: len(ids) // 2], ids[len(ids) // 2 :], False, 0)


def _plain_logits(base: nn.Module, row: Row, device: torch.device) -> torch.Tensor:
    """The model's own forward of one unpadded row: logits (C, V) that predict the completion."""
    ids = torch.tensor([row.teacher_prompt + row.completion], device=device)
    first = len(row.teacher_prompt) - 1
    logits: torch.Tensor = base(input_ids=ids, use_cache=False).logits[0, first : first + len(row.completion)]
    return logits.float()


def _in_training(model: nn.Module, packed: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states of a forward in training mode, the adapter off; LoRA's own dropout therefore has no say."""
    layers = switchable_layers(model)
    modes = [(module, module.training) for module in model.modules()]
    disabled = [getattr(layer, "disable_adapters", False) for layer in layers]
    grads = [(param, param.requires_grad) for param in model.parameters()]
    device = packed["input_ids"].device
    try:
        model.train()
        for layer in layers:
            layer.enable_adapters(False)  # type: ignore[operator]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            hidden: torch.Tensor = model(**packed)
        return hidden
    finally:
        for layer, was in zip(layers, disabled):
            layer.enable_adapters(not was)  # type: ignore[operator]
        for module, training in modes:
            module.training = training
        for param, needed in grads:
            param.requires_grad_(needed)


def _compare(base: nn.Module, wanted: list[torch.Tensor], found: list[torch.Tensor], fault: str) -> None:
    if not all(bool(torch.isfinite(logits).all()) for logits in wanted):
        dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
        raise ModelError(
            f"the base itself gives NaN or infinite logits on a short row ({type(base).__name__}, {dtype}): its files "
            "hold such numbers, or the dtype is too small for it. Download it again, or use another --dtype."
        )
    tolerance = TOLERANCE.get(base.get_input_embeddings().weight.dtype, TOLERANCE_16)  # type: ignore[operator, union-attr]
    kl = max(_mean_kl(p, q) for p, q in zip(wanted, found))
    if not kl <= tolerance:
        kind = base.config.model_type  # type: ignore[union-attr]
        raise ModelError(
            f"{type(base).__name__} (model_type {kind!r}) cannot be trained here: {fault}. On two short rows its "
            f"distributions are {kl:.2g} nats from one plain forward a row; rounding explains {tolerance:g}. Teacher "
            "and student would be compared on wrong numbers."
        )


def _mean_kl(wanted_CV: torch.Tensor, found_CV: torch.Tensor) -> float:
    p, q = wanted_CV.log_softmax(-1), found_CV.log_softmax(-1)
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))  # an impossible token adds nothing
    return float(terms.sum(-1).mean())
