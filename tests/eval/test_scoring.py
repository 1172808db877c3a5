"""Scores against known values."""

from __future__ import annotations

import pytest

from lowcontext.eval import contains_all, exact_match, wilson_interval


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (1, 10, 0.0179, 0.4042),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_agree_with_published_ones(
    correct: int, total: int, low: float, high: float
) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5.1e-5)


def test_no_trials_tell_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("correct", "total"), [(-1, 5), (6, 5)])
def test_impossible_counts_are_refused(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match=r"correct: expected 0..5, got"):
        wilson_interval(correct, total)


def test_exact_match_ignores_case_space_and_the_final_stop_only() -> None:
    assert exact_match("  Velora\n12. ", "velora 12")
    assert not exact_match("velora 123", "velora 12")
    assert not exact_match("it is velora 12", "velora 12")
    assert not exact_match("", "1")


def test_contains_all_wants_every_answer_as_a_word_of_its_own() -> None:
    assert contains_all("They are 417, and 902.", ["902", "417"])
    assert not contains_all("They are 417 and 90.", ["902", "417"])
    assert not contains_all("4179", ["417"])
    assert contains_all("the a+b one", ["A+B"])


def test_contains_all_refuses_to_be_asked_for_nothing() -> None:
    with pytest.raises(ValueError, match="expected: expected at least one answer"):
        contains_all("anything", [])
