"""Before training: do hidden states and head give what the model's own forward gives, one unpadded row at a time?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .errors import ModelError, explained
from .model.adapters import adapter_state, switchable_layers
from .model.caches import cache_argument, select_rows
from .model.head import Head
from .model.load import base_of
from .prefix import Prefixes
from .rollout import prefill
from .rows import Row, pack
from .scoring import score_teacher

# Model types whose rows, dropout and padding the conformance suite has compared with plain forwards.
TESTED = frozenset(
    """
    afmoe apertus arcee bailing_hybrid bamba biogpt bitnet bloom codegen cohere cohere2 cohere2_moe cwm deepseek_v2
    deepseek_v3 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 flex_olmo gemma gemma2
    gemma3 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neo gpt_neox
    gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium
    hunyuan_v1_dense hunyuan_v1_moe hyperclovax internlm3 jais2 jamba jetmoe kimi_linear laguna lfm2 lfm2_moe lfm2_vl
    lfm3 llama llama4_text mamba2 mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mistral3
    mixtral mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi phi3 qwen2 qwen2_moe
    qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_vl seed_oss smollm3 solar_open stablelm starcoder2
    vaultgemma youtu zamba2
    """.split()  # noqa: SIM905
)
ADVICE = "Take a model of a type that docs/architectures.md lists; where rollouts alone fail, train with lmbda=0."
TEXTS = ("The quick brown fox jumps over the lazy dog.", "One, two, three: what comes next in this row of numbers?")
# Mean KL in nats that rounding may explain: of float32, and of 16 bits with or without 4-bit weights.
TOLERANCE = {torch.float32: 1e-4}
TOLERANCE_16 = 0.05
TOLERANCE_AGAIN = 3e-3  # of one batch read twice in 16 bits (atomic sums on a GPU); dropout of 0.1 makes 0.01 and more


@torch.no_grad()
def check_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, always: bool = False, writes: bool = True
) -> None:
    """Compare two short rows with one plain forward a row, all with the adapter off.

    The head is probed on every model: scaled and capped head(hidden) must be the model's logits. A model type that the
    suite has not tested is read some more times: the two rows in one batch as the teacher is scored; in training mode;
    and by the decode loop, where one row leaves the batch.

    Args:
        model: with :func:`add_hidden_states_forward`; left as it was, and no random number is used up.
        always: all checks, whatever the model type.
        writes: whether the model writes rollouts.

    Raises:
        ModelError: it would train on wrong numbers, or crash on the way; names the architecture and what differs.
    """
    base = base_of(model)
    rows = [_row(text, tokenizer) for text in TEXTS]
    limit = min(base.get_input_embeddings().weight.shape[0], len(tokenizer))
    if any(not row.kept or max(row.teacher_prompt + row.completion) >= limit for row in rows):
        return  # a tokenizer that knows no Latin letters; ids beyond the embedding are refused row by row
    what = f"{type(base).__name__} (model_type {base.config.model_type!r}) cannot be trained here"
    with explained(what, advice=ADVICE):
        plain = _check_head(model, rows, tokenizer.pad_token_id)
        if base.config.model_type not in TESTED or always:
            _check_rows(model, rows, plain, tokenizer.pad_token_id)
            if writes:
                _check_rollouts(model, rows, plain, tokenizer.pad_token_id)


def _check_head(model: nn.Module, rows: list[Row], pad_id: int) -> list[torch.Tensor]:
    """Returns the plain logits of every row."""
    base, head, device = base_of(model), Head(model), next(model.parameters()).device
    with adapter_state(model, "disabled"):
        plain = [_plain_logits(base, row, device) for row in rows]
        alone = [head.logits(model(**pack([row.teacher_prompt], [row], pad_id, device))) for row in rows]
    _compare(base, plain, alone, "its head, scale and soft-cap as they are known here do not give its own logits")
    return plain


def _check_rows(model: nn.Module, rows: list[Row], plain: list[torch.Tensor], pad_id: int) -> None:
    """Rows of one batch, in evaluation and in training."""
    base, head, device = base_of(model), Head(model), next(model.parameters()).device
    with adapter_state(model, "disabled"):
        score_teacher(model, rows, pad_id)
    batched = [head.logits(row.teacher_hidden) for row in rows]
    _compare(base, plain, batched, "rows of a batch are read differently than alone (padding leaks)")
    packed = pack([row.teacher_prompt for row in rows], rows, pad_id, device)
    lengths = [len(row.kept) for row in rows]
    trained, again = (head.logits(_in_training(model, packed, seed)).split(lengths) for seed in (1, 2))
    noise = "it is another function in training mode (dropout, jitter or sampling that cannot be switched off)"
    _compare(base, plain, trained, noise)
    _compare(base, trained, again, noise, exact=True)


def _check_rollouts(model: nn.Module, rows: list[Row], plain: list[torch.Tensor], pad_id: int) -> None:
    """The first token of each row, and the second of the one that stays when the other has left."""
    base, device = base_of(model), next(model.parameters()).device
    fault = "what it has read and goes on from gives other logits than the whole row (rollouts)"
    prompts = [row.teacher_prompt for row in rows]
    with adapter_state(model, "disabled"):
        logits, position, mask, cache = prefill(model, prompts, pad_id, Prefixes(prompts))
        _compare(base, [each[:1] for each in plain], [each[None] for each in logits.float()], fault)
        stays = len(rows) - 1
        select_rows(cache, torch.tensor([stays], device=device))
        mask = mask[[stays]]
        out = model(
            input_ids=torch.tensor([rows[stays].completion[:1]], device=device),
            attention_mask=torch.cat([mask, mask.new_ones(1, 1)], dim=1),
            position_ids=position[[stays]],
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(model): cache},
        )
    _compare(base, [plain[stays][1:2]], [out.logits[0, -1:].float()], fault)


def _row(text: str, tokenizer: PreTrainedTokenizerBase) -> Row:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Row([], ids[: len(ids) // 2], ids[len(ids) // 2 :], False, 0)


def _plain_logits(base: nn.Module, row: Row, device: torch.device) -> torch.Tensor:
    """The model's own forward of one unpadded row: logits (C, V) that predict the completion."""
    ids = torch.tensor([row.teacher_prompt + row.completion], device=device)
    first = len(row.teacher_prompt) - 1
    logits: torch.Tensor = base(input_ids=ids, use_cache=False).logits[0, first : first + len(row.completion)]
    return logits.float()


