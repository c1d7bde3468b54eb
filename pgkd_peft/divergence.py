"""Hidden states + head -> divergence per token, its gradient, and statistics; never the full logits.

Shapes: N positions, V vocabulary, D hidden width of the student, E hidden width of the teacher, R rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CLIP_MODES = ("entry", "token", "rescale")
MASKED = -1e4  # stands for a logit of -inf: its probability is 0, and products with it stay finite

Head = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """What :func:`linear_jsd` returns; all of shape (N,), in nats, fp32 (float64 for float64 inputs).

    Attributes:
        divergence: differentiable with respect to the student.
        student_entropy, teacher_entropy: of the two distributions that are compared (temperature included).
        top1_agreement: 1 where both have the same most probable token, else 0.
        sampled_logprob: log-probability of `sampled_ids` under the student; None without `sampled_ids`.
    """

    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor
    sampled_logprob: Tensor | None


class _Options(NamedTuple):
    beta: float
    temperature: float
    normalize: bool
    softcap: float | None
    logit_scale: float
    clip: float | None
    clip_mode: str
    top_k: int | None


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
    clip: float | None = None,
    clip_mode: str = "rescale",
    top_k: int | None = None,
    sampled_ids: Tensor | None = None,
    chunk_mib: float = 64,
) -> Divergence:
    """JSD_beta(teacher || student) per position: beta*KL(T||M) + (1-beta)*KL(S||M), M = beta*T + (1-beta)*S;
    beta=0 is KL(T||S), beta=1 is KL(S||T)."""
    options = _Options(beta, temperature, normalize, softcap, logit_scale, clip, clip_mode, top_k)
    if teacher_head_weight is None:
        teacher_head_weight, teacher_head_bias = head_weight, head_bias
    out_dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    vocab = head_weight.shape[0] if isinstance(head_weight, Tensor) else 151_936
    rows = max(1, int(chunk_mib * 2**20 // (vocab * 4 * 4)))
    parts = []
    for start in range(0, max(1, student_hidden.shape[0]), rows):
        chunk = slice(start, start + rows)
        with torch.no_grad():
            teacher = _project(teacher_hidden[chunk], teacher_head_weight, teacher_head_bias, out_dtype)
        ids = None if sampled_ids is None else sampled_ids[chunk]

        def run(hidden: Tensor, teacher: Tensor = teacher, ids: Tensor | None = ids) -> tuple[Tensor, ...]:
            return _from_logits(_project(hidden, head_weight, head_bias, out_dtype), teacher, ids, options)

        parts.append(checkpoint(run, student_hidden[chunk], use_reentrant=False))
    divergence, entropy_s, entropy_t, top1, *logprob = (torch.cat(column) for column in zip(*parts))
    return Divergence(divergence, entropy_s, entropy_t, top1, logprob[0] if logprob else None)


def _project(hidden: Tensor, head: Head, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if isinstance(head, Tensor):
        logits = F.linear(hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype))
    else:
        logits = head(hidden).to(dtype)
    return logits.clamp(min=MASKED)


def _from_logits(student: Tensor, teacher: Tensor, ids: Tensor | None, options: _Options) -> tuple[Tensor, ...]:
    """Per-token divergence and statistics of full logits (R, V), by autograd."""
    beta = options.beta

    def transform(logits: Tensor) -> Tensor:
        logits = logits * options.logit_scale
        if options.softcap is not None:
            logits = options.softcap * torch.tanh(logits / options.softcap)
        return F.log_softmax(logits / options.temperature, dim=-1)

    log_s, log_t = transform(student), transform(teacher)
    stats = [
        -(log_s.detach().exp() * log_s.detach()).sum(-1),
        -(log_t.exp() * log_t).sum(-1),
        (log_s.argmax(-1) == log_t.argmax(-1)).to(log_s.dtype),
    ]
    if ids is not None:
        stats.append(log_s.detach().gather(-1, ids.unsqueeze(-1)).squeeze(-1))
    if options.top_k is not None and options.top_k < log_t.shape[-1]:
        log_t, index = log_t.topk(options.top_k, dim=-1)
        kept = torch.zeros_like(log_s, dtype=torch.bool).scatter_(-1, index, True)
        tail_s = log_s.masked_fill(kept, -math.inf).logsumexp(-1, keepdim=True)
        tail_t = transform(teacher).masked_fill(kept, -math.inf).logsumexp(-1, keepdim=True)
        log_s = torch.cat([log_s.gather(-1, index), tail_s], dim=-1)
        log_t = torch.cat([log_t, tail_t], dim=-1)
    if beta == 0:
        entries = log_t.exp() * (log_t - log_s)
    elif beta == 1:
        entries = log_s.exp() * (log_s - log_t)
    else:
        log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
        entries = beta * log_t.exp() * (log_t - log_m) + (1 - beta) * log_s.exp() * (log_s - log_m)
    if options.normalize and 0 < beta < 1:
        entries = entries / (beta * (1 - beta))
    if options.clip is not None and options.clip_mode == "entry":
        return entries.clamp(max=options.clip).sum(-1), *stats
    divergence = entries.sum(-1)
    if options.clip is not None and options.clip_mode == "token":
        divergence = divergence.clamp(max=options.clip)
    elif options.clip is not None:
        divergence = divergence * (options.clip / divergence.detach().clamp(min=options.clip))
    return divergence, *stats
