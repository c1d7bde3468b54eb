"""Independent references in float64: probabilities first, plain loops over the vocabulary, no log-space shortcuts."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def probabilities(raw: list[float], scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0):
    """Softmax of one row of raw head outputs after logit scale, soft-cap and temperature."""
    logits = []
    for z in raw:
        z = z * scale
        if softcap is not None:
            z = softcap * math.tanh(z / softcap)
        logits.append(z / temperature)
    peak = max(logits)
    weights = [math.exp(z - peak) for z in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def relative_entropy_terms(p: list[float], q: list[float]) -> list[float]:
    """p_v * log(p_v / q_v); 0 where p_v is 0."""
    terms = []
    for a, b in zip(p, q):
        if a == 0:
            terms.append(0.0)
        else:
            terms.append(a * math.log(a / b))
    return terms


def keep_top_k(s: list[float], t: list[float], k: int | None):
    """The teacher's k most probable tokens, and one bucket with all the others."""
    if k is None or k >= len(t):
        return s, t
    order = sorted(range(len(t)), key=lambda v: t[v], reverse=True)
    kept, rest = order[:k], order[k:]
    return [s[v] for v in kept] + [math.fsum(s[v] for v in rest)], [t[v] for v in kept] + [
        math.fsum(t[v] for v in rest)
    ]


def jsd(s: list[float], t: list[float], beta: float, *, normalize=False, clip=None, clip_mode="rescale", top_k=None):
    """beta*KL(T||M) + (1-beta)*KL(S||M) with M = beta*T + (1-beta)*S; its limits KL(T||S) and KL(S||T) at 0 and 1."""
    s, t = keep_top_k(s, t, top_k)
    if beta == 0:
        terms = relative_entropy_terms(t, s)
    elif beta == 1:
        terms = relative_entropy_terms(s, t)
    else:
        m = [beta * b + (1 - beta) * a for a, b in zip(s, t)]
        teacher, student = relative_entropy_terms(t, m), relative_entropy_terms(s, m)
        terms = [beta * b + (1 - beta) * a for a, b in zip(student, teacher)]
        if normalize:
            terms = [term / (beta * (1 - beta)) for term in terms]
    if clip is not None and clip_mode == "entry":
        return math.fsum(min(term, clip) for term in terms)
    total = math.fsum(terms)
    return total if clip is None else min(total, clip)


def entropy(p: list[float]) -> float:
    return -math.fsum(a * math.log(a) for a in p if a > 0)


def _side(options: dict, side: str) -> dict:
    softcap = options.get("teacher_softcap", options.get("softcap")) if side == "t" else options.get("softcap")
    scale = options.get("logit_scale", 1.0)
    if side == "t":
        scale = options.get("teacher_logit_scale", scale)
    return {"scale": scale, "softcap": softcap, "temperature": options.get("temperature", 1.0)}


def jsd_of_row(raw_s: list[float], raw_t: list[float], beta: float, **options) -> float:
    loss = {key: options[key] for key in ("normalize", "clip", "clip_mode", "top_k") if key in options}
    s = probabilities(raw_s, **_side(options, "s"))
    return jsd(s, probabilities(raw_t, **_side(options, "t")), beta, **loss)


def gradient_of_row(raw_s: list[float], raw_t: list[float], beta: float, step: float = 1e-5, **options) -> list[float]:
    """d jsd / d raw_s by central differences; a rescaled row has the unclipped gradient times a constant."""
    factor = 1.0
    if options.get("clip") is not None and options.get("clip_mode", "rescale") == "rescale":
        clip = options["clip"]
        options = options | {"clip": None}
        factor = min(1.0, clip / max(jsd_of_row(raw_s, raw_t, beta, **options), 1e-300))
    gradient = []
    for v in range(len(raw_s)):
        up, down = list(raw_s), list(raw_s)
        up[v] += step
        down[v] -= step
        difference = jsd_of_row(up, raw_t, beta, **options) - jsd_of_row(down, raw_t, beta, **options)
        gradient.append(factor * difference / (2 * step))
    return gradient


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(N, D) x (V, D) -> (N, V) in float64; -inf in the bias becomes a finite logit of the same probability, 0."""
    z = hidden.detach().double() @ weight.detach().double().T
    return z if bias is None else (z + bias.detach().double()).clamp(min=-5e3)


def linear_jsd(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    beta: float,
    *,
    bias: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    """Divergence (N,) and the gradient of its sum with respect to student (N, D)."""
    if teacher_weight is None:
        teacher_weight, teacher_bias = weight, bias
    zs, zt = logits(student, weight, bias).tolist(), logits(teacher, teacher_weight, teacher_bias).tolist()
    values = [jsd_of_row(s, t, beta, **options) for s, t in zip(zs, zt)]
    gradients = [gradient_of_row(s, t, beta, **options) for s, t in zip(zs, zt)]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64) @ weight.double()
