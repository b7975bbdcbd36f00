"""Ledger rows between this node and the sink all nodes share: its own out, the others' in. Runs in the parent.

The node's database is its journal: rows are sent from there, in the order of their commit, after the position the sink
has; what was collected is entered there with the position it was read up to. So any step may be the last one. Owns the
rhythm and what is said of trouble; refuses to know Redis.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from gateway.stores import node_table
from gateway.stores.ledger_sink import LedgerSink, OtherShipperError
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.sqlite import DATABASE_NAME, Connection, StorageError, explained, open_database

_TICK_S: Final = 0.5
_RETRY_S: Final = 2.0
_ROWS: Final = 200  # in one entry
_ENTRIES: Final = 50  # read at a time
_OTHER_S: Final = 15.0  # a parent that was killed is still believed alive for a few seconds

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class FlowHealth(NamedTuple):
    """Rows since the start. `is_away`: the sink, at the latest attempt."""

    sent: int
    collected: int
    is_away: bool
    failures: int


class LedgerFlow:
    """One per node; `run` until cancelled."""

    def __init__(self, storage: Path, node: str, sink: LedgerSink, *, collects: bool = True) -> None:
        self._path = storage / DATABASE_NAME
        self._node = node
        self._sink = sink
        self._collects = collects
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger-flow")
        self._connection: Connection | None = None
        self._position: int | None = None  # the sink's, as far as known
        self._sent = self._collected = self._failures = 0
        self._is_away = False
        self._taken_at = 0.0

    async def run(self) -> None:
        self._taken_at = time.monotonic()
        while True:
            delay_s = _TICK_S
            try:
                is_busy = await self.send()
                if self._collects:
                    is_busy |= await self.collect()
                self._heard(is_away=False)
                if is_busy:
                    delay_s = 0.0
            except StoreAwayError as error:
                self._failures += 1
                self._heard(is_away=True, error=str(error))
                delay_s = _RETRY_S
            except OtherShipperError:
                if time.monotonic() - self._taken_at > _OTHER_S:
                    self._taken_at = time.monotonic()
                    _log.error(
                        "the rows of node %s are sent by another: storage.redis.node must differ", self._node
                    )
                delay_s = _RETRY_S
            except StorageError as error:
                self._failures += 1
                _log.error("ledger rows of other nodes wait: %s", error)
                delay_s = _RETRY_S
            await asyncio.sleep(delay_s)

    async def send(self) -> bool:
        """Sends some of this node's rows that the sink has not. True when there are more."""
        if self._position is None:
            self._position = await self._start()
        position = self._position
        after, rows = await self._database(lambda c: node_table.rows_after(c, position, _ROWS))
        self._position = None  # until the answer is here
        taken = await self._sink.take(position, after, rows)
        self._taken_at = time.monotonic()
        self._position = taken.position
        if taken.is_taken:
            self._sent += len(rows)
        return len(rows) == _ROWS or taken.position < after

    async def collect(self) -> bool:
        """Enters some of what other nodes sent. True when there is more."""
        reader = await self._database(node_table.reader)
        epoch, entries = await self._sink.read(reader.epoch, reader.entry_id, _ENTRIES)
        if not entries:
            await self._ask_for_missing()
            return False
        now = node_table.Reader(epoch, entries[-1].id)
        missing = await self._database(lambda c: node_table.collect(c, self._node, entries, now))
        self._collected += sum(len(e.rows) for e in entries if e.node != self._node and e.node not in missing)
        for node, position in missing.items():
            await self._sink.want(node, position)
        return len(entries) == _ENTRIES

    async def close(self) -> None:
        """Once `run` has ended. What was not sent is sent by the next start."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close_database)
        self._thread.shutdown(wait=False)
        await self._sink.close()

    def health(self) -> FlowHealth:
        return FlowHealth(self._sent, self._collected, self._is_away, self._failures)

    async def _start(self) -> int:
        """Where the sink has us; from the beginning, if our journal is not the one it knows."""
        before = (await self._database(node_table.positions)).get(self._node, 0)
        position = (await self._sink.take(before, before, ())).position
        if position > await self._database(node_table.last_row):
            _log.warning("the database is older than what was sent of it (a backup?): sending all rows again")
            await self._sink.want(self._node, 0)
            position = (await self._sink.take(position, position, ())).position
        return position

    async def _ask_for_missing(self) -> None:
        """What a node has sent and nobody here has seen, although the stream holds nothing more: lost on the way."""
        known = await self._database(node_table.positions)
        for node, position in (await self._sink.positions()).items():
            if node != self._node and position > known.get(node, 0):
                await self._sink.want(node, known.get(node, 0))

    def _heard(self, *, is_away: bool, error: str = "") -> None:
        if is_away != self._is_away:
            self._is_away = is_away
            if is_away:
                _log.warning("ledger: the nodes' stream is away (%s); rows wait in the database", error)
            else:
                _log.warning("ledger: the nodes' stream is back")

    async def _database(self, work: Callable[[Connection], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._work, work)

    def _work(self, work: Callable[[Connection], _T]) -> _T:
        try:
            if self._connection is None:
                self._connection = open_database(self._path)
            with explained(self._path):
                return work(self._connection)
        except StorageError:
            # A fresh connection next time: an I/O error may have left this one unusable.
            self._close_database()
            raise

    def _close_database(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
