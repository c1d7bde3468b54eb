"""Settings that nobody gave, chosen from the model and the rows, each with its reason.

A value that was given always wins (:meth:`PrivilegedGKDConfig.is_open`). What TRL or the seed name a default for and
what does not depend on model or rows (lmbda, beta, temperature, max_new_tokens, ...) is left as it is.

Shapes: N completion tokens of all sampled rows, D hidden width.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any

import torch
from datasets import IterableDataset
from transformers import SchedulerType

from .compare import read, token_nll
from .config import PrivilegedGKDConfig
from .data.check import DataReport
from .data.collator import DataCollatorForPrivilegedGKD
from .data.row import parse_privileged
from .data.template import source_of, writes_date
from .engines.merged import free_bytes
from .errors import DataError
from .model.head import Head
from .model.load import base_of
from .model.rates import lora_learning_rate
from .prefix import share_read_once
from .teacher import Teacher

ENOUGH_STEPS = 150
"""Optimizer steps of a small set. On the 60 facts of the demo (beta 0.5, rate by the rule, one seed each): 27 steps at
2e-5 recover 0.00; 110 steps of 8 rows, linear decay, 0.45; 220 of 4 rows, linear, 0.47; 150 of 8, constant, 0.68."""
WARMUP = 0.05
"""Share of the steps in which the rate rises."""
PROBED_ROWS = 16
LEAST_ROWS = 8
"""Rows with PI and a reference answer that the placements are compared on, and below which nothing is compared."""

SHARING_ROWS = 200
WORTH_MOVING = 0.2
"""Rows that are looked at for common beginnings, and the share of the teacher's tokens that must be saved."""

USE_TEMPLATE = "{question}\n\nUse this in your answer: {privileged}"
PLACEMENTS: tuple[tuple[str, str | None], ...] = (
    ("messages", None),
    ("user", None),
    ("user", USE_TEMPLATE),
    ("system", None),
)
"""Placement and wording of the PI that the probe compares; the first stays unless another is clearly better."""


def settle_contexts(
    config: PrivilegedGKDConfig,
    tokenizer: Any,
    datasets: Iterable[Iterable[Any] | None],
    context_length: int | None,
) -> None:
    """What both contexts depend on, where nobody gave it: the date of the template, the budget of the PI."""
    settle_template_date(config, tokenizer)
    settle_privileged_length(config, tokenizer, datasets, context_length)


def settle_template_date(config: PrivilegedGKDConfig, tokenizer: Any) -> None:
    """Where the chat template writes the date into prompts and nobody gave ``template_date``: today, for good, so that
    a run that is resumed or evaluated on another day reads the same prompts."""
    if config.is_open("template_date") and writes_date(source_of(tokenizer)):
        config.choose("template_date", date.today().isoformat(), "the chat template writes the date into prompts")


def settle_privileged_length(
    config: PrivilegedGKDConfig,
    tokenizer: Any,
    datasets: Iterable[Iterable[Any] | None],
    context_length: int | None,
) -> None:
    """Where nobody gave ``max_privileged_length`` and the longest PI is over it: what the model's context holds."""
    if not config.is_open("max_privileged_length") or config.allow_privileged_cut:
        return
    longest = longest_privileged(config, tokenizer, datasets)
    if longest <= config.max_privileged_length:
        return
    limit = f"the model's context of {context_length} is the limit" if context_length else "the model names no limit"
    budget = max(context_length or 0, longest)  # PI over the context itself is for the check of the context to name
    config.choose("max_privileged_length", budget, f"the longest PI has {longest} tokens; {limit}")


def longest_privileged(config: PrivilegedGKDConfig, tokenizer: Any, datasets: Iterable[Iterable[Any] | None]) -> int:
    """Tokens of the longest PI text; rows that cannot be read are left to the report on them."""
    lengths: dict[tuple[str, ...], int] = {(): 0}
    for rows in datasets:
        if rows is None or isinstance(rows, IterableDataset):  # that is read once only
            continue
        for row in rows:
            if not isinstance(row, Mapping):
                continue
            try:
                messages = parse_privileged(row.get(config.privileged_key), config.privileged_key)
            except DataError:
                continue
            texts = tuple(message["content"] for message in messages)
            if texts not in lengths:
                ids = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts)
                lengths[texts] = sum(map(len, ids))
    return max(lengths.values())


