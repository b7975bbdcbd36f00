"""A few workers, one store, requests that come, go, fail and die with their worker: what must hold of limits, always.

A hypothesis state machine on the policy and the holders' side as the product runs them, over any store. What was
used is kept a second time, without any of the product's arithmetic; the two are compared after every step.
Nothing may be over-admitted, no refund lost, and at the end the store knows what was spent to the unit, in whatever
order it happened.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from backends.dialect import CHAT
from backends.usage import Usage
from policies.exchange import Caller, Exchange
from policies.limits.book import LimitBook
from policies.limits.holding import Holding
from policies.limits.limit import Limit, Scope, Window
from policies.limits.messages import Counter, Reading, Reply, Update
from policies.limits.policy import Limits
from policies.prices import Price
from policies.rate_card import STANDARD, Period, RateCard, Rates
from policies.routing import Model, Target

TTL_S = 10.0
WORKERS = 3
START_S = 1_800_000_000  # a Friday morning, UTC
WINDOW_S = 60
REQUESTS, TOKENS, SLOTS, STREAMS, MONEY = 12, 1100, 6, 3, 25_000
LIMITS = (
    Limit("requests", Scope("key"), "requests", REQUESTS, Window("rate", WINDOW_S), burst=6),
    Limit("tokens", Scope("team"), "tokens", TOKENS, Window("rolling", WINDOW_S)),
    Limit("slots", Scope("team"), "concurrent_requests", SLOTS, Window("now")),
    Limit("streams", Scope("key"), "concurrent_streams", STREAMS, Window("now")),
    Limit("money", Scope("org"), "money", MONEY, Window("total")),
)
# A nano-dollar per token of input, ten per token of output.
_RATES = Rates(*[1_000_000] * 4, *[10_000_000] * 2, 1_000_000, 1_000_000, 10_000_000)
_PRICE = Price("known", "test", RateCard([Period(0.0, 0.0, {STANDARD: ((-1, _RATES),)})]))


class Store(Protocol):
    """A store and its clock. `wait` None: its time cannot be set, and the machine lets none pass."""

    wait: Callable[[float], None] | None

    def apply(self, update: Update) -> Reply: ...

    def look(self, counters: Sequence[Counter]) -> tuple[int, list[Reading]]: ...

    def close(self) -> None: ...


class _Use(msgspec.Struct):
    """A request that was admitted, as its caller knows it."""

    exchange: Exchange
    worker: "_Worker"
    at_s: float
    reserved_tokens: int
    reserved_nanousd: int


class _Worker:
    def __init__(self, name: Callable[[], str], over_admission: float) -> None:
        self.holding = Holding(name, over_admission=over_admission, ttl_us=int(TTL_S * 1e6))
        self.policy = Limits(LimitBook(LIMITS), self.holding)
        self.waiting: list[Exchange] = []
        self.asked: list[Exchange] = []


def machine(open_store: Callable[[], Store], *, over_admission: float) -> type[RuleBasedStateMachine]:
    """The machine over stores that `open_store` makes."""

    class LimitsMachine(_LimitsMachine):
        def __init__(self) -> None:
            super().__init__(open_store(), over_admission)

    return LimitsMachine


class _LimitsMachine(RuleBasedStateMachine):
    def __init__(self, store: Store, over_admission: float) -> None:
        super().__init__()
        self.store = store
        self.over_admission = over_admission
        self.now_s = 1000.0  # of every worker's monotonic clock
        self.names = (f"w{number}" for number in itertools.count())
        self.workers = [_Worker(lambda: next(self.names), over_admission) for _ in range(WORKERS)]
        self.ids = itertools.count()
        self.callers = [Caller(f"k{n}", f"k{n}", team="t", organisation="o") for n in range(2)]
        self.model = Model("m", (Target("t", None, "m", _PRICE),))  # type: ignore[arg-type] - it is never sent
        self.running: list[_Use] = []
        self.sent: dict[str, deque[float]] = {caller.key_id: deque() for caller in self.callers}
        self.spent: deque[tuple[float, int]] = deque()  # tokens, by when the request ended
        self.spent_nanousd = 0
        self.beyond = self.beyond_nanousd = 0  # used by requests beyond what they had reserved
        self.slots_beyond = 0
        self.lost_nanousd = 0  # may have died with a worker, untold
        self.lost_tokens = 0

    # what happens

    @rule(
        worker=st.integers(0, WORKERS - 1),
        arrivals=st.lists(
            st.tuples(st.integers(0, 1), st.integers(1, 400), st.integers(1, 400), st.booleans()),
            min_size=1,
            max_size=4,
        ),
        asks_at_once=st.sampled_from((True, True, True, False)),
    )
    def come(self, worker: int, arrivals: list[tuple[int, int, int, bool]], asks_at_once: bool) -> None:
        """Requests by key, bytes of body, tokens of answer, and whether they stream."""
        one = self.workers[worker]
        for arrival in arrivals:
            self._come(one, *arrival)
        if asks_at_once:
            self._settle_talk(one)

    def _come(self, one: "_Worker", key: int, body: int, answer: int, is_stream: bool) -> None:
        exchange = Exchange(
            request_id=str(next(self.ids)),
            dialect=CHAT,
            received_at=self.now_s,
            received_time=START_S + self.now_s,
            caller=self.callers[key],
            model=self.model,
            model_name="m",
            body_bytes=body,
            max_tokens=answer,
            is_stream=is_stream,
        )
        assert one.policy.admit(exchange, self.now_s) is None
        if exchange.lacks:
            one.waiting.append(exchange)
        else:
            self._admitted(one, exchange)

    @rule(worker=st.integers(0, WORKERS - 1), is_lost=st.booleans())
    def talk(self, worker: int, is_lost: bool) -> None:
        """An update, or the repetition of one; its answer may be lost."""
        one = self.workers[worker]
        holding = one.holding
        if holding.sent is None:
            one.asked, one.waiting = one.waiting, []
            holding.compose([tuple(exchange.lacks) for exchange in one.asked], self.now_s)
        assert holding.sent is not None
        reply = self.store.apply(holding.sent)
        if is_lost:
            return
        self._hear(one, reply)

    @precondition(lambda self: self.running)
    @rule(
        pick=st.integers(0, 99),
        part=st.sampled_from((0, 30, 100, 100)),
        beyond=st.sampled_from((0, 0, 0, 50)),
    )
    def end(self, pick: int, part: int, beyond: int) -> None:
        """A request ends, having used a part of what it reserved, or all and more."""
        use = self.running.pop(pick % len(self.running))
        exchange = use.exchange
        given = exchange.body_bytes * part // 400
        assert exchange.max_tokens is not None
        output = exchange.max_tokens * part // 100 + beyond
        exchange.usage = Usage(input_tokens=given, output_tokens=output)
        exchange.cost_nanousd = given + 10 * output
        use.worker.policy.settle(exchange, self.now_s)
        self.spent.append((self.now_s, given + output))
        self.spent_nanousd += exchange.cost_nanousd
        self.beyond += max(0, given + output - use.reserved_tokens)
        self.beyond_nanousd += max(0, exchange.cost_nanousd - use.reserved_nanousd)

    @precondition(lambda self: self.running)
    @rule(pick=st.integers(0, 99))
    def fail(self, pick: int) -> None:
        """The upstream refused: nothing was used but the request itself."""
        use = self.running.pop(pick % len(self.running))
        use.exchange.cost_nanousd = 0
        use.worker.policy.settle(use.exchange, self.now_s)

    @precondition(lambda self: self.store.wait is not None)
    @rule(seconds=st.sampled_from((0.01, 0.3, 1.0, 4.0, 20.0)))
    def wait(self, seconds: float) -> None:
        self._pass(seconds)

    def _pass(self, seconds: float) -> None:
        assert self.store.wait is not None
        while seconds > 0:
            step = min(seconds, TTL_S / 3)
            seconds -= step
            self.store.wait(step)
            self.now_s += step
            for one in self.workers:
                one.holding.tell_all()
                self._settle_talk(one)

    @rule(worker=st.integers(0, WORKERS * 3))
    def die(self, worker: int) -> None:
        """kill -9. Its requests are gone; what it had not told is lost until the ledger is asked."""
        if worker >= WORKERS:
            return
        dead = self.workers[worker]
        tokens, nanousd = _untold(dead)
        self.lost_tokens += tokens
        self.lost_nanousd += nanousd
        self.running = [use for use in self.running if use.worker is not dead]
        self.workers[worker] = _Worker(lambda: next(self.names), self.over_admission)

    @precondition(lambda self: self.store.wait is not None)
    @rule(worker=st.integers(0, WORKERS - 1))
    def freeze(self, worker: int) -> None:
        """Not heard of for so long that what it holds is given to others: that much may be used twice."""
        theirs = [use for use in self.running if use.worker is self.workers[worker]]
        tokens, nanousd = _untold(self.workers[worker])
        self.beyond += tokens + sum(use.reserved_tokens for use in theirs)
        self.beyond_nanousd += nanousd + sum(use.reserved_nanousd for use in theirs)
        self.slots_beyond += len(theirs)
        frozen = self.workers.pop(worker)
        self._pass(TTL_S + 1)
        self.workers.insert(worker, frozen)

    # what must hold

    @invariant()
    def nothing_is_over_admitted(self) -> None:
        since_s = self.now_s - WINDOW_S
        while self.spent and self.spent[0][0] <= since_s:
            self.spent.popleft()
        tokens = sum(tokens for _, tokens in self.spent) + sum(use.reserved_tokens for use in self.running)
        assert tokens <= TOKENS + self.beyond + self.lost_tokens
        money = self.spent_nanousd + sum(use.reserved_nanousd for use in self.running)
        assert money <= MONEY + self.beyond_nanousd + self.lost_nanousd
        assert len(self.running) <= SLOTS + self.slots_beyond
        for caller in self.callers:
            streams = [u for u in self.running if u.exchange.is_stream and u.exchange.caller is caller]
            assert len(streams) <= STREAMS + self.slots_beyond
            self._rate_holds(self.sent[caller.key_id])

    def _rate_holds(self, times: deque[float]) -> None:
        while times and times[0] < self.now_s - WINDOW_S:
            times.popleft()
        newest = list(times)
        for number, since_s in enumerate(newest):
            admitted = len(newest) - number
            refilled = (self.now_s - since_s) * REQUESTS / WINDOW_S
            assert admitted <= 6 + refilled + self.over_admission * REQUESTS + 1e-6

    def teardown(self) -> None:
        try:
            for one in self.workers:
                self._settle_talk(one)  # whoever waits is told
            for use in self.running:
                use.exchange.cost_nanousd = 0
                use.worker.policy.settle(use.exchange, self.now_s)
            for one in self.workers:
                self._settle_talk(one)
            if self.store.wait is not None:
                self._pass(TTL_S + 5)  # for those who died, and for slack nobody asks for
                assert [reading.held for reading in self._look()] == [0] * len(LIMITS), "held for nobody"
            for one in self.workers:
                self._settle_talk(one, is_last=True)
            told = self._look()[-1].spent
            assert self.spent_nanousd - self.lost_nanousd <= told <= self.spent_nanousd
        finally:
            self.store.close()

    def _look(self) -> list[Reading]:
        return self.store.look([_counter(limit) for limit in LIMITS])[1]

    def _settle_talk(self, one: _Worker, *, is_last: bool = False) -> None:
        """A whole conversation: what waits is asked and answered."""
        holding = one.holding
        if holding.sent is not None:
            self._hear(one, self.store.apply(holding.sent))
        if holding.sent is not None:
            self._hear(one, self.store.apply(holding.sent))
        one.asked, one.waiting = one.waiting, []
        holding.compose([tuple(exchange.lacks) for exchange in one.asked], self.now_s, is_last=is_last)
        while holding.sent is not None:
            self._hear(one, self.store.apply(holding.sent))

    def _hear(self, one: _Worker, reply: Reply) -> None:
        outcomes = one.holding.take_in(reply, self.now_s)
        if outcomes is None:
            return
        for exchange, outcome in zip(one.asked, outcomes, strict=True):
            if outcome is None:
                exchange.taken = (*exchange.taken, *exchange.lacks)
                self._admitted(one, exchange)
            else:
                one.policy.settle(exchange, self.now_s)
        one.asked = []

    def _admitted(self, one: _Worker, exchange: Exchange) -> None:
        exchange.dispatched_at = self.now_s
        reserved = {account.limit.name: units for account, units in exchange.taken}
        assert exchange.caller is not None
        self.sent[exchange.caller.key_id].append(self.now_s)
        self.running.append(_Use(exchange, one, self.now_s, reserved["tokens"], reserved["money"]))


def _untold(worker: _Worker) -> tuple[int, int]:
    """Tokens and money that ended requests used and the store may not know of."""
    told = [(account.counter.key, account.unposted_units) for account in worker.holding.accounts.values()]
    update = worker.holding.sent
    if update is not None:
        told += [(update.counters[index].key, units) for index, _, units in update.posts]
    return (
        sum(units for key, units in told if key.endswith("tokens")),
        sum(units for key, units in told if key.endswith("money")),
    )


def _counter(limit: Limit) -> Counter:
    member = {"key": "k0", "team": "t", "org": "o"}[limit.scope.level]
    return limit.counter(member, START_S * 1_000_000)


def settings(**overrides: Any) -> dict[str, Any]:
    """How long a machine runs; `HEADGATE_TEST_EXAMPLES=1000` for a long one."""
    examples = int(os.environ.get("HEADGATE_TEST_EXAMPLES", "40"))
    return {"max_examples": examples, "stateful_step_count": 30, "deadline": None} | overrides
