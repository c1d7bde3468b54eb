"""A decode loop's forward, one new token a row: into a cache that grows, or as a CUDA graph into one that does not.

A cache that grows is copied whole with every token, and the host launches some ten kernels a layer, which a GPU has
done sooner than they are launched. Of fixed size (Transformers' ``StaticLayer``) nothing is copied, every tensor keeps
its place, and one recorded graph is launched instead.

Shapes: R rows, L positions read before the loop, S positions that there is room for, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from ..model.caches import cache_argument, is_plain, select_rows
from ..model.load import base_of
from ..run.memory import is_out_of_memory

logger = logging.getLogger(__name__)

FIXED_ON = {"cuda"}  # kinds of device whose decode loops take a cache of fixed size
RECORDED_ON = {"cuda"}
LEAST_TOKENS = 16  # new tokens from which recording pays: it takes as long as some three of them
STRIDE = 256  # tokens after which a full cache is copied to a larger one
ALIGNED = 8  # positions; a mask of another width is copied by SDPA's kernels each time
WARM_UP = 2  # forwards before the recording, in which libraries choose their kernels and their memory


class Growing:
    """Every model and every kind of cache."""

    worth_leaving = 0.75  # share of the rows down to which they shrink before the others are copied to a smaller batch

    def __init__(self, model: nn.Module, cache: Cache, mask_RL: Tensor, new: int):
        self.model, self.cache, self.length = model, cache, mask_RL.shape[1]
        self.mask_RS = torch.cat([mask_RL, mask_RL.new_ones(len(mask_RL), new)], dim=1)

    def read(self, token_R: Tensor, position_R1: Tensor) -> Tensor:
        """Logits (R, V) after one more token a row."""
        self.length += 1
        return _forward(self.model, self.cache, token_R[:, None], self.mask_RS[:, : self.length], position_R1)

    def keep(self, index: Tensor) -> None:
        """Go on with the rows of these numbers alone."""
        select_rows(self.cache, index)
        self.mask_RS = self.mask_RS[index]


class Fixed:
    """Layers with room for the next `STRIDE` tokens: attention reads the empty room too, so it is not that of the
    longest answer there may be. On a GPU the forward is recorded, anew for every stride and for fewer rows."""

    worth_leaving = 0.5

    def __init__(self, model: nn.Module, cache: Cache, mask_RL: Tensor, new: int):
        self.model, self.cache, self.mask_RS, self.length = model, cache, mask_RL, mask_RL.shape[1]
        self.most = self.length + new
        self.token_R1: Tensor | None = None  # where a token is read from, once its place is fixed
        self._graph: Callable[[], Tensor] | None = None

    def read(self, token_R: Tensor, position_R1: Tensor) -> Tensor:
        """Logits (R, V) after one more token a row; they stand until the next call."""
        if self.length == self.mask_RS.shape[1]:
            self._enlarge()
        if self.token_R1 is None:
            self.token_R1, self.position_R1 = token_R[:, None].clone(), position_R1.clone()
            self._graph = self._recorded()
        self.token_R1.copy_(token_R[:, None])
        self.position_R1.copy_(position_R1)
        self.length += 1
        return self._step() if self._graph is None else self._graph()

    def keep(self, index: Tensor) -> None:
        """Go on with the rows of these numbers alone."""
        self.token_R1 = self._graph = None  # with the graph goes the memory that it holds
        for layer in self.cache.layers:  # their own reorder_cache reads the length from the device
            layer.keys, layer.values = (held.index_select(0, index) for held in (layer.keys, layer.values))
        self.mask_RS = self.mask_RS[index]

    def _enlarge(self) -> None:
        self.token_R1 = self._graph = None
        room = min(STRIDE, self.most - self.length)
        room += -(self.length + room) % ALIGNED
        self.cache = of_fixed_size(self.cache, self.length, self.length + room)
        # what is not read yet is hidden by its position
        self.mask_RS = torch.cat([self.mask_RS, self.mask_RS.new_ones(len(self.mask_RS), room)], dim=1)

    def _step(self) -> Tensor:
        assert self.token_R1 is not None
        return _forward(self.model, self.cache, self.token_R1, self.mask_RS, self.position_R1)

    def _rehearse(self) -> None:
        """A step that leaves no trace: what it writes stands behind the present length, and is written over."""
        self._step()
        self._rewind()

    def _rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)

    def _recorded(self) -> Callable[[], Tensor] | None:
        """The step as a graph, or None where it runs kernel by kernel."""
        if self.mask_RS.device.type not in RECORDED_ON or self.mask_RS.shape[1] - self.length < LEAST_TOKENS:
            return None
        try:
            return recorded(self._step, self._rehearse)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._rewind()
            logger.warning(
                "The decode step of %s cannot be recorded as a CUDA graph (%s); it runs kernel by kernel, which is "
                "slower.",
                type(base_of(self.model)).__name__,
                str(error).partition("\n")[0],
            )
            return None


Reader: TypeAlias = Growing | Fixed


def reader_of(model: nn.Module, cache: Cache, mask_RL: Tensor, new: int) -> Reader:
    """What reads up to `new` tokens a row after the positions that `cache` holds.

    Fixed where it is known to work: on a GPU, a cache whose layers keep every position, SDPA, and a model that
    Transformers itself compiles with such a cache.

    Args:
        mask_RL: 1 where a position of `cache` was read, 0 where it is padding.
    """
    base: Any = base_of(model)
    fits = (
        mask_RL.device.type in FIXED_ON
        and new >= LEAST_TOKENS
        and all(map(is_plain, cache.layers))
        and "sdpa" in str(base.config._attn_implementation)
        and getattr(base, "_can_compile_fullgraph", False)
        and cache_argument(model) == "past_key_values"
    )
    return (Fixed if fits else Growing)(model, cache, mask_RL, new)


def of_fixed_size(cache: Cache, length: int, size: int) -> Cache:
    """The layers of a cache, of which `length` positions are read, with room for `size`; the given ones are let go one
    by one.

    Transformers' masks hide what lies behind a layer's length, which stands on the device.
    """
    for index, old in enumerate(cache.layers):
        new = StaticLayer(size)
        new.cumulative_length = torch.full((), length, device=old.keys.device)
        new.lazy_initialization(old.keys[:, :, :0], old.values[:, :, :0])
        for whole, read in ((new.keys, old.keys), (new.values, old.values)):
            whole[:, :, :length] = read[:, :, :length]
        cache.layers[index] = new
    return Cache(layers=cache.layers)


def recorded(step: Callable[[], Tensor], rehearse: Callable[[], None]) -> Callable[[], Tensor]:
    """`step` as a CUDA graph: a call launches its kernels anew on the same tensors and gives the same result tensor.
    It is not run while it is recorded; `rehearse` is, before.

    Raises:
        RuntimeError: something in it cannot be recorded (it reads the device, or copies from the host's memory).
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            rehearse()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loaders may pin memory meanwhile
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _forward(model: nn.Module, cache: Cache, ids_R1: Tensor, mask: Tensor, position_R1: Tensor) -> Tensor:
    out = model(
        input_ids=ids_R1,
        attention_mask=mask,
        position_ids=position_R1,
        use_cache=True,
        logits_to_keep=1,
        **{cache_argument(model): cache},
    )
    logits: Tensor = out.logits[:, -1]
    return logits
