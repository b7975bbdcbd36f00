"""How limits are written."""

import pytest
from pydantic import ValidationError

from gateway.limits_config import CallerLimitsConfig, LimitConfig, scope_of
from policies.limits.limit import Limit, Scope, Window


def limit(**written) -> Limit:
    return LimitConfig(**{"scope": "team:research", **written}).limit()


@pytest.mark.parametrize(
    ("written", "name", "measure", "amount", "window"),
    [
        ({"requests": 60, "per": "1m"}, "requests-60s", "requests", 60, Window("rate", 60)),
        ({"requests": 9, "per": "day"}, "requests-day", "requests", 9, Window("day")),
        ({"tokens": 100, "per": "60s"}, "tokens-60s", "tokens", 100, Window("rolling", 60)),
        (
            {"input_tokens": 1, "per": "5h"},
            "input-tokens-18000s",
            "input_tokens",
            1,
            Window("rolling", 18_000),
        ),
        ({"usd": 0.05, "per": "30d"}, "money-2592000s", "money", 50_000_000, Window("rolling", 2_592_000)),
        (
            {"usd": "1.000000001", "per": "month", "zone": "Europe/Berlin"},
            "money-month",
            "money",
            1_000_000_001,
            Window("month", zone="Europe/Berlin"),
        ),
        ({"usd": 5, "per": "ever"}, "money-total", "money", 5_000_000_000, Window("total")),
        ({"concurrent_streams": 3}, "concurrent-streams", "concurrent_streams", 3, Window("now")),
    ],
)
def test_a_limit_is_what_was_written(written, name, measure, amount, window):
    made = limit(**written)
    assert (made.name, made.measure, made.amount, made.window) == (name, measure, amount, window)
    assert made.scope == Scope("team", "research")


def test_the_settings_of_a_limit():
    made = limit(
        tokens=5, per="1m", cached_weight=0.1, soft=True, exact=True, when_away="closed", models=["gpt-*"]
    )
    assert (made.cached_weight_percent, made.warns_only, made.is_exact) == (10, True, True)
    assert (made.when_away, made.models) == ("closed", ("gpt-*",))
    assert limit(requests=5, per="1m", burst=2, name="mine").burst == 2


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ({}, "exactly one of"),
        ({"requests": 1, "tokens": 1, "per": "1m"}, "exactly one of"),
        ({"requests": 1}, "needs per"),
        ({"concurrent_requests": 1, "per": "1m"}, "leave out per"),
        ({"requests": 1, "per": "0s"}, "per is a time"),
        ({"requests": 1, "per": "year"}, "per is a time"),
        ({"requests": 1, "per": "400d"}, "per is a time"),
        ({"tokens": 1, "per": "1m", "burst": 1}, "burst is for requests"),
        ({"requests": 1, "per": "1m", "cached_weight": 0.5}, "cached_weight is for tokens"),
        ({"usd": "0.0000000001", "per": "day"}, "decimal places"),
        ({"usd": 9_000_001, "per": "day"}, "less than or equal"),
        ({"usd": 1, "per": "day", "zone": "Mars/Olympus"}, "no time zone"),
        ({"usd": 1, "per": "day", "scope": "planet:mars"}, "a scope is written"),
        ({"usd": 1, "per": "day", "scope": "team:a*"}, "names one, or everybody"),
        ({"usd": 1, "per": "day", "name": "a b"}, "a limit's name"),
        ({"usd": 1, "per": "day", "models": ["g*t"]}, "may stand only at the end"),
    ],
)
def test_what_is_no_limit_says_why(written, problem):
    with pytest.raises(ValidationError, match=problem):
        limit(**written)


def test_a_limit_written_as_json_reads_back_the_same():
    written = LimitConfig(
        scope="key:*", usd="0.000000001", per="week", zone="Asia/Tokyo", models=["a"], soft=True
    )
    assert LimitConfig.model_validate_json(written.model_dump_json(exclude_unset=True)) == written


def test_two_limits_of_one_scope_need_two_names():
    rule = {"scope": "key:*", "usd": 1, "per": "day"}
    with pytest.raises(ValidationError, match="give one a name"):
        CallerLimitsConfig(rules=[rule, {**rule, "models": ["gpt-5"]}])
    assert CallerLimitsConfig(rules=[rule, {**rule, "name": "gpt"}])


def test_a_declared_keys_name_stands_for_its_id():
    rules = [{"scope": f"key:{name}", "usd": 1, "per": "day"} for name in ("ci", "aB3dE6gH", "*")]
    made = CallerLimitsConfig(rules=rules).declared({"ci": "config:ci"})
    assert [limit.scope.name for limit in made] == ["config:ci", "aB3dE6gH", "*"]


def test_names_with_colons_belong_to_the_scope():
    assert scope_of("key:config:ci") == Scope("key", "config:ci")
