"""The policy that holds limits: `admit` reserves what a request may use, `settle` makes it what was used.

Synchronous over what the worker holds (`policies.limits.holding`). What cannot be had from there is in
`exchange.lacks`, and whoever runs the stages asks the store for it before the request goes on. What is in
`exchange.taken` is given back by `settle`, which runs however the request ended.
"""

from collections.abc import Callable
from typing import Final

import msgspec

from backends.dialect import RAW
from policies.exchange import Caller, Exchange
from policies.limits import estimate
from policies.limits.account import Account
from policies.limits.book import LimitBook, Member
from policies.limits.holding import Holding, Reservation
from policies.limits.refusals import not_metered, not_priced
from policies.policy import Policy
from policies.routing import Model
from policies.verdict import Denial

_MAX_PLANS: Final = 4096
_TOKENS: Final = frozenset({"tokens", "input_tokens", "output_tokens"})


class _Plan(msgspec.Struct, frozen=True):
    """What holds for a caller's requests to a model, worked out once."""

    accounts: tuple[Account, ...]
    has_tokens: bool
    has_money: bool
    is_strict: bool
    rates: tuple[int, int, int] | None = None  # of input, output and request, where they are always the same


_NOTHING: Final = _Plan((), has_tokens=False, has_money=False, is_strict=False)


