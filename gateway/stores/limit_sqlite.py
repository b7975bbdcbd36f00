"""Limits of one machine: counters in a SQLite file of their own, shared by all workers.

An update is one short IMMEDIATE transaction on a thread: the states it is about are read, `policies.limits.counting`
does the work, what changed is written. A file of their own, so that no request waits for the ledger's commits.
The store's time is the machine's steady clock, set to the wall clock when nobody holds anything: a clock that is
put forward or back grants no window twice and lets no holder lapse.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec

from gateway.stores.limit_store import StoreAwayError
from gateway.stores.sqlite import Connection, StorageError, explained, open_database
from policies.limits.counting import Holder, State, apply, reading
from policies.limits.messages import Counter, Reading, Reply, Update

DATABASE_NAME: Final = "limits.db"
STEPS: Final = (
    """
    CREATE TABLE counter (
        key TEXT PRIMARY KEY NOT NULL, state BLOB NOT NULL, expires_us INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX counter_by_expiry ON counter (expires_us);
    CREATE TABLE holder (name TEXT PRIMARY KEY NOT NULL, record BLOB NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE clock (
        one INTEGER PRIMARY KEY CHECK (one = 1), boot TEXT NOT NULL, steady_us INTEGER NOT NULL,
        time_us INTEGER NOT NULL
    ) STRICT;
    """,
)
_BUSY_TIMEOUT_MS: Final = 2000
_SWEEP_EVERY: Final = 1000  # updates
_KEPT_US: Final = 400 * 86_400 * 1_000_000  # a counter nobody spoke of for so long, unless it is for ever
_NEVER_US: Final = 2**62
_STEP_US: Final = 1_000_000  # a wall clock further off than this was set anew
_T = TypeVar("_T")

_encode = msgspec.msgpack.Encoder().encode
_decode_state = msgspec.msgpack.Decoder(State).decode
_decode_holder = msgspec.msgpack.Decoder(Holder).decode


class Clocks(NamedTuple):
    """Microseconds of the wall clock, and of one that only runs forward, the same in all processes since `boot`."""

    wall_us: Callable[[], int]
    steady_us: Callable[[], int]
    boot: str


def machine_clocks() -> Clocks:
    """This machine's."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    steady = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # goes on while the machine sleeps
    return Clocks(lambda: time.time_ns() // 1000, lambda: time.clock_gettime_ns(steady) // 1000, boot)


def time_us(connection: Connection, clocks: Clocks, is_held: Callable[[int], bool]) -> int:
    """The store's time, by the table `clock`; its row is written when nothing is held that a jump would end."""
    steady_us, wall_us = clocks.steady_us(), clocks.wall_us()
    row = connection.execute("SELECT boot, steady_us, time_us FROM clock").fetchone()
    if row is not None and row[0] == clocks.boot and row[1] <= steady_us:
        now_us: int = row[2] + steady_us - row[1]
        if abs(wall_us - now_us) < _STEP_US or is_held(now_us):
            return now_us
    connection.execute("INSERT OR REPLACE INTO clock VALUES (1, ?, ?, ?)", (clocks.boot, steady_us, wall_us))
    return wall_us


class SqliteLimitStore:
    """A LimitStore. StorageError from the constructor when the storage directory cannot be used."""

    def __init__(self, storage: Path, *, clocks: Clocks | None = None) -> None:
        self._path = storage / DATABASE_NAME
        self._clocks = clocks or machine_clocks()
        self._connection: Connection | None = self._open()
        self._updates = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="limits")

    async def update(self, update: Update) -> Reply:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.apply, update)

    async def read(self, counters: Sequence[Counter]) -> tuple[int, list[Reading]]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.look, tuple(counters))

    async def close(self) -> None:
        await asyncio.to_thread(self.shut)

    def shut(self) -> None:
        """`close` for whoever may wait."""
        self._thread.submit(self._close).result()
        self._thread.shutdown()

    def apply(self, update: Update) -> Reply:
        """`update` for whoever may wait: commands, tests. Not beside the other methods."""
        return self._transact(lambda connection: self._apply(connection, update))

    def look(self, counters: Sequence[Counter]) -> tuple[int, list[Reading]]:
        """`read` for whoever may wait."""

        def work(connection: Connection) -> tuple[int, list[Reading]]:
            holders = _Holders(connection)
            now_us = time_us(connection, self._clocks, lambda at_us: bool(holders.live(at_us)))
            live = holders.live(now_us)
            stands = []
            for counter in counters:
                state = _load(connection, counter.key)
                state.held = {name: units for name, units in state.held.items() if name in live}
                stands.append(reading(counter, state, now_us))
            return now_us, stands

        return self._transact(work)

    def _apply(self, connection: Connection, update: Update) -> Reply:
        holders = _Holders(connection)
        now_us = time_us(connection, self._clocks, lambda at_us: bool(holders.live(at_us)))
        states = _States(connection)
        reply = apply(update, states, holders, now_us)
        states.save(now_us)
        holders.save()
        self._updates += 1
        if self._updates % _SWEEP_EVERY == 0:
            connection.execute("DELETE FROM counter WHERE expires_us <= ?", (now_us,))
        return reply

    def _transact(self, work: Callable[[Connection], _T]) -> _T:
        """Runs the work in a transaction of its own. StoreAwayError when there can be none now."""
        try:
            if self._connection is None:
                self._connection = self._open()
            connection = self._connection
            with explained(self._path):
                connection.execute("BEGIN IMMEDIATE")
                try:
                    result = work(connection)
                    connection.execute("COMMIT")
                except BaseException:
                    # SQLite has rolled back by itself after some errors (disk full among them).
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
        except StorageError as error:
            # A fresh connection next time: an I/O error may have left this one unusable.
            self._close()
            raise StoreAwayError(str(error)) from error
        return result

    def _open(self) -> Connection:
        connection = open_database(self._path, steps=STEPS)
        connection.set_busy_timeout(_BUSY_TIMEOUT_MS)
        return connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _load(connection: Connection, key: str) -> State:
    row = connection.execute("SELECT state FROM counter WHERE key = ?", (key,)).fetchone()
    return State() if row is None else _decode_state(row[0])


