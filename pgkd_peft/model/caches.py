"""What a model has read, as its own cache class holds it: copied, joined to a batch, kept in host memory.

Shapes: R rows, H heads of keys and values, L positions read (on the left of them padding, where rows differ), T new
positions, D width of a head.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from .adapters import eval_mode
from .cpu import SHARED_BEGINNING
from .load import base_of

# Layers that can be cut, joined and put back together from their tensors.
KNOWN = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    DummyLayer,
)
# Models that do not go on from a state when they are given more than one token.
NOT_CONTINUED = ("mamba", "mamba2", "falcon_mamba", "jamba")
# Models that keep states in their modules, where rows cannot leave.
OWN_STATES = ("recurrent_gemma",)
PIECE = 4096  # tokens of a beginning that are read at once
PROBE = (24, 8)  # tokens that the probe of `why_not_shared` reads before and after the cut

Layers = list[Any]  # one a layer of the model, of the cache's own classes
_reasons: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


def cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its cache."""
    accepted = inspect.signature(type(base_of(model)).forward).parameters
    return "cache_params" if "cache_params" in accepted else "past_key_values"


def new_cache(model: nn.Module) -> Cache | None:
    """An empty cache of the kinds that the model's layers need; None where the model keeps what it reads in itself,
    or in another kind of cache."""
    base = base_of(model)
    accepted = inspect.signature(type(base).forward).parameters
    if cache_argument(model) not in accepted or base.config.model_type in OWN_STATES:
        return None
    try:
        return DynamicCache(config=base_of(model).config.get_text_config())
    except (KeyError, AttributeError):  # a kind of layer that Transformers' caches do not know
        return None


def has_states(model: nn.Module) -> bool:
    """Whether padding must not be read: some layer carries a recurrent or convolution state along, or an unknown
    one."""
    cache = new_cache(model)
    return cache is None or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


def is_plain(layer: Any) -> bool:
    """Whether a layer holds the keys and values of every position, so that it can be cut and put together again."""
    return type(layer) is DynamicLayer


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Keep the rows with these numbers (R,), states included; a number may come more than once."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin) and layer.device is None:
            layer.device = rows.device  # not set where there is no convolution
        layer.reorder_cache(rows)


@dataclass(frozen=True)
class Get:
    """A tensor's place in a layer: keys or values, or one of its states."""

    name: str
    state: int | None = None

    def __call__(self, layer: Any) -> Tensor:
        held = getattr(layer, self.name)
        return held if self.state is None else held[self.state]


def mapped(layer: Any, change: Callable[[Get, Tensor], Tensor]) -> Any:
    """A copy of a layer whose tensors are `change(place, tensor)`; the layer itself stays."""
    new = copy.copy(layer)
    for name, value in vars(layer).items():
        if name in ("keys", "values") and value is not None:
            setattr(new, name, change(Get(name), value))
        elif isinstance(value, dict):
            states = {k: change(Get(name, k), v) if isinstance(v, Tensor) else v for k, v in value.items()}
            setattr(new, name, states)
    return new


def copied(layers: Layers) -> Layers:
    """Layers that can be read on from while the given ones stay; states are changed in place, the rest is not."""
    return [mapped(layer, lambda get, t: t.clone() if get.state is not None else t) for layer in layers]


def cut(layers: Layers, start: int, device: torch.device | str) -> Layers:
    """What is worth keeping of one row that has been read: of plain layers the positions from `start` on alone."""

    def part(layer: Any) -> Any:
        if is_plain(layer):
            return mapped(layer, lambda get, t: _own(t[..., start:, :], device))
        return mapped(layer, lambda get, t: _own(t, device))

    return [part(layer) for layer in layers]


