import pytest

from backends.errors import UpstreamError
from policies.retry import BACKOFF_S, RetryBudget, backoff_s, may_retry


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 529])
def test_an_overloaded_or_broken_upstream_gets_one_other_candidate_tried(status):
    assert may_retry(1, status)
    assert not may_retry(2, status)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422])
def test_a_refused_request_is_not_sent_again(status):
    assert not may_retry(1, status)


def test_connecting_may_be_tried_once_more_because_nothing_was_sent():
    assert may_retry(2, UpstreamError("connect", "refused"))
    assert not may_retry(3, UpstreamError("connect", "refused"))
    assert not may_retry(2, UpstreamError("reset", "gone"))


def test_a_request_out_of_time_is_not_tried_again():
    assert not may_retry(1, UpstreamError("total_timeout", "too long"))


def test_the_pause_before_another_attempt_is_full_jitter_under_a_bound_that_doubles():
    assert [backoff_s(1, draw) for draw in (0.0, 0.5, 1.0)] == [0.0, BACKOFF_S / 2, BACKOFF_S]
    assert backoff_s(2, 1.0) == 2 * BACKOFF_S


def test_retries_stay_under_a_fifth_of_the_traffic_but_three_are_always_there():
    budget = RetryBudget()
    budget.count(100.0)
    assert [budget.take(100.0) for _ in range(4)] == [True, True, True, False]
    for _ in range(99):
        budget.count(101.0)
    assert sum(budget.take(101.5) for _ in range(50)) == 17


def test_what_is_older_than_ten_seconds_is_neither_credit_nor_debt():
    budget = RetryBudget()
    for _ in range(1000):
        budget.count(100.0)
    assert all(budget.take(109.0) for _ in range(200))
    assert not budget.take(109.0)
    assert sum(budget.take(110.0) for _ in range(50)) == 0  # the debt is younger than its credit was
    assert sum(budget.take(119.0) for _ in range(50)) == 3
    assert sum(budget.take(1e6) for _ in range(50)) == 3


def test_an_outage_costs_a_fifth_more_requests_at_most():
    budget, attempts = RetryBudget(), 0
    for request in range(60 * 50):
        now = 1000 + request / 50
        budget.count(now)
        attempts += 1 + budget.take(now)
    assert attempts / 3000 <= 1.2
