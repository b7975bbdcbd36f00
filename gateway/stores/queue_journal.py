"""What a node has promised and what its jobs came to, on its own disk: queue-journal.db, beside a queue in Redis.

A promise is written before its 202 is sent; an end is written as an intent before Redis is told, and is final once Redis has
taken it. Each row knows the epoch of Redis in which it was last said there, so that after a loss of data what must be said
again is found at once. Knows bytes, not their meaning.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from gateway.stores.limit_sqlite import Clocks
from gateway.stores.queue_thread import StoreThread
from gateway.stores.sqlite import Connection

DATABASE_NAME: Final = "queue-journal.db"
# `due_time`: when nobody needs the row any more, whatever happened.
_STEPS: Final = (
    """
    CREATE TABLE promise (
        id TEXT PRIMARY KEY NOT NULL, epoch INTEGER NOT NULL, record BLOB NOT NULL, due_time REAL NOT NULL
    ) STRICT;
    CREATE INDEX promise_by_epoch ON promise (epoch);
    CREATE INDEX promise_due ON promise (due_time);
    CREATE TABLE ending (
        job_id TEXT NOT NULL, fence INTEGER NOT NULL, owner TEXT NOT NULL, is_final INTEGER NOT NULL,
        epoch INTEGER NOT NULL, record BLOB NOT NULL, due_time REAL NOT NULL, PRIMARY KEY (job_id, fence, owner)
    ) STRICT;
    CREATE INDEX ending_by_epoch ON ending (epoch);
    CREATE INDEX ending_due ON ending (due_time);
    CREATE TABLE step (
        id TEXT NOT NULL, name TEXT NOT NULL, epoch INTEGER NOT NULL, record BLOB NOT NULL, due_time REAL NOT NULL,
        PRIMARY KEY (id, name)
    ) STRICT;
    CREATE INDEX step_by_epoch ON step (epoch);
    CREATE INDEX step_due ON step (due_time);
    CREATE TABLE clock (
        one INTEGER PRIMARY KEY CHECK (one = 1), boot TEXT NOT NULL, steady_us INTEGER NOT NULL,
        time_us INTEGER NOT NULL
    ) STRICT;
    """,
)
_PUT: Final = {
    "promise": "INSERT INTO promise VALUES (?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
    "step": "INSERT OR REPLACE INTO step VALUES (?, ?, ?, ?, ?)",
}
_TABLES: Final = ("promise", "ending", "step")


class Promise(NamedTuple):
    """A job that was accepted here."""

    id: str
    epoch: int
    record: bytes
    due_time: float


class Ending(NamedTuple):
    """How a run of a job ended here."""

    job_id: str
    fence: int
    owner: str
    is_final: bool
    epoch: int
    record: bytes
    due_time: float


class Step(NamedTuple):
    """What was done with a parent here: opened, released, cancelled, ended."""

    id: str
    name: str
    epoch: int
    record: bytes
    due_time: float


class Journal:
    """One per process, one file per node."""

    def __init__(self, storage: Path, *, clocks: Clocks | None = None) -> None:
        self._thread = StoreThread(storage / DATABASE_NAME, _STEPS, clocks=clocks)

    async def put(self, promises: Sequence[Promise] = (), steps: Sequence[Step] = ()) -> None:
        """On disk when it returns."""

        def work(connection: Connection, _: float) -> None:
            connection.executemany(_PUT["promise"], promises)
            connection.executemany(_PUT["step"], steps)

        await self._thread.write(work)

    async def put_end(self, ending: Ending) -> None:
        """An intent, or what became of it."""
        await self._thread.write(
            lambda c, _: (
                c.execute("INSERT OR REPLACE INTO ending VALUES (?, ?, ?, ?, ?, ?, ?)", ending) and None
            )
        )

    async def close_end(self, job_id: str, fence: int, owner: str, *, is_taken: bool) -> None:
        """Redis has taken it: it is final, and the promise is kept. Or it has not: another run is the job's end."""
        key = (job_id, fence, owner)

        def work(connection: Connection, _: float) -> None:
            if is_taken:
                connection.execute(
                    "UPDATE ending SET is_final = 1 WHERE job_id = ? AND fence = ? AND owner = ?", key
                )
                connection.execute("DELETE FROM promise WHERE id = ?", (job_id,))
            else:
                connection.execute("DELETE FROM ending WHERE job_id = ? AND fence = ? AND owner = ?", key)

        await self._thread.write(work)

    async def unsaid_ends(self, epoch: int, most: int) -> list[Ending]:
        """Not said in this epoch; what is final first."""
        query = "SELECT * FROM ending WHERE epoch < ?1 OR epoch > ?1 ORDER BY is_final DESC LIMIT ?2"
        found: list[tuple[Any, ...]] = await self._select(query, (epoch, most))
        return [Ending(*row) for row in found]

    async def unsaid_promises(self, epoch: int, most: int) -> list[Promise]:
        query = "SELECT * FROM promise WHERE epoch < ?1 OR epoch > ?1 ORDER BY rowid LIMIT ?2"
        return [Promise(*row) for row in await self._select(query, (epoch, most))]

    async def unsaid_steps(self, epoch: int, name: str, most: int) -> list[Step]:
        query = "SELECT * FROM step WHERE (epoch < ?1 OR epoch > ?1) AND name = ?2 ORDER BY rowid LIMIT ?3"
        return [Step(*row) for row in await self._select(query, (epoch, name, most))]

    async def _select(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return await self._thread.read(lambda c, _: c.execute(query, values).fetchall())

    async def said(self, rows: Sequence[Promise | Ending | Step], epoch: int) -> None:
        """In this epoch."""

        def work(connection: Connection, _: float) -> None:
            for row in rows:
                if isinstance(row, Promise):
                    connection.execute("UPDATE promise SET epoch = ? WHERE id = ?", (epoch, row.id))
                elif isinstance(row, Step):
                    connection.execute(
                        "UPDATE step SET epoch = ? WHERE id = ? AND name = ?", (epoch, row.id, row.name)
                    )
                else:
                    connection.execute(
                        "UPDATE ending SET epoch = ? WHERE job_id = ? AND fence = ? AND owner = ?",
                        (epoch, row.job_id, row.fence, row.owner),
                    )

        await self._thread.write(work)

    async def promised(self, after: str, most: int) -> list[str]:
        """Ids of promises that are not known to be kept, in order."""
        query = "SELECT id FROM promise WHERE id > ? ORDER BY id LIMIT ?"
        return [str(row[0]) for row in await self._select(query, (after, most))]

    async def kept(self, ids: Sequence[str]) -> None:
        """They have ended, wherever."""

        def work(connection: Connection, _: float) -> None:
            connection.executemany("DELETE FROM promise WHERE id = ?", [(each,) for each in ids])

        await self._thread.write(work)

    async def ends_after(self, after: str, most: int) -> list[str]:
        """Ids of jobs whose ends are here, in order."""
        query = "SELECT DISTINCT job_id FROM ending WHERE job_id > ? ORDER BY job_id LIMIT ?"
        return [str(row[0]) for row in await self._select(query, (after, most))]

    async def purge(self, ids: Sequence[str]) -> None:
        """Nothing of these jobs is to be here any more."""
        keys = [(each,) for each in ids]

        def work(connection: Connection, _: float) -> None:
            connection.executemany("DELETE FROM ending WHERE job_id = ?", keys)
            connection.executemany("DELETE FROM promise WHERE id = ?", keys)

        await self._thread.write(work)
        await self._thread.checkpoint()

    async def forget(self) -> None:
        """What nobody needs any more."""

        def is_needed(connection: Connection, now_time: float) -> bool:
            return any(
                connection.execute(f"SELECT 1 FROM {table} WHERE due_time <= ? LIMIT 1", (now_time,)).get  # noqa: S608 - own names
                for table in _TABLES
            )

        def work(connection: Connection, now_time: float) -> None:
            for table in _TABLES:
                connection.execute(f"DELETE FROM {table} WHERE due_time <= ?", (now_time,))  # noqa: S608 - own names

        await self._thread.write(work, is_needed)

    async def close(self) -> None:
        await self._thread.close()
