"""Hidden states + head -> divergence per token, its gradient, and statistics; never the full logits.

The head is frozen and usually shared by both sides, so the gradient with respect to the student's hidden rows can be
taken in the forward pass, chunk by chunk: two projections, one pass over the logits, one product back. Backward only
scales the stored rows. Logits, softmax and divergence are fp32 also where hidden states and head are 16-bit.

Shapes: N positions, R rows of a chunk, V vocabulary, D hidden width. Letters in formulas: S student, T teacher.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .errors import ConfigError

logger = logging.getLogger(__name__)

CLIP_MODES = ("entry", "token", "rescale")
MASKED = -1e4  # stands for a logit of -inf: probability 0, and products with it stay finite
HALF_SCALE = 1024.0  # fp16 gradients of logits are multiplied by it, or most of them would underflow
CAST_BLOCK_BYTES = 2**22  # of the head's weight that are cast to another dtype at a time
CACHE_BLOCK = 2**20  # logits that the elementwise part works on at a time on CPU: it makes seven passes over them

Head: TypeAlias = Tensor | nn.Module | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """What :func:`linear_jsd` returns. All are of shape (N,), in nats, fp32 (float64 for float64 inputs).

    Attributes:
        divergence: differentiable with respect to the student; after `normalize` and `clip`.
        student_entropy, teacher_entropy: of the two distributions that are compared (`temperature` included), over
            the whole vocabulary also with `top_k`.
        top1_agreement: 1 where one token is the most probable of both, else 0.
        sampled_logprob: log-probability of `sampled_ids` under the student, at the same temperature; None without ids.
    """

    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor
    sampled_logprob: Tensor | None


def linear_jsd(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head_weight: Head,
    *,
    head_bias: Tensor | None = None,
    teacher_head_weight: Head | None = None,
    teacher_head_bias: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    normalize: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float | None = None,
    clip: float | None = None,
    clip_mode: str = "rescale",
    top_k: int | None = None,
    sampled_ids: Tensor | None = None,
    chunk_mib: float = 64,
) -> Divergence:
    """Generalized Jensen-Shannon divergence of teacher and student per position (arXiv:2306.13649, equation 1).

    M = beta*T + (1-beta)*S;  JSD = beta*KL(T||M) + (1-beta)*KL(S||M);  beta=0 is KL(T||S), beta=1 is KL(S||T), as in
    TRL. In nats per token.

    Args:
        student_hidden: (N, D), what the student's head is applied to; gets the gradient.
        teacher_hidden: (N, D) or, with a head of the teacher's own, (N, D_teacher); gets no gradient.
        head_weight: (V, D), or a module (a callable) that maps (R, D) to logits (R, V): a quantized layer, a head with
            LoRA. A head with trainable parameters gets its gradient too, by a slower path that recomputes each chunk
            in backward; so does any callable that is not a module, since nothing tells whether it trains.
        head_bias: (V,); may hold -inf to mask a token on both sides. A module brings its own.
        teacher_head_weight, teacher_head_bias: the teacher's head, if it has one of its own. Where the student's head
            carries an adapter that the teacher must not see, pass the layer below it.
        beta: in [0, 1].
        temperature: divides both sides' logits.
        normalize: divide by beta*(1-beta) inside (0, 1), so that all beta agree with KL where T and S are close.
        softcap: c in logits = c*tanh(logits/c) (Gemma 2, arXiv:2408.00118, section 2).
        logit_scale: multiplies the logits before the soft-cap (Cohere's logit_scale, Granite's 1/logits_scaling).
        teacher_softcap, teacher_logit_scale: those of a teacher that is another model; None: the student's
            (`math.inf` is a teacher without soft-cap beside a student with one).
        clip: upper bound in nats; for `clip_mode`
            "entry": of each summand min(l[n, v], clip) of the vocabulary sum (as OPSD); the sum may become negative;
            "token": of the sum; a token above it gives no gradient;
            "rescale": of the sum, by a factor min(1, clip/l[n]) that counts as a constant: a token above it keeps its
            gradient's direction.
        top_k: compare the teacher's k most probable tokens and one bucket with all others; a lower bound of the
            divergence over the full vocabulary.
        sampled_ids: (N,) token ids in [0, V), for `sampled_logprob`.
        chunk_mib: MiB for the logits of one chunk of positions; peak extra memory stays below twice this plus
            8*N*D bytes, with a head given as a tensor. On a GPU use 1000 or more: each chunk reads the whole head.

    Raises:
        ConfigError: an option out of its range, or shapes that do not fit.
    """
    options = _Options(beta, normalize, clip, clip_mode, top_k)
    if teacher_head_weight is None:
        teacher_head_weight, teacher_head_bias = head_weight, head_bias
    student_squash = _Squash(softcap, logit_scale, temperature)
    teacher_squash = _Squash(
        softcap if teacher_softcap is None else teacher_softcap,
        logit_scale if teacher_logit_scale is None else teacher_logit_scale,
        temperature,
    )
    _check(options, student_squash, teacher_squash, chunk_mib)
    _check_rows(student_hidden, teacher_hidden, sampled_ids)
    student = _head("", student_hidden, head_weight, head_bias)
    teacher = _head("teacher_", teacher_hidden, teacher_head_weight, teacher_head_bias)
    if student.vocab != teacher.vocab:
        raise ConfigError(
            f"the student's head has {student.vocab} tokens and the teacher's {teacher.vocab}; both must have the same "
            "vocabulary. Cut the rows that pad the larger one."
        )
    dtype = torch.float64 if torch.float64 in (student_hidden.dtype, teacher_hidden.dtype) else torch.float32
    task = _Task(student, teacher, student_squash, teacher_squash, options, dtype, chunk_mib)
    if torch.is_grad_enabled() and student.trains:
        stats = _trainable_head(student_hidden, teacher_hidden.detach(), sampled_ids, task)
    else:
        want_grad = torch.is_grad_enabled() and student_hidden.requires_grad
        stats = _FrozenHead.apply(student_hidden, teacher_hidden.detach(), sampled_ids, task, want_grad)
    divergence, entropy_s, entropy_t, agree, logprob = stats
    return Divergence(divergence, entropy_s, entropy_t, agree, None if sampled_ids is None else logprob)


class _Options(NamedTuple):
    beta: float
    normalize: bool
    clip: float | None
    clip_mode: str
    top_k: int | None


class _Squash(NamedTuple):
    """What lies between the head's product and the softmax: softcap(z * scale) / temperature."""

    softcap: float | None
    scale: float
    temperature: float


