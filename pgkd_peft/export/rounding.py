"""How much of what the adapter adds is still there after a cast or after re-quantization.

For a weight W, the adapter's change D and a rounding operation c (a cast, or quantize and dequantize), what arrives is
E = c(W + D) - c(W). Over all adapted tensors together:

    surviving share = <E, D> / <D, D>      1: all of it; 0: none, the rounding swallowed it
    rounding noise  = |E - D| / |D|        what arrives besides, relative to D; 0: nothing

Both are needed. Where W lies on the rounding's own grid (a dequantized base that is quantized again, as a merge into
4-bit weights does) the share tells: the grid's steps are wider than D, so E is 0 nearly everywhere and the adapter is
gone. Where W does not (original weights), rounding is unbiased: the share stays near 1, and the noise, many times D, is
the quantization error drawn anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields

import torch

Rounding = Callable[[torch.Tensor], torch.Tensor]
_CHUNK = 1 << 22  # elements; keeps the float32 temporaries at 16 MiB each


@dataclass
class Surviving:
    """Running sums over tensors; JSON-able through :meth:`as_dict`."""

    dd: float = 0.0  # <D, D>
    ed: float = 0.0  # <E, D>
    nn: float = 0.0  # |E - D|^2
    changed: int = 0  # elements that differ after rounding
    elements: int = 0

    def add(self, base: torch.Tensor, merged: torch.Tensor, rounding: Rounding) -> None:
        """Count one tensor. `rounding` maps a tensor to its rounded values, of any shape that matches."""
        rounded_base, rounded_merged = rounding(base), rounding(merged)
        parts = (t.reshape(-1).split(_CHUNK) for t in (base, merged, rounded_base, rounded_merged))
        for w, m, cw, cm in zip(*parts, strict=True):
            d, e = m.float() - w.float(), cm.float() - cw.float()
            self.dd += d.dot(d).item()
            self.ed += e.dot(d).item()
            self.nn += (e - d).square_().sum().item()
            self.changed += int((e != 0).sum())
            self.elements += e.numel()

    @property
    def share(self) -> float:
        """NaN where the adapter adds nothing."""
        return self.ed / self.dd if self.dd else math.nan

    @property
    def noise(self) -> float:
        return math.sqrt(self.nn / self.dd) if self.dd else math.nan

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def total(cls, parts: Iterable[Mapping[str, float]]) -> Surviving:
        """The sum of what :meth:`as_dict` gave for several lots of tensors."""
        parts = list(parts)
        return cls(**{f.name: sum(part[f.name] for part in parts) for f in fields(cls)})  # type: ignore[arg-type]


def row_sample(tensor: torch.Tensor) -> torch.Tensor:
    """The first rows of a matrix, about a quarter of a million numbers: enough to measure a share on."""
    return tensor[: max(1, 2**18 // tensor.shape[1])].contiguous()
