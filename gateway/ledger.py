"""The ledger of one worker: every request's row, written once, off the hot path.

`open` and `close` only touch memory (and the mapped in-flight file); a thread commits the rows in groups. While
the database cannot be written (full, locked, read-only) rows wait in memory and are tried again; beyond the
backlog's limit they are lost, counted and logged. A slot of the in-flight file is given back after its row's
commit and never before: so a worker may be killed anywhere without losing or doubling a row.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from gateway.intents import NO_SLOT, Intents
from gateway.jsonl import JsonlLog
from gateway.ledger_row import LedgerRow, dispatch_fields, row_of
from gateway.stores import ledger_table
from gateway.stores.sqlite import DATABASE_NAME, Connection, StorageError, open_database
from policies.exchange import Exchange

__all__ = ["Ledger", "LedgerHealth", "LedgerRow", "row_of"]

# Between two commits at low rates. A kill loses nothing however long it is; the shorter, the fewer rows share a commit.
_TICK_S: Final = 0.5
_IDLE_TICKS: Final = 4  # after two seconds without rows the thread sleeps until one comes
_GROUP_ROWS: Final = 500  # per transaction: other workers wait for the lock no longer than this takes
_RETRY_S: Final = (0.1, 0.5, 1.0, 2.0, 5.0)
_LOG_EVERY_S: Final = 10.0

_log = logging.getLogger(__name__)


class LedgerHealth(NamedTuple):
    """Counters since the start; `backlog` and `slots_in_use` are of this moment."""

    rows_written: int
    rows_lost: int
    flush_failures: int
    backlog: int
    slots_in_use: int
    slots_missed: int
    last_error: str  # empty while the latest commit went well


class Ledger:
    """Opened intents and closed rows of one worker. All methods but the writer thread's are the loop's.

    `max_backlog` rows take about 64 MiB. StorageError when the storage cannot be used at all.
    """

    def __init__(
        self,
        storage: Path,
        worker: str,
        *,
        is_full_sync: bool = False,
        jsonl: JsonlLog | None = None,
        slots: int = 4096,
        max_backlog: int = 65_536,
    ) -> None:
        self.worker = worker
        self._path = storage / DATABASE_NAME
        self._is_full_sync = is_full_sync
        self._connection: Connection | None = open_database(self._path, is_full_sync=is_full_sync)
        self._intents = Intents(storage, worker, slots=slots)
        self._jsonl = jsonl
        self._max_backlog = max_backlog
        self._slot_of: dict[str, int] = {}  # request id -> slot, from open to close
        # The loop appends at the end, the thread removes from the front what is committed; each is atomic.
        self._rows: list[tuple[LedgerRow, int]] = []
        self._wake = threading.Event()
        self._is_asleep = False
        self._is_stopping = False
        self._drained: list[threading.Event] = []  # set once no row waits
        self._written = self._lost = self._failures = 0
        self._failures_in_a_row = 0
        self._last_error = ""
        self._logged_at = -_LOG_EVERY_S
        self._lost_logged = 0
        self._writer = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._writer.start()

    def open(self, exchange: Exchange) -> None:
        """Before the first dispatch: from here on the request has a row, even if the worker is killed."""
        request_id = exchange.request_id
        if request_id not in self._slot_of:
            exchange.intent = fields = dispatch_fields(exchange, self.worker)
            slot = self._intents.open(fields)
            if slot != NO_SLOT:
                self._slot_of[request_id] = slot

    def close(self, row: LedgerRow) -> None:
        """Takes the row of a request that has ended, opened before or not. No system call, never waits."""
        slot = self._slot_of.pop(row.request_id, NO_SLOT)
        rows = self._rows
        waiting = len(rows)
        if waiting >= self._max_backlog:
            self._lost += 1
            if slot != NO_SLOT:
                self._intents.free((slot,))
            return
        rows.append((row, self._intents.settle(slot, row)))
        if waiting == _GROUP_ROWS - 1:
            self._wake.set()  # a full group need not wait: its slots are wanted
        if self._is_asleep:  # after the append: the thread looks at the rows once more before it sleeps
            self._is_asleep = False
            self._wake.set()

    async def enter(self, rows: Sequence[LedgerRow]) -> bool:
        """Takes rows that somebody else keeps until they are written; True when they are. However many wait already."""
        self._rows.extend((row, NO_SLOT) for row in rows)
        return await self.flush()

    def health(self) -> LedgerHealth:
        return LedgerHealth(
            self._written,
            self._lost,
            self._failures,
            len(self._rows),
            self._intents.in_use,
            self._intents.missed,
            self._last_error,
        )

    async def flush(self, timeout_s: float = 10.0) -> bool:
        """Waits until no row waits; False when that took too long."""
        drained = threading.Event()
        self._drained.append(drained)
        self._wake.set()
        return await asyncio.to_thread(drained.wait, timeout_s)

    async def stop(self, timeout_s: float = 10.0) -> int:
        """Writes what waits and ends the thread. Returns how many rows are not in the database.

        Those that have a slot, and requests that were never closed, are recovered by the next start.
        """
        self._is_stopping = True
        self._wake.set()
        await asyncio.to_thread(self._writer.join, timeout_s)
        left = list(self._rows)
        self._lost += sum(slot == NO_SLOT for _, slot in left)
        if self._lost > self._lost_logged:
            self._log_trouble(is_last=True)
        if not self._writer.is_alive():
            self._intents.close()
            if self._connection is not None:
                self._connection.close()
            if self._jsonl is not None:
                self._jsonl.close()
        return len(left)

    def _run(self) -> None:
        idle_ticks = 0
        while True:
            is_last = self._is_stopping  # read first: what was closed before it was set is in the rows
            if self._rows:
                idle_ticks = 0
                self._write_all()
            if not self._rows:
                while self._drained:
                    self._drained.pop().set()
            if is_last:
                return
            idle_ticks += 1
            self._wait(idle_ticks)

    def _wait(self, idle_ticks: int) -> None:
        if self._failures_in_a_row:
            self._wake.wait(_RETRY_S[min(self._failures_in_a_row, len(_RETRY_S)) - 1])
        elif idle_ticks <= _IDLE_TICKS:
            self._wake.wait(_TICK_S)
        else:
            self._is_asleep = True
            if not (self._rows or self._is_stopping):
                self._wake.wait()
            self._is_asleep = False
        self._wake.clear()

    def _write_all(self) -> None:
        """Commits group by group until nothing waits, or until one fails."""
        while self._rows:
            group = self._rows[:_GROUP_ROWS]
            try:
                refused = self._commit([row for row, _ in group])
            except Exception as error:  # noqa: BLE001 - whatever it is, the thread must live and the rows wait
                self._failures += 1
                self._failures_in_a_row += 1
                self._last_error = str(error) or type(error).__name__
                self._log_trouble()
                return
            if self._failures_in_a_row:
                self._failures_in_a_row = 0
                _log.warning(
                    "ledger: the database can be written again, %d rows were waiting", len(self._rows)
                )
            self._last_error = "; ".join(f"row of {row.request_id}: {reason}" for row, reason in refused[:3])
            self._lost += len(refused)
            self._written += len(group) - len(refused)
            self._intents.free(slot for _, slot in group if slot != NO_SLOT)
            del self._rows[: len(group)]
            if self._lost > self._lost_logged:
                self._log_trouble()
            if self._jsonl is not None:
                bad = {row.request_id for row, _ in refused}
                self._jsonl.write([row for row, _ in group if row.request_id not in bad])

    def _commit(self, rows: list[LedgerRow]) -> list[tuple[LedgerRow, str]]:
        """Returns the rows that are at fault themselves; all others are in the database now."""
        try:
            if self._connection is None:
                self._connection = open_database(self._path, is_full_sync=self._is_full_sync)
            return ledger_table.insert_possible(self._connection, rows).refused
        except StorageError:
            # A fresh connection next time: an I/O error may have left this one unusable.
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            raise

    def _log_trouble(self, *, is_last: bool = False) -> None:
        """Loud, but not louder than once in ten seconds."""
        now = time.perf_counter()
        if not is_last and now - self._logged_at < _LOG_EVERY_S:
            return
        _log.error(
            "ledger: cannot write (%s); %d rows wait, %d rows lost since the last message",
            self._last_error or "too slow",
            len(self._rows),
            self._lost - self._lost_logged,
        )
        self._logged_at = now
        self._lost_logged = self._lost
