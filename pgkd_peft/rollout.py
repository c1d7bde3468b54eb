"""Student prompts -> completions: two engines, one decode loop.

`adapter` runs the model with its LoRA modules. `merged` runs a plain 16-bit copy whose linear weights are
dequant(W) + delta; it shares every tensor that LoRA does not touch and never writes to the base.

Shapes: R rows of one sub-batch, L prompt length (left-padded), V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .engines.decode import reader_of
from .errors import ModelError
from .model.adapters import eval_mode
from .model.caches import cache_argument, is_plain, joined, new_cache, select_rows, why_not_shared
from .model.load import base_of
from .prefix import Prefix, Prefixes, TeacherMemory
from .run.memory import is_out_of_memory

logger = logging.getLogger(__name__)

TOKEN_BUDGET = 16_384  # rows x (prompt + new) tokens of a generation sub-batch, where nothing better is known
CACHE_SHARE = 0.4  # of a GPU's memory beside the weights that the cache of a sub-batch may take
BLOCK = 512  # tokens whose probabilities are summed at a time
# Tokens after which the stops are read. Waiting for a GPU leaves it idle; a CPU has the answer at once.
READ_EVERY = {"cuda": 8}

# Tokens of a beginning that rows of other lengths share only in forwards of their own (windows, states).
WORTH_A_FORWARD = 256


def window_generator(seed: int, *path: int) -> torch.Generator:
    """A CPU generator that depends on the seed and on the place in the run alone, e.g. (step, rank).

    Because nothing is carried from step to step, a resumed run draws what the uninterrupted one would have drawn.
    """
    state = seed % (2**31)
    for number in path:
        state = (state * 1_000_003 + number + 1) % (2**61 - 1)
    return torch.Generator().manual_seed(state)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    temperature: float = 0.0,
    seed: int = 0,
    copies: int = 1,
    token_budget: int | None = None,
    generator: torch.Generator | None = None,
    memory: TeacherMemory | None = None,
) -> list[list[int]]:
    """Complete each prompt `copies` times.

    Prompts are sorted by length into sub-batches of at most `token_budget` tokens; a prompt's prefill is shared by its
    copies, and a beginning that prompts have in common is read once; rows that have finished leave the batch.
    Sampling is plain: the softmax of the logits divided by `temperature`, no top-k, no top-p, no penalties, whatever
    the model's ``generation_config`` says. The uniform number that picks a row's token at position t is drawn before
    anything runs, so the result does not depend on how rows are batched (up to rounding in the model).

    Args:
        prompts: token ids, unpadded, not empty.
        stop_ids: a completion ends with the first of these, which is kept.
        temperature: 0 is greedy.
        seed: of the random numbers, unless a `generator` is given.
        token_budget: rows times (prompt + new) tokens of a sub-batch; halved and tried again when memory runs out.
            Default: :func:`budget_of` the model.
        memory: of a fixed teacher that writes itself, with what it has read before.

    Returns:
        Completions without their prompts, prompt by prompt: prompt i's copies are at ``[i*copies : (i+1)*copies]``.
    """
    budget = token_budget or budget_of(model)
    generator = generator or window_generator(seed)
    uniforms = torch.rand(len(prompts) * copies, max_new_tokens, generator=generator, dtype=torch.float64)
    done: list[list[int]] = [[] for _ in range(len(prompts) * copies)]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    plan = memory if memory is not None and memory.nodes else Prefixes(prompts)
    start = 0
    with eval_mode(model.modules()), masks_unread(base_of(model)):
        while start < len(order):
            stop = start + 1
            while stop < len(order):
                longest = len(prompts[order[stop]]) + max_new_tokens
                if (stop + 1 - start) * copies * longest > budget:
                    break
                stop += 1
            batch = order[start:stop]
            used = len(batch) * copies * (len(prompts[batch[-1]]) + max_new_tokens)
            completions = None
            rows = [i * copies + c for i in batch for c in range(copies)]
            try:
                completions = _decode(
                    model,
                    [prompts[i] for i in batch],
                    copies,
                    max_new_tokens,
                    stop_ids,
                    pad_id,
                    temperature,
                    uniforms[rows],
                    plan,
                )
            except (RuntimeError, MemoryError) as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
            if completions is None:  # only now, without the error, is what it held on to free
                budget = used // 2
                torch.cuda.empty_cache()
                logger.warning("Out of memory in a rollout of %d rows; going on with half as many.", len(rows))
                continue
            for row, completion in zip(rows, completions):
                done[row] = completion
            start = stop
            plan.forget(needed=[node for i in order[start:] if (node := plan.find(prompts[i]))])
    return done


@contextlib.contextmanager
def masks_unread(base: PreTrainedModel) -> Iterator[None]:
    """Inside, `sdpa` attention on a GPU takes its mask as it is. Transformers looks at every forward whether the mask
    hides anything, to leave it out where it does not: a wait for the device each token, for nothing that a query of one
    token gains from, and each pass of a step, where rows without padding come without a mask anyway."""
    change = base.device.type in READ_EVERY and base.config._attn_implementation == "sdpa"
    try:
        if change:
            base.set_attn_implementation(MASK_UNREAD)
        yield
    finally:
        if change:
            base.set_attn_implementation("sdpa")


def _mask_as_it_is(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    unpadded = kwargs.get("attention_mask") is None  # known without a look
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": unpadded and kwargs.get("allow_is_causal_skip", True)})


MASK_UNREAD = "sdpa_mask_unread"
AttentionInterface.register(MASK_UNREAD, sdpa_attention_forward)
AttentionMaskInterface.register(MASK_UNREAD, _mask_as_it_is)


def budget_of(model: nn.Module) -> int:
    """Rows times tokens of a sub-batch whose cache fits: on a GPU as many as its memory holds beside the weights.

    From the card's size, not from what is free at the moment: a resumed run must cut its batches as the uninterrupted
    one did. Where that is too much, because something else lives on the card, :func:`generate` goes on in halves.
    """
    device = next(model.parameters()).device
    a_token = cache_bytes(base_of(model))
    if device.type != "cuda" or not a_token:
        return TOKEN_BUDGET
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    room = torch.cuda.get_device_properties(device).total_memory - weights
    return max(1, int(CACHE_SHARE * room / a_token))


def cache_bytes(base: PreTrainedModel) -> int:
    """Bytes of keys and values a token, or 0 for a model whose config does not say. 7B with 8 KV heads of 128 and 32
    layers: 128 KiB in 16 bits. Layers that keep less (sliding windows, recurrent states) are counted as if they did
    not."""
    config = base.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    layers, hidden = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if not (heads and layers and hidden):
        return 0
    width = (getattr(config, "num_key_value_heads", None) or heads) * (
        getattr(config, "head_dim", None) or hidden // heads
    )
    return 2 * layers * width * base.dtype.itemsize


def _decode(
    model: nn.Module,
    prompts: list[Sequence[int]],
    copies: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    temperature: float,
    uniforms: torch.Tensor,  # (R, max_new_tokens)
    plan: Prefixes,
) -> list[list[int]]:
    device = next(model.parameters()).device
    stops = torch.tensor(sorted(set(stop_ids)), device=device, dtype=torch.long)
    uniforms = uniforms.to(device)
    logits, position, mask, cache = prefill(model, prompts, pad_id, plan)
    if copies > 1:
        every = torch.arange(len(prompts), device=device).repeat_interleave(copies)
        select_rows(cache, every)
        logits, position, mask = logits[every], position[every], mask[every]

    count = len(prompts) * copies
    tokens = torch.full((count, max_new_tokens), pad_id, device=device)
    reader = reader_of(model, cache, mask, max_new_tokens)
    alive = torch.arange(count, device=device)  # rows still in the batch
    finished = torch.zeros(count, dtype=torch.bool, device=device)
    every = READ_EVERY.get(device.type, 1)
    for t in range(max_new_tokens):
        token = pick(logits, temperature, uniforms[alive, t])  # (R,)
        tokens[alive, t] = token  # what a finished row still says is cut off at the end
        if t == max_new_tokens - 1:
            break
        finished |= torch.isin(token, stops)
        if t % every == every - 1:
            keep = [i for i, done in enumerate(finished.tolist()) if not done]  # the one wait for the device
            if not keep:
                break
            if len(keep) <= reader.worth_leaving * len(alive):
                index = torch.tensor(keep, device=device)
                reader.keep(index)
                alive, token, position, finished = (x[index] for x in (alive, token, position, finished))
        logits, position = reader.read(token, position), position + 1
    return [_up_to_stop(row, set(stop_ids)) for row in tokens[:, : t + 1].tolist()]


def _up_to_stop(tokens: list[int], stops: set[int]) -> list[int]:
    """The tokens up to the first stop, which is kept."""
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]


Prefilled: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Cache]


def prefill(model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int, plan: Prefixes) -> Prefilled:
    """Read the prompts, those that begin as `plan` knows from there on.

    Returns:
        Logits (R, V) of each row's first new token, its position (R, 1), the mask of what was read (R, L), padded on
        the left, and the cache.
    """
    device = next(model.parameters()).device
    groups = _alike(model, prompts, plan)
    if list(groups) == [(None, 0)]:
        return _read_together(model, prompts, None, pad_id, plan)
    order = [i for rows in groups.values() for i in rows]
    parts = [_read_together(model, [prompts[i] for i in rows], key[0], pad_id, plan) for key, rows in groups.items()]
    lengths = [mask.shape[1] for *_, mask, _ in parts]
    length = max(lengths) + (device.type == "cpu")  # see _read_together
    back = torch.tensor(order, device=device).argsort()
    masks = [nn.functional.pad(mask, (length - mask.shape[1], 0)) for *_, mask, _ in parts]
    cache = joined([part[-1].layers for part in parts], length)
    select_rows(cache, back)
    logits, position = (torch.cat([part[i] for part in parts])[back] for i in (0, 1))
    return logits, position, torch.cat(masks)[back], cache


def _alike(
    model: nn.Module, prompts: Sequence[Sequence[int]], plan: Prefixes
) -> dict[tuple[Prefix | None, int], list[int]]:
    """Rows that are read in one forward, by the beginning that they go on from (and 0, or how long they are where no
    padding may stand behind it)."""
    nodes = [plan.find(prompt) for prompt in prompts]
    cache = new_cache(model)
    padded = cache is not None and all(map(is_plain, cache.layers))  # windows and states would count the padding
    if not padded:
        nodes = [node if node and node.end >= WORTH_A_FORWARD else None for node in nodes]
    if not any(nodes) or why_not_shared(model) is not None:
        return {(None, 0): list(range(len(prompts)))}
    groups: dict[tuple[Prefix | None, int], list[int]] = {}
    for i, (node, prompt) in enumerate(zip(nodes, prompts)):
        groups.setdefault((node, 0 if padded or node is None else len(prompt)), []).append(i)
    return groups


def _read_together(
    model: nn.Module, prompts: Sequence[Sequence[int]], node: Prefix | None, pad_id: int, plan: Prefixes
) -> Prefilled:
    """:func:`prefill` of rows that go on from one beginning, or from none."""
    device = next(model.parameters()).device
    start = node.end if node else 0
    rests = [list(prompt[start:]) for prompt in prompts]
    longest = max(map(len, rests))
    if device.type == "cpu" and node is None:
        longest += 1  # without padding there is no mask, and torch's CPU attention is then four times slower a token
    ids = torch.tensor([[pad_id] * (longest - len(r)) + r for r in rests], device=device)  # (R, L - start)
    mask = torch.tensor([[1] * start + [0] * (longest - len(r)) + [1] * len(r) for r in rests], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
    cache = new_cache(model)
    if cache is None:
        raise ModelError(
            f"{base_of(model).config.model_type} keeps what it has read in itself and not in a cache that rows can "
            "leave, so it cannot write rollouts. Take another model, or answers of the data's own (lmbda=0)."
        )
    if node is not None:
        cache = joined([plan.read(model, node)], start)
        select_rows(cache, torch.zeros(len(rests), dtype=torch.long, device=device))
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=torch.tensor([longest - 1], device=device),  # an index copies; a slice of all rows is not dense
        **{cache_argument(model): cache},
    )
    return out.logits[:, -1], positions[:, -1:] + 1, mask, cache


def pick(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    """One token a row from logits (R, V): the argmax at temperature 0, else where the cumulative probability passes
    the row's `uniform` number (R,).

    The running sum has two levels: over blocks of the vocabulary, then inside the one block that is met. In float64
    both, for a sum in float32 loses the rare tokens; over the whole vocabulary that would be most of a step's end.
    """
    if temperature == 0:
        return logits.argmax(-1)
    vocab = logits.shape[-1]
    blocks = -(-vocab // BLOCK)
    weights = torch.softmax(logits.float() / temperature, dim=-1)
    weights = torch.nn.functional.pad(weights, (0, blocks * BLOCK - vocab)).view(-1, blocks, BLOCK)
    ends = weights.sum(-1).double().cumsum(-1)  # (R, blocks)
    target = uniform[:, None] * ends[:, -1:]
    block = _first_above(ends, target)  # (R, 1)
    inside = weights.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)  # (R, BLOCK)
    before = ends.gather(-1, block) - inside[:, -1:]
    return (block * BLOCK + _first_above(inside, target - before)).squeeze(-1).clamp(max=vocab - 1)  # NaN: any token


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Where rising sums (R, K) first exceed `target` (R, 1): never where nothing was added, even by rounding."""
    below = torch.nextafter(cumulative[:, -1:], torch.zeros_like(target))  # something exceeds it
    found = torch.searchsorted(cumulative, target.clamp(min=0).minimum(below), right=True)
    return found.clamp(max=cumulative.shape[-1] - 1)


