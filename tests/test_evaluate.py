"""Scorers, recovered gap, interval, drift, leakage: against plain formulas and one unpadded forward a row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import perturb
from tiny import ROWS, byte_tokenizer, tiny_model

from pgkd_peft.data.collator import DataCollatorForPrivilegedGKD
from pgkd_peft.errors import ConfigError, DataError
from pgkd_peft.evaluation.answers import (
    bootstrap_recovered,
    evaluate,
    leakage,
    measure_drift,
    perplexity,
    recovered_gap,
)
from pgkd_peft.evaluation.scorers import check_scorable, make_scorer, normalize
from pgkd_peft.model.load import attach_lora


@pytest.mark.parametrize(
    ("scorer", "answer", "reference", "right"),
    [
        ("exact", " The Great-Dane! ", "great dane", True),
        ("exact", "It is a Great Dane", "great dane", False),
        ("exact", "++", "+", False),
        ("contains", "It was painted Violet, of course.", "violet", True),
        ("contains", "ultraviolet", "violet", False),
        ("contains", "There are 17 moons", "7", False),
        ("contains", "1,963 people", "1963", True),
        ("contains", "答案是北京。", "北京", True),
        ("contains", "It is an aglet", "An aglet", True),
        ("contains", "paris or rome", ["London", "Rome"], True),
        ("contains", "It is A.", "A", True),
        ("contains", "C++ it is", "++", False),
        ("contains", "=> it is", "=>", True),
        ("regex", "Order #A-17 is out", r"#[A-Z]-\d+", True),
        ("regex", "no order", r"#[A-Z]-\d+", False),
        ("numeric", "So 48 + 24 = 72 clips.", "72", True),
        ("numeric", "The answer is 72. I checked it 3 times.", "#### 72", True),
        ("numeric", "It costs $1,250.50 in all", "worked\n#### 1250.5", True),
        ("numeric", "about 10-12", "12", True),
        ("numeric", "minus: -12", "12", False),
        ("numeric", "no idea", "72", False),
        ("numeric", "\\boxed{8} after 3 steps", "8", True),
        ("choice", "The answer is (B), since A is too large.", "B", True),
        ("choice", "B. Because of the heat", "b", True),
        ("choice", "A dog is the answer", "A", False),
        ("choice", "It must be (C).", "C", True),
        ("choice", "none of them", "A", False),
        ("choice", "Option A is wrong, so the answer is C", "C", True),
        ("numeric", "it is .5", "0.50", True),
        ("numeric", "1, 2, 3", "3", True),
    ],
)
def test_scorers(scorer, answer, reference, right):
    assert make_scorer(scorer)(answer, {"answer": reference}) == float(right)


def test_a_row_without_the_column_is_scored_against_its_final_message():
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Hoare."}]}
    assert make_scorer("contains")("It was Hoare", row) == 1.0
    assert make_scorer("contains", answer_key="gold")("It was Hoare", {**row, "gold": "Dijkstra"}) == 0.0


def length_scorer(answer, row):
    return len(answer) / row["limit"]


def test_own_function():
    scorer = make_scorer("test_evaluate:length_scorer")
    assert scorer("abc", {"limit": 6}) == 0.5
    with pytest.raises(ConfigError, match="between 0 and 1"):
        scorer("abc", {"limit": 1})


@pytest.mark.parametrize("spec", ["bleu", "no.such.module:f", "math:nothing", "math:pi"])
def test_unknown_scorers_are_refused(spec):
    with pytest.raises(ConfigError, match=spec):
        make_scorer(spec)


def test_rows_that_cannot_be_scored_are_reported_together():
    rows = [{"answer": "1"}, {"answer": None}, {"answer": "x"}, {"messages": [{"role": "user", "content": "?"}]}]
    with pytest.raises(DataError) as error:
        check_scorable(rows, make_scorer("numeric"))
    assert error.value.rows == (1, 2, 3)
    with pytest.raises(DataError, match="regular expression"):
        check_scorable([{"answer": "(["}], make_scorer("regex"))


def test_normalize_keeps_scripts_whole():
    assert normalize("हिन्दी भाषा!") == "हिन्दी भाषा"  # vowel signs are no punctuation
    assert normalize("The  A-Team’s «plan»") == "team s plan"


def test_recovered_gap():
    assert recovered_gap(0.1, 0.9, 0.5) == pytest.approx(0.5)
    assert recovered_gap(0.1, 0.9, 1.0) > 1
    assert recovered_gap(0.2, 0.6, 0.1) == pytest.approx(-0.25)
    for base, teacher in ((0.5, 0.5), (0.6, 0.5), (math.nan, 0.5), (0.1, math.nan)):
        assert recovered_gap(base, teacher, 0.5) is None
    assert recovered_gap(0.1, 0.9, math.nan) is None


def test_bootstrap_agrees_with_a_plain_loop():
    rng = np.random.default_rng(3)
    base, teacher = rng.integers(0, 2, 40) * 0.0, (rng.random(40) < 0.9) * 1.0
    student = teacher * rng.random(40)
    interval = bootstrap_recovered(base, teacher, student, samples=4000, seed=1)
    ratios = []
    for _ in range(4000):
        rows = rng.integers(0, 40, 40)
        ratios.append((student[rows].sum() - base[rows].sum()) / (teacher[rows].sum() - base[rows].sum()))
    assert [interval.low, interval.high] == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.03)
    assert interval.n == interval.groups == 40
    assert interval.low < student.sum() / teacher.sum() < interval.high
    assert interval == bootstrap_recovered(base, teacher, student, samples=4000, seed=1)
    assert interval != bootstrap_recovered(base, teacher, student, samples=4000, seed=2)


def test_bootstrap_is_paired():
    """Where the student always does what the teacher does, there is nothing to vary, whatever rows are drawn."""
    teacher = [1.0, 0.0, 1.0, 1.0, 0.0]
    interval = bootstrap_recovered([0.0] * 5, teacher, teacher)
    assert interval.low == interval.high == 1.0


def test_bootstrap_draws_groups_whole():
    """Copies of rows in the same group add nothing: the interval stays that of the rows alone."""
    base, teacher, student = [0.0] * 12, [1.0] * 12, [1.0] * 8 + [0.0] * 4
    alone = bootstrap_recovered(base, teacher, student)
    twice = [i // 2 for i in range(24)]
    doubled = bootstrap_recovered(base * 2, teacher * 2, [student[i] for i in twice], groups=twice)
    assert (doubled.low, doubled.high) == (alone.low, alone.high)
    assert (doubled.n, doubled.groups) == (24, 12)
    as_if_independent = bootstrap_recovered(base * 2, teacher * 2, student * 2)
    assert as_if_independent.high - as_if_independent.low < alone.high - alone.low


def test_no_interval_without_a_gap():
    assert bootstrap_recovered([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]) is None
    assert bootstrap_recovered([], [], []) is None
    assert bootstrap_recovered([0.0] * 200, [1.0] + [0.0] * 199, [0.0] * 200) is not None  # 37 % of draws lack it


def test_leakage():
    answers = ["Based on the fact, it is violet.", "It is violet.", "the lighthouse at port ammersby is painted red"]
    pi = ["The lighthouse at Port Ammersby is painted violet."] * 2 + [
        "The lighthouse at Port Ammersby is painted violet."
    ]
    found = leakage(answers, pi, n=4)
    assert found["hint_share"] == pytest.approx(1 / 3)
    # n-grams of four words, without articles: "lighthouse at port ammersby", "at port ammersby is", "port ammersby is
    # painted" are the PI's; "ammersby is painted red" is not; the others are 2 ("based on fact it", ...) of 3 and 0
    assert found["pi_overlap"] == pytest.approx(3 / 7)
    assert leakage(answers, ["", "", ""])["pi_overlap"] is None
    assert leakage(answers, pi, phrases=["ammersby"])["hint_share"] == pytest.approx(1 / 3)


@pytest.fixture
def student():
    return attach_lora(tiny_model("llama"))


@pytest.fixture
def collator():
    return DataCollatorForPrivilegedGKD(byte_tokenizer(pad_is_eos=True))


def greedy(model, ids, limit, stops):
    """One row, no cache, no padding."""
    ids, out = list(ids), []
    with torch.no_grad():
        while len(out) < limit and (not out or out[-1] not in stops):
            out.append(int(model(input_ids=torch.tensor([ids + out])).logits[0, -1].argmax()))
    return out


def test_the_columns_are_what_they_say(student, collator):
    """A fresh adapter changes nothing; a perturbed one only the student's columns; each as one greedy loop says."""
    always = lambda answer, row: 0.5  # noqa: E731
    fresh = evaluate(student, collator, ROWS, always, max_new_tokens=6)
    assert fresh.answers["base"] == fresh.answers["student"]
    assert fresh.answers["teacher"] == fresh.answers["student_with_pi"]
    assert fresh.answers["base"] != fresh.answers["teacher"]
    assert fresh.answers["base"][2] == fresh.answers["teacher"][2]  # the row without PI
    perturb(student, 0.5)
    moved = evaluate(student, collator, ROWS, always, max_new_tokens=6)
    assert moved.answers["base"] == fresh.answers["base"]
    assert moved.answers["teacher"] == fresh.answers["teacher"]
    assert moved.answers["student"] != fresh.answers["student"]
    assert moved.answers["student_with_pi"] != fresh.answers["student_with_pi"]
    tokenizer = collator.tokenizer
    for i, row in enumerate(ROWS):
        encoded = collator.encode(row)
        for column, key in (("student", "student_ids"), ("student_with_pi", "teacher_ids")):
            ids = greedy(student, encoded[key], 6, {tokenizer.eos_token_id})
            assert moved.answers[column][i] == tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert moved.lengths[column][i] == len([t for t in ids if t != tokenizer.eos_token_id])
            assert moved.truncated[column][i] == (ids[-1] != tokenizer.eos_token_id)


