"""Hidden states + head -> divergence per token, its gradient, and statistics; never the full logits.

The head is frozen and usually shared by both sides, so the gradient with respect to the student's hidden rows can be
taken in the forward pass, chunk by chunk: two projections, one pass over the logits, one product back. Backward only
scales the stored rows. Logits, softmax and divergence are fp32 also where hidden states and head are 16-bit. A head
that trains is refused: it would need a gradient of its own, (V, D), in every chunk.

Shapes: N positions, R rows of a chunk, V vocabulary, D hidden width. Letters in formulas: S student, T teacher.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .config import CLIP_MODES
from .errors import ConfigError
from .model.head import Head
from .projection import ModuleHead, Pair, TensorHead, head_of, largest, pair_of

logger = logging.getLogger(__name__)

HALF_SCALE = 1024.0  # fp16 gradients of logits are multiplied by it, or most of them would underflow
CACHE_BLOCK = 2**19  # logits that the elementwise part works on at a time on CPU: 2 MiB in fp32


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

    def statistics(self) -> dict[str, Tensor]:
        """What is measured of every token, by the names of the log."""
        names = ("divergence", "student_entropy", "teacher_entropy", "top1_agreement", "sampled_logprob")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def linear_jsd(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head_weight: Tensor | nn.Module,
    *,
    head_bias: Tensor | None = None,
    teacher_head_weight: Tensor | nn.Module | None = None,
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
        head_weight: (V, D), frozen; or a frozen module that maps (R, D) to logits (R, V), such as a quantized layer.
        head_bias: (V,), frozen; may hold -inf to mask a token on both sides. A module brings its own.
        teacher_head_weight, teacher_head_bias: the teacher's head, if it has one of its own.
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
        chunk_mib: MiB for both sides' logits and the gradient of one chunk of positions. Peak extra memory stays below
            twice this plus 8*N*D bytes, with a head given as a tensor (measured on CPU; on CUDA computed). Each chunk
            reads the whole head, so a GPU with room wants more: 256 where the vocabulary is 152,000 and memory allows.

    Raises:
        ConfigError: an option out of its range, shapes that do not fit, or a student's head that trains.
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
    student = head_of("", student_hidden, head_weight, head_bias)
    teacher = head_of("teacher_", teacher_hidden, teacher_head_weight, teacher_head_bias)
    if student.vocab != teacher.vocab:
        raise ConfigError(
            f"the student's head has {student.vocab} tokens and the teacher's {teacher.vocab}; both must have the same "
            "vocabulary. Cut the rows that pad the larger one."
        )
    dtype = torch.float64 if torch.float64 in (student_hidden.dtype, teacher_hidden.dtype) else torch.float32
    if torch.is_grad_enabled() and student.trains:
        raise ConfigError(
            "head_weight trains (requires_grad), and the divergence gives a gradient to the hidden states alone. Keep "
            "the output head frozen: pass head_weight.detach(), or call requires_grad_(False) on the head."
        )
    task = _Task(student, teacher, student_squash, teacher_squash, options, dtype, student_hidden.device, chunk_mib)
    want_grad = torch.is_grad_enabled() and student_hidden.requires_grad
    stats = _FrozenHead.apply(student_hidden, teacher_hidden.detach(), sampled_ids, task, want_grad)
    divergence, entropy_s, entropy_t, agree, logprob = stats
    return Divergence(divergence, entropy_s, entropy_t, agree, None if sampled_ids is None else logprob)


def jsd_between(student_ND: Tensor, head: Head, teacher_ND: Tensor, teacher_head: Head, **options: Any) -> Divergence:
    """:func:`linear_jsd` of the hidden states that two models return, each through its own head, scale and soft-cap.

    accelerate turns what a 16-bit model returns into float32. The rows go back to the dtype of the head, as the model
    would hand them to it: nothing is lost, and the products are 16-bit ones (tensor cores; on CPU the pair that is
    accurate without float32 products). The gradient crosses the same cast.

    Args:
        student_ND, teacher_ND: (N, D) and (N, D_teacher), row n of both the same completion token.
        options: those of :func:`linear_jsd` but for heads, scales and soft-caps.
    """
    return linear_jsd(
        head.rows(student_ND),
        teacher_head.rows(teacher_ND.detach()),
        head.weight,
        head_bias=head.bias,
        teacher_head_weight=teacher_head.weight,
        teacher_head_bias=teacher_head.bias,
        softcap=head.softcap,
        logit_scale=head.scale,
        teacher_softcap=math.inf if teacher_head.softcap is None else teacher_head.softcap,
        teacher_logit_scale=teacher_head.scale,
        **options,
    )


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


_Settings: TypeAlias = tuple[_Squash, _Squash, _Options, torch.dtype | None]


class _Task(NamedTuple):
    """One call of :func:`linear_jsd`, checked."""

    student: TensorHead | ModuleHead
    teacher: TensorHead | ModuleHead
    student_squash: _Squash
    teacher_squash: _Squash
    options: _Options
    dtype: torch.dtype  # of logits, softmax and results
    device: torch.device
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


class _FrozenHead(torch.autograd.Function):
    """Statistics and divergence (N,); the gradient with respect to the student's rows is made in forward."""

    @staticmethod
    def forward(
        ctx: Any, student_hidden: Tensor, teacher_hidden: Tensor, ids: Tensor | None, task: _Task, want_grad: bool
    ) -> tuple[Tensor, ...]:
        n, device = student_hidden.shape[0], student_hidden.device
        pair = pair_of(task.student, task.teacher, task.dtype)
        chunks = task.chunks(n, pair.bytes_a_logit)
        pair.reserve(chunks[0].stop if chunks else 0, device)
        stats = torch.empty((6, n), device=device, dtype=task.dtype)
        grad_rows = torch.empty(student_hidden.shape if want_grad else 0, device=device, dtype=task.dtype)
        for chunk in chunks:
            pair.project(student_hidden[chunk], teacher_hidden[chunk], want_grad)
            some = None if ids is None else ids[chunk]
            stats[:, chunk], grad = _chunk(pair, chunk.stop - chunk.start, some, task, want_grad)
            if grad is not None:
                grad_rows[chunk] = pair.pull_back(grad)
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