@dataclass
class MixedRollout:
    """A completion that two models wrote: its ids, the teacher's hidden states that predict them (tokens, D), and
    which of the tokens are the teacher's."""

    completion: list[int]
    teacher_hidden: torch.Tensor
    by_teacher: list[bool]


@torch.no_grad()
def generate_mixed(
    student: Callable[[], AbstractContextManager[nn.Module]],
    teacher: Callable[[], AbstractContextManager[nn.Module]],
    teacher_logits: Callable[[torch.Tensor], torch.Tensor],
    prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[int]],
    *,
    takeover: float,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    rows_at_once: int = 64,
) -> list[MixedRollout]:
    """Student and teacher in lockstep: token t is the teacher's where they are more than `takeover` nats apart.

    At each position both predict the next token; where JSD(student_t, teacher_t) (natural logarithm, both halves
    weighing the same, at temperature 1) is over `takeover`, the token is drawn from the teacher, else from the student
    (Speculative Self-Distillation, OpenReview 6DlaA6eBt7). Both then read it. The teacher's hidden states fall out of
    the decode, so no teacher pass over the completion is needed afterwards.

    Args:
        student, teacher: give the weights that run as one of them; the same module may serve both in turn.
        teacher_logits: the teacher's head with what follows it: hidden states (R, D) -> logits (R, V).
        prompts, teacher_prompts: token ids, unpadded, one pair a row.
        takeover: in nats; at 0 the teacher writes wherever it differs at all, above log 2 = 0.693 nowhere.
    """
    generator = generator or window_generator(0)
    uniforms = torch.rand(len(prompts), max_new_tokens, generator=generator, dtype=torch.float64)
    made: list[MixedRollout] = []
    for first in range(0, len(prompts), rows_at_once):
        part = slice(first, first + rows_at_once)
        readers = (
            _Reader(student, prompts[part], pad_id),
            _Reader(teacher, teacher_prompts[part], pad_id, head=teacher_logits),
        )
        made += _decode_mixed(*readers, takeover, max_new_tokens, set(stop_ids), temperature, uniforms[part])
    return made