class Limits(Policy):
    """`wake` is called when the store should hear from this worker soon."""

    def __init__(
        self,
        book: LimitBook,
        holding: Holding,
        wake: Callable[[], None] = lambda: None,
        *,
        default_output_tokens: int = estimate.DEFAULT_OUTPUT_TOKENS,
    ) -> None:
        self._book = book
        self._holding = holding
        self._wake = wake
        self._default_output_tokens = default_output_tokens
        self._has_more = book.has_end_users or book.has_tags
        self._plans: dict[tuple[Caller, str], _Plan] = {}
        self._generation = holding.generation

    def admit(self, exchange: Exchange, now: float) -> Denial | None:
        caller, model = exchange.caller, exchange.model
        if caller is None or model is None:
            return None
        holding = self._holding
        plan = self._plans.get((caller, model.name))
        if plan is None or self._generation != holding.generation:
            plan = self._remember(caller, model, now)
        if self._has_more:
            plan = self._with_more(plan, exchange, model, now)
        if not plan.accounts:
            return None
        units = self._units(plan, exchange, model)
        if isinstance(units, Denial):
            return units
        is_valid = now < holding.valid_until
        taken: list[Reservation] = []
        lacks: list[Reservation] = []
        for account in plan.accounts:
            asked = units[account.need]
            if not asked:
                continue
            account.asked += asked
            free = account.free - asked
            if (free >= 0 and is_valid) or account.is_soft:
                account.free = free
                taken.append((account, asked))
                if free < account.low and not account.is_touched:
                    holding.touch(account)
                    if not account.is_soft:
                        self._wake()
            else:
                lacks.append((account, asked))
                holding.touch(account)
        exchange.taken = taken
        exchange.lacks = lacks
        return None

    def settle(self, exchange: Exchange, now: float) -> None:
        del now
        taken = exchange.taken
        if not taken:
            return
        exchange.taken = ()
        used = _used(exchange)
        cached = 0 if exchange.usage is None else exchange.usage.cache_read_tokens
        received_us = int(exchange.received_time * 1e6)
        holding = self._holding
        is_urgent = False
        for account, reserved in taken:
            actual = used[account.need]
            if actual < 0:
                actual = reserved
            elif cached and account.discount_percent and actual:
                actual -= cached * account.discount_percent // 100
            account.settle(reserved, actual, received_us)
            if actual < reserved:
                # It comes back, and nobody else can have it before the store knows.
                if (reserved > account.slack or account.is_near) and not account.is_soft:
                    is_urgent = True
            elif account.is_rate:
                continue
            if not account.is_touched:
                holding.touch(account)
        if is_urgent:
            self._wake()

    def budget_used(self, exchange: Exchange) -> float:
        """How much of the caller's tightest budget is spent, by the store's last word: 1.0 is all. 0.0: has none, or is not known yet."""
        caller, model = exchange.caller, exchange.model
        if caller is None or model is None or self._generation != self._holding.generation:
            return 0.0
        plan = self._plans.get((caller, model.name), _NOTHING)
        budgets = [(a.reading, a.limit.amount) for a in plan.accounts if a.limit.measure == "money"]
        shares = (
            reading.spent / amount if amount else 1.0 for reading, amount in budgets if reading is not None
        )
        return max(shares, default=0.0)

    def _units(self, plan: _Plan, exchange: Exchange, model: Model) -> tuple[int, ...] | Denial:
        """What the request reserves of each measure, in the order of MEASURES."""
        if not (plan.has_tokens or plan.has_money):
            return (1, 0, 0, 0, 1, int(exchange.is_stream), 0)
        if exchange.dialect is RAW:
            return not_metered(exchange)
        given, answer = estimate.tokens(exchange, self._default_output_tokens, is_strict=plan.is_strict)
        money = 0
        rates = plan.rates
        if rates is not None and exchange.dialect.is_billed:
            money = -(-(given * rates[0] + answer * rates[1] + rates[2]) // estimate.MILLION)
        elif plan.has_money and exchange.dialect.is_billed:
            dearest = estimate.money_nanousd(exchange, model, given, answer, is_strict=plan.is_strict)
            if dearest is None:
                return not_priced(model)
            money = dearest
        return (1, given + answer, given, answer, 1, int(exchange.is_stream), money)

    def _remember(self, caller: Caller, model: Model, now: float) -> _Plan:
        if len(self._plans) >= _MAX_PLANS or self._generation != self._holding.generation:
            self._plans.clear()
            self._generation = self._holding.generation
        plan = self._plan(self._book.of_caller(caller, model.name), _NOTHING, model, now)
        self._plans[caller, model.name] = plan
        return plan

    def _with_more(self, plan: _Plan, exchange: Exchange, model: Model, now: float) -> _Plan:
        """The plan with the limits of whoever the request says it is for, and of its tags."""
        members = self._book.of_end_user(exchange.end_user, model.name) if exchange.end_user else []
        for tag in dict.fromkeys(exchange.tags):
            members += self._book.of_tag(tag, model.name)
        return self._plan(members, plan, model, now) if members else plan

    def _plan(self, members: list[Member], plan: _Plan, model: Model, now: float) -> _Plan:
        now_us = self._holding.now_us(now)
        limits = [limit for limit, _ in members]
        has_money = plan.has_money or any(limit.measure == "money" for limit in limits)
        is_strict = plan.is_strict or any(limit.is_exact for limit in limits)
        return _Plan(
            (*plan.accounts, *(self._holding.account(limit, who, now_us) for limit, who in members)),
            has_tokens=plan.has_tokens or any(limit.measure in _TOKENS for limit in limits),
            has_money=has_money,
            is_strict=is_strict,
            rates=estimate.flat_rates(model, is_strict=is_strict) if has_money else None,
        )


def _used(exchange: Exchange) -> tuple[int, ...]:
    """What was used of each measure, in the order of MEASURES, cached tokens at full weight; -1: as reserved."""
    if not exchange.dispatched_at:
        return (0, 0, 0, 0, 0, 0, 0)
    usage, cost_nanousd = exchange.usage, exchange.cost_nanousd
    if usage is None:
        # Nobody knows what it used: it stays at what was reserved, unless it cost nothing because nothing was done.
        return (1, 0, 0, 0, 0, 0, 0) if cost_nanousd == 0 else (1, -1, -1, -1, 0, 0, -1)
    given, answer = usage.prompt_tokens, usage.output_tokens
    return (1, given + answer, given, answer, 0, 0, -1 if cost_nanousd is None else cost_nanousd)


_: type[Policy] = Limits