def _in_training(model: nn.Module, packed: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
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
            torch.manual_seed(seed)
            hidden: torch.Tensor = model(**packed)
        return hidden
    finally:
        for layer, was in zip(layers, disabled):
            layer.enable_adapters(not was)  # type: ignore[operator]
        for module, training in modes:
            module.training = training
        for param, needed in grads:
            param.requires_grad_(needed)


def _compare(
    base: nn.Module, wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor], fault: str, *, exact: bool = False
) -> None:
    """`exact`: both come from the same products, which differ by the order of sums at most."""
    if not all(bool(torch.isfinite(logits).all()) for logits in wanted):
        dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
        raise ModelError(
            f"the base itself gives NaN or infinite logits on a short row ({type(base).__name__}, {dtype}): its files "
            "hold such numbers, or the dtype is too small for it. Download it again, or use another --dtype."
        )
    tolerance = TOLERANCE.get(base.get_input_embeddings().weight.dtype, TOLERANCE_16)  # type: ignore[operator, union-attr]
    if exact:
        tolerance = min(tolerance, TOLERANCE_AGAIN)
    kl = max(_mean_kl(p, q) for p, q in zip(wanted, found))
    if not kl <= tolerance:
        kind = base.config.model_type  # type: ignore[union-attr]
        raise ModelError(
            f"{type(base).__name__} (model_type {kind!r}) cannot be trained here: {fault}. On two short rows its "
            f"distributions are {kl:.2g} nats from one plain forward a row; rounding explains {tolerance:g}. Teacher "
            f"and student would be compared on wrong numbers. {ADVICE}"
        )


def _mean_kl(wanted_CV: torch.Tensor, found_CV: torch.Tensor) -> float:
    p, q = wanted_CV.log_softmax(-1), found_CV.log_softmax(-1)
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))  # an impossible token adds nothing
    return float(terms.sum(-1).mean())
