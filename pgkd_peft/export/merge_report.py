"""What a merge found out about its result, as data, as advice and as a model card."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..run.card import front_matter, without_local_paths
from .adapter import AdapterRun
from .card import hub_id, number, table, training_section


@dataclass
class MergeReport:
    """What was merged and what was measured; written as merge_report.json beside the weights.

    Attributes:
        surviving_share, rounding_noise: of the adapter's change after the cast (see rounding.py).
        four_bit_share, four_bit_noise: the same if it were merged into 4-bit weights, on a sample of each linear layer.
        fidelity: base -> how far merged is from trained (see verify.Fidelity); empty where it was not verified.
        trained: answer_nll, score and recovered of the trained model itself.
        base_matches_training: see verify.TrainedModel.base_matches.
        arithmetic_floor, adapter_effect: yardsticks in nats/token (see verify.TrainedModel).
        tolerance: limit on fidelity[base]["kl_mean"]; None where none is enforced.
    """

    out: str
    adapter: str
    base_model: str
    base: str
    dtype: str
    quantization: str
    assumed: list[str]
    surviving_share: float = math.nan
    rounding_noise: float = math.nan
    four_bit_share: float = math.nan
    four_bit_noise: float = math.nan
    requantized: str | None = None
    untied: bool = False
    fidelity: dict[str, dict[str, Any]] = field(default_factory=dict)
    trained: dict[str, float | None] = field(default_factory=dict)
    base_matches_training: bool | None = None
    arithmetic_floor: float | None = None
    adapter_effect: float | None = None
    prompts: str | None = None
    tolerance: float | None = None
    passed: bool | None = None
    recommendation: str | None = None
    command: str = ""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; a number that there is none of (NaN) is None."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


def survived(share: float, noise: float) -> str:
    """In words; see rounding.py for the two numbers."""
    return f"{share:.1%} (rounding noise {noise:.2g} of it)"


def recommend(report: MergeReport) -> str:
    """Which base to merge onto: the one that was trained on, unless the other answers better by a measure we have."""
    trained_on, original = report.fidelity["dequantized"], report.fidelity["original"]
    kl = f"KL to the trained model {number(trained_on['kl_mean'])} against {number(original['kl_mean'])} nats/token"
    for key, better, name in (
        ("score", 1.0, "task score"),
        ("answer_nll", -1.0, "nats/token on the reference answers"),
    ):
        if original[key] is not None and trained_on[key] is not None:
            gain = better * (original[key] - trained_on[key])
            if gain > 0.01 * abs(trained_on[key]):
                return (
                    f"original: better by {name} ({number(original[key])} against {number(trained_on[key])}), though "
                    f"it is not the model that was trained ({kl})."
                )
            return f"dequantized: it is the model that was trained ({kl}), and the original is no better by {name}."
    return f"dequantized: it is the model that was trained ({kl}); there is no score here that could favour the other."


def merged_card(report: MergeReport, run: AdapterRun) -> str:
    """The README.md of a merged model: what it is, what was measured, how it was trained."""
    rows = [{"base": base, "dtype": report.dtype, **fidelity} for base, fidelity in report.fidelity.items()]
    columns = ["base", "dtype", "kl_mean", "kl_p99", "kl_max", "top1_agreement", "answer_nll", "score", "recovered"]
    columns += ["tokens"]
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    parts = [
        front_matter(hub_id(run), library_name="transformers", tags=["pgkd", "lora-merged"]),
        f"# {Path(report.out).name}\n",
        f"A LoRA adapter, trained by privileged self-distillation, merged into `{report.base_model}` ({report.base} "
        f"base, added in float32, stored in {report.dtype}). It loads with plain `transformers`. The licence is that "
        "of the base model.\n",
        "## Is it the model that was trained?\n",
    ]
    if rows:
        parts += [
            table(columns, rows),
            f"\nKL(trained ‖ merged) in nats per token, both in float32 arithmetic, on {report.prompts}. For scale: "
            f"the adapter moves its base by {number(report.adapter_effect)}, 16-bit arithmetic alone moves the "
            f"trained model by {number(report.arithmetic_floor)}. Tolerance: {number(report.tolerance)}.\n",
        ]
    else:
        parts.append("It was not measured.\n")
    if report.recommendation:
        parts.append(f"Recommended base: {report.recommendation}\n")
    parts.append(
        f"Of what the adapter adds, {survived(report.surviving_share, report.rounding_noise)} survived the cast; "
        f"merged into 4-bit weights it would have been {survived(report.four_bit_share, report.four_bit_noise)}."
    )
    parts.append(training_section(run))
    parts.append(f"\nMerged with `{without_local_paths(report.command)}`.\n")
    return "\n".join(parts)