class _Task(NamedTuple):
    """One call of :func:`linear_jsd`, checked."""

    student: _TensorHead | _ModuleHead
    teacher: _TensorHead | _ModuleHead
    student_squash: _Squash
    teacher_squash: _Squash
    options: _Options
    dtype: torch.dtype  # of logits, softmax and results
    chunk_mib: float

    def chunks(self, n: int, bytes_a_logit: int) -> list[slice]:
        """Slices of equal length (but the last), as long as their logits fit into chunk_mib."""
        most = max(1, int(self.chunk_mib * 2**20 / (self.student.vocab * bytes_a_logit)))
        rows = math.ceil(n / math.ceil(n / most)) if n else 1
        return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def _check(options: _Options, student: _Squash, teacher: _Squash, chunk_mib: float) -> None:
    def above_0(value: float | None) -> bool:
        return value is None or value > 0

    finite = math.inf
    for name, value, good, accepted in (
        ("beta", options.beta, 0 <= options.beta <= 1, "a number in [0, 1]; 0 is KL(T||S), 1 is KL(S||T)"),
        ("temperature", student.temperature, 0 < student.temperature < finite, "a number above 0"),
        ("logit_scale", student.scale, 0 < student.scale < finite, "a number above 0"),
        ("teacher_logit_scale", teacher.scale, 0 < teacher.scale < finite, "a number above 0, or None"),
        ("softcap", student.softcap, above_0(student.softcap), "a number above 0, or None for no soft-cap"),
        ("teacher_softcap", teacher.softcap, above_0(teacher.softcap), "a number above 0, or None for the student's"),
        ("clip", options.clip, above_0(options.clip), "nats above 0, or None for no clip"),
        ("clip_mode", options.clip_mode, options.clip_mode in CLIP_MODES, ", ".join(CLIP_MODES)),
        ("top_k", options.top_k, above_0(options.top_k), "at least 1, or None for the full vocabulary"),
        ("chunk_mib", chunk_mib, chunk_mib > 0, "MiB above 0"),
    ):
        if not good:
            raise ConfigError(f"{name} is {value!r}; accepted: {accepted}")


