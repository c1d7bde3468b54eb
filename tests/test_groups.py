"""The recovered gap of groups: means by hand, Wilson's interval from its definition, and no certainty from two rows."""

from __future__ import annotations

import math

import pytest

from pgkd_peft.evaluation.groups import LEAST_ROWS, recovered_by_group, wilson


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (2, 2), (1, 3), (7, 40), (40, 40)])
def test_wilson_is_where_the_normal_test_no_longer_refuses(right, n):
    """Its ends are the shares p at which the share found is 1.96 standard errors (of p itself) away."""

    def refused(p):
        return abs(right / n - p) > 1.959964 * math.sqrt(p * (1 - p) / n)

    low, high = wilson(right / n, n)
    accepted = [i / 100_000 for i in range(100_001) if not refused(i / 100_000)]
    assert (low, high) == pytest.approx((min(accepted), max(accepted)), abs=2e-5)


def test_groups_of_scores():
    names = ["moon", "boot", "moon", "boot", "boot", "known"]
    base, teacher, student = [0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]
    moon, boot, known = recovered_by_group(base, teacher, student, names)
    assert [found["group"] for found in (moon, boot, known)] == ["moon", "boot", "known"]
    assert [found["n"] for found in (moon, boot, known)] == [2, 3, 1]
    assert moon["recovered"] == 1.0
    assert moon["interval"] == pytest.approx(list(wilson(1.0, 2)))
    assert moon["interval"][0] < 0.4  # two of two right is not much
    assert boot["recovered"] == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))
    assert boot["interval"] == pytest.approx([(end - 1 / 3) / (2 / 3) for end in wilson(2 / 3, 3)])
    assert known["recovered"] is None
    assert known["interval"] is None


def test_groups_in_nats_have_an_interval_only_from_five_rows_on():
    few = recovered_by_group([-3.0] * 4, [-1.0] * 4, [-2.0] * 4, ["a"] * 4)[0]
    assert few["recovered"] == 0.5
    assert few["interval"] is None
    student = [-2.5, -2.0, -1.5, -2.0, -1.0]
    enough = recovered_by_group([-3.0] * LEAST_ROWS, [-1.0] * LEAST_ROWS, student, ["a"] * LEAST_ROWS)[0]
    assert enough["recovered"] == pytest.approx(0.6)
    low, high = enough["interval"]
    assert 0.25 < low < 0.6 < high < 1.0


def test_a_gap_of_next_to_nothing_is_none():
    found = recovered_by_group([-3.0, -9.0], [-2.99, -1.0], [-1.0, -1.0], ["a", "b"], least=[0.1, 0.1])
    assert [entry["recovered"] is None for entry in found] == [True, False]
