"""Broken builds of limits that their tests must catch."""

import time

import gateway.stores.limit_sqlite
from gateway.stores.limit_sqlite import SqliteLimitStore
from policies.limits.account import Account


def checks_then_adds() -> None:
    """What peers do: a counter is read, compared, and written back a moment later."""
    SqliteLimitStore._transact = lambda self, work: work(self._connection)
    states = gateway.stores.limit_sqlite._States
    save = states.save

    def late(self, now_us: int) -> None:
        time.sleep(0.02)
        save(self, now_us)

    states.save = late


def counts_for_each_worker() -> None:
    """What peers do: every process has the whole limit."""
    work = gateway.stores.limit_sqlite.apply
    states, holders = {}, {}
    gateway.stores.limit_sqlite.apply = lambda update, _, __, now_us: work(update, states, holders, now_us)


def never_refunds() -> None:
    """What a request reserved and did not use stays reserved."""
    settle = Account.settle
    Account.settle = lambda self, reserved, actual, received_us: settle(self, actual, actual, received_us)


def forgets_the_dead_never() -> None:
    """What a killed worker held is held for ever."""
    meaning = gateway.stores.limit_sqlite.apply

    def apply(update, states, holders, now_us):
        for name, holder in holders.items():
            holder.expires_us = max(holder.expires_us, now_us + 1)
            holders[name] = holder
        return meaning(update, states, holders, now_us)

    gateway.stores.limit_sqlite.apply = apply


MUTANTS = {
    mutant.__name__: mutant
    for mutant in (checks_then_adds, counts_for_each_worker, never_refunds, forgets_the_dead_never)
}