class _Reader:
    """One of the two models, its cache, and what it has predicted last."""

    def __init__(
        self,
        weights: Callable[[], AbstractContextManager[nn.Module]],
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.weights, self.head, self.cache = weights, head, None
        longest = max(map(len, prompts))
        with weights() as model:
            self.device = next(model.parameters()).device
        ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.hidden: torch.Tensor | None = None
        self.logits = self._forward(ids)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) after the last of `ids` (R, L); with a head of its own also the hidden states (R, D)."""
        with self.weights() as model, eval_mode(model.modules()):
            if self.cache is None:
                self.cache = new_cache(model)
            common = {"attention_mask": self.mask, "position_ids": self.positions, cache_argument(model): self.cache}
            if self.head is None:
                return model(input_ids=ids, use_cache=True, logits_to_keep=1, **common).logits[:, -1]
            last = torch.arange(1, len(ids) + 1, device=self.device) * ids.shape[1] - 1
            self.hidden = model(input_ids=ids, use_cache=True, hidden_index=last, **common)
            return self.head(self.hidden)

    def read(self, token: torch.Tensor) -> None:
        """Go on by one token a row (R,)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        self.logits = self._forward(token[:, None])


def _decode_mixed(
    student: _Reader,
    teacher: _Reader,
    takeover: float,
    max_new_tokens: int,
    stops: set[int],
    temperature: float,
    uniforms: torch.Tensor,  # (R, max_new_tokens)
) -> list[MixedRollout]:
    uniforms = uniforms.to(student.device)
    tokens: list[torch.Tensor] = []  # a tensor a position each, of all rows, read at the end
    taken: list[torch.Tensor] = []
    hidden: list[torch.Tensor] = []
    end = torch.tensor(sorted(stops), device=student.device, dtype=torch.long)
    finished = torch.zeros(len(uniforms), dtype=torch.bool, device=student.device)
    every = READ_EVERY.get(student.device.type, 1)
    for t in range(max_new_tokens):
        by_teacher = half_jsd(student.logits, teacher.logits) > takeover  # (R,)
        own, better = (pick(reader.logits, temperature, uniforms[:, t]) for reader in (student, teacher))
        token = torch.where(by_teacher, better, own)
        assert teacher.hidden is not None
        for kept, new in ((tokens, token), (taken, by_teacher), (hidden, teacher.hidden)):
            kept.append(new)
        finished |= torch.isin(token, end)
        if t == max_new_tokens - 1 or (t % every == every - 1 and bool(finished.all())):
            break
        for reader in (student, teacher):
            reader.read(token)
    hidden_RTD, taken_RT = torch.stack(hidden, dim=1), torch.stack(taken, dim=1).tolist()
    completions = [_up_to_stop(row, stops) for row in torch.stack(tokens, dim=1).tolist()]
    return [
        MixedRollout(ids, states[: len(ids)], mine[: len(ids)])
        for ids, states, mine in zip(completions, hidden_RTD, taken_RT)
    ]


def half_jsd(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence in nats of the distributions of two (R, V) logits: (R,), 0 to log 2."""
    p, q = (x.float().log_softmax(-1) for x in (logits, others))
    middle = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1))
