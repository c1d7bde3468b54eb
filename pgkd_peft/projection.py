"""Hidden states x head -> logits of both sides, a chunk of positions at a time; and logit gradients back to rows.

Logits have fp32 accuracy also where hidden states and head are 16-bit: rounded to bfloat16, a logit of 30 is off by up
to 0.06, and where student and teacher are close (0.06 nats apart) the gradient is then off by a tenth in the median.

Shapes: R rows of a chunk, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ConfigError

MASKED = -1e4  # stands for a logit of -inf: probability 0, and products with it stay finite
CAST_BLOCK_BYTES = 2**22  # of the head's weight that are cast to another dtype at a time
COLUMN = 16  # values of which :func:`largest` looks at the maximum first
EXACT_TOKENS = 128  # logits a position that :class:`RefinedPair` computes in fp32


def head_of(side: str, hidden: Tensor, head: Tensor | nn.Module, bias: Tensor | None) -> TensorHead | ModuleHead:
    """The head as this module handles it; `side` is the prefix of the argument's name.

    Raises:
        ConfigError: its shape does not fit the hidden states, it is neither a tensor nor a module, or a module is given
            a second bias.
    """
    if type(head) is nn.Linear and bias is None:
        head, bias = head.weight, head.bias
    if not isinstance(head, (Tensor, nn.Module)):
        raise ConfigError(f"{side}head_weight is a {type(head).__name__}; pass a tensor (V, D) or a frozen module")
    if not isinstance(head, Tensor):
        if bias is not None:
            raise ConfigError(f"{side}head_bias cannot be combined with a module as {side}head_weight; it has its own")
        return ModuleHead(head, hidden)
    if head.dim() != 2 or head.shape[1] != hidden.shape[1]:
        raise ConfigError(
            f"{side}head_weight has shape {tuple(head.shape)}, and the hidden states it is applied to are "
            f"{hidden.shape[1]} wide; it must be (V, {hidden.shape[1]}). Pass a quantized head as its module."
        )
    if bias is not None and bias.shape != head.shape[:1]:
        raise ConfigError(f"{side}head_bias has shape {tuple(bias.shape)}; it must be ({head.shape[0]},)")
    return TensorHead(head, bias, hidden)


class TensorHead:
    """A dense head; gradients of logits are rounded to `grad_dtype` for the product back."""

    def __init__(self, weight: Tensor, bias: Tensor | None, hidden: Tensor):
        self.weight, self.bias = weight, bias
        self.vocab = weight.shape[0]
        self.trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        self.grad_dtype = torch.promote_types(hidden.dtype, weight.dtype)
        slow = self.grad_dtype == torch.float16 or (self.grad_dtype == torch.bfloat16 and not _bf16_products())
        if slow and not has_wide_products(hidden.device):
            self.grad_dtype = torch.float32  # such a product on CPU takes up to a hundred times as long

    def same_as(self, other: TensorHead | ModuleHead) -> bool:
        return (
            isinstance(other, TensorHead)
            and self.weight is other.weight
            and self.bias is other.bias
            and self.grad_dtype == other.grad_dtype
        )

    def project(self, hidden: Tensor, out: Tensor, want_grad: bool) -> Callable[[Tensor], Tensor]:
        """Writes the logits (R, V) of hidden (R, D) into out; returns what takes their gradient back to (R, D)."""
        # A 16-bit product on CUDA accumulates and returns fp32; on CPU it would round the logits to 16 bits.
        dtype = self.grad_dtype if has_wide_products(out.device) and out.dtype == torch.float32 else out.dtype
        hidden = hidden.to(dtype)
        for columns, weight in self._blocks(dtype):
            if dtype == out.dtype:
                torch.mm(hidden, weight.t(), out=out[:, columns])
            else:
                torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out[:, columns])
        if self.bias is not None:
            out.add_(self.bias.detach().to(out.dtype).clamp(min=MASKED))
        return self.pull_back

    def pull_back(self, grad: Tensor) -> Tensor:
        """Gradient of the logits (R, V), in `grad_dtype`, -> of the hidden rows (R, D)."""
        wide = {"out_dtype": torch.float32} if has_wide_products(grad.device) and grad.dtype.itemsize == 2 else {}
        parts = (torch.mm(grad[:, columns], weight, **wide) for columns, weight in self._blocks(grad.dtype))
        total = next(parts)
        for part in parts:
            total += part
        return total

    def _blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The weight in `dtype`: as it is, or cast a few rows at a time, so that no second copy of the head exists."""
        weight = self.weight.detach()
        rows = self.vocab
        if weight.dtype != dtype:
            rows = max(1, CAST_BLOCK_BYTES // (weight.shape[1] * dtype.itemsize))
        for start in range(0, self.vocab, rows):
            columns = slice(start, min(start + rows, self.vocab))
            yield columns, weight[columns].to(dtype)


class ModuleHead:
    """A frozen head that is only known by its forward: a quantized layer."""

    def __init__(self, module: nn.Module, hidden: Tensor):
        self.module = module
        self.trains = any(p.requires_grad for p in module.parameters())
        self.grad_dtype = hidden.dtype
        self.vocab: int = getattr(module, "out_features", 0)
        if not self.vocab:  # a module that does not say how wide it is
            with torch.no_grad():
                self.vocab = module(hidden.new_zeros(1, hidden.shape[1])).shape[-1]

    def project(self, hidden: Tensor, out: Tensor, want_grad: bool) -> Callable[[Tensor], Tensor]:
        with torch.set_grad_enabled(want_grad):
            hidden = hidden.detach().requires_grad_(want_grad)
            logits = self.module(hidden)
        out.copy_(logits.detach()).clamp_(min=MASKED)
        return lambda grad: torch.autograd.grad(logits, hidden, grad.to(logits.dtype))[0]


def has_wide_products(device: torch.device) -> bool:
    """Whether 16-bit matrices have a product in float32: on CUDA, whose tensor cores accumulate in it."""
    return device.type == "cuda"


def _bf16_products() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Pair:
    """Logits of student and teacher for one chunk at a time, in buffers that the chunks share."""

    def __init__(self, student: TensorHead | ModuleHead, teacher: TensorHead | ModuleHead, dtype: torch.dtype):
        self.student, self.teacher, self.dtype = student, teacher, dtype
        self.grad_dtype = student.grad_dtype
        self.bytes_a_logit = 2 * dtype.itemsize + self.grad_dtype.itemsize
        if isinstance(student, ModuleHead):
            self.bytes_a_logit += 2 * self.grad_dtype.itemsize

    def reserve(self, rows: int, device: torch.device) -> None:
        self._logits = torch.empty((2 * rows, self.student.vocab), dtype=self.dtype, device=device)
        self._grad: Tensor | None = None

    def project(self, student_hidden: Tensor, teacher_hidden: Tensor, want_grad: bool) -> None:
        rows = student_hidden.shape[0]
        both = self._logits[: 2 * rows]
        self._zs, self._zt = both[:rows], both[rows:]
        if isinstance(self.student, TensorHead) and self.student.same_as(self.teacher):
            # one product for both: the head is read, and cast where it must be, once
            self._pull_back = self.student.project(torch.cat([student_hidden, teacher_hidden]), both, want_grad)
        else:
            self._pull_back = self.student.project(student_hidden, self._zs, want_grad)
            self.teacher.project(teacher_hidden, self._zt, False)

    def block(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Raw logits of some rows, free to be overwritten."""
        return self._zs[rows], self._zt[rows]

    def grad_buffer(self) -> Tensor:
        """Where the gradient of the student's logits goes block by block: over them, if they have its dtype."""
        if self.grad_dtype == self.dtype:
            return self._zs
        if self._grad is None:
            self._grad = torch.empty_like(self._logits[: len(self._logits) // 2], dtype=self.grad_dtype)
        return self._grad[: len(self._zs)]

    def pull_back(self, grad: Tensor) -> Tensor:
        """Gradient of the student's logits (R, V) -> of its rows (R, D)."""
        return self._pull_back(grad)


class RefinedPair(Pair):
    """For one bf16 head on CPU, where a product with fp32 logits would take twice the time of one that rounds them.

    The teacher's logits are rounded, and the student's are those plus a product of the difference of the hidden
    states, which is as accurate as the difference is small: the rounding is common to both sides and cancels in their
    ratio. The `EXACT_TOKENS` likeliest tokens of either side, which carry nearly all of the divergence, are then
    computed anew in fp32. Measured on SmolLM2-135M with and without a hint: gradient off by 0.23 % in the median, as
    with fp32 logits (rounding the logit gradients to bf16), divergence by 2e-5; with rounded logits 10 % and 9 %.
    """

    head: TensorHead

    def __init__(self, head: TensorHead, dtype: torch.dtype):
        super().__init__(head, head, dtype)
        self.head = head
        self.bytes_a_logit = 2 * head.grad_dtype.itemsize

    def reserve(self, rows: int, device: torch.device) -> None:
        shape = (rows, self.head.vocab)
        self._teacher_logits, self._difference = (torch.empty(shape, dtype=self.head.grad_dtype) for _ in range(2))

    def project(self, student_hidden: Tensor, teacher_hidden: Tensor, want_grad: bool) -> None:
        rows = student_hidden.shape[0]
        self._hidden = torch.stack([student_hidden, teacher_hidden], dim=1).float()  # (R, 2, D)
        change = self._hidden[:, 0] - self._hidden[:, 1]
        weight = self.head.weight.detach().t()
        torch.mm(teacher_hidden, weight, out=self._teacher_logits[:rows])
        torch.mm(change.to(self.head.grad_dtype), weight, out=self._difference[:rows])
        self._pull_back = self.head.pull_back

    def block(self, rows: slice) -> tuple[Tensor, Tensor]:
        zt = self._teacher_logits[rows].float()
        zs = self._difference[rows].float().add_(zt)
        count = min(EXACT_TOKENS, self.head.vocab)
        likeliest = largest(torch.maximum(zs, zt), count)  # (R, count)
        hidden = self._hidden[rows]
        step = max(1, CAST_BLOCK_BYTES // (4 * count * hidden.shape[2]))
        for start in range(0, hidden.shape[0], step):
            some = slice(start, start + step)
            # rows by F.embedding, an eighth of the time of an index
            weight = F.embedding(likeliest[some], self.head.weight.detach()).float()  # (R, count, D)
            exact = hidden[some] @ weight.transpose(
                1, 2
            )  # (R, 2, count); the other way round takes eight times as long
            zs[some].scatter_(-1, likeliest[some], exact[:, 0])
            zt[some].scatter_(-1, likeliest[some], exact[:, 1])
        return zs, zt

    def grad_buffer(self) -> Tensor:
        return self._difference[: len(self._hidden)]  # each row's difference is used before its gradient is written


def largest(values: Tensor, count: int) -> Tensor:
    """Where the `count` largest of each row (R, V) are: (R, count), in no order.

    On a CPU in two steps, which take half the time of one: the `count` columns of `COLUMN` values each that have the
    largest maxima, for no other column can hold one of them; then the largest inside these.
    """
    vocab = values.shape[1]
    columns = -(-vocab // COLUMN)
    if values.device.type != "cpu" or columns < count:
        return values.argmax(-1, keepdim=True) if count == 1 else values.topk(count, sorted=False).indices
    if vocab % COLUMN:
        values = F.pad(values, (0, columns * COLUMN - vocab), value=-torch.inf)
    table = values.view(-1, COLUMN, columns)  # value i stands in column i % columns
    best = table.amax(1).topk(count, sorted=False).indices  # (R, count)
    inside = table.gather(2, best[:, None].expand(-1, COLUMN, -1)).flatten(1)  # (R, COLUMN * count)
    found = inside.topk(count, sorted=False).indices
    # a row of nothing but -inf may find its padding
    return (best.gather(1, found % count) + found // count * columns).clamp(max=vocab - 1)


def pair_of(student: TensorHead | ModuleHead, teacher: TensorHead | ModuleHead, dtype: torch.dtype) -> Pair:
    """Buffers for both sides' logits, of the kind that suits the heads."""
    if (
        isinstance(student, TensorHead)
        and student.same_as(teacher)
        and student.bias is None
        and student.weight.dtype == student.grad_dtype == torch.bfloat16
        and student.weight.device.type == "cpu"
        and dtype == torch.float32
    ):
        return RefinedPair(student, dtype)
    return Pair(student, teacher, dtype)
