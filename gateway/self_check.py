"""The parent's own check of budgets: what is counted as spent against the ledger, every night and when there is reason.

A worker that is killed takes what it had not yet told the store with it; a limit that is new, or was moved, has not seen
what came before it. What is missing is posted; where a counter has too much nothing is taken back by itself, since
that would give away what somebody may hold: it is logged and a metric, and `headgate ledger rebuild` does it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from gateway.config import Config
from gateway.limit_lifecycle import amount_text
from gateway.reconcile import (
    Difference,
    LedgerSpend,
    compare,
    correct,
    counting_store,
    ledger_spend,
    names_of,
    settled,
)
from gateway.stores.limit_store import LimitStore, StoreAwayError
from gateway.stores.sqlite import DATABASE_NAME, StorageError, database
from gateway.tenants import Stored, merged

_QUIET_S: Final = 3.0  # reasons come in bunches, and what they are about takes a moment to settle
_LOOKS: Final = 8
_RETRY_S: Final = 30.0
_MAX_LOGGED: Final = 20

_log = logging.getLogger(__name__)


class SelfCheck:
    """One per service. `config` is asked at each check."""

    def __init__(self, config: Callable[[], Config], *, clock: Callable[[], float] = time.time) -> None:
        self.drift_nanousd = 0  # of money, what stayed different after the latest check
        self.corrections = 0
        self.failures = 0
        self.checked_time = 0.0
        self._config = config
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_wanted = asyncio.Event()

    def want(self) -> None:
        """There is reason to check soon. Any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._is_wanted.set)

    async def run(self) -> None:
        """Until cancelled. The first check is at the start."""
        self._loop = asyncio.get_running_loop()
        self._is_wanted.set()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._until_night_s()):
                    await self._is_wanted.wait()
            await asyncio.sleep(_QUIET_S)
            self._is_wanted.clear()
            try:
                await self.check()
            except (StoreAwayError, StorageError) as error:
                self.failures += 1
                _log.warning("budgets could not be checked against the ledger: %s", error)
                await asyncio.sleep(_RETRY_S)
                self._is_wanted.set()
            except Exception:  # noqa: BLE001 - a check that fails through a bug must not end the next one
                self.failures += 1
                _log.exception("the check of budgets against the ledger failed through a bug")

    async def check(self) -> list[Difference]:
        """Compares, posts what is missing, and returns what stays different."""
        config = self._config()
        if not await asyncio.to_thread(_spend, config, self._clock()):
            self.drift_nanousd, self.checked_time = 0, self._clock()
            return []
        store = counting_store(config.storage)

        async def look() -> list[Difference]:
            return await compare(store, await asyncio.to_thread(_spend, config, self._clock()))

        try:
            left = await self._corrected(store, await settled(look, _LOOKS))
        finally:
            await store.close()
        self.drift_nanousd = sum(abs(one.missing) for one in left if one.limit.measure == "money")
        self.checked_time = self._clock()
        return left

    async def _corrected(self, store: LimitStore, differences: list[Difference]) -> list[Difference]:
        missing = [one for one in differences if one.missing > 0]
        await correct(store, missing)
        self.corrections += len(missing)
        if missing:
            self._is_wanted.set()  # the smallest of several looks was posted: traffic meanwhile hides the rest
        for one in differences[:_MAX_LOGGED]:
            _log.warning(
                "a budget had less than the ledger, and was brought up to it"
                if one.missing > 0
                else "a budget has more than the ledger: see `headgate ledger verify`",
                extra={
                    "counter": one.counter.key,
                    "counted": amount_text(one.limit, one.spent),
                    "ledger": amount_text(one.limit, one.ledger),
                },
            )
        return [one for one in differences if one.missing < 0]

    def _until_night_s(self) -> float:
        now = datetime.fromtimestamp(self._clock(), UTC)
        hour, minute = map(int, self._config().limits.check_at.split(":"))
        night = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
        if night <= now:
            night += timedelta(days=1)
        return (night - now).total_seconds()


def _spend(config: Config, now_time: float) -> list[LedgerSpend]:
    """What the ledger says of every counter that can be compared."""
    with database(config.storage.directory / DATABASE_NAME, may_write=False) as connection:
        limits = merged(config.declared(), Stored.of(connection, now_time)).limits
        compared = [limit for limit in limits if limit.window.span in ("day", "week", "month", "total")]
        return ledger_spend(connection, compared, int(now_time * 1e6), names_of(config.aliases()))