def settle_training(config: PrivilegedGKDConfig, hidden_size: int, rows: int | None) -> None:
    """Learning rate, weight of the divergence, steps, warm-up and log, where nobody gave them.

    Args:
        hidden_size: width of the model.
        rows: number of training rows; None when that is not known.
    """
    if config.is_open("learning_rate"):
        reason = f"5e-5 * 10 * (2000/{hidden_size})^0.781: a LoRA's rate at this width (tinker-cookbook)"
        config.choose("learning_rate", lora_learning_rate(hidden_size), reason)
        if config.is_open("normalize_beta") and 0.0 < config.beta < 1.0:
            weight = config.beta * (1 - config.beta)
            config.choose(
                "normalize_beta", True, f"at beta {config.beta:g} the gradient is else {weight:g} of KL's, for which "
                "the rate is made"
            )  # fmt: skip
        if config.is_open("lr_scheduler_type"):
            reason = "in so few steps a rate that falls from the first on leaves little of itself"
            config.choose("lr_scheduler_type", SchedulerType.CONSTANT_WITH_WARMUP, reason)
    windows = 0
    if rows is not None:
        window = config.per_device_train_batch_size * config.gradient_accumulation_steps * max(1, config.world_size)
        windows = math.ceil(rows / window)
        three = math.ceil(config.num_train_epochs * windows)
        if config.is_open("max_steps") and config.is_open("num_train_epochs") and three < ENOUGH_STEPS:
            reason = f"{config.num_train_epochs:g} epochs of {rows} rows, {window} a step, are {three} steps: too few"
            config.choose("max_steps", ENOUGH_STEPS, reason)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * windows)
    rise = round(WARMUP * steps)
    if rise and config.is_open("warmup_steps") and not getattr(config, "warmup_ratio", None):
        config.choose("warmup_steps", rise, f"{WARMUP:.0%} of {steps} steps")
    often = max(1, min(10, steps // 20))
    if steps and config.is_open("logging_steps") and often != config.logging_steps:
        config.choose("logging_steps", often, f"so that {steps} steps show a curve")


def settle_checkpointing(config: PrivilegedGKDConfig, model: Any, report: DataReport | None) -> None:
    """On a CPU without gradient checkpointing, where a micro-batch's activations take at most a quarter of the free
    memory: it would run every layer's forward twice.

    Args:
        model: the student.
        report: on the training rows; None where their lengths are not known.
    """
    is_open = config.is_open("gradient_checkpointing") and "activation_checkpointing" not in config.given
    if not is_open or report is None or config.device.type != "cpu":
        return
    answers = max(config.max_new_tokens, *report.completion_lengths)
    needed = activation_bytes(
        base_of(model).config.get_text_config(),
        config.per_device_train_batch_size * config.num_generations,
        max(report.prompt_lengths) + answers,
    )
    free = free_bytes(config.device)
    if needed is not None and needed < free / 4:
        reason = f"a micro-batch's activations take at most {needed / 2**30:.1f} of {free / 2**30:.0f} GiB free memory"
        config.choose("gradient_checkpointing", False, f"{reason}, and with it each layer runs twice")


def activation_bytes(config: Any, rows: int, length: int) -> int | None:
    """An upper estimate of what `rows` of `length` tokens keep for the backward pass; None for unusual shapes.

    A token keeps, a layer, some 24 vectors of the model's width and 8 of the MLP's in 4 bytes (the inputs of the
    linear layers in 16 bits, their float32 copies for the LoRA, norms, rotations); a row its attention's weights.
    """
    sizes = [size for size in (getattr(config, name, None) for name in _SIZES) if isinstance(size, int)]
    if len(sizes) < len(_SIZES):
        return None
    layers, width, inner, heads = sizes
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return 4 * rows * length * layers * (24 * width + 8 * inner * experts + 2 * heads * length)


_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")


def choose_placement(
    config: PrivilegedGKDConfig, tokenizer: Any, rows: Sequence[Any], teacher: Teacher, head: Head
) -> bool:
    """Where and how the teacher is shown the PI, when nobody said: as it makes the reference answers likeliest.

    Compared on at most :data:`PROBED_ROWS` rows with PI and a reference answer, by the teacher's negative
    log-likelihood of that answer a token. The first of :data:`PLACEMENTS` stays unless another is better by more than
    two standard errors of the mean difference over rows. Of those that are no worse than the best by that measure, one
    in front of which prompts begin alike is taken, where it lets the teacher read much less.

    Returns:
        Whether the placement or its wording was changed.
    """
    if not config.is_open("privileged_placement"):
        return False
    candidates = PLACEMENTS
    if config.privileged_template is not None:  # made for one of these; `messages` has no use for it
        candidates = (("user", config.privileged_template), ("system", config.privileged_template))
    sampled = probe_rows(config, tokenizer, rows)
    if len(sampled) < LEAST_ROWS:
        if config.privileged_template is None:
            return False
        config.choose("privileged_placement", "user", "privileged_template was given, which `messages` does not use")
        return True
    losses, shares = {}, {}
    for placement, template in candidates:
        collator = collator_with(config, tokenizer, placement, template)
        if collator.builder.placement == placement:  # else the chat template cannot carry it
            losses[placement, template] = answer_losses(collator, sampled, teacher, head)
            prompts = [collator.encode(rows[i])["teacher_ids"] for i in range(min(len(rows), SHARING_ROWS))]
            shares[placement, template] = share_read_once(prompts)
    first = next(iter(losses))
    best = min(losses, key=lambda name: statistics.fmean(losses[name]))
    if first == candidates[0] == PLACEMENTS[0] and not clearly_less(losses[best], losses[first]):
        best = first
    as_good = [name for name in losses if not clearly_less(losses[best], losses[name])]
    cheapest = max(as_good, key=lambda name: shares[name])
    cheaper = shares[cheapest] > shares[best] + WORTH_MOVING
    best = cheapest if cheaper else best
    found = ", ".join(
        f"{placement}{' worded' if template == USE_TEMPLATE else ''} {statistics.fmean(values):.2f}"
        for (placement, template), values in losses.items()
    )
    reason = f"nats a token of {len(sampled)} reference answers with the PI there: {found}"
    if cheaper:
        reason += f"; as good as any, and {shares[best]:.0%} of the teacher's tokens are read once"
    config.choose("privileged_placement", best[0], reason)
    if best[1] is not None and config.privileged_template is None:
        config.choose("privileged_template", best[1], "the wording with which the base used the PI best")
    return best != PLACEMENTS[0]


def probe_rows(config: PrivilegedGKDConfig, tokenizer: Any, rows: Sequence[Any]) -> list[Any]:
    """Rows with PI and a reference answer, spread over the set."""
    collator = collator_with(config, tokenizer, "user", None)
    found = []
    for i in range(len(rows)):
        contexts = collator.builder.build(rows[i])
        if contexts.has_privileged and contexts.answer is not None:
            found.append(i)
    step = max(1, len(found) // PROBED_ROWS)
    return [rows[i] for i in found[::step][:PROBED_ROWS]]


def collator_with(
    config: PrivilegedGKDConfig, tokenizer: Any, placement: str, template: str | None
) -> DataCollatorForPrivilegedGKD:
    """The run's collator with another placement; of any length, as nothing is trained on it."""
    return DataCollatorForPrivilegedGKD(
        tokenizer,
        privileged_key=config.privileged_key,
        max_length=None,
        max_privileged_length=config.max_privileged_length,
        privileged_placement=placement,
        privileged_template=template,
        allow_privileged_cut=True,
        template_date=config.template_date,
    )


@torch.no_grad()
def answer_losses(
    collator: DataCollatorForPrivilegedGKD, rows: Sequence[Any], teacher: Teacher, head: Head
) -> list[float]:
    """The teacher's mean negative log-likelihood a token of each row's reference answer, in nats."""
    made = []
    for row in rows:
        encoded = collator.encode(row)
        made.append((encoded["teacher_ids"], encoded["completion_ids"]))
    with teacher.weights() as model:
        reading = read(model, made, collator.pad_token_id, head=head)
    return [float(nll.mean()) for nll in token_nll(reading, [completion for _, completion in made])]


def clearly_less(values: Sequence[float], others: Sequence[float]) -> bool:
    """Whether `values` lie below their `others` by more than two standard errors of the mean difference."""
    differences = [b - a for a, b in zip(values, others)]
    if len(differences) < 2:
        return False
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) > 2 * error


def start_block(automatic: Mapping[str, tuple[Any, str]]) -> str:
    """All that was chosen, with the reasons, in lines of at most 80; "" when nothing was."""
    if not automatic:
        return ""
    lines = ["Chosen, as nobody said otherwise (a value that you give always wins):"]
    for name, (value, reason) in automatic.items():
        shown = f"{value:.3g}" if isinstance(value, float) else repr(value) if isinstance(value, str) else str(value)
        if isinstance(value, SchedulerType) or name == "privileged_placement":
            shown = str(getattr(value, "value", value))
        lines += textwrap.wrap(
            f"{name} = {shown}: {reason}",
            80,
            initial_indent="  ",
            subsequent_indent="      ",
            break_on_hyphens=False,
        )
    return "\n".join(lines)
