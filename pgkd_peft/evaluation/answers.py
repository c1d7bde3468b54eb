"""Did the student learn what the teacher knew, and what did it cost? Recovered gap, drift, leakage, length.

Four columns, one adapter: the base, the base with PI (the teacher), the student, and the student with PI. All of them
answer greedily, so that they differ by what they know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..compare import compare, read, read_as, token_nll
from ..data.collator import DataCollatorForPrivilegedGKD, stop_ids
from ..model.adapters import adapter_state
from ..model.load import base_of
from ..rollout import generate
from .scorers import Scorer, normalize

COLUMNS = ("base", "teacher", "student", "student_with_pi")
"""Which weights read which prompt: adapter off without and with PI, adapter on without and with PI."""

HINT_PHRASES = (
    r"\b(?:based on|according to|from|using|in) the (?:given |provided |above )?"
    r"(?:fact|facts|hint|hints|text|passage|context|document|information|reference|solution|note)\b",
    r"\bthe (?:given |provided |above )?(?:fact|hint|text|passage|context|document|reference|solution|note) "
    r"(?:says|said|states|stated|mentions|mentioned|is|tells|provided|given)\b",
    r"\b(?:information|fact|context|hint|text) (?:provided|given|above)\b",
    r"\bas (?:mentioned|stated|provided|given) (?:above|before|earlier|in)\b",
)
"""Regular expressions of answers that speak of a hint which the user never saw."""

ANSWER_TOKENS = 64
"""Length limit of an answer where nobody gives one."""
DRIFT_TOKENS = 48
"""Length limit of the base's own continuations on which drift is measured."""


@dataclass(frozen=True)
class Interval:
    """A bootstrap interval: `low` to `high` at `level`, over `n` rows in `groups` groups."""

    low: float
    high: float
    level: float
    n: int
    groups: int


def recovered_gap(base: float, teacher: float, student: float) -> float | None:
    """(student - base) / (teacher - base): 0 when nothing was learnt, 1 when the student is as good without PI as the
    teacher with it. None when the teacher is not better than the base, so that there is no gap to recover."""
    gap = teacher - base
    if not gap > 1e-12 or math.isnan(student):
        return None
    return (student - base) / gap


def bootstrap_recovered(
    base: Sequence[float],
    teacher: Sequence[float],
    student: Sequence[float],
    *,
    groups: Sequence[Any] | None = None,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """Percentile bootstrap of the recovered gap over rows.

    Rows are drawn with replacement, all three scores of a row together (they answer the same question). Rows of one
    group, such as two phrasings of one fact, are drawn together: they are not independent.

    Returns:
        None when the rows show no gap, when most resamples do not, or of one group, which says nothing of others.
    """
    scores = np.array([base, teacher, student], dtype=float)  # (3, n)
    n = scores.shape[1]
    if n == 0 or recovered_gap(*scores.mean(1)) is None:
        return None
    names = list(range(n)) if groups is None else list(groups)
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    if len(numbers) < 2:
        return None
    member = np.array([numbers[name] for name in names])
    sums = np.stack([np.bincount(member, row, minlength=len(numbers)) for row in scores])  # (3, groups)
    drawn = np.random.default_rng(seed).integers(len(numbers), size=(samples, len(numbers)))
    totals = sums[:, drawn].sum(-1)  # (3, samples); group sizes cancel in the ratio
    gap = totals[1] - totals[0]
    with_gap = gap > 1e-12
    if with_gap.mean() < 0.5:
        return None
    ratios = (totals[2] - totals[0])[with_gap] / gap[with_gap]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, n, len(numbers))


@dataclass
class Evaluation:
    """Answers and scores, one list entry a row, by column."""

    rows: list[Mapping[str, Any]]
    prompts: list[str]
    privileged: list[str]
    answers: dict[str, list[str]]
    scores: dict[str, list[float]]
    lengths: dict[str, list[int]]
    truncated: dict[str, list[bool]]
    interval: Interval | None = None
    phrases: tuple[str, ...] = HINT_PHRASES
    extra: dict[str, Any] = field(default_factory=dict)
    completions: dict[str, list[list[int]]] = field(default_factory=dict)  # the answers' ids, end of turn included

    @property
    def n(self) -> int:
        return len(self.rows)

    def by_column(self) -> tuple[dict[str, list[Any]], ...]:
        """What is held by column."""
        return self.answers, self.scores, self.lengths, self.truncated, self.completions

    def score(self, column: str) -> float:
        """Mean score of a column."""
        return float(np.mean(self.scores[column]))

    @property
    def recovered(self) -> float | None:
        if not self.scores:
            return None
        return recovered_gap(self.score("base"), self.score("teacher"), self.score("student"))

    def summary(self) -> dict[str, Any]:
        """What was measured, as plain JSON types."""
        interval = self.interval
        return {
            **{name: self.score(name) for name in self.scores},
            "recovered": self.recovered,
            "recovered_interval": [interval.low, interval.high] if interval else None,
            "recovered_interval_level": interval.level if interval else None,
            "n": self.n,
            "groups": interval.groups if interval else None,
            "columns": {
                name: {
                    "score": self.score(name) if self.scores else None,
                    "length_tokens": float(np.mean(self.lengths[name])),
                    "truncated": float(np.mean(self.truncated[name])),
                    **leakage(answers, self.privileged, self.phrases),
                }
                for name, answers in self.answers.items()
            },
            **self.extra,
        }

    def records(self) -> list[dict[str, Any]]:
        """One dict a row: prompt, PI, answers and scores by column."""
        return [
            {
                "prompt": self.prompts[i],
                "privileged": self.privileged[i],
                "answers": {name: answers[i] for name, answers in self.answers.items()},
                "scores": {name: scores[i] for name, scores in self.scores.items()},
            }
            for i in range(self.n)
        ]


