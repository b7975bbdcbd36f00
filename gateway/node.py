"""This node among others: what its parent does for all of them, in Redis.

A Redis that is new or lost its data is filled from the ledger, ledger rows are sent and collected, and budgets are
checked when there is reason. Refuses to know requests: while Redis is away, its workers get on by themselves.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from gateway.config import Config
from gateway.control import Samples, Snapshot
from gateway.ledger_flow import LedgerFlow
from gateway.limit_storage import open_ledger_sink, open_redis_store
from gateway.redis_config import node_name
from gateway.shared_check import counted
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.sqlite import StorageError

_TICK_S: Final = 0.5
_TIMEOUT_S: Final = 1.0
_START_S: Final = 3.0
# In which workers commit their rows, and the other nodes send theirs: half a second for each step, and twice that.
_GATHER_S: Final = 3.0

_log = logging.getLogger(__name__)


class Node:
    """One per parent, where `storage.redis` is set. `on_reason` is called when budgets should be checked."""

    def __init__(self, config: Callable[[], Config], on_reason: Callable[[], None]) -> None:
        self._config = config
        self._on_reason = on_reason
        settings = config().storage
        assert settings.redis is not None
        self._storage = settings.directory
        self.name = node_name(self._storage, settings.redis)
        sink = open_ledger_sink(settings.redis, self.name, _TIMEOUT_S)
        self._flow = LedgerFlow(self._storage, self.name, sink, collects=settings.redis.collects)
        self._store = open_redis_store(settings.redis, _TIMEOUT_S)
        self._fills = 0
        self._is_away = False

    async def start(self) -> None:
        """Fills an empty Redis before the first request, if it is there at all."""
        try:
            async with asyncio.timeout(_START_S):
                for problem in await self._store.problems():
                    _log.warning("%s", problem)
                await self._look_after(is_first=True)
        except (StoreAwayError, StorageError, TimeoutError) as error:
            self._is_away = True
            _log.warning("Redis is away at the start: %s", error or "no answer in time")

    async def run(self) -> None:
        """Until cancelled."""
        flow = asyncio.create_task(self._flow.run())
        try:
            while True:
                await asyncio.sleep(_TICK_S)
                await self._turn()
        finally:
            flow.cancel()
            await asyncio.wait({flow})
            await self._flow.close()
            await self._store.close()

    async def _turn(self) -> None:
        try:
            await self._look_after()
        except StoreAwayError:
            self._is_away = True
        except StorageError as error:
            _log.error("Redis could not be filled from the ledger: %s", error)
        except Exception:  # noqa: BLE001 - the next turn may do
            _log.exception("looking after Redis failed through a bug")
        else:
            if self._is_away:
                self._is_away = False
                self._on_reason()

    async def _look_after(self, *, is_first: bool = False) -> None:
        if await self._store.is_filled():
            return
        if not is_first:
            await asyncio.sleep(_GATHER_S)
        spent = await asyncio.to_thread(counted, self._config())
        await self._store.fill([(one.counter, one.spent) for one in spent if one.spent])
        self._fills += 1
        _log.warning("Redis knew of no spending, and was told from the ledger", extra={"count": len(spent)})
        self._on_reason()

    def details(self) -> dict[str, str]:
        """For operators' readiness."""
        health = self._flow.health()
        return {"node": self.name, "redis": "away" if self._is_away or health.is_away else "ok"}

    def snapshot(self) -> Snapshot:
        """For the metrics page."""
        health = self._flow.health()
        is_away = self._is_away or health.is_away

        def one(kind: str, text: str, value: float) -> Samples:
            return Samples(kind, text, [], [([], value)])

        return {
            "headgate_redis_away": one(
                "gauge", "Whether this node's parent cannot reach Redis.", float(is_away)
            ),
            "headgate_redis_fills_total": one(
                "counter", "Times an empty Redis was told from the ledger what was spent.", self._fills
            ),
            "headgate_node_rows_sent_total": one(
                "counter", "Ledger rows of this node that the others can have.", health.sent
            ),
            "headgate_node_rows_collected_total": one(
                "counter", "Ledger rows of other nodes that were read.", health.collected
            ),
        }
