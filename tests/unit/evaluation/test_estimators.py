"""Pass@K and Major@K against brute-force enumeration; the intervals' coverage."""

from __future__ import annotations

import random
from itertools import combinations
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_ray.evaluation.estimators import average, major_at_k, pass_at_k

Votes = list[tuple[str | None, bool]]


def enumerated_major(votes: Votes, k: int) -> float:
    """Every subset, every tied winner, every voter of the winner."""
    won = []
    for subset in combinations(range(len(votes)), k):
        answers = [votes[i][0] for i in subset if votes[i][0] is not None]
        top = max((answers.count(a) for a in answers), default=0)
        winners = {a for a in answers if answers.count(a) == top}
        shares = [fmean(votes[i][1] for i in subset if votes[i][0] == winner) for winner in winners]
        won.append(fmean(shares) if shares else 0.0)
    return fmean(won)


@given(
    votes=st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.booleans()), min_size=1,
                   max_size=9),
    data=st.data(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_both_equal_enumeration(votes: Votes, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(votes)))
    assert major_at_k(votes, k) == pytest.approx(enumerated_major(votes, k), abs=1e-12)
    correct = [ok for _, ok in votes]
    passed = fmean(any(correct[i] for i in s) for s in combinations(range(len(votes)), k))
    assert pass_at_k(len(votes), sum(correct), k) == pytest.approx(passed, abs=1e-12)


def test_at_one_and_at_all_they_are_what_one_expects() -> None:
    votes: Votes = [("7", True)] * 3 + [("8", False)] * 4 + [(None, False)] * 25
    assert major_at_k(votes, 1) == pass_at_k(32, 3, 1) == 3 / 32
    assert major_at_k(votes, 32) == 0.0 and pass_at_k(32, 3, 32) == 1.0
    assert major_at_k([("7", True), ("8", False)], 2) == 0.5  # a tie


def test_major_at_32_of_32_different_answers_is_quick_and_exact() -> None:
    votes: Votes = [(str(i), i == 0) for i in range(32)]
    assert major_at_k(votes, 16) == pytest.approx(1 / 32, abs=1e-12)


def test_an_average_says_how_its_intervals_were_made() -> None:
    result = average([[True, False], [True, True], [False, False]])
    assert result.mean == 0.5
    assert "t over 3 problem means" in result.over_problems.method
    assert "6 samples" in result.over_samples.method
    assert result.over_samples.low < 0.5 < result.over_samples.high
    never = average([[False] * 4] * 30)
    assert (never.mean, never.over_problems.low) == (0.0, 0.0)
    assert 0.1 < never.over_problems.high < 0.13 and "Wilson" in never.over_problems.method


@pytest.mark.parametrize("success", [False, True])
def test_an_interval_holds_its_mean_where_no_spread_was_seen(success: bool) -> None:
    for problems in range(1, 200):
        result = average([[success] * 4] * problems)
        for interval in (result.over_problems, result.over_samples):
            assert interval.low <= result.mean <= interval.high


def test_the_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = random.Random(0)
    covered = {"problems": 0, "samples": 0}
    for _ in range(400):
        rates = [rng.betavariate(2, 3) for _ in range(30)]
        result = average([[rng.random() < rate for _ in range(8)] for rate in rates])
        covered["problems"] += result.over_problems.low <= 0.4 <= result.over_problems.high
        covered["samples"] += result.over_samples.low <= fmean(rates) <= result.over_samples.high
    assert all(0.91 <= count / 400 <= 0.985 for count in covered.values()), covered