def _check_rows(student: Tensor, teacher: Tensor, sampled_ids: Tensor | None) -> None:
    for name, hidden in (("student_hidden", student), ("teacher_hidden", teacher)):
        if hidden.dim() != 2 or not hidden.is_floating_point():
            raise ConfigError(
                f"{name} is {hidden.dtype} of shape {tuple(hidden.shape)}; pass floating-point rows of shape (N, D): "
                "the hidden states of the masked-in positions only"
            )
    if student.shape[0] != teacher.shape[0]:
        raise ConfigError(
            f"student_hidden has {student.shape[0]} rows and teacher_hidden {teacher.shape[0]}; row n of both must be "
            "the same completion token"
        )
    if sampled_ids is not None and sampled_ids.shape != student.shape[:1]:
        raise ConfigError(f"sampled_ids has shape {tuple(sampled_ids.shape)}; pass one id a row, ({student.shape[0]},)")


def _head(side: str, hidden: Tensor, head: Head, bias: Tensor | None) -> _TensorHead | _ModuleHead:
    if isinstance(head, nn.Linear) and type(head) is nn.Linear and bias is None:
        head, bias = head.weight, head.bias
    if not isinstance(head, Tensor):
        if bias is not None:
            raise ConfigError(f"{side}head_bias cannot be combined with a module as {side}head_weight; it has its own")
        return _ModuleHead(head, hidden)
    if head.dim() != 2 or head.shape[1] != hidden.shape[1]:
        raise ConfigError(
            f"{side}head_weight has shape {tuple(head.shape)}, and the hidden states it is applied to are "
            f"{hidden.shape[1]} wide; it must be (V, {hidden.shape[1]}). Pass a quantized head as its module."
        )
    if bias is not None and bias.shape != head.shape[:1]:
        raise ConfigError(f"{side}head_bias has shape {tuple(bias.shape)}; it must be ({head.shape[0]},)")
    return _TensorHead(head, bias, hidden)


