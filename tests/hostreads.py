"""What would make the host wait for a GPU, counted on a CPU."""

from __future__ import annotations

import collections
import sys
from types import FrameType

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# The result is a number, or has a size that depends on values.
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2}
INDEXED = {aten.index, aten.index_put, aten.index_put_}  # with a mask: nonzero inside
COPIES = {
    torch.Tensor.tolist,
    torch.Tensor.cpu,
    torch.Tensor.numpy,
}  # on a CPU they copy nothing, so no operator is seen


class HostReads(TorchDispatchMode):
    """Counts them while it is active, by the line of the package (or the library) that they come from.

    Not seen: copies *to* a GPU, which wait too unless they are pinned (tests/test_cuda.py sees them).
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: collections.Counter[str] = collections.Counter()
        self._copies = _Copies(self)

    @property
    def count(self) -> int:
        return sum(self.places.values())

    def __enter__(self):
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self._copies.__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = getattr(func, "overloadpacket", None)
        masks = args[1] if packet in INDEXED else ()
        if packet in READS or any(mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in masks):
            self.note(packet.__name__)
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        self.places[f"{what} at {_place(sys._getframe(2))}"] += 1


class _Copies(TorchFunctionMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in COPIES:
            self.reads.note(func.__name__)
        return func(*args, **(kwargs or {}))


def _place(frame: FrameType | None) -> str:
    """The innermost line of this package, else of whatever is not torch."""
    first = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "pgkd_peft" in name:
            return f"{name.split('pgkd_peft/')[-1]}:{frame.f_lineno}"
        if not first and "/torch/" not in name and "hostreads" not in name:
            first = f"{name.split('site-packages/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return first