def _own(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device` in memory of its own; a view would keep all of what it was cut from."""
    moved = tensor.to(device)
    return moved.clone() if moved.device == tensor.device else moved


def put_together(parts: Sequence[Layers], device: torch.device) -> Layers:
    """The layers of which `parts` were :func:`cut`, one after the other."""

    def whole(index: int) -> Any:
        last = parts[-1][index]
        if not is_plain(last) or len(parts) == 1:
            return mapped(last, lambda get, t: t.to(device))
        return mapped(last, lambda get, t: torch.cat([get(part[index]).to(device) for part in parts], dim=-2))

    return [whole(index) for index in range(len(parts[-1]))]


def bytes_of(layers: Layers) -> int:
    """Memory of the tensors."""
    total = 0

    def count(get: Get, tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    for layer in layers:
        mapped(layer, count)
    return total


class ReadOnlyLayer(DynamicLayer):
    """Keys and values of prefixes, given to rows without a copy for all layers at once.

    A forward gets them with the new ones behind, and nothing is stored: beside the prefixes themselves memory holds
    one layer's copy at a time.

    Args:
        parts: (keys, values) (1, H, L_i, D) of each prefix.
        rows: the prefix of each row.
        length: L, positions before the new ones; shorter prefixes are padded on the left.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]], rows: Sequence[int], length: int):
        super().__init__()
        self.parts, self.rows, self.length = parts, rows, length
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (self._before(which, new) for which, new in enumerate((key_states, value_states)))
        if len(self.parts) == 1:
            setattr(keys, SHARED_BEGINNING, self.parts[0])
        return keys, values

    def _before(self, which: int, new: Tensor) -> Tensor:
        if len(self.parts) == 1:
            old = self.parts[0][which].expand(new.shape[0], -1, -1, -1)
        else:
            old = torch.cat([_padded(self.parts[i][which], self.length) for i in self.rows])
        return torch.cat([old, new], dim=-2)


def _padded(tensor: Tensor, length: int) -> Tensor:
    """(R, H, L_i, D) -> (R, H, length, D), zeros on the left."""
    return nn.functional.pad(tensor, (0, 0, length - tensor.shape[-2], 0))


def joined(parts: Sequence[Layers], length: int) -> Cache:
    """One cache of several, the rows of one after those of the other, padded on the left to `length` positions."""
    layers = []
    for index in range(len(parts[0])):
        column = [part[index] for part in parts]
        first = column[0]
        span = length
        if isinstance(first, DynamicSlidingWindowLayer):  # holds the last window alone
            span = min(length, first.sliding_window - 1)

        def join(get: Get, tensor: Tensor, column: Sequence[Any] = column, span: int = span) -> Tensor:
            rows = [get(layer) for layer in column]
            return torch.cat(rows if get.state is not None else [_padded(t, span) for t in rows])

        new = mapped(first, join)
        if isinstance(new, DynamicSlidingWindowLayer):
            new.cumulative_length = length
        layers.append(new)
    return Cache(layers=layers)


def for_rows(parts: Sequence[Layers], lengths: Sequence[int], rows: Sequence[int], device: torch.device) -> Cache:
    """A cache for one forward of rows that go on from prefixes: row r from the one-row layers ``parts[rows[r]]``."""
    length = max(lengths)
    cache = joined([[_nothing(layer) if is_plain(layer) else layer for layer in part] for part in parts], length)
    select_rows(cache, torch.tensor(rows, device=device))
    for index, layer in enumerate(parts[0]):
        if is_plain(layer) and layer.keys is not None:
            pairs = [(part[index].keys, part[index].values) for part in parts]
            cache.layers[index] = ReadOnlyLayer(pairs, rows, length)
    return cache


def _nothing(layer: Any) -> Any:
    empty = copy.copy(layer)
    empty.keys = empty.values = None
    empty.is_initialized = False
    return empty


def bytes_of_one(model: nn.Module) -> tuple[int, int]:
    """Bytes that one row's :func:`cut` takes whatever its length (windows, counted as full, and states), and bytes a
    token; seen from two tokens."""
    layers = read_on(model, None, [0, 0], 0)
    fixed = 0
    for layer in layers:
        if not is_plain(layer):
            fixed += bytes_of([layer]) * (max(1, layer.sliding_window // 2) if getattr(layer, "is_sliding", 0) else 1)
    return fixed, bytes_of([layer for layer in layers if is_plain(layer)]) // 2


def read_on(model: nn.Module, layers: Layers | None, ids: Sequence[int], start: int) -> Layers:
    """The layers after one row of tokens `ids` that stands at position `start`; `layers` is what was read before,
    None at the start. A row is always read alone and in the same pieces, so that it gives the same bits each time."""
    device = next(model.parameters()).device
    cache = new_cache(model)
    assert cache is not None
    if layers is not None:
        cache = Cache(layers=copied(layers))
    for at in range(0, len(ids), PIECE):
        piece = torch.tensor([list(ids[at : at + PIECE])], device=device)
        positions = torch.arange(start + at, start + at + piece.shape[1], device=device)[None]
        model(input_ids=piece, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return list(cache.layers)


@torch.no_grad()
def why_not_shared(model: nn.Module) -> str | None:
    """Why this model cannot go on from a prefix that it has read, in words; None if it can.

    What its class and settings say, and once a model a probe: some tokens read at once, and in two parts of which the
    first is copied for rows of two lengths.
    """
    base = base_of(model)
    if base not in _reasons:
        _reasons[base] = _class_forbids(base) or _probe_fails(model)
    return _reasons[base]


def _class_forbids(base: nn.Module) -> str | None:
    config: Any = base.config.get_text_config()  # type: ignore[operator, union-attr]
    cache = new_cache(base)
    if cache is None:
        return f"{config.model_type} has a cache of its own"
    if config.model_type in NOT_CONTINUED:
        return f"{config.model_type} does not go on from a state with several tokens"
    other = {type(layer).__name__ for layer in cache.layers if type(layer) not in KNOWN}
    if other:
        return f"{config.model_type} keeps what it has read in a {other.pop()}"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {str(d.get("rope_type", d.get("type"))) for d in (rope, *rope.values()) if isinstance(d, dict)}
    if kinds & {"longrope", "dynamic"}:
        return f"the rotary frequencies of {config.model_type} depend on the length of the whole row"
    return None


def _probe_fails(model: nn.Module) -> str | None:
    base = base_of(model)
    device = next(model.parameters()).device
    before, after = PROBE
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = [(7 * i + i * i) % vocabulary for i in range(before + after)]
    try:
        with eval_mode(model.modules()):
            expected = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, before:].float()
            read = read_on(model, None, ids[:before], 0)
            rows = 3 if all(map(is_plain, read)) else 2  # windows and states are never padded inside
            cache = for_rows([read], [before], [0] * rows, device)
            rest = torch.tensor([ids[before:], ids[before:], [ids[0], *ids[before:-1]]][:rows], device=device)
            mask = torch.ones(rows, before + after, dtype=torch.long, device=device)
            mask[1, -1] = 0  # a token shorter, padded on the right as for scoring
            mask[2:, before] = 0  # padded between the beginning and the rest, as for rollouts
            out = model(
                input_ids=rest,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1)[:, before:],
                past_key_values=cache,
                use_cache=True,
            ).logits.float()
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        return f"{base.config.model_type} cannot go on from what it has read ({str(error).splitlines()[0][:120]})"
    found = torch.cat([out[0], out[1, :-1], *out[2:, 1:]])
    wanted = torch.cat([expected] + [expected[:-1]] * (rows - 1))
    off = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    allowed = 1e-3 if next(base.parameters()).dtype == torch.float32 else 0.1
    if not off <= allowed:
        return f"{base.config.model_type} computes something else after a prefix than in one go (off by {off:.0%})"
    return None