class _TensorHead:
    """A dense head: projections in fp32 accuracy, products back in the precision of the operands."""

    def __init__(self, weight: Tensor, bias: Tensor | None, hidden: Tensor):
        self.weight, self.bias = weight, bias
        self.vocab = weight.shape[0]
        self.trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        self.grad_dtype = torch.promote_types(hidden.dtype, weight.dtype)
        if not hidden.is_cuda and self.grad_dtype == torch.float16:
            self.grad_dtype = torch.float32  # an fp16 product on CPU takes a hundred times as long
        if hidden.is_cuda and self.grad_dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
            self.grad_dtype = torch.get_autocast_dtype("cuda")

    def same_as(self, other: _TensorHead | _ModuleHead) -> bool:
        return (
            isinstance(other, _TensorHead)
            and self.weight is other.weight
            and self.bias is other.bias
            and self.grad_dtype == other.grad_dtype
        )

    def project(self, hidden: Tensor, out: Tensor, want_grad: bool) -> Callable[[Tensor], Tensor]:
        """Writes the logits (R, V) of hidden (R, D) into out; returns what takes their gradient back to (R, D)."""
        # A 16-bit product on CUDA accumulates and returns fp32; on CPU it would round the logits to 16 bits.
        dtype = self.grad_dtype if out.is_cuda and out.dtype == torch.float32 else out.dtype
        hidden = hidden.to(dtype)
        for columns, weight in self._blocks(dtype):
            if dtype == out.dtype:
                torch.mm(hidden, weight.t(), out=out[:, columns])
            else:
                torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out[:, columns])
        if self.bias is not None:
            out.add_(self.bias.detach().to(out.dtype).clamp(min=MASKED))
        return self._pull_back

    def _pull_back(self, grad: Tensor) -> Tensor:
        wide = {"out_dtype": torch.float32} if grad.is_cuda and grad.dtype.itemsize == 2 else {}
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

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits (R, V) with a graph to hidden, weight and bias."""
        bias = None if self.bias is None else self.bias.to(dtype).clamp(min=MASKED)
        return F.linear(hidden.to(dtype), self.weight.to(dtype), bias)


class _ModuleHead:
    """A head that is only known by its forward: quantized, wrapped by LoRA, or anything callable."""

    def __init__(self, module: Callable[[Tensor], Tensor], hidden: Tensor):
        self.module = module
        self.trains = not isinstance(module, nn.Module) or any(p.requires_grad for p in module.parameters())
        with torch.no_grad():
            probe = module(hidden.new_zeros(1, hidden.shape[1]))
        self.vocab, self.grad_dtype = probe.shape[-1], probe.dtype

    def project(self, hidden: Tensor, out: Tensor, want_grad: bool) -> Callable[[Tensor], Tensor]:
        with torch.set_grad_enabled(want_grad):
            hidden = hidden.detach().requires_grad_(want_grad)
            logits = self.module(hidden)
        out.copy_(logits.detach()).clamp_(min=MASKED)
        return lambda grad: torch.autograd.grad(logits, hidden, grad)[0]

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        return self.module(hidden).to(dtype).clamp(min=MASKED)


class _FrozenHead(torch.autograd.Function):
    """Statistics and divergence (N,); the gradient with respect to the student's rows is made in forward."""

    @staticmethod
    def forward(
        ctx: Any, student_hidden: Tensor, teacher_hidden: Tensor, ids: Tensor | None, task: _Task, want_grad: bool
    ) -> tuple[Tensor, ...]:
        n, device, vocab = student_hidden.shape[0], student_hidden.device, task.student.vocab
        grad_dtype = task.student.grad_dtype
        in_place = grad_dtype == task.dtype
        bytes_a_logit = 2 * task.dtype.itemsize + (0 if in_place else grad_dtype.itemsize)
        if isinstance(task.student, _ModuleHead):
            bytes_a_logit += 2 * grad_dtype.itemsize
        chunks = task.chunks(n, bytes_a_logit)
        most = chunks[0].stop if chunks else 0
        stats = torch.empty((6, n), device=device, dtype=task.dtype)
        logits = torch.empty((2 * most, vocab), device=device, dtype=task.dtype)
        shared = isinstance(task.student, _TensorHead) and task.student.same_as(task.teacher)
        grad_logits = logits[:most] if in_place else torch.empty((most, vocab), device=device, dtype=grad_dtype)
        grad_rows = torch.empty(student_hidden.shape if want_grad else 0, device=device, dtype=task.dtype)
        for chunk in chunks:
            rows = chunk.stop - chunk.start
            zs, zt = logits[:rows], logits[rows : 2 * rows]
            if shared:  # one product for both: the head is read, and cast where it must be, once
                both = torch.cat([student_hidden[chunk], teacher_hidden[chunk]])
                pull_back = task.student.project(both, logits[: 2 * rows], want_grad)
            else:
                pull_back = task.student.project(student_hidden[chunk], zs, want_grad)
                task.teacher.project(teacher_hidden[chunk], zt, False)
            grad = grad_logits[:rows] if want_grad else None
            stats[:, chunk] = _chunk(zs, zt, None if ids is None else ids[chunk], task, grad)
            if grad is not None:
                grad_rows[chunk] = pull_back(grad)
        if want_grad:
            grad_rows.mul_(stats[5].unsqueeze(-1))
        ctx.save_for_backward(grad_rows)
        ctx.dtype = student_hidden.dtype
        return _outputs(ctx, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_divergence: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad_rows,) = ctx.saved_tensors
        return (grad_rows * grad_divergence.unsqueeze(-1)).to(ctx.dtype), None, None, None, None