def evaluate(
    model: nn.Module,
    collator: DataCollatorForPrivilegedGKD,
    rows: Sequence[Mapping[str, Any]],
    scorer: Scorer | None,
    *,
    max_new_tokens: int = ANSWER_TOKENS,
    columns: Sequence[str] = COLUMNS,
    group_key: str | None = None,
    phrases: Sequence[str] = HINT_PHRASES,
    bootstrap_samples: int = 2000,
    seed: int = 0,
    known: Evaluation | None = None,
    student: Callable[[], AbstractContextManager[nn.Module]] | None = None,
    teacher: Callable[[], AbstractContextManager[nn.Module]] | None = None,
) -> Evaluation:
    """Answer every row as each column does, greedily, and score the answers.

    Args:
        model: a PeftModel; the base is the model with its adapter disabled.
        collator: as in training: it places the PI.
        rows: held-out rows; the reference stands where the scorer looks for it.
        scorer: None where there is nothing to score against: only answers, and no recovered gap.
        columns: which of :data:`COLUMNS`; base, teacher and student are needed for the recovered gap.
        group_key: column whose equal values mark rows that belong together, for the bootstrap.
        phrases: regular expressions of answers that speak of the hint, see :func:`leakage`.
        bootstrap_samples: of the interval, see :func:`bootstrap_recovered`; 0 leaves it out.
        known: an evaluation of the same rows, scorer and base, of which base and teacher are taken over.
        student: gives the weights that answer as the student, such as a run's rollout engine; default: `model` itself.
        teacher: gives the weights that answer as the teacher, such as a run's; default: the base.

    Raises:
        DataError: a row cannot be used.
    """
    rows = list(rows)
    encoded = [collator.encode(row) for row in rows]
    tokenizer = collator.tokenizer
    stops = stop_ids(tokenizer, base_of(model).generation_config)
    result = Evaluation(
        rows=rows,
        prompts=[row["contexts"].student[-1]["content"] for row in encoded],
        privileged=[row["contexts"].privileged_text for row in encoded],
        answers={},
        scores={},
        lengths={},
        truncated={},
        phrases=tuple(phrases),
    )
    for column in columns:
        assert column in COLUMNS, column
        if known is not None and column in ("base", "teacher") and column in known.answers:
            for mine, theirs in zip(result.by_column(), known.by_column()):
                if column in theirs:
                    mine[column] = theirs[column]
            continue
        prompts = [row["teacher_ids" if column in ("teacher", "student_with_pi") else "student_ids"] for row in encoded]
        if column == "base" or (column == "teacher" and teacher is None):
            source: AbstractContextManager[nn.Module] = adapter_state(model, "disabled")
        elif column == "teacher":
            assert teacher is not None
            source = teacher()
        else:
            source = student() if student is not None else adapter_state(model, "shared")
        with source as weights:
            completions = generate(
                weights, prompts, max_new_tokens=max_new_tokens, stop_ids=stops, pad_id=collator.pad_token_id
            )
        ended = [completion[-1] in stops for completion in completions]
        result.answers[column] = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions]
        result.lengths[column] = [len(ids) - end for ids, end in zip(completions, ended)]
        result.truncated[column] = [not end for end in ended]
        result.completions[column] = completions
        if scorer is None:
            continue
        result.scores[column] = [scorer(answer, row) for answer, row in zip(result.answers[column], rows)]
    if scorer is not None and bootstrap_samples and {"base", "teacher", "student"} <= set(columns):
        result.interval = bootstrap_recovered(
            result.scores["base"],
            result.scores["teacher"],
            result.scores["student"],
            groups=[row[group_key] for row in rows] if group_key else None,
            samples=bootstrap_samples,
            seed=seed,
        )
    return result