def _outputs(ctx: Any, stats: Tensor) -> tuple[Tensor, ...]:
    divergence, *rest = (row.clone() for row in stats[:5])
    ctx.mark_non_differentiable(*rest)
    return divergence, *rest


def _chunk(pair: Pair, n: int, ids: Tensor | None, task: _Task, want_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Statistics (6, n) of the projected rows, and the gradient of their logits (n, V), in the head's `grad_dtype`."""
    grad_dtype = pair.grad_dtype if want_grad else None
    settings: _Settings = (task.student_squash, task.teacher_squash, task.options, grad_dtype)
    if fuses(task.device):
        fused = _fused(*pair.block(slice(0, n)), ids, settings)
        if fused is not None:
            return fused
        block = max(1, n // 4)  # unfused, six float32 temporaries: of a quarter they stay below the chunk's own bytes
    else:
        block = max(1, min(CACHE_BLOCK, int(task.chunk_mib * 2**20) // 64) // task.student.vocab)
    stats: list[Tensor] = []
    grad: Tensor | None = None
    for start in range(0, max(1, n), block):
        rows = slice(start, min(n, start + block))
        zs, zt = pair.block(rows)
        columns, part = _rows(zs, zt, None if ids is None else ids[rows], *settings)
        if part is not None and block >= n:
            return columns, part
        stats.append(columns)
        if part is not None:
            grad = pair.grad_buffer() if grad is None else grad
            grad[rows] = part
    return torch.cat(stats, dim=1), grad


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
    first_s, max_t = largest(zs, 1), zt.amax(-1, keepdim=True)
    max_s = zs.gather(-1, first_s)
    agree = zt.gather(-1, first_s) == max_t  # one index is enough
    s, t = torch.softmax(zs, dim=-1), torch.softmax(zt, dim=-1)
    log_top_s, log_top_t = s.amax(-1, keepdim=True).log(), t.amax(-1, keepdim=True).log()
    lse_s, lse_t = max_s - log_top_s, max_t - log_top_t
    logprob = torch.zeros_like(lse_s) if ids is None else zs.gather(-1, ids.unsqueeze(-1)) - lse_s
    # log S - log T, grouped so that large numbers meet their like: lse_t - lse_s would be off by an ulp of a logit
    log_ratio = (zs - zt).add_((max_t - max_s) + (log_top_s - log_top_t))
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
    if options.clip is not None and options.clip_mode != "entry":
        above = divergence > options.clip
        factor = factor.where(~above, factor * options.clip / divergence if options.clip_mode == "rescale" else 0.0)
        divergence = divergence.clamp(max=options.clip)

    grad = None
    if grad_dtype is not None:
        total = pull.sum(-1, keepdim=True)
        if top is None:
            grad = pull.addcmul_(s, total, value=-1)
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
    return log_m_t.mul_(t).mul_(-beta).add_(pull), pull


def fuses(device: torch.device) -> bool:
    """Whether the elementwise part is compiled there: one pass over the logits from memory, which is what a GPU waits
    for. A CPU gets it block by block in its cache instead, without a compiler."""
    return device.type == "cuda"


_can_compile = True


def _fused(zs: Tensor, zt: Tensor, ids: Tensor | None, settings: _Settings) -> tuple[Tensor, Tensor | None] | None:
    """`_rows` in one kernel by torch.compile, which leaves zs and zt as they are; None where that cannot be compiled.

    Only the compiler's own errors count as that: an error of the device or an interrupt is nobody's to swallow.
    """
    global _can_compile
    if not _can_compile:
        return None
    for tensor in (zs, zt, ids):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # micro-batches differ in their number of rows
    try:
        return _compiled(settings)(zs, zt, ids)
    except torch._dynamo.exc.TorchDynamoException as error:
        logger.warning("torch.compile failed (%s); the divergence runs unfused, which is slower", error)
        _can_compile = False
        return None


@functools.lru_cache
def _compiled(settings: _Settings, backend: str = "inductor") -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The kernel of one choice of settings. As arguments they would be guarded, and become symbols when they change
    (training, trace and preflight use three); closed over, they are constants."""

    def rows(zs: Tensor, zt: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # without side effects nothing but the results has to be written to memory
        return _rows(zs.clone(), zt.clone(), ids, *settings)

    rows.__code__ = rows.__code__.replace()  # graphs are kept, and counted against a limit, by code object
    return torch.compile(rows, backend=backend)