class _FromLogits(torch.autograd.Function):
    """The same from logits (R, V) that hang on a graph."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, teacher_logits: Tensor, ids: Tensor | None, task: _Task
    ) -> tuple[Tensor, ...]:
        grad = student_logits.clone()
        stats = _chunk(grad, teacher_logits, ids, task, grad)
        ctx.save_for_backward(grad, stats[5])
        return _outputs(ctx, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_divergence: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad, factor = ctx.saved_tensors
        return grad * (grad_divergence * factor).unsqueeze(-1), None, None, None


def _outputs(ctx: Any, stats: Tensor) -> tuple[Tensor, ...]:
    divergence, *rest = (row.clone() for row in stats[:5])
    ctx.mark_non_differentiable(*rest)
    return divergence, *rest


def _trainable_head(
    student_hidden: Tensor, teacher_hidden: Tensor, ids: Tensor | None, task: _Task
) -> tuple[Tensor, ...]:
    """The checkpointed path: a chunk's logits are made again in backward, so that the head's parameters get gradients
    for whatever each row's weight turns out to be."""

    def run(hidden: Tensor, teacher_rows: Tensor, ids: Tensor | None) -> tuple[Tensor, ...]:
        logits = task.student.logits(hidden, task.dtype)
        teacher_logits = torch.empty_like(logits)
        with torch.no_grad():
            task.teacher.project(teacher_rows, teacher_logits, False)
        return _FromLogits.apply(logits, teacher_logits, ids, task)

    n = student_hidden.shape[0]
    parts = [
        checkpoint(
            run, student_hidden[chunk], teacher_hidden[chunk], None if ids is None else ids[chunk], use_reentrant=False
        )
        for chunk in task.chunks(n, 6 * task.dtype.itemsize) or [slice(0, 0)]
    ]
    return tuple(torch.cat(column) for column in zip(*parts))


