"""What a request reserves, and what becomes of it when the request has ended."""

from typing import Any

import pytest

from backends.dialect import CHAT, COUNT_TOKENS, EMBEDDINGS, RAW, Dialect
from backends.usage import Usage
from policies.exchange import Caller, Exchange
from policies.limits.book import LimitBook
from policies.limits.holding import Holding
from policies.limits.limit import Limit, Measure, Scope, Window
from policies.limits.policy import Limits
from policies.price_config import PriceConfig
from policies.prices import FREE, UNKNOWN, Price, PriceBook
from policies.routing import Model, Target
from tests.support.limit_memory import START_US, MemoryStore

NOW = 50.0
CALLER = Caller("k1", "ci", team="research", organisation="acme", tags=("night",))
PRICE = PriceBook().price(None, "m", PriceConfig.model_validate({"input": 1, "output": 10}))
DEARER = PriceBook().price(None, "m", PriceConfig.model_validate({"input": 2, "output": 20}))


def model(*prices: Price, name: str = "m") -> Model:
    return Model(name, tuple(Target("t", None, "m", price) for price in prices or (PRICE,)))


def exchange(dialect: Dialect = CHAT, **fields: Any) -> Exchange:
    given = {"caller": CALLER, "model": model(), "body_bytes": 400, "max_tokens": 50, "tags": CALLER.tags}
    return Exchange("r1", dialect, NOW, START_US / 1e6, **(given | fields))


def limit(measure: Measure, amount: int = 10**12, **fields: Any) -> Limit:
    span = "now" if measure.startswith("concurrent") else "total"
    given = {"name": measure, "scope": Scope("key"), "window": Window(span)}
    return Limit(measure=measure, amount=amount, **(given | fields))


class Run:
    """A policy with one worker's holding over the store in memory."""

    def __init__(self, *limits: Limit) -> None:
        self.store = MemoryStore()
        self.wakes = 0
        self.holding = Holding(lambda: "w")
        self.holding.set_time(self.store.now_us, NOW)
        self.policy = Limits(LimitBook(limits), self.holding, self._woken)

    def _woken(self) -> None:
        self.wakes += 1

    def admit(self, request: Exchange) -> Any:
        """None when it was admitted, by the store if need be; else the Denial or the refusing account's limit."""
        denial = self.policy.admit(request, NOW)
        if denial is not None or not request.lacks:
            return denial
        self.holding.compose([tuple(request.lacks)], NOW)
        (outcome,) = self.holding.take_in(self.store.apply(self.holding.sent), NOW)
        if outcome is not None:
            return outcome[0].limit
        request.taken = (*request.taken, *request.lacks)
        return None

    def reserved(self, request: Exchange) -> dict[str, int]:
        assert self.admit(request) is None
        return {account.limit.name: units for account, units in request.taken}

    def used(self, request: Exchange, **ended: Any) -> dict[str, int]:
        """What is posted of each limit after a request that ended so."""
        assert self.admit(request) is None
        for name, value in {"dispatched_at": NOW, **ended}.items():
            setattr(request, name, value)
        self.policy.settle(request, NOW)
        return {a.limit.name: a.unposted_units for a in self.holding.accounts.values()}

    def held(self) -> dict[str, int]:
        return {a.limit.name: a.committed for a in self.holding.accounts.values() if not a.is_rate}


def test_a_request_reserves_of_each_measure_what_it_may_use() -> None:
    measures = ("requests", "tokens", "input_tokens", "output_tokens", "concurrent_requests", "money")
    run = Run(*map(limit, measures), limit("concurrent_streams"))
    assert run.reserved(exchange()) == {
        "requests": 1,
        "tokens": 111 + 50,
        "input_tokens": 111,  # four bytes a token, and a tenth
        "output_tokens": 50,
        "concurrent_requests": 1,
        "money": 111 * 1000 + 50 * 10_000,
    }
    assert run.reserved(exchange(is_stream=True))["concurrent_streams"] == 1


def test_an_exact_limit_makes_every_byte_a_token() -> None:
    assert Run(limit("input_tokens", is_exact=True)).reserved(exchange()) == {"input_tokens": 400}


def test_what_says_no_length_reserves_the_default_and_several_answers_as_many() -> None:
    run = Run(limit("output_tokens"))
    assert run.reserved(exchange(max_tokens=None)) == {"output_tokens": 1024}
    assert run.reserved(exchange(choices=3)) == {"output_tokens": 150}
    assert run.reserved(exchange(EMBEDDINGS, max_tokens=None)) == {}


def test_money_is_reserved_at_the_dearest_target() -> None:
    run = Run(limit("money"))
    dearest = exchange(model=model(PRICE, UNKNOWN, DEARER))
    assert run.reserved(dearest) == {"money": 2 * (111 * 1000 + 50 * 10_000)}
    assert run.reserved(exchange(model=model(FREE, name="free"))) == {}


def test_without_a_price_a_budget_says_no_and_counting_tokens_costs_nothing() -> None:
    run = Run(limit("money"))
    assert run.admit(exchange(model=model(UNKNOWN, name="unknown"))).code == "price_unknown"
    assert run.reserved(exchange(COUNT_TOKENS)) == {}


