"""The check of budgets where several nodes count in Redis: one node at a time, and in both directions.

A request's end reaches the store in a fraction of a second, the ledger of its own node in half a second, and that of the
others in a second or two. So at no moment are counter and ledger the same thing while requests run. What is certain: all
that the ledger had some seconds ago is in the store by now, and all that the store had then is in the ledger.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Final

from gateway.config import Config
from gateway.limit_storage import open_redis_store
from gateway.reconcile import Difference, LedgerSpend, compare, correct, ledger_spend, names_of
from gateway.self_check import SelfCheck
from gateway.stores.sqlite import DATABASE_NAME, database
from gateway.tenants import Stored, merged

# The longest that a row takes from its request's end to another node's database, twice over.
_SETTLED_S: Final = 8.0
_ROUNDS: Final = 4
_TURN_S: Final = 60.0
_WAIT_S: Final = 2.0
_TIMEOUT_S: Final = 2.0
_MAX_LOGGED: Final = 20

_log = logging.getLogger(__name__)


def counted(config: Config) -> list[LedgerSpend]:
    """What the ledger says that was spent, of every limit that remembers."""
    now_time = time.time()
    with database(config.storage.directory / DATABASE_NAME, may_write=False) as connection:
        limits = merged(config.declared(), Stored.of(connection, now_time)).limits
        return ledger_spend(connection, limits, int(now_time * 1e6), names_of(config.aliases()))


def certain(before: Iterable[Difference], after: Iterable[Difference]) -> list[Difference]:
    """What is different for good, of two looks `_SETTLED_S` apart; `missing` of each is what to post."""
    then = {one.counter.key: one for one in before}
    found = []
    for now in after:
        earlier = then.get(now.counter.key)
        if earlier is None or earlier.counter.periods != now.counter.periods:
            continue
        if earlier.ledger > now.spent:
            found.append(now._replace(ledger=earlier.ledger))
        elif earlier.spent > now.ledger:
            found.append(now._replace(spent=earlier.spent))
    return found


class SharedCheck(SelfCheck):
    """As SelfCheck; what the store has too much is taken back, too."""

    def __init__(self, config: Callable[[], Config], settled_s: float = _SETTLED_S) -> None:
        super().__init__(config)
        self._settled_s = settled_s

    async def check(self) -> list[Difference]:
        """What stays different although it was set right: nothing, unless something goes on making it so."""
        config = self._config()
        assert config.storage.redis is not None
        if not config.storage.redis.collects:
            return []  # the ledger of all nodes is elsewhere
        store = open_redis_store(config.storage.redis, _TIMEOUT_S)

        async def look() -> list[Difference]:
            return await compare(store, await asyncio.to_thread(counted, config))

        try:
            while not await store.take_turn(_TURN_S):  # noqa: ASYNC110 - the turn is another node's
                await asyncio.sleep(_WAIT_S)
            left: list[Difference] = []
            before = await look()
            for _ in range(_ROUNDS):
                await asyncio.sleep(self._settled_s)
                after = await look()
                left = certain(before, after)
                if not left and not any(one.missing for one in after):
                    break
                await correct(store, left)
                self.corrections += len(left)
                for one in left[:_MAX_LOGGED]:
                    _log.warning(
                        "a budget was set to what the ledger says",
                        extra={"reason": f"{one.counter.key}: {one.spent} became {one.ledger}"},
                    )
                before = await look() if left else after
            await store.end_turn()
        finally:
            await store.close()
        self.drift_nanousd = sum(abs(one.missing) for one in left if one.limit.measure == "money")
        self.checked_time = time.time()
        return left