def _chunk(zs: Tensor, zt: Tensor, ids: Tensor | None, task: _Task, grad: Tensor | None) -> Tensor:
    """Statistics (6, R) of the logits zs, zt (R, V), which are used up; the gradient goes to `grad` (zs will do)."""
    kernel = _fused if zs.is_cuda else _rows
    block = zs.shape[0]
    if not zs.is_cuda:
        block = max(1, min(CACHE_BLOCK, int(task.chunk_mib * 2**20) // 40) // zs.shape[1])
    stats = []
    for start in range(0, zs.shape[0], max(1, block)):
        rows = slice(start, start + block)
        columns, part = kernel(
            zs[rows],
            zt[rows],
            None if ids is None else ids[rows],
            task.student_squash,
            task.teacher_squash,
            task.options,
            None if grad is None else grad.dtype,
        )
        stats.append(columns)
        if grad is not None:
            grad[rows].copy_(part)
    return torch.cat(stats, dim=1) if stats else zs.new_empty((6, 0))


def _rows(
    zs: Tensor,
    zt: Tensor,
    ids: Tensor | None,
    student: _Squash,
    teacher: _Squash,
    options: _Options,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """The elementwise part: raw logits zs, zt (R, V), used up -> statistics (6, R) and d divergence / d zs (R, V).

    The sixth statistic is the factor of the row that the gradient still lacks.
    """
    slope = _squash_(zs, student, grad_dtype is not None)
    _squash_(zt, teacher, False)
    top = zt.topk(options.top_k).indices if options.top_k is not None and options.top_k < zt.shape[1] else None
    max_s, max_t = zs.amax(-1, keepdim=True), zt.amax(-1, keepdim=True)
    agree = (zs + zt).amax(-1, keepdim=True) == max_s + max_t
    s, t = torch.softmax(zs, dim=-1), torch.softmax(zt, dim=-1)
    lse_s, lse_t = (peak - p.amax(-1, keepdim=True).log() for peak, p in ((max_s, s), (max_t, t)))
    logprob = torch.zeros_like(lse_s) if ids is None else zs.gather(-1, ids.unsqueeze(-1)) - lse_s
    log_ratio = (zs - zt).add_(lse_t - lse_s)  # log S - log T
    entropy_s, entropy_t = lse_s - zs.mul_(s).sum(-1, keepdim=True), lse_t - zt.mul_(t).sum(-1, keepdim=True)

    norm = 1.0
    if options.normalize and 0 < options.beta < 1:
        norm = 1 / (options.beta * (1 - options.beta))
    if top is None:
        entries, pull = _entries(s, t, log_ratio, options.beta)
    else:
        tail_s, tail_t = (p.scatter(-1, top, 0).sum(-1, keepdim=True).clamp(min=1e-30) for p in (s, t))
        entries, pull = _entries(
            torch.cat([s.gather(-1, top), tail_s], dim=-1),
            torch.cat([t.gather(-1, top), tail_t], dim=-1),
            torch.cat([log_ratio.gather(-1, top), (tail_s / tail_t).log()], dim=-1),
            options.beta,
        )
    if options.clip is not None and options.clip_mode == "entry":
        pull = pull * (entries <= options.clip / norm)
        divergence = entries.clamp(max=options.clip / norm).sum(-1, keepdim=True) * norm
    else:
        divergence = entries.sum(-1, keepdim=True).clamp(min=0) * norm
    factor = torch.full_like(divergence, norm * student.scale / student.temperature)
    if options.clip is not None and options.clip_mode == "token":
        factor = factor * (divergence <= options.clip)
        divergence = divergence.clamp(max=options.clip)
    elif options.clip is not None and options.clip_mode == "rescale":
        shrink = options.clip / divergence.clamp(min=options.clip)
        factor, divergence = factor * shrink, divergence * shrink

    grad = None
    if grad_dtype is not None:
        total = pull.sum(-1, keepdim=True)
        if top is None:
            grad = torch.addcmul(pull, s, total, value=-1)
        else:
            kept = pull[:, :-1] - s.gather(-1, top) * total
            grad = (s * (pull[:, -1:] / tail_s - total)).scatter_(-1, top, kept)
        if slope is not None:
            grad.mul_(slope)
        if grad_dtype == torch.float16:
            grad.mul_(HALF_SCALE).clamp_(-65504, 65504)
            factor = factor / HALF_SCALE
        grad = grad.to(grad_dtype)
    return torch.cat([divergence, entropy_s, entropy_t, agree.to(s.dtype), logprob, factor], dim=-1).t(), grad


def _squash_(z: Tensor, squash: _Squash, want_slope: bool) -> Tensor | None:
    """softcap(z * scale) / temperature, in place; returns the derivative of the soft-cap where there is one."""
    scale, softcap, temperature = squash.scale, squash.softcap, squash.temperature
    if softcap is None or softcap == math.inf:
        if scale != temperature:
            z.mul_(scale / temperature)
        return None
    z.mul_(2 * scale / softcap).sigmoid_().mul_(2).sub_(1)  # tanh, at a sixth of torch.tanh's time on CPU
    slope = 1 - z * z if want_slope else None
    z.mul_(softcap / temperature)
    return slope


def _entries(s: Tensor, t: Tensor, log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Summands l of the divergence, and s * dl/ds, for log_ratio = log(s/t), which is used up. With
    q = sum of s * dl/ds over the vocabulary, the gradient for the logits of the student is s * dl/ds - s * q."""
    if beta == 0:
        return -t * log_ratio, -t
    if beta == 1:
        entries = log_ratio.mul_(s)
        return entries, entries + s
    # log(m/t) = log(beta + (1-beta) * s/t); with it log(s/m) = log(s/t) - log(m/t): exact where s = t, no 0/0
    odds = math.log((1 - beta) / beta)
    threshold = 20 if s.dtype == torch.float32 else 40
    log_ratio.clamp_(max=60)  # beyond it t is 0 beside s, and a large number would cancel badly in log(s/m)
    log_m_t = F.softplus(log_ratio + odds, threshold=threshold).add_(math.log(beta))
    pull = log_ratio.sub_(log_m_t).mul_(s).mul_(1 - beta)
    return torch.addcmul(pull, t, log_m_t, value=-beta), pull


_compiled: Callable[..., tuple[Tensor, Tensor | None]] | None = None


def _fused(*args: Any) -> tuple[Tensor, Tensor | None]:
    """`_rows` as one kernel by torch.compile; where that cannot be compiled, `_rows` itself from then on."""
    global _compiled
    if _compiled is None:
        _compiled = torch.compile(_rows)
    if _compiled is not _rows:
        try:
            return _compiled(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            logger.warning("torch.compile failed (%s); the divergence runs unfused, which is slower", error)
            _compiled = _rows
    return _rows(*args)