def leakage(
    answers: Sequence[str], privileged: Sequence[str], phrases: Sequence[str] = HINT_PHRASES, n: int = 4
) -> dict[str, float | None]:
    """How much of the hint shows in the answers.

    Returns:
        ``hint_share``: share of answers that speak of the hint (one of `phrases` is found, whatever its case);
        ``pi_overlap``: share of the answers' word n-grams that stand in the PI too, over rows with PI (None without).
    """
    patterns = [re.compile(phrase, re.IGNORECASE) for phrase in phrases]
    speaks = [any(pattern.search(answer) for pattern in patterns) for answer in answers]
    shared = total = 0
    for answer, text in zip(answers, privileged):
        if text:
            known = set(_ngrams(text, n))
            grams = _ngrams(answer, n)
            shared += sum(gram in known for gram in grams)
            total += len(grams)
    return {
        "hint_share": sum(speaks) / len(speaks) if speaks else None,
        "pi_overlap": shared / total if total else None,
    }


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = normalize(text).split()
    return list(zip(*(words[i:] for i in range(n))))


@dataclass(frozen=True)
class Drift:
    """How far the student has moved from the base where it should not.

    Attributes:
        kl: mean KL(base || student) in nats a token, over the base's own greedy continuations.
        top1_agreement: share of those tokens where both have the same favourite.
        tokens, prompts: how many there were.
    """

    kl: float
    top1_agreement: float
    tokens: int
    prompts: int


def continuations(
    model: nn.Module,
    collator: DataCollatorForPrivilegedGKD,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = DRIFT_TOKENS,
) -> list[tuple[list[int], list[int]]]:
    """Each row's prompt without PI, and the base's own greedy continuation of it, end of turn included.

    Raises:
        DataError: a row cannot be used.
    """
    prompts = [collator.encode(row)["student_ids"] for row in rows]
    stops = stop_ids(collator.tokenizer, base_of(model).generation_config)
    with adapter_state(model, "disabled") as base:
        completions = generate(
            base, prompts, max_new_tokens=max_new_tokens, stop_ids=stops, pad_id=collator.pad_token_id
        )
    return list(zip(prompts, completions))


@torch.no_grad()
def measure_drift(
    model: nn.Module,
    collator: DataCollatorForPrivilegedGKD,
    rows: Sequence[Mapping[str, Any]] = (),
    *,
    max_new_tokens: int = DRIFT_TOKENS,
    rows_at_once: int = 8,
    continued: Sequence[tuple[list[int], list[int]]] | None = None,
) -> Drift:
    """KL(base || student) on neutral prompts.

    The base continues each prompt greedily (up to `max_new_tokens`, end of turn included); then both read prompt and
    continuation, and their next-token distributions are compared at every continuation token.

    Args:
        continued: prompts and continuations of :func:`continuations`, where they are known; instead of `rows`.

    Raises:
        DataError: a row cannot be used.
    """
    if continued is None:
        continued = continuations(model, collator, rows, max_new_tokens=max_new_tokens)
    pad_id = collator.pad_token_id
    base, student = (read_as(model, which, continued, pad_id, at_once=rows_at_once) for which in ("disabled", "shared"))
    found = compare(base, student)
    return Drift(float(found.divergence.mean()), float(found.agreement.mean()), len(found.divergence), len(continued))


@torch.no_grad()
def perplexity(model: nn.Module, ids: Sequence[int], *, window: int = 1024, stride: int = 512) -> float:
    """exp of the mean negative log-likelihood of a text's tokens (all but the first) under the active weights.

    Longer texts are read in windows; each token but those of the first window has at least `window - stride` tokens
    before it.
    """
    if len(ids) < 2:
        raise ValueError(f"perplexity needs a text of at least two tokens, this one has {len(ids)}")
    total, done, start = 0.0, 1, 0
    while done < len(ids):
        end = min(start + window, len(ids))
        reading = read(model, [(list(ids[start:done]), list(ids[done:end]))], pad_id=0)
        total += float(token_nll(reading, [ids[done:end]])[0].sum())
        done = end
        start += stride
    return math.exp(total / (len(ids) - 1))


def student_score(model: nn.Module, tokenizer: Any, rows: Sequence[Mapping[str, Any]], scorer: Scorer) -> float:
    """Mean score of `model` as it is, asked without PI: for a merged model, which has no adapter to switch off."""
    collator = DataCollatorForPrivilegedGKD(tokenizer)
    completions = generate(
        model,
        [collator.encode(row)["student_ids"] for row in rows],
        max_new_tokens=ANSWER_TOKENS,
        stop_ids=stop_ids(tokenizer, base_of(model).generation_config),
        pad_id=collator.pad_token_id,
    )
    answers = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions]
    return float(np.mean([scorer(answer, row) for answer, row in zip(answers, rows)]))