def test_what_is_passed_through_unread_cannot_be_used_under_a_budget_but_under_a_rate() -> None:
    assert Run(limit("tokens")).admit(exchange(RAW)).code == "not_metered"
    assert Run(limit("requests")).reserved(exchange(RAW)) == {"requests": 1}


def test_settlement_posts_what_was_used_and_frees_the_slot() -> None:
    run = Run(*map(limit, ("tokens", "input_tokens", "output_tokens", "money", "concurrent_requests")))
    usage = Usage(input_tokens=10, cache_read_tokens=90, output_tokens=7)
    assert run.used(exchange(), usage=usage, cost_nanousd=123) == {
        "tokens": 107,
        "input_tokens": 100,
        "output_tokens": 7,
        "money": 123,
        "concurrent_requests": 0,
    }
    assert not any(run.held().values())


def test_cached_tokens_may_weigh_less_and_are_not_counted_twice() -> None:
    run = Run(limit("tokens", cached_weight_percent=10))
    usage = Usage(input_tokens=10, cache_read_tokens=90, output_tokens=7)
    assert run.used(exchange(), usage=usage, cost_nanousd=1) == {"tokens": 10 + 9 + 7}


def test_a_request_that_was_never_sent_used_nothing_not_even_itself() -> None:
    rate = limit("requests", amount=60, window=Window("rate", 60))
    run = Run(rate, limit("money"))
    assert run.used(exchange(), dispatched_at=0.0, cost_nanousd=0)["money"] == 0
    account = next(a for a in run.holding.accounts.values() if a.is_rate)
    assert account.free == 1


def test_an_upstream_that_failed_used_the_request_and_no_money() -> None:
    run = Run(limit("requests"), limit("tokens"), limit("money"))
    assert run.used(exchange(), cost_nanousd=0) == {"requests": 1, "tokens": 0, "money": 0}


def test_usage_that_nobody_told_stays_at_what_was_reserved() -> None:
    run = Run(limit("tokens"), limit("money"), limit("concurrent_requests"))
    assert run.used(exchange()) == {"tokens": 161, "money": 611_000, "concurrent_requests": 0}


def test_settle_gives_back_once() -> None:
    run = Run(limit("money"))
    request = exchange()
    run.used(request, usage=Usage(output_tokens=1), cost_nanousd=10)
    run.policy.settle(request, NOW)
    assert [a.unposted_units for a in run.holding.accounts.values()] == [10]


def test_every_level_of_a_request_is_asked_and_the_narrowest_refuses() -> None:
    scopes = [
        Scope("org", "acme"),
        Scope("team", "research"),
        Scope("key"),
        Scope("model", "m"),
        Scope("user"),
        Scope("tag", "night"),
    ]
    limits = [limit("tokens", name=scope.level, scope=scope) for scope in scopes]
    run = Run(*limits, limit("requests", 0, name="none", scope=Scope("tag", "day")))
    request = exchange(end_user="acme/ada")
    assert list(run.reserved(request)) == ["org", "team", "key", "model", "user", "tag"]
    refused = run.admit(exchange(tags=("night", "day")))
    assert refused.name == "none"


def test_a_limit_of_some_models_counts_those_only() -> None:
    run = Run(limit("requests", models=("big/*", "m")))
    assert run.reserved(exchange()) == {"requests": 1}
    assert run.reserved(exchange(model=model(name="big/one"))) == {"requests": 1}
    assert run.reserved(exchange(model=model(name="small"))) == {}


def test_the_limit_of_a_name_comes_before_that_of_everybody() -> None:
    run = Run(limit("requests", 0), limit("requests", 5, scope=Scope("key", "ci")))
    assert run.reserved(exchange()) == {"requests": 1}
    assert run.admit(exchange(caller=Caller("k2", "other"))) is not None


def test_the_store_is_woken_when_others_wait_for_what_comes_back() -> None:
    run = Run(limit("concurrent_requests", 2))
    request = exchange()
    run.admit(request)
    assert run.wakes == 0
    run.policy.settle(request, NOW)
    assert run.wakes == 1


def test_nobody_is_woken_for_what_does_not_come_back() -> None:
    rate = limit("requests", amount=60, window=Window("rate", 60))
    soft = limit("concurrent_requests", 2, warns_only=True)
    for one in (rate, soft):
        run = Run(one)
        run.used(exchange(), cost_nanousd=0)
        assert run.wakes == 0


def test_slack_is_not_used_once_the_store_may_have_given_it_to_others() -> None:
    run = Run(limit("requests"))
    assert run.admit(exchange()) is None
    (account,) = run.holding.accounts.values()
    account.held += 10
    account.free += 10
    late = exchange()
    run.policy.admit(late, run.holding.valid_until - 0.01)
    assert not late.lacks
    late = exchange()
    run.policy.admit(late, run.holding.valid_until)
    assert late.lacks


@pytest.mark.parametrize("field", ["caller", "model"])
def test_what_access_refuses_is_nothing_to_limits(field) -> None:
    assert Run(limit("requests", 0)).policy.admit(exchange(**{field: None}), NOW) is None