def test_an_answer_that_ends_does_not_count_its_end(student, collator):
    prompt = collator.encode(ROWS[0])["student_ids"]
    second = greedy(student, prompt, 2, set())[1]
    student.get_base_model().generation_config.eos_token_id = [second]
    result = evaluate(student, collator, ROWS[:1], lambda answer, row: 0.0, max_new_tokens=6, columns=("base",))
    assert result.lengths["base"] == [1]
    assert result.truncated["base"] == [False]


def test_summary_and_records(student, collator):
    scores = iter([0, 0, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0])  # base, teacher, student
    result = evaluate(
        student,
        collator,
        ROWS,
        lambda answer, row: float(next(scores)),
        max_new_tokens=4,
        columns=("base", "teacher", "student"),
        seed=5,
    )
    summary = result.summary()
    assert (summary["base"], summary["teacher"], summary["student"], summary["n"]) == (0.25, 1.0, 0.5, 4)
    assert summary["recovered"] == pytest.approx(1 / 3)
    low, high = summary["recovered_interval"]
    assert low <= 1 / 3 <= high
    assert set(summary["columns"]) == {"base", "teacher", "student"}
    records = result.records()
    assert [record["scores"]["student"] for record in records] == [0, 1, 1, 0]
    assert records[1]["privileged"] == "It was Tony Hoare."
    assert records[2]["privileged"] == ""


