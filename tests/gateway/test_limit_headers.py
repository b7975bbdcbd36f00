"""How limits are told: the forms of times, and which of several limits is told."""

import pytest

from backends.dialect import MESSAGES
from gateway.limit_headers import limit_headers, refused_details, refused_headers, span_text
from gateway.limits_config import LimitConfig
from policies.limits.account import Account
from policies.limits.messages import Reading
from policies.verdict import Refused
from tests.support.builders import an_exchange


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0s"),
        (0, "0s"),
        (0.12, "120ms"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9996, "1m0s"),
        (60, "1m0s"),
        (359.2, "6m0s"),
        (3723, "1h2m3s"),
        (86_400 * 3, "72h0m0s"),
    ],
)
def test_times_are_written_as_openai_writes_them(seconds, text):
    assert span_text(seconds) == text


def account(used: int, held: int = 0, **written) -> Account:
    limit = LimitConfig(scope="key:*", **written).limit()
    made = Account(limit, "k1", 1_700_000_000_000_000)
    made.reading = Reading(used, held, 1_700_000_060_000_000)
    return made


def told(*accounts: Account, **fields) -> dict[str, str]:
    exchange = an_exchange(**fields)
    exchange.taken = [(one, 1) for one in accounts]
    return {name.decode(): value.decode() for name, value in limit_headers(exchange)}


def test_the_tightest_limit_of_a_measure_is_told():
    headers = told(account(10, tokens=1000, per="1m"), account(1900, 50, tokens=2000, per="1h"))
    assert headers["x-ratelimit-limit-tokens"] == "2000"
    assert headers["x-ratelimit-remaining-tokens"] == "50"
    assert "x-ratelimit-limit-requests" not in headers


def test_money_slots_and_kinds_of_tokens_have_no_openai_name():
    limits = (
        account(1, usd=1, per="day"),
        account(1, concurrent_requests=1),
        account(1, input_tokens=5, per="1m"),
    )
    assert told(*limits) == {}
    assert set(told(*limits, dialect=MESSAGES)) == {
        f"anthropic-ratelimit-input-tokens-{what}" for what in ("limit", "remaining", "reset")
    }


def test_a_soft_limit_is_told_only_when_it_is_passed():
    assert told(account(5, usd="0.00000001", per="day", soft=True)) == {}
    assert told(account(11, usd="0.00000001", per="day", soft=True)) == {
        "x-headgate-limit-warning": "money-day"
    }


def test_a_refusal_has_its_figures_and_no_name_of_whose_limit_it_is():
    refused = Refused(
        "money-month", "org", "secret", "money", 10**9, 5 * 10**8, 10**8 + 1, 5 * 10**8, 1_700_000_000.0
    )
    assert refused_details(refused) == {
        "name": "money-month",
        "level": "org",
        "measure": "usd",
        "amount": "1",
        "spent": "0.5",
        "reserved": "0.100000001",
        "requested": "0.5",
        "resets": "2023-11-14T22:13:20Z",
    }
    assert refused_headers("openai", refused) == []


def test_a_refused_rate_is_told_in_the_familys_headers():
    refused = Refused("requests-60s", "key", "k1", "requests", 60, 60, 0, 1, None)
    assert dict(refused_headers("openai", refused))[b"x-ratelimit-remaining-requests"] == b"0"
    assert dict(refused_headers("anthropic", refused))[b"anthropic-ratelimit-requests-limit"] == b"60"
