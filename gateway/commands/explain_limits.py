"""What limits would say to a request that `headgate explain` makes up: the policy itself, over where the store stands.

Reads the store and takes nothing. Without a store, because the gateway was never started, nothing is spent.
"""

import time
from typing import Any, Final

from gateway.commands.storage import Storage, opened
from gateway.config import Config
from gateway.limit_lifecycle import amount_text, per_text
from gateway.limits_config import scope_text
from gateway.reconcile import counting_store
from gateway.stores.limit_sqlite import DATABASE_NAME as LIMITS_NAME
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.sqlite import DATABASE_NAME, StorageError
from gateway.tenants import Stored, Tenants, merged
from policies.exchange import Exchange
from policies.limits.account import Account
from policies.limits.book import LimitBook
from policies.limits.holding import Holding
from policies.limits.limit import Scope
from policies.limits.messages import Reading, Refusal
from policies.limits.policy import Limits
from policies.limits.refusals import refuse
from policies.rules.facts import BudgetUsed
from policies.verdict import Denial

_NOTHING: Final = Reading(0, 0, 0)


def tenants_of(config: Config, storage: Storage) -> Tenants:
    """Teams and limits in force; those of the configuration alone while there is no database."""
    stored = Stored([], [], [])
    if (storage.directory / DATABASE_NAME).exists():
        with opened(storage, may_write=False) as connection:
            stored = Stored.of(connection, time.time())
    return merged(config.declared(), stored)


class LimitsExplained:
    """The policy for one made-up request, and what the store says to what it asks for."""

    def __init__(self, config: Config, tenants: Tenants) -> None:
        self._config = config
        self._holding = Holding(lambda: "explain")
        self._holding.set_time(time.time_ns() // 1000, 0.0)
        self.policy: Limits | None = None
        if tenants.limits:
            self.policy = Limits(
                LimitBook(tenants.limits),
                self._holding,
                default_output_tokens=config.limits.output_tokens,
            )

    async def budget_used(self, exchange: Exchange) -> BudgetUsed | None:
        """What rules are told of budgets, for the model asked for."""
        if self.policy is None:
            return None
        self.policy.admit(exchange, 0.0)
        await self.judged(exchange)
        self.policy.settle(exchange, 0.0)
        exchange.lacks = ()
        return self.policy.budget_used

    async def judged(self, exchange: Exchange) -> tuple[list[dict[str, Any]], Denial | None]:
        """After `admit`: each limit that holds, with its figures, and the first that refuses."""
        asked = [*exchange.lacks, *exchange.taken]
        readings = await self._readings([account for account, _ in asked])
        told, denial = [], None
        for (account, units), reading in zip(asked, readings, strict=True):
            account.reading = reading
            refused = self._refusal(account, units, reading)
            denial = denial or refused
            told.append(_described(account, units, reading, refuses=refused is not None))
        return told, denial

    async def _readings(self, accounts: list[Account]) -> list[Reading]:
        settings = self._config.storage
        if not accounts or (settings.redis is None and not (settings.directory / LIMITS_NAME).exists()):
            return [_NOTHING] * len(accounts)
        try:
            store = counting_store(settings)
            try:
                now_us, readings = await store.read([account.counter for account in accounts])
            finally:
                await store.close()
        except (StoreAwayError, StorageError) as error:
            raise StorageError(f"The counters of limits cannot be read: {error}") from error
        self._holding.set_time(now_us, 0.0)
        return readings

    def _refusal(self, account: Account, units: int, reading: Reading) -> Denial | None:
        counter = account.counter
        room = (counter.burst or counter.amount) - reading.spent - reading.held
        if account.is_soft or units <= room:
            return None
        ever = units <= (counter.burst or counter.amount) and not reading.held
        refusal = Refusal(0, reading.resets_at_us if ever else 0, reading.spent, reading.held)
        return refuse(account, units, refusal, self._holding.now_us(0.0))


def _described(account: Account, units: int, reading: Reading, *, refuses: bool) -> dict[str, Any]:
    limit = account.limit
    return {
        "scope": scope_text(Scope(limit.scope.level, account.member)),
        "name": limit.name,
        "amount": amount_text(limit, limit.amount),
        "per": per_text(limit),
        "spent": amount_text(limit, reading.spent),
        "reserved": amount_text(limit, reading.held),
        "asks": amount_text(limit, units),
        "verdict": "refuses" if refuses else "warns" if account.is_soft and account.is_over else "allows",
    }