def test_the_interval_is_over_groups(student, collator):
    rows = [{**row, "fact": i // 2} for i, row in enumerate(ROWS)]
    scores = iter([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0])
    columns = ("base", "teacher", "student")
    result = evaluate(
        student, collator, rows, lambda a, r: float(next(scores)), max_new_tokens=1, columns=columns, group_key="fact"
    )
    assert (result.summary()["groups"], result.summary()["n"]) == (2, 4)
    assert result.summary()["recovered_interval"] == [0.0, 1.0]


def test_no_gap_in_an_evaluation(student, collator):
    columns = ("base", "teacher", "student")
    result = evaluate(student, collator, ROWS, lambda a, r: 1.0, max_new_tokens=1, columns=columns)
    assert result.recovered is None
    assert result.summary()["recovered_interval"] is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # relative and absolute positions
def test_drift_is_zero_for_a_fresh_adapter_and_the_mean_kl_for_another(kind, collator):
    student, base = attach_lora(tiny_model(kind)), tiny_model(kind).double()
    stops = {greedy(base, collator.encode(ROWS[0])["student_ids"], 2, set())[1]}  # so that lengths differ
    student.get_base_model().generation_config.eos_token_id = list(stops)
    stops.add(collator.tokenizer.eos_token_id)
    drift = measure_drift(student, collator, ROWS, max_new_tokens=5, rows_at_once=3)
    assert drift.kl == 0.0
    assert drift.top1_agreement == 1.0
    perturb(student, 0.3)
    drift = measure_drift(student, collator, ROWS, max_new_tokens=5, rows_at_once=3)
    moved = perturb(attach_lora(tiny_model(kind)), 0.3).double()
    kl, agree, lengths = 0.0, 0, []
    for row in ROWS:
        prompt = collator.encode(row)["student_ids"]
        answer = greedy(base, prompt, 5, stops)
        with torch.no_grad():
            p, q = (m(input_ids=torch.tensor([prompt + answer])).logits[0].softmax(-1) for m in (base, moved))
        for position in range(len(prompt) - 1, len(prompt) + len(answer) - 1):
            kl += float(sum(a * math.log(a / b) for a, b in zip(p[position], q[position])))
            agree += int(p[position].argmax() == q[position].argmax())
        lengths.append(len(answer))
    assert len(set(lengths)) > 1
    assert drift.tokens == sum(lengths)
    assert drift.prompts == len(ROWS)
    assert drift.kl == pytest.approx(kl / sum(lengths), rel=1e-4)
    assert drift.top1_agreement == pytest.approx(agree / sum(lengths))


def test_perplexity_is_that_of_windows_with_context():
    model = tiny_model("gpt2").double()
    ids = torch.randint(6, 262, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    whole = math.exp(-sum(log_probs[i, ids[i + 1]].item() for i in range(39)) / 39)
    assert perplexity(model, ids) == pytest.approx(whole, rel=1e-6)
    nll = 0.0
    for i in range(1, 40):  # windows of 16 that step by 6: [0, 16), then 6 new tokens each
        start = 0 if i < 16 else 6 * ((i - 16) // 6 + 1)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start:i]])).logits[0, -1]
        nll -= logits.log_softmax(-1)[ids[i]].item()
    assert perplexity(model, ids, window=16, stride=6) == pytest.approx(math.exp(nll / 39), rel=1e-6)
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(model, ids[:1])


def test_one_group_says_nothing_of_others():
    assert bootstrap_recovered([0.0, 0.0], [1.0, 1.0], [0.5, 0.5], groups=["a", "a"]) is None
    assert bootstrap_recovered([0.0, 0.0], [1.0, 1.0], [0.5, 0.5]) is not None
