"""One thread that owns a connection, and commits whatever waits for it together.

An operation is a function of the connection and the store's time. Those that wait are run in one transaction, each in a
savepoint of its own, and are answered after the commit: with FULL sync one wait for the disk serves them all. Owns the
store's clock. Refuses to know what operations mean. Invariant: nobody hears of an operation that is not on disk.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import apsw

from gateway.overflow.store import QueueStoreError
from gateway.stores.limit_sqlite import Clocks, machine_clocks, time_us
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.sqlite import Connection, StorageError, explained, open_database

_GROUP: Final = 256  # other processes wait for the lock no longer than so many operations take
_BUSY_S: Final = 5.0
_NAP_S: Final = 0.001

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
Work = Callable[[Connection, float], _T]


class _Operation(NamedTuple):
    work: Work[Any]
    is_needed: Work[bool] | None  # asked outside of a transaction; False: the answer is `otherwise`
    otherwise: Any
    loop: asyncio.AbstractEventLoop
    answer: "asyncio.Future[Any]"


class StoreThread:
    """StorageError from the constructor when the file cannot be used at all. `leases`: a query that finds something while a
    jump of the store's time would end a lease; "": there are none."""

    def __init__(
        self, path: Path, steps: tuple[str, ...], *, leases: str = "", clocks: Clocks | None = None
    ) -> None:
        self._path = path
        self._steps = steps
        self._leases = leases
        self._clocks = clocks or machine_clocks()
        self._waiting: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._connection: Connection | None = self._open()
        self._reader: Connection | None = None
        self._is_closed = False
        self._reading = ThreadPoolExecutor(1, thread_name_prefix=f"{path.stem}-read")
        self._thread = threading.Thread(target=self._run, name=path.stem, daemon=True)
        self._thread.start()

    async def write(
        self, work: Work[_T], is_needed: Work[bool] | None = None, otherwise: _T | None = None
    ) -> _T:
        """The work's answer, once it is on disk. QueueStoreError as the work raised it; StoreAwayError when the database
        cannot be written. Where `is_needed` says no, there is no transaction and the answer is `otherwise`."""
        if self._is_closed:
            raise StoreAwayError("it was closed")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_T] = loop.create_future()
        self._waiting.put(_Operation(work, is_needed, otherwise, loop, answer))
        return await answer

    async def read(self, work: Work[_T]) -> _T:
        """The work's answer from what is committed. It waits for no disk and no writer."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, self._read, work)

    async def checkpoint(self) -> None:
        """Moves the log into the database and empties it, as far as nobody reads."""
        await self.read(lambda _, __: self._checkpoint())

    def _checkpoint(self) -> None:
        connection = open_database(self._path, steps=self._steps)
        try:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            connection.close()

    async def close(self) -> None:
        """What was asked for before is carried out."""
        self._is_closed = True
        self._waiting.put(None)
        await asyncio.to_thread(self._thread.join)
        await asyncio.get_running_loop().run_in_executor(self._reading, self._close_reader)
        self._reading.shutdown()

    def _run(self) -> None:
        while True:
            first = self._waiting.get()
            if first is None:
                break
            group, is_last = [first], False
            while len(group) < _GROUP:
                try:
                    operation = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if operation is None:
                    is_last = True
                    break
                group.append(operation)
            self._answer(group, self._carry_out(group))
            if is_last:
                break
        self._close()

    def _carry_out(self, group: list[_Operation]) -> list[Any]:
        """An answer or an exception for each."""
        try:
            if self._connection is None:
                self._connection = self._open()
            with explained(self._path):
                return self._commit(self._connection, group)
        except StorageError as error:
            self._close()  # a fresh connection next time: an I/O error may have left this one unusable
            return [StoreAwayError(str(error))] * len(group)
        except Exception as error:  # noqa: BLE001 - a bug must not end the thread that everybody waits for
            _log.exception("the queue's storage failed through a bug")
            self._close()
            return [error] * len(group)

    def _commit(self, connection: Connection, group: list[_Operation]) -> list[Any]:
        answers: list[Any] = [operation.otherwise for operation in group]
        now_time = self._now_time(connection)
        needed = [
            at
            for at, operation in enumerate(group)
            if operation.is_needed is None or operation.is_needed(connection, now_time)
        ]
        if not needed:
            return answers
        connection.execute("BEGIN IMMEDIATE")
        try:
            now_time = self._now_time(connection)
            for at in needed:
                connection.execute("SAVEPOINT operation")
                try:
                    answers[at] = group[at].work(connection, now_time)
                except (
                    QueueStoreError,
                    apsw.ConstraintError,
                    ArithmeticError,
                    LookupError,
                    TypeError,
                ) as error:
                    # A refusal, or a bug of ours: either is this operation's, not its neighbours'.
                    if not connection.in_transaction:
                        raise
                    connection.execute("ROLLBACK TO operation")
                    answers[at] = error
                connection.execute("RELEASE operation")
            connection.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back by itself after some errors (disk full among them).
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return answers

    def _answer(self, group: list[_Operation], answers: list[Any]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
        for operation, answer in zip(group, answers, strict=True):
            by_loop.setdefault(operation.loop, []).append((operation.answer, answer))
        for loop, pairs in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, pairs)
            except RuntimeError:
                _log.debug("nobody waits any more: the loop is closed")

    def _read(self, work: Work[_T]) -> _T:
        try:
            if self._reader is None:
                self._reader = open_database(self._path, may_write=False, steps=self._steps)
            with explained(self._path):
                return work(self._reader, self._now_time(self._reader, may_set=False))
        except StorageError as error:
            self._close_reader()
            raise StoreAwayError(str(error)) from error

    def _now_time(self, connection: Connection, *, may_set: bool = True) -> float:
        def is_held(_: int) -> bool:
            if not may_set or not self._leases:
                return not may_set
            return connection.execute(self._leases).get is not None

        return time_us(connection, self._clocks, is_held) / 1e6

    def _open(self) -> Connection:
        connection = open_database(self._path, is_full_sync=True, steps=self._steps)
        connection.pragma("secure_delete", True)
        connection.set_busy_handler(_patience())
        with explained(self._path):
            self._now_time(connection)
        return connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def _deliver(pairs: list[tuple["asyncio.Future[Any]", Any]]) -> None:
    for future, answer in pairs:
        if future.done():
            continue  # whoever asked was cancelled
        if isinstance(answer, BaseException):
            future.set_exception(answer)
        else:
            future.set_result(answer)


def _patience() -> Callable[[int], bool]:
    """SQLite's own busy handler sleeps up to 100 ms at a time, which would be the 99th percentile of every submit."""
    begun_at = 0.0

    def wait(times: int) -> bool:
        nonlocal begun_at
        if not times:
            begun_at = time.monotonic()
        time.sleep(_NAP_S)
        return time.monotonic() - begun_at < _BUSY_S

    return wait
