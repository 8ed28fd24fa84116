"""Verdicts at, above and below each threshold."""

from __future__ import annotations

import pytest

from mlssl.report.verdicts import has_collapsed, is_learning, waits_for_data


@pytest.mark.parametrize(
    ("start", "end", "state"),
    [(0.30, 0.40, "good"), (0.30, 0.311, "good"), (0.300, 0.309, "unsure"), (0.3, 0.3, "bad"), (0.3, 0.2, "bad")],
)
def test_a_probe_that_rises_by_more_than_a_hundredth_says_that_it_learns(start, end, state):
    verdict = is_learning(start, end, 0.0, 0.0, 100)
    assert verdict.state == state
    assert f"{start:.3f}" in verdict.reason
    assert f"{end:.3f}" in verdict.reason


@pytest.mark.parametrize(("gaps", "state"), [((0.0, 0.5), "good"), ((0.0, 0.1), "good"), ((0.3, 0.35), "unsure")])
def test_without_labels_the_views_decide(gaps, state):
    verdict = is_learning(None, None, *gaps, 100)
    assert verdict.state == state
    assert "Without labels" in verdict.reason


@pytest.mark.parametrize(
    ("spread", "rank", "state"),
    [(0.9, 50, "good"), (0.4, 50, "unsure"), (0.19, 50, "bad"), (0.9, 1.9, "bad"), (0.0, 1.0, "bad")],
)
def test_low_spread_or_rank_is_a_collapse_and_says_what_to_change(spread, rank, state):
    verdict = has_collapsed(spread, rank, 64, 100)
    assert verdict.state == state
    assert ("stop_gradient" in verdict.reason) == (state == "bad")


@pytest.mark.parametrize(
    ("data", "step", "state"),
    [(0.6, 0.4, "bad"), (0.3, 0.7, "unsure"), (0.1, 0.9, "good"), (None, None, "unsure"), (0.0, 0.0, "unsure")],
)
def test_the_fraction_of_waiting_time_decides(data, step, state):
    assert waits_for_data(data, step, 100.0).state == state


def test_before_a_hundred_steps_it_is_too_early_to_say_unless_it_has_collapsed():
    for verdict in (
        is_learning(0.3, 0.5, 0.0, 0.0, 99),
        is_learning(0.3, 0.2, 0.0, 0.0, 99),
        is_learning(None, None, 0.0, 0.5, 99),
        has_collapsed(0.9, 50, 64, 99),
    ):
        assert (verdict.state, verdict.answer) == ("unsure", "Too early to say.")
        assert "The run took only 99 steps; a verdict needs at least 100." in verdict.reason
    assert has_collapsed(0.1, 50, 64, 3).state == "bad"