class _States(MutableMapping[str, State]):
    """Counters' states, read when they are first asked for, written together."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._states: dict[str, State] = {}
        self._stored: dict[str, bytes] = {}

    def __getitem__(self, key: str) -> State:
        state = self._states.get(key)
        if state is None:
            row = self._connection.execute("SELECT state FROM counter WHERE key = ?", (key,)).fetchone()
            if row is None:
                raise KeyError(key)
            self._stored[key] = row[0]
            state = self._states[key] = _decode_state(row[0])
        return state

    def __setitem__(self, key: str, state: State) -> None:
        self._states[key] = state

    def __delitem__(self, key: str) -> None:
        raise NotImplementedError("a counter is emptied, not removed")

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def save(self, now_us: int) -> None:
        changed = []
        for key, state in self._states.items():
            data = _encode(state)
            if data != self._stored.get(key):
                changed.append((key, data, _expiry(state, now_us)))
        if changed:
            self._connection.executemany("INSERT OR REPLACE INTO counter VALUES (?, ?, ?)", changed)


def _expiry(state: State, now_us: int) -> int:
    """When nobody would miss it. What is kept for ever (a total) begins at 0."""
    if 0 in state.spent:
        return _NEVER_US
    return max(now_us, state.tat_us) + _KEPT_US


class _Holders(dict[str, Holder]):
    """All holders, read at once: as many as there are workers, and those that ended lately."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stored: dict[str, bytes] = dict(connection.execute("SELECT name, record FROM holder"))
        super().__init__((name, _decode_holder(record)) for name, record in self._stored.items())

    def live(self, now_us: int) -> set[str]:
        return {
            name for name, holder in self.items() if holder.reply is not None and holder.expires_us > now_us
        }

    def save(self) -> None:
        for name in self._stored.keys() - self.keys():
            self._connection.execute("DELETE FROM holder WHERE name = ?", (name,))
        for name, holder in self.items():
            record = _encode(holder)
            if record != self._stored.get(name):
                self._connection.execute("INSERT OR REPLACE INTO holder VALUES (?, ?)", (name, record))
