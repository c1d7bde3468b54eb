"""Sums over tokens, rows and optimizer steps -> what is logged."""

from __future__ import annotations


def means_of(sums: dict[str, float]) -> dict[str, float]:
    """Sums since the last log -> what is logged."""
    means: dict[str, float] = {}

    def mean(name: str, over: str, source: str | None = None) -> None:
        if sums.get(over):
            means[name] = sums.get(source or name, 0.0) / sums[over]

    for name in ("divergence", "student_entropy", "teacher_entropy", "top1_agreement", "sampled_logprob"):
        mean(name, "loss_tokens")
    mean("completion_length", "rows", "completion_tokens")
    mean("truncated_completions", "generated", "truncated")
    mean("on_policy", "rows")
    mean("privileged_rows", "rows")
    for name in ("seconds_rollout", "seconds_teacher", "seconds_student", "ema_cut_off"):
        if name in sums:
            mean(name, "windows")
    if sums.get("rows"):
        means["privileged_tokens_cut"] = sums.get("privileged_tokens_cut", 0.0)
        means["loss_tokens"] = sums.get("loss_tokens", 0.0)
    seconds = sum(sums.get(name, 0.0) for name in ("seconds_rollout", "seconds_teacher", "seconds_student"))
    if seconds:
        means["tokens_per_second"] = sums.get("completion_tokens", 0.0) / seconds
    return means
